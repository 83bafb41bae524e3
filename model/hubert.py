"""A small HuBERT (Hsu et al. 2021) out of torchaudio's parts: to be pretrained, kept and read.

A folder holds one: `config.json` (its architecture) and `hubert.safetensors` (fp16 weights).
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchaudio.models import Wav2Vec2Model, hubert_pretrain_model

from configs.files import atomic_write, write_json
from configs.semantic_schema import SmallHubertConfig

CONFIG_FILE, WEIGHT_FILE = "config.json", "hubert.safetensors"
SAMPLE_RATE = 16_000
CONV_SHAPES = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))  # kernel, stride
HOP_LENGTH, WINDOW_LENGTH = 320, 400  # of the whole stack, in samples
POSITION = "encoder.transformer.pos_conv_embed.conv"
TEMPERATURE = 0.1  # of the cosine similarities
SPANS = {"prob": 0.0, "selection": "static", "other": 0.0, "length": 1}
UNUSED_MASKING = {  # torchaudio's mask generator serves for the embedding of masked frames alone
    **{f"mask_{key}": value for key, value in SPANS.items()},
    **{f"mask_channel_{key}": value for key, value in SPANS.items()},
    **{"no_mask_overlap": False, "mask_min_space": 1},
    **{"no_mask_channel_overlap": False, "mask_channel_min_space": 1},
    **{"skip_masked": False, "skip_nomask": False},
}


def pad_to_frames(wav: Tensor, window_length: int, hop_length: int) -> Tensor:
    """wav [B, L] -> [B, T * hop + window - hop], T = ceil(L / hop): exactly T windows fit.

    Zeros on the right up to T whole hops, then (window - hop) / 2 on both sides: window t is
    centred on codec frame t.
    """
    overlap = window_length - hop_length
    right = -wav.shape[-1] % hop_length + overlap - overlap // 2
    return F.pad(wav, (overlap // 2, right))


def exact(x: Tensor) -> Tensor:
    """x in float64, for sums that padding must not change; Apple's GPUs have fp32 alone."""
    return x if x.device.type == "mps" else x.double()


def level(wav: Tensor, lengths: Tensor) -> Tensor:
    """wav [..., L] at a root mean square of 1 over its first `lengths` [..., 1] samples; zeros
    follow. What is said does not depend on how loud it was recorded."""
    power = exact(wav).square().sum(-1, keepdim=True) / lengths  # the same bits, however padded
    return wav * power.clamp(min=1e-10).rsqrt().float()


def span_mask(draws: Tensor, frames: Tensor, probability: float, span: int) -> Tensor:
    """draws [B, T + 1] from [0, 1) and frames [B] -> bool [B, T], True where masked.

    Clip b gets probability * frames[b] / span spans (rounded up or down at random, at least one)
    at distinct starts; they may overlap, as in torchaudio, whose generator is a loop on the CPU.
    """
    T = draws.shape[1] - 1
    position = torch.arange(T, device=draws.device)  # [T]
    num_starts = (frames - span).clamp(min=0) + 1  # [B]
    late = position >= num_starts[:, None]  # [B, T]
    rank = draws[:, 1:].masked_fill(late, 2).argsort(1).argsort(1)  # [B, T]
    num_spans = (probability * frames / span + draws[:, 0]).floor().clamp(min=1)
    begun = (rank < num_spans.minimum(num_starts)[:, None]).cumsum(1)  # spans begun up to here
    ended = F.pad(begun, (span, 0))[:, :T]
    return (begun > ended) & (position < frames[:, None])


def loss_weights(mask: Tensor, frames: Tensor, unmasked: float) -> Tensor:
    """mask [B, T], frames [B] that hold audio -> [B, T]: 1 where masked, `unmasked` where not, 0
    behind the end."""
    audible = torch.arange(mask.shape[1], device=mask.device) < frames[:, None]  # [B, T]
    return torch.where(mask, 1.0, unmasked * audible)


