"""Decoding as a stream gives the samples of decoding at once, however the codes are cut."""

import pytest
import torch

from configs.codec_schema import CodecConfig
from model.codec import ENCODEC_24KHZ_CONFIG, Codec, initialise_weights
from model.codec_stream import CodecStream


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


def test_what_cannot_be_streamed_is_an_error():
    with pytest.raises(ValueError, match="not causal"):
        CodecStream(build(causal=False))
    with pytest.raises(ValueError, match="outside 0"):
        CodecStream(build()).push(torch.full((1, 3, 2), 16))
