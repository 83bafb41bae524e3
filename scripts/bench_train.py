"""The whole step of train.py, as a recipe configures it and the slow, obvious ways beside it."""

import argparse
import hashlib
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from configs.load import load_config
from configs.schema import RunConfig
from model.sharding import is_sharded
from scripts.bench_peers import installed_peers, time_peer
from scripts.bench_tools import WARM_UP, cells, compared, report, with_tokens
from scripts.run_log import Meter, peak_flops

LOSS_EVERY = 10  # steps
MOST_WARM_UP = 60  # of them
COLUMNS = {
    "milliseconds": ("ms/step", ",.1f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "mfu": ("MFU", ".1%"),
    "peak_gib": ("GiB", ".1f"),
    "data_wait": ("data wait", ".2%"),
    "filled": ("filled", ".0%"),
    "first_seconds": ("start, s", ".0f"),
    "loss": ("loss", ".3f"),
}


def meet_elsewhere(index: int) -> None:
    """Under `accelerate launch`: the index-th group of processes meets at a port of its own."""
    if "MASTER_PORT" in os.environ:
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1 + index)


def alike(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether every process holds the same tensors, to the bit. Each must ask."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    found = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, digest.hexdigest())
    return len(set(found)) == 1


def run_steps(run: Any, num_steps: int) -> dict:
    """Figures of `num_steps` steps of a `train.Training`, after some that are not timed: at least
    WARM_UP, and until as many came one after another of which nothing had to be captured."""
    process, num_micro = run.process, run.config.train.num_micro_batches
    batches, cuda = iter(run.loaders()[0]), process.device.type == "cuda"
    began, settled = time.perf_counter(), 0
    for _ in range(MOST_WARM_UP):
        before = run.backward.num_plain
        norm = run.update([next(batches) for _ in range(num_micro)])
        settled = settled + 1 if run.backward.num_plain == before else 0
        if settled == WARM_UP:  # no size of batch came that is not captured yet
            break
    norm.item()  # waits for all that the device still has to do
    run.meter, losses = Meter(run.spec.layout.num_codebooks, process.device), []
    started, waited, places, padded, flops = time.perf_counter(), 0.0, 0, 0, 0
    for step in range(num_steps):
        asked = time.perf_counter()
        micro = [next(batches) for _ in range(num_micro)]
        waited += time.perf_counter() - asked
        for batch in micro:
            places, padded = places + batch.num_places, padded + batch.positions.numel()
            flops += batch.num_places * run.stage.transformer.flops_per_token(batch.context)
        run.update(micro)
        if (step + 1) % LOSS_EVERY == 0 or step + 1 == num_steps:  # which waits for the device
            losses.append(run.meter.read(process, run.rates)["loss"])
            run.meter = Meter(run.spec.layout.num_codebooks, process.device)
    elapsed, peak = time.perf_counter() - started, peak_flops(process.device)
    sums = torch.tensor([places, padded, flops], dtype=torch.float32, device=process.device)
    places, padded, flops = process.reduce(sums, "sum").tolist()
    copies = process.num_processes > 1 and not is_sharded(run.stage)  # shards are there once
    return {
        "milliseconds": 1e3 * elapsed / num_steps,
        "tokens_per_second": places / elapsed,
        "mfu": None if peak is None else flops / elapsed / (peak * process.num_processes),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "data_wait": waited / elapsed,
        "filled": places / padded,
        "first_seconds": started - began,
        "loss": losses[-1],
        "losses": losses,  # means of every so many steps
        "num_processes": process.num_processes,
        "alike": alike(dict(run.stage.named_parameters())) if copies else None,
    }


def time_steps(recipe: str, overrides: list[str], num_steps: int, index: int = 0) -> dict:
    """Figures of `num_steps` steps, warm; in a process of its own, or one for each GPU, of the
    index-th variant. {"failed"}: why there are none.

    tokens_per_second counts places that are not padding, `filled` is their share; MFU counts
    6 FLOPs a parameter of the transformer and place, and 6 x layers x inner width x length of the
    sequence that the place is in.
    """
    from train import Training, make_accelerator  # here: it says what a process may use

    meet_elsewhere(index)
    config = load_config(RunConfig, recipe, overrides)
    process = make_accelerator(config)
    try:
        run = Training(config, process, resume=False)
        figures = run_steps(run, num_steps)
        run.release()
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except ValueError as error:  # what cannot be here, the others can
        return {"failed": str(error)}
    how = {"attention": str(run.attention), "kernels": run.kernels}
    return figures | how | {"packed": run.packed, "captured": run.captured}


def variants(config: RunConfig, compare: list[str]) -> dict[str, list[str]]:
    """Name -> overrides."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    plain = ["train.kernels=plain", "train.captured=false"]
    chosen = {
        "as configured": [],
        "not captured": ["train.captured=false"],
        "plain kernels": plain,
        "plain kernels, padded": [*plain, "data.packed=false"],
        "plain kernels, einsum, one clip at a time": [
            *plain,
            "attention.backend=einsum",
            f"train.num_micro_batches={config.train.batch_size // num_processes}",
        ],
    }
    return chosen | compared(compare)


def bench_train(parsed: argparse.Namespace) -> None:
    """Each variant in processes of its own, one after the other, on the same tokens."""
    if parsed.steps < 1:
        raise ValueError(f"--steps {parsed.steps}: at least 1")
    peers = installed_peers() if parsed.peers else []
    if peers and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--peers: they are trained on one GPU alone; leave out accelerate launch")
    main = os.environ.get("RANK", "0") == "0"
    with tempfile.TemporaryDirectory() as scratch:
        overrides = with_tokens(parsed.config, parsed.overrides, scratch)
        chosen = variants(load_config(RunConfig, parsed.config, overrides), parsed.compare)
        for words in chosen.values():  # a typo is an error before anything is timed
            load_config(RunConfig, parsed.config, [*overrides, *words])
        rows = [{"name": name, "overrides": words} for name, words in chosen.items()]
        rows += [{"name": name, "overrides": []} for name in peers]
        if unknown := sorted({*parsed.only} - {row["name"] for row in rows}):
            names = "; ".join(row["name"] for row in rows)
            raise ValueError(f"--only: no row is named {unknown[0]!r}; there are {names}")
        rows = [row for row in rows if not parsed.only or row["name"] in parsed.only]
        for index, row in enumerate(rows):
            name, own = row["name"], [*overrides, f"out={Path(scratch, str(index))}"]
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                if name in peers:
                    done = pool.submit(time_peer, name, parsed.config, own, parsed.steps)
                else:
                    own += row["overrides"]
                    done = pool.submit(time_steps, parsed.config, own, parsed.steps, index)
                row |= done.result()
            if main:
                print(name, row.get("failed") or f"{row['milliseconds']:.1f} ms", flush=True)
                show(rows[: index + 1], parsed, more=index + 1 < len(rows))


def show(rows: list[dict], parsed: argparse.Namespace, more: bool) -> None:
    table = [["", *(heading for heading, _ in COLUMNS.values())]]
    for row in rows:
        batch = f", batch {row['batch_size']}" if "batch_size" in row else ""
        table.append([row["name"] + batch, *cells(row, COLUMNS)])
    facts = {"config": parsed.config, "overrides": parsed.overrides}
    report(rows, table, parsed, more, **facts)


def add_train_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=bench_train, device=None)
    parser.add_argument("--config", required=True, help="a YAML recipe from configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each variant (20)")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar='"NAME: key=value ..."', help="more variants"
    )
    parser.add_argument("--peers", action="store_true", help="beside other projects' models")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of the rows")
    parser.add_argument("--out", metavar="FILE.json", help="write the figures there as well")
