"""Figures for one reconstructed clip: STOI, SI-SDR, mel distance; their mean over many clips."""

import warnings

import numpy as np
import pystoi
import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.codec_losses import MEL_SCALES, MelDistance

NUM_RESAMPLES = 1000


def stoi(estimate: Tensor, target: Tensor, sample_rate: int) -> float | None:
    """Short-time objective intelligibility (Taal et al. 2011) of wav [1, L], up to 1.

    None where it is not defined: less than about 0.4 s of speech.
    """
    clean, degraded = (wav[0].double().cpu().numpy() for wav in (target, estimate))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
        try:
            return float(pystoi.stoi(clean, degraded, sample_rate))
        except RuntimeWarning:
            return None


def si_sdr(estimate: Tensor, target: Tensor) -> float | None:
    """Scale-invariant signal-to-distortion ratio of wav [1, L] in dB; None where not finite."""
    estimate, target = estimate.double(), target.double()
    scaled = (estimate * target).sum() / target.square().sum() * target
    ratio = scaled.square().sum() / (scaled - estimate).square().sum()
    return float(10 * ratio.log10()) if 0 < ratio < torch.inf else None


@torch.no_grad()
def mel_distance(distance: MelDistance, estimate: Tensor, target: Tensor) -> float:
    """Mean absolute difference of log10 mel magnitudes of wav [1, L], over several windows."""
    pad = (0, max(0, MEL_SCALES[-1][0] - target.shape[-1]))  # to the longest window
    return float(distance(F.pad(estimate, pad)[None], F.pad(target, pad)[None]))


def mean(values: list[float | None]) -> float | None:
    """Mean of the figures that are defined; None when none is."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def confidence_interval(
    values: list[float | None], weights: list[float] | None = None, seed: int = 0
) -> list[float] | None:
    """95 % interval [low, high] of sum(values) / sum(weights), by drawing clips with replacement.

    Without weights that is the mean of the values that are defined. The bootstrap (Efron 1979)
    takes clips as independent: of few speakers, the interval is too narrow. None below two clips.
    """
    pairs = zip(values, weights or [1.0] * len(values), strict=True)
    table = np.array([pair for pair in pairs if pair[0] is not None], dtype=float)  # [N, 2]
    if len(table) < 2:
        return None
    N = len(table)
    drawn = np.random.default_rng(seed).multinomial(N, [1 / N] * N, size=NUM_RESAMPLES)
    top, bottom = (drawn @ table).T  # [NUM_RESAMPLES] each
    return np.quantile(top / bottom, [0.025, 0.975]).tolist()
