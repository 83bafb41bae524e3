"""Cached == uncached logits: every stage's layout, backend, chunking, ragged prompts in a batch.

The oracle is the einsum without a cache and without padding, each row on its own.
"""

import pytest
import torch

from configs.schema import ModelConfig
from model.backends import BACKENDS, resolve
from model.layouts import PAD
from model.stages import STAGES, Stage, stage_spec

HEAD_DIM = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the norm
LENGTHS = (12, 7, 10)  # real places of the three rows, after padding on the left


def available() -> list[tuple[str, str, str]]:
    """(device, backend, dtype) that this machine can run; "auto" as resolved at start-up."""
    found = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for backend in BACKENDS:
            for name, dtype in DTYPES.items():
                try:
                    resolve(torch.device(device), dtype, HEAD_DIM, backend)
                except ValueError:
                    continue
                found.append((device, backend, name))
    return found


def build(stage: str, device: str, backend: str, dtype: torch.dtype) -> Stage:
    """A random stage with weights large enough for its logits to differ from place to place."""
    torch.manual_seed(1)
    config = ModelConfig(dim=32, num_layers=2, num_heads=4, head_dim=HEAD_DIM, num_kv_heads=2)
    choice = resolve(torch.device(device), dtype, HEAD_DIM, backend)
    model = Stage(stage_spec(stage, 20, 4, 16, 2), config, choice)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(8)
    return model.to(device, dtype).eval()


def ragged(stage: Stage, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [3,12,S] padded on the left, positions [3,12], some of them fractions, mask [3,12]."""
    generator = torch.Generator().manual_seed(2)
    shape = (len(LENGTHS), max(LENGTHS), stage.layout.num_slots)
    ids = torch.randint(1, stage.layout.num_ids, shape, generator=generator)
    mask = torch.arange(shape[1]) >= shape[1] - torch.tensor(LENGTHS)[:, None]
    ids = ids.masked_fill(~mask[..., None], PAD)
    positions = torch.rand(shape[:2], generator=generator) + torch.arange(shape[1])
    return ids.to(device), positions.to(device), mask.to(device)


def logits(stage: Stage, hidden: torch.Tensor) -> torch.Tensor:
    return torch.cat([head(hidden) for head in stage.heads], dim=-1).float().cpu()


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (found - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype], float(error)


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [8, 1, 3]], ids=["whole", "steps", "chunks"])
@pytest.mark.parametrize("how", available(), ids="-".join)
@pytest.mark.parametrize("name", STAGES)
@torch.no_grad()
def test_cached_equals_uncached_logits(name, how, chunks):
    device, backend, dtype = how[0], how[1], DTYPES[how[2]]
    stage, oracle = build(name, device, backend, dtype), build(name, "cpu", "einsum", dtype)
    assert torch.equal(stage.embed.weight.cpu(), oracle.embed.weight)
    ids, positions, mask = ragged(stage, device)
    takes_masks = not (device == "cuda" and backend == "flash")
    for rows in ([0, 1, 2], [0]) if takes_masks else ([0],):  # row 0 alone needs no mask
        cache, seen, pieces = stage.transformer.make_cache(len(rows), 12), 0, []
        split = zip(ids[rows].split(chunks, 1), positions[rows].split(chunks, 1), strict=True)
        for piece, where in split:
            seen += piece.shape[1]
            padding = mask[rows][:, :seen] if len(rows) > 1 else None
            pieces.append(stage.hidden(piece, where, padding, cache))
        found = logits(stage, torch.cat(pieces, dim=1))
        for row, ours in zip(rows, found, strict=True):
            real = slice(12 - LENGTHS[row], None)
            alone = [t[row, real].cpu()[None] for t in (ids, positions)]
            expected = logits(oracle, oracle.hidden(*alone))[0]
            assert expected.std() > 0.5
            assert_close(ours[real], expected, dtype)
