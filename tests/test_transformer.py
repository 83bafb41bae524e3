"""The transformer and its cache: cached == uncached, whatever the kernel, chunks and padding."""

import pytest
import torch

from configs.schema import ModelConfig
from model.backends import AttentionChoice
from model.fused import rotate_heads
from model.transformer import Transformer, rotary_angles

BACKENDS = ("einsum", "flash", "math")


def build(backend="einsum", **changes):
    torch.manual_seed(0)
    config = ModelConfig(**{"dim": 32, "num_layers": 2, "num_heads": 4, "head_dim": 8, **changes})
    return Transformer(config, AttentionChoice((backend,), "test")).eval()


def positions(start, length):
    return torch.arange(start, start + length)[None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_kernel_never_changes_the_numbers(backend, num_kv_heads, qk_norm):
    changes = {"num_kv_heads": num_kv_heads, "qk_norm": qk_norm}
    spec, other = build(**changes), build(backend, **changes)
    assert all(
        torch.equal(a, b) for a, b in zip(spec.parameters(), other.parameters(), strict=True)
    )
    x = torch.randn(2, 12, 32)
    torch.testing.assert_close(spec(x, positions(0, 12)), other(x, positions(0, 12)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 1, 5], [7, 5]])
@torch.no_grad()
def test_cached_equals_uncached(backend, chunks):
    model = build(backend)
    x = torch.randn(2, 12, 32)
    whole = model(x, positions(0, 12))
    cache = model.make_cache(batch_size=2, max_length=12)
    pieces = [
        model(piece, positions(cache.length, piece.shape[1]), kv_cache=cache)
        for piece in x.split(chunks, dim=1)
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    assert cache.length == 12


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(backend):
    model = build(backend)
    x = torch.randn(1, 7, 32)
    alone = model(x, positions(0, 7))
    padded = torch.cat([torch.randn(1, 3, 32), x], dim=1)
    mask = torch.tensor([[False] * 3 + [True] * 7])
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(model(padded, where, mask)[:, 3:], alone)
    cache = model.make_cache(1, 10)
    first = model(padded[:, :6], where[:, :6], mask[:, :6], cache)
    second = model(padded[:, 6:], where[:, 6:], mask, cache)
    torch.testing.assert_close(torch.cat([first, second], dim=1)[:, 3:], alone)


def test_the_future_is_not_seen():
    model = build()
    x = torch.randn(1, 8, 32, requires_grad=True)
    model(x, positions(0, 8))[0, 4].sum().backward()
    assert (x.grad[0, 5:] == 0).all()
    assert (x.grad[0, :5] != 0).any(dim=-1).all()


def test_rotary_scores_depend_on_distance_only():
    qkv, one = torch.randn(1, 1, 3, 8), torch.ones(1, 1, 1)

    def score(i, j):
        at = [rotary_angles(torch.tensor([[p]]), 8, 10_000.0) for p in (i, j)]
        (q, _, _), (_, k, _) = (rotate_heads(qkv, one, angles, 1) for angles in at)
        return (q * k).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), atol=1e-4, rtol=1e-4)
    assert (score(3, 1) - score(3, 2)).abs() > 1e-3


def test_the_cache_is_bounded_and_multi_query_is_small():
    cache = build().make_cache(2, 4)
    assert cache.k[0].shape == (2, 1, 4, 8)
    with pytest.raises(AssertionError, match="cannot hold 5"):
        cache.update(0, *torch.zeros(2, 2, 1, 5, 8))


def test_flops_per_token():
    model = build()
    num_parameters = sum(p.numel() for p in model.parameters())
    assert model.flops_per_token(100) == 6 * num_parameters + 6 * 2 * 32 * 100


def test_initialisation_is_as_documented():
    model = build(dim=256, head_dim=64, num_layers=8)
    assert model.blocks[0].attention.to_qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    to_out = model.blocks[3].feed_forward.to_out.weight
    assert to_out.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_sizes_that_cannot_be_are_errors():
    with pytest.raises(ValueError, match="num_kv_heads"):
        build(num_kv_heads=3)
    with pytest.raises(ValueError, match="even"):
        build(head_dim=7)


def test_what_a_layer_keeps_for_its_backward_pass():
    """In bf16, for each place: two inputs and their scales, q, k and v, attention's
    output and its log-sums, the gate and the value: by the same sum 19,528 bytes in the 270 M
    recipe. Memory is what limits a batch."""
    sizes = {"dim": 64, "num_heads": 4, "head_dim": 16, "num_kv_heads": 1, "ff_dim": 192}

    def kept(num_layers):
        model = build("flash", num_layers=num_layers, **sizes)
        own, found = {p.data_ptr() for p in model.parameters()}, {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive: no address twice
            return tensor

        x = torch.randn(1, 32, 64, requires_grad=True)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            model(x, positions(0, 32))
        return sum(size for size, _ in found.values())

    weights = 2 * (64 * 96 + 64 * 64 + 64 * 384 + 192 * 64)  # their copies in bf16
    a_place = 2 * (2 * 64 + (4 + 2) * 16 + 4 * 16 + 2 * 192) + 4 * (2 + 4)
    assert kept(3) - kept(1) == 2 * (weights + 32 * a_place)
