"""Decoding steps: kernels and whole clips, in Triton's interpreter and, where one is, on a GPU; how
a way is chosen. (test_sampling has the plain way, against the loop without a cache.)"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from decode_cases import BIG, SIZES, check_clips, compare, compare_draws

from model.decoder import Decoders, choose_decoding
from model.drawing import Sampling
from model.stages import STAGES

HERE = Path(__file__).parent
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_kernels_and_captured_clips_in_the_interpreter():
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-W", "ignore", str(HERE / "decode_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


@needs_gpu
@torch.no_grad()
def test_kernels_equal_plain_ones_on_a_gpu():
    compare("cuda", SIZES, 150)
    compare("cuda", BIG, 2048)
    compare_draws("cuda", 300, 9)


@needs_gpu
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(1.0, 8, 0.9, 0.01)])
@pytest.mark.parametrize("name", STAGES)
@torch.no_grad()
def test_every_way_makes_the_same_clips_on_a_gpu(name, sampling):
    ways = ["plain", "triton", "captured"]
    for changes in ({}, {"qk_norm": True}, {"num_kv_heads": 1, "head_dim": 64}):
        check_clips(name, sampling, ways, "cuda", **changes)


def test_a_way_is_chosen_once_and_an_order_that_cannot_be_met_is_an_error(monkeypatch):
    cpu, gpu, capability = torch.device("cpu"), torch.device("cuda"), [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability[0])
    monkeypatch.setattr("model.decoder.missing_for_triton", lambda: [])
    assert choose_decoding("auto", gpu) == ("plain", "by default")
    assert choose_decoding("captured", gpu) == ("captured", "as configured")
    assert choose_decoding("auto", cpu) == ("plain", "captured steps need a CUDA GPU")
    assert choose_decoding("plain", gpu) == ("plain", "as configured")
    with pytest.raises(ValueError, match="decoding=captured needs a CUDA GPU; take plain"):
        choose_decoding("captured", cpu)
    capability[0] = (7, 5)
    assert choose_decoding("auto", gpu)[0] == "plain"
    monkeypatch.setattr("model.decoder.missing_for_triton", lambda: ["triton"])
    with pytest.raises(ValueError, match=r"needs triton and compute capability 8.0"):
        choose_decoding("triton", gpu)


def test_decoders_serve_batches_and_lengths_rounded_up(monkeypatch):
    made = []

    class Noted:
        def __init__(self, stage, batch_size, capacity, sampling, how):
            made.append((batch_size, capacity, how))

    monkeypatch.setattr("model.decoder.Decoder", Noted)
    decoders, greedy = Decoders(), Sampling(temperature=0)
    first = decoders.of(None, 3, 600, greedy)
    assert decoders.of(None, 4, 1024, greedy) is first
    decoders.of(None, 100, 512, greedy)
    assert decoders.of(None, 3, 600, greedy) is first
    decoders.of(None, 1, 1, greedy)  # the one of 100 has not been used for longest
    assert decoders.of(None, 3, 600, greedy) is first
    decoders.of(None, 128, 512, greedy)
    assert made == [(4, 1024, "captured"), (128, 512, "captured"), *made[2:]]
    assert made[2:] == [(1, 512, "captured"), (128, 512, "captured")]
