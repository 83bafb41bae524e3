"""Write one self-contained HTML page about training runs: what they sound like, what they learnt.

Everything is inline (audio as base64 WAV, spectrograms as PNG, curves as SVG), so the page opens
from disk, can be mailed, and asks no network for anything. Its frame and style: report.html.
"""

import base64
import json
import math
import statistics
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined
from torch import Tensor

from configs.files import atomic_write
from configs.load import flat
from data.audio import load_audio
from scripts.cli import make_parser, run_cli
from scripts.figures import loss_svg, spectrogram_png

SAMPLE_RATE = 16_000  # Hz, of the spectrograms; players get the file as it is
MODES = {  # in the order of the page
    "unprompted": "Unprompted",
    "continuation": "Continuation",
    "resynthesis": "Resynthesis from semantic tokens",
}


@dataclass
class Run:
    """One training run as logged; `train` and `valid` hold the last log line of each step."""

    folder: Path
    start: dict = field(default_factory=dict)
    train: dict[int, dict] = field(default_factory=dict)
    valid: dict[int, dict] = field(default_factory=dict)
    seconds: float = 0.0  # wall time, summed over the starts of a resumed run

    @property
    def config(self) -> str:
        file = self.folder / "config.yaml"
        return file.read_text(encoding="utf-8").strip() if file.is_file() else "no config.yaml"

    @property
    def settings(self) -> dict:
        """The same as keys and values; {} where it is no YAML."""
        try:
            found = yaml.safe_load(self.config)
        except yaml.YAMLError:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def last_step(self) -> int:
        return max(*self.train, *self.valid, 0)

    @property
    def best(self) -> dict:
        """The best validation, whose checkpoint scripts.sample takes; {} where there is none."""
        finite = [event for event in self.valid.values() if math.isfinite(event["loss"])]
        return min(finite, key=lambda event: event["loss"], default={})

    @property
    def result(self) -> str:
        if not self.best:
            return "not validated yet"
        return f"best {self.best['loss']:.2f} at step {self.best['step']:,} of {self.last_step:,}"


@dataclass
class Clip:
    """One player; `prompt` is how many of its seconds were given rather than generated."""

    path: Path
    title: str
    note: str
    prompt: float = 0.0

    @cached_property
    def wav(self) -> Tensor:  # [1, L] at SAMPLE_RATE
        return load_audio(self.path, SAMPLE_RATE)

    @property
    def seconds(self) -> float:
        return self.wav.shape[1] / SAMPLE_RATE

    @property
    def picture(self) -> str:
        return base64.b64encode(spectrogram_png(self.wav, SAMPLE_RATE)).decode()

    @property
    def sound(self) -> str:
        return base64.b64encode(self.path.read_bytes()).decode()


def read_run(folder: str | Path) -> Run:
    """Read RUN/log.jsonl.

    ValueError: no log, a line that is not one of train.py's (a cut last one is left out), or
    nothing trained yet.
    """
    run, log = Run(Path(folder)), Path(folder, "log.jsonl")
    if not log.is_file():
        raise ValueError(f"{log}: no such file; pass a run folder that train.py has written")
    lines = log.read_text(encoding="utf-8").splitlines()
    offset = 0.0  # subtracted from unix time gives seconds trained
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            if event["kind"] == "start":
                run.start, offset = event, event["time"] - run.seconds
            elif event["kind"] in ("train", "valid"):
                getattr(run, event["kind"])[event["step"]] = event
            run.seconds = event["time"] - offset
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise ValueError(f"{log}, line {number}: not a line of train.py's log") from None
    if not run.start or not run.train:
        raise ValueError(f"{log}: no training step logged yet; train first, then report")
    return run


def read_samples(folder: str | Path) -> list[tuple[dict, list[Clip]]]:
    """Read every NAME.json of a samples folder: (description, its clips in the order to hear).

    ValueError names the JSON that is not a description, or the wav that it lists in vain.
    """
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            MODES[meta["mode"]], meta["sampling"], meta["command"]  # what the page will need
            clips = _clips(meta, path.parent)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not one of scripts.sample's files ({error!r})") from None
        for clip in clips:
            if not clip.path.is_file():
                raise ValueError(f"{path}: lists {clip.path.name}, which is not beside it")
        found.append((meta, clips))
    if not found:
        raise ValueError(f"{folder}: no samples in it; write some there first (scripts.sample)")
    return sorted(found, key=lambda item: list(MODES).index(item[0]["mode"]))


def _clips(meta: dict, folder: Path) -> list[Clip]:
    clips = []
    if meta["prompt"]:
        clips.append(Clip(folder / meta["original"], "Original", "the recording"))
        clips.append(Clip(folder / meta["reconstruction"], "Codec", "coded and decoded"))
    given = meta["prompt"]["seconds"] if meta["mode"] == "continuation" else 0.0
    for number, (name, seed) in enumerate(zip(meta["files"], meta["seeds"], strict=False), 1):
        clips.append(Clip(folder / name, f"Sample {number}", f"seed {seed}", given))
    return clips


