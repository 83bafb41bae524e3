"""The engine of scripts.prepare: recordings -> both tokenizers' tokens, decoding ahead of encoding.

    decode   recording -> wav at the tokenizers' rates   the workers
    gather   wavs -> one batch padded with zeros         the workers
    encode   batch -> tokens                             the workers; a GPU has threads for it

Workers are threads: libsndfile and torch's operators let go of Python's lock. Each has one core to
itself, since an operator split over several cores adds in another order, which changes a code now
and then, and since the LSTM's small steps scale badly.
"""

import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.audio import Recording, read_sound, resample
from model.codec import Codec
from model.semantic import SemanticTokenizer

Item, Result = TypeVar("Item"), TypeVar("Result")

CPU = torch.device("cpu")
CPU_BATCH_SECONDS = 10.0
"""Activations beyond 32 MiB (16 s of the shipped codec) come from the system page by page, every
time anew: a core then encoded 18 times real time instead of 30 (a codec of 24 filters)."""
GPU_ENCODERS = 2
"""Threads that feed a GPU, each through a stream of its own: while one launches the LSTM's many
small steps or waits for its tokens, the other's convolutions fill the GPU."""
GPU_BATCH_SECONDS = 320.0
GPU_BATCH_SECONDS_PER_GIB = 16.0 / GPU_ENCODERS
"""64 MiB a second of audio: several times what the codecs need, so that long clips fit too."""
REFLECTED_FRAMES = 8
"""In a causal codec, a clip's first frames also hear a reflection of up to 6 frames that follow
(7 taps in the last layer, which sees frames): a shorter clip would hear its padding."""


@dataclass(frozen=True)
class Machine:
    """What encodes; nothing here changes a token. ValueError: senseless numbers."""

    device: torch.device = CPU
    workers: int = 1
    """Threads that decode and, without a GPU, encode."""
    batch_seconds: float = CPU_BATCH_SECONDS
    """Audio in a batch at most, padding counted; a longer recording is a batch by itself."""

    def __post_init__(self):
        if self.workers < 1:
            raise ValueError(f"--workers {self.workers}: expected 1 or more")
        if not self.batch_seconds > 0:
            raise ValueError(f"--batch-seconds {self.batch_seconds}: expected more than 0")

    @classmethod
    def with_defaults(
        cls, device: torch.device, workers: int | None = None, batch_seconds: float | None = None
    ) -> "Machine":
        """Share the cores among the processes of this host, one left free to launch GPU kernels."""
        on_gpu = device.type == "cuda"
        if workers is None:
            affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
            num_cores = len(affinity(0)) if affinity else os.cpu_count() or 1
            share = num_cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            workers = max(1, share - on_gpu)
        if batch_seconds is None and on_gpu:
            memory = torch.cuda.get_device_properties(device).total_memory / 2**30  # GiB
            batch_seconds = min(GPU_BATCH_SECONDS, GPU_BATCH_SECONDS_PER_GIB * memory)
        return cls(device, workers, CPU_BATCH_SECONDS if batch_seconds is None else batch_seconds)


@dataclass(frozen=True)
class Tokens:
    """A recording's semantic_tokens [T_s] and codes [K, T]; its duration in seconds."""

    duration: float
    semantic_tokens: np.ndarray
    codes: np.ndarray


@dataclass(frozen=True)
class _Batch:
    """wavs: rate -> [B, 1, L], zeros on the right; lengths: rate -> each clip's, in samples."""

    names: list[str]
    durations: list[float]
    wavs: dict[int, Tensor]
    lengths: dict[int, list[int]]
    skipped: dict[str, str]


