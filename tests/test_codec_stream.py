"""Decoding as a stream gives the samples of decoding at once, however the codes are cut."""

import pytest
import torch

from configs.codec_schema import CodecConfig
from model.codec import ENCODEC_24KHZ_CONFIG, Codec, initialise_weights
from model.codec_stream import CodecStream, CodecStreams


def build(**changes):
    torch.manual_seed(0)
    small = {"encoder_filters": 4, "decoder_filters": 4, "num_lstm": 1, "dimension": 8}
    codec = Codec(CodecConfig(num_codebooks=3, codebook_size=16, **small | changes))
    initialise_weights(codec)
    for layer in codec.quantizer.vq.layers:
        layer._codebook.embed.normal_()
    return codec.eval().requires_grad_(False)


def pushed(codec, codes, sizes):
    stream = CodecStream(codec)
    pieces = [stream.push(piece) for piece in codes.split(sizes, dim=2)]
    rest = stream.finish()
    return torch.cat(pieces if rest is None else [*pieces, rest], dim=2), pieces


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_lstm": 2, "num_residual_layers": 2}, {"num_lstm": 0, "ratios": (5, 4, 3)}],
    ids=["small", "deep", "no lstm"],
)
@pytest.mark.parametrize(
    "sizes",
    [[23], [1] * 23, [7, 1, 15], [2, 3, 4, 14], [22, 1]],
    ids=lambda s: "+".join(map(str, s)),
)
def test_a_stream_decodes_to_the_samples_of_the_whole(sizes, changes):
    codec = build(**changes)
    codes = torch.randint(0, 16, (2, 3, 23))
    whole = codec.decode(codes)
    assert whole.std() > 1e-3
    streamed, pieces = pushed(codec, codes, sizes)
    torch.testing.assert_close(streamed, whole, atol=1e-6 * float(whole.abs().max()), rtol=1e-4)
    ready = 0
    for piece, size in zip(pieces, sizes, strict=True):  # nothing is late but the beginning
        ready += size
        expected = ready if ready >= 7 and ready - size < 7 else size if ready > 7 else 0
        assert piece.shape == (2, 1, expected * codec.hop_length)


@pytest.mark.parametrize("num_frames", [1, 3, 6, 7, 8])
def test_short_streams(num_frames):
    codec = build()
    codes = torch.randint(0, 16, (1, 2, num_frames))  # of the first two codebooks
    streamed, _ = pushed(codec, codes, [1] * num_frames)
    torch.testing.assert_close(streamed, codec.decode(codes), atol=1e-6, rtol=1e-4)


def test_the_architecture_of_encodec_24khz_streams():
    torch.manual_seed(0)
    codec = Codec(ENCODEC_24KHZ_CONFIG, weight_norm=True).eval().requires_grad_(False)
    for layer in codec.quantizer.vq.layers:
        layer._codebook.embed.normal_()
    codes = torch.randint(0, 1024, (1, 8, 12))
    streamed, _ = pushed(codec, codes, [8, 1, 3])
    whole = codec.decode(codes)
    torch.testing.assert_close(streamed, whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-4)


def test_two_streams_do_not_share_state():
    codec = build()
    codes = torch.randint(0, 16, (2, 3, 20))
    first, second = CodecStream(codec), CodecStream(codec)
    for at in (0, 10):
        for stream, row in ((first, 0), (second, 1)):
            piece = codes[row : row + 1, :, at : at + 10]
            wav = stream.push(piece)
            hop = codec.hop_length
            expected = codec.decode(codes[row : row + 1])[..., at * hop : (at + 10) * hop]
            torch.testing.assert_close(wav, expected, atol=1e-6, rtol=1e-4)


GROWTH = [  # frames of five clips after each push
    [9, 9, 3, 0, 9],
    [12, 12, 3, 0, 10],  # the last leaves the batch ...
    [20, 15, 3, 0, 20],  # ... and goes on, in a stream of its own
    [20, 15, 5, 0, 26],  # one that had not yet begun grows, and is still too short
    [31, 15, 5, 0, 30],
]


@pytest.mark.parametrize("together", [1, 2, 16])
def test_clips_together_sound_as_each_alone(together, monkeypatch):
    codec, sizes = build(), []
    codes = [torch.randint(0, 16, (3, total)) for total in GROWTH[-1]]
    push, heard = CodecStream.push, [[] for _ in codes]

    def noted(stream, chunk):
        sizes.append(tuple(chunk.shape[::2]))
        return push(stream, chunk)

    monkeypatch.setattr(CodecStream, "push", noted)
    streams = CodecStreams(codec, len(codes), together)
    for totals in GROWTH:
        there = [clip[:, :n] for clip, n in zip(codes, totals, strict=True)]
        for parts, wav in zip(heard, streams.push(there), strict=True):
            parts.append(wav)
    for parts, wav, clip in zip(heard, streams.finish(codes), codes, strict=True):
        whole = codec.decode(clip[None])[0] if clip.shape[1] else torch.empty(1, 0)
        torch.testing.assert_close(torch.cat([*parts, wav], dim=1), whole, atol=1e-6, rtol=1e-4)
        assert wav.numel() == (0 if clip.shape[1] != 5 else 5 * codec.hop_length)
    if together == 16:  # once from its beginning; else nobody decodes a frame twice
        assert sizes[0] == (5, 9)
        assert (1, 20) in sizes


def test_what_cannot_be_streamed_is_an_error():
    with pytest.raises(ValueError, match="not causal"):
        CodecStream(build(causal=False))
    with pytest.raises(ValueError, match="outside 0"):
        CodecStream(build()).push(torch.full((1, 3, 2), 16))
