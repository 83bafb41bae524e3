"""A toy codec, MFCC tokens, recordings and runs of every stage on them, for tests of sampling."""

from pathlib import Path

import torch

from configs.codec_schema import CodecConfig
from configs.load import load_config
from configs.schema import RunConfig
from data.audio import find_recordings, save_audio
from model.codec import Codec
from model.semantic import MfccConfig, MfccKMeans
from model.stages import STAGES
from scripts import prepare
from train import train

RATE = 16_000


def save_wav(path: Path, seconds: float) -> Path:
    """A tone of random loudness."""
    torch.manual_seed(int(seconds * 10))
    tone = torch.sin(torch.arange(int(seconds * RATE)) / 20) * torch.rand(int(seconds * RATE))
    save_audio(path, 0.3 * tone[None], RATE)
    return path


def make_world(root: Path, *overrides: str, semantic_hop: int = 320) -> Path:
    """`root` with a folder per stage, each a run of two steps with a context of 1 s. The codec has
    50 frames a second, 4 codebooks of 16; the semantic tokens are 12, one every `semantic_hop`
    samples."""
    torch.manual_seed(0)
    small = {"encoder_filters": 2, "decoder_filters": 2, "num_lstm": 0, "dimension": 8}
    codec = Codec(CodecConfig(num_codebooks=4, codebook_size=16, **small))
    for layer in codec.quantizer.vq.layers:
        layer._codebook.embed.normal_()
    codec.save(root / "codec")
    semantic = MfccKMeans(MfccConfig(hop_length=semantic_hop))
    F = semantic.num_features
    semantic.set_codebook(torch.zeros(F), torch.ones(F), torch.randn(12, F))
    semantic.save(root / "mfcc")
    for n in range(8):
        save_wav(root / "audio" / f"{n}.wav", 1 + n / 10)
    prepare.prepare(
        find_recordings(root / "audio"),
        prepare.load_codec(str(root / "codec")),
        prepare.load_semantic(str(root / "mfcc")),
        root / "tokens",
    )
    for stage in STAGES:
        settings = [
            f"stage={stage}",
            f"out={root / stage}",
            f"data.tokens={root / 'tokens'}",
            "data.crop_seconds=1.0",
            "num_coarse=2",
            "model={dim: 16, num_layers: 1, num_heads: 2, head_dim: 8}",
            "train={steps: 2, batch_size: 2, save_every: 1, valid_every: 2}",
        ]
        train(load_config(RunConfig, None, [*settings, *overrides]))
    return root
