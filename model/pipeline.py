"""All stages in a row: semantic -> coarse -> fine (or acoustic) -> codec, chunk by chunk of time.

A chunk passes through every stage before the next one begins. So a clip of minutes takes the
memory of one context, what is finished can be heard while the rest is made, and streaming is no
other road: the same chunks give the same samples, listened to or not.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from model.codec import Codec
from model.codec_stream import CodecStreams
from model.drawing import Sampling, mix_seed
from model.sampling import extend
from model.semantic import SemanticTokenizer
from model.stages import Stage

SLACK = 2  # frames: where tokens are aligned in time, a clip ends where its semantic tokens do
OVERLAP = 0.25  # of a window, repeated from the one before, where a clip outgrows the context
AHEAD = 0.1  # of a window: what the acoustic stages may read of the semantic tokens to come

OnAudio = Callable[[str, float], None]  # stage, seconds of audio that it has just made


@dataclass
class Models:
    """The stages that were given, their checkpoints' states, and the tokenizers they share.

    semantic_rate: semantic tokens per codec frame.
    """

    stages: dict[str, Stage]
    states: dict[str, dict]
    codec: Codec
    semantic: SemanticTokenizer | None  # only where a recording has to be encoded
    semantic_rate: Fraction
    device: torch.device

    @property
    def any_state(self) -> dict:
        return next(iter(self.states.values()))

    @property
    def collapsed(self) -> bool:
        """Semantic tokens have lost their repeats, and with them their time."""
        return self.any_state["collapse_semantic"]

    @property
    def first_acoustic(self) -> str:
        """The stage that reads semantic tokens."""
        return "acoustic" if "acoustic" in self.stages else "coarse"

    @property
    def context_seconds(self) -> float:
        """What every stage was trained on at a time."""
        return min(state["crop_seconds"] for state in self.states.values())

    def rate(self, name: str) -> Fraction | float:
        """Tokens of a stage's codebook per second."""
        return self.codec.frame_rate * (self.semantic_rate if name == "semantic" else 1)

    def window(self, name: str) -> int:
        """Frames that a stage was trained on at a time."""
        return max(2, round(self.states[name]["crop_seconds"] * self.rate(name)))

    def read(self, semantic: Tensor) -> Tensor:
        """Semantic tokens [T_s] as the stages read them."""
        return torch.unique_consecutive(semantic) if self.collapsed else semantic


@dataclass(frozen=True)
class Prompt:
    """A recording as tokens: semantic [T_s], codes [K,T], the first of them its first_frame-th."""

    semantic: Tensor
    codes: Tensor
    first_frame: int = 0


@dataclass(frozen=True)
class Request:
    """What to make of N clips, at the models' frame rate.

    semantics [T_s]: the tokens a clip begins with, or all of them, if `num_semantic` is None;
    otherwise those it may have at most, and `min_semantic` those it must have. codes [K,T]: those
    it begins with; `num_frames`: how many it may have; `first_frame`: of its recording, if that
    began before.
    """

    semantics: list[Tensor]
    num_semantic: list[int] | None
    codes: list[Tensor]
    num_frames: list[int]
    seeds: list[int]
    first_frame: int = 0
    min_semantic: list[int] | None = None


@dataclass(frozen=True)
class Chunks:
    """Codec frames that are made at a time: first, and then. `ahead`: those for which the acoustic
    stages read semantic tokens beyond the end of a chunk, as in the midst of a training crop."""

    first: int
    then: int
    ahead: int

    @classmethod
    def of_seconds(cls, models: "Models", first: float, then: float, ahead: float) -> "Chunks":
        return cls(*(whole_frames(s * models.codec.frame_rate) for s in (first, then, ahead)))


STREAM_SECONDS = (0.4, 0.8, 0.4)  # a first chunk soon, then longer ones, which cost less


def continuation(
    models: Models,
    prompt: Prompt | None,
    seconds: float,
    seeds: list[int],
    min_seconds: float = 0,
) -> Request:
    """At most `seconds` of new audio after a prompt, or from nothing; at least `min_seconds`, for
    semantic tokens that have kept their repeats."""
    if prompt is None:
        nothing = torch.empty(models.codec.num_codebooks, 0, dtype=torch.long)  # [K,0]
        prompt = Prompt(nothing[0], nothing)
    return continuations(models, [prompt] * len(seeds), seconds, seeds, min_seconds)


