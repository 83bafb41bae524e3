"""Decode codes as they come, chunk by chunk, to the very samples that decoding them at once gives.

A causal decoder needs from the past only what its layers look back on: each convolution the last
(kernel - 1) * dilation inputs, each transposed one the last input, the LSTM its state. A chunk
costs what its own frames cost.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.codec import (
    SLSTM,
    Codec,
    SConv1d,
    SConvTranspose1d,
    SEANetResnetBlock,
    check_codes,
)

TOGETHER = 16  # clips that a GPU decodes at a time, lest a large batch takes too much memory


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

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch alone, [B] bool."""
        self.held = None if self.held is None else self.held[rows]
        self.state = {
            layer: tuple(s[:, rows] for s in state) if isinstance(state, tuple) else state[rows]
            for layer, state in self.state.items()
        }

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


class CodecStreams:
    """Streams of clips that grow together, decoded in batches while they grow alike. A CPU, which
    would gain little, decodes them one by one: a batch may change the last bit of a sample.

    A clip that has fewer new frames than others leaves the batch with the samples of those it has;
    if it should go on (it seldom does: it has come to its end), then in a stream of its own, which
    decodes it from the beginning once.
    """

    def __init__(self, codec: Codec, num_clips: int, together: int | None = None):
        self.codec, self.num_clips = codec, num_clips
        if together is None:
            together = TOGETHER if next(codec.parameters()).is_cuda else 1
        self.batches = [
            (CodecStream(codec), list(range(n, min(n + together, num_clips))))
            for n in range(0, num_clips, together)
        ]
        self.own: dict[int, CodecStream] = {}  # of clips that went on after they had left
        self.num_pushed = [0] * num_clips  # frames
        self.num_heard = [0] * num_clips  # samples

    def push(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """The codes [K,T_n] of every clip so far -> its new samples [1,L_n]."""
        wavs = [torch.empty(1, 0, device=clip.device) for clip in codes]
        grown = [clip.shape[1] > n for clip, n in zip(codes, self.num_pushed, strict=True)]
        in_batch = {n for _, rows in self.batches for n in rows}
        for stream, rows in self.batches:
            if any(grown[n] for n in rows):
                self._push_batch(stream, rows, codes, wavs)
        for n in (n for n in range(self.num_clips) if grown[n] and n not in in_batch):
            begun = self.num_pushed[n] if n in self.own else 0
            stream = self.own.setdefault(n, CodecStream(self.codec))
            wav = stream.push(codes[n][None, :, begun:])[0]  # [1,L]
            wavs[n] = wav if begun else wav[:, self.num_heard[n] :]
        for n, (clip, wav) in enumerate(zip(codes, wavs, strict=True)):
            self.num_pushed[n], self.num_heard[n] = clip.shape[1], self.num_heard[n] + wav.shape[1]
        return wavs

    def _push_batch(
        self, stream: CodecStream, rows: list[int], codes: Sequence[Tensor], wavs: list[Tensor]
    ) -> None:
        fresh = [codes[n][:, self.num_pushed[n] :] for n in rows]
        most = max(clip.shape[1] for clip in fresh)
        # what comes after a clip's end changes nothing before it: the decoder is causal
        padded = [F.pad(clip, (0, most - clip.shape[1])) for clip in fresh]
        made = stream.push(torch.stack(padded))  # [B,1,L]
        for n, wav in zip(rows, made, strict=True):
            own = codes[n].shape[1]
            if own >= stream.num_held:  # else what it began with was reflected padding
                wavs[n] = wav[:, : own * self.codec.hop_length - self.num_heard[n]]
        alike = [clip.shape[1] == most for clip in fresh]
        if not all(alike):
            stream.keep(torch.tensor(alike, device=made.device))
            rows[:] = [n for n, stays in zip(rows, alike, strict=True) if stays]

    def finish(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """The samples [1,L_n] of clips too short to have started; none of the others."""
        return [
            self.codec.decode(clip[None])[0]
            if clip.shape[1] and not heard
            else torch.empty(1, 0, device=clip.device)
            for clip, heard in zip(codes, self.num_heard, strict=True)
        ]


def _reach(layer: SConv1d) -> int:
    """Past inputs that an output of a convolution with stride 1 needs."""
    conv = layer.conv.conv
    return (conv.kernel_size[0] - 1) * conv.dilation[0]
