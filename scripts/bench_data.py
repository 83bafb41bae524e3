"""The loader of a recipe alone: how many tokens a second it could feed."""

import argparse
import tempfile
import time
from functools import partial
from itertools import islice, product

from configs.load import load_config
from configs.schema import RunConfig
from data.dataset import TrainBatches, make_loader
from data.shards import TokenFolder, semantic_rate
from model.stages import stage_spec
from scripts.bench_tools import cells, report, with_tokens
from train import encode

COLUMNS = {
    "batches_per_second": ("batches/s", ",.1f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "filled": ("filled", ".0%"),
}


def time_loader(config: RunConfig, num_workers: int, packed: bool, num_batches: int) -> dict:
    """Figures of a loader's batches, padded or packed, after the first few."""
    folder = TokenFolder(config.data.tokens)
    codec, semantic = folder.codec, folder.semantic
    sizes = (semantic["num_tokens"], codec["num_codebooks"], codec["codebook_size"])
    rate = float(semantic_rate(codec, semantic))
    spec = stage_spec(config.stage, *sizes, config.num_coarse, rate, config.pattern)
    batches = TrainBatches(
        folder,
        seed=config.train.seed,
        crop_seconds=config.data.crop_seconds,
        batch_size_global=config.train.batch_size,
        num_micro=config.train.num_micro_batches,
    )
    transform = partial(encode, spec, config.data.collapse_semantic, packed, None)
    loader = iter(make_loader(batches, num_workers, transform))
    for _ in islice(loader, 2 * max(1, num_workers)):
        pass
    started, places, padded = time.perf_counter(), 0, 0
    for batch in islice(loader, num_batches):
        places, padded = places + batch.num_places, padded + batch.positions.numel()
    elapsed = time.perf_counter() - started
    return {
        "num_workers": num_workers,
        "packed": packed,
        "batches_per_second": num_batches / elapsed,
        "tokens_per_second": places / elapsed,
        "filled": places / padded,
    }


def bench_data(parsed: argparse.Namespace) -> None:
    """Some numbers of workers side by side; 0 reads in the training process, the baseline."""
    with tempfile.TemporaryDirectory() as scratch:
        overrides = [f"out={scratch}/run", *with_tokens(parsed.config, parsed.overrides, scratch)]
        config = load_config(RunConfig, parsed.config, overrides)
        kinds = product(parsed.workers, (False, True))
        rows = [time_loader(config, *kind, parsed.batches) for kind in kinds]
    table = [["workers", "packed", *(heading for heading, _ in COLUMNS.values())]]
    for row in rows:
        kind = [str(row["num_workers"]), "yes" if row["packed"] else "no"]
        table.append([*kind, *cells(row, COLUMNS)])
    report(rows, table, parsed, config=parsed.config, overrides=parsed.overrides)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=bench_data, device="cpu")
    parser.add_argument("--config", required=True, help="a YAML recipe from configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4], metavar="N")
    parser.add_argument("--batches", type=int, default=50, help="timed micro-batches of each (50)")
    parser.add_argument("--out", metavar="FILE.json", help="write the figures there as well")
