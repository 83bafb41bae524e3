"""From logits to tokens: filter them, draw, and note which clips have come to their end.

Every clip has random numbers of its own, one for each of its steps and slots, which its seed alone
says; so a clip depends neither on what else is in its batch nor on how much is drawn at a time.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from model.layouts import IGNORE, PAD, Layout


@dataclass(frozen=True)
class Sampling:
    """How to draw from logits. temperature 0 takes the most likely class; 0 turns top_k off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, ok, rule in (
            (
                "temperature",
                self.temperature == 0 or 1e-3 <= self.temperature < 1e3,
                "0, or 0.001 to 1000",
            ),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)}: must be {rule}")


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits [..,C] -> logits / temperature with every class that is ruled out at -inf.

    top_k keeps the k best; top_p the smallest set of the best whose probability reaches p, and what
    is as likely as the last of them (Holtzman et al. 2020); min_p those at least min_p times as
    likely as the best (Nguyen et al. 2024).
    """
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p < 1:
        probs = logits.softmax(dim=-1)
        ordered = probs.sort(dim=-1, descending=True).values
        better = ordered.cumsum(dim=-1) - ordered  # mass of the better classes
        least = ordered.masked_fill(better >= sampling.top_p, 1.0).amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(probs < least, float("-inf"))
    if sampling.min_p > 0:
        probs = logits.softmax(dim=-1)
        least = sampling.min_p * probs.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probs < least, float("-inf"))
    return logits


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """logits [B,C], uniform [B] in [0, 1) -> classes [B], by inverting the cumulative sum."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = filter_logits(logits, sampling).softmax(dim=-1).cumsum(dim=-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    # <= skips classes of probability 0 even at uniform = 0
    return (cumulative <= threshold).sum(dim=-1).clamp(max=logits.shape[-1] - 1)


BLOCK = 256  # steps whose random numbers are drawn together
EMPTY = -2  # a slot where no code belongs: before the first frame or after the last (`delay`)


@dataclass
class Rows:
    """The clips being generated, step by step; all of it stays where it is, and nothing asks the
    device, so that steps can be captured.

    [B]: frames in each prompt, the fewest and the number each will have (less from EOS on).
    [B,steps,S]: what prompts fix of the steps to come, uniform numbers, the codes drawn, EMPTY
    outside a clip. step [1]: the next one.
    """

    prompt_frames: Tensor
    min_frames: Tensor
    num_frames: Tensor
    known: Tensor
    uniform: Tensor
    drawn: Tensor
    step: Tensor

    @classmethod
    def of(
        cls,
        layout: Layout,
        prompts: list[Tensor],
        max_frames: list[int],
        min_frames: list[int],
        seeds: list[int],
        begins: list[int],
    ) -> "Rows":
        """Arguments as those of `generate`; on the CPU."""
        per_frame = steps_per_frame(layout)
        pairs = list(zip(prompts, max_frames, strict=True))
        totals = [max(most, prompt.shape[1]) for prompt, most in pairs]
        steps = [
            layout.num_steps(total) - prompt.shape[1] * per_frame
            for total, prompt in zip(totals, prompts, strict=True)
        ]
        firsts = [
            (begin + prompt.shape[1]) * per_frame
            for begin, prompt in zip(begins, prompts, strict=True)
        ]
        known = torch.stack([_known(layout, prompt, max(steps)) for prompt in prompts])
        return cls(
            torch.tensor([prompt.shape[1] for prompt in prompts]),
            torch.tensor(min_frames),
            torch.tensor(totals),
            known,
            _uniform(seeds, firsts, steps, layout.num_slots),
            torch.full_like(known, EMPTY),
            torch.zeros(1, dtype=torch.long),
        )

    @property
    def num_steps(self) -> int:
        return self.drawn.shape[1]

    def to(self, device: torch.device) -> "Rows":
        return Rows(*(getattr(self, f.name).to(device) for f in fields(self)))

    def only(self, rows: Tensor) -> "Rows":
        """rows [B] bool: those to go on with."""
        kept = [getattr(self, f.name)[rows] for f in fields(self)[:-1]]
        return Rows(*kept, self.step)

    def draw(
        self, layout: Layout, logits_of: Callable[[int], Tensor], head: int, sampling: Sampling
    ) -> Tensor:
        """The codes [B,S] of the next step, of which logits_of(k) are the logits [B,C] of head k;
        under `flatten` it is head `head` alone."""
        codes = []
        known, uniform = (x.index_select(1, self.step)[:, 0] for x in (self.known, self.uniform))
        for slot in range(layout.num_slots):
            k = head if layout.pattern == "flatten" else slot
            frame = self.prompt_frames + frame_of(layout, self.step, slot)  # [B]
            logits = logits_of(k)
            if k == 0:
                logits[:, layout.eos].masked_fill_(frame < self.min_frames, float("-inf"))
            code = draw(logits, uniform[:, slot], sampling)
            code = torch.where(known[:, slot] == IGNORE, code, known[:, slot])
            if k == 0:
                ended = (code == layout.eos) & (frame < self.num_frames)
                self.num_frames.copy_(torch.where(ended, frame, self.num_frames))
            codes.append(code.masked_fill((frame < 0) | (frame >= self.num_frames), EMPTY))
        codes = torch.stack(codes, dim=1)
        self.drawn.index_copy_(1, self.step, codes[:, None])
        self.step += 1
        return codes

    def has_more(self, layout: Layout, num_before: int = 0) -> Tensor:
        """[B] bool: which clips have a code left to draw; num_before: so many steps ago."""
        left = self.num_frames - self.prompt_frames
        return left > frame_of(layout, self.step - num_before, -1)


