"""What a recipe learns and what its alternatives do, over seeds: by steps and by seconds."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from configs.load import load_config
from configs.schema import RunConfig
from scripts.bench_tools import check_picture, compared, report, save_picture

ROOT = Path(__file__).parent.parent
Curve = list[tuple[int, float, float]]  # (step, seconds of training, validation loss)


def read_run(log: Path) -> dict:
    """The validations of a run, at the seconds that its steps took until then; the best one; what
    its log said of speed and memory."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    steps = [0, *(line["step"] for line in trained)]
    seconds = [0.0, *accumulate(line["seconds"] for line in trained)]
    valid = [(line["step"], line["loss"]) for line in lines if line["kind"] == "valid"]
    return {
        "best": min(loss for _, loss in valid),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in trained),
        "peak_gib": trained[-1]["peak_memory_gib"],
        "curve": [(step, float(np.interp(step, steps, seconds)), loss) for step, loss in valid],
    }


def reached(curve: Curve, target: float) -> tuple[float, float] | None:
    """(step, seconds) at which a straight line between validations first is at `target`."""
    before = None
    for step, seconds, loss in curve:
        if loss <= target:
            if before is None:
                return step, seconds
            share = (before[2] - target) / (before[2] - loss)
            return (
                before[0] + share * (step - before[0]),
                before[1] + share * (seconds - before[1]),
            )
        before = (step, seconds, loss)
    return None


def train_one(recipe: str, overrides: list[str], out: Path) -> dict:
    """Train in a process of its own. ValueError: it failed, with its last line."""
    words = [*overrides, f"out={out}", "train.sample_every=0", "wandb.mode=disabled"]
    command = [sys.executable, str(ROOT / "train.py"), "--config", recipe, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ValueError(f"{' '.join(command[1:])} failed: {''.join(said)}")
    return read_run(out / "log.jsonl")


def spread(values: Sequence[float], digits: str) -> str:
    """Mean and, of several, the half of the range."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.fmean(values):{digits}}" + f" ± {half:{digits}}" * (len(values) > 1)


def by_name(rows: list[dict]) -> dict[str, list[dict]]:
    """The seeds of each variant."""
    names = dict.fromkeys(row["name"] for row in rows)
    return {name: [row for row in rows if row["name"] == name] for name in names}


def summarise(rows: list[dict], target: float) -> list[list[str]]:
    """A line per variant; adds to each row when it reached `target`."""
    table = [["", "best loss", "ms/step", "tokens/s", "GiB", f"steps to {target:.3f}", "seconds"]]
    for row in rows:
        row["reached"] = reached(row["curve"], target)
    for name, own in by_name(rows).items():
        found, when = [row["reached"] for row in own if row["reached"]], ["-", "-"]
        if found:
            steps, seconds = zip(*found, strict=True)
            when = [spread(steps, ",.0f"), spread(seconds, ".1f")]
        if 0 < len(found) < len(own):
            when = [f"{cell} ({len(found)} of {len(own)})" for cell in when]
        speeds = [1e3 * row["curve"][-1][1] / row["curve"][-1][0] for row in own]
        best = spread([row["best"] for row in own], ".3f")
        tokens = f"{statistics.fmean(row['tokens_per_second'] for row in own):,.0f}"
        memory = own[0]["peak_gib"]
        memory = "-" if memory is None else f"{memory:.1f}"
        table.append([name, best, spread(speeds, ".1f"), tokens, memory, *when])
    return table


def draw(rows: list[dict], target: float, path: Path) -> None:
    """Validation losses over steps and over seconds, a line per seed, a colour per variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    for number, (name, own) in enumerate(by_name(rows).items()):
        for label, row in zip([name, *[None] * len(own)], own, strict=False):
            steps, seconds, losses = zip(*row["curve"], strict=True)
            by_step.plot(steps, losses, f"C{number}", label=label, linewidth=1)
            by_second.plot(seconds, losses, f"C{number}", linewidth=1)
    for axis, unit in ((by_step, "steps"), (by_second, "seconds of training")):
        axis.axhline(target, color="grey", linewidth=0.8, linestyle="--")
        axis.set_xlabel(unit)
    by_step.set_ylabel("validation loss, nats per token")
    by_step.legend()
    save_picture(figure, path)


def bench_learn(parsed: argparse.Namespace) -> None:
    """Each variant and seed in turn; the runs themselves are not kept."""
    chosen = {"as configured": [], **compared(parsed.compare)}
    for words in chosen.values():  # a typo is an error before anything is trained
        load_config(RunConfig, parsed.config, [*parsed.overrides, "out=.", *words])
    if parsed.plot:
        check_picture(parsed.plot)
    rows, failures = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for name, words in chosen.items():
            for seed in parsed.seeds:
                overrides = [*parsed.overrides, *words, f"train.seed={seed}"]
                try:
                    out = Path(scratch, str(len(rows) + len(failures)))
                    run = train_one(parsed.config, overrides, out)
                except ValueError as error:  # the others' figures are not lost
                    failures.append(str(error))
                    print(f"{name}, seed {seed}: {error}", flush=True)
                    continue
                rows.append({"name": name, "overrides": words, "seed": seed, **run})
                seconds = run["curve"][-1][1]
                print(f"{name}, seed {seed}: {run['best']:.4f}, {seconds:.1f} s", flush=True)
                show(rows, parsed, more=True)
    if not rows:
        raise ValueError(failures[0])
    show(rows, parsed, more=False)


def show(rows: list[dict], parsed: argparse.Namespace, more: bool) -> None:
    target = parsed.target if parsed.target is not None else max(row["best"] for row in rows)
    facts = {"config": parsed.config, "overrides": parsed.overrides, "target": target}
    report(rows, summarise(rows, target), parsed, more, **facts)
    if parsed.plot and not more:
        draw(rows, target, Path(parsed.plot))


def add_learn_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=bench_learn, device=None)
    parser.add_argument("--config", required=True, help="a YAML recipe from configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar='"NAME: key=value ..."', help="alternatives"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--target", type=float, help="loss to reach (what every run reached)")
    parser.add_argument("--plot", metavar="FILE.svg", help="the curves as a picture (svg or png)")
    parser.add_argument("--out", metavar="FILE.json", help="write the figures there as well")
