"""The codec's judge: encodec's multi-scale STFT discriminator and the losses that come from it.

Equations are those of EnCodec (Défossez et al. 2022, section 3.4). The losses are made here, scale
by scale, so that a compiled step reads every feature map once.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.codec import build_discriminator
from model.codec_fast import conv_weight


class Discriminator(nn.Module):
    """Sub-discriminators on STFTs of `windows` samples, hop a quarter, with `filters` channels."""

    def __init__(self, windows: tuple[int, ...], filters: int, compile: bool = False):
        super().__init__()
        self.discriminators = build_discriminator(windows, filters).discriminators
        functions = (_learn, _judge)
        if compile:
            functions = (torch.compile(function, dynamic=False) for function in functions)
        self.learn, self.judge = functions

    def forward(self, real: Tensor, fake: Tensor, learn: bool) -> dict[str, Tensor]:
        """Losses on wavs [B, 1, L], means over the windows.

        learn: {"discriminator"}, the hinge loss of telling `real` from `fake` (which gets no
        gradient). Otherwise what the codec is told: {"adversarial": hinge, "feature": relative L1
        of the feature maps (equation 2)}.
        """
        with torch.autocast(real.device.type, enabled=False):
            spectra = [
                (_spectrum(scale, real), _spectrum(scale, fake.detach() if learn else fake))
                for scale in self.discriminators
            ]
        losses = [
            (self.learn if learn else self.judge)(scale, *pair)
            for scale, pair in zip(self.discriminators, spectra, strict=True)
        ]
        means = torch.stack(losses).mean(dim=0)  # [scales, losses] -> [losses]
        return dict(
            zip(["discriminator"] if learn else ["adversarial", "feature"], means, strict=True)
        )


def _spectrum(scale: nn.Module, wav: Tensor) -> Tensor:
    """wav [B, 1, L] -> real and imaginary parts [B, 2, frames, bins]."""
    return torch.view_as_real(scale.spec_transform(wav[:, 0])).permute(0, 3, 2, 1)


def verdict(scale: nn.Module, spectrum: Tensor) -> tuple[Tensor, list[Tensor]]:
    """spectrum [B, 2, frames, bins] -> logits [B, 1, frames, bins'], feature maps.

    As the package's module computes them; channels-last is the layout of tensor cores.
    """
    x, maps = spectrum.contiguous(memory_format=torch.channels_last), []
    for layer in scale.convs:
        x = scale.activation(_convolve(layer.conv, x))
        maps.append(x)
    return _convolve(scale.conv_post.conv, x), maps


def _convolve(conv: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(x, conv_weight(conv), conv.bias, conv.stride, conv.padding, conv.dilation)


def _learn(scale: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss [1] of one scale, on both spectra in one pass."""
    logits, _ = verdict(scale, torch.cat([real, fake]))  # [2B, 1, frames, bins']
    on_real, on_fake = logits.float().chunk(2)
    return (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())[None]


def _judge(scale: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Adversarial and feature loss [2] of one scale."""
    with torch.no_grad():
        _, real_maps = verdict(scale, real)
    logits, fake_maps = verdict(scale, fake)
    feature = [
        (x.float() - y.float()).abs().mean() / y.float().abs().mean().clamp(min=1e-6)
        for x, y in zip(fake_maps, real_maps, strict=True)
    ]
    return torch.stack([F.relu(1 - logits.float()).mean(), torch.stack(feature).mean()])
