"""Whether long clips stay what they began as: voice, level and silence, piece by piece."""

import argparse
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.audio import Recording, find_recordings, read_audio, resample
from scripts.bench_tools import check_picture, save_picture
from scripts.clips import (
    add_selection_options,
    align,
    check_out,
    format_cell,
    select_recordings,
    write_figures,
)
from scripts.codec_metrics import confidence_interval, mean
from scripts.generation_metrics import silent_share
from scripts.run_log import environment
from scripts.speech_metrics import (
    SAMPLE_RATE,
    SpeakerSimilarity,
    not_measured,
    versions_of_packages,
)

COLUMNS = {
    "num_clips": ("clips", "d"),
    "voice": ("voice", ".3f"),
    "silent": ("silent", ".1%"),
    "level_db": ("level, dB", ".1f"),
}
REAL = ("audio", "split", "match", "limit")  # options
NOT_MADE = ("-original", "-reconstruction", "-real")  # what lies beside clips
LEGEND = """\
voice: cosine to that of the same clip's first piece, where both have one; silent: share of frames
  below -50 dB.
±: half of the 95 % interval over clips."""


def pieces_of(wav: np.ndarray, seconds: float) -> list[np.ndarray]:
    """wav [L] at SAMPLE_RATE in pieces; what is left at the end counts from half a piece on."""
    size = round(seconds * SAMPLE_RATE)
    pieces = [wav[at : at + size] for at in range(0, len(wav), size)]
    return [piece for piece in pieces if 2 * len(piece) >= size]


def listen(recording: Recording) -> np.ndarray:
    """[L] at SAMPLE_RATE, mono."""
    return resample(*read_audio(recording.path), SAMPLE_RATE)[0].numpy()


def level_db(wav: np.ndarray) -> float | None:
    power = float((wav.astype(np.float64) ** 2).mean())
    return 10 * np.log10(power) if power else None


def piece_figures(wav: np.ndarray, seconds: float, voices: SpeakerSimilarity | None) -> list[dict]:
    """Of each piece of a clip."""
    found, pieces = [], pieces_of(wav, seconds)
    first = voices.embed(pieces[0]) if voices and pieces else None
    for n, piece in enumerate(pieces):
        figures = {"silent": silent_share(piece, SAMPLE_RATE), "level_db": level_db(piece)}
        # of the first with itself there is nothing to say
        own = voices.embed(piece) if n and first is not None else None
        figures["voice"] = None if own is None else float(own @ first)
        found.append(figures)
    return found


def table_rows(clips: list[list[dict]], seconds: float) -> list[dict[str, Any]]:
    """A row per piece, over the clips that are so long."""
    rows = []
    for n in range(max(map(len, clips))):
        there = [clip[n] for clip in clips if n < len(clip)]
        row = {"from": n * seconds, "to": (n + 1) * seconds, "num_clips": len(there)}
        for key in ("voice", "silent", "level_db"):
            values = [figures[key] for figures in there]
            row |= {key: mean(values), f"{key}_interval": confidence_interval(values)}
        rows.append(row)
    return rows


def rulers(recordings: list[Recording], seconds: float, voices: SpeakerSimilarity) -> dict:
    """The same cosine of real recordings of one speaker and of two, each as long as a piece at
    most; None without such pairs."""
    embedded = []
    for recording in tqdm(recordings, desc="real voices", disable=None):
        voice = voices.embed(listen(recording)[: round(seconds * SAMPLE_RATE)])
        if recording.speaker is not None and voice is not None:
            embedded.append((recording.speaker, voice))
    same, other = [], []
    for (a, voice_a), (b, voice_b) in combinations(embedded, 2):
        (same if a == b else other).append(float(voice_a @ voice_b))
    return {"one speaker": mean(same), "two speakers": mean(other)}


