"""Figures for sequences of semantic tokens: bits, unit edit distance, voices, phrases, phones."""

import math
import re
from collections import Counter

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchaudio.functional import phase_vocoder

from data.audio import resample
from data.segments import spread
from scripts.codec_metrics import confidence_interval, mean

SAMPLE_RATE = 16_000  # of the clips that are perturbed, whatever the tokenizer's
PERTURBATIONS = ("pitch", "noise_20db", "noise_10db", "gain", "band")
WINDOW, HOP = 512, 128  # of the phase vocoder
MIN_CLIPS_OF_SPEAKER, NUM_RIVALS = 4, 10


def shift_pitch(wav: Tensor, up: int, down: int) -> Tensor:
    """wav [1, L] -> [1, L], pitch and formants times up / down: resampled, then stretched back."""
    window, short = torch.hann_window(WINDOW), resample(wav, up, down)  # [1, L * down / up]
    short = F.pad(short, (0, max(0, WINDOW - short.shape[1])))
    spectrum = torch.stft(short, WINDOW, HOP, window=window, return_complex=True)  # [1, bins, T]
    advance = torch.linspace(0, math.pi * HOP, WINDOW // 2 + 1)[:, None]  # [bins, 1]
    stretched = phase_vocoder(spectrum, down / up, advance)
    return torch.istft(stretched, WINDOW, HOP, window=window, length=wav.shape[1])


def perturb(wav: Tensor, seed: int) -> dict[str, Tensor]:
    """wav [1, L] at SAMPLE_RATE -> as many samples of the same words, by PERTURBATIONS."""
    noise = torch.randn(wav.shape, generator=torch.Generator().manual_seed(seed))
    noise = noise * wav.square().mean().sqrt()  # 0 dB
    frequency = torch.fft.rfftfreq(wav.shape[1], 1 / SAMPLE_RATE)
    band = torch.fft.rfft(wav) * ((frequency >= 300) & (frequency <= 3400))
    return {
        "pitch": shift_pitch(wav, *((9, 8) if seed % 2 else (8, 9))),  # half up, half down
        "noise_20db": wav + 10 ** (-20 / 20) * noise,
        "noise_10db": wav + 10 ** (-10 / 20) * noise,
        "gain": 10 ** (-10 / 20) * wav,
        "band": torch.fft.irfft(band, n=wav.shape[1]),
    }


def collapse(tokens: np.ndarray) -> np.ndarray:
    """tokens [T] without repeats of the one before."""
    return tokens[np.diff(tokens, prepend=-1) != 0]


def edit_distances(query: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """Levenshtein distances of `query` [n] to each of `others`, over the longer length: [N], 0..1.

    The unit edit distance of Gat et al. 2023, who divide by frames: that favours long runs.
    """
    lengths = np.array([len(other) for other in others])
    padded = np.full((len(others), lengths.max(initial=0)), -1)  # [N, L]
    for row, other in zip(padded, others, strict=True):
        row[: len(other)] = other
    position = np.arange(padded.shape[1] + 1)  # [L + 1]
    distance = np.broadcast_to(position, (len(others), len(position)))
    for token in query:  # one line of all N tables at a time
        replaced = distance[:, :-1] + (padded != token)
        deleted = distance + 1
        reached = np.concatenate([deleted[:, :1], np.minimum(replaced, deleted[:, 1:])], axis=1)
        distance = np.minimum.accumulate(reached - position, axis=1) + position  # insertions
    return distance[np.arange(len(others)), lengths] / np.maximum(lengths, max(len(query), 1))


def cross_entropies(
    train: list[np.ndarray], clips: list[np.ndarray], num_tokens: int
) -> tuple[float, float]:
    """Bits per token of `clips` under counts of `train`: unigram (add 1/2) and bigram.

    Bigrams are mixed with unigrams by how many kinds of token have followed (Witten & Bell 1991);
    the first token of a clip has only the unigram.
    """
    counts = np.bincount(np.concatenate(train), minlength=num_tokens) + 0.5
    unigram = counts / counts.sum()  # [num_tokens]
    pairs = np.concatenate([clip[:-1] * num_tokens + clip[1:] for clip in train])
    pairs, times = np.unique(pairs, return_counts=True)
    kinds = np.bincount(pairs // num_tokens, minlength=num_tokens)  # of followers
    total = kinds + np.bincount(pairs // num_tokens, weights=times, minlength=num_tokens)
    times_of = dict(zip(pairs.tolist(), times.tolist(), strict=True))
    bits = np.zeros(2)
    for clip in clips:
        first, then = clip[:-1], clip[1:]
        seen = [times_of.get(pair, 0) for pair in (first * num_tokens + then).tolist()]
        mixed = (seen + kinds[first] * unigram[then]) / np.maximum(total[first], 1)
        bigram = np.where(total[first] > 0, mixed, unigram[then])
        bits[0] -= np.log2(unigram[clip]).sum()
        bits[1] -= np.log2(unigram[clip[:1]]).sum() + np.log2(bigram).sum()
    unigram_bits, bigram_bits = bits / sum(map(len, clips))
    return float(unigram_bits), float(bigram_bits)


def rate_figures(
    train: list[np.ndarray], clips: list[np.ndarray], num_tokens: int, seconds: float
) -> dict[str, float]:
    """Tokens and entropy-coded bits per second, perplexities; `collapsed_`: without repeats."""
    row = {
        "tokens_used": len(np.unique(np.concatenate(clips))) / num_tokens,
        "run_length": sum(map(len, clips)) / sum(len(collapse(clip)) for clip in clips),
    }
    for prefix, change in (("", np.asarray), ("collapsed_", collapse)):
        changed = [change(clip) for clip in clips]
        rate = sum(map(len, changed)) / seconds
        row[f"{prefix}tokens_per_second"] = rate
        bits = cross_entropies([change(clip) for clip in train], changed, num_tokens)
        for name, each in zip(("unigram", "bigram"), bits, strict=True):
            row[f"{prefix}bits_{name}"] = each * rate
            row[f"{prefix}perplexity_{name}"] = 2**each
    return row


def choose_speakers(speakers: list[str | None]) -> list[int]:
    """Indices of equally many clips of each speaker with enough; none where fewer than two have."""
    enough = [name for name, n in Counter(speakers).items() if name and n >= MIN_CLIPS_OF_SPEAKER]
    of = [[i for i, speaker in enumerate(speakers) if speaker == name] for name in enough]
    return [i for clips in of for i in spread(clips, min(map(len, of)))] if len(of) > 1 else []


def speakers_given_away(
    clips: list[np.ndarray], speakers: list[str], num_tokens: int, piece: int | None = None
) -> list[float]:
    """How much of each clip naive Bayes (add 1/2), taught by all other clips, gives its speaker.

    clips: tokens [T]. The share of its pieces of `piece` tokens (shorter at the end); without
    `piece`, all or nothing.
    """
    names, own = np.unique(speakers, return_inverse=True)
    sums = np.zeros((len(names), num_tokens))  # [S, num_tokens]
    for speaker, tokens in zip(own, clips, strict=True):
        sums[speaker] += np.bincount(tokens, minlength=num_tokens)
    shares = []
    for speaker, tokens in zip(own, clips, strict=True):
        counts = sums + 0.5
        counts[speaker] -= np.bincount(tokens, minlength=num_tokens)
        scores = np.log(counts / counts.sum(1, keepdims=True))[:, tokens]  # [S, T]
        scores = np.add.reduceat(scores, range(0, len(tokens), piece or len(tokens)), axis=1)
        shares.append(float((scores.argmax(0) == speaker).mean()))
    return shares


def phrase_figures(
    queries: list[np.ndarray],
    clips: list[np.ndarray],
    texts: list[str | None],
    speakers: list[str | None],
    seconds: list[float],
) -> dict:
    """Takes of a phrase against each other, and against NUM_RIVALS other phrases of like length.

    queries: collapsed tokens, of the clips or of them changed, compared with those of other clips.
    A figure is None where no phrase (or none by two speakers) is repeated.
    """
    words = [re.sub(r"[\W_]+", " ", (text or "").lower()).strip() for text in texts]
    often = {phrase for phrase, n in Counter(words).items() if phrase and n > 1}
    same, across, other, found = [], [], [], []
    for i, phrase in enumerate(words):
        rivals = [j for j, text in enumerate(words) if text not in ("", phrase)]
        if phrase not in often or not rivals:
            continue
        rivals.sort(key=lambda j: abs(seconds[j] - seconds[i]))
        takes = [j for j, text in enumerate(words) if text == phrase and j != i]
        near = edit_distances(queries[i], [clips[j] for j in takes])
        far = edit_distances(queries[i], [clips[j] for j in rivals])
        same += near.tolist()
        strangers = [None not in (speakers[i], s) and speakers[i] != s for s in speakers]
        across += [d for d, j in zip(near, takes, strict=True) if strangers[j]]
        other += far[:NUM_RIVALS].tolist()
        found.append(bool(near.min() < far.min()))
    return {
        "phrase_ratio": np.mean(same) / np.mean(other) if any(other) else None,
        "phrase_ratio_across_speakers": np.mean(across) / np.mean(other) if across else None,
        "phrase_retrieval": mean(found),
        "phrase_retrieval_interval": confidence_interval(found),
        "num_takes": len(found),
    }


def phone_figures(
    clips: list[np.ndarray], phones: list[list[tuple[float, float, str]]], frame_rate: float
) -> dict[str, float | None]:
    """Phone-normalised mutual information and phone purity (Hsu et al. 2021) of frames in a phone.

    clips: tokens [T]; phones: of each clip, (start, end, phone) in seconds.
    """
    joint = Counter()
    for tokens, segments in zip(clips, phones, strict=True):
        for start, end, phone in segments:  # frames whose centre lies in it
            first, last = (max(0, int(np.ceil(t * frame_rate - 0.5))) for t in (start, end))
            joint.update((phone, token) for token in tokens[first:last].tolist())
    if not joint:
        return {"pnmi": None, "phone_purity": None}
    row, column = (
        np.unique([pair[side] for pair in joint], return_inverse=True)[1] for side in (0, 1)
    )
    table = np.zeros((row.max() + 1, column.max() + 1))  # [num phones, num tokens]
    table[row, column] = list(joint.values())
    table /= table.sum()

    def entropy(p: np.ndarray) -> float:
        return -(p[p > 0] * np.log(p[p > 0])).sum()

    of_phones, of_tokens = entropy(table.sum(1)), entropy(table.sum(0))
    shared = of_phones + of_tokens - entropy(table)
    pnmi = float(shared / of_phones) if of_phones else None
    return {"pnmi": pnmi, "phone_purity": float(table.max(0).sum())}