def continuations(
    models: Models,
    prompts: list[Prompt],
    seconds: float,
    seeds: list[int],
    min_seconds: float = 0,
) -> Request:
    """The same after prompts of their own, which begin at one frame of their recordings."""
    (first,) = {prompt.first_frame for prompt in prompts}
    assert not (min_seconds and models.collapsed)
    frames, least = (x * models.codec.frame_rate for x in (seconds, min_seconds))
    semantics = [models.read(prompt.semantic) for prompt in prompts]
    codes = [prompt.codes for prompt in prompts]
    most = [len(s) + whole_frames(frames * float(models.semantic_rate)) for s in semantics]
    limits = [clip.shape[1] + whole_frames(frames) for clip in codes]
    num = [max(1, len(s) + whole_frames(least * float(models.semantic_rate))) for s in semantics]
    return Request(semantics, most, codes, limits, seeds, first, num)


def resynthesis(models: Models, prompts: list[Prompt], seeds: list[int]) -> Request:
    """New audio for each recording's semantic tokens, no longer than it is."""
    nothing = torch.empty(models.codec.num_codebooks, 0, dtype=torch.long)  # [K,0]
    limits = [prompt.codes.shape[1] for prompt in prompts]
    semantics = [models.read(prompt.semantic) for prompt in prompts]
    return Request(semantics, None, [nothing] * len(prompts), limits, seeds)


def usual_chunks(models: Models, num_given: int, num_frames: int) -> Chunks:
    """For a clip that begins with num_given frames: one chunk if num_frames fit the context of the
    stage that reads semantic tokens, else as much at a time as fits."""
    window = models.window(models.first_acoustic)
    if num_frames <= window or models.collapsed:
        return Chunks(num_frames, num_frames, 0)
    ahead = int(AHEAD * window)
    step = max(1, window - ahead - int(OVERLAP * window))
    return Chunks(max(step, window - ahead - num_given), step, ahead)


@torch.no_grad()
def generate_codes(
    models: Models,
    request: Request,
    samplings: dict[str, Sampling],
    chunks: Chunks | None = None,
    on_audio: OnAudio | None = None,
) -> Iterator[list[Tensor]]:
    """After each chunk the codes [K,T_n] of all clips so far, those they began with included.

    chunks: of every clip; None: each clip's own `usual_chunks`. A clip depends on its seed and its
    chunks; not on what else is in its batch.
    """
    sizes = [
        chunks or usual_chunks(models, clip.shape[1], most)
        for clip, most in zip(request.codes, request.num_frames, strict=True)
    ]
    clips = _Clips(models, request, samplings, on_audio or (lambda *_: None), sizes)
    while not clips.finished:
        clips.next_chunk()
        clips.extend_semantics()
        clips.extend_codes()
        yield list(clips.codes)


@torch.no_grad()
def decode_stream(models: Models, chunks: Iterable[list[Tensor]]) -> Iterator[list[Tensor]]:
    """Codes [K,T_n] so far, again and again -> each time the new samples [1,L] of every clip.

    Of a causal codec chunk by chunk, of another one all at the end: the same samples as decoding
    each clip at once.
    """
    codec = models.codec
    if not codec.config.causal:
        *_, codes = chunks
        yield [codec.decode(clip[None].to(models.device))[0] for clip in codes]
        return
    streams = None
    for codes in chunks:
        there = [clip.to(models.device) for clip in codes]
        streams = streams or CodecStreams(codec, len(there))
        yield streams.push(there)
    rests = streams.finish(there) if streams else []
    if any(rest.numel() for rest in rests):
        yield rests


def whole_frames(frames: float) -> int:
    """Rounded up, but for what floats add: 0.56 s are 28 frames of 20 ms, not 29."""
    return math.ceil(round(frames, 6))


