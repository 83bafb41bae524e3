"""Fixtures that many tests of training share."""

import pytest
import torch
from tokens import write_tokens


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
