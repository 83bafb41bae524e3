"""Figures: spectrograms as PNG, loss curves as SVG without colours. The listening page's are made
without a plotting library; `scripts.evaluate` draws axes with matplotlib, where it is installed."""

import math
import struct
import zlib
from html import escape
from pathlib import Path

import torch
import torchaudio
from torch import Tensor
from torch.nn import functional as F

from configs.files import atomic_write

LEFT, RIGHT, TOP, BOTTOM = 26, 350, 8, 198  # of the plot inside a 360 x 220 drawing
PICTURE_SECONDS = 4


def spectrogram_png(wav: Tensor, sample_rate: int) -> bytes:
    """wav [1, L] -> greyscale PNG of its `spectrogram`."""
    return grey_png(spectrogram(wav, sample_rate))


def spectrogram(wav: Tensor, sample_rate: int, num_mels: int = 96, frame_rate: int = 125) -> Tensor:
    """wav [1, L] -> pixels uint8 [num_mels, W]: dark = loud, 70 dB deep, mel scale."""
    n_fft = 2 * (sample_rate // 60)  # 33 ms
    wav = F.pad(wav[0], (0, max(0, n_fft - wav.shape[-1])))
    mel = torchaudio.transforms.MelSpectrogram(
        sample_rate, n_fft, hop_length=sample_rate // frame_rate, n_mels=num_mels
    )
    decibels = 10 * torch.log10(mel(wav) + 1e-10)  # [num_mels, T]
    loudness = ((decibels - decibels.max()) / 70 + 1).clamp(0, 1)
    return (255 * (1 - loudness)).round().to(torch.uint8).flip(0)  # low pitch below


def grey_png(pixels: Tensor) -> bytes:
    """pixels uint8 [H, W], 0 = black, first row on top -> an 8-bit greyscale PNG (RFC 2083)."""
    height, width = pixels.shape
    rows = F.pad(pixels, (1, 0)).numpy().tobytes()  # a 0 before each row: no filter
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(rows, 9), b"IEND"):
        png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png


def loss_svg(
    curves: dict[str, list[tuple[int, float]]], levels: dict[str, float], label: str
) -> str:
    """Curves (class -> (step, loss) points) and dashed, named levels (highest first) as SVG.

    Losses that are not finite are left out. `label` is what a screen reader says.
    """
    points = [point for curve in curves.values() for point in curve if math.isfinite(point[1])]
    losses = [loss for _, loss in points] + [*levels.values()]
    low, high = math.floor(min(losses)), math.ceil(max(losses) + 0.2)  # room for the top label
    last = max([1, *(step for step, _ in points)])

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / last

    def y(loss: float) -> float:
        return TOP + (BOTTOM - TOP) * (high - loss) / (high - low)

    def rule(loss: float, kind: str) -> str:
        return f"<path class='{kind}' d='M{LEFT} {y(loss):.1f}H{RIGHT}'/>"

    def text(at: tuple[float, float], anchor: str, words: str) -> str:
        return f"<text x='{at[0]:.1f}' y='{at[1]:.1f}' text-anchor='{anchor}'>{words}</text>"

    svg = ""
    for n in range(low, high + 1, math.ceil((high - low) / 8)):
        svg += rule(n, "grid") + text((LEFT - 8, y(n) + 4), "end", str(n))
    for step, anchor in ((0, "start"), (last // 2, "middle"), (last, "end")):
        svg += text((x(step), BOTTOM + 18), anchor, f"{step:,}")
    for kind, curve in curves.items():
        dots = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in curve if math.isfinite(v))
        svg += f"<polyline class='{escape(kind)}' points='{dots}'/>"
    for index, (name, loss) in enumerate(levels.items()):  # the first above its line, then below
        beside = y(loss) + (14 if index else -5)
        svg += rule(loss, "level") + text((RIGHT, beside), "end", f"{name} {loss:.2f}")
    return f"<svg viewBox='0 0 360 220' role='img' aria-label='{escape(label)}'>{svg}</svg>"


def draw_spectrograms(path: str | Path, clips: dict[str, dict[str, Tensor]], rate: int) -> None:
    """A PNG with a row per clip and a column per version of it: {clip: {version: wav [L]}}.

    Linear in kHz; dark = loud, 70 dB deep below the loudest of a row's first version. Up to
    PICTURE_SECONDS each. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    widest = max(len(versions) for versions in clips.values())
    size = (1 + 2.6 * widest, 0.5 + 2.3 * len(clips))
    figure = Figure(figsize=size, layout="constrained", dpi=80)
    axes = figure.subplots(len(clips), widest, squeeze=False, sharey=True)
    n_fft = 2 * (rate // 60)  # 33 ms
    for row, (name, versions) in zip(axes, clips.items(), strict=True):
        loudest = None
        for plot, (title, wav) in zip(row, versions.items(), strict=True):
            wav = F.pad(wav, (0, max(0, n_fft - len(wav))))[: PICTURE_SECONDS * rate]
            window = torch.hann_window(n_fft)
            bins = torch.stft(wav, n_fft, rate // 250, window=window, return_complex=True)
            decibels = 20 * (bins.abs() + 1e-6).log10()  # [n_fft / 2 + 1, T]
            loudest = decibels.max() if loudest is None else loudest  # of the first, the original
            extent = (0, len(wav) / rate, 0, rate / 2000)
            limits = {"vmin": float(loudest - 70), "vmax": float(loudest), "cmap": "gray_r"}
            plot.imshow(decibels.numpy(), origin="lower", aspect="auto", extent=extent, **limits)
            plot.set_title(title, fontsize=9)
            plot.tick_params(labelsize=7)
            plot.set_xlabel("s", fontsize=8)
        row[0].set_ylabel(f"{name}\nkHz", fontsize=8)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png")