def settings(sampling: dict[str, dict]) -> str:
    """What was asked of each stage: "semantic: temperature 0.9 · coarse: ..."."""
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    asked = []
    for stage, knobs in sampling.items():
        turned = [f"{k.replace('_', '-')} {v}" for k, v in knobs.items() if v != neutral.get(k)]
        asked.append(f"{stage}: {', '.join(turned)}")
    return " · ".join(asked)


def curves(run: Run) -> str:
    """The loss curves of a run with its baselines, as SVG."""
    lines = {
        kind: [(step, event["loss"]) for step, event in sorted(getattr(run, kind).items())]
        for kind in ("train", "valid")
    }
    levels = {name: statistics.fmean(run.start[name]["nats"]) for name in ("uniform", "unigram")}
    label = f"Loss of the {run.start['stage']} stage in nats per token: {run.result}; "
    label += f"unigram baseline {levels['unigram']:.2f}, uniform {levels['uniform']:.2f}"
    return loss_svg(lines, levels, label)


def numbers(runs: list[Run]) -> dict[str, list[str]]:
    """Row name -> a cell for each run; a row that no run can fill is left out."""

    def median(run: Run, key: str) -> float | None:
        values = [event[key] for event in run.train.values() if event.get(key) is not None]
        return statistics.median(values) if values else None

    rows = {
        "Best validation loss, nats per token": (".3f", [run.best.get("loss") for run in runs]),
        "… at step": (",", [run.best.get("step") for run in runs]),
        "Bits per second of audio": (",.0f", [run.best.get("bits_per_second") for run in runs]),
        "… unigram baseline": (",.0f", [run.start["unigram"]["bits_per_second"] for run in runs]),
        "… uniform baseline": (",.0f", [run.start["uniform"]["bits_per_second"] for run in runs]),
        "Steps": (",", [run.last_step for run in runs]),
        "Parameters, millions": (".2f", [run.start["num_parameters"] / 1e6 for run in runs]),
        "Tokens per second": (",.0f", [median(run, "tokens_per_second") for run in runs]),
        "Model FLOPs utilisation": (".1%", [median(run, "mfu") for run in runs]),
        "Peak memory, GiB": (".1f", [median(run, "peak_memory_gib") for run in runs]),
        "Wall time, minutes": (".1f", [run.seconds / 60 for run in runs]),
    }
    return {
        name: ["-" if value is None else format(value, spec) for value in values]
        for name, (spec, values) in rows.items()
        if any(value is not None for value in values)
    }


def differences(runs: list[Run]) -> dict[str, list[str]]:
    """Dotted key of the configs -> its value in each run, where they are not all the same; the
    folders themselves always differ, and are left out."""
    configs = [flat(run.settings) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key != "out")
    rows = {key: [str(config.get(key, "-")) for config in configs] for key in keys}
    return {key: cells for key, cells in rows.items() if len({*cells}) > 1}


def codebooks(run: Run) -> list[tuple[str, float, float, float]]:
    """Name, best validation loss, unigram and uniform baseline of each codebook."""
    stage, nats = run.start["stage"], run.best.get("per_codebook", [])
    names = [name if name == stage else f"{stage} {name}" for name in run.start["codebooks"]]
    levels = run.start["unigram"]["nats"], run.start["uniform"]["nats"]
    return list(zip(names, nats, *levels, strict=False))


def facts(run: Run) -> dict[str, str]:
    """Where and when a run ran."""
    start = run.start
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    return {
        "Folder": str(run.folder),
        "Started": utc(start["time"]),
        "Device": start["device"],
        "Attention": start["attention"],
        "Versions": versions,
        "Git commit": start["commit"],
    }


def utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def render_page(runs: list[Run], samples: list[tuple[dict, list[Clip]]]) -> str:
    """report.html filled in; without samples its listening part says so."""
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(
        runs=runs,
        samples=samples,
        longest=max((clip.seconds for _, clips in samples for clip in clips), default=0.0),
        written=utc(time.time()),
        **{helper.__name__: helper for helper in PARTS},
        modes=MODES,
    )


PARTS = (settings, curves, numbers, differences, codebooks, facts)


def main() -> None:
    parser = make_parser(
        __doc__.splitlines()[0],
        "  python -m scripts.report runs/semantic runs/coarse runs/fine --samples samples\n"
        "  python -m scripts.report runs/semantic --out semantic.html",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, in the order to show")
    parser.add_argument("--samples", metavar="DIR", help="folder that scripts.sample wrote to")
    page = "page to write (index.html)"
    parser.add_argument("--out", default="index.html", metavar="FILE", help=page)
    args = parser.parse_args()
    runs = [read_run(folder) for folder in args.runs]
    page = render_page(runs, read_samples(args.samples) if args.samples else [])
    with atomic_write(args.out) as file:
        file.write(page)
    print(f"wrote {args.out} ({len(page.encode()) / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_cli(main)
