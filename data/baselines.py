"""What a loss is worth: the loss of two models that need no training, from the same data."""

import math
from dataclasses import dataclass

import numpy as np

from data.shards import TokenFolder, unigram_counts


@dataclass(frozen=True)
class Baseline:
    """nats per token of each codebook, and their sum as bits per second of audio."""

    nats: list[float]
    bits_per_second: float


def bits_per_second(nats: list[float], rates: list[float]) -> float:
    """Mean nats per token of each codebook and tokens per second of each -> bits per second."""
    return sum(n * rate for n, rate in zip(nats, rates, strict=True)) / math.log(2)


def baselines(
    folder: TokenFolder, codebooks: list[str], collapse: bool = False, split: str = "valid"
) -> dict[str, Baseline]:
    """`uniform`: every token equally likely. `unigram`: the train split's frequencies plus one,
    scored on `split`. `codebooks` are "semantic" or "c<k>"; `collapse` drops repeats of
    semantic tokens. EOS, one token a recording, is not counted.
    """
    train, valid = (unigram_counts(folder, split, collapse) for split in ("train", split))

    def pick(counts: tuple[np.ndarray, np.ndarray], name: str) -> np.ndarray:
        return counts[0] if name == "semantic" else counts[1][int(name[1:])]

    uniform, unigram = [], []
    for name in codebooks:
        seen, scored = pick(train, name) + 1.0, pick(valid, name)
        uniform.append(math.log(len(seen)))
        unigram.append(float(-(scored * np.log(seen / seen.sum())).sum() / scored.sum()))
    rates = token_rates(folder, codebooks, collapse, split)
    return {
        "uniform": Baseline(uniform, bits_per_second(uniform, rates)),
        "unigram": Baseline(unigram, bits_per_second(unigram, rates)),
    }


def token_rates(
    folder: TokenFolder, codebooks: list[str], collapse: bool = False, split: str = "valid"
) -> list[float]:
    """Tokens per second of audio of each codebook; without repeats, those of `split`."""
    rates = {"semantic": float(folder.semantic["frame_rate"])}
    if collapse and "semantic" in codebooks:
        kept = unigram_counts(folder, split, collapse)[0].sum()
        rates["semantic"] *= float(kept) / sum(clip.num_semantic for clip in folder.clips(split))
    return [rates.get(name, float(folder.codec["frame_rate"])) for name in codebooks]
