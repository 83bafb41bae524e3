"""Sample audio from trained stages: from nothing, on from a recording, or from its semantic tokens.

semantic -> coarse -> fine -> codec.decode -> wav       (or semantic -> acoustic -> ...)
"""

import math
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from configs.files import write_json
from data.audio import load_audio, save_audio
from data.dataset import mix
from data.shards import semantic_rate
from model.checkpoint import check_same_tokens, load_stage
from model.codec import Codec, load_codec
from model.sampling import Sampling, generate_windows
from model.semantic import SemanticTokenizer, load_semantic
from model.stages import STAGES, Stage
from scripts.cli import find_device, run_cli
from scripts.run_log import environment
from scripts.sample_options import (
    check_request,
    clip_files,
    prompt_files,
    read_samplings,
    sample_parser,
)

SLACK = 2  # frames: where tokens are aligned in time, a clip ends where its semantic tokens do
OVERLAP = 0.25  # of a window, repeated from the one before, where a clip outgrows the context
BAR = "{desc:>8} {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} s of audio [{elapsed}<{remaining}]"


@dataclass
class Models:
    """The stages that were given, their checkpoints' states, and the tokenizers they share."""

    stages: dict[str, Stage]
    states: dict[str, dict]
    codec: Codec
    semantic: SemanticTokenizer | None  # only where a recording has to be encoded
    device: torch.device

    @property
    def any_state(self) -> dict:
        return next(iter(self.states.values()))

    @property
    def semantic_rate(self) -> Fraction:
        """Semantic tokens per codec frame."""
        return semantic_rate(**self.any_state["tokenizers"])

    def context_seconds(self, name: str) -> float:
        return self.states[name]["crop_seconds"]


@dataclass(frozen=True)
class Prompt:
    """A recording as tokens: semantic [T_s], codes [K,T]."""

    semantic: Tensor
    codes: Tensor


def required_stages(arguments: Namespace) -> list[str]:
    """The stages this request runs, in order. ValueError names the one that is missing."""
    given = [name for name in STAGES if getattr(arguments, name)]
    wanted = [] if arguments.resynthesize else ["semantic"]
    wanted += ["acoustic"] if "acoustic" in given else ["coarse", "fine"]
    for name in wanted:
        if name not in given:
            also = " (or --acoustic RUN instead of both)" if name in ("coarse", "fine") else ""
            raise ValueError(f"this request needs the {name} stage: add --{name} RUN{also}")
    for name in given:
        if name not in wanted:
            raise ValueError(f"--{name} has no part in this request: leave it out")
    return wanted


def load_models(arguments: Namespace, device: torch.device) -> Models:
    """Load stages and tokenizers, and refuse those that do not belong together."""
    stages, states = {}, {}
    for name in required_stages(arguments):
        run = getattr(arguments, name)
        stage, state = load_stage(run, device, arguments.attention)
        if stage.spec.name != name:
            raise ValueError(f"--{name} {run}: holds a {stage.spec.name} stage")
        stages[name], states[name] = stage, state
    check_same_tokens({getattr(arguments, name): states[name] for name in states})
    expected = states[next(iter(states))]["tokenizers"]
    codec = load_codec(arguments.codec or expected["codec"]["name"], device)
    semantic = None
    if arguments.prompt or arguments.resynthesize:
        name = arguments.semantic_tokenizer or expected["semantic"]["name"]
        semantic = load_semantic(name, device)
    for kind, tokenizer in (("codec", codec), ("semantic", semantic)):
        if tokenizer is not None and tokenizer.fingerprint != expected[kind]["fingerprint"]:
            raise ValueError(
                f"{tokenizer.name} ({tokenizer.fingerprint}) is not the {kind} tokenizer of "
                f"these runs, {expected[kind]['name']} ({expected[kind]['fingerprint']}); "
                f"pass it with {'--codec' if kind == 'codec' else '--semantic-tokenizer'}"
            )
    return Models(stages, states, codec, semantic, device)


def encode_prompt(path: str, seconds: float | None, models: Models) -> Prompt:
    """Read a recording, cut it to whole codec frames (and to its first `seconds`), tokenize it."""
    codec, semantic = models.codec, models.semantic
    wav = load_audio(path, codec.sample_rate)
    # frames that end in, or look ahead at, padding would teach silence
    ahead = codec.config.lookahead
    num_frames = wav.shape[1] // codec.hop_length - ahead
    if seconds is not None:
        num_frames = min(num_frames, int(seconds * codec.frame_rate + 1e-6))
    if num_frames <= 0:
        least = f"one frame of {1 / codec.frame_rate:.3f} s"
        raise ValueError(f"{path}: what is left of it as a prompt is shorter than {least}")
    wav = wav[:, : (num_frames + ahead) * codec.hop_length]
    other = load_audio(path, semantic.sample_rate)
    other = other[:, : round(num_frames / codec.frame_rate * semantic.sample_rate)]
    codes = codec.encode(wav[None].to(models.device))[0, :, :num_frames].cpu()  # [K, T]
    return Prompt(semantic.encode(other[None].to(models.device))[0].cpu(), codes)


