"""Decode codes as they come, chunk by chunk, to the very samples that decoding them at once gives.

A causal decoder needs from the past only what its layers look back on: each convolution the last
(kernel - 1) * dilation inputs, each transposed one the last input, the LSTM its state. A chunk
costs what its own frames cost.
"""

import torch
from torch import Tensor, nn

from model.codec import (
    SLSTM,
    Codec,
    SConv1d,
    SConvTranspose1d,
    SEANetResnetBlock,
    check_codes,
)


class CodecStream:
    """The decoder of a causal codec with its state; one per stream (or batch of streams).

    for codes in chunks:
        wav = stream.push(codes)     # [B, K', t] -> [B, 1, t' * hop_length]
    wav = stream.finish()            # what was held back, if anything

    encodec's convolutions pad a beginning with its own reflection, so the first `num_held` frames
    are decoded together; until they are there, `push` returns no samples. ValueError: the codec is
    not causal, or the codes are not its codes.
    """

    def __init__(self, codec: Codec):
        if not codec.config.causal:
            raise ValueError(f"{codec.name}: not causal, so it cannot decode as a stream")
        self.codec, self.state = codec, {}
        self.num_held = _reach(codec.decoder.model[0]) + 1  # the inner layers look back on less
        self.held: Tensor | None = None  # [B, K', < num_held], codes not decoded yet
        self.started = False

    @torch.no_grad()
    def push(self, codes: Tensor) -> Tensor:
        """The next codes [B, K', t] -> the next samples [B, 1, L], L a multiple of hop_length."""
        check_codes(self.codec, codes)
        if self.held is not None:
            codes = torch.cat([self.held, codes], dim=2)
        if not self.started and codes.shape[2] < self.num_held:
            self.held = codes
            return torch.empty(codes.shape[0], 1, 0, device=codes.device)
        self.held, self.started = None, True
        return self._decode(codes)

    @torch.no_grad()
    def finish(self) -> Tensor | None:
        """The samples of a stream too short to have started; None of any other. Ends the stream."""
        held, self.held = self.held, None
        return None if held is None else self.codec.decode(held)

    def _decode(self, codes: Tensor) -> Tensor:
        with torch.autocast(codes.device.type, enabled=False):
            x = self.codec.quantizer.decode(codes.transpose(0, 1))  # [K', B, t] -> [B, D, t]
            for layer in self.codec.decoder.model:
                x = self._step(layer, x)
        return x

    def _step(self, layer: nn.Module, x: Tensor) -> Tensor:
        """One layer on the next inputs x [B, C, t]; its state moves on."""
        if isinstance(layer, SConv1d):
            return self._convolve(layer, x)
        if isinstance(layer, SConvTranspose1d):
            return self._transpose(layer, x)
        if isinstance(layer, SLSTM):
            y, self.state[layer] = layer.lstm(x.permute(2, 0, 1), self.state.get(layer))
            return y.permute(1, 2, 0) + x if layer.skip else y.permute(1, 2, 0)
        if isinstance(layer, SEANetResnetBlock):
            y = x
            for part in layer.block:
                y = self._step(part, y)
            return self._step(layer.shortcut, x) + y
        return layer(x)  # an activation, or no layer at all

    def _convolve(self, layer: SConv1d, x: Tensor) -> Tensor:
        reach, before = _reach(layer), self.state.get(layer)
        if before is None:  # the layer itself knows how to pad a beginning
            y = layer(x)
        else:
            x = torch.cat([before, x], dim=2)
            y = layer.conv(x)
        self.state[layer] = x[..., max(0, x.shape[2] - reach) :]
        return y

    def _transpose(self, layer: SConvTranspose1d, x: Tensor) -> Tensor:
        """Kernel 2 * stride: an output needs its own input and the one before."""
        before, t, stride = self.state.get(layer), x.shape[2], layer.convtr.convtr.stride[0]
        self.state[layer] = x[..., -1:]
        if before is None:
            return layer(x)
        y = layer(torch.cat([before, x], dim=2))  # [B, C', (1 + t) * stride]
        return y[..., -t * stride :]


def _reach(layer: SConv1d) -> int:
    """Past inputs that an output of a convolution with stride 1 needs."""
    conv = layer.conv.conv
    return (conv.kernel_size[0] - 1) * conv.dilation[0]
