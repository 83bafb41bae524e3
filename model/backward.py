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

from model.backends import PACKED_BELOW
from model.captured import Captured
from model.layouts import FAST_LENGTH, Sequences
from model.stages import StageSpec

NUM_SIZES = 16  # of a packed row up to a usual one: each costs a capture, fewer of them padding


def choose_captured(
    wanted: bool | None, device_type: str, is_alone: bool, is_packed: bool, filled: float
) -> tuple[bool, str]:
    """(whether passes are captured, why). ValueError: asked for, but cannot be.

    is_alone: one process, with the whole model; filled: as for `choose_packing`.
    """
    if wanted is False:
        return False, "as configured"
    missing = [] if device_type == "cuda" else ["a CUDA GPU"]
    if not is_alone:  # several sum their gradients while others are still computed
        missing.append("one process without sharding")
    if wanted and missing:
        raise ValueError(f"train.captured=true needs {' and '.join(missing)}; set it to false")
    if missing:
        return False, f"that takes {' and '.join(missing)}"
    if wanted:
        return True, "as configured"
    if not is_packed and filled < PACKED_BELOW:
        return False, f"batches of one size would be at worst {filled:.0%} full"
    return True, "launched as one graph, not kernel by kernel"


@dataclass(frozen=True)
class Sizes:
    """Those that batches are filled up to.

    longest: a batch of the longest clip there can be; places_per_frame: of the densest; filled: the
    share of a batch of longest clips that a usual one has. What does not fit is left as it is.
    """

    num_clips: int
    longest: Sequences
    places_per_frame: float
    filled: float

    @classmethod
    def of(
        cls, spec: StageSpec, collapsed: bool, is_packed: bool, batches: Any, num_clips: int
    ) -> "Sizes":
        """batches: what says how `longest` crops are, and how `filled`; num_clips: in each."""
        longest = spec.longest(*batches.longest, is_packed)
        return cls(num_clips, longest, spec.layout.places_per_frame(collapsed), batches.filled)

    def fill(self, batch: Sequences) -> Sequences:
        """More places, which belong to no clip, and more targets, which count for nothing."""
        N, places = batch.positions.shape[1], self.longest.positions.shape[1]
        if batch.bounds is None:
            size, longest = places, places
            rooms = [self.num_clips * count for count in self.longest.counts]
        else:
            usual = self.num_clips * places * self.filled
            grain = ceil(usual / (NUM_SIZES * FAST_LENGTH)) * FAST_LENGTH
            size = ceil(N / grain) * grain
            longest = max(places, grain)  # what is filled in is a segment as well
            # EOS has no frame, and a condition may lack the last of its tokens
            room = ceil(size / self.places_per_frame) + 2 * self.num_clips
            rooms = [room] * len(batch.counts)
        enough = all(n <= room for n, room in zip(batch.counts, rooms, strict=True))
        if enough and size >= N and max(batch.lengths) <= places:
            return batch.filled(size, rooms, longest)
        return batch


class Backward:
    """Computes nats [K] of a micro-batch and adds `share` of their gradient to the parameters'.

    nats_of and backward: of a model and for a loss. captured: the first micro-batch of a step
    overwrites the gradients, so nobody else is to clear them. one_size: all filled batches have it,
    and a step is one of them. Its graph then writes gradients of its own, which parameters must be
    given back, for other passes make new ones. Otherwise all graphs add to the same gradients,
    which the first of a step fills with zeros, and that takes longer.
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
        self.parameters, self.num_plain = [*model.parameters()], 0
        self.made, self.kept = [], None  # gradients of the last pass that ran here, of the graph
        if captured and not one_size:
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)

    def __call__(self, batch: Sequences, share: float, first: bool) -> Tensor:
        """batch: on the model's device."""
        share = torch.full((), share, device=batch.ids.device)
        if self.replay is None:
            return self._pass(batch, share)
        self.batch, tensors = batch, batch.tensors()
        if not batch.is_filled:  # its size may never come again
            return self._captured((first,), share, **tensors)["nats"]
        shapes = tuple(tensor.shape for tensor in tensors.values())
        variant = (shapes, batch.longest, first)
        nats = self.replay(variant, share=share, **tensors)["nats"]
        if self.one_size and variant in self.replay.graphs:
            self.kept = self.kept or self.made
            for parameter, gradient in zip(self.parameters, self.kept, strict=True):
                parameter.grad = gradient
        self.made = []
        return nats

    def _captured(self, variant: tuple, share: Tensor, **tensors: Tensor) -> dict[str, Tensor]:
        *_, first = variant
        self.num_plain += 1
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
