"""Sample audio from trained stages: from nothing, on from a recording, or from its semantic tokens.

semantic -> coarse -> fine -> codec.decode -> wav       (or semantic -> acoustic -> ...)
"""

import sys
import time
from argparse import Namespace
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from configs.files import write_json
from data.audio import WavStream, load_audio, read_sound, resample, save_audio
from data.shards import semantic_rate
from model.checkpoint import check_same_tokens, load_stage
from model.codec import load_codec
from model.decoder import choose_decoding, use_decoding
from model.drawing import Sampling
from model.pipeline import (
    STREAM_SECONDS,
    Chunks,
    Models,
    Prompt,
    Request,
    continuation,
    decode_stream,
    generate_codes,
    resynthesis,
)
from model.semantic import load_semantic
from model.stages import STAGES, Stage
from scripts.cli import command_line, find_device, run_cli
from scripts.run_log import environment
from scripts.sample_options import (
    check_request,
    clip_files,
    prompt_files,
    read_samplings,
    sample_parser,
)

BAR = "{percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} s of audio, {postfix} [{elapsed}<{remaining}]"


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
    names, (how, why) = required_stages(arguments), choose_decoding(arguments.decoding, device)
    for name in names:
        run = getattr(arguments, name)
        stage, state = load_stage(run, device, arguments.attention, arguments.precision)
        use_decoding(stage, how)
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
    print(*{str(stage.transformer.attention) for stage in stages.values()}, sep="\n")
    print(f"decoding: {how} ({why}), {dtype_name(stages)}")
    return Models(stages, states, codec, semantic, semantic_rate(**expected), device)


def dtype_name(stages: dict[str, Stage]) -> str:
    """What they are sampled in."""
    return str(next(iter(stages.values())).transformer.dtype).removeprefix("torch.")


def encode_prompt(path: str, seconds: float | None, models: Models) -> Prompt:
    """Read a recording, cut it to whole codec frames (and to its first `seconds`), tokenize it."""
    codec, semantic = models.codec, models.semantic
    wav = resample(*read_sound(path), codec.sample_rate)
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


def last_part(path: str, prompt: Prompt, models: Models) -> Prompt:
    """The end of a prompt that fills the semantic stage's context: half as much as that."""
    frame_rate, context = models.codec.frame_rate, models.states["semantic"]["crop_seconds"]
    seconds = prompt.codes.shape[1] / frame_rate
    if seconds < context:
        return prompt
    num_frames = max(1, int(context / 2 * frame_rate))
    first = prompt.codes.shape[1] - num_frames
    print(
        f"{path}: {seconds:.1f} s fill the context of the semantic stage, which was trained on "
        f"{context:g} s at a time: its last {num_frames / frame_rate:g} s are the prompt"
    )
    semantic = prompt.semantic[int(first * models.semantic_rate) :]
    return Prompt(semantic, prompt.codes[:, first:], first)


def check_collapsed(models: Models, seconds: float, option: str) -> None:
    """ValueError for clips beyond one context where semantic tokens have lost their timing."""
    context = models.context_seconds
    if models.collapsed and seconds > context:
        raise ValueError(
            f"{seconds:g} s is more than the {context:g} s of these runs' context; with "
            f"data.collapse_semantic nothing longer can be aligned: lower {option}"
        )


def make_request(arguments: Namespace, models: Models) -> tuple[Request, Prompt | None]:
    """What the command asks for, and its recording as tokens."""
    seeds = [arguments.seed + n for n in range(arguments.num)]
    source, frame_rate = arguments.prompt or arguments.resynthesize, models.codec.frame_rate
    prompt = encode_prompt(source, arguments.prompt_seconds, models) if source else None
    if arguments.resynthesize:
        check_collapsed(models, prompt.codes.shape[1] / frame_rate, "--prompt-seconds")
        return resynthesis(models, [prompt] * len(seeds), seeds), prompt
    if prompt is not None:
        prompt = last_part(source, prompt, models)
    if arguments.min_seconds and models.collapsed:
        raise ValueError(
            "--min-seconds needs to know when each token is to be heard, which those of runs with "
            "data.collapse_semantic no longer tell: leave it out"
        )
    least = arguments.min_seconds
    request = continuation(models, prompt, arguments.seconds, seeds, least)
    check_collapsed(models, request.num_frames[0] / frame_rate, "--seconds")
    return request, prompt


