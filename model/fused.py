"""What a block does between and around its matrix products, with backward passes of its own.

On a GPU these pieces wait for memory alone, so they are cut to move little of it:

- A normalised residual stream is never written down. RMSNorm without gains is one number a place,
  and (x * scale) W = scale * (x W): whoever reads the product next multiplies by it.
- `fork` copies the stream once, and a branch's last product is added to that copy by the product
  itself.
- What the backward pass can compute again from what is kept anyway is not kept.

Each piece is written three times, with the same signature: plainly here (the specification),
compiled from that, and by hand in `model/fused_triton.py`. `choose_kernels` picks one at start-up.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.backends import has_compiler, missing_for_triton

EPS = 1e-6


class Kernels(NamedTuple):
    """One way to compute the pieces. N is batch and time together or apart; wide is fp32 or more;
    scale [N,1], wide, is 1 / RMS of the x [N,C] that a product read.

    fork(x [N,C])                                                  -> a copy of it, scale
    fork_backward(d_copy, d_x, x, scale)          -> d [N,C]; d_x: through products with x
    swiglu(gate_value [N,2F], scale)                                     -> product [N,F]
    swiglu_backward(d_product, gate_value, scale)      -> d_gate_value [N,2F], product
    rotate(qkv [B,T,H+2G,D], scale, cos, sin [B|1,T,1,D/2] wide, G)
                                                     -> q [B,T,H,D], k, v [B,T,G,D]
    rotate_backward(d_q, d_k, d_v, scale, cos, sin)              -> d_qkv [B,T,H+2G,D]
    """

    fork: Callable[..., Any]
    fork_backward: Callable[..., Any]
    swiglu: Callable[..., Any]
    swiglu_backward: Callable[..., Any]
    rotate: Callable[..., Any]
    rotate_backward: Callable[..., Any]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.element_size() < 4 else x


def _fork(x: Tensor) -> tuple[Tensor, Tensor]:
    squares = torch.linalg.vector_norm(_wide(x), dim=-1, keepdim=True) ** 2
    copy = x.clone(memory_format=torch.contiguous_format)
    return copy, torch.rsqrt(squares / x.shape[-1] + EPS)


def _fork_backward(d_copy: Tensor, d_x: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    d, wide = _wide(d_x), _wide(x)
    along = torch.linalg.vecdot(d, wide)[..., None] * scale**2 / x.shape[-1]
    return (_wide(d_copy) + torch.addcmul(d, wide, along, value=-1)).type_as(x)


def _swiglu(gate_value: Tensor, scale: Tensor) -> Tensor:
    gate, value = (_wide(gate_value) * scale).chunk(2, dim=-1)
    return (F.silu(gate) * value).type_as(gate_value)


def _swiglu_backward(d_product: Tensor, gate_value: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    gate, value = (_wide(gate_value) * scale).chunk(2, dim=-1)
    d, silu = _wide(d_product), F.silu(gate)
    d_gate = torch.ops.aten.silu_backward(d * value, gate)
    d_gate_value = torch.cat([d_gate, d * silu], dim=-1) * scale
    return d_gate_value.type_as(gate_value), (silu * value).type_as(gate_value)


def _turn(x: Tensor, scale: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs (x[..., d], x[..., d + D/2]) by their angles, times scale."""
    a, b = (_wide(x) * scale).chunk(2, dim=-1)  # each [...,D/2]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)


