"""What runs were worth at their validations: curves that their recipes may be expected to have."""

import argparse
import json
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import numpy as np

from configs.load import load_config
from configs.schema import RunConfig
from scripts.bench_tools import report
from scripts.report import read_run

NUM_POINTS = 4  # of a curve, in the table


def read_curve(folder: Path) -> dict:
    """A run's name, baselines and curve, and where it was begun. ValueError: it has none yet."""
    run = read_run(folder)
    if not run.valid:
        raise ValueError(f"{folder}: no validation yet (train.valid_every)")
    trained = sorted(run.train)
    steps, seconds = [0, *trained], [0.0, *accumulate(run.train[n]["seconds"] for n in trained)]
    valid = [run.valid[step] for step in sorted(run.valid)]
    found = {"name": folder.name, "stage": run.start["stage"]}
    found |= {name: run.start[name] for name in ("uniform", "unigram")}
    found["best"] = min(line["loss"] for line in valid)
    found["curve"] = [
        (line["step"], float(np.interp(line["step"], steps, seconds)), line["loss"])
        for line in valid
    ]
    found["bits"] = [line["bits_per_second"] for line in valid]
    found["config"] = asdict(load_config(RunConfig, folder / "config.yaml"))
    return found | {"where": {key: run.start[key] for key in ("device", "versions", "commit")}}


def cells(row: dict) -> list[str]:
    """Baselines, losses at equal parts of the run, their bits per second, seconds of training."""
    levels = [row[name] for name in ("uniform", "unigram")]
    shown = [f"{sum(x['nats']) / len(x['nats']):.2f} ({x['bits_per_second']:.0f})" for x in levels]
    N = len(row["curve"])
    chosen = sorted({max(0, round(N * part / NUM_POINTS) - 1) for part in range(1, NUM_POINTS + 1)})
    points = [
        f"{loss:.2f} ({bits:.0f}) at {step:,}"
        for (step, _, loss), bits in ((row["curve"][n], row["bits"][n]) for n in chosen)
    ]
    points = ["-"] * (NUM_POINTS - len(points)) + points  # the last one is the end
    return [row["name"], *shown, *points, f"{row['curve'][-1][1]:,.0f}"]


def bench_curve(parsed: argparse.Namespace) -> None:
    rows = [read_curve(Path(run)) for run in parsed.runs]
    heading = ["nats per token (bits per second)", "uniform", "unigram"]
    heading += [*[""] * (NUM_POINTS - 1), "end", "seconds"]
    places = {json.dumps(row.pop("where")) for row in rows}
    if len(places) > 1:
        raise ValueError("runs of several devices, versions or commits: a file for each")
    report(rows, [heading, *map(cells, rows)], parsed, **json.loads(places.pop()))


def add_curve_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=bench_curve, device=None)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of train.py")
    parser.add_argument("--out", metavar="FILE.json", help="write the figures there as well")
