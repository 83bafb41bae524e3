"""One recipe on one process and on several, by each way of sharing: speed, losses, equal ranks.

The global batch is the same in every row: what one process trains on in micro-batches, several
divide. So the losses are to agree, and a step of n processes is to take the n-th part of the time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
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


def compare(rows: list[dict]) -> None:
    """Each row beside the first: its speed by the number of processes, its losses."""
    first = rows[0]
    for row in rows:
        if "failed" in row or "failed" in first:
            continue
        ratio = row["tokens_per_second"] / first["tokens_per_second"]
        row["of_linear"] = ratio * first["num_processes"] / row["num_processes"]
        pairs = zip(row["losses"], first["losses"], strict=True)
        row["apart"] = max(abs(a - b) for a, b in pairs)


def bench_scale(parsed: argparse.Namespace) -> None:
    """Every row in processes of its own, one after the other, on the same tokens."""
    if parsed.steps < 1 or min(parsed.processes) < 1:
        raise ValueError("--steps and --processes: at least 1")
    if "fsdp2" in parsed.strategies and not torch.cuda.is_available():
        raise ValueError(
            "--strategies fsdp2: Accelerate shards on GPUs alone; say --strategies ddp"
        )
    config = load_config(RunConfig, parsed.config, [*parsed.overrides, "data.tokens=.", "out=."])
    most = max(parsed.processes)
    chosen: dict[str, tuple] = {}
    for num in sorted(set(parsed.processes)):
        if config.train.batch_size * most % num:
            raise ValueError(f"--processes {num}: does not divide the batch of {most} times "
                             f"{config.train.batch_size} clips")  # fmt: skip
        for strategy in parsed.strategies if num > 1 else [None]:
            named = f"{num} processes, {strategy}" if strategy else "1 process"
            chosen[named] = (strategy, num)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        overrides = with_tokens(parsed.config, parsed.overrides, scratch)
        for name, (strategy, num) in chosen.items():
            out = Path(scratch, f"{len(rows)}")
            sizes = [
                f"train.batch_size={config.train.batch_size * most}",
                f"train.num_micro_batches={most // num * config.train.num_micro_batches}",
            ]
            words = ["--config", parsed.config, *overrides, *sizes, f"out={out}"]
            words += ["--steps", str(parsed.steps), "--out", f"{out}.json"]
            row = {"name": name, **launch(strategy, num, words)}
            print(name, row.get("failed") or f"{row['milliseconds']:.1f} ms", flush=True)
            rows.append(row)
    compare(rows)
    table = [["", *(heading for heading, _ in COLUMNS.values())]]
    for row in rows:
        shown = row | {"alike": {True: "yes", False: "NO"}.get(row.get("alike"))}
        table.append([row["name"], *cells(shown, COLUMNS)])
    report(rows, table, parsed, config=parsed.config, overrides=parsed.overrides)


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
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each row (20)")
    parser.add_argument("--out", metavar="FILE.json", help="write the figures there as well")


if __name__ == "__main__":
    run_cli(time_one)