def check_prompt(path: str, prompt: Prompt, models: Models) -> None:
    """ValueError if the semantic stage cannot hold the prompt and anything after it."""
    seconds = prompt.codes.shape[1] / models.codec.frame_rate
    context = models.context_seconds("semantic")
    if seconds >= context:
        raise ValueError(
            f"{path}: {seconds:.1f} s, but the semantic stage was trained on {context:g} s at a "
            f"time; take its beginning with --prompt-seconds {context / 2:g}"
        )


def run_stage(
    models: Models,
    seeds: list[int],
    samplings: dict[str, Sampling],
    name: str,
    condition_of: Callable[[int, int, int], Tensor | None],
    prompt: Tensor,
    max_frames: list[int],
    slack: int | None = None,
) -> list[Tensor]:
    """One stage for all clips, in windows of the length it was trained on. EOS ends a clip; with
    `slack` only within that many frames of `max_frames`."""
    rate = models.codec.frame_rate * (models.semantic_rate if name == "semantic" else 1)
    window = max(2, round(models.context_seconds(name) * rate))
    new = sum(n - prompt.shape[1] for n in max_frames) / rate  # seconds
    with tqdm(total=round(new, 1), desc=name, bar_format=BAR, disable=None, leave=None) as bar:
        return generate_windows(
            models.stages[name],
            condition_of,
            [prompt] * len(seeds),
            max_frames,
            [mix(seed, STAGES.index(name)) >> 1 for seed in seeds],
            samplings[name],
            window,
            int(OVERLAP * window),
            None if slack is None else [max(1, n - slack) for n in max_frames],
            lambda num_clips: bar.update(min(num_clips / rate, bar.total - bar.n)),
        )


def check_collapsed(models: Models, seconds: float, option: str) -> None:
    """ValueError for clips beyond one context where semantic tokens have lost their timing."""
    context = min(map(models.context_seconds, models.stages))
    if models.any_state["collapse_semantic"] and seconds > context:
        raise ValueError(
            f"{seconds:g} s is more than the {context:g} s of these runs' context; with "
            f"data.collapse_semantic nothing longer can be aligned: lower {option}"
        )


def whole(frames: float) -> int:
    """Rounded up, but for what floats add: 0.56 s are 28 frames of 20 ms, not 29."""
    return math.ceil(round(frames, 6))


def without_repeats(models: Models, semantic: Tensor) -> Tensor:
    """Semantic tokens [T_s] as the stages read them."""
    collapsed = models.any_state["collapse_semantic"]
    return torch.unique_consecutive(semantic) if collapsed else semantic


@torch.no_grad()
def generate_codes(
    models: Models,
    prompt: Prompt | None,
    resynthesize: bool,
    seconds: float,
    seeds: list[int],
    samplings: dict[str, Sampling],
) -> list[Tensor]:
    """All stages for `len(seeds)` clips: codes [K,T_n] each, a continued prompt included."""
    N, ratio, frame_rate = len(seeds), models.semantic_rate, models.codec.frame_rate
    if resynthesize:
        check_collapsed(models, prompt.codes.shape[1] / frame_rate, "--prompt-seconds")
        return resynthesize_clips(models, [prompt] * N, seeds, samplings)
    K = models.codec.num_codebooks
    semantic = torch.empty(0, dtype=torch.long) if prompt is None else prompt.semantic  # [T_s]
    codes = torch.empty(K, 0, dtype=torch.long) if prompt is None else prompt.codes  # [K,T]
    semantic = without_repeats(models, semantic)
    limit = codes.shape[1] + whole(seconds * frame_rate)  # frames a clip may have
    check_collapsed(models, limit / frame_rate, "--seconds")
    most = semantic.shape[0] + whole(seconds * frame_rate * float(ratio))
    made = run_stage(
        models, seeds, samplings, "semantic", lambda *_: None, semantic[None], [most] * N
    )
    # [1,T_s] -> [T_s]; nothing keeps the model from drawing a token twice
    semantics = [without_repeats(models, tokens[0]) for tokens in made]
    return follow_semantics(models, semantics, codes, [limit] * N, seeds, samplings)


@torch.no_grad()
def resynthesize_clips(
    models: Models, prompts: list[Prompt], seeds: list[int], samplings: dict[str, Sampling]
) -> list[Tensor]:
    """Codes [K,T_n] drawn anew from each recording's semantic tokens, no longer than it is.

    A clip does not depend on what else is in its batch.
    """
    semantics = [without_repeats(models, prompt.semantic) for prompt in prompts]
    nothing = torch.empty(models.codec.num_codebooks, 0, dtype=torch.long)  # [K,0]
    limits = [prompt.codes.shape[1] for prompt in prompts]
    return follow_semantics(models, semantics, nothing, limits, seeds, samplings)


