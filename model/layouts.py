"""Token streams <-> the sequence a stage is trained on. Integers only; no model, no floats.

Every stream is a matrix codes [K,T]; semantic tokens are the case K = 1. A sequence is

    condition, read frame by frame | START or MIDDLE | target codes, by pattern | (EOS)

and each of its places holds S slots (ids [N,S]; S = 1 for `flatten`, S = K for `delay`):

    flatten (AudioLM)   c00 c10 c20 c01 c11 c21 ...      K places a frame, one slot
    delay (MusicGen)    c00 c01 c02 c03 ...              one place a frame, K slots,
                         .  c10 c11 c12 ...              codebook k delayed by k places

START says that the target begins where its recording begins, MIDDLE that it does not; EOS follows
the last frame only where the recording ends. Input ids are global: every special and every code of
every codebook has an id of its own. Targets are local to the head that predicts them: head k has
classes 0..size-1, and head 0 one more, EOS.

A place also has a position, which is its time: what a frame of the condition describes stands at a
constant rotary distance from the target's frame, however far apart their places are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PAD, START, MIDDLE = 0, 1, 2
NUM_SPECIALS = 3
IGNORE = -1  # a target nobody predicts
# An H100's fused attention takes 8 % longer where a length is not a multiple of this (cuDNN 9.19):
# pad to one where that costs less.
FAST_LENGTH, FEW_MORE = 64, 0.01

Pattern = Literal["flatten", "delay"]


@dataclass(frozen=True)
class Sequences:
    """A batch of laid-out clips, padded on the right or packed: one after another, B = 1.

    ids [B,N,S] global input ids, positions [B,N] of their places. For head k, `places[k]` [M_k] are
    the places, counted over the flattened [B*N], whose next token head k predicts, and `targets[k]`
    [M_k] its local classes, `counts[k]` of them not IGNORE. `lengths` counts each clip's places,
    none of them more than `longest`; `bounds` [clips + 1], int32, where the clips begin in a packed
    row, None in a padded batch.
    """

    ids: Tensor
    positions: Tensor
    places: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    longest: int
    bounds: Tensor | None = None
    is_filled: bool = False  # up to a size that others have, too

    @property
    def num_places(self) -> int:
        """Those that are not padding."""
        return sum(self.lengths)

    @property
    def num_targets(self) -> int:
        return sum(self.counts)

    @property
    def segments(self) -> tuple[int, ...]:
        """The lengths that make a packed row: of its clips, and of what is filled in."""
        rest = self.positions.shape[1] - self.num_places
        return (*self.lengths, rest) if rest else self.lengths

    @property
    def context(self) -> float:
        """The length of the sequence that a place is in, on average: what attention costs."""
        if self.bounds is None:
            return self.positions.shape[1]
        return sum(n * n for n in self.lengths) / self.num_places

    def without_targets(self) -> "Sequences":
        """The same places, of which nothing is asked or counted."""
        nothing = tuple(t[:0] for t in self.targets)
        return replace(self, places=nothing, targets=nothing, counts=(0,) * len(nothing))

    def filled(self, num_places: int, rooms: list[int], longest: int) -> "Sequences":
        """The same clips, a row filled up to num_places, what head k predicts to rooms[k]."""
        N = self.positions.shape[1]
        more = num_places - N
        lacks = [room - len(t) for t, room in zip(self.targets, rooms, strict=True)]
        # the places of a padded batch are counted over rows, which are longer now
        places = zip((t + t // N * more for t in self.places), lacks, strict=True)
        targets = zip(self.targets, lacks, strict=True)
        bounds = None if self.bounds is None else F.pad(self.bounds, (0, 1), value=num_places)
        return replace(
            self,
            ids=F.pad(self.ids, (0, 0, 0, more), value=PAD),
            positions=F.pad(self.positions, (0, more)),
            places=tuple(F.pad(t, (0, n)) for t, n in places),
            targets=tuple(F.pad(t, (0, n), value=IGNORE) for t, n in targets),
            longest=longest,
            bounds=bounds,
            is_filled=True,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        found = {"ids": self.ids, "positions": self.positions, "bounds": self.bounds}
        found |= {f"places{k}": places for k, places in enumerate(self.places)}
        found |= {f"targets{k}": targets for k, targets in enumerate(self.targets)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Sequences":
        """Others of the same names in their place."""
        heads = range(len(self.targets))
        return replace(
            self,
            ids=tensors["ids"],
            positions=tensors["positions"],
            places=tuple(tensors[f"places{k}"] for k in heads),
            targets=tuple(tensors[f"targets{k}"] for k in heads),
            bounds=tensors.get("bounds"),
        )

    def to(self, device: torch.device | str) -> "Sequences":
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> "Sequences":
        """Called by DataLoader(pin_memory=True)."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Sequences":
        return self.with_tensors({name: move(t) for name, t in self.tensors().items()})


