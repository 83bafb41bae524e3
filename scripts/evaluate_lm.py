"""A language model on recordings it has not seen: what it knows, and whether that is much."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configs.load import load_config
from configs.schema import RunConfig
from data.baselines import Baseline, bits_per_second, token_rates
from data.shards import TokenFolder
from model.checkpoint import find_checkpoint, load_stage
from model.codec import ENCODEC_24KHZ, load_encodec_lm
from scripts.bench_tools import check_picture, save_picture
from scripts.cli import find_device
from scripts.clips import align, check_out, write_figures
from scripts.lm_metrics import (
    by_position,
    calibration,
    counted,
    encodec_nats,
    joined,
    model_figures,
    score_split,
    verdict,
)
from scripts.run_log import environment


def run_folder(run: str) -> Path:
    """Of a run, or of one of its checkpoints."""
    return find_checkpoint(run, prefer_best=True).parent.parent


def read_tokens(run: str, tokens: str | None, state: dict) -> TokenFolder:
    """What the run was trained on, or --tokens. ValueError: of other tokenizers."""
    config = run_folder(run) / "config.yaml"
    if not tokens and not config.is_file():
        raise ValueError(f"{config}: missing, so --tokens must say what to evaluate on")
    path = tokens or load_config(RunConfig, config).data.tokens
    try:
        folder = TokenFolder(path)
    except ValueError as error:
        if tokens:
            raise
        raise ValueError(f"{error} (or name another folder with --tokens)") from None
    for kind in ("codec", "semantic"):
        ours, theirs = folder.header[kind], state["tokenizers"][kind]
        if ours["fingerprint"] != theirs["fingerprint"]:
            raise ValueError(
                f"{path} holds tokens of the {kind} tokenizer {ours['name']} "
                f"({ours['fingerprint']}), but {run} was trained on those of "
                f"{theirs['name']} ({theirs['fingerprint']})"
            )
    return folder


def levels_of(
    parsed: argparse.Namespace,
    folder: TokenFolder,
    names: list[str],
    rates: list[float],
    state: dict,
) -> dict[str, Baseline]:
    """What the model is measured against. ValueError: --encodec-lm, and other codes."""
    levels = counted(folder, parsed.split, names, rates, state["collapse_semantic"])
    if parsed.encodec_lm is not None:
        name = folder.codec["name"].partition(":")[0]
        if name != ENCODEC_24KHZ or "semantic" in names:
            raise ValueError(
                f"--encodec-lm: it models codes of {ENCODEC_24KHZ}, and {parsed.model} tokens of "
                f"{folder.semantic['name'] if 'semantic' in names else name}"
            )
        lm = load_encodec_lm(parsed.encodec_lm, find_device(parsed.device))
        nats = encodec_nats(lm, folder, parsed.split, state["crop_seconds"], parsed.batch_size)
        nats = [nats[int(name[1:])] for name in names]
        levels["encodec's LM"] = Baseline(nats, bits_per_second(nats, rates))
    return levels


def validations(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of the run's log, but for a last line that was cut short."""
    log = run / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    lines = [line for line in lines if line.endswith("}")]
    found = {
        line["step"]: line["loss"] for line in map(json.loads, lines) if line["kind"] == "valid"
    }
    return [(step, loss) for step, loss in sorted(found.items()) if loss is not None]


def evaluate_lm(parsed: argparse.Namespace) -> None:
    """One table and one sentence; JSON and a picture where asked for."""
    if parsed.batch_size < 1:
        raise ValueError(f"--batch-size {parsed.batch_size}: at least 1")
    if parsed.plot:
        check_picture(parsed.plot)
    check_out(parsed.out)
    device = find_device(parsed.device)
    stage, state = load_stage(parsed.model, device)
    folder = read_tokens(parsed.model, parsed.tokens, state)
    collapse, names = state["collapse_semantic"], stage.spec.codebook_names
    rates = token_rates(folder, names, collapse, parsed.split)
    levels = levels_of(parsed, folder, names, rates, state)
    how = (stage, folder, parsed.split, state["crop_seconds"], collapse, parsed.batch_size)
    scores = joined(list(tqdm(score_split(*how), desc="batches", disable=None)))
    model = model_figures(scores, rates)
    clips = folder.clips(parsed.split)
    report = {
        "run": str(parsed.model),
        "checkpoint": state["path"],
        "step": state["step"],
        "stage": stage.spec.name,
        "split": parsed.split,
        "num_clips": len(clips),
        "minutes": sum(clip.duration for clip in clips) / 60,
        "crop_seconds": state["crop_seconds"],
        **environment(device),
        "codebooks": names,
        "tokens_per_second": rates,
        "levels": {name: asdict(level) for name, level in levels.items()},
        "model": model,
        "by_position": by_position(scores, rates, state["crop_seconds"]),
        "calibration": calibration(scores),
    }
    curve = validations(run_folder(parsed.model))
    report["verdict"] = verdict(model["bits_per_second"], levels, rates, curve)
    write_figures(parsed.out, report, print_report(report))
    if parsed.plot:
        draw(report, Path(parsed.plot))


