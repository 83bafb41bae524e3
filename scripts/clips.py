"""What the measurements share: which recordings they take, and how they print a table."""

import argparse
from pathlib import Path

from configs.files import write_json
from data.audio import SPLITS, Recording
from data.segments import default_split, find_split, spread
from scripts.cli import command_line


def add_clip_options(parser: argparse.ArgumentParser) -> None:
    """What `select_recordings` reads, how they are judged, and where the figures go."""
    add_selection_options(parser)
    parser.add_argument(
        "--asr",
        metavar="MODEL",
        help="English WER by this Whisper model: a CTranslate2 folder, or a name (network)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one per CPU")


def add_selection_options(parser: argparse.ArgumentParser, what: str = "") -> None:
    """What `select_recordings` needs, and where the figures go; what: they are for, if --audio may
    lack."""
    folder = f"{what}folder of recordings or JSONL manifest"
    parser.add_argument("--audio", required=not what, help=folder)
    parser.add_argument(
        "--split", choices=(*SPLITS, "all"), help="default: test, else valid, or all without splits"
    )
    parser.add_argument("--match", default="", metavar="TEXT", help="only names with TEXT in them")
    parser.add_argument("--limit", type=int, metavar="N", help="only N clips, evenly spread")
    parser.add_argument("--out", metavar="FILE.json", help="write the figures there as well")


def check_out(out: str | None) -> None:
    """ValueError, before anything is measured: --out is a folder."""
    if out and Path(out).is_dir():
        raise ValueError(f"--out {out}: a folder; name a file in it")


def select_recordings(parsed: argparse.Namespace, with_text: bool = False) -> list[Recording]:
    """Those of the split whose name matches, up to the limit. ValueError: none."""
    for option in ("limit", "workers"):
        number = getattr(parsed, option, None)
        if number is not None and number < 1:
            raise ValueError(f"--{option} {number}: at least 1")
    parsed.split = parsed.split or default_split(parsed.audio, "all")
    recordings = find_split(parsed.audio, parsed.split)
    recordings = [recording for recording in recordings if parsed.match in recording.name]
    where = f"{parsed.audio}, {parsed.split}"
    if not recordings:
        raise ValueError(f"--match {parsed.match}: in no name of {where}")
    if with_text and not (recordings := [r for r in recordings if r.text]):
        raise ValueError(f"--asr needs texts to compare with, and no clip of {where} has one")
    return spread(recordings, parsed.limit or len(recordings))


def write_figures(out: str | None, report: dict, table: list[list[str]]) -> None:
    """Where asked for: the report, its printed table, and how to make it again, as JSON."""
    if out:
        write_json(out, {"command": command_line(), **report, "table": table})


def format_cell(row: dict, key: str, form: str, with_interval: bool = True) -> str:
    """row[key], with half of its interval where the row has one; "-" for None."""
    if row[key] is None:
        return "-"
    interval = row.get(f"{key}_interval") if with_interval else None
    half = f" ±{(interval[1] - interval[0]) / 2:{form}}" if interval else ""
    return format(row[key], form) + half


def align(table: list[list[str]]) -> list[str]:
    """A line per row of cells; the first column to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    lines = []
    for name, *cells in table:
        others = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([f"{name:<{widths[0]}}", *others]))
    return lines
