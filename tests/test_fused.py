"""What stands between a block's products: plain pieces against PyTorch's own differentiation, and
the hand-written ones against the plain. (Compiled ones are compared in test_train_options.)"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fused_cases import compare

from model.fused import (
    EPS,
    PLAIN,
    choose_kernels,
    fork,
    linear,
    make_kernels,
    rotate_heads,
    swiglu_linear,
)
from model.transformer import rotary_angles

HERE = Path(__file__).parent


def doubles(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def gradients(function, inputs):
    """The gradients of a random projection of what `function` returns."""
    out = function(*inputs)
    torch.manual_seed(1)
    loss = sum((x * torch.randn_like(x)).sum() for x in (out if isinstance(out, tuple) else [out]))
    return torch.autograd.grad(loss, inputs)


def assert_same(ours, theirs, inputs):
    for a, b in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("onto", [False, True])
def test_fork_and_a_scaled_branch_are_a_residual_of_a_norm(onto):
    """The whole of a branch, for what `fork` leaves out is in what follows it."""

    def ours(x, to_gate_value, to_out, to_other):
        copy, x, scale = fork(x)
        other = linear(x, to_other) * scale  # any reader will do, if it multiplies by scale
        branch = (linear(x, to_gate_value), scale, to_out)
        if onto:
            return swiglu_linear(*branch, linear(other, to_other, copy))
        return copy + linear(other, to_other) + swiglu_linear(*branch)

    def spec(x, to_gate_value, to_out, to_other):
        normed = F.rms_norm(x, (8,), eps=EPS)
        gate, value = F.linear(normed, to_gate_value).chunk(2, dim=-1)
        branch = F.linear(F.silu(gate) * value, to_out)
        return x + F.linear(F.linear(normed, to_other), to_other) + branch

    inputs = doubles((2, 3, 8), (10, 8), (8, 5), (8, 8))
    before = inputs[0].detach().clone()
    torch.testing.assert_close(ours(*inputs), spec(*inputs))
    assert_same(ours, spec, inputs)
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), spec(*inputs))
    assert torch.equal(inputs[0], before)


@pytest.mark.parametrize("rows", [1, 2])
def test_rotate_heads_turns_pairs_and_leaves_values(rows):
    positions = torch.tensor([[0, 1, 7], [3, 3, 100]])[:rows]
    cos, sin = (x.double() for x in rotary_angles(positions, 8, 10_000.0))

    def spec(qkv):
        turns = torch.complex(cos, sin)  # [B,T,1,D/2]
        turned = torch.complex(*qkv[:, :, :5].chunk(2, dim=-1)) * turns
        turned = torch.cat([turned.real, turned.imag], dim=-1)
        return turned[:, :, :3] * scale, turned[:, :, 3:] * scale, qkv[:, :, 5:] * scale

    scale = torch.tensor([[0.5, 2.0, 1.0], [3.0, 1.0, 0.1]]).double()[..., None, None]
    inputs = doubles((2, 3, 7, 8))

    def ours(qkv):
        return rotate_heads(qkv, scale[..., 0], (cos, sin), 2)

    for ours_, theirs in zip(ours(*inputs), spec(*inputs), strict=True):
        torch.testing.assert_close(ours_, theirs)
        assert ours_.is_contiguous()
    assert_same(ours, spec, inputs)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_triton_pieces_equal_the_plain_in_its_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "fused_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


BF16, FP32, INT, CONSTEXPR = "*bf16", "*fp32", "i32", "constexpr"
CONSTANTS = {"BLOCK": 1024, "BACK": True, "Q_HEADS": 16, "KV_HEADS": 1, "PAIRS": 32, "num_kv": 1}
TYPES = {"scale": FP32, "cos": FP32, "sin": FP32, "eps": "fp32", "dim": INT, "width": INT}
TYPES |= {"num_angles": INT, "num_q": INT, "half": INT} | dict.fromkeys(CONSTANTS, CONSTEXPR)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_pieces_compile_for_gpus_that_are_not_here(capability):
    """Down to machine code; in vectors of 16 bytes, if sizes and addresses are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model import fused_triton

    kernels = ("_fork", "_fork_backward", "_swiglu", "_swiglu_backward", "_rotate")
    for name in kernels:
        kernel = getattr(fused_triton, name)
        signature = {key: TYPES.get(key, BF16) for key in kernel.arg_names}
        constants = {key: CONSTANTS[key] for key in signature if key in CONSTANTS}
        by_16 = [["tt.divisibility", 16]]
        attributes = {(n,): by_16 for n, key in enumerate(signature) if key not in CONSTANTS}
        source = ASTSource(kernel, signature, constants, attributes)
        options = {"num_warps": 2 if name == "_rotate" else 4}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.asm["cubin"]
        assert "ld.global.v4" in made.asm["ptx"]
        assert "st.global.v4" in made.asm["ptx"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["compiled", "triton"])
def test_pieces_equal_the_plain_on_a_gpu(name):
    compare(make_kernels(name), "cuda", [(2, 5, 32, 4, 2, 8), (2, 100, 1024, 16, 1, 64)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_weights_gradient_is_not_rounded_on_a_gpu():
    x, weight = torch.randn(64, 32, device="cuda"), torch.randn(48, 32, device="cuda")
    d = torch.randn(64, 48, device="cuda").bfloat16()
    weight.requires_grad_()
    linear(x.bfloat16(), weight).backward(d)
    wanted = d.double().mT @ x.bfloat16().double()
    torch.testing.assert_close(weight.grad.double(), wanted, atol=1e-4, rtol=1e-5)


def test_kernels_are_chosen_once_and_an_order_that_cannot_be_met_is_an_error(monkeypatch):
    monkeypatch.setattr("model.backends.find_spec", lambda _: object())
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/cc")
    assert choose_kernels("auto", "cpu")[0] == "plain"
    assert choose_kernels("auto", "cuda", (8, 0))[0] == "triton"
    assert choose_kernels("auto", "cuda", (7, 5))[0] == "plain"
    assert choose_kernels("triton", "cuda", (9, 0)) == ("triton", "as configured")
    assert choose_kernels("compiled", "cuda", (7, 5)) == ("compiled", "as configured")
    with pytest.raises(ValueError, match=r"train.kernels=triton needs a CUDA GPU"):
        choose_kernels("triton", "cpu")
    with pytest.raises(ValueError, match=r"train.kernels=triton needs compute capability 8.0"):
        choose_kernels("triton", "cuda", (7, 5))
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert choose_kernels("auto", "cuda", (9, 0)) == (
        "plain",
        "Triton's, about twice as fast, need a C compiler",
    )
    with pytest.raises(ValueError, match=r"train.kernels=compiled needs a C\+\+ compiler; set"):
        choose_kernels("compiled", "cpu")
    monkeypatch.setattr("model.backends.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"kernels=triton needs triton and a C compiler; set"):
        choose_kernels("triton", "cuda", (9, 0))
    assert choose_kernels("plain", "cuda") == ("plain", "as configured")
    assert make_kernels("plain") is PLAIN
