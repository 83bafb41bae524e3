"""Losses of the codec: the multi-scale mel distance, and the balancer of all of them.

Equations are those of EnCodec (Défossez et al. 2022, section 3.4) unless said otherwise.
"""

import torch
import torchaudio
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

MEL_SCALES = ((64, 8), (128, 16), (256, 32), (512, 48), (1024, 80), (2048, 128))
"""(STFT window in samples, mel bands): as many bands as still hold a bin each."""
LOG_FLOOR = 3e-4  # -70 dB: below it lies recording noise, and the logarithm's slope grows
QUIET = 1e-2  # mel magnitude below which the L2 term is absolute rather than relative


class MelDistance(nn.Module):
    """Distance between two wavs [B, 1, L], averaged over STFT windows of 64 to 2048 samples.

    Per scale, an L1 and an L2 term as in equation 3: the mean absolute difference of log10 mel
    magnitudes (equally kind to quiet and loud bands) plus `linear` times the L2 distance of the mel
    magnitudes relative to the target's (keeps the loud harmonics in place, at the expense of the
    rest). linear=0, the first term alone, is the reported figure.
    """

    def __init__(self, sample_rate: int, linear: float = 0.0, compile: bool = False):
        super().__init__()
        self.linear = linear
        self.compare = torch.compile(_compare, dynamic=False) if compile else _compare
        self.scales = nn.ModuleList(
            torchaudio.transforms.MelSpectrogram(
                sample_rate=sample_rate,
                n_fft=window,
                hop_length=window // 4,
                n_mels=num_mels,
                power=1.0,
                normalized="window",
            )
            for window, num_mels in MEL_SCALES
        )

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        """The distance, a scalar; `estimate` gets the gradient. Needs L > 1024."""
        pairs = [(mel(estimate[:, 0]), mel(target[:, 0])) for mel in self.scales]
        return sum(self.compare(x, y, self.linear) for x, y in pairs) / len(self.scales)


def _compare(x: Tensor, y: Tensor, linear: float) -> Tensor:
    """The distance of mel magnitudes [B, num_mels, frames] at one scale."""
    distance = F.l1_loss((x + LOG_FLOOR).log10(), (y + LOG_FLOOR).log10())
    if not linear:
        return distance
    scale = y.flatten(1).norm(dim=1) + QUIET * y[0].numel() ** 0.5  # [B]
    return distance + linear * ((x - y).flatten(1).norm(dim=1) / scale).mean()


class Balancer:
    """Turns losses into one gradient in which each loss has its weight's share (equation 5).

    The encodec package lacks it. For loss i with weight w_i and gradient g_i at the output wav,

        g = sum_i  w_i / sum_j w_j  *  g_i / E|g_i|,

    where E is a running average of the per-clip L2 norm, averaged over processes. Per clip the
    sum has a norm of about 1, divided here by the batch size so that it compares with losses that
    are means over the batch. A weight then says a share, whatever the scale of its loss.
    """

    def __init__(self, weights: dict[str, float], device: torch.device, decay: float = 0.99):
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.decay = decay
        # name -> [sum of norms, sum of weights], decayed; changed in place, as CUDA graphs need it
        self.state = {name: torch.zeros(2, device=device) for name in self.weights}

    def gradient(self, losses: dict[str, Tensor], wav: Tensor, accelerator: Accelerator) -> Tensor:
        """The balanced gradient with respect to wav [B, 1, L]; every graph up to wav is used up."""
        names = [name for name in losses if name in self.weights]
        gradients, norms = [], []
        for name in names:
            (gradient,) = torch.autograd.grad(losses[name], [wav], retain_graph=True)
            gradients.append(gradient)
            norms.append(gradient.flatten(1).norm(dim=1).mean())
        mean_norms = accelerator.reduce(torch.stack(norms), "mean")
        total = sum(self.weights[name] for name in names)
        balanced = torch.zeros_like(wav)
        for name, gradient, norm in zip(names, gradients, mean_norms, strict=True):
            state = (
                self.state[name].mul_(self.decay).add_(torch.stack([norm, torch.ones_like(norm)]))
            )
            average = state[0] / state[1]
            balanced += gradient * (self.weights[name] / total / (average + 1e-12))
        return balanced / len(wav)
