"""Fixtures that many tests of training share."""

import pytest
import torch
from tokens import CODEC, write_tokens

from configs.codec_schema import CodecConfig
from model.codec import Codec, load_codec


@pytest.fixture
def one_thread():
    """Sums in the same order on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A small token folder with something to learn in it."""
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def decodable(tmp_path_factory):
    """Tokens of a codec that is there, 50 frames of 320 samples a second."""
    folder = tmp_path_factory.mktemp("decodable")
    torch.manual_seed(0)
    small = {"encoder_filters": 2, "decoder_filters": 2, "num_lstm": 0, "dimension": 8}
    codec = Codec(CodecConfig(num_codebooks=4, codebook_size=16, **small))
    for layer in codec.quantizer.vq.layers:
        layer._codebook.embed.normal_()
    codec.save(folder / "codec")
    codec = load_codec(str(folder / "codec"))
    facts = {"name": str(folder / "codec"), "fingerprint": codec.fingerprint}
    return write_tokens(folder, codec={**CODEC, **facts})