def evaluate_long(parsed: argparse.Namespace) -> None:
    """A table by piece, and JSON and a picture where asked for."""
    seconds = parsed.piece_seconds
    if not 1 <= seconds < math.inf:
        raise ValueError(f"--piece-seconds {seconds}: a number, at least 1")
    for option in REAL[1:]:
        if getattr(parsed, option) and not parsed.audio:
            raise ValueError(f"--{option} chooses among the real recordings: add --audio")
    if parsed.plot:
        check_picture(parsed.plot)
    check_out(parsed.out)
    if not Path(parsed.clips).is_dir():
        raise ValueError(f"{parsed.clips}: no such folder of clips")
    found = find_recordings(parsed.clips)
    made = [recording for recording in found if not recording.path.stem.endswith(NOT_MADE)]
    if len(made) < len(found):
        print(f"{len(found) - len(made)} of {len(found)} files are not made: left out")
    if not made:
        raise ValueError(f"{parsed.clips}: no clips that were made")
    real = select_recordings(parsed) if parsed.audio else []
    notes = not_measured(["speaker_similarity"])
    voices = None if notes else SpeakerSimilarity()
    heard = {r.name: listen(r) for r in tqdm(made, desc="clips", disable=None)}
    clips = {name: piece_figures(wav, seconds, voices) for name, wav in heard.items()}
    if not any(clips.values()):
        raise ValueError(f"{parsed.clips}: every clip is shorter than half of {seconds:g} s")
    where = environment(torch.device("cpu"))
    where["versions"] |= versions_of_packages()
    report = {
        **{key: getattr(parsed, key) for key in ("clips", "piece_seconds", *REAL)},
        "real": rulers(real, seconds, voices) if real and voices else {},
        "not_measured": notes,
        **where,
        "by_clip": clips,
        "rows": table_rows([*clips.values()], seconds),
    }
    write_figures(parsed.out, report, print_report(report))
    if parsed.plot:
        draw(report, Path(parsed.plot))


def print_report(report: dict) -> list[list[str]]:
    """Returns the table."""
    table = [["seconds", *(heading for heading, _ in COLUMNS.values())]]
    for row in report["rows"]:
        cells = (format_cell(row, key, form) for key, (_, form) in COLUMNS.items())
        table.append([f"{row['from']:g} to {row['to']:g}", *cells])
    print(*align(table), LEGEND, sep="\n")
    for name, voice in report["real"].items():
        print(f"real recordings of {name}: {'no such pair' if voice is None else f'{voice:.3f}'}")
    print(*report["not_measured"].values(), sep="\n", end="\n" if report["not_measured"] else "")
    return table


def draw(report: dict, path: Path) -> None:
    """The voice over time, each clip and their mean, between the rulers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    plot, seconds = figure.subplots(), report["piece_seconds"]
    for clip in report["by_clip"].values():
        at = [(n + 0.5) * seconds for n in range(1, len(clip))]
        values = [np.nan if x["voice"] is None else x["voice"] for x in clip[1:]]
        plot.plot(at, values, color="C0", alpha=0.25, linewidth=0.8)
    rows = [row for row in report["rows"] if row["voice"] is not None]
    at = [(row["from"] + row["to"]) / 2 for row in rows]
    plot.plot(at, [row["voice"] for row in rows], "o-", color="C0", label="made, mean of clips")
    for n, (name, voice) in enumerate(report["real"].items(), start=1):
        if voice is not None:
            plot.axhline(voice, color=f"C{n}", linestyle="--", label=f"real, {name}")
    plot.set(xlabel="seconds", ylabel="cosine to the clip's first piece", ylim=(0, 1))
    plot.legend(fontsize="small", loc="lower left")
    save_picture(figure, path)


def add_long_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=evaluate_long)
    parser.add_argument("clips", metavar="FOLDER", help="of clips that were made")
    add_selection_options(parser, what="real voices to compare with: ")
    parser.add_argument(
        "--piece-seconds", type=float, default=10.0, metavar="S", help="of a row (10)"
    )
    parser.add_argument("--plot", metavar="FILE.svg", help="the voice as a picture (svg or png)")