class _Clips:
    """The clips of a request while they grow: semantics [T_s], codes [K,T], which of them have all
    their semantic tokens, the frames they may have, fewer once an end is found, and the frame that
    the current chunk of each ends with."""

    def __init__(
        self,
        models: Models,
        request: Request,
        samplings: dict[str, Sampling],
        on_audio: OnAudio,
        chunks: list[Chunks],
    ):
        self.models, self.request, self.samplings = models, request, samplings
        self.on_audio, self.chunks, self.num_chunks = on_audio, chunks, 0
        self.ahead = [size.ahead for size in chunks]
        self.ends = [clip.shape[1] for clip in request.codes]
        self.semantics, self.codes = list(request.semantics), list(request.codes)
        self.limits, self.ended = list(request.num_frames), [False] * len(request.seeds)

    @property
    def finished(self) -> bool:
        pairs = zip(self.codes, self.limits, strict=True)
        return all(clip.shape[1] >= limit for clip, limit in pairs)

    def next_chunk(self) -> None:
        for n, (size, most) in enumerate(zip(self.chunks, self.request.num_frames, strict=True)):
            self.ends[n] = min(most, self.ends[n] + (size.then if self.num_chunks else size.first))
        self.num_chunks += 1

    def _num_semantic(self, n: int) -> int:
        """Tokens that the acoustic stages need for the chunk of clip n."""
        if self.ended[n]:
            return len(self.semantics[n])
        most = self.request.num_semantic[n]
        if self.ends[n] == self.request.num_frames[n]:
            return most
        return min(most, math.ceil((self.ends[n] + self.ahead[n]) * self.models.semantic_rate))

    def extend_semantics(self) -> None:
        """To what the acoustic stages need for this chunk."""
        most, ratio = self.request.num_semantic, self.models.semantic_rate
        if most is not None:
            wanted = [self._num_semantic(n) for n in range(len(self.ends))]
            given = [tokens[None] for tokens in self.semantics]  # [1,T_s]
            least = self.request.min_semantic
            made = self._extend("semantic", lambda *_: None, given, wanted, least)
            for n, tokens in enumerate(made):
                self.ended[n] |= tokens.shape[1] < wanted[n] or wanted[n] == most[n]
                # nothing keeps the model from drawing a token twice
                self.semantics[n] = self.models.read(tokens[0])
        else:
            self.ended = [True] * len(self.ended)
        if self.models.collapsed:
            return
        for n in (n for n, ended in enumerate(self.ended) if ended):
            frames = math.ceil(len(self.semantics[n]) / ratio)
            begun = self.request.codes[n].shape[1]
            self.limits[n] = min(self.limits[n], max(begun + 1, frames))

    def extend_codes(self) -> None:
        """Every clip to the end of its chunk, or to its own."""
        name = self.models.first_acoustic
        wanted = [min(pair) for pair in zip(self.ends, self.limits, strict=True)]
        slack = max(SLACK, math.ceil(1 / self.models.semantic_rate))
        least = [
            1 if self.models.collapsed else n - slack * (ended and n == limit)
            for n, limit, ended in zip(wanted, self.limits, self.ended, strict=True)
        ]
        first = self._extend(name, self._semantic_of, self._given(name), wanted, least, self.ahead)
        for n, clip in enumerate(first):
            if clip.shape[1] < wanted[n]:
                self.limits[n] = clip.shape[1]
        if name == "acoustic":
            self.codes = first
            return
        lengths = [clip.shape[1] for clip in first]  # fine completes these frames: no more or fewer
        fine = self._extend(
            "fine", lambda row, a, b: first[row][:, a:b], self._given("fine"), lengths, lengths
        )
        self.codes = [torch.cat(pair) for pair in zip(first, fine, strict=True)]

    def _semantic_of(self, row: int, a: int, b: int) -> Tensor:
        """The semantic tokens of codec frames [a, b), and those just ahead: [1,T_s]."""
        tokens, ratio = self.semantics[row], self.models.semantic_rate
        if self.models.collapsed:
            return tokens[None]
        if self.ended[row] and b >= self.limits[row]:
            return tokens[None, int(a * ratio) :]
        return tokens[None, int(a * ratio) : math.ceil((b + self.ahead[row]) * ratio)]

    def _given(self, name: str) -> list[Tensor]:
        """What there is of a stage's own codebooks."""
        return [clip[slice(*self.models.stages[name].spec.codebooks)] for clip in self.codes]

    def _extend(
        self,
        name: str,
        condition_of: Callable[[int, int, int], Tensor | None],
        given: list[Tensor],
        wanted: list[int],
        least: list[int] | None = None,
        ahead: list[int] | None = None,
    ) -> list[Tensor]:
        """One stage for all clips. EOS ends a clip, but not before it has its `least` frames."""
        rate, window = self.models.rate(name), self.models.window(name)
        rooms = [max(2, window - n) for n in ahead or [0] * len(given)]
        seeds = [mix_seed(seed, name) for seed in self.request.seeds]
        overlap = min(int(OVERLAP * window), *(room - 1 for room in rooms))
        first = self.request.first_frame * (self.models.semantic_rate if name == "semantic" else 1)
        return extend(
            self.models.stages[name],
            condition_of,
            given,
            wanted,
            seeds,
            self.samplings[name],
            rooms,
            overlap,
            min_frames=least,
            on_frame=lambda num_clips: self.on_audio(name, num_clips / float(rate)),
            first_frame=int(first),
        )
