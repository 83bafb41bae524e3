"""Figures for one reconstructed clip: STOI, SI-SDR, mel distance. Shared by training and evaluate.

torchmetrics and pystoi are optional: without them a figure is None and one line says what to
install.
"""

import sys
import warnings
from functools import cache

import torch
from torch import Tensor

from scripts.codec_losses import MEL_SCALES, MelDistance


@cache
def _say_missing(package: str, figure: str) -> None:
    print(f"no {figure}: {package} is not installed; pip install {package}", file=sys.stderr)


def stoi(estimate: Tensor, target: Tensor, sample_rate: int) -> float | None:
    """Short-time objective intelligibility (Taal et al. 2011) of wav [1, L], up to 1, or None.

    None also where it is not defined: clips with less than about 0.4 s of speech in them.
    """
    try:
        import pystoi  # noqa: F401  (what torchmetrics calls)
        from torchmetrics.functional.audio.stoi import short_time_objective_intelligibility
    except ImportError as error:
        _say_missing("torchmetrics" if "torchmetrics" in str(error) else "pystoi", "STOI")
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
        try:
            value = short_time_objective_intelligibility(
                estimate[0].double().cpu(), target[0].double().cpu(), sample_rate
            )
        except RuntimeWarning:
            return None
    return float(value)


def si_sdr(estimate: Tensor, target: Tensor) -> float | None:
    """Scale-invariant signal-to-distortion ratio of wav [1, L] in dB, or None for silence."""
    try:
        from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio
    except ImportError:
        _say_missing("torchmetrics", "SI-SDR")
        return None
    if target.abs().max() == 0 or estimate.abs().max() == 0:
        return None
    return float(scale_invariant_signal_distortion_ratio(estimate[0].double(), target[0].double()))


@torch.no_grad()
def mel_distance(distance: MelDistance, estimate: Tensor, target: Tensor) -> float:
    """Mean absolute difference of log10 mel magnitudes of wav [1, L], over several windows."""
    least = max(window for window, _ in MEL_SCALES)
    pad = (0, max(0, least - target.shape[-1]))
    estimate = torch.nn.functional.pad(estimate, pad)
    target = torch.nn.functional.pad(target, pad)
    return float(distance(estimate[None], target[None], log_only=True))


def mean(values: list[float | None]) -> float | None:
    """Mean of the figures that are defined; None when none is."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
