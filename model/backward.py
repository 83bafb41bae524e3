"""A micro-batch's nats, and its gradient in the parameters: kernel by kernel, or as a CUDA graph.

Of a small model a GPU has done what it is told before the next kernel is launched: a graph launches
some hundred of them at once. It is the same kernels on the same numbers, but its tensors have fixed
sizes, so batches are filled up to few of those (`Sizes`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from model.captured import Captured
from model.layouts import FAST_LENGTH, Sequences

NUM_SIZES = 16  # of packed rows: each costs a capture, fewer of them padding


def choose_captured(wanted: bool | None, device_type: str, num_processes: int) -> tuple[bool, str]:
    """(whether passes are captured, why). ValueError: asked for, but cannot be."""
    if wanted is False:
        return False, "as configured"
    missing = [] if device_type == "cuda" else ["a CUDA GPU"]
    if num_processes > 1:  # which sum their gradients while others are still computed
        missing.append("one process")
    if wanted and missing:
        raise ValueError(f"train.captured=true needs {' and '.join(missing)}; set it to false")
    if missing:
        return False, f"that takes {' and '.join(missing)}"
    return True, "as configured" if wanted else "launched as one graph, not kernel by kernel"


@dataclass(frozen=True)
class Sizes:
    """Those that batches are filled up to, by the longest clip there can be (a batch of it alone).

    A batch that this does not hold is left as it is.
    """

    num_clips: int
    longest: Sequences

    def fill(self, batch: Sequences) -> Sequences:
        """More places, which belong to no clip, and more targets, which count for nothing."""
        N, places = batch.positions.shape[1], self.longest.positions.shape[1]
        if batch.bounds is None:
            sizes, share, longest = [places], 1 / places, places
        else:
            most = self.num_clips * places
            grain = ceil(most / (NUM_SIZES * FAST_LENGTH)) * FAST_LENGTH
            # what is filled in is a segment as well
            sizes, share, longest = range(grain, most + grain, grain), 1 / most, max(places, grain)
        for size in sizes:
            rooms = [ceil(size * share * self.num_clips * count) for count in self.longest.counts]
            enough = all(n <= room for n, room in zip(batch.counts, rooms, strict=True))
            if enough and 0 <= size - N <= longest:
                return batch.filled(size, rooms, longest)
        return batch


class Backward:
    """Computes nats [K] of a micro-batch and adds `share` of their gradient to the parameters'.

    nats_of and backward: of a model and for a loss. captured: the first micro-batch of a step
    overwrites the gradients. one_size: nearly all batches are, each a step of its own; then a graph
    makes the gradients anew. Else they are filled with zeros, which takes longer.
    """

    def __init__(
        self,
        model: nn.Module,
        nats_of: Callable[[Sequences], Tensor],
        backward: Callable[[Tensor], Any],
        captured: bool,
        one_size: bool,
    ):
        self.nats_of, self.backward, self.batch = nats_of, backward, None
        self.replay, self.one_size = Captured(self._captured) if captured else None, one_size
        self.parameters, self.made, self.gradients = [*model.parameters()], [], {}  # by variant
        if captured and not one_size:
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)

    def __call__(self, batch: Sequences, share: float, first: bool) -> Tensor:
        """batch: on the model's device."""
        share = torch.full((), share, device=batch.ids.device)
        if self.replay is None:
            return self._pass(batch, share)
        self.batch, tensors = batch, batch.tensors()
        shapes = tuple(tensor.shape for tensor in tensors.values())
        variant = (shapes, batch.longest, first)
        nats = self.replay(variant, share=share, **tensors)["nats"]
        if self.one_size and variant in self.replay.graphs:
            made = self.gradients.setdefault(variant, self.made)
            for parameter, gradient in zip(self.parameters, made, strict=True):
                parameter.grad = gradient
        self.made = []
        return nats

    def _captured(self, variant: tuple, share: Tensor, **tensors: Tensor) -> dict[str, Tensor]:
        *_, first = variant
        if first and self.one_size:
            for parameter in self.parameters:
                parameter.grad = None
        elif first:
            torch._foreach_zero_([parameter.grad for parameter in self.parameters])
        nats = self._pass(self.batch.with_tensors(tensors), share)
        self.made = [parameter.grad for parameter in self.parameters]
        return {"nats": nats}

    def _pass(self, batch: Sequences, share: Tensor) -> Tensor:
        nats = self.nats_of(batch)
        self.backward(nats.sum() * share)
        return nats.detach()
