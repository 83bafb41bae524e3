"""Sampling: steps of each stage at several batch sizes, and all stages in a row."""

import argparse
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from configs.load import load_config
from configs.schema import RunConfig
from model.backends import resolve, sampling_dtype
from model.codec import load_codec
from model.decoder import choose_decoding, use_decoding
from model.drawing import Sampling
from model.pipeline import (
    STREAM_SECONDS,
    Chunks,
    Models,
    continuation,
    decode_stream,
    generate_codes,
)
from model.sampling import generate
from model.stages import Stage, stage_spec
from scripts.bench_peers import installed_peers, time_decoding
from scripts.bench_tools import (
    CODEC,
    SEMANTIC,
    add_result_options,
    cells,
    check_picture,
    median_ms,
    report,
    save_picture,
)
from scripts.cli import find_device

FEW_FRAMES = 10  # of what is slow
SAMPLING = Sampling(temperature=0.8, top_k=100)
COLUMNS = {
    "milliseconds": ("ms/step", ",.2f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "gb_per_second": ("GB/s", ",.1f"),
    "share_of_memory": ("of copying", ".0%"),
    "real_time": ("x real time", ",.2f"),
    "first_sound": ("first sound, s", ",.3f"),
    "peak_gib": ("GiB", ",.1f"),
}


def random_stage(config: RunConfig, device: torch.device) -> Stage:
    """A recipe's stage with random weights."""
    sizes = (SEMANTIC["num_tokens"], CODEC["num_codebooks"], CODEC["codebook_size"])
    spec = stage_spec(config.stage, *sizes, config.num_coarse, pattern=config.pattern)
    dtype = sampling_dtype("auto", device)
    attention = resolve(device, dtype, config.model.head_dim, config.attention.backend)
    torch.manual_seed(0)
    return Stage(spec, config.model, attention).sampled_in(dtype).to(device).eval()


def copied_per_second(device: torch.device) -> float:
    """Bytes read and written by a second of copying: what a step that only reads weights and cache
    could come near to."""
    x = torch.ones(2**26 if device.type == "cuda" else 2**24, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / (1e-3 * median_ms(lambda: y.copy_(x)))


def fastest(device: torch.device) -> tuple[str, str]:
    """The way of decoding that a device is timed with, and why."""
    try:
        return choose_decoding("captured", device)
    except ValueError as error:
        return "plain", str(error)


def timed(function: Any, device: torch.device) -> float:
    """Seconds of a call, a GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@torch.no_grad()
def time_stage(stage: Stage, batch: int, frames: int, use_cache: bool, copying: float) -> dict:
    """Figures of `batch` clips of so many frames, from nothing but their condition. The bytes of a
    step are those of the weights and of the cache it reads, on average half of it."""
    device, layout = stage.embed.weight.device, stage.layout
    generator, conditions = torch.Generator().manual_seed(0), [None] * batch
    if layout.condition_sizes:
        shape = (batch, len(layout.condition_sizes), frames)
        conditions = list(torch.randint(min(layout.condition_sizes), shape, generator=generator))
    empty = torch.empty(layout.num_codebooks, 0, dtype=torch.long)

    def run() -> list[Tensor]:
        prompts, most = [empty] * batch, [frames] * batch
        seeds, least = list(range(batch)), [frames + 1] * batch
        arguments = (conditions, prompts, most, seeds, SAMPLING)
        return generate(stage, *arguments, min_frames=least, use_cache=use_cache)

    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, steps = timed(run, device), layout.num_steps(frames)
    c, weights = (
        stage.transformer.config,
        [*stage.transformer.parameters(), *stage.heads.parameters()],
    )
    places = layout.num_steps(frames) / 2 + len(layout.condition_sizes) * frames
    size = weights[0].element_size()
    cache = 2 * c.num_layers * c.num_kv_heads * c.head_dim * size * places * batch
    moved = (sum(w.nbytes for w in weights) + cache) * steps / seconds
    return {
        "milliseconds": 1e3 * seconds / steps,
        "tokens_per_second": batch * frames * layout.num_codebooks / seconds,
        "gb_per_second": moved / 1e9 if use_cache else None,
        "share_of_memory": moved / copying if use_cache else None,
        "real_time": batch * frames / CODEC["frame_rate"] / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }


def time_pipeline(models: Models, batch: int, seconds: float, chunks: Chunks | None) -> dict:
    """Figures of all stages and the codec, from nothing; the clips take what they take."""
    samplings = dict.fromkeys(models.stages, SAMPLING)
    request = continuation(models, None, seconds, list(range(batch)))
    sounds = []

    def run() -> None:
        began, samples = time.perf_counter(), 0
        codes = generate_codes(models, request, samplings, chunks)
        for parts in decode_stream(models, codes):
            samples += sum(wav.cpu().shape[1] for wav in parts)
            sounds.append((time.perf_counter() - began, samples))

    run()
    sounds.clear()
    cuda = models.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elapsed = timed(run, models.device)
    return {
        "real_time": sounds[-1][1] / models.codec.sample_rate / elapsed,
        "first_sound": sounds[0][0],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }


def stage_rows(
    stage: Stage, config: RunConfig, parsed: argparse.Namespace, how: str, copying: float
) -> Iterator[dict]:
    """A stage by batch sizes, after its baselines: without a cache, and by the modules alone."""
    frames = max(1, round(min(parsed.seconds, config.data.crop_seconds) * CODEC["frame_rate"]))
    name, few = stage.spec.name, min(frames, FEW_FRAMES)
    plain = time_stage(stage, 1, few, False, copying)
    yield {"name": f"{name}, no cache, {few} frames", "batch": 1, **plain}
    for batch in tqdm(parsed.batch, desc=name, disable=None):
        if how != "plain":
            use_decoding(stage, "plain")
            plain = time_stage(stage, batch, few, True, copying)
            yield {"name": f"{name}, plain, {few} frames", "batch": batch, **plain}
        use_decoding(stage, how)
        yield {"name": name, "batch": batch, **time_stage(stage, batch, frames, True, copying)}


def whole_rows(
    stages: dict[str, Stage], configs: dict[str, RunConfig], parsed: argparse.Namespace
) -> Iterator[dict]:
    """All stages and the codec in a row, by batch sizes; then as a stream."""
    for stage in stages.values():  # a clip goes on to its end
        stage.heads[0].weight.data[stage.layout.eos] = 0
    states = {
        name: {"crop_seconds": config.data.crop_seconds, "collapse_semantic": False}
        for name, config in configs.items()
    }
    device = next(iter(stages.values())).embed.weight.device
    codec = load_codec(parsed.codec, device)
    models = Models(stages, states, codec, None, Fraction(1), device)
    for batch in parsed.batch:
        figures = time_pipeline(models, batch, parsed.seconds, None)
        yield {"name": "all stages and the codec", "batch": batch, **figures}
    chunks = Chunks.of_seconds(models, *STREAM_SECONDS)
    figures = time_pipeline(models, 1, parsed.seconds, chunks)
    yield {"name": "the same, streamed", "batch": 1, **figures}


def all_rows(parsed: argparse.Namespace, device: torch.device, copying: float) -> Iterator[dict]:
    """ValueError, before anything is timed: what cannot be."""
    overrides = ["out=.", "data.tokens=.", *(word for word in parsed.overrides if "=" in word)]
    recipes = [parsed.config, *(word for word in parsed.overrides if "=" not in word)]
    loaded = [load_config(RunConfig, recipe, overrides) for recipe in recipes]
    configs, (how, why) = {config.stage: config for config in loaded}, fastest(device)
    if len(configs) < len(loaded):
        raise ValueError(f"{' '.join(recipes)}: two are of one stage; time them one by one")
    peers = installed_peers() if parsed.peers else []
    if peers and "coarse" not in configs:
        raise ValueError("--peers: theirs are coarse stages; name a coarse recipe as well")
    print(f"decoding: {how} ({why}), {str(sampling_dtype('auto', device)).removeprefix('torch.')}")
    stages = {name: random_stage(config, device) for name, config in configs.items()}
    for name, stage in stages.items():
        yield from stage_rows(stage, configs[name], parsed, how, copying)
    for name in peers:
        for batch in tqdm(parsed.batch, desc=name, disable=None):
            figures = time_decoding(name, configs["coarse"], batch, FEW_FRAMES, device)
            yield {"name": name, "batch": batch, **figures}
    if stages.keys() in ({"semantic", "coarse", "fine"}, {"semantic", "acoustic"}):
        yield from whole_rows(stages, configs, parsed)


def bench_sample(parsed: argparse.Namespace) -> None:
    """Stages, other projects' beside the coarse one, and the whole."""
    if parsed.plot:
        check_picture(parsed.plot)
    device = find_device(parsed.device)
    copying, rows = copied_per_second(device), []
    for row in all_rows(parsed, device, copying):
        rows.append(row)
        show(rows, parsed, copying, more=True)
    show(rows, parsed, copying, more=False)
    if parsed.plot:
        draw(rows, Path(parsed.plot))


def show(rows: list[dict], parsed: argparse.Namespace, copying: float, more: bool) -> None:
    table = [["", "batch", *(heading for heading, _ in COLUMNS.values())]]
    for row in rows:
        table.append([row["name"], str(row["batch"]), *cells(row, COLUMNS)])
    facts = {"copied_gb_per_second": copying / 1e9, "seconds": parsed.seconds}
    report(rows, table, parsed, more, **facts)


def draw(rows: list[dict], path: Path) -> None:
    """Milliseconds of a step over clips in a batch, a line for each way that was timed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    timed = [row for row in rows if "milliseconds" in row and "no cache" not in row["name"]]
    for name in dict.fromkeys(row["name"] for row in timed):
        own = [row for row in timed if row["name"] == name]
        axis.plot(
            [row["batch"] for row in own], [row["milliseconds"] for row in own], "o-", label=name
        )
    axis.set(xscale="log", yscale="log", xlabel="clips in a batch", ylabel="ms a step")
    axis.legend(fontsize="small")
    save_picture(figure, path)


def add_sample_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=bench_sample)
    parser.add_argument("--config", required=True, help="a YAML recipe from configs/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="RECIPE or section.key=value",
        help="the other stages, of which with --config all are timed in a row; and keys of all",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], metavar="N")
    parser.add_argument("--seconds", type=float, default=4.0, help="of audio in a clip (4)")
    parser.add_argument("--codec", default="pretrained/codec_16khz", help="of all stages in a row")
    parser.add_argument("--peers", action="store_true", help="beside other projects' models")
    parser.add_argument("--plot", metavar="FILE.svg", help="ms a step as a picture (svg or png)")
    add_result_options(parser)
