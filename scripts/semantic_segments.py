"""Random crops of recordings with the labels of their frames, disturbed as WavLM does."""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configs.semantic_schema import SemanticDataConfig
from data.segments import FILTER_KNOTS, RandomSegments, Recordings
from model.hubert import HOP_LENGTH, SAMPLE_RATE
from model.semantic import SemanticTokenizer

NUM_DRAWS = 8  # random numbers of a crop, besides those of its mask and its filter


class LabelledSegments(RandomSegments):
    """Random crops with the labels of their frames; each second of audio is as likely as another.

    Crops begin on the labels' grid, at multiples of HOP_LENGTH. recordings has each one at every
    one of `speeds`, but labels are always those of the recording as it is: at another speed it is
    another voice that says the same (the idea of ContentVec, Qian et al. 2022).
    """

    def __init__(
        self,
        recordings: Recordings,
        tokenizer: SemanticTokenizer,
        config: SemanticDataConfig,
        speeds: tuple[float, ...] = (1.0,),
    ):
        device = tokenizer.mean.device
        length = round(config.segment_seconds * SAMPLE_RATE / HOP_LENGTH) * HOP_LENGTH
        super().__init__(recordings, length, (0.0, 0.0), 0, device, config.filter_db)
        self.config, self.edges = config, self.lengths.cumsum() / self.lengths.sum()
        labels, every = [], range(0, len(recordings.names), len(speeds))
        for first in tqdm(every, desc="labels", unit="file", disable=None):
            wav = recordings.wav(first + speeds.index(1.0)).to(device)  # [1, L]
            tokens = tokenizer.encode(wav[None])[0].int()  # [T]
            for version, speed in enumerate(speeds):
                T = -(-int(self.lengths[first + version]) // HOP_LENGTH)
                middle = ((torch.arange(T, device=device) + 0.5) * speed).long()  # [T]
                labels.append(tokens[middle.clamp(max=len(tokens) - 1)])
        counts = np.array([len(tokens) for tokens in labels])
        self.labels, self.label_starts = torch.cat(labels), counts.cumsum() - counts

    def crops(self, chosen: np.ndarray, first: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Of recordings chosen [B] from frames first [B]: wav [B, L], labels [B, T], frames [B]."""
        rooms = self.lengths[chosen] - first * HOP_LENGTH
        wav = self.cut(self.starts[chosen] + first * HOP_LENGTH, rooms)
        T = self.length // HOP_LENGTH
        frames = (-(-rooms // HOP_LENGTH)).clip(max=T)
        numbers = np.stack([self.label_starts[chosen] + first, frames])
        starts, frames = torch.from_numpy(numbers).to(wav.device)  # [B] each
        index = starts[:, None] + torch.arange(T, device=wav.device)  # [B, T]
        return wav, self.labels[index.clamp(max=len(self.labels) - 1)].long(), frames

    def random_crops(self, rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same of `size` random crops, filtered, mixed, in noise; the noise is torch's."""
        draws = rng.random((NUM_DRAWS, size))
        chosen = np.searchsorted(self.edges, draws[0]).clip(max=len(self.edges) - 1)  # [B]
        room = (self.lengths[chosen] - self.length).clip(min=0) // HOP_LENGTH
        wav, labels, frames = self.crops(chosen, (draws[1] * (room + 1)).astype(np.int64))
        if self.filter_db:
            wav = self._filter(wav, rng.uniform(-1, 1, (size, FILTER_KNOTS)))
        rest = torch.from_numpy(draws[2:, :, None]).float().to(wav.device)  # [6, B, 1]
        return self._disturb(wav, frames, rest), labels, frames

    def _disturb(self, wav: Tensor, frames: Tensor, draws: Tensor) -> Tensor:
        """wav [B, L] with a piece of its neighbour in the batch, and noise; draws [6, B, 1].

        Labels stay those of the clean crop: features are to tell the louder, whole voice apart.
        """
        c, L = self.config, self.length
        position = torch.arange(L, device=wav.device)
        mixed, ratio, size, start, noisy, noise_ratio = draws
        inside = position < frames[:, None] * HOP_LENGTH  # [B, L]
        other, noise = wav.roll(1, 0), torch.randn_like(wav)
        begin, count = start * (1 - size / 2) * L, size / 2 * L
        piece = (position >= begin) & (position < begin + count) & (mixed < c.mix_share)
        power = wav.square().sum(1, keepdim=True) / inside.sum(1, keepdim=True)  # [B, 1]
        balance = (power / power.roll(1, 0).clamp(min=1e-8)).sqrt()
        balance = balance * _amplitude(ratio, c.mix_snr_db)
        level = power.sqrt() * _amplitude(noise_ratio, c.noise_snr_db) * (noisy < c.noise_share)
        return (wav + balance * piece * other + level * noise) * inside


def _amplitude(draw: Tensor, snr_db: tuple[float, float]) -> Tensor:
    """Of a disturbance, relative to the signal, at a ratio drawn from `snr_db`."""
    return 10 ** (-(snr_db[0] + draw * (snr_db[1] - snr_db[0])) / 20)