def _rotate(
    qkv: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, num_kv: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.split([qkv.shape[2] - 2 * num_kv, num_kv, num_kv], dim=2)
    scale = scale[..., None]  # [B,T,1,1]
    return _turn(q, scale, cos, sin), _turn(k, scale, cos, sin), (v * scale).type_as(v)


def _rotate_backward(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, scale: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    scale = scale[..., None]
    turned = [_turn(d, scale, cos, -sin) for d in (d_q, d_k)]
    return torch.cat([*turned, (d_v * scale).type_as(d_v)], dim=2)


PLAIN = Kernels(_fork, _fork_backward, _swiglu, _swiglu_backward, _rotate, _rotate_backward)


def choose_kernels(
    wanted: str, device_type: str, capability: tuple[int, int] | None = None
) -> tuple[str, str]:
    """(plain, compiled or triton; why). ValueError: asked for, but what it takes is not there.

    capability: CUDA's (major, minor), None elsewhere.
    """
    if wanted == "plain":
        return wanted, "as configured"
    if wanted == "auto" and device_type != "cuda":
        return "plain", f"{device_type}: its pieces are small beside their products"
    if wanted == "compiled" and device_type != "cuda":
        missing = [] if has_compiler("CXX", "g++") else ["a C++ compiler"]
    else:  # for a GPU torch.compile writes Triton as well, for older ones too
        missing = missing_for_triton(device_type, (8, 0) if wanted == "compiled" else capability)
    lacks = " and ".join(missing)
    if wanted == "auto":
        if missing:
            return "plain", f"Triton's, about twice as fast, need {lacks}"
        return "triton", "by hand: what passes between products is read and written once"
    if missing:
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


def _weight_gradient(d: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """d [...,C], x [...,F] -> d^T x [C,F]; a GPU writes its fp32 sums as they are."""
    d, x = d.flatten(0, -2), x.flatten(0, -2)  # [N,C], [N,F]
    if d.is_cuda and d.dtype != dtype:
        return torch.mm(d.mT, x, out_dtype=dtype)
    return (d.mT @ x).to(dtype)


def _project(x: Tensor, weight: Tensor, onto: Tensor | None) -> Tensor:
    """x weight^T, or `onto` with that added in place."""
    if onto is None:
        return F.linear(x, weight)
    onto.flatten(0, -2).addmm_(x.flatten(0, -2), weight.mT)  # [N,C] + [N,F] [F,C]
    return onto


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor, Tensor]:
        copy, scale = kernels.fork(x)
        ctx.save_for_backward(x, scale)
        ctx.kernels = kernels
        ctx.mark_non_differentiable(scale)
        return copy, x.view_as(x), scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_copy: Tensor, d_x: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.kernels.fork_backward(d_copy, d_x, *ctx.saved_tensors), None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, onto: Tensor | None) -> Tensor:
        ctx.dtype, ctx.adds = weight.dtype, onto is not None
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        if ctx.adds:
            ctx.mark_dirty(onto)
        return _project(x, weight, onto)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return d @ weight, _weight_gradient(d, x, ctx.dtype), d if ctx.adds else None


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_value: Tensor, scale: Tensor, weight: Tensor, onto: Tensor | None,
        kernels: Kernels,
    ) -> Tensor:  # fmt: skip
        ctx.dtype, ctx.adds, ctx.kernels = weight.dtype, onto is not None, kernels
        weight = weight.to(gate_value.dtype)
        ctx.save_for_backward(gate_value, scale, weight)
        if ctx.adds:
            ctx.mark_dirty(onto)
        return _project(kernels.swiglu(gate_value, scale), weight, onto)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        gate_value, scale, weight = ctx.saved_tensors
        d_gate_value, product = ctx.kernels.swiglu_backward(d @ weight, gate_value, scale)
        d_weight = _weight_gradient(d, product, ctx.dtype)
        return d_gate_value, None, d_weight, d if ctx.adds else None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, num_kv: int,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(scale, cos, sin)
        ctx.kernels = kernels
        return kernels.rotate(qkv, scale, cos, sin, num_kv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_qkv: Tensor) -> tuple[Tensor | None, ...]:
        d = ctx.kernels.rotate_backward(*d_qkv, *ctx.saved_tensors)
        return d, None, None, None, None, None


def fork(x: Tensor, kernels: Kernels = PLAIN) -> tuple[Tensor, Tensor, Tensor]:
    """x [...,C] -> a copy of it for a branch to be added to, x for the branch's product to read,
    and scale [...,1] = 1 / RMS(x), by which what comes of that product is to be multiplied
    (RMSNorm without gains, which the product's matrix has anyway; Zhang & Sennrich 2019).

    scale has a gradient nobody computes: the sum of d_x * x says it as well, where every use of x
    is multiplied by scale.
    """
    if not torch.is_grad_enabled():  # a decoding step is short of time for calls
        copy, scale = kernels.fork(x)
        return copy, x, scale
    return _Fork.apply(x, kernels)


def linear(x: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """x weight^T: [...,F], [C,F] -> [...,C], in x's dtype; added to `onto` in place, if there."""
    if not torch.is_grad_enabled():
        return _project(x, weight.to(x.dtype), onto)
    return _Linear.apply(x, weight, onto)


def swiglu_linear(
    gate_value: Tensor,
    scale: Tensor,
    weight: Tensor,
    onto: Tensor | None = None,
    kernels: Kernels = PLAIN,
) -> Tensor:
    """(silu(scale gate) * scale value) weight^T: [...,2F], [...,1], [C,F] -> [...,C] (Shazeer 2020)
    added to `onto` in place, if there.

    The product, the largest tensor of a block but one, is computed again for the backward pass.
    """
    if not torch.is_grad_enabled():
        return _project(kernels.swiglu(gate_value, scale), weight.to(gate_value.dtype), onto)
    return _SwigluLinear.apply(gate_value, scale, weight, onto, kernels)


def rotate_heads(
    qkv: Tensor,
    scale: Tensor,
    angles: tuple[Tensor, Tensor],
    num_kv: int,
    kernels: Kernels = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B,T,H+2G,D], G = num_kv, times scale [B,T,1] -> q [B,T,H,D] and k [B,T,G,D] rotated
    (Su et al. 2021), v.

    angles: cos, sin [B|1,T,1,D/2] of the pairs (x[..., d], x[..., d + D/2]).
    """
    if not torch.is_grad_enabled():
        return kernels.rotate(qkv, scale, *angles, num_kv)
    return _Rotate.apply(qkv, scale, *angles, num_kv, kernels)
