"""Which optimiser steps not to take: a gradient that is not finite, or far above the usual one."""

import torch
from torch import Tensor

WARM_UP = 50  # accepted steps before there is a "usual"
MEMORY = 0.98  # of the running mean: about the last 50 steps


class Guard:
    """Judges the norm of each step's gradient where it lies, so that nothing waits for a GPU.

    A step is skipped if its norm is not finite or more than `factor` times the running mean of the
    norms that were accepted (as PaLM left out batches at a spike: Chowdhery et al. 2022, 5.1).
    """

    FACTS = ("mean", "num_accepted", "num_skipped", "in_a_row", "longest_row", "row_began")

    def __init__(self, factor: float, device: torch.device):
        self.factor = factor
        self.facts = torch.zeros(len(self.FACTS), dtype=torch.float32, device=device)

    def judge(self, norm: Tensor, step: int) -> Tensor:
        """norm [], step -> [] 1.0 to skip this step, else 0.0."""
        mean, accepted, skipped, in_a_row, longest, began = self.facts
        known = accepted >= WARM_UP
        skip = ~(norm <= torch.where(known, self.factor * mean, torch.inf)) | torch.isinf(norm)
        share = (1 / (1 + accepted)).clamp(min=1 - MEMORY)  # at first the plain mean
        row = torch.where(skip, in_a_row + 1, 0.0)
        new = (
            torch.where(skip, mean, mean + share * (norm - mean)),
            accepted + ~skip,
            skipped + skip,
            row,
            torch.maximum(longest, row),
            torch.where(row > longest, step + 1 - row, began),
        )
        self.facts = torch.stack(new)
        return skip.float()

    def read(self) -> dict[str, float]:
        """The facts by name; waits for the device. `row_began`: the step that the longest row of
        skipped ones began with."""
        return dict(zip(self.FACTS, self.facts.tolist(), strict=True))

    def forget_rows(self) -> None:
        """All but a row that still goes on."""
        longest, current = map(self.FACTS.index, ("longest_row", "in_a_row"))
        self.facts[longest] = self.facts[current]

    def load(self, facts: dict[str, float]) -> None:
        """Continue from what `read` returned."""
        self.facts.copy_(torch.tensor([facts[name] for name in self.FACTS]))
