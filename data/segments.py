"""Random training segments: recordings decoded once into memory, crops drawn by a counter.

Segment choice is a function of (seed, step, rank) alone, so a resumed run sees what an
uninterrupted one would have seen, and no loader state needs saving.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.audio import Recording, find_recordings, load_audio

HELD_OUT = 20  # without splits, one recording in this many is for validation
FULL_SCALE = 32767


@dataclass(frozen=True)
class Recordings:
    """Decoded recordings end to end: samples [N] int16; recording i is samples[starts[i]:][:L_i].

    names, starts and lengths are parallel; skipped holds (name, reason) of what would not decode.
    """

    samples: Tensor
    names: list[str]
    starts: Tensor
    lengths: Tensor
    sample_rate: int
    skipped: list[tuple[str, str]]

    @property
    def hours(self) -> float:
        return len(self.samples) / self.sample_rate / 3600

    def wav(self, i: int, max_length: int | None = None) -> Tensor:
        """Recording i as wav [1, L], float32, at most `max_length` samples."""
        start, length = int(self.starts[i]), int(self.lengths[i])
        length = length if max_length is None else min(length, max_length)
        return self.samples[start : start + length].float()[None] / FULL_SCALE

    def to(self, device: torch.device) -> "Recordings":
        """The same with the samples on `device`: a GPU then cuts its own segments."""
        return replace(self, samples=self.samples.to(device))


def split_of(recording: Recording) -> str:
    """The recording's split; without one, valid for one name in 20 (by its hash), else train."""
    if recording.split is not None:
        return recording.split
    digest = int.from_bytes(sha256(recording.name.encode()).digest()[:8], "big")
    return "valid" if digest % HELD_OUT == 0 else "train"


def find_split(audio: str | Path, split: str) -> list[Recording]:
    """The recordings of one split, by name. ValueError: there are none."""
    found = [r for r in find_recordings(audio) if split_of(r) == split]
    if not found:
        raise ValueError(
            f'{audio}: no recordings in split "{split}"; add some, or list their split'
        )
    return found


def spread(recordings: list[Recording], count: int) -> list[Recording]:
    """`count` of the recordings, evenly spaced over the list (all of them when there are fewer)."""
    count = min(count, len(recordings))
    return [recordings[(2 * i + 1) * len(recordings) // (2 * count)] for i in range(count)]


def decode_recordings(
    recordings: list[Recording], sample_rate: int, max_hours: float, num_workers: int
) -> Recordings:
    """Decode recordings to int16 mono at `sample_rate`, until `max_hours` of audio are in memory.

    With more than that, a choice spread by hash over all names is kept. Recordings that cannot be
    decoded are skipped and listed. ValueError: none could be decoded.
    """
    order = sorted(recordings, key=lambda r: sha256(r.name.encode()).digest())
    limit = int(max_hours * 3600 * sample_rate)
    kept: list[tuple[str, Tensor]] = []
    skipped: list[tuple[str, str]] = []
    total = 0

    def decode(recording: Recording) -> Tensor | str:
        try:
            wav = load_audio(recording.path, sample_rate)[0]  # [L]
        except ValueError as error:
            return str(error)
        return (wav.clamp(-1, 1) * FULL_SCALE).round().to(torch.int16)

    with ThreadPoolExecutor(num_workers) as pool:
        bar = tqdm(total=len(order), desc="decoding", unit="file", disable=None)
        for first in range(0, len(order), 16 * num_workers):  # bounds memory beyond the limit
            chunk = order[first : first + 16 * num_workers]
            for recording, result in zip(chunk, pool.map(decode, chunk), strict=True):
                bar.update()
                if isinstance(result, str):
                    skipped.append((recording.name, result))
                elif total < limit:
                    kept.append((recording.name, result[: limit - total]))
                    total += len(kept[-1][1])
            if total >= limit:
                print(f"data.max_hours reached: {len(kept)} of {len(order)} recordings in memory")
                break
        bar.close()
    for name, reason in skipped[:5]:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if not kept:
        reason = f" (first: {skipped[0][1]})" if skipped else ""
        raise ValueError(f"none of {len(order)} recordings could be decoded{reason}")
    kept.sort(key=lambda pair: pair[0])  # by name
    lengths = torch.tensor([len(samples) for _, samples in kept])
    return Recordings(
        samples=torch.cat([samples for _, samples in kept]),
        names=[name for name, _ in kept],
        starts=lengths.cumsum(0) - lengths,
        lengths=lengths,
        sample_rate=sample_rate,
        skipped=skipped,
    )


class RandomSegments:
    """Batches of random segments; a recording is drawn in proportion to its length.

    Shorter recordings are zero-padded, whole. Each segment gets a gain drawn from `gain_db`,
    lowered where it would pass full scale.
    """

    def __init__(
        self, recordings: Recordings, length: int, gain_db: tuple[float, float], seed: int
    ):
        self.recordings, self.length, self.gain_db, self.seed = recordings, length, gain_db, seed
        weights = recordings.lengths.clamp(min=length).double()
        self.edges = (weights / weights.sum()).cumsum(0).numpy()  # [num recordings]
        self.starts, self.lengths = recordings.starts.numpy(), recordings.lengths.numpy()

    def batch(self, step: int, rank: int, size: int) -> Tensor:
        """wav [size, 1, length], float32, for this step and process; on the recordings' device."""
        draws = np.random.default_rng([self.seed, step, rank]).random((3, size))
        chosen = np.searchsorted(self.edges, draws[0]).clip(max=len(self.edges) - 1)  # [size]
        room = (self.lengths[chosen] - self.length).clip(min=0)
        starts = self.starts[chosen] + (draws[1] * (room + 1)).astype(np.int64)
        valid = np.minimum(self.lengths[chosen], self.length)
        gain = 10 ** ((self.gain_db[0] + draws[2] * (self.gain_db[1] - self.gain_db[0])) / 20)

        samples = self.recordings.samples
        numbers = torch.from_numpy(np.stack([starts, valid])).to(samples.device)  # [2, size]
        position = torch.arange(self.length, device=samples.device)[None]  # [1, length]
        index = (numbers[0, :, None] + position).clamp(max=len(samples) - 1)  # [size, length]
        wav = samples[index].float() / FULL_SCALE * (position < numbers[1, :, None])
        loudest = 1 / wav.abs().amax(dim=1).clamp(min=1e-4)  # [size]
        gains = torch.from_numpy(gain).float().to(samples.device).minimum(loudest)
        return (wav * gains[:, None])[:, None]  # [size, 1, length]
