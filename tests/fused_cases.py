"""Kernels against the plain ones. Run by itself, those of Triton, which must then be told to
interpret before it is imported."""

import torch

from model.fused import PLAIN, Kernels
from model.transformer import rotary_angles

SIZES = [(2, 5, 32, 4, 2, 8), (1, 3, 40, 3, 1, 12), (1, 2, 2100, 2, 2, 4)]  # B, T, C, H, G, D


def compare(kernels: Kernels, device: str, sizes: list[tuple[int, ...]]) -> None:
    """Every piece on tensors of these sizes, in fp32 and bf16, with and without an offset."""
    for B, T, C, H, G, D in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)

            def made(*shape, dtype=dtype):
                return torch.randn(shape, dtype=dtype).to(device)

            x, d, e, both = (made(B, T, n * C) for n in (1, 1, 1, 2))
            scale = made(B, T, 1, dtype=torch.float32)
            qkv = made(B, T, H + 2 * G, D)
            heads = [made(B, T, n, D) for n in (H, G, G)]
            for rows in (1, B):  # positions of each row, or the same for all
                positions = torch.randint(0, 1000, (rows, T)).to(device)
                cos, sin = rotary_angles(positions, D, 10_000.0)
                check(kernels, "rotate", dtype, qkv, scale, cos, sin, G)
                check(kernels, "rotate_backward", dtype, *heads, scale, cos, sin)
                # as attention gives them back: [B,T,H,D] as a view of [B,H,T,D]
                turned = [h.transpose(1, 2).contiguous().transpose(1, 2) for h in heads]
                check(kernels, "rotate_backward", dtype, *turned, scale, cos, sin)
            check(kernels, "fork", dtype, x)
            check(kernels, "fork_backward", dtype, d, e, x, scale)
            check(kernels, "swiglu", dtype, both, scale)
            check(kernels, "swiglu_backward", dtype, d, both, scale)


def check(kernels: Kernels, name: str, dtype: torch.dtype, *inputs: torch.Tensor | int) -> None:
    found, wanted = (getattr(k, name)(*inputs) for k in (kernels, PLAIN))
    if isinstance(found, torch.Tensor):
        found, wanted = [found], [wanted]
    # bf16: a sum that is normalised before, not after, it is rounded differs by a step or two
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            ours, theirs, atol=tolerance, rtol=tolerance, msg=lambda m: f"{name} {dtype}: {m}"
        )


if __name__ == "__main__":
    from model.fused_triton import TRITON

    compare(TRITON, "cpu", SIZES)
    print("same")
