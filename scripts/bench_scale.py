"""One recipe on one process and on several, by each way of sharing: speed, losses, equal ranks.

Every process has the recipe's batch. Speed is that of one process with its batch alone, times their
number; losses are those of one process with the batches of all, as micro-batches. How far rounding
alone drives losses apart says one more row, of the same clips in micro-batches half as large.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from configs.files import write_json
from configs.load import load_config
from configs.schema import RunConfig
from scripts.bench_tools import cells, report, with_tokens
from scripts.bench_train import time_steps
from scripts.cli import run_cli

ROOT = Path(__file__).parent.parent
STRATEGIES = ("ddp", "fsdp2")
ALONE, ALL = "1 process", "1 process, clips of all"
COLUMNS = {
    "milliseconds": ("ms/step", ",.1f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "of_linear": ("of linear", ".3f"),
    "mfu": ("MFU", ".1%"),
    "peak_gib": ("GiB a process", ".1f"),
    "alike": ("equal ranks", ""),
    "loss": ("loss", ".4f"),
    "apart": ("loss apart by", ".1e"),
}


def launch(strategy: str | None, num_processes: int, words: list[str]) -> dict:
    """The figures of `time_one` in so many processes. {"failed"}: why there are none."""
    python = [sys.executable, "-m"]
    if strategy and torch.cuda.is_available():
        file = ROOT / "configs" / "accelerate" / f"{strategy}.yaml"
        python += ["accelerate.commands.launch", "--config_file", str(file)]
        python += ["--num_processes", str(num_processes), "-m"]
    elif strategy:  # Accelerate launches one process on a CPU
        python += ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        python += ["-m"]
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [*python, "scripts.bench_scale", *words],
        cwd=ROOT, env=alone, capture_output=True, text=True, check=False,
    )  # fmt: skip
    out = Path(words[words.index("--out") + 1])
    if done.returncode or not out.is_file():
        said = done.stderr.splitlines() or ["it said nothing"]
        return {"failed": next((line for line in said if "rror" in line), said[-1])[:300]}
    return json.loads(out.read_text())


def plan(batch_size: int, num_micro: int, most: int, strategies: Sequence[str]) -> dict[str, tuple]:
    """Name of a row -> (strategy, processes, clips a step, micro-batches of a process); ALONE and
    ALL are what the others are compared with."""
    clips = batch_size * most
    rows = {
        ALONE: (None, 1, batch_size, num_micro),
        ALL: (None, 1, clips, num_micro * most),
        f"{ALL}, halved": (None, 1, clips, 2 * num_micro * most),
    }
    for num in (n for n in range(2, most + 1) if most % n == 0):
        for strategy in strategies:
            rows[f"{num} processes, {strategy}"] = (strategy, num, clips, num_micro * most // num)
    return rows


def compare(rows: dict[str, dict]) -> None:
    """Adds how near each row's speed is to that of so many processes, and how far its losses are
    from those of the same clips in one."""
    done = {name: row for name, row in rows.items() if "failed" not in row}
    for name, row in done.items():
        if ALONE in done:
            ratio = row["tokens_per_second"] / done[ALONE]["tokens_per_second"]
            row["of_linear"] = ratio / row["num_processes"]
        if ALL in done and name != ALONE:
            pairs = zip(row["losses"], done[ALL]["losses"], strict=True)
            row["apart"] = max(abs(a - b) for a, b in pairs)


def bench_scale(parsed: argparse.Namespace) -> None:
    """Every row in processes of its own, one after the other, on the same tokens."""
    if parsed.steps < 1 or parsed.processes < 1:
        raise ValueError("--steps and --processes: at least 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("bench scale launches its processes itself; leave out the launcher")
    able = STRATEGIES if torch.cuda.is_available() else STRATEGIES[:1]
    strategies = parsed.strategies or able
    if not set(strategies) <= set(able):
        raise ValueError("--strategies fsdp2: Accelerate shards on GPUs alone; say ddp")
    config = load_config(RunConfig, parsed.config, [*parsed.overrides, "data.tokens=.", "out=."])
    sizes = config.train.batch_size, config.train.num_micro_batches
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        overrides = with_tokens(parsed.config, parsed.overrides, scratch)
        planned = plan(*sizes, parsed.processes, strategies)
        for name, (strategy, num, clips, micro) in planned.items():
            out = Path(scratch, f"{len(rows)}")
            own = [f"train.batch_size={clips}", f"train.num_micro_batches={micro}", f"out={out}"]
            words = ["--config", parsed.config, *overrides, *own]
            words += ["--steps", str(parsed.steps), "--out", f"{out}.json"]
            row = rows[name] = {"name": name, **launch(strategy, num, words)}
            print(name, row.get("failed") or f"{row['milliseconds']:.1f} ms", flush=True)
            show(rows, parsed, more=len(rows) < len(planned))
    if all("failed" in row for row in rows.values()):
        raise ValueError(f"no row could be timed: {rows[ALONE]['failed']}")


def show(rows: dict[str, dict], parsed: argparse.Namespace, more: bool) -> None:
    compare(rows)
    table = [["", *(heading for heading, _ in COLUMNS.values())]]
    for name, row in rows.items():
        shown = row | {"alike": {True: "yes", False: "NO"}.get(row.get("alike"))}
        table.append([name, *cells(shown, COLUMNS)])
    facts = {"config": parsed.config, "overrides": parsed.overrides}
    report(list(rows.values()), table, parsed, more, **facts)


def time_one() -> None:
    """A row, run by one of its processes; the main one writes it."""
    parser = argparse.ArgumentParser()
    add_scale_options(parser)
    parsed = parser.parse_args()
    row = time_steps(parsed.config, parsed.overrides, parsed.steps)
    if os.environ.get("RANK", "0") == "0":
        write_json(parsed.out, row)


def add_scale_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=bench_scale, device=None)
    parser.add_argument("--config", required=True, help="a YAML recipe from configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--processes", type=int, default=2, metavar="N", help="at most, and what divides it (2)"
    )
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, help="(those that can be)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each row (20)")
    parser.add_argument("--out", metavar="FILE.json", help="write the figures there as well")


if __name__ == "__main__":
    run_cli(time_one)
