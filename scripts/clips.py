"""Which recordings a measurement takes: the options and the choice."""

import argparse

from data.audio import Recording
from data.segments import find_split, spread


def add_clip_options(parser: argparse.ArgumentParser) -> None:
    """What `select_recordings` reads, how they are judged, and where the figures go."""
    parser.add_argument("--audio", required=True, help="folder of recordings or JSONL manifest")
    parser.add_argument("--split", default="test", choices=("train", "valid", "test"))
    parser.add_argument("--match", default="", metavar="TEXT", help="only names with TEXT in them")
    parser.add_argument("--limit", type=int, metavar="N", help="only N clips, evenly spread")
    parser.add_argument(
        "--asr",
        metavar="MODEL",
        help="English WER by this Whisper model: a CTranslate2 folder, or a name (network)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one per CPU")
    parser.add_argument("--out", metavar="FILE.json", help="write the figures there as well")


def select_recordings(parsed: argparse.Namespace, with_text: bool = False) -> list[Recording]:
    """Those of the split whose name matches, up to the limit. ValueError: none."""
    for option in ("limit", "workers"):
        number = getattr(parsed, option)
        if number is not None and number < 1:
            raise ValueError(f"--{option} {number}: at least 1")
    recordings = find_split(parsed.audio, parsed.split)
    recordings = [recording for recording in recordings if parsed.match in recording.name]
    where = f"{parsed.audio}, {parsed.split}"
    if not recordings:
        raise ValueError(f"--match {parsed.match}: in no name of {where}")
    if with_text and not (recordings := [r for r in recordings if r.text]):
        raise ValueError(f"--asr needs texts to compare with, and no clip of {where} has one")
    return spread(recordings, parsed.limit or len(recordings))
