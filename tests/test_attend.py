"""Every attention backend against the einsum specification, and the start-up table."""

import itertools

import pytest
import torch

from model.attend import Attend, _with_masked_key
from model.backends import BACKENDS, AttentionChoice, resolve, sampling_dtype, select_backends

CUDA = torch.cuda.is_available()
LENGTHS = {
    "q=k": (8, 8),
    "q=1": (1, 8),
    "1<q<k": (3, 8),
    "q>k": (8, 3),
    "k=1": (1, 1),
    "q>k=1": (3, 1),
}


def available(dtype: torch.dtype, has_mask: bool, has_bias: bool) -> list[tuple[str, str]]:
    """(device, backend) pairs that this machine can run."""
    pairs = []
    for device in ("cpu", "cuda") if CUDA else ("cpu",):
        for backend in BACKENDS[2:]:
            try:
                resolve(
                    torch.device(device), dtype, 16, backend, has_mask=has_mask, has_bias=has_bias
                )
            except ValueError:
                continue
            pairs.append((device, backend))
    return pairs


def inputs(i, j, g, dtype, device, *, with_mask, with_bias, heads=4):
    torch.manual_seed(0)
    q = torch.randn(2, heads, i, 16)
    k, v = torch.randn(2, 2, g, j, 16)
    if g == 1:
        k, v = k[:, 0], v[:, 0]  # [b,j,d]: the multi-query form
    q, k, v = (t.to(device, dtype).requires_grad_() for t in (q, k, v))
    mask = bias = None
    if with_mask:
        mask = (torch.rand(2, j) > 0.4).to(device)
        mask[0] = False  # nothing to attend at all
        mask[1, 0] = True
    if with_bias:
        bias = torch.randn(1, heads, i, j).to(device).requires_grad_()
    return q, k, v, mask, bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("with_mask", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("g", [1, 2, 4])
def test_fused_equals_einsum_forward_and_backward(g, lengths, causal, with_mask, with_bias, dtype):
    pairs = available(dtype, with_mask, with_bias)
    assert pairs, "no fused backend to test"
    for device, backend in pairs:
        q, k, v, mask, bias = inputs(
            *lengths, g, dtype, device, with_mask=with_mask, with_bias=with_bias
        )
        leaves = [t for t in (q, k, v, bias) if t is not None]
        results = []
        for attend in (
            Attend(causal=causal),
            Attend(causal=causal, flash=True, choice=AttentionChoice((backend,), "test")),
        ):
            out = attend(q, k, v, mask, bias)
            weight = torch.linspace(-1, 1, out.numel(), device=device).view_as(out)
            results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
        for name, spec, fused in zip(("out", "q", "k", "v", "bias"), *results, strict=False):
            assert torch.isfinite(fused).all(), (device, backend, name)
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            error = (spec.float() - fused.float()).norm() / spec.float().norm().clamp(min=1.0)
            assert error < tolerance, (device, backend, name, float(error))


def test_causal_is_aligned_to_the_end_in_every_backend():
    """The last queries of a long sequence, against a cache, see what they saw in one piece."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 8, 16), torch.randn(1, 8, 16), torch.randn(1, 8, 16)
    whole = Attend(causal=True)(q, k, v)
    for _, backend in [("cpu", "einsum"), ("cpu", "flash"), ("cpu", "math")]:
        choice = AttentionChoice((backend,), "test")
        attend = Attend(causal=True, flash=backend != "einsum", choice=choice)
        for n in (1, 3):
            torch.testing.assert_close(attend(q[:, :, -n:], k, v), whole[:, :, -n:])


def test_einsum_by_hand():
    """Two keys, one query, scores 0 and ln 3: weights 1/4 and 3/4."""
    q = torch.tensor([[[[1.0, 0, 0, 0]]]])
    k = torch.tensor([[[0.0, 0, 0, 0], [2 * torch.log(torch.tensor(3.0)).item(), 0, 0, 0]]])
    v = torch.tensor([[[4.0, 0, 0, 0], [0, 4.0, 0, 0]]])
    torch.testing.assert_close(Attend()(q, k, v), torch.tensor([[[[1.0, 3.0, 0, 0]]]]))


@pytest.mark.parametrize("backend", ["einsum", "flash", "math"])
def test_a_row_with_nothing_to_attend_is_zero(backend):
    q, k, v, mask, _ = inputs(4, 6, 1, torch.float32, "cpu", with_mask=True, with_bias=False)
    bias = torch.zeros(1, 1, 4, 6)
    bias[:, :, 2] = float("-inf")
    attend = Attend(flash=backend != "einsum", choice=AttentionChoice((backend,), "test"))
    out = attend(q, k, v, mask, bias)
    assert (out[0] == 0).all()
    assert (out[1, :, 2] == 0).all()
    assert (out[1, :, 1] != 0).any()
    out.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


@pytest.mark.parametrize("flash", [False, True])
def test_dropout_keeps_the_expectation_and_acts_in_training_only(flash):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 4, 16), torch.randn(1, 4, 16), torch.randn(1, 4, 16)
    attend = Attend(dropout=0.5, causal=True, flash=flash)
    expected = attend.eval()(q, k, v)
    assert torch.equal(expected, attend(q, k, v))
    attend.train()
    many = attend(q.expand(4000, -1, -1, -1), k.expand(4000, -1, -1), v.expand(4000, -1, -1))
    assert many.std(dim=0).max() > 0.1
    torch.testing.assert_close(many.mean(dim=0, keepdim=True), expected, atol=0.12, rtol=0)


def test_heads_that_do_not_divide_are_an_error():
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        Attend()(torch.randn(1, 4, 2, 8), *torch.randn(2, 1, 3, 2, 8))


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PORTABLE = ("efficient", "math")
TABLE = [  # device, capability, dtype, uses -> order
    ("A100", "cuda", (8, 0), BF16, {}, ("flash", "cudnn", "efficient", "math")),
    ("A100 fp32", "cuda", (8, 0), FP32, {}, ("efficient", "math")),
    ("H100", "cuda", (9, 0), BF16, {}, ("cudnn", "flash", "triton", "efficient", "math")),
    ("H100 mask", "cuda", (9, 0), BF16, {"has_mask": True}, ("cudnn", "triton", *PORTABLE)),
    ("H100 bias", "cuda", (9, 0), BF16, {"has_bias": True}, ("triton", *PORTABLE)),
    ("H100 fp32", "cuda", (9, 0), FP32, {"has_bias": True}, PORTABLE),
    ("no Triton", "cuda", (9, 0), BF16, {"has_bias": True, "has_triton": False}, PORTABLE),
    ("B200", "cuda", (10, 0), BF16, {}, ("cudnn", "flash", "efficient", "math")),
    ("RTX 3090", "cuda", (8, 6), BF16, {}, ("flash", "cudnn", "efficient", "math")),
    ("RTX 4090", "cuda", (8, 9), FP16, {}, ("flash", "cudnn", "efficient", "math")),
    ("T4 fp16", "cuda", (7, 5), FP16, {}, ("efficient", "math")),
    ("T4 bf16", "cuda", (7, 5), BF16, {}, ("math",)),
    ("CPU", "cpu", None, FP32, {}, ("flash", "math")),
    ("CPU mask", "cpu", None, FP32, {"has_mask": True}, ("flash", "math")),
    ("CPU dropout", "cpu", None, FP32, {"has_dropout": True}, ("math",)),
    ("Apple", "mps", None, FP32, {}, ("math",)),
    ("old torch", "cuda", (9, 0), BF16, {"torch_version": (2, 4)}, ("flash", "triton", *PORTABLE)),
]


@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_start_up_table(row):
    _, device, capability, dtype, uses, order = row
    choice = select_backends(device, capability, dtype, 64, **uses)
    assert choice.backends == order
    assert choice.reason


def test_head_dim_rules_out_what_cannot_hold_it():
    assert "cudnn" not in select_backends("cuda", (9, 0), BF16, 192).backends
    assert select_backends("cuda", (9, 0), BF16, 320).backends == ("efficient", "math")


@pytest.mark.parametrize(
    ("requested", "device", "capability", "dtype", "uses", "reason"),
    [
        ("flash", "cuda", (7, 5), FP16, {}, "capability 8.0"),
        ("flash", "cuda", (9, 0), FP32, {}, "fp16 or bf16"),
        ("triton", "cpu", None, FP32, {}, "needs CUDA"),
        ("triton", "cuda", (7, 5), FP32, {}, "capability 8.0"),
        ("triton", "cuda", (9, 0), BF16, {"has_dropout": True}, "no dropout"),
        ("triton", "cuda", (9, 0), BF16, {"has_triton": False}, "Triton and a C compiler"),
        ("flash", "cuda", (9, 0), BF16, {"has_mask": True}, "takes no mask"),
        ("cudnn", "cpu", None, FP32, {}, "needs CUDA"),
        ("flash", "cpu", None, FP32, {"has_dropout": True}, "no dropout"),
        ("xformers", "cpu", None, FP32, {}, "expected one of"),
    ],
)
def test_a_choice_that_cannot_be_honoured_is_an_error(
    requested, device, capability, dtype, uses, reason
):
    with pytest.raises(ValueError, match=reason):
        select_backends(device, capability, dtype, 64, requested=requested, **uses)


def test_what_is_sampled_in():
    cpu, apple = torch.device("cpu"), torch.device("mps")
    assert [sampling_dtype(wanted, cpu) for wanted in ("auto", "bf16")] == [FP32, BF16]
    assert sampling_dtype("auto", apple) == FP32
    for wanted, said in (("bf16", "not on this mps device"), ("half", "expected one of auto")):
        with pytest.raises(ValueError, match=said):
            sampling_dtype(wanted, apple)


def test_a_choice_that_can_be_honoured_is_alone():
    for requested, device in itertools.product(("einsum", "math"), ("cpu", "cuda")):
        choice = select_backends(device, (9, 0), BF16, 64, requested=requested)
        assert choice.backends == (requested,)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_flash_alone_refuses_a_mask_at_the_call():
    q, k, v, mask, _ = inputs(4, 4, 1, BF16, "cuda", with_mask=True, with_bias=False)
    with pytest.raises(ValueError, match="takes no mask or bias"):
        Attend(flash=True, choice=AttentionChoice(("flash",), "test"))(q, k, v, mask)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("i", [1, 3])
def test_a_masked_key_in_front_changes_nothing(i, with_bias):
    """What a kernel that takes no single key is given instead."""
    q, k, v, mask, bias = inputs(
        i, 1, 2, torch.float32, "cpu", with_mask=with_bias, with_bias=with_bias
    )
    padded = _with_masked_key(k, v, mask, bias)
    assert padded[0].shape[2] == 2
    attend = Attend(causal=True)
    torch.testing.assert_close(attend(q, *padded), attend(q, k, v, mask, bias))
