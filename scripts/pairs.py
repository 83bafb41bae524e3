"""Pairs of which a model should find one likelier: made from tokens, or read from a list."""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data.audio import AUDIO_SUFFIXES
from data.shards import Clip, TokenFolder
from model.stages import Stage
from scripts.codec_metrics import mean
from scripts.lm_metrics import score

PIECE_SECONDS = 0.4  # of what is shuffled, a word or two; of what is not scored after a seam


@dataclass(frozen=True)
class Sample:
    """What is scored: semantic [T_s], codes [K,T], from frame `first` on."""

    semantic: Tensor
    codes: Tensor
    first: int = 0
    starts: bool = True


@dataclass(frozen=True)
class Pair:
    """The better one first, each in windows; pairs of one `item` count as one."""

    kind: str
    item: str
    good: list[Sample]
    bad: list[Sample]


class PairMaker:
    """Pairs out of a split's clips: of each its first 2 H frames, where it has so many.

    order: the clip, or its pieces of PIECE_SECONDS in another order.
    beginning: its second half after its own first half, or after that of another clip (of the same
        speaker, where there is one): only the second half is scored, the same in both, and not
        what comes so soon after the seam that the seam itself would tell.
    speaker: its second half after the first half of another clip of its speaker, or of somebody
        else. Neither knows what was said; one has the voice.
    """

    def __init__(self, folder: TokenFolder, split: str, crop_seconds: float, seed: int):
        self.folder, self.random = folder, np.random.default_rng(seed)
        self.rate = folder.codec["frame_rate"]
        clips = folder.clips(split)
        lengths = [clip.num_frames for clip in clips]
        self.half = int(min(crop_seconds * self.rate, float(np.median(lengths)))) // 2
        self.clips = [clip for clip in clips if clip.num_frames >= 2 * self.half]
        if self.half < 2 or len(self.clips) < 2:
            raise ValueError(
                f"{folder.folder}: too few clips in {split!r}, or too short, for pairs"
            )

    def pairs(self, limit: int | None) -> Iterator[Pair]:
        for clip in self.clips[:limit]:
            for kind in (self._order, self._beginning, self._speaker):
                pair = kind(clip)
                if pair is not None:
                    yield pair

    def _order(self, clip: Clip) -> Pair | None:
        whole, piece = self._cut(clip, 0, 2 * self.half), max(1, round(PIECE_SECONDS * self.rate))
        starts = list(range(0, 2 * self.half, piece))
        if len(starts) < 2:
            return None
        order = self.random.permutation(len(starts))
        if (order == np.arange(len(starts))).all():
            order = order[::-1]
        parts = [self._cut(clip, starts[n], min(starts[n] + piece, 2 * self.half)) for n in order]
        return Pair("order", clip.name, [whole], [joined(parts)])

    def _beginning(self, clip: Clip) -> Pair:
        same = [c for c in self._others(clip) if clip.speaker and c.speaker == clip.speaker]
        other = self._choose(same or self._others(clip))
        return self._after(clip, "beginning", clip, other)

    def _speaker(self, clip: Clip) -> Pair | None:
        others = self._others(clip)
        same = [c for c in others if clip.speaker and c.speaker == clip.speaker]
        different = [c for c in others if c.speaker and c.speaker != clip.speaker]
        if not same or not different:
            return None
        return self._after(clip, "speaker", self._choose(same), self._choose(different))

    def _after(self, clip: Clip, kind: str, good: Clip, bad: Clip) -> Pair:
        H, second = self.half, self._cut(clip, self.half, 2 * self.half)
        first = H + min(round(PIECE_SECONDS * self.rate), H // 2)
        made = [joined([self._cut(c, 0, H), second], first) for c in (good, bad)]
        return Pair(kind, clip.name, [made[0]], [made[1]])

    def _others(self, clip: Clip) -> list[Clip]:
        return [other for other in self.clips if other.name != clip.name]

    def _choose(self, clips: list[Clip]) -> Clip:
        return clips[int(self.random.integers(len(clips)))]

    def _cut(self, clip: Clip, a: int, b: int) -> Sample:
        """Frames [a, b) and the semantic tokens that begin in them."""
        semantic, codes = (torch.from_numpy(t.astype(np.int64)) for t in self.folder.read(clip))
        ratio = self.folder.semantic["frame_rate"] / self.rate
        return Sample(semantic[ceil(a * ratio) : ceil(b * ratio)], codes[:, a:b])


def joined(parts: list[Sample], first: int = 0) -> Sample:
    semantic = torch.cat([part.semantic for part in parts])
    return Sample(semantic, torch.cat([part.codes for part in parts], dim=1), first)


def scored_from(stage: Stage, sample: Sample, collapse: bool) -> int:
    """The first of the stage's own steps that is scored. Without repeats a token that goes on over
    the seam is not."""
    if stage.spec.name != "semantic" or not sample.first:
        return sample.first
    begin = ceil(sample.first * len(sample.semantic) / sample.codes.shape[1])
    if not collapse:
        return begin
    left = len(torch.unique_consecutive(sample.semantic[begin:]))
    return len(torch.unique_consecutive(sample.semantic)) - max(1, left - 1)


def nats_of(stage: Stage, samples: list[Sample], collapse: bool, batch: int) -> np.ndarray:
    """Sums of nats and numbers of scored tokens of each sample: [N,2]."""
    device, found = stage.embed.weight.device, np.zeros((len(samples), 2))
    for begin in tqdm(range(0, len(samples), batch), desc="batches", disable=None):
        part = samples[begin : begin + batch]
        semantic = pad_sequence([s.semantic for s in part], True, -1)
        codes = pad_sequence([s.codes.T for s in part], True, -1).transpose(1, 2)  # [B,K,T]
        starts, ends = torch.tensor([s.starts for s in part]), torch.zeros(len(part)).bool()
        sequences = stage.spec.sequences(semantic, codes, starts, ends, collapse)
        first = np.array([scored_from(stage, s, collapse) for s in part])
        for head in score(stage, sequences.to(device), list(range(len(part)))):
            there = head.frame >= first[head.clip]
            rows = begin + head.clip[there]
            np.add.at(found, (rows, 0), head.nats[there])
            np.add.at(found, (rows, 1), 1)
    return found


def proportion_interval(right: float, num: int, z: float = 1.96) -> list[float]:
    """95 % interval of a proportion (Wilson 1927), which does not shrink to nothing when all of a
    few are right."""
    share, more = right / num, z * z / num
    middle = (share + more / 2) / (1 + more)
    half = z * (share * (1 - share) / num + more / (4 * num)) ** 0.5 / (1 + more)
    return [middle - half, middle + half]


def judge(stage: Stage, pairs: list[Pair], collapse: bool, batch: int) -> dict[str, dict]:
    """kind -> how many items, and the share of them in which the better one is likelier, token by
    token; 0.5 for as likely."""
    samples = [sample for pair in pairs for side in (pair.good, pair.bad) for sample in side]
    found, at = nats_of(stage, samples, collapse, batch), 0
    right: dict[str, dict[str, list[float]]] = {}
    for pair in pairs:
        means = []
        for side in (pair.good, pair.bad):
            nats, num = found[at : at + len(side)].sum(axis=0)
            means.append(nats / num)
            at += len(side)
        won = 0.5 if means[0] == means[1] else float(means[0] < means[1])
        right.setdefault(pair.kind, {}).setdefault(pair.item, []).append(won)
    rows = {}
    for kind, items in right.items():
        values = [mean(values) for values in items.values()]
        rows[kind] = {
            "num_items": len(values),
            "num_pairs": sum(map(len, items.values())),
            "right": mean(values),
            "right_interval": proportion_interval(sum(values), len(values)),
        }
    return rows


Listed = list[tuple[str, str, Path, Path]]  # kind, item, the better recording, the other


def read_pairs(path: Path) -> Listed:
    """ValueError: not one of the three forms, or it holds no pair."""
    reader: Callable[[Path], Listed]
    if path.is_dir():
        reader = _pairs_of_folder
    elif path.suffix == ".csv":
        reader = _pairs_of_csv
    else:
        reader = _pairs_of_lines
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder of pairs")
    found = reader(path)
    if not found:
        raise ValueError(f"{path}: holds no pair")
    for _, _, *both in found:
        for file in both:
            if not file.is_file():
                raise ValueError(f"{path}: names {file}, which is not there")
    return found


def _pairs_of_folder(path: Path) -> Listed:
    """NAME_correct.wav and NAME_incorrect.wav, as spoken StoryCloze is published."""
    files = sorted(f for f in path.rglob("*_correct.*") if f.suffix in AUDIO_SUFFIXES)
    others = [f.with_name(f.name.replace("_correct.", "_incorrect.")) for f in files]
    return [(path.name, str(f), f, other) for f, other in zip(files, others, strict=True)]


def _pairs_of_csv(path: Path) -> Listed:
    """ZeroSpeech 2021's gold.csv (sWUGGY, sBLIMP): id, filename, voice, correct, type; recordings
    beside it. One id with several voices is one item."""
    sides: dict[tuple[str, str], dict[str, tuple[str, Path]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                name, key = row["filename"], (row["id"], row.get("voice") or "")
                kind, correct = row.get("type") or path.parent.name, row["correct"]
                sound = path.parent / (name if Path(name).suffix else f"{name}.wav")
            except (KeyError, TypeError):
                raise ValueError(f"{path}, line {number}: no id, filename or correct") from None
            if correct not in ("0", "1"):
                raise ValueError(f"{path}, line {number}: correct is {correct!r}, not 0 or 1")
            sides.setdefault(key, {})[correct] = (kind, sound)
    both = {key: side for key, side in sides.items() if len(side) == 2}
    return [(side["1"][0], key[0], side["1"][1], side["0"][1]) for key, side in both.items()]


def _pairs_of_lines(path: Path) -> Listed:
    """{"good": FILE, "bad": FILE, "kind": optional} a line, relative to the file."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not text; expected lines, a .csv or a folder") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            good, bad = path.parent / entry["good"], path.parent / entry["bad"]
        except (ValueError, KeyError, TypeError):
            expected = '{"good": FILE, "bad": FILE}'
            raise ValueError(f"{path}, line {number}: expected {expected}") from None
        found.append((str(entry.get("kind", path.stem)), str(number), good, bad))
    return found