def follow_semantics(
    models: Models,
    semantics: list[Tensor],
    codes: Tensor,
    limits: list[int],
    seeds: list[int],
    samplings: dict[str, Sampling],
) -> list[Tensor]:
    """The acoustic stages: for each semantics [T_s], codes [K,T_n], of which `codes` [K,T] are the
    beginning; at most `limits` frames."""
    ratio, collapsed = models.semantic_rate, models.any_state["collapse_semantic"]
    if not collapsed:
        ends = [max(codes.shape[1] + 1, math.ceil(len(s) / ratio)) for s in semantics]
        limits = [min(pair) for pair in zip(limits, ends, strict=True)]

    def semantic_of(row: int, a: int, b: int) -> Tensor:
        """The semantic tokens of codec frames [a, b): [1,T_s]."""
        tokens = semantics[row]
        if collapsed or b >= limits[row]:
            return tokens[None] if collapsed else tokens[None, int(a * ratio) :]
        return tokens[None, int(a * ratio) : math.ceil(b * ratio)]

    def given(name: str) -> Tensor:
        """The prompt's codes of a stage's codebooks."""
        return codes[slice(*models.stages[name].spec.codebooks)]

    run = partial(run_stage, models, seeds, samplings)
    slack = None if collapsed else max(SLACK, math.ceil(1 / ratio))
    if "acoustic" in models.stages:
        return run("acoustic", semantic_of, given("acoustic"), limits, slack)
    coarse = run("coarse", semantic_of, given("coarse"), limits, slack)
    lengths = [c.shape[1] for c in coarse]  # fine completes these frames: no more, no fewer
    fine = run("fine", lambda row, a, b: coarse[row][:, a:b], given("fine"), lengths, slack=0)
    return [torch.cat([c[:, : f.shape[1]], f]) for c, f in zip(coarse, fine, strict=True)]


def write_clips(
    arguments: Namespace, models: Models, prompt: Prompt | None, codes: list[Tensor], record: dict
) -> list[Path]:
    """Decode and write every clip, the prompt's original and reconstruction, and the JSON."""
    codec, out = models.codec, Path(arguments.out)
    files, lengths = clip_files(out, len(codes)), []
    for path, clip in zip(files, codes, strict=True):
        wav = codec.decode(clip[None].to(models.device))[0]  # [1,K,T] -> [1,L]
        save_audio(path, wav, codec.sample_rate)
        lengths.append(wav.shape[1] / codec.sample_rate)
    record |= {"files": [path.name for path in files], "seconds": lengths}
    source = arguments.prompt or arguments.resynthesize
    if prompt is not None:
        whole = load_audio(source, codec.sample_rate)
        again = codec.decode(codec.encode(whole[None].to(models.device)), whole.shape[1])[0]
        original, reconstruction = prompt_files(out)
        save_audio(original, whole, codec.sample_rate)
        save_audio(reconstruction, again, codec.sample_rate)
        record |= {"original": original.name, "reconstruction": reconstruction.name}
        used = prompt.codes.shape[1] / codec.frame_rate
        record["prompt"] = {"path": source, "seconds": used}
    write_json(out.with_suffix(".json"), record)
    return files


def sample(arguments: Namespace) -> list[Path]:
    """The whole command: load, encode the prompt, run the stages, write. Returns the wav files."""
    check_request(arguments)
    samplings = read_samplings(arguments)
    device = find_device(arguments.device)
    models = load_models(arguments, device)
    print(next(iter(models.stages.values())).transformer.attention)
    prompt, source = None, arguments.prompt or arguments.resynthesize
    if source:
        prompt = encode_prompt(source, arguments.prompt_seconds, models)
        if arguments.prompt:
            check_prompt(source, prompt, models)
    seeds = [arguments.seed + n for n in range(arguments.num)]
    codes = generate_codes(
        models, prompt, bool(arguments.resynthesize), arguments.seconds, seeds, samplings
    )
    mode = "continuation" if arguments.prompt else "resynthesis" if source else "unprompted"
    record = {
        "mode": mode,
        "seeds": seeds,
        "prompt": None,
        "original": None,
        "reconstruction": None,
        "max_seconds": None if arguments.resynthesize else arguments.seconds,
        "sampling": {name: asdict(samplings[name]) for name in models.stages},
        "checkpoints": {name: state["path"] for name, state in models.states.items()},
        "tokenizers": models.any_state["tokenizers"],
        "command": shlex.join(["python", "-m", "scripts.sample", *sys.argv[1:]]),
        **environment(device),
    }
    files = write_clips(arguments, models, prompt, codes, record)
    for path, seconds in zip(files, record["seconds"], strict=True):
        print(f"{path}  {seconds:.2f} s")
    return files


def main() -> None:
    sample(sample_parser().parse_args())


if __name__ == "__main__":
    run_cli(main)
