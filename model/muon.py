"""Muon for the matrices of a model, AdamW for the rest, as one optimiser."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from model.sharding import laid_out_as, whole

MOMENTUM = 0.95
LEAST_SIZE = 16  # rows and columns: what is narrower has too few directions to equalise
ITERATIONS = 5
NUMBERS = 2**27  # in one product of equal shapes, gathered where they are sharded: half a GiB
DTYPES = {"cuda": torch.bfloat16}  # else fp32: bf16 products took a CPU 100 times as long
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def split_group(model: nn.Module, group: dict, lr_ratio: float) -> list[dict]:
    """A parameter group of `model` as several: AdamW's, and Muon's by the number of matrices in a
    parameter, with a learning rate lr_ratio times as high.

    Muon's are the parameters that map hidden features to hidden features: not embeddings, heads,
    gains or biases, nor the first and last convolution of a waveform. A convolution [out, in, k]
    counts as [out, in * k], each of its groups by itself; a transposed one [in, out, k] as
    [in, out * k].
    """
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    names = {p: name for name, p in model.named_parameters()}
    blocks = {  # parameter -> matrices stacked in it, where it is more than one
        p: 4 if isinstance(m, nn.LSTM) else m.groups
        for m in model.modules()
        if isinstance(m, nn.LSTM | nn.Conv1d)
        for p in m.parameters()
    }
    groups = defaultdict(list)  # by num_blocks; None: AdamW's
    for p in group["params"]:
        num_blocks = blocks.get(p, 1)
        rows = p.shape[0] // num_blocks if p.ndim >= 2 else 0
        hidden = rows and min(rows, p.numel() // p.shape[0]) >= LEAST_SIZE
        *path, last = names[p].split(".")
        if not hidden or p in embeddings or "heads" in path or last.endswith("embeddings"):
            num_blocks = None
        groups[num_blocks].append(p)
    split = [group | {"params": groups.pop(None, [])}]
    for num_blocks, params in groups.items():
        split.append(group | {"params": params, "num_blocks": num_blocks, "lr_ratio": lr_ratio})
    return [group for group in split if group["params"]]


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but in parameter groups with a "num_blocks", Muon (Jordan et al. 2024).

    Muon orthogonalises the momentum: each step moves every direction of a matrix equally far. As in
    torch.optim.Muon (adjust_lr_fn="match_rms_adamw"), which the tests compare it with, an update
    has a root mean square of 0.2 * lr. What torch's lacks: more than two dimensions, num_blocks
    matrices stacked in one parameter (an LSTM's gates), equal shapes in one product, capture.

    `grad_scale` and `found_inf`, as GradScaler sets them on torch's fused optimisers: tensors, by
    which gradients are divided, and of which 1.0 skips the step without asking the device. A step
    may overwrite the gradients. Sharded matrices are gathered, some at a time.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def step(self, closure: None = None) -> None:
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if "num_blocks" not in group]
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if "num_blocks" in group:
                self._muon_step(group)

    @torch.no_grad()
    def _muon_step(self, group: dict) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        momenta = [self._momentum(p) for p in parameters]
        gradients, rate = [p.grad for p in parameters], group["lr"]
        if self.grad_scale is not None:
            gradients = torch._foreach_div(gradients, self.grad_scale)
        if self.found_inf is not None:  # the momentum is its own average with itself
            skip, rate = self.found_inf > 0, rate * (1 - self.found_inf)
            pairs = zip(momenta, gradients, strict=True)
            gradients = [torch.where(skip, momentum, g) for momentum, g in pairs]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        torch._foreach_lerp_(gradients, momenta, MOMENTUM)  # Nesterov's, in their place
        num_blocks, alike = group["num_blocks"], defaultdict(list)
        for p, direction in zip(parameters, gradients, strict=True):
            alike[p.shape[0] // num_blocks, p[0].numel()].append((p, direction))
        for shape, found in alike.items():
            at_once = max(1, NUMBERS // (num_blocks * shape[0] * shape[1]))
            for part in (found[n : n + at_once] for n in range(0, len(found), at_once)):
                self._apply(part, shape, group, rate)

    def _apply(
        self, part: list[tuple[Tensor, Tensor]], shape: tuple[int, int], group: dict, rate: float
    ) -> None:
        """One update of parameters that hold matrices of this shape, along their directions."""
        matrices = [whole(d).reshape(group["num_blocks"], *shape) for _, d in part]
        updates = orthogonalise(torch.cat(matrices))  # [N, R, C]
        updates *= rate * 0.2 * max(shape) ** 0.5
        for (p, _), update in zip(part, updates.split(group["num_blocks"]), strict=True):
            update = laid_out_as(p, update.view(p.shape))
            p.mul_(1 - rate * group["weight_decay"]).sub_(update)

    def _momentum(self, p: Tensor) -> Tensor:
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return self.state[p]["momentum_buffer"]


def orthogonalise(matrices: Tensor) -> Tensor:
    """matrices [N, R, C] -> the same with all singular values near 1 (0.7 to 1.2), fp32.

    Newton-Schulz iterations of the fifth degree (https://kellerjordan.github.io/posts/muon).
    """
    x = matrices.to(DTYPES.get(matrices.device.type, torch.float32))
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT  # [N, R, R]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()
