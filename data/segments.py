"""Random training segments: recordings decoded once into memory, crops drawn by a counter.

Segment choice is a function of (seed, step, rank) alone, so a resumed run sees what an
uninterrupted one would have seen, and no loader state needs saving.
"""

import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.contrib.concurrent import thread_map

from data.audio import Recording, find_recordings, load_audio, resample

HELD_OUT = 20  # without splits, one recording in this many is for validation
FULL_SCALE = 32767
FILTER_KNOTS = 7  # at 16 kHz: 125 Hz to 8 kHz


@dataclass(frozen=True)
class Recordings:
    """Decoded recordings end to end: samples [N] int16; recording i is samples[starts[i]:][:L_i].

    names, starts and lengths are parallel; skipped holds (name, reason) of what would not decode.
    """

    samples: Tensor
    names: list[str]
    starts: np.ndarray
    lengths: np.ndarray
    skipped: list[tuple[str, str]]

    def wav(self, i: int) -> Tensor:
        """Recording i as wav [1, L], float32."""
        samples = self.samples[self.starts[i] : self.starts[i] + self.lengths[i]]
        return samples.float()[None] / FULL_SCALE


def default_split(audio: str | Path, otherwise: str) -> str:
    """What to measure on: "test" if there is one, "valid" if other splits are listed, else
    `otherwise`."""
    listed = {recording.split for recording in find_recordings(audio)} - {None}
    return "test" if "test" in listed else "valid" if listed else otherwise


def find_split(audio: str | Path, split: str) -> list[Recording]:
    """The recordings of one split, by name; without splits, one in 20 (by hash) is "valid".
    "all" is every recording.

    ValueError: there are none.
    """

    def split_of(recording: Recording) -> str:
        digest = sha256(recording.name.encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") % HELD_OUT == 0
        return recording.split or ("valid" if held_out else "train")

    found = find_recordings(audio)
    if split != "all":
        found = [recording for recording in found if split_of(recording) == split]
    if not found:
        raise ValueError(
            f'{audio}: no recordings in split "{split}"; add some, list their '
            'split, or take another one (a folder has "train" and "valid")'
        )
    return found


def spread(recordings: list[Recording], count: int) -> list[Recording]:
    """`count` of the recordings, evenly spaced over the list (all of them when there are fewer)."""
    count = min(count, len(recordings))
    return [recordings[(2 * i + 1) * len(recordings) // (2 * count)] for i in range(count)]


def decode_recordings(
    recordings: list[Recording], sample_rate: int, speeds: tuple[float, ...] = (1.0,)
) -> Recordings:
    """Decode recordings to int16 mono at `sample_rate`: 115 MB an hour and speed at 16 kHz.

    Each is there once for every one of `speeds`: 1.1 is faster and higher, as if another voice
    spoke. Those that cannot be decoded are skipped and listed. ValueError: none could be decoded.
    """

    def decode(recording: Recording) -> list[Tensor] | str:
        try:
            wav = load_audio(recording.path, sample_rate)  # [1, L]
        except ValueError as error:
            return str(error)
        played = [resample(wav, round(sample_rate * speed), sample_rate)[0] for speed in speeds]
        return [(wav.clamp(-1, 1) * FULL_SCALE).round().to(torch.int16) for wav in played]

    names, kept, skipped = [], [], []
    results = thread_map(decode, recordings, desc="decoding", disable=None)
    for recording, result in zip(recordings, results, strict=True):
        if isinstance(result, str):
            skipped.append((recording.name, result))
        else:
            names += [recording.name] * len(speeds)
            kept += result
    for name, reason in skipped[:5]:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if not kept:
        raise ValueError(f"none of {len(recordings)} recordings could be decoded")
    lengths = np.array([len(samples) for samples in kept])
    return Recordings(torch.cat(kept), names, lengths.cumsum() - lengths, lengths, skipped)


class RandomSegments:
    """Batches of random segments; a recording is drawn in proportion to its length.

    Shorter recordings are zero-padded, whole. Each segment gets a gain drawn from `gain_db`,
    lowered where it would pass full scale, and a smooth filter of up to +-`filter_db` (another
    microphone, another room). A GPU cuts its own segments: `device` has the samples.
    """

    def __init__(
        self,
        recordings: Recordings,
        length: int,
        gain_db: tuple[float, float],
        seed: int,
        device: str | torch.device = "cpu",
        filter_db: float = 0.0,
    ):
        self.samples = recordings.samples.to(device)  # [N]
        self.filter_db = filter_db
        self.starts, self.lengths = recordings.starts, recordings.lengths
        self.length, self.gain_db, self.seed = length, gain_db, seed
        weights = np.maximum(self.lengths, length)
        self.edges = (weights / weights.sum()).cumsum()  # [num recordings]

    def batch(self, step: int, rank: int, size: int) -> Tensor:
        """wav [size, 1, length], float32, for this step and process; on the samples' device."""
        random = np.random.default_rng([self.seed, step, rank])
        draws = random.random((3, size))
        chosen = np.searchsorted(self.edges, draws[0]).clip(max=len(self.edges) - 1)  # [size]
        room = (self.lengths[chosen] - self.length).clip(min=0)
        starts = self.starts[chosen] + (draws[1] * (room + 1)).astype(np.int64)
        gain = 10 ** ((self.gain_db[0] + draws[2] * (self.gain_db[1] - self.gain_db[0])) / 20)

        wav = self.cut(starts, self.lengths[chosen])
        if self.filter_db:
            wav = self._filter(wav, random.uniform(-1, 1, (size, FILTER_KNOTS)))
        loudest = 1 / wav.abs().amax(dim=1).clamp(min=1e-4)  # [size]
        gains = torch.from_numpy(gain).float().to(wav.device).minimum(loudest)
        return (wav * gains[:, None])[:, None]  # [size, 1, length]

    def _filter(self, wav: Tensor, curves: np.ndarray) -> Tensor:
        """wav [size, length], each with a gain over frequency: curves [size, knots] in -1..1, the
        knots an octave apart below half the sample rate, straight lines in between."""
        device, num_bins = wav.device, self.length // 2 + 1
        octaves = torch.linspace(0, 1, num_bins, device=device).clamp(min=1e-9).log2()
        place = (octaves + FILTER_KNOTS - 1).clamp(min=0)  # [bins], in knots
        left = place.long().clamp(max=FILTER_KNOTS - 2)
        db = self.filter_db * torch.from_numpy(curves).float().to(device)  # [size, knots]
        db = db[:, left].lerp(db[:, left + 1], place - left)  # [size, bins]
        return torch.fft.irfft(torch.fft.rfft(wav) * 10 ** (db / 20), n=self.length)

    def cut(self, starts: np.ndarray, rooms: np.ndarray) -> Tensor:
        """wav [size, length] from samples[starts[i]] on, zero from its sample rooms[i] on."""
        device = self.samples.device
        numbers = torch.from_numpy(np.stack([starts, rooms])).to(device)  # [2, size]
        position = torch.arange(self.length, device=device)[None]  # [1, length]
        index = (numbers[0, :, None] + position).clamp(max=len(self.samples) - 1)  # [size, length]
        return self.samples[index].float() / FULL_SCALE * (position < numbers[1, :, None])
