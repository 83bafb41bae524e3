"""What runs were worth at their validations: curves that their recipes may be expected to have."""

import argparse
import json
from pathlib import Path

import yaml

from scripts.bench_learn import read_run
from scripts.bench_tools import report

NUM_POINTS = 4  # of a curve, in the table


def read_curve(run: Path) -> dict:
    """A run's name, baselines and curve, and where it was trained. ValueError: it has none yet."""
    log = run / "log.jsonl"
    if not log.exists():
        raise ValueError(f"{run}: no log.jsonl in it; pass the folder of a run of train.py")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    if not any(line["kind"] == "valid" for line in lines):
        raise ValueError(f"{run}: no validation yet (train.valid_every)")
    start = next(line for line in lines if line["kind"] == "start")
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    levels = {name: start[name] for name in ("uniform", "unigram")}
    bits = [line["bits_per_second"] for line in lines if line["kind"] == "valid"]
    where = {key: start[key] for key in ("device", "versions", "commit")}
    found = {"name": run.name, "stage": start["stage"], **levels, **read_run(log), "bits": bits}
    return {**found, "config": config, "where": where}


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
