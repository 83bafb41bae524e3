"""Attention in Triton: interpreted on the CPU, and as it is where there is a GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from attend_triton_cases import CASES, Case, check_what_is_asked_for, compare

HERE = Path(__file__).parent
BF16, FP32 = torch.bfloat16, torch.float32

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_triton
def test_equals_einsum_in_the_interpreter():
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parent),
    }
    command = [sys.executable, "-W", "ignore", str(HERE / "attend_triton_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [*CASES, "same"], done.stderr
    assert done.returncode == 0


@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_equals_einsum_on_a_gpu(name):
    compare(CASES[name], BF16, "cuda")


LARGE = {
    "[2,4,300,64]": Case(300, 300, h=4, g=2, d=64, masked=True, bias="1hij", hidden=True),
    "[1,8,1024,128]": Case(1024, 1024, b=1, h=8, d=128, causal=True, bias="1hij"),
    "q<k": Case(200, 1500, h=4, d=64, causal=True, masked=True, bias="b1ij"),
    "bias 2048x2048": Case(2048, 2048, h=4, d=64, causal=True, bias="1hij"),
    "heads of 256": Case(300, 300, g=2, d=256, causal=True, bias="hij"),
    "heads of 80": Case(300, 300, d=80, masked=True),
    "a program for all heads": Case(512, 512, h=8, d=64, causal=True, bias="1hij", programs=1),
}


@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE.keys())
def test_equals_einsum_on_a_gpu_at_full_size(case, dtype):
    compare(case, dtype, "cuda")


@needs_gpu
def test_only_what_is_asked_for_on_a_gpu():
    check_what_is_asked_for("cuda")


@needs_triton
@pytest.mark.parametrize(
    ("capability", "dtype", "d", "row"),
    [
        ((9, 0), BF16, 64, (16, 64)),
        ((8, 0), BF16, 72, (16, 128)),
        ((8, 9), BF16, 32, (16, 256)),  # less shared memory
        ((12, 0), BF16, 128, (16, 256)),
        ((8, 6), FP32, 256, (32, 256)),
    ],
)
def test_tiles_are_those_that_a_gpu_has_room_for(monkeypatch, capability, dtype, d, row):
    from model.attend_triton import TILES, _tiles

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _tiles(torch.empty(1, 1, 1, d, dtype=dtype)) is TILES[row]


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "d", "reason"),
    [
        (BF16, 64, "needs a GPU, q is on cpu"),
        (BF16, 264, "head_dim up to 256, not bfloat16 and 264"),
        (torch.float64, 64, "takes fp16, bf16 or fp32"),
    ],
)
def test_what_cannot_run_is_an_error(dtype, d, reason):
    from model.attend_triton import attend_triton

    q = torch.zeros(1, 2, 3, d, dtype=dtype)
    with pytest.raises(ValueError, match=reason):
        attend_triton(q, q, q)
