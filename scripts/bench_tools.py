"""What the benchmarks share: a clock, made-up tokens, a table and a JSON file."""

import argparse
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.files import atomic_write, write_json
from configs.load import load_config
from configs.schema import RunConfig
from data.shards import EncodedClip, write_header, write_shard
from scripts.cli import command_line
from scripts.clips import align
from scripts.run_log import environment

PICTURES = (".png", ".svg")
WARM_UP = 5  # steps that are not timed
NUM_CLIPS = 256  # made-up ones: more than a step of any recipe takes
CODEC = {
    "name": "made-up codec",
    "sample_rate": 16_000,
    "hop_length": 320,
    "frame_rate": 50.0,
    "num_codebooks": 8,
    "codebook_size": 1024,
    "fingerprint": "made up",
}
SEMANTIC = {
    "name": "made-up semantic tokens",
    "sample_rate": 16_000,
    "frame_rate": 50.0,
    "num_tokens": 500,
    "fingerprint": "made up",
}


def add_result_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    parser.add_argument("--out", metavar="FILE.json", help="write the figures there as well")


def check_picture(path: str) -> None:
    """ValueError: it cannot be drawn."""
    if Path(path).suffix not in PICTURES:
        raise ValueError(f"--plot {path}: name it .png or .svg")
    if not find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install matplotlib==3.10.9")


def save_picture(figure: Any, path: Path) -> None:
    """A matplotlib Figure, in the format of the path's ending."""
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format=path.suffix[1:])


def compared(compare: list[str]) -> dict[str, list[str]]:
    """What --compare was given, as name -> overrides. ValueError: not "NAME: key=value ..."."""
    chosen = {}
    for words in compare:
        name, colon, overrides = words.partition(":")
        if not colon or not all("=" in word for word in overrides.split()):
            raise ValueError(f'--compare "{words}": expected "NAME: key=value key=value ..."')
        chosen[name] = overrides.split()
    return chosen


def median_ms(function: Callable[[], object], seconds: float = 0.3) -> float:
    """Milliseconds of a call, the median over `seconds` of calls, warm; a GPU's work included."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no word of CUDA_HOME
    from torch.utils.benchmark import Timer

    timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    timer.timeit(2)
    return 1e3 * timer.blocked_autorange(min_run_time=seconds).median


def write_random_tokens(folder: Path, seconds: float) -> Path:
    """A token folder of random clips a little longer than `seconds`: every crop of them is full."""
    rng, T = np.random.default_rng(0), round(50 * seconds) + 50
    clips = [
        EncodedClip(
            f"{n:03d}.wav",
            "train" if n < NUM_CLIPS else "valid",
            None,
            None,
            T / 50,
            rng.integers(SEMANTIC["num_tokens"], size=T),
            rng.integers(CODEC["codebook_size"], size=(CODEC["num_codebooks"], T)),
        )
        for n in range(NUM_CLIPS + 8)
    ]
    folder.mkdir(parents=True)
    write_shard(folder, 0, clips, [])
    write_header(folder, CODEC, SEMANTIC, num_shards=1)
    return folder


def with_tokens(recipe: str, overrides: list[str], scratch: str) -> list[str]:
    """The overrides, with a folder of random tokens where they name none."""
    if any(word.startswith("data.tokens=") for word in overrides):
        return list(overrides)
    seconds = load_config(RunConfig, recipe, overrides).data.crop_seconds
    return [*overrides, f"data.tokens={write_random_tokens(Path(scratch, 'tokens'), seconds)}"]


def cells(row: dict, columns: dict[str, tuple[str, str]]) -> list[str]:
    """A row's figures as the table shows them, or why there are none; columns: key -> (heading,
    format)."""
    if "failed" in row:
        return [row["failed"], *["-"] * (len(columns) - 1)]
    values = ((row.get(key), form) for key, (_, form) in columns.items())
    return ["-" if value is None else format(value, form) for value, form in values]


def report(
    rows: list[dict],
    table: list[list[str]],
    parsed: argparse.Namespace,
    more: bool = False,
    **facts,
) -> None:
    """Write the rows with everything it takes to measure them again, and print the table.

    more: rows are to come, and the table waits for them; what is lost before then loses no row.
    """
    device = torch.device(parsed.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # facts may say that it was elsewhere
    where = environment(device)
    where |= {key: facts.pop(key) for key in where if key in facts}
    if parsed.out:
        found = {"command": command_line(), **where, **facts, "table": table, "rows": rows}
        write_json(parsed.out, found)
    if more:
        return
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    print(f"\n{where['device']}, {versions}, commit {where['commit']}")
    print(*align(table), sep="\n")
    if parsed.out:
        print(f"written to {parsed.out}")