class Encoder:
    """Encodes batches with threads of its own: `with Encoder(...) as encoder`.

    Attributes: `pool` (the workers), `spent`: step -> seconds, over all threads.
    """

    def __init__(self, codec: Codec, semantic: SemanticTokenizer, machine: Machine):
        self.codec, self.semantic, self.machine = codec, semantic, machine
        self.rates = {codec.sample_rate, semantic.sample_rate}
        self.spent: Counter[str] = Counter()
        self._lock = Lock()
        device = machine.device
        threads = partial(ThreadPoolExecutor, initializer=prepare_thread)
        self.pool = self._encoders = threads(machine.workers, initargs=(device,))
        if device.type != "cpu":
            self._encoders = threads(GPU_ENCODERS, initargs=(device, True))

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, *_) -> None:
        for pool in (self.pool, self._encoders):
            pool.shutdown(cancel_futures=True)

    def ahead(self, task: Callable[[Item], Future[Result]], items: Iterable[Item]) -> Iterator:
        """The results of `task(item)` in order, a few items more than workers under way."""
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(task(item))
            if len(pending) > self.machine.workers + 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def encode(self, batches: Iterable[list[Recording]]) -> Iterator[dict[str, Tokens | str]]:
        """For each batch, name -> tokens, or why that recording cannot be used.

        ValueError: the GPU's memory is too small.
        """

        def start(batch: list[Recording]) -> Future:
            # a pool begins tasks in this order, so whatever one waits for has begun before it
            clips = [self.pool.submit(self._decode, recording) for recording in batch]
            gathered = self.pool.submit(self._gather, [r.name for r in batch], clips)
            return self._encoders.submit(self._encode, gathered)

        return self.ahead(start, batches)

    @contextmanager
    def clock(self, step: str) -> Iterator[None]:
        """Add the time that the body takes to `spent[step]`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.spent[step] += time.perf_counter() - started

    def _decode(self, recording: Recording) -> tuple[float, dict[int, Tensor]] | str:
        """Duration and rate -> wav [L]; or what is wrong: damaged, empty, not finite, silent."""
        with self.clock("decoding"):
            try:
                wav, rate = read_sound(recording.path)  # [1, L]
            except ValueError as error:
                return reason_of(error, recording)
            return wav.shape[1] / rate, {to: resample(wav, rate, to)[0] for to in self.rates}

    def _gather(self, names: list[str], clips: list[Future]) -> _Batch:
        decoded = {name: clip.result() for name, clip in zip(names, clips, strict=True)}
        skipped = {name: clip for name, clip in decoded.items() if isinstance(clip, str)}
        usable = {name: clip for name, clip in decoded.items() if name not in skipped}
        batch = _Batch([*usable], [seconds for seconds, _ in usable.values()], {}, {}, skipped)
        with self.clock("decoding"):
            for rate in self.rates if usable else ():
                wavs = [by_rate[rate] for _, by_rate in usable.values()]
                batch.lengths[rate] = [len(wav) for wav in wavs]
                padded = pad_sequence(wavs, batch_first=True)[:, None]  # [B, L] -> [B, 1, L]
                on_gpu = self.machine.device.type == "cuda"
                batch.wavs[rate] = padded.pin_memory() if on_gpu else padded
        return batch

    def _encode(self, gathered: Future[_Batch]) -> dict[str, Tokens | str]:
        with self.clock("waiting"):
            batch = gathered.result()
        if not batch.names:
            return batch.skipped
        try:
            wavs = {
                rate: wav.to(self.machine.device, non_blocking=True)
                for rate, wav in batch.wavs.items()
            }
            with self.clock("semantic"):
                semantic_tokens = self._semantic(wavs, batch.lengths)
            with self.clock("codec"):
                codes = self._codes(wavs[self.codec.sample_rate], batch)
        except torch.OutOfMemoryError:
            seconds = f"--batch-seconds {self.machine.batch_seconds:g}"
            raise ValueError(f"{seconds}: too much for this GPU's memory; pass less") from None
        found = zip(batch.durations, semantic_tokens, codes, strict=True)
        return {**batch.skipped, **dict(zip(batch.names, (Tokens(*f) for f in found), strict=True))}

    def _semantic(self, wavs: dict[int, Tensor], lengths: dict[int, list[int]]) -> list[np.ndarray]:
        """Each clip's semantic_tokens [T_s]."""
        tokenizer, rate = self.semantic, self.semantic.sample_rate
        tokens = tokenizer.encode(wavs[rate], torch.tensor(lengths[rate])).cpu().numpy()  # [B, T]
        frames = [-(-length // tokenizer.hop_length) for length in lengths[rate]]
        return [row[:T] for row, T in zip(tokens, frames, strict=True)]

    def _codes(self, wav: Tensor, batch: _Batch) -> list[np.ndarray]:
        """wav [B, 1, L] -> each clip's codes [K, T], as if it were encoded alone.

        Clips of different lengths share a call where padding cannot be heard: in causal codecs.
        """
        codec, groups, codes = self.codec, defaultdict(list), {}
        frames = [-(-n // codec.hop_length) for n in batch.lengths[codec.sample_rate]]
        for clip, T in enumerate(frames):
            deaf = codec.config.causal and T >= REFLECTED_FRAMES
            groups[None if deaf else T].append(clip)
        for clips in groups.values():
            longest = max(frames[clip] for clip in clips) * codec.hop_length
            part = wav if len(clips) == len(wav) else wav[clips]
            found = codec.encode(part[..., :longest]).cpu().numpy()  # [b, K, T]
            codes |= {clip: found[i, :, : frames[clip]] for i, clip in enumerate(clips)}
        return [codes[clip] for clip in range(len(frames))]


def prepare_thread(device: torch.device, with_stream: bool = False) -> None:
    """Of many threads, each works with one core, on `device`, perhaps in a stream of its own."""
    torch.set_num_threads(1)
    if device.type == "cuda" and device.index is not None:  # threads begin with the first GPU
        torch.cuda.set_device(device)
    if with_stream:
        torch.cuda.set_stream(torch.cuda.Stream())


def cut_batches(
    recordings: list[Recording], seconds: Mapping[str, float], limit: float
) -> list[list[Recording]]:
    """Batches of similar length, the longest first, of at most `limit` seconds padding counted."""
    rest, batches = sorted(recordings, key=lambda recording: -seconds[recording.name]), []
    while rest:
        size = max(1, int(limit / seconds[rest[0].name]))
        batches.append(rest[:size])
        rest = rest[size:]
    return batches


def reason_of(error: ValueError, recording: Recording) -> str:
    """Without the path: the same on every machine."""
    return str(error).removeprefix(f"{recording.path}: ")
