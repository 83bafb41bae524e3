"""Which of two does a model find likelier? Chance is a half."""

import argparse
from pathlib import Path

import torch

from data.audio import load_audio
from model.checkpoint import load_stage
from model.semantic import SemanticTokenizer, load_semantic
from model.stages import Stage
from scripts.cli import find_device
from scripts.clips import align, check_out, write_figures
from scripts.evaluate_lm import read_tokens
from scripts.pairs import Listed, Pair, PairMaker, Sample, judge, read_pairs
from scripts.run_log import environment

MEANING = {
    "order": "as it was, or in shuffled pieces",
    "beginning": "after its own beginning, or another's",
    "speaker": "after its speaker's voice, or another's",
}


def tokenizer_of(parsed: argparse.Namespace, stage: Stage, state: dict) -> SemanticTokenizer:
    """ValueError: recordings say nothing to this stage, or another tokenizer's tokens."""
    if stage.spec.name != "semantic":
        raise ValueError(
            f"{parsed.model} holds a {stage.spec.name} stage; pairs of recordings are for a "
            "semantic one: leave out FILE for pairs made from its own tokens"
        )
    expected = state["tokenizers"]["semantic"]
    name = parsed.semantic_tokenizer or expected["name"]
    tokenizer = load_semantic(name, stage.embed.weight.device)
    if tokenizer.fingerprint != expected["fingerprint"]:
        raise ValueError(
            f"{name} ({tokenizer.fingerprint}) is not the tokenizer of {parsed.model}, "
            f"{expected['name']} ({expected['fingerprint']}); name it with --semantic-tokenizer"
        )
    return tokenizer


def encoded(listed: Listed, tokenizer: SemanticTokenizer, crop_seconds: float) -> list[Pair]:
    """Recordings as tokens, in windows as long as a training crop."""
    window = max(2, round(crop_seconds * tokenizer.frame_rate))

    def windows(file: Path) -> list[Sample]:
        wav = load_audio(str(file), tokenizer.sample_rate)  # [1,L]
        tokens = tokenizer.encode(wav[None].to(tokenizer.mean.device))[0].cpu()
        if not len(tokens):
            raise ValueError(f"{file}: shorter than one token")
        parts = tokens.split(window)
        return [
            Sample(part, torch.zeros(1, len(part), dtype=torch.long), starts=n == 0)
            for n, part in enumerate(parts)
        ]

    return [Pair(kind, item, windows(good), windows(bad)) for kind, item, good, bad in listed]


def evaluate_pairs(parsed: argparse.Namespace) -> None:
    """A table of kinds of pairs, and JSON where asked for."""
    for option in ("limit", "batch_size"):
        number = getattr(parsed, option)
        if number is not None and number < 1:
            raise ValueError(f"--{option.replace('_', '-')} {number}: at least 1")
    check_out(parsed.out)
    device = find_device(parsed.device)
    stage, state = load_stage(parsed.model, device)
    collapse, crop = state["collapse_semantic"], state["crop_seconds"]
    if parsed.pairs:
        tokenizer = tokenizer_of(parsed, stage, state)
        pairs = encoded(read_pairs(Path(parsed.pairs))[: parsed.limit], tokenizer, crop)
    else:
        folder = read_tokens(parsed.model, parsed.tokens, state)
        maker = PairMaker(folder, parsed.split, crop, parsed.seed)
        pairs = list(maker.pairs(parsed.limit))
    rows = judge(stage, pairs, collapse, parsed.batch_size)
    report = {
        "run": str(parsed.model),
        "checkpoint": state["path"],
        "step": state["step"],
        "stage": stage.spec.name,
        "pairs": parsed.pairs or f"made from {parsed.split}",
        "seed": parsed.seed,
        **environment(device),
        "rows": rows,
    }
    table = [["the better one is likelier in", "items", "of them", "95 %"]]
    for kind, row in rows.items():
        name = f"{kind}: {MEANING[kind]}" if not parsed.pairs else kind
        low, high = row["right_interval"]
        few = ", so nothing is shown" if low < 0.5 < high else ""
        cells = (str(row["num_items"]), f"{row['right']:.1%}", f"{low:.0%} to {high:.0%}{few}")
        table.append([name, *cells])
    print(f"{state['path']}: {stage.spec.name}, step {state['step']}; pairs {report['pairs']}\n")
    print(*align(table), sep="\n")
    print("\nchance: 50 %")
    if not parsed.pairs and "speaker" not in rows:
        print("speaker: no pairs, they take two speakers, and two clips of one")
    write_figures(parsed.out, report, table)


def add_pairs_options(pairs: argparse.ArgumentParser) -> None:
    pairs.set_defaults(run=evaluate_pairs)
    pairs.add_argument(
        "model", metavar="RUN", help="its best checkpoint is taken; or one checkpoint"
    )
    pairs.add_argument(
        "pairs",
        nargs="?",
        metavar="FILE",
        help="recordings for a semantic stage: ZeroSpeech's gold.csv (sWUGGY, sBLIMP), a folder of "
        'NAME_correct.wav and NAME_incorrect.wav (StoryCloze), or lines {"good": FILE, "bad": '
        "FILE}; default: pairs made from the run's own tokens",
    )
    pairs.add_argument("--tokens", metavar="FOLDER", help="default: those the run was trained on")
    pairs.add_argument("--split", choices=("valid", "test", "train"), default="valid")
    pairs.add_argument("--limit", type=int, metavar="N", help="clips, or pairs of FILE, used")
    pairs.add_argument("--seed", type=int, default=0, help="of the pairs that are made (0)")
    pairs.add_argument("--semantic-tokenizer", metavar="NAME", help="if it is not where it was")
    pairs.add_argument("--batch-size", type=int, default=16, metavar="N", help="at a time (16)")
    pairs.add_argument("--out", metavar="FILE.json", help="write every figure there as well")
    pairs.add_argument("--device", help="cuda, cpu, ... (default: a GPU if there is one)")
