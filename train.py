"""Train one stage. From disk to loss, forward only:

1. data/dataset.py cuts crops of tokens out of the memory-mapped shards: a Batch.
2. model/layouts.py turns them into input ids and targets: Sequences.
3. model/stages.py runs the transformer and sums the cross-entropy of each codebook.
4. `Training.update` divides by the targets of the whole global batch, clips and steps.

Everything random is a function of (seed, step, process), so a resumed run is the run itself.
"""

import contextlib
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
)
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader

from configs.load import check_same_config, load_config, save_config
from configs.schema import RunConfig
from data.baselines import token_rates
from data.dataset import Batch, TrainBatches, ValidBatches, collate, make_loader, mix
from data.shards import TokenFolder, semantic_rate
from model.backends import capability_of, choose_packing, let_segments_grow, resolve
from model.backward import Backward, Sizes, choose_captured
from model.checkpoint import (
    check_same_data,
    find_checkpoint,
    list_checkpoints,
    load_training,
    read_state,
    rotate_checkpoints,
    save_checkpoint,
    training_tensors,
)
from model.fused import choose_kernels
from model.guard import Guard
from model.layouts import Sequences
from model.optim import EMA, evaluating, learning_rate, make_optimizer, set_learning_rate
from model.preview import preview_codec
from model.sharding import forget_gathered, is_sharded, whole
from model.stages import Stage, StageSpec, stage_spec
from scripts.cli import end_with_launcher, make_parser, run_cli
from scripts.run_log import (
    Meter,
    RunLog,
    check_weights,
    describe_start,
    log_train,
    log_valid,
    start_line,
    write_samples,
)
from scripts.trackers import tracking

EXAMPLES = """\
  python train.py --config configs/semantic_small.yaml data.tokens=tokens/mine out=runs/a
  accelerate launch train.py --config configs/coarse_small.yaml data.tokens=tokens/mine out=runs/b
  accelerate launch train.py --config configs/coarse_small.yaml out=runs/b --resume
  python train.py --config configs/demo_semantic.yaml train.steps=20 out=runs/try"""


# What may differ at a resume: nothing that changes what is computed, but the number of steps (and,
# with another kernel, other micro-batches or sizes, the rounding and what dropout drops)
CHANGEABLE = re.compile(
    r"out|data\.(tokens|num_workers)|attention\..*|wandb\..*|tensorboard"
    r"|train\.(steps|num_micro_batches|kernels|captured|num_kept|num_samples|sample_seconds|.*_every)"
)


def encode(
    spec: StageSpec, collapse: bool, packed: bool, sizes: Sizes | None, batch: Batch
) -> Sequences:
    """A Batch -> its Sequences; run by the loader, off the training loop."""
    found = spec.sequences(batch.semantic, batch.codes, batch.starts, batch.ends, collapse, packed)
    return sizes.fill(found) if sizes else found


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """A seed for every (step, process) of a run: no two processes drop the same places."""
    return mix(seed, step, rank) >> 1  # torch takes 63 bits


