"""What a block does between its matrix products, in three pieces with backward passes of their own.

On a GPU these pieces wait for memory alone, so they are cut to move little of it: a branch is added
to the residual stream where the sum is normalised, and what the backward pass can compute again
from what is kept anyway is not kept. Each piece is written three times, with the same signature:
plainly here (the specification), compiled from that, and by hand in `model/fused_triton.py`.
`choose_kernels` picks one at start-up.
"""

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-6


class Kernels(NamedTuple):
    """One way to compute the pieces. N is batch and time together or apart; wide is fp32 or more.

    add_norm(x, y [N,C])                            -> x + y, it normalised [N,C], scale [N,1] wide
    add_norm_backward(d_sum, d_normed, normed, scale)              -> d [N,C], for x and y alike
    swiglu(gate_value [N,2F])                                                   -> product [N,F]
    swiglu_backward(d_product, gate_value)                     -> d_gate_value [N,2F], product
    rotate(qkv [B,T,H+2G,D], cos, sin [B|1,T,1,D/2] wide, G) -> q [B,T,H,D], k, v [B,T,G,D]
    rotate_backward(d_q, d_k, d_v, cos, sin)                              -> d_qkv [B,T,H+2G,D]
    """

    add_norm: Callable[..., Any]
    add_norm_backward: Callable[..., Any]
    swiglu: Callable[..., Any]
    swiglu_backward: Callable[..., Any]
    rotate: Callable[..., Any]
    rotate_backward: Callable[..., Any]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.element_size() < 4 else x


def _add_norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = x + y
    wide = _wide(total)
    squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) ** 2
    scale = torch.rsqrt(squares / x.shape[-1] + EPS)
    return total, (wide * scale).type_as(x), scale


def _add_norm_backward(d_sum: Tensor, d_normed: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    d, n = _wide(d_normed), _wide(normed)
    along = torch.linalg.vecdot(d, n)[..., None] / n.shape[-1]
    return torch.addcmul(_wide(d_sum), d - n * along, scale).type_as(normed)


def _swiglu(gate_value: Tensor) -> Tensor:
    gate, value = gate_value.chunk(2, dim=-1)
    return F.silu(gate) * value


def _swiglu_backward(d_product: Tensor, gate_value: Tensor) -> tuple[Tensor, Tensor]:
    gate, value = (_wide(x) for x in gate_value.chunk(2, dim=-1))
    d, silu = _wide(d_product), F.silu(gate)
    d_gate = torch.ops.aten.silu_backward(d * value, gate)
    d_gate_value = torch.cat([d_gate, d * silu], dim=-1).type_as(gate_value)
    return d_gate_value, (silu * value).type_as(gate_value)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs (x[..., d], x[..., d + D/2]) by their angles."""
    a, b = _wide(x).chunk(2, dim=-1)  # each [...,D/2]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)


def _rotate(qkv: Tensor, cos: Tensor, sin: Tensor, num_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.split([qkv.shape[2] - 2 * num_kv, num_kv, num_kv], dim=2)
    return _turn(q, cos, sin), _turn(k, cos, sin), v.contiguous()


def _rotate_backward(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat([_turn(d_q, cos, -sin), _turn(d_k, cos, -sin), d_v], dim=2)


PLAIN = Kernels(_add_norm, _add_norm_backward, _swiglu, _swiglu_backward, _rotate, _rotate_backward)


def choose_kernels(wanted: str, device_type: str) -> tuple[str, str]:
    """(plain, compiled or triton; why). ValueError: asked for, but what it takes is not there.

    Triton builds a small C program when it first runs, so a GPU alone is not enough.
    """
    gpu, missing = device_type == "cuda", []
    if wanted == "auto" and not gpu:
        return "plain", f"{device_type}: its pieces are small beside their products"
    if wanted == "auto":  # until one has timed the others
        return "plain", "on a GPU train.kernels=triton or compiled may be faster"
    if wanted == "plain":
        return wanted, "as configured"
    if (gpu or wanted == "triton") and not find_spec("triton"):
        missing.append("triton")
    named = os.environ.get("CC" if gpu else "CXX")
    compilers = (named, *(("gcc", "clang") if gpu else ("g++",)))
    if not any(shutil.which(name) for name in compilers if name):
        missing.append("a C compiler" if gpu else "a C++ compiler")
    if wanted == "triton" and not gpu:
        missing.append("a CUDA GPU")
    if missing:
        lacks = " and ".join(missing)
        raise ValueError(f"train.kernels={wanted} needs {lacks}; set train.kernels=plain")
    return wanted, "as configured"


def make_kernels(name: str) -> Kernels:
    """`name` as `choose_kernels` gave it."""
    if name == "plain":
        return PLAIN
    if name == "compiled":
        return Kernels(*(torch.compile(piece) for piece in PLAIN))
    from model.fused_triton import TRITON  # here: not every machine has Triton

    return TRITON


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
        total, normed, scale = kernels.add_norm(x, y)
        ctx.save_for_backward(normed, scale)
        ctx.kernels = kernels
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum: Tensor, d_normed: Tensor) -> tuple[Tensor | None, ...]:
        d = ctx.kernels.add_norm_backward(d_sum, d_normed, *ctx.saved_tensors)
        return d, d, None


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_value: Tensor, weight: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(gate_value, weight)
        ctx.kernels = kernels
        return F.linear(kernels.swiglu(gate_value), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        gate_value, weight = ctx.saved_tensors
        d_gate_value, product = ctx.kernels.swiglu_backward(d @ weight, gate_value)
        d_weight = d.flatten(0, -2).mT @ product.flatten(0, -2)  # [C,N] [N,F] -> [C,F]
        return d_gate_value, d_weight, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, num_kv: int, kernels: Kernels
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return kernels.rotate(qkv, cos, sin, num_kv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_qkv: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.kernels.rotate_backward(*d_qkv, *ctx.saved_tensors), None, None, None, None


def add_norm(x: Tensor, y: Tensor, kernels: Kernels = PLAIN) -> tuple[Tensor, Tensor]:
    """x, y [...,C] -> x + y, and it divided by its root mean square (Zhang & Sennrich 2019).

    Without gains, which the matrix that reads the result has anyway: so the sum itself need not be
    kept for the backward pass.
    """
    if not torch.is_grad_enabled():  # a decoding step is short of time for calls
        return kernels.add_norm(x, y)[:2]
    return _AddNorm.apply(x, y, kernels)


def swiglu_linear(gate_value: Tensor, weight: Tensor, kernels: Kernels = PLAIN) -> Tensor:
    """(silu(gate) * value) weight^T: [...,2F], [C,F] -> [...,C] (Shazeer 2020).

    The product, the largest tensor of a block but one, is computed again for the backward pass.
    """
    weight = weight.to(gate_value.dtype)
    if not torch.is_grad_enabled():
        return F.linear(kernels.swiglu(gate_value), weight)
    return _SwigluLinear.apply(gate_value, weight, kernels)


def rotate_heads(
    qkv: Tensor, angles: tuple[Tensor, Tensor], num_kv: int, kernels: Kernels = PLAIN
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B,T,H+2G,D], G = num_kv -> q [B,T,H,D] and k [B,T,G,D] rotated (Su et al. 2021), v.

    angles: cos, sin [B|1,T,1,D/2] of the pairs (x[..., d], x[..., d + D/2]).
    """
    if not torch.is_grad_enabled():
        return kernels.rotate(qkv, *angles, num_kv)
    return _Rotate.apply(qkv, *angles, num_kv, kernels)