def print_report(report: dict[str, Any]) -> list[list[str]]:
    """Returns the table."""
    model, names = report["model"], report["codebooks"]
    print(
        f"{report['checkpoint']}: {report['stage']}, step {report['step']}; "
        f"{report['split']}: {report['num_clips']} clips, {report['minutes']:.1f} minutes, "
        f"in windows of {report['crop_seconds']:g} s\n"
    )
    table = [["nats per token", *names, "bits/s of audio"]]
    for name, level in report["levels"].items():
        cells = [f"{n:.3f}" for n in level["nats"]]
        table.append([name, *cells, f"{level['bits_per_second']:.0f}"])
    cells = [f"{n:.3f}" for n in model["nats"]]
    table.append(["this model", *cells, f"{model['bits_per_second']:.0f}"])
    table.append(["first guess right", *(f"{hit:.1%}" for hit in model["first_guess"]), ""])
    print(*align(table), sep="\n")
    interval = model["loss_interval"]
    half = f" ± {(interval[1] - interval[0]) / 2:.3f} over clips" if interval else ""
    print(f"\nall tokens: {model['loss']:.4f}{half} (as the run's log says valid; EOS counts)")
    print("\nseconds of the window before a token  nats (the first are often silence)")
    for row in report["by_position"]:
        where = f"{row['from']:g} to {row['to']:g}"
        print(f"{where:<36}  {row['nats']:.3f}  of {row['num_tokens']:,} tokens")
    calibrated = report["calibration"]
    sure = "over" if calibrated["over"] > 0 else "under"
    print(
        f"\nchances are off by {calibrated['error']:.3f} ({abs(calibrated['over']):.3f} {sure}"
        f"confident)\n\n{report['verdict']}"
    )
    return table


def draw(report: dict[str, Any], path: Path) -> None:
    """Loss by codebook, by position; how far chances can be believed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    by_codebook, by_second, chances = figure.subplots(1, 3)
    at = range(len(report["codebooks"]))
    by_codebook.bar(at, report["model"]["nats"], color="C0", label="this model")
    for n, (name, level) in enumerate(report["levels"].items(), start=1):
        mark = {"color": f"C{n}", "marker": "_", "markersize": 18, "linestyle": ""}
        by_codebook.plot(at, level["nats"], label=name, **mark)
    by_codebook.set_xticks(at, report["codebooks"])
    by_codebook.set(ylabel="nats per token")
    by_codebook.legend(fontsize="small")
    rows = report["by_position"]
    edges = [*(row["from"] for row in rows), min(rows[-1]["to"], report["crop_seconds"])]
    by_second.stairs([row["nats"] for row in rows], edges, baseline=None)
    by_second.set(xlabel="seconds of the window before a token", ylabel="nats per token")
    bins = report["calibration"]["bins"]
    chances.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
    chances.plot([b["chance"] for b in bins], [b["right"] for b in bins], "o-")
    chances.set(xlabel="chance given to the first guess", ylabel="how often it was right")
    save_picture(figure, path)


def add_lm_options(lm: argparse.ArgumentParser) -> None:
    lm.set_defaults(run=evaluate_lm)
    lm.add_argument("model", metavar="RUN", help="its best checkpoint is taken; or one checkpoint")
    lm.add_argument("--tokens", metavar="FOLDER", help="default: those the run was trained on")
    lm.add_argument(
        "--encodec-lm",
        nargs="?",
        const="",
        metavar="FILE",
        help="beside the encodec package's own model of encodec_24khz's codes (without FILE: from "
        "the network)",
    )
    lm.add_argument("--split", choices=("valid", "test"), default="valid")
    lm.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="windows at a time (16)"
    )
    lm.add_argument("--plot", metavar="FILE.svg", help="three figures as a picture (svg or png)")
    lm.add_argument("--out", metavar="FILE.json", help="write every figure there as well")
    lm.add_argument("--device", help="cuda, cpu, ... (default: a GPU if there is one)")
