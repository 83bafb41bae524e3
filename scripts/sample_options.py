"""The sample command's options: what they are, and which requests cannot be."""

import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path

from model.drawing import Sampling
from model.stages import STAGES
from scripts.cli import make_parser

DESCRIPTION = "Sample audio: from nothing, on from a recording, or from its semantic tokens."
EXAMPLES = """\
  python -m scripts.sample --semantic runs/a --coarse runs/b --fine runs/c --out out.wav
  python -m scripts.sample --semantic runs/a --coarse runs/b --fine runs/c \\
      --prompt x.wav --prompt-seconds 3 --seconds 10 --num 4 --out out.wav
  python -m scripts.sample --coarse runs/b --fine runs/c --resynthesize x.wav --out out.wav
  python -m scripts.sample --semantic runs/a --acoustic runs/d --top-k 100 \\
      --temperature semantic=0.8 acoustic=1 --out out.wav
  python -m scripts.sample --semantic runs/a --acoustic runs/d --seconds 60 --out out.wav \\
      --stream | ffplay -nodisp -autoexit -"""

# AudioLM's temperatures (Borsos et al. 2023, section IV); the acoustic stage takes coarse's
DEFAULT_TEMPERATURES = {"semantic": 0.6, "coarse": 0.8, "fine": 0.6, "acoustic": 0.8}


def sample_parser() -> ArgumentParser:
    parser = make_parser(DESCRIPTION, EXAMPLES)
    add_model_options(parser, STAGES)
    parser.add_argument("--prompt", metavar="WAV", help="a recording to continue")
    parser.add_argument("--prompt-seconds", type=float, metavar="S", help="use its first S seconds")
    parser.add_argument("--resynthesize", metavar="WAV", help="repeat its semantic tokens anew")
    parser.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="new audio at most (10)"
    )
    parser.add_argument(
        "--min-seconds", type=float, default=0.0, metavar="S", help="new audio at least (0)"
    )
    parser.add_argument("--num", type=int, default=1, help="number of clips (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first clip; then +1 each (0)")
    parser.add_argument(
        "--stream",
        action="store_true",
        help="made in shorter chunks (so other sound), sent to standard output as it is made",
    )
    parser.add_argument(
        "--out", required=True, metavar="WAV", help="out.wav; with --num, out-0.wav ..."
    )
    return parser


def add_model_options(parser: ArgumentParser, stages: Iterable[str]) -> None:
    """What to sample with, and how: the runs, their tokenizers, the device, temperatures, ..."""
    for name in stages:
        parser.add_argument(
            f"--{name}", metavar="RUN", help=f"run (or checkpoint) of the {name} stage"
        )
    usual = " ".join(f"{name}={value}" for name, value in DEFAULT_TEMPERATURES.items())
    for flag, what in (
        ("--temperature", f"one number, or STAGE=number each; 0 is greedy ({usual})"),
        ("--top-k", "keep the k likeliest classes; 0 keeps all"),
        ("--top-p", "keep the likeliest classes up to this probability"),
        ("--min-p", "keep classes at least this likely, relative to the likeliest"),
    ):
        parser.add_argument(flag, nargs="+", metavar="X", help=what)
    parser.add_argument("--codec", help="codec folder, where it is no longer where it was")
    parser.add_argument("--semantic-tokenizer", metavar="DIR", help="likewise")
    add_device_options(parser)


def add_device_options(parser: ArgumentParser) -> None:
    """Where and how to compute."""
    parser.add_argument("--attention", default="auto", help="attention backend (auto)")
    parser.add_argument(
        "--decoding",
        choices=("auto", "plain", "triton", "captured"),
        default="auto",
        help="how a step is computed: by the modules, by Triton kernels, by those as a CUDA graph "
        "(auto: captured on a GPU that can, else plain)",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of the weights: bf16 on a GPU (auto)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda where there is one)")


def check_request(arguments: Namespace) -> None:
    """ValueError for what can be known to be wrong before anything is loaded."""
    source, out = arguments.prompt or arguments.resynthesize, Path(arguments.out)
    if arguments.prompt and arguments.resynthesize:
        raise ValueError("--prompt continues a recording, --resynthesize repeats it: choose one")
    if arguments.num < 1 or not 0 < arguments.seconds < math.inf:
        raise ValueError("--num and --seconds must be positive numbers")
    if not 0 <= arguments.min_seconds <= arguments.seconds:
        least = f"--min-seconds {arguments.min_seconds:g}"
        raise ValueError(f"{least}: 0 to --seconds, which is {arguments.seconds:g}")
    if arguments.min_seconds and arguments.resynthesize:
        raise ValueError("--min-seconds has no part in --resynthesize: the recording says how long")
    if arguments.prompt_seconds is not None:
        if not source:
            raise ValueError("--prompt-seconds needs --prompt or --resynthesize")
        if not 0 < arguments.prompt_seconds < math.inf:
            raise ValueError("--prompt-seconds must be a positive number")
    if arguments.stream and (arguments.num > 1 or sys.stdout.isatty()):
        raise ValueError(
            "--stream sends one clip's sound to standard output: leave out --num, and end the "
            "command with | ffplay -nodisp -autoexit -"
        )
    if out.suffix != ".wav":
        raise ValueError(f"--out {out}: wav is what is written; name it {out.with_suffix('.wav')}")
    if source and Path(source).exists():
        for path in (*clip_files(out, arguments.num), *prompt_files(out), out.with_suffix(".json")):
            if path.exists() and path.samefile(source):
                raise ValueError(f"--out {out} would overwrite {source}: choose another name")


def clip_files(out: Path, num_clips: int) -> list[Path]:
    """Where the clips go: out.wav, or out-0.wav, out-1.wav, ... of several."""
    if num_clips == 1:
        return [out]
    return [out.with_stem(f"{out.stem}-{n}") for n in range(num_clips)]


def prompt_files(out: Path) -> list[Path]:
    """Where the given recording goes, as it is and through the codec."""
    return [out.with_stem(f"{out.stem}-{kind}") for kind in ("original", "reconstruction")]


def per_stage(
    option: list[str] | None, default: dict, kind: type, flag: str, given: list[str]
) -> dict:
    """`0.8` sets all stages, `coarse=0.7` one of those that are given."""
    values = dict(default)
    for item in option or []:
        name, equals, text = item.rpartition("=")
        if equals and name not in given:
            raise ValueError(f"{flag} {item}: the stages are {', '.join(given)}")
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(f"{flag} {item}: {text!r} is not a number") from None
        values.update({name: value} if equals else dict.fromkeys(values, value))
    return values


def read_samplings(arguments: Namespace) -> dict[str, Sampling]:
    def same(value: float) -> dict:
        return dict.fromkeys(STAGES, value)

    given = [name for name in STAGES if getattr(arguments, name)]
    usual = DEFAULT_TEMPERATURES
    temperature = per_stage(arguments.temperature, usual, float, "--temperature", given)
    top_k = per_stage(arguments.top_k, same(0), int, "--top-k", given)
    top_p = per_stage(arguments.top_p, same(1.0), float, "--top-p", given)
    min_p = per_stage(arguments.min_p, same(0.0), float, "--min-p", given)
    return {n: Sampling(temperature[n], top_k[n], top_p[n], min_p[n]) for n in STAGES}