class MaskedPrediction(nn.Module):
    """torchaudio's HuBERTPretrainModel, with a forward for whole batches on a GPU.

    The same modules and numbers. Its own forward gathers masked frames (host syncs) and repeats
    them for every class: 3 GB for 500 classes; here all are scored, and the loss weighs them.
    """

    def __init__(self, config: SmallHubertConfig, num_classes: int, feature_grad_mult: float = 1.0):
        super().__init__()
        self.feature_grad_mult = feature_grad_mult
        self.hubert = hubert_pretrain_model(
            extractor_mode="layer_norm",  # per frame; group norm would let padding leak
            extractor_conv_layer_config=[
                (channels, *shape)
                for channels, shape in zip(config.conv_channels, CONV_SHAPES, strict=True)
            ],
            extractor_conv_bias=True,
            encoder_embed_dim=config.dim,
            encoder_projection_dropout=config.dropout,
            encoder_pos_conv_kernel=config.position_kernel,
            encoder_pos_conv_groups=config.position_groups,
            encoder_num_layers=config.num_layers,
            encoder_num_heads=config.num_heads,
            encoder_attention_dropout=config.dropout,
            encoder_ff_interm_features=config.ff_dim,
            encoder_ff_interm_dropout=0.0,
            encoder_dropout=config.dropout,
            encoder_layer_norm_first=config.norm_first,
            encoder_layer_drop=0.0,
            **UNUSED_MASKING,
            num_classes=num_classes,
            final_dim=config.dim,
            feature_grad_mult=None,
        )
        # Without biases, layer norms multiply the gradient of digital silence by 300 each (norms of
        # 1e5 at the start); with a first one of the default size, quiet speech drowns in it.
        nn.init.normal_(self.hubert.wav2vec2.feature_extractor.conv_layers[0].conv.bias, std=0.02)

    def forward(
        self, wav: Tensor, labels: Tensor, frames: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """wav [B, L], labels [B, T], frames [B] that hold audio, mask [B, T] of those to hide.

        Returns of every frame the nats and whether the best guess is right, both [B, T], and the
        mean square of the convolutions' output.
        """
        hubert, logits = self.hubert.wav2vec2, self.hubert.logit_generator
        wav = pad_to_frames(level(wav, HOP_LENGTH * frames[:, None]), WINDOW_LENGTH, HOP_LENGTH)
        features, _ = hubert.feature_extractor(wav, None)
        scale = self.feature_grad_mult
        features = scale * features + (1 - scale) * features.detach()  # [B, T, C]
        penalty = features.float().square().mean()
        x = hubert.encoder.feature_projection(features)  # [B, T, D]
        x = torch.where(mask[..., None], self.hubert.mask_generator.mask_embedding.to(x.dtype), x)
        T = x.shape[1]
        audible = torch.arange(T, device=x.device) < frames[:, None]  # [B, T]
        x = x * audible[..., None]  # as the convolution of positions pads
        seen = audible[:, None, None].expand(-1, 1, T, T)
        x = hubert.encoder.transformer(x, attention_mask=seen)
        projected = F.normalize(logits.final_proj(x).float(), dim=-1).flatten(0, 1)  # [B*T, D]
        classes = F.normalize(logits.label_embeddings, dim=-1)  # [num_classes, D]
        with torch.autocast(x.device.type, enabled=False):
            scores = projected @ classes.T / TEMPERATURE  # [B*T, num_classes]
            nats = F.cross_entropy(scores, labels.flatten(), reduction="none")
        right = scores.argmax(1) == labels.flatten()
        return nats.view_as(labels), right.view_as(labels), penalty

    def compile_parts(self) -> None:
        """torch.compile what has no random draw on the CPU: the convolutions and every layer."""
        for part in (self.hubert.wav2vec2.feature_extractor, *self.layers):
            part.compile(dynamic=False)

    @property
    def layers(self) -> nn.ModuleList:
        return self.hubert.wav2vec2.encoder.transformer.layers

    def weights(self) -> dict[str, Tensor]:
        """What `build_hubert` loads: fp16, the weight norm of the position convolution folded."""
        hubert = self.hubert.wav2vec2
        tensors = {k: v for k, v in hubert.state_dict().items() if "parametrizations" not in k}
        tensors[f"{POSITION}.weight"] = hubert.get_submodule(POSITION).weight
        return {name: t.detach().half().cpu().contiguous() for name, t in tensors.items()}


def build_hubert(
    config: SmallHubertConfig, weights: dict[str, Tensor], num_layers: int
) -> Wav2Vec2Model:
    """The first `num_layers` layers, in fp32, with `weights` (of those or of all layers).

    ValueError: more layers than there are, or weights of another architecture.
    """
    if not 1 <= num_layers <= config.num_layers:
        raise ValueError(f"layer {num_layers} asked for, it has 1 to {config.num_layers}")
    hubert = MaskedPrediction(config, 1).hubert.wav2vec2
    parametrize.remove_parametrizations(hubert.get_submodule(POSITION), "weight")
    del hubert.encoder.transformer.layers[num_layers:]
    names = hubert.state_dict().keys()
    try:
        hubert.load_state_dict({name: weights[name].float() for name in names})
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"weights of another architecture ({str(error).splitlines()[0]})"
        ) from None
    return hubert.eval().requires_grad_(False)


def save_hubert(
    folder: str | Path, config: SmallHubertConfig, weights: dict[str, Tensor], **facts: Any
) -> None:
    """Write `hubert.safetensors`, then `config.json` with the architecture and `facts`."""
    with atomic_write(Path(folder, WEIGHT_FILE), "wb") as file:
        file.write(safetensors.torch.save(weights))
    write_json(Path(folder, CONFIG_FILE), {"architecture": asdict(config), **facts})


def load_hubert(folder: str | Path) -> tuple[SmallHubertConfig, dict[str, Tensor]]:
    """The architecture and weights of a folder of `save_hubert`, or of the run that has it.

    ValueError: neither of them, or a file of it is damaged.
    """
    found = next((f for f in (Path(folder, "hubert"), Path(folder)) if holds_hubert(f)), None)
    if found is None:
        raise ValueError(f"{folder}: no HuBERT here; pass the out=FOLDER of scripts.train_semantic")
    try:
        entries = json.loads((found / CONFIG_FILE).read_text(encoding="utf-8"))
        config = SmallHubertConfig(**entries["architecture"])
        return config, safetensors.torch.load_file(found / WEIGHT_FILE)
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{found}: damaged or not ours ({error!r})") from None


def holds_hubert(folder: Path) -> bool:
    return (folder / WEIGHT_FILE).is_file() and (folder / CONFIG_FILE).is_file()
