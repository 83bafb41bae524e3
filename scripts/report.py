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
from html import escape
from pathlib import Path

from torch import Tensor

from configs.files import atomic_write
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
    seconds: float = 0.0  # wall time, summed over the sessions of a resumed run

    @property
    def last_step(self) -> int:
        return max(*self.train, *self.valid, 0)

    @property
    def best(self) -> dict:
        """The best validation, whose checkpoint scripts.sample takes; {} where there is none."""
        finite = [event for event in self.valid.values() if math.isfinite(event["loss"])]
        return min(finite, key=lambda event: event["loss"], default={})


@dataclass
class Clip:
    """One player; `prompt` is how many of its seconds were given rather than generated."""

    path: Path
    title: str
    note: str
    prompt: float = 0.0


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


# ---- listening -----------------------------------------------------------------------------------


def render_samples(samples: list[tuple[dict, list[Clip]]]) -> str:
    """One section a description, one figure a clip, all spectrograms on one time scale."""
    wavs = {clip.path: load_audio(clip.path, SAMPLE_RATE) for _, clips in samples for clip in clips}
    longest = max(wav.shape[-1] for wav in wavs.values()) / SAMPLE_RATE
    page = ""
    for meta, clips in samples:
        mode = MODES[meta["mode"]]
        page += f"<section class='set'><h3>{mode}</h3>{_given(meta)}"
        page += "".join(render_clip(clip, wavs[clip.path], longest, mode) for clip in clips)
        command = f"<pre>{escape(meta['command'])}</pre>"
        page += f"<details><summary>Repeat this</summary>{command}</details></section>"
    return page


def _given(meta: dict) -> str:
    """The prompt, and what was asked of each stage: "semantic: temperature 0.9 · coarse: ..."."""
    words = ""
    if prompt := meta["prompt"]:
        part = f"first {prompt['seconds']:.1f} s" if meta["mode"] == "continuation" else "tokens"
        words = f"<p class='small'>Given: the {part} of {escape(prompt['path'])}</p>"
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    asked = []
    for stage, knobs in meta["sampling"].items():
        turned = [f"{k.replace('_', '-')} {v}" for k, v in knobs.items() if v != neutral.get(k)]
        asked.append(f"{stage}: {', '.join(turned)}")
    return f"{words}<p class='small'>{escape(' · '.join(asked))}</p>"


def render_clip(clip: Clip, wav: Tensor, longest: float, mode: str) -> str:
    """A figure: caption, spectrogram as wide as its share of `longest` seconds, player."""
    seconds = wav.shape[-1] / SAMPLE_RATE
    label, marked = f"{mode}, {clip.title.lower()}, {seconds:.1f} seconds", ""
    if clip.prompt:
        share = 100 * min(1.0, clip.prompt / seconds)
        marked = f"<span class='prompt' style='width:{share:.2f}%'><i>prompt</i></span>"
        label += f", of which the first {clip.prompt:.1f} are the prompt"
    picture = base64.b64encode(spectrogram_png(wav, SAMPLE_RATE)).decode()
    sound = base64.b64encode(clip.path.read_bytes()).decode()
    picture, sound = f"data:image/png;base64,{picture}", f"data:audio/wav;base64,{sound}"
    return f"""
<figure class='clip'>
<figcaption><b>{clip.title}</b><span>{escape(clip.note)}</span><span>{seconds:.1f} s</span>
</figcaption>
<div class='sound'>
<div class='spectrogram' style='width:{100 * seconds / longest:.2f}%;--second:{100 / seconds:.3f}%'>
<img alt='Spectrogram: {escape(label)}' src='{picture}'>{marked}<span class='head'></span></div>
<audio controls preload='metadata' aria-label='{escape(label)}' src='{sound}'></audio>
</div></figure>"""


# ---- learning ------------------------------------------------------------------------------------


