"""What can be counted of clips that nobody has said: how like real ones they are as a set, how
unlike each other, how much of them is copied, how much is silence."""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from model.semantic import SemanticTokenizer
from scripts.semantic_metrics import edit_distances

NUM_DIRECTIONS = 16  # of the features' space, in which sets are compared
SILENT = 10 ** (-50 / 20)  # root mean square of a frame, full scale 1
FRAME_SECONDS = 0.025
BASE = np.uint64(0x9E3779B97F4A7C15)  # of the hashes


@torch.no_grad()
def second_features(wav: Tensor, tokenizer: SemanticTokenizer) -> np.ndarray:
    """wav [1,L] at the tokenizer's rate -> its features, normalised, averaged over each second:
    [N,F]; what is left of a second counts from its half on."""
    device, second = tokenizer.mean.device, round(tokenizer.frame_rate)
    features = tokenizer.features(wav[None].to(device))[0]  # [T,F]
    features = (features - tokenizer.mean) / tokenizer.std
    parts = [part for part in features.split(second) if 2 * len(part) >= second]
    if not parts:
        return np.zeros((0, features.shape[1]))
    return torch.stack([part.mean(dim=0) for part in parts]).double().cpu().numpy()


def main_directions(reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [F] of features [N,F], and the directions [F,D] in which they differ most, each scaled
    to a deviation of 1."""
    mean = reference.mean(axis=0)
    _, lengths, directions = np.linalg.svd(reference - mean, full_matrices=False)
    D = max(1, min(NUM_DIRECTIONS, len(reference) // 4, len(lengths)))
    scale = np.maximum(lengths[:D] / np.sqrt(len(reference)), 1e-12)
    return mean, directions[:D].T / scale


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float | None:
    """Between normal distributions with the means and covariances of a [N,D] and b [M,D] (Dowson &
    Landau 1982; for audio Kilgour et al. 2019). None: too few to have a covariance."""
    if min(len(a), len(b)) < 2:
        return None
    first, second = (np.cov(x, rowvar=False).reshape(x.shape[1], -1) for x in (a, b))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    apart = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    return float(apart + np.trace(first) + np.trace(second) - 2 * cross)


def silent_share(wav: np.ndarray, sample_rate: int) -> float:
    """Of the frames of wav [L]."""
    size = round(FRAME_SECONDS * sample_rate)
    frames = wav[: len(wav) // size * size].reshape(-1, size)
    if not len(frames):
        return 1.0
    return float((np.sqrt((frames**2).mean(axis=1)) < SILENT).mean())


def unlikeness(clips: list[np.ndarray]) -> list[float]:
    """Edit distance of each clip's tokens [T] to those of the next longer one: 0 equal, 1 nothing
    alike."""
    ordered = sorted((clip for clip in clips if len(clip)), key=len)
    return [edit_distances(a, [b]).item() for a, b in pairwise(ordered)]


class Copies:
    """The longest runs of tokens that also stand in what a model was trained on."""

    def __init__(self, train: list[np.ndarray]):
        # a clip's end is no token, so that nothing runs over it
        ends = np.array([-1])
        self.tokens = np.concatenate([part for clip in train for part in (clip, ends)])
        self.hashes: dict[int, np.ndarray] = {}

    def longest(self, clip: np.ndarray) -> int:
        """How many tokens of clip [T] in a row; by bisection, for a run's parts are copied, too."""
        low, high = 0, len(clip)
        while low < high:
            tried = (low + high + 1) // 2
            found = np.isin(_hashes(clip, tried), self._of_train(tried)).any()
            low, high = (tried, high) if found else (low, tried - 1)
        return low

    def _of_train(self, n: int) -> np.ndarray:
        if n not in self.hashes:
            self.hashes[n] = np.unique(_hashes(self.tokens, n))
        return self.hashes[n]


def _hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """Of each run of n tokens: polynomials of 64 bits, which overflow as they should."""
    if n > len(tokens):
        return np.zeros(0, np.uint64)
    with np.errstate(over="ignore"):
        mixed = (tokens.astype(np.int64) + 2).astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(29)
        found, power = np.zeros(len(tokens) - n + 1, np.uint64), np.uint64(1)
        for k in range(n):
            found += mixed[k : len(mixed) - n + 1 + k] * power
            power = power * BASE
    return found