class Training:
    """One run: what it holds, and what it does at a step."""

    def __init__(self, config: RunConfig, process: Accelerator, resume: bool):
        self.config, self.process, self.out = config, process, Path(config.out)
        checkpoints = list_checkpoints(self.out)
        if not resume and self.out.is_dir() and any(self.out.iterdir()):
            raise ValueError(f"{self.out} is not empty: continue it with --resume, or set out=...")
        self.step, self.best_step, self.best_loss = 0, None, math.inf
        self.folder = TokenFolder(config.data.tokens)
        codec, semantic = self.folder.codec, self.folder.semantic
        self.spec_state = {
            "name": config.stage,
            "num_semantic": semantic["num_tokens"],
            "num_codebooks": codec["num_codebooks"],
            "codebook_size": codec["codebook_size"],
            "num_coarse": config.num_coarse,
            "semantic_rate": float(semantic_rate(codec, semantic)),
            "pattern": config.pattern,
        }
        self.spec = stage_spec(**self.spec_state)
        collapse = config.data.collapse_semantic
        self.rates = token_rates(self.folder, self.spec.codebook_names, collapse)
        dtype = torch.bfloat16 if process.mixed_precision == "bf16" else torch.float32
        device, kind, head_dim = process.device, process.device.type, config.model.head_dim
        backend, uses = config.attention.backend, {"has_dropout": config.model.dropout > 0}
        self.attention = resolve(device, dtype, head_dim, backend, **uses)
        filled, packed = self.train_batches().filled, config.data.packed
        self.packed = choose_packing(packed, filled, self.attention, kind, head_dim)
        self.kernels = choose_kernels(config.train.kernels, kind, capability_of(device))
        alone = process.num_processes == 1 and process.distributed_type.name != "FSDP"
        self.captured = choose_captured(config.train.captured, kind, alone, self.packed[0], filled)
        torch.manual_seed(config.train.seed)
        self.stage = Stage(self.spec, config.model, self.attention).to(process.device)
        self.optimizer = make_optimizer(self.stage, config.optim, muon_lr=config.optim.muon_lr)
        self.stage.transformer.use_kernels(self.kernels[0])
        self.model, self.updater = process.prepare(self.stage, self.optimizer)
        how = self.captured[0], not self.packed[0] and config.train.num_micro_batches == 1
        self.backward = Backward(self.stage, self.nats_of, process.backward, *how)
        self.ema = EMA(self.stage, config.optim.ema_decay) if config.optim.ema_decay else None
        decodes = config.train.sample_every and config.stage != "semantic"
        self.codec = preview_codec(codec, process.device) if decodes else None
        self.signalled, self.signalled_at = None, 0.0  # by which signal, when; here alone
        self.stopping = None  # all processes together
        self.meter = Meter(self.spec.layout.num_codebooks, process.device)
        self.hosts = None  # the processes; what is on their CPUs they exchange without a GPU
        if process.num_processes > 1 and distributed.get_backend() != "gloo":
            self.hosts = distributed.new_group(backend="gloo")
        self.guard = Guard(config.optim.skip_factor, process.device)
        if resume and checkpoints:
            self.load(find_checkpoint(self.out, or_older=True))

    def load(self, found: Path) -> None:
        """Continue from a checkpoint. ValueError if it is not one of this configuration's."""
        state = read_state(found)
        check_same_data(found, state, self.folder.header, self.config.data.tokens)
        check_same_config(self.out / "config.yaml", self.config, CHANGEABLE)
        load_training(found, self.stage, self.optimizer, self.ema)
        self.step, self.best_step = state["step"], state["best_step"]
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
        if "guard" in state:  # younger than the first checkpoints
            self.guard.load(state["guard"])
        if self.process.is_main_process:  # the saved sums are those of all processes
            self.meter.load(state["meter"])

    def loaders(self) -> tuple[DataLoader, DataLoader]:
        """(endless micro-batches from the current step on, the whole validation split)."""
        train, data, process = self.config.train, self.config.data, self.process
        share = {"rank": process.process_index, "world": process.num_processes}
        batches = self.train_batches(num_micro=train.num_micro_batches, **share)
        size = train.batch_size // (process.num_processes * train.num_micro_batches)
        valid = ValidBatches(self.folder, crop_seconds=data.crop_seconds, batch_size=size, **share)
        how = (self.spec, data.collapse_semantic, self.packed[0])
        sizes = Sizes.of(*how, batches, size) if self.captured[0] else None
        filled, ragged = partial(encode, *how, sizes), partial(encode, *how, None)
        return make_loader(batches, data.num_workers, filled), make_loader(valid, 0, ragged)

    def train_batches(self, **share: int) -> TrainBatches:
        """What a share of the processes and micro-batches trains on from the current step on."""
        return TrainBatches(
            self.folder,
            seed=self.config.train.seed,
            crop_seconds=self.config.data.crop_seconds,
            batch_size_global=self.config.train.batch_size,
            start_step=self.step,
            **share,
        )

    def global_batch(self, step: int) -> tuple[list[dict], Batch]:
        """All that a step trains on: for each clip its name and frames; the tokens."""
        batches = self.train_batches()
        windows = [batches.crop(n) for n in batches.examples(step, 0)]
        clips = [{"clip": clip.name, "frames": [a, b]} for clip, a, b in windows]
        return clips, collate([batches.cut(*window) for window in windows])

    def on_signal(self, number: int, _: object) -> None:
        """Ask for a last step and a checkpoint; a second signal does not wait for them.

        One that comes at once is the first again: a scheduler signals every process, and a
        launcher among them passes it on, or dies of it (see `end_with_launcher`).
        """
        now = time.monotonic()
        if not self.signalled:
            self.signalled, self.signalled_at = number, now
        elif now - self.signalled_at > 1.0:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def release(self) -> None:
        """Let go of what Accelerate wrapped, before the processes part.

        gloo's process group, when it goes, waits for a thread that may want Python's lock. PyTorch
        gives the lock away in `destroy_process_group`, but not where DistributedDataParallel holds
        the last reference: one exit in ten hung.
        """
        self.model = self.updater = self.hosts = self.backward = None
        self.process.free_memory()

    def nats_of(self, batch: Sequences) -> torch.Tensor:
        with self.process.autocast():  # which prepare() leaves out where weights are sharded
            return self.model(batch)  # [K]

    def update(self, micro_batches: list[Sequences]) -> torch.Tensor:
        """One optimiser step on this process's micro-batches; returns the gradient's norm.

        The loss is the global batch's nats over its targets: any number of micro-batches and
        processes gives the gradient of one big batch, whatever the lengths in each. The optimiser
        clips the gradient, or skips the step as `Guard` says, without asking the device.
        """
        process, train, nats = self.process, self.config.train, []
        total = sum(batch.num_targets for batch in micro_batches)
        self.stopping = self.signalled
        if process.num_processes > 1:  # all stop at the same step, whoever got the signal
            sums = torch.tensor([total, int(self.signalled or 0)])
            distributed.all_reduce(sums, group=self.hosts)
            total, stopping = sums.tolist()
            self.stopping = signal.SIGTERM if stopping else None
        torch.manual_seed(dropout_seed(train.seed, self.step, process.process_index))
        set_learning_rate(self.optimizer, learning_rate(self.step, train.steps, self.config.optim))
        for n, batch in enumerate(micro_batches):
            last = n == len(micro_batches) - 1
            with contextlib.nullcontext() if last else process.no_sync(self.model):
                # DistributedDataParallel takes the mean over processes: undo it
                share = process.num_processes / total
                nats.append(self.backward(batch.to(process.device), share, first=n == 0))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = whole(get_total_norm(gradients))
        skip = self.guard.judge(norm, self.step)
        self.meter.add(sum(nats), micro_batches, skip)
        self.optimizer.grad_scale = (norm / self.config.optim.clip_norm).clamp(min=1)
        self.optimizer.found_inf = skip
        self.updater.step()
        if not self.captured[0]:
            self.updater.zero_grad()
        if self.ema is not None:
            self.ema.update(self.stage)
        self.step += 1
        return norm

    def averaged(self) -> contextlib.AbstractContextManager:
        """Within it the stage holds its averaged weights."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied_to(self.stage)

    def validate(self, loader: DataLoader) -> dict:
        """The whole validation split, averaged weights; the model's mode is left as it was."""
        meter = Meter(self.spec.layout.num_codebooks, self.process.device)
        with evaluating(self.stage), self.averaged(), self.process.autocast():
            for batch in loader:
                meter.add(self.stage(batch.to(self.process.device)), [batch])
            if is_sharded(self.stage):  # as many passes as the others make, whose shards are here
                blank = loader.collate_fn(loader.dataset.first).without_targets()
                for _ in range(loader.dataset.num_short):
                    self.stage(blank.to(self.process.device))
            forget_gathered(self.stage)
        return meter.read(self.process, self.rates)

    def save(self) -> None:
        """Write a checkpoint and drop old ones. Every process calls it; the main one writes."""
        process, meter = self.process, self.meter.sums(self.process)
        check_weights(self)
        tensors = training_tensors(self.stage, self.optimizer, self.ema)
        if process.is_main_process:
            state = {
                "spec": self.spec_state,
                "model": asdict(self.config.model),
                "crop_seconds": self.config.data.crop_seconds,
                "collapse_semantic": self.config.data.collapse_semantic,
                "totals": self.folder.header["totals"],
                "tokenizers": {kind: self.folder.header[kind] for kind in ("codec", "semantic")},
                "best_step": self.best_step,
                "best_loss": None if self.best_step is None else self.best_loss,
                "meter": meter,
                "guard": self.guard.read(),
            }
            save_checkpoint(self.out, self.step, tensors, state)
            rotate_checkpoints(self.out, self.config.train.num_kept, self.best_step)
        process.wait_for_everyone()


