"""A small token folder with something to learn in it, for tests of training and sampling."""

from fractions import Fraction
from math import ceil
from pathlib import Path

import numpy as np

from data.shards import EncodedClip, write_header, write_shard

NUM_SEMANTIC, NUM_CODEBOOKS, CODEBOOK_SIZE = 12, 4, 16
CODEC = {
    "name": "fake-codec",
    "sample_rate": 16_000,
    "hop_length": 320,
    "frame_rate": 50.0,
    "num_codebooks": NUM_CODEBOOKS,
    "codebook_size": CODEBOOK_SIZE,
    "fingerprint": "c0dec",
}
SEMANTIC = {
    "name": "fake-semantic",
    "sample_rate": 16_000,
    "frame_rate": 50.0,
    "num_tokens": NUM_SEMANTIC,
    "fingerprint": "5e3a",
}


def clip(
    name: str,
    split: str,
    num_frames: int,
    seed: int,
    num_codebooks: int = NUM_CODEBOOKS,
    rate: Fraction = Fraction(1),
) -> EncodedClip:
    """Semantic tokens that count upwards from a random start, `rate` of them a frame; codes that
    follow from them."""
    rng = np.random.default_rng(seed)
    semantic = (rng.integers(NUM_SEMANTIC) + np.arange(ceil(num_frames * rate)) // 2) % NUM_SEMANTIC
    heard = semantic[[int(frame * rate) for frame in range(num_frames)]]
    codes = (heard[None] + 3 * np.arange(num_codebooks)[:, None]) % CODEBOOK_SIZE
    codes = np.where(
        rng.random(codes.shape) < 0.1, rng.integers(0, CODEBOOK_SIZE, codes.shape), codes
    )
    return EncodedClip(name, split, "anna", None, num_frames / 50, semantic, codes)


def write_tokens(
    folder: Path, num_train: int = 24, codec: dict = CODEC, semantic: dict = SEMANTIC
) -> Path:
    """`num_train` training clips and 6 validation clips of 8 to 40 frames."""
    rate = Fraction(semantic["frame_rate"] / codec["frame_rate"]).limit_denominator(1000)
    lengths = np.random.default_rng(0).integers(8, 40, num_train + 6)
    clips = [
        clip(
            f"{n:03d}.wav",
            "train" if n < num_train else "valid",
            int(length),
            n,
            codec["num_codebooks"],
            rate,
        )
        for n, length in enumerate(lengths)
    ]
    write_shard(folder, 0, clips, [])
    write_header(folder, codec, semantic, num_shards=1)
    return folder