def render_curves(run: Run) -> str:
    """A figure: the stage, its best validation loss, its loss curves with baselines."""
    curves = {
        kind: [(step, event["loss"]) for step, event in sorted(getattr(run, kind).items())]
        for kind in ("train", "valid")
    }
    levels = {name: statistics.fmean(run.start[name]["nats"]) for name in ("uniform", "unigram")}
    best = "not validated yet"
    if run.best:
        best = f"best {run.best['loss']:.2f} at step {run.best['step']:,} of {run.last_step:,}"
    label = f"Loss of the {run.start['stage']} stage in nats per token: {best}; "
    label += f"unigram baseline {levels['unigram']:.2f}, uniform {levels['uniform']:.2f}"
    return f"""
<figure><figcaption><b>{escape(run.start["stage"])}</b><span>{best}</span></figcaption>
{loss_svg(curves, levels, label)}</figure>"""


def render_numbers(runs: list[Run]) -> str:
    """Numbers at the best validation, a stage a column; a row that no run can fill is left out."""

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
    body = ""
    for name, (spec, values) in rows.items():
        if any(value is not None for value in values):
            cells = ("-" if value is None else format(value, spec) for value in values)
            body += f"<tr><th scope='row'>{name}</th><td>{'</td><td>'.join(cells)}</td></tr>"
    head = "".join(f"<th scope='col'>{escape(run.start['stage'])}</th>" for run in runs)
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"


def render_codebooks(run: Run) -> str:
    """Table rows: best nats per token by codebook, a bar of its uniform loss, unigram a tick."""
    nats = run.best.get("per_codebook", [])
    levels = run.start["unigram"]["nats"], run.start["uniform"]["nats"]
    rows, stage = "", run.start["stage"]
    for name, loss, unigram, uniform in zip(run.start["codebooks"], nats, *levels, strict=False):
        label = escape(name if name == stage else f"{stage} {name}")
        fill, tick = min(100, 100 * loss / uniform), 100 * unigram / uniform
        rows += f"""
<tr><th scope='row'>{label}</th><td class='wide'><span class='bar' aria-hidden='true'>
<i style='width:{fill:.1f}%'></i><b style='left:{tick:.1f}%'></b></span></td>
<td>{loss:.2f}</td><td>{unigram:.2f}</td><td>{uniform:.2f}</td></tr>"""
    return rows


# ---- page ----------------------------------------------------------------------------------------


def render_run(run: Run) -> str:
    """A run's environment and resolved configuration, collapsed."""
    start = run.start
    facts = {
        "Folder": run.folder,
        "Started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(start["time"])),
        "Device": start["device"],
        "Attention": start["attention"],
        "Versions": ", ".join(f"{name} {version}" for name, version in start["versions"].items()),
        "Git commit": start["commit"],
    }
    listed = "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v)
    file = run.folder / "config.yaml"
    config = file.read_text(encoding="utf-8").strip() if file.is_file() else "no config.yaml"
    details = f"<summary>{escape(start['stage'])}</summary><dl>{listed}</dl>"
    return f"<details>{details}<pre>{escape(config)}</pre></details>"


def render_page(runs: list[Run], samples: list[tuple[dict, list[Clip]]]) -> str:
    """The whole page; without samples it has no listening part."""
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    parts = {
        "listening": render_samples(samples) if samples else "<p>No samples given.</p>",
        "curves": "".join(render_curves(run) for run in runs),
        "numbers": render_numbers(runs),
        "codebooks": "".join(render_codebooks(run) for run in runs),
        "runs": "".join(render_run(run) for run in runs),
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    for name, part in parts.items():
        page = page.replace(f"<!-- {name} -->", part)
    return page


def main() -> None:
    parser = make_parser(
        __doc__.splitlines()[0],
        "  python -m scripts.report runs/semantic runs/coarse runs/fine --samples samples\n"
        "  python -m scripts.report runs/semantic --out semantic.html",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, in the order to show")
    parser.add_argument("--samples", metavar="DIR", help="folder that scripts.sample wrote to")
    parser.add_argument("--out", default="index.html", metavar="FILE", help="page to write")
    args = parser.parse_args()
    runs = [read_run(folder) for folder in args.runs]
    page = render_page(runs, read_samples(args.samples) if args.samples else [])
    with atomic_write(args.out) as file:
        file.write(page)
    print(f"wrote {args.out} ({len(page.encode()) / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_cli(main)
