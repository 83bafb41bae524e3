"""What a run says of itself: log.jsonl, a line in the terminal, its trackers where asked for."""

import json
import math
import platform
import subprocess
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from configs.codec_schema import CodecTrainConfig
from configs.files import atomic_write, write_json
from configs.schema import RunConfig
from data.audio import save_audio
from data.baselines import baselines, bits_per_second
from data.shards import Clip
from model.layouts import Sequences
from model.optim import evaluating
from model.preview import preview
from model.sharding import copy_into, is_sharded, whole, whole_tensors
from model.stages import Stage
from scripts.trackers import start_trackers, track_clips

BAR = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"  # a comma comes with {postfix}
PEAK_FLOPS = {  # dense bf16, from the vendors' datasheets
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's bf16 peak in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions and git commit ("+changes": of code, since), for whoever runs it again."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    try:
        show = [*git, "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(show, capture_output=True, text=True, check=True).stdout.strip()
        changes = [*git, "diff", "--quiet", "HEAD", "--", "*.py"]
        commit += "+changes" * subprocess.run(changes, capture_output=True, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"device": device_name(device), "versions": versions, "commit": commit}


class Meter:
    """Sums since they were last read: nats and targets per codebook, places, of steps not skipped.

    What lies on the device is read together with the rest, so that adding waits for nothing.
    """

    def __init__(self, num_codebooks: int, device: torch.device):
        self.nats = torch.zeros(num_codebooks, device=device)
        self.counts = torch.zeros(num_codebooks + 1, dtype=torch.int64)  # targets, places
        self.recent: list[tuple[torch.Tensor, torch.Tensor]] = []  # counts of a step, its `skip`

    def add(
        self, nats: torch.Tensor, batches: list[Sequences], skip: torch.Tensor | None = None
    ) -> None:
        """nats [K], summed over `batches`; skip [] 1.0: the step does not count."""
        counts = [[*batch.counts, batch.num_places] for batch in batches]
        counts = torch.tensor(counts).sum(dim=0)
        if skip is None:
            self.nats, self.counts = self.nats + nats, self.counts + counts
        else:
            self.nats = self.nats + torch.where(skip > 0, 0.0, nats)
            self.recent.append((counts, skip))

    def load(self, sums: dict[str, list]) -> None:
        """Go on from what `sums` returned."""
        self.nats = torch.tensor(sums["nats"], device=self.nats.device)
        self.counts = torch.tensor(sums["counts"])

    def sums(self, process: Accelerator) -> dict[str, list]:
        """nats and counts over all processes; waits for the device."""
        if self.recent:
            skipped = torch.stack([skip for _, skip in self.recent]).tolist()
            self.counts += sum(c * (not s) for (c, _), s in zip(self.recent, skipped, strict=True))
            self.recent = []
        nats, counts = self.nats, self.counts
        if process.num_processes > 1:
            nats = process.reduce(nats, "sum")
            counts = process.reduce(counts.to(process.device), "sum")
        return {"nats": nats.tolist(), "counts": counts.tolist()}

    def read(self, process: Accelerator, rates: list[float]) -> dict:
        """Means over all processes: nats per token (of each codebook), bits per second of audio at
        `rates` tokens per second of each codebook."""
        sums = self.sums(process)
        nats, (*targets, places) = sums["nats"], sums["counts"]
        per_codebook = [n / max(1, t) for n, t in zip(nats, targets, strict=True)]
        return {
            "loss": sum(nats) / max(1, sum(targets)),
            "per_codebook": per_codebook,
            "bits_per_second": bits_per_second(per_codebook, rates),
            "places": places,
        }


class RunLog:
    """Appends to log.jsonl, moves the progress line, forwards numbers to the trackers. Silent but
    on the main process."""

    def __init__(
        self, config: RunConfig | CodecTrainConfig, accelerator: Accelerator, first_step: int
    ):
        self.accelerator, self.path = accelerator, Path(config.out) / "log.jsonl"
        self.bar = tqdm(
            total=config.train.steps,
            initial=first_step,
            desc=self.path.parent.name,
            bar_format=BAR,
            disable=None if accelerator.is_main_process else True,  # None: where no one watches
        )
        start_trackers(accelerator, config)

    def write(self, kind: str, **values: Any) -> None:
        """One line of log.jsonl; numbers of "train" and "valid" lines go to the trackers too."""
        if not self.accelerator.is_main_process:
            return
        line = json.dumps({"kind": kind, **values, "time": time.time()})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        if kind in ("train", "valid"):
            lists = {k: v for k, v in values.items() if isinstance(v, list)}
            values |= {f"{k}/{n}": x for k, v in lists.items() for n, x in enumerate(v)}
            numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
            self.accelerator.log(numbers, step=values["step"])

    def advance(self) -> None:
        self.bar.update()

    def show(self, step: int, text: str) -> None:
        """What changes with every step: in the progress line, or where there is none as a line."""
        if self.bar.disable:
            self.say(f"step {step:>6}  {text}")
        else:
            self.bar.set_postfix_str(text)

    def say(self, text: str) -> None:
        """A line in the terminal, above the progress line."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def close(self) -> None:
        self.bar.close()
        self.accelerator.end_training()


def start_line(run: Any) -> dict:
    """The log's first line: what runs, where, and what its losses are to be measured against."""
    names, collapse = run.spec.codebook_names, run.config.data.collapse_semantic
    return {
        "stage": run.config.stage,
        "num_parameters": sum(p.numel() for p in run.stage.parameters()),
        "codebooks": names,
        **{name: asdict(b) for name, b in baselines(run.folder, names, collapse).items()},
        "attention": str(run.attention),
        "kernels": "{} ({})".format(*run.kernels),
        **{
            name: f"{'yes' if chosen else 'no'} ({why})"
            for name, (chosen, why) in (("packed", run.packed), ("captured", run.captured))
        },
        **environment(run.process.device),
    }


def describe_start(line: dict, run: Any) -> str:
    """The same for the terminal."""
    uniform, unigram = line["uniform"]["bits_per_second"], line["unigram"]["bits_per_second"]
    return (
        f"{run.config.stage}: {line['num_parameters'] / 1e6:.1f} M parameters on {line['device']}, "
        f"{'bf16' if run.process.mixed_precision == 'bf16' else 'fp32'}\n{run.attention}\n"
        f"kernels: {line['kernels']}\nclips packed: {line['packed']}\n"
        f"captured: {line['captured']}\n"
        f"baselines: uniform {uniform:.0f} bits/s, unigram {unigram:.0f} bits/s; a model that "
        "learns goes below both"
    )


def check_weights(run: Any) -> None:
    """ValueError, before anything is logged as good or saved, if the weights are lost."""
    norm = float(whole(get_total_norm([p.detach() for p in run.stage.parameters()])))
    if not math.isfinite(norm):
        raise ValueError(
            f"{run.out}: weights are not finite at step {run.step} and nothing of it was saved; "
            "try a lower optim.lr or model.qk_norm=true in a new run"
        )


def check_skipped(run: Any, facts: dict[str, float]) -> None:
    """ValueError after too many skipped steps in a row; the first one's batch is left on disk."""
    if facts["longest_row"] < run.config.optim.max_skipped:
        return
    first = int(facts["row_began"])
    path = run.out / f"bad_batch-step-{first:08d}.json"
    if run.process.is_main_process:
        clips, batch = run.global_batch(first)
        write_json(path, {"step": first, "usual_norm": facts["mean"], "clips": clips})
        with atomic_write(path.with_suffix(".safetensors"), "wb") as file:
            file.write(safetensors.torch.save({k: t.contiguous() for k, t in vars(batch).items()}))
    raise ValueError(
        f"{run.out}: {facts['longest_row']:.0f} steps in a row, from step {first} on, had a "
        f"gradient that is not finite or over {run.config.optim.skip_factor:g} times the usual "
        f"{facts['mean']:.3g}, and were skipped; the first one's clips are listed in {path}. "
        "Nothing was learnt from them: look at those clips, or begin anew with a lower optim.lr or "
        "model.qk_norm=true"
    )


def log_train(
    run: Any, log: RunLog, norm: torch.Tensor, elapsed: float, wait: float, batch: Sequences
) -> None:
    """Read and reset the meter; one line for the log, one for the terminal."""
    device = run.process.device
    values = run.meter.read(run.process, run.rates)
    run.meter = Meter(run.spec.layout.num_codebooks, device)
    facts, norm = run.guard.read(), float(norm)
    check_skipped(run, facts)
    run.guard.forget_rows()
    places = values.pop("places")
    if not places:  # there is no loss to speak of
        log.write("skipped", step=run.step, skipped=int(facts["num_skipped"]))
        log.say(f"step {run.step:>6}  skipped, as all since the last line")
        return
    speed = places / elapsed
    peak = peak_flops(device)
    flops = run.stage.transformer.flops_per_token(batch.context)
    mfu = None if peak is None else speed * flops / (peak * run.process.num_processes)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    log.write(
        "train",
        step=run.step,
        **values,
        seconds=elapsed,
        tokens_per_second=speed,
        mfu=mfu,
        lr=run.optimizer.param_groups[0]["lr"],
        grad_norm=norm if math.isfinite(norm) else None,
        skipped=int(facts["num_skipped"]),
        data_wait=wait,
        peak_memory_gib=memory,
    )
    shown = f"mfu {mfu:.1%}" if mfu is not None else f"grad {norm:.2f}"
    if facts["num_skipped"]:
        shown += f"  skipped {facts['num_skipped']:.0f}"
    log.show(
        run.step,
        f"loss {values['loss']:.4f}  {values['bits_per_second']:.0f} bits/s  "
        f"{speed:,.0f} tokens/s  {shown}  data-wait {wait:.1%}",
    )


def log_valid(run: Any, log: RunLog, values: dict) -> bool:
    """Log a validation; True if it is the best so far."""
    values.pop("places")
    improved = values["loss"] < run.best_loss
    if improved:
        run.best_step, run.best_loss = run.step, values["loss"]
    log.write("valid", step=run.step, **values)
    per_codebook = " ".join(f"{nats:.3f}" for nats in values["per_codebook"])
    log.say(
        f"valid {run.step:>5}  loss {values['loss']:.4f}  {values['bits_per_second']:.0f} bits/s  "
        f"per codebook {per_codebook}{'  best' if improved else ''}"
    )
    return improved


def write_samples(run: Any) -> None:
    """Samples of fixed validation clips at fixed seeds: wavs, and their tokens; see `preview`.

    Every process calls it; the main one samples, with the whole model where that is sharded.
    """
    stage, averaged, main = run.stage, run.averaged(), run.process.is_main_process
    if is_sharded(stage):
        weights = run.ema.shadow if run.ema else dict(stage.named_parameters())
        weights = whole_tensors(weights, keep=main)
        averaged = nullcontext()
    if not main:
        return
    if is_sharded(stage):  # one GPU has room for the weights alone
        stage = Stage(run.spec, run.config.model, run.attention).to(run.process.device)
        copy_into(stage, weights)
    train, folder = run.config.train, run.out / "samples" / f"step-{run.step:08d}"
    clips = run.folder.clips("valid")[: train.num_samples]
    seconds = min(train.sample_seconds, run.config.data.crop_seconds)
    tokens = [clip_tokens(run, clip, seconds) for clip in clips]
    eager = torch.compiler.set_stance("force_eager")  # each step of a cache is another shape
    with evaluating(stage), averaged, run.process.autocast(), eager:
        previews = preview(stage, tokens, run.codec)
    heard = {}
    for n, (clip, versions) in enumerate(zip(clips, previews, strict=True)):
        for version, made in versions.items():
            path = folder / f"{n}-{Path(clip.name).stem}.{version}.json"
            with atomic_write(path) as file:
                json.dump({"clip": clip.name, "tokens": made.tokens.tolist()}, file)
            if made.wav is not None:
                save_audio(path.with_suffix(".wav"), made.wav, run.codec.sample_rate)
                heard[f"{n} {version}"] = made.wav.float()
    if heard:
        track_clips(run.process, run.step, heard, run.codec.sample_rate)


def clip_tokens(run: Any, clip: Clip, seconds: float) -> tuple[torch.Tensor, torch.Tensor]:
    """semantic [T_s], codes [K,T] of the first `seconds` of a clip."""
    read = [torch.tensor(t.astype("int64")) for t in run.folder.read(clip)]
    semantic = read[0][: round(seconds * run.folder.semantic["frame_rate"])]
    if run.config.data.collapse_semantic:
        semantic = torch.unique_consecutive(semantic)
    return semantic, read[1][:, : round(seconds * run.folder.codec["frame_rate"])]
