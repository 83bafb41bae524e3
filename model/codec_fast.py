"""The layers of encodec's SEANet as few, large operations that torch.compile can fuse.

The package's modules hold the weights and remain the specification: `layers` gives what running
them in turn gives. Here time stands before channels, so that a strided convolution is one matrix
product over a view of its input, and padding, activations and sums are left to torch.compile. On
one H100 a training step of a codec with 24 filters took 87 ms with the package's layers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.codec import SLSTM, SConv1d, SConvTranspose1d, SEANetResnetBlock


class FastLayers:
    """Callable in place of `model.codec.run_layers`; compiles when asked to."""

    def __init__(self, compile: bool):
        self.convolve = torch.compile(_convolve_all, dynamic=False) if compile else _convolve_all

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        """A SEANet encoder or decoder `model` on x [B, C, L] -> [B, C', L']."""
        x, group = x.transpose(1, 2), []  # [B, L, C]
        for layer in model.model:
            if isinstance(layer, SLSTM):  # cuDNN's, always in fp32: in bf16 its recurrence drifts
                x, group = self.convolve(group, x), []
                with torch.autocast(x.device.type, enabled=False):
                    y, _ = layer.lstm(x.float().transpose(0, 1))  # [L, B, C]
                    x = y.transpose(0, 1) + x if layer.skip else y.transpose(0, 1)
            else:
                group.append(layer)
        return self.convolve(group, x).transpose(1, 2)


def _convolve_all(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = _step(layer, x)
    return x


def _step(layer: nn.Module, x: Tensor) -> Tensor:
    """One layer on x [B, L, C]."""
    if isinstance(layer, SConv1d):
        return _convolve(layer, x)
    if isinstance(layer, SConvTranspose1d):
        return _transpose(layer, x)
    if isinstance(layer, SEANetResnetBlock):
        y = x
        for part in layer.block:
            y = _step(part, y)
        return _step(layer.shortcut, x) + y
    return layer(x)  # an activation


def _convolve(layer: SConv1d, x: Tensor) -> Tensor:
    """A convolution of x [B, L, C], stride 1 or half the kernel -> [B, L / stride, C']."""
    conv = layer.conv.conv
    (kernel,), (stride,), (dilation,) = conv.kernel_size, conv.stride, conv.dilation
    B, L, C = x.shape
    weight, out = conv_weight(conv).transpose(1, 2), conv.out_channels  # [C', kernel, C]
    x = _reflect(x, (kernel - 1) * dilation - (stride - 1), layer.causal)
    if stride > 1:
        assert kernel == 2 * stride, (kernel, stride)
        frames = x.reshape(B, L // stride + 1, stride * C)
        pairs = torch.cat([frames[:, :-1], frames[:, 1:]], dim=2)
        return F.linear(pairs, weight.reshape(out, kernel * C), conv.bias)
    starts = [i * dilation for i in range(kernel)]
    if out < C:  # shift what comes out: it is less
        taps = F.linear(x, weight.transpose(0, 1).reshape(kernel * out, C)).chunk(kernel, dim=2)
        shifted = [tap[:, i : i + L] for i, tap in zip(starts, taps, strict=True)]
        return sum(shifted, start=conv.bias.to(taps[0].dtype))
    shifts = torch.cat([x[:, i : i + L] for i in starts], dim=2)
    return F.linear(shifts, weight.reshape(out, kernel * C), conv.bias)


def _transpose(layer: SConvTranspose1d, x: Tensor) -> Tensor:
    """A transposed convolution of x [B, L, C], kernel 2 * stride -> [B, L * stride, C'].

    An output frame is made of its own input and of the one before; what reaches beyond the input
    is trimmed, all of it at the end when causal.
    """
    conv = layer.convtr.convtr
    (kernel,), (stride,) = conv.kernel_size, conv.stride
    assert kernel == 2 * stride, (kernel, stride)
    B, L, C = x.shape
    weight = conv_weight(conv).permute(2, 1, 0).reshape(2, stride * conv.out_channels, C)
    weight = torch.cat([weight[0], weight[1]], dim=1)  # [stride * C', 2 * C]: own, the one before
    end = 0 if layer.causal else 1
    pairs = torch.cat([F.pad(x, (0, 0, 0, end)), F.pad(x, (0, 0, 1, end - 1))], dim=2)
    y = F.linear(pairs, weight).reshape(B, (L + end) * stride, conv.out_channels)
    y = y + conv.bias.to(y.dtype)
    start = 0 if layer.causal else stride - stride // 2
    return y[:, start : start + L * stride]


def _reflect(x: Tensor, pad: int, causal: bool) -> Tensor:
    """x [B, L, C] with `pad` more frames, its own reflection: all before it, or on either side."""
    after = 0 if causal else pad // 2
    before = pad - after
    parts = [x[:, 1 : before + 1].flip(1), x, x[:, x.shape[1] - after - 1 : -1].flip(1)]
    return torch.cat([part for part in parts if part.shape[1]], dim=1) if pad else x


def conv_weight(conv: nn.Module) -> Tensor:
    """The weight of a convolution, with its weight norm applied where it has one."""
    if not hasattr(conv, "weight_g"):
        return conv.weight
    v = conv.weight_v
    return v * (conv.weight_g / v.flatten(1).norm(dim=1).view_as(conv.weight_g))