class Progress:
    """The bar: seconds of audio, counted by thirds where three stages make them, and how much
    faster than real time they come."""

    def __init__(self, models: Models, request: Request):
        self.num_stages = len(models.stages)
        given = sum(clip.shape[1] for clip in request.codes)
        seconds = (sum(request.num_frames) - given) / models.codec.frame_rate
        self.bar = tqdm(total=round(seconds, 1), bar_format=BAR, disable=None, leave=None)
        self.began = time.perf_counter()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def __call__(self, name: str, seconds: float) -> None:
        fresh = min(seconds / self.num_stages, self.bar.total - self.bar.n)
        speed = (self.bar.n + fresh) / self.elapsed
        self.bar.set_postfix_str(f"{name}, {speed:.1f} x real time", refresh=False)
        self.bar.update(fresh)


def make_wavs(
    models: Models, request: Request, samplings: dict[str, Sampling], stream: WavStream | None
) -> tuple[list[Tensor], bool]:
    """The clips as wav [1,L], and whether all of each is there: Ctrl-C leaves what is finished, and
    goes on if nothing is. A stream gets the first clip as it is made."""
    parts, bar, complete, first = [], Progress(models, request), True, None
    chunks = None if stream is None else Chunks.of_seconds(models, *STREAM_SECONDS)
    try:
        for fresh in decode_stream(models, generate_codes(models, request, samplings, chunks, bar)):
            parts.append([wav.cpu() for wav in fresh])
            if stream is not None and parts[-1][0].numel():
                first = first or bar.elapsed
                stream.write(parts[-1][0])
    except KeyboardInterrupt:
        complete = False
        if not parts:
            raise
    finally:
        bar.bar.close()
    if first is not None:
        print(f"first sound after {first:.2f} s, the last after {bar.elapsed:.2f} s")
    return [torch.cat(clip, dim=1) for clip in zip(*parts, strict=True)], complete


def describe(
    arguments: Namespace, models: Models, request: Request, samplings: dict[str, Sampling]
) -> dict[str, Any]:
    """What it takes to make the same clips again."""
    source, device = arguments.prompt or arguments.resynthesize, models.device
    return {
        "mode": "continuation" if arguments.prompt else "resynthesis" if source else "unprompted",
        "seeds": request.seeds,
        "prompt": None,
        "original": None,
        "reconstruction": None,
        "max_seconds": None if arguments.resynthesize else arguments.seconds,
        "min_seconds": arguments.min_seconds,
        "precision": dtype_name(models.stages),
        "decoding": choose_decoding(arguments.decoding, device)[0],
        "sampling": {name: asdict(samplings[name]) for name in models.stages},
        "checkpoints": {name: state["path"] for name, state in models.states.items()},
        "tokenizers": models.any_state["tokenizers"],
        **environment(device),
    }


def write_clips(
    arguments: Namespace, models: Models, prompt: Prompt | None, wavs: list[Tensor], record: dict
) -> list[Path]:
    """Write every clip, the prompt's original and reconstruction, and the JSON."""
    codec, out = models.codec, Path(arguments.out)
    files, lengths = clip_files(out, len(wavs)), []
    for path, wav in zip(files, wavs, strict=True):
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
        first = prompt.first_frame / codec.frame_rate
        record["prompt"] = {"path": source, "first_second": first, "seconds": used}
    write_json(out.with_suffix(".json"), record)
    return files


def sample(arguments: Namespace) -> list[Path]:
    """The whole command: load, encode the prompt, run the stages, write. Returns the wav files."""
    check_request(arguments)
    samplings = read_samplings(arguments)
    device = find_device(arguments.device)
    with redirect_stdout(sys.stderr if arguments.stream else sys.stdout):
        models = load_models(arguments, device)
        if arguments.stream and models.collapsed:
            raise ValueError(
                "--stream needs to know when each token is to be heard, which those of runs with "
                "data.collapse_semantic no longer tell: leave it out"
            )
        request, prompt = make_request(arguments, models)
        longest = max(request.num_frames) / models.codec.frame_rate
        context = models.states[models.first_acoustic]["crop_seconds"]
        if longest > context:
            print(f"{longest:g} s: in overlapping windows of the {context:g} s that stages know")
        stream = None
        if arguments.stream:
            stream = WavStream(sys.__stdout__.buffer, models.codec.sample_rate)
        wavs, complete = make_wavs(models, request, samplings, stream)
        record = describe(arguments, models, request, samplings) | {
            "complete": complete,
            "command": command_line(),
        }
        files = write_clips(arguments, models, prompt, wavs, record)
        for path, seconds in zip(files, record["seconds"], strict=True):
            print(f"{path}  {seconds:.2f} s{'' if complete else ', as far as it was finished'}")
        if not complete:
            sys.exit(130)  # as Ctrl-C does anywhere
    return files


def main() -> None:
    sample(sample_parser().parse_args())


if __name__ == "__main__":
    run_cli(main)
