"""What a language model's guesses are worth, token by token, and what its numbers say in words."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import torch

from data.baselines import Baseline, baselines, bits_per_second
from data.dataset import ValidBatches, make_loader
from data.shards import Clip, TokenFolder
from model.layouts import Sequences
from model.stages import Stage
from scripts.codec_metrics import confidence_interval
from scripts.semantic_metrics import collapse as without_repeats
from scripts.semantic_metrics import cross_entropies

SECONDS = (0, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)  # of context: edges of the buckets
NUM_BINS = 10  # of confidence
SAME = 0.01  # as good as: the share of a loss that does not matter


@dataclass
class Scores:
    """Of each target of a codebook [N]: its nats, the chance given to the likeliest class, whether
    it was that, its frame in the window (-1: EOS), the number of its clip."""

    nats: np.ndarray
    chance: np.ndarray
    hit: np.ndarray
    frame: np.ndarray
    clip: np.ndarray


@torch.no_grad()
def score(stage: Stage, batch: Sequences, clips: list[int]) -> list[Scores]:
    """Every target of a padded batch, for each head; clips: the number of each row's clip."""
    N = batch.ids.shape[1]
    hidden = stage.hidden(batch.ids, batch.positions).flatten(0, 1)  # [B*N,dim]
    step = batch.positions.flatten().long()  # from the mark that predicts step 0 on
    K, flat = stage.layout.num_codebooks, stage.layout.pattern == "flatten"
    found = []
    for k, (places, targets) in enumerate(zip(batch.places, batch.targets, strict=True)):
        logs = stage.heads[k](hidden[places]).float().log_softmax(dim=-1)  # [M,C]
        best = logs.max(dim=-1)
        frame = step[places] // K if flat else step[places] - k
        if k == 0:
            frame = frame.masked_fill(targets == stage.layout.eos, -1)
        columns = (
            -logs.gather(1, targets[:, None])[:, 0],
            best.values.exp(),
            best.indices == targets,
            frame,
            torch.tensor(clips, device=places.device)[places // N],
        )
        found.append(Scores(*(column.cpu().numpy() for column in columns)))
    return found


def score_split(
    stage: Stage, folder: TokenFolder, split: str, crop_seconds: float, collapse: bool, batch: int
) -> Iterator[list[Scores]]:
    """The windows of `split` as a run validates on them, batch by batch."""
    device = stage.embed.weight.device
    windows = ValidBatches(folder, split, crop_seconds=crop_seconds, batch_size=batch)
    number = {clip.name: n for n, clip in enumerate(windows.clips)}
    clips = [number[clip.name] for clip, *_ in windows.windows]
    for n, b in enumerate(make_loader(windows)):
        crops = (b.semantic, b.codes, b.starts, b.ends)
        sequences = stage.spec.sequences(*crops, collapse, False)
        yield score(stage, sequences.to(device), clips[n * batch : (n + 1) * batch])


def joined(parts: list[list[Scores]]) -> list[Scores]:
    """Batches of heads -> heads."""
    return [
        Scores(*(np.concatenate([getattr(s, f.name) for s in head]) for f in fields(Scores)))
        for head in zip(*parts, strict=True)
    ]


def counted(
    folder: TokenFolder, split: str, names: list[str], rates: list[float], collapse: bool
) -> dict[str, Baseline]:
    """Models of counts of the train split, on `split`: `data.baselines`' and `bigram`, of the token
    before in the same codebook (see `cross_entropies`). Without EOS."""
    bigram = []
    for name in names:
        streams = [
            [_stream(folder, clip, name, collapse) for clip in folder.clips(part)]
            for part in ("train", split)
        ]
        size = (
            folder.semantic["num_tokens"] if name == "semantic" else folder.codec["codebook_size"]
        )
        bigram.append(cross_entropies(*streams, size)[1] * math.log(2))
    return baselines(folder, names, collapse, split) | {
        "bigram": Baseline(bigram, bits_per_second(bigram, rates))
    }


def _stream(folder: TokenFolder, clip: Clip, name: str, collapse: bool) -> np.ndarray:
    semantic, codes = folder.read(clip)
    if name != "semantic":
        return codes[int(name[1:])].astype(np.int64)
    semantic = semantic.astype(np.int64)
    return without_repeats(semantic) if collapse else semantic


@torch.no_grad()
def encodec_nats(
    lm: torch.nn.Module, folder: TokenFolder, split: str, crop_seconds: float, batch: int
) -> list[float]:
    """Nats per token of every codebook under encodec's own model, in the windows of a run."""
    windows = ValidBatches(folder, split, crop_seconds=crop_seconds, batch_size=batch)
    sums, num, device = 0.0, 0, next(lm.parameters()).device
    for codes in (b.codes.to(device) for b in make_loader(windows)):
        before = torch.nn.functional.pad(codes[..., :-1] + 1, (1, 0))  # [B,K,T], 0: none yet
        chances = lm(before)[0]  # [B,1024,K,T]
        own = chances.gather(1, codes.clamp(min=0)[:, None])[:, 0]  # [B,K,T]
        there = codes >= 0
        sums = sums - torch.where(there, own.double().log(), 0.0).sum(dim=(0, 2))  # [K]
        num += int(there[:, 0].sum())
    return (sums / num).tolist()


def by_clip(scores: list[Scores]) -> tuple[list[float], list[float]]:
    """Nats and targets of each clip, all codebooks together."""
    clips = np.concatenate([s.clip for s in scores])
    nats = np.bincount(clips, weights=np.concatenate([s.nats for s in scores]))
    num = np.bincount(clips)
    return nats[num > 0].tolist(), num[num > 0].astype(float).tolist()


def model_figures(scores: list[Scores], rates: list[float]) -> dict:
    """Nats per token of each codebook and of all, bits per second of audio, first guesses that
    were right; the interval over clips."""
    nats = [float(s.nats.mean()) for s in scores]
    clip_nats, clip_num = by_clip(scores)
    return {
        "nats": nats,
        "loss": sum(clip_nats) / sum(clip_num),
        "loss_interval": confidence_interval(clip_nats, clip_num),
        "bits_per_second": bits_per_second(nats, rates),
        "first_guess": [float(s.hit.mean()) for s in scores],
    }


def by_position(scores: list[Scores], rates: list[float], crop_seconds: float) -> list[dict]:
    """Mean nats of tokens by the seconds of their window that came before them; EOS is left out.
    Of tokens without repeats the seconds are those of the usual rate, within the window."""
    seconds = np.concatenate([s.frame / rate for s, rate in zip(scores, rates, strict=True)])
    seconds = np.minimum(seconds, np.nextafter(crop_seconds, 0))
    nats, rows = np.concatenate([s.nats for s in scores]), []
    for low, high in pairwise(SECONDS):
        inside = (seconds >= low) & (seconds < high)
        if inside.any():
            mean, num = float(nats[inside].mean()), int(inside.sum())
            rows.append({"from": low, "to": high, "nats": mean, "num_tokens": num})
    return rows


def calibration(scores: list[Scores]) -> dict:
    """How often the likeliest class was right, by the chance it was given; `error`: the mean
    distance of the two (ECE, Naeini et al. 2015); `over`: by how much chances exceed it."""
    chance = np.concatenate([s.chance for s in scores])
    hit = np.concatenate([s.hit for s in scores])
    bins = np.minimum((chance * NUM_BINS).astype(int), NUM_BINS - 1)
    num = np.bincount(bins, minlength=NUM_BINS)
    sums = [np.bincount(bins, weights=w, minlength=NUM_BINS) for w in (chance, hit)]
    return {
        "bins": [
            {"chance": float(c / n), "right": float(h / n), "num_tokens": int(n)}
            for c, h, n in zip(*sums, num, strict=True)
            if n
        ],
        "error": float(np.abs(sums[0] - sums[1]).sum() / len(chance)),
        "over": float(chance.mean() - hit.mean()),
    }


def verdict(model: float, levels: dict[str, Baseline], rates: list[float], curve: list) -> str:
    """In a line: the model's bits per second, beside levels; curve [(step, validation loss)] of the
    run. Of each codebook the better of unigram and bigram counts."""
    pairs = zip(levels["unigram"].nats, levels["bigram"].nats, strict=True)
    counting = bits_per_second([min(pair) for pair in pairs], rates)
    if model > (1 + SAME) * levels["uniform"].bits_per_second:
        return "broken: worse than holding every token for equally likely"
    if model > (1 - SAME) * levels["unigram"].bits_per_second:
        return "it knows how often tokens come and no more: train on, or look at optim.lr"
    if model > (1 - SAME) * counting:
        return "it learns, but counting tokens and pairs of them still tells as much: train on"
    less = 1 - model / counting
    return f"it works: {less:.0%} fewer bits than counting tokens and pairs takes{_trend(curve)}"


def _trend(curve: list[tuple[int, float]]) -> str:
    """What the last quarter of the steps did."""
    if not curve:
        return ""
    (best_step, best), (last_step, last) = min(curve, key=lambda point: point[1]), curve[-1]
    before = [loss for step, loss in curve if step <= 0.75 * last_step]
    if last > (1 + SAME) * best:
        return f"; the run was at its best at step {best_step} of {last_step}: stop earlier"
    if not before:
        return ""
    fell = 1 - best / min(before)
    if fell > SAME:
        return f"; the last quarter of its steps still took {fell:.0%} off the loss: more may help"
    return f"; the last quarter of its steps took less than {SAME:.0%} off the loss"
