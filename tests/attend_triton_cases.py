"""`attend_triton` against the einsum specification. Run by itself in Triton's interpreter, which
must be asked for before Triton is imported."""

from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from model.attend import Attend

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """q [b,h,i,d], k and v [b,g,j,d]; bias: its shape in those letters; hidden: some of it -inf."""

    i: int
    j: int
    h: int = 2
    g: int = 1
    d: int = 16
    b: int = 2
    causal: bool = False
    masked: bool = False
    bias: str = ""
    hidden: bool = False
    programs: int = 512


CASES = {
    "alone, q<k": Case(20, 37),
    "heads of their own, q>k": Case(37, 20, g=2),
    "causal q<k": Case(37, 50, causal=True, bias="1hij", hidden=True),
    "causal q>k": Case(50, 37, g=2, causal=True, bias="b1ij"),
    "causal q=1": Case(1, 50, causal=True, bias="hij"),
    "causal q>k=1": Case(3, 1, causal=True, bias="1hij"),
    "causal, hidden from the end of a tile": Case(34, 48, b=1, causal=True),
    "mask": Case(20, 37, masked=True),
    "mask, causal": Case(20, 37, g=2, causal=True, masked=True),
    "mask and bias": Case(20, 37, masked=True, bias="1hij", hidden=True),
    "all at once": Case(20, 37, h=4, g=2, causal=True, masked=True, bias="bhij", hidden=True),
    "bias of keys": Case(20, 20, bias="h1j"),
    "bias of queries": Case(20, 20, bias="i1", causal=True),
    "bias of all heads": Case(20, 20, bias="ij", hidden=True),
    "wide heads": Case(20, 20, b=1, d=40, bias="1hij"),
    "four heads to a program": Case(20, 37, h=4, b=1, bias="1hij", causal=True, programs=1),
    "two heads to a program": Case(20, 20, h=4, causal=True, masked=True, programs=4),
}


def inputs(case: Case, dtype: torch.dtype, device: str) -> list[Tensor | None]:
    """q, k, v as attention gets them, views of [b,t,h,d]; mask; bias, in fp32."""
    torch.manual_seed(0)
    sizes = ((case.i, case.h), (case.j, case.g), (case.j, case.g))
    views = [torch.randn(case.b, t, h, case.d).transpose(1, 2) for t, h in sizes]
    mask = bias = None
    if case.masked:
        mask = torch.rand(case.b, case.j) > 0.4
        mask[0] = False  # nothing to attend at all
    if case.bias:
        bias = torch.randn([1 if axis == "1" else getattr(case, axis) for axis in case.bias])
        if case.hidden:
            bias[torch.rand(bias.shape) > 0.8] = float("-inf")
            bias[..., 0, :] = float("-inf")  # and for one query all of it
    leaves = [x.to(device, dtype).requires_grad_() for x in views]
    bias = None if bias is None else bias.to(device).requires_grad_()
    return [*leaves, None if mask is None else mask.to(device), bias]


def gradients(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return torch.autograd.grad((out * weight).sum(), leaves)


def compare(case: Case, dtype: torch.dtype, device: str) -> None:
    """Output, gradients, layout, and that a second call gives the same bits."""
    import model.attend_triton as ours

    q, k, v, mask, bias = inputs(case, dtype, device)
    leaves = [x for x in (q, k, v, bias) if x is not None]
    results = []
    twice = device == "cuda" or case is CASES["two heads to a program"]
    with mock.patch.object(ours, "PROGRAMS", case.programs):
        for _ in range(1 + twice):
            out = ours.attend_triton(q, k, v, mask, bias, case.causal)
            assert out.stride() == q.stride()
            results.append([out, *gradients(out, leaves)])
    assert [x.dtype for x in results[0]] == [dtype, *(x.dtype for x in leaves)]
    assert all(torch.equal(x, y) for x, y in zip(results[0], results[-1], strict=True))

    exact = [x.detach().float().requires_grad_() for x in leaves]
    spec = Attend(causal=case.causal)(*exact[:3], mask, exact[3] if case.bias else None)
    wanted = [spec, *gradients(spec, exact)]
    for name, x, y in zip(("out", "q", "k", "v", "bias"), results[0], wanted, strict=False):
        assert torch.isfinite(x).all(), name
        # some gradients are 0 but for rounding: that of a bias of queries, which shifts its row
        error = ((x.float() - y).norm() / y.norm().clamp(min=4.0)).item()
        assert error < TOLERANCE[dtype], (name, error)
    dead = (spec == 0).all(dim=-1)
    assert all((x[dead] == 0).all() for x in results[0][:2])


def check_what_is_asked_for(device: str) -> None:
    """No gradient for a bias that asks for none; other types and strides of k, v and the bias."""
    from model.attend_triton import attend_triton

    q, k, v, _, bias = inputs(Case(5, 7, bias="ijh"), torch.float16, device)
    wide = k.detach().float().requires_grad_()
    apart = torch.stack([v, v], dim=-1)[..., 0]  # stride 2
    bias = bias.detach().permute(2, 0, 1)  # [h,i,j]
    out = attend_triton(q, wide, apart, None, bias)
    torch.testing.assert_close(out, attend_triton(q, k, v, None, bias.contiguous()))
    out.sum().backward()  # its gradient is one number, seen everywhere
    assert bias.grad is None
    assert wide.grad.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(attend_triton(q, wide, apart, None, bias), out)


def mend_interpreter() -> None:
    """Triton 3.6 makes an int of [n] for `range`, which numpy does not do since 2.4; and it makes
    the kernels' language ready anew for each call of a helper, a third of the time."""
    from triton.runtime import interpreter

    patch, call = interpreter._patch_lang_tensor, interpreter.InterpretedFunction.__call__

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def call_prepared(self, *args, **kwargs):
        if self.fn.__module__ in (
            "model.attend_kernels",
            "model.decode_triton",
            "model.draw_triton",
        ):
            return self.rewrite()(*args, **kwargs)
        return call(self, *args, **kwargs)

    interpreter._patch_lang_tensor = patch_and_mend
    interpreter.InterpretedFunction.__call__ = call_prepared


if __name__ == "__main__":
    mend_interpreter()
    for name, case in CASES.items():
        print(name, flush=True)
        compare(case, torch.float32, "cpu")
    # for bf16 as well, which the interpreter multiplies as if it were integers
    compare(CASES["all at once"], torch.float16, "cpu")
    check_what_is_asked_for("cpu")
    print("same")