def fit(run: Training, train_loader: DataLoader, valid_loader: DataLoader, first: dict) -> None:
    """The loop: update, and every so often log, validate, sample, save."""
    train, batches = run.config.train, iter(train_loader)
    log = RunLog(run.config, run.process, run.step)
    log.write("start", **first)
    log.say(describe_start(first, run) if first else "")
    since, waited = time.perf_counter(), 0.0
    while run.step < train.steps and not run.stopping:
        asked = time.perf_counter()
        micro_batches = [next(batches) for _ in range(train.num_micro_batches)]
        waited += time.perf_counter() - asked
        norm = run.update(micro_batches)
        log.advance()
        done = run.step == train.steps
        if run.step % train.log_every == 0 or done:
            elapsed = time.perf_counter() - since
            log_train(run, log, norm, elapsed, waited / elapsed, micro_batches[0])
            since, waited = time.perf_counter(), 0.0
        paused, improved = time.perf_counter(), False
        if run.stopping:  # before a long validation, lest a launcher's patience end in it
            run.save()
        if run.step % train.valid_every == 0 or done:
            improved = log_valid(run, log, run.validate(valid_loader))
        if train.sample_every and (run.step % train.sample_every == 0 or done):
            write_samples(run)
        if improved or done or (run.step % train.save_every == 0 and not run.stopping):
            run.save()
        since += time.perf_counter() - paused  # throughput is that of training alone
    if run.step == train.steps:
        log.write("end", step=run.step)
    run.release()
    log.close()