@dataclass(frozen=True)
class Layout:
    """Which streams a stage reads (`condition_sizes`) and writes (`target_sizes`), and how.

    Sizes are codebook sizes, one per codebook; an empty condition is allowed. `condition_rate` is
    the condition's frames per frame of the target.
    """

    condition_sizes: tuple[int, ...]
    target_sizes: tuple[int, ...]
    pattern: Pattern = "flatten"
    condition_rate: float = 1.0

    @property
    def num_codebooks(self) -> int:
        return len(self.target_sizes)

    @property
    def num_slots(self) -> int:
        return self.num_codebooks if self.pattern == "delay" else 1

    @property
    def num_ids(self) -> int:
        return NUM_SPECIALS + sum(self.condition_sizes) + sum(self.target_sizes)

    @property
    def streams(self) -> Tensor:
        """[num_ids]: the stream each id belongs to: 0 PAD, 1 the marks, then one per codebook."""
        sizes = torch.tensor([1, NUM_SPECIALS - 1, *self.condition_sizes, *self.target_sizes])
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """Classes per head: the codebook's, and EOS for head 0."""
        return (self.target_sizes[0] + 1, *self.target_sizes[1:])

    @property
    def eos(self) -> int:
        """EOS as a local class of head 0."""
        return self.target_sizes[0]

    def _ids(self, codes: Tensor, sizes: tuple[int, ...], first: int) -> Tensor:
        """Local codes [K,T] -> global ids [K,T]; the streams' id ranges follow one another."""
        assert codes.shape[0] == len(sizes), f"{codes.shape[0]} codebooks, expected {len(sizes)}"
        offsets = torch.tensor([0, *sizes[:-1]]).cumsum(0)[:, None]  # [K,1]
        return codes + offsets + first

    def condition_ids(self, condition: Tensor) -> Tensor:
        """condition [K_c,T_c] -> ids [T_c*K_c], frame by frame."""
        if not self.condition_sizes:
            return torch.empty(0, dtype=torch.long)
        ids = self._ids(condition, self.condition_sizes, NUM_SPECIALS)
        return ids.T.reshape(-1)  # [K_c,T_c] -> [T_c,K_c] -> [T_c*K_c]

    def target_ids(self, codes: Tensor) -> Tensor:
        """codes [K,T] -> global ids [K,T]."""
        return self._ids(codes, self.target_sizes, NUM_SPECIALS + sum(self.condition_sizes))

    def places_per_frame(self, collapsed: bool = False) -> float:
        """Of the target, at least: with its condition, unless that has lost its repeats."""
        own = self.num_codebooks if self.pattern == "flatten" else 1
        return own + (0 if collapsed else self.condition_rate * len(self.condition_sizes))

    def num_steps(self, num_frames: int) -> int:
        """Places that `num_frames` whole frames take."""
        if self.pattern == "flatten":
            return num_frames * self.num_codebooks
        return num_frames + self.num_codebooks - 1

    def spread(self, codes: Tensor, empty: int, num_steps: int) -> Tensor:
        """Lay codes [K,T] out by the pattern: [num_steps,S], `empty` where no code belongs."""
        K, T = codes.shape
        if self.pattern == "flatten":
            steps = codes.T.reshape(-1, 1)  # [K,T] -> [T,K] -> [T*K,1]
            out = codes.new_full((max(num_steps, T * K), 1), empty)
            out[: T * K] = steps
        else:
            out = codes.new_full((max(num_steps, T + K - 1), K), empty)
            for k in range(K):
                out[k : k + T, k] = codes[k]
        return out[:num_steps]

    def gather(self, steps: Tensor, num_frames: int) -> Tensor:
        """The inverse of `spread`: steps [N,S] -> codes [K,num_frames]."""
        K = self.num_codebooks
        if self.pattern == "flatten":
            return steps[: num_frames * K, 0].reshape(num_frames, K).T  # [T*K] -> [T,K] -> [K,T]
        return torch.stack([steps[k : k + num_frames, k] for k in range(K)])

    def prefix(self, condition: Tensor | None, starts: bool) -> Tensor:
        """Everything before the first target: ids [N_c+1,S], the condition in slot 0."""
        before = [] if condition is None else [self.condition_ids(condition)]
        ids = torch.cat([*before, torch.tensor([START if starts else MIDDLE])])
        out = torch.full((len(ids), self.num_slots), PAD)
        out[:, 0] = ids
        return out

    def positions(self, ids: Tensor) -> Tensor:
        """ids [N,S] of one sequence -> its rotary positions [N], in places of the target.

        START or MIDDLE is 0 and the target counts on from there; the condition's places are spread
        evenly over the same time (time-aligned rotary positions: Xu et al. 2025, Qwen2.5-Omni).
        Positions that count places instead leave the distance between a target and its condition
        growing with time: the demo's coarse stage then ends its 240 steps at 4.14 rather than 3.91
        nats for the first codebook. Collapsed semantic tokens have no times of their own: they
        stand as if each were one frame.
        """
        first = self._start(ids)
        per_frame = self.num_codebooks if self.pattern == "flatten" else 1
        stride = per_frame / (self.condition_rate * max(1, len(self.condition_sizes)))
        return torch.cat([1 + stride * torch.arange(first), torch.arange(len(ids) - first)])

    @staticmethod
    def _start(ids: Tensor) -> int:
        """The place of START or MIDDLE in ids [N,S]."""
        return int(((ids[:, 0] == START) | (ids[:, 0] == MIDDLE)).nonzero()[0])

    def encode(
        self, condition: Tensor | None, codes: Tensor, starts: bool, ends: bool
    ) -> tuple[Tensor, Tensor]:
        """One clip -> (input ids [N,S], targets [N,K]): targets[n, k] is head k's local class for
        the token after place n, IGNORE where there is none.

        A crop that does not reach its recording's end gets no EOS; under `delay` it also ends at
        its last complete input, since what follows is unknown rather than empty.
        """
        K, T = codes.shape
        if self.pattern == "flatten":
            num_steps = K * T + ends
        else:
            num_steps = max(T + K - 1, T + 1) if ends else T
        prefix = self.prefix(condition, starts)
        local = self.spread(codes, IGNORE, num_steps)  # [steps,S]
        if ends:
            local[K * T if self.pattern == "flatten" else T, 0] = self.eos
        inputs = self.spread(self.target_ids(codes), PAD, num_steps - 1)
        ids = torch.cat([prefix, inputs])
        targets = torch.full((len(ids), K), IGNORE)
        first = len(prefix) - 1  # the place of START or MIDDLE predicts step 0
        if self.pattern == "flatten":
            step = torch.arange(num_steps)
            targets[first + step, step % K] = local[:, 0]
        else:
            targets[first:] = local
        return ids, targets

    def collate(self, encoded: list[tuple[Tensor, Tensor]]) -> Sequences:
        """Pad encoded clips on the right and list, per head, what is to be predicted."""
        N = max(len(ids) for ids, _ in encoded)
        more = -N % FAST_LENGTH
        N += more if more <= FEW_MORE * N else 0
        ids = torch.full((len(encoded), N, self.num_slots), PAD)
        positions = torch.zeros(len(encoded), N)
        targets = torch.full((len(encoded), N, self.num_codebooks), IGNORE)
        for row, (clip_ids, clip_targets) in enumerate(encoded):
            ids[row, : len(clip_ids)] = clip_ids
            positions[row, : len(clip_ids)] = self.positions(clip_ids)
            targets[row, : len(clip_targets)] = clip_targets
        lengths = tuple(len(clip_ids) for clip_ids, _ in encoded)
        places, targets = self._listed(targets.flatten(0, 1))
        counts = tuple(map(len, targets))
        return Sequences(ids, positions, places, targets, lengths, counts, N)

    def pack(self, encoded: list[tuple[Tensor, Tensor]]) -> Sequences:
        """The same clips in one row, without padding."""
        ids, targets = (torch.cat(parts) for parts in zip(*encoded, strict=True))  # [M,S], [M,K]
        positions = torch.cat([self.positions(clip_ids) for clip_ids, _ in encoded])  # [M]
        lengths = tuple(len(clip_ids) for clip_ids, _ in encoded)
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        row, longest = (ids[None], positions[None].float()), max(lengths)
        places, targets = self._listed(targets)
        counts = tuple(map(len, targets))
        return Sequences(*row, places, targets, lengths, counts, longest, bounds)

    def _listed(self, targets: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """targets [M,K] -> for each head the places that it predicts from, and their classes."""
        places = tuple((column != IGNORE).nonzero()[:, 0] for column in targets.T)
        return places, tuple(targets[p, k] for k, p in enumerate(places))

    def decode(self, ids: Tensor, targets: Tensor) -> tuple[Tensor | None, Tensor, bool, bool]:
        """The inverse of `encode`, for clips that end: (condition, codes, starts, ends)."""
        first = self._start(ids)
        condition = None
        if self.condition_sizes:
            K_c = len(self.condition_sizes)
            flat = ids[:first, 0].reshape(-1, K_c).T  # [T_c*K_c] -> [T_c,K_c] -> [K_c,T_c]
            condition = flat - self._ids(torch.zeros_like(flat), self.condition_sizes, NUM_SPECIALS)
        local = targets[first:]
        if self.pattern == "flatten":
            local = local.max(dim=-1, keepdim=True).values  # the one head that is not IGNORE
        ended = (local[:, 0] == self.eos) & (targets[first:, 0] == self.eos)
        ends = bool(ended.any())
        steps = int(ended.nonzero()[0]) if ends else len(local)
        num_frames = steps // self.num_codebooks if self.pattern == "flatten" else steps
        starts = bool(ids[first, 0] == START)
        return condition, self.gather(local, num_frames), starts, ends