def steps_per_frame(layout: Layout) -> int:
    return layout.num_codebooks if layout.pattern == "flatten" else 1


def frame_of(layout: Layout, step: Tensor, slot: int) -> Tensor:
    """The frame, counted from the end of the prompt, in `slot` at `step`; slot -1 is the last."""
    if layout.pattern == "flatten":
        return step // layout.num_codebooks
    return step - slot % layout.num_codebooks


def completes(layout: Layout, step: int) -> bool:
    """Whether `step` draws the last code of a frame."""
    K = layout.num_codebooks
    return step >= K - 1 if layout.pattern == "delay" else (step + 1) % K == 0


def first_ids(layout: Layout) -> Tensor:
    """The global id of class 0 of each codebook: [K]."""
    return layout.target_ids(torch.zeros(layout.num_codebooks, 1, dtype=torch.long))[:, 0]


def to_ids(layout: Layout, codes: Tensor, head: int, firsts: Tensor) -> Tensor:
    """Drawn codes [B,S] -> the next input ids [B,S]; firsts: `first_ids`, where the codes are."""
    if layout.pattern == "flatten":
        firsts = firsts[head]
    return (codes + firsts).masked_fill(codes < 0, PAD)


def _uniform(seeds: list[int], firsts: list[int], num_steps: list[int], num_slots: int) -> Tensor:
    """[B,steps,S] numbers in [0, 1): row n's from its step firsts[n] on. Which number a step gets
    is a matter of the seed alone: they are drawn in blocks that lie where they lie."""
    out = torch.zeros(len(seeds), max(num_steps), num_slots)
    for n, (seed, first, count) in enumerate(zip(seeds, firsts, num_steps, strict=True)):
        begin, blocks = first // BLOCK * BLOCK, []
        for block in range(begin, first + count, BLOCK):
            generator = torch.Generator().manual_seed(mix_seed(seed, block))
            blocks.append(torch.rand(BLOCK, num_slots, generator=generator))
        if blocks:
            out[n, :count] = torch.cat(blocks)[first - begin :][:count]
    return out


def mix_seed(seed: int, salt: int | str) -> int:
    """Another seed: 63 bits of a hash, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{salt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _known(layout: Layout, prompt: Tensor, num_steps: int) -> Tensor:
    """What the prompt [K,P] fixes of the steps to come: [steps,S], IGNORE where it is silent.

    Under `delay`, step j holds frame P + j - k in slot k, which the prompt still has while j < k.
    """
    known = torch.full((num_steps, layout.num_slots), IGNORE)
    if layout.pattern == "delay":
        P = prompt.shape[1]
        for k in range(1, layout.num_codebooks):
            for j in range(min(k, num_steps)):
                known[j, k] = prompt[k, P + j - k] if P + j >= k else EMPTY
    return known