def shard_policy(bf16: bool) -> FullyShardedDataParallelPlugin:
    """What `accelerate launch` was told of FSDP2; weights are gathered in bf16, gradients summed in
    fp32, inputs (positions!) left as they are. ValueError: FSDP1."""
    if os.environ.get("FSDP_VERSION") != "2":
        raise ValueError("FSDP 1 is not supported; accelerate's file must say fsdp_version: 2")
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def make_accelerator(config: RunConfig) -> Accelerator:
    let_segments_grow()
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    wanted = {"auto": bf16, "bf16": True, "fp32": False}[config.train.precision]
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(
        kwargs_handlers=[ddp],
        fsdp_plugin=shard_policy(wanted) if sharded else None,
        cpu=not torch.accelerator.is_available(),  # else several CPU processes stay strangers
        mixed_precision="bf16" if wanted else "no",
        **tracking(config),
    )


def train(config: RunConfig, resume: bool = False) -> Training:
    """Run `config` to its end, or until a signal; returns the run."""
    process = make_accelerator(config)
    run = Training(config, process, resume)
    if run.step >= config.train.steps:
        process.print(f"{run.out}: already finished, {run.step} steps")
        return run
    if resume:
        process.print(f"{run.out}: {'resuming' if run.step else 'begins'} at step {run.step}")
    loaders = run.loaders()
    first = start_line(run) if process.is_main_process else {}
    process.wait_for_everyone()  # all have seen that the folder is theirs to write
    if process.is_main_process:
        save_config(config, run.out / "config.yaml")

    handlers = {s: signal.signal(s, run.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        fit(run, *loaders, first)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if run.step < config.train.steps:
        process.print(
            f"stopped and saved at step {run.step}; the same command with --resume goes on"
        )
        sys.exit(128 + run.stopping)
    return run


def main() -> None:
    parser = make_parser(__doc__.split(" From")[0], EXAMPLES)
    parser.add_argument("--config", required=True, help="a YAML recipe from configs/")
    parser.add_argument("--resume", action="store_true", help="continue out=..., if it was begun")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    end_with_launcher()
    train(load_config(RunConfig, arguments.config, arguments.overrides), arguments.resume)


if __name__ == "__main__":
    run_cli(main)
