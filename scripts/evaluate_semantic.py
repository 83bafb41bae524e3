"""Semantic tokenizers on the same clips: bits, and whether tokens follow the words or the voice."""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configs.files import write_json
from data.audio import Recording, read_sound, resample
from data.segments import default_split, find_split, spread
from model.semantic import SemanticTokenizer, load_semantic
from scripts import semantic_metrics as metrics
from scripts.cli import find_device
from scripts.clips import align, format_cell
from scripts.codec_metrics import confidence_interval, mean
from scripts.run_log import environment
from scripts.semantic_metrics import PERTURBATIONS, SAMPLE_RATE, collapse, edit_distances

RATES = {  # key in a row -> heading, format
    "tokens_per_second": ("tokens/s", ".1f"),
    "bits_unigram": ("bit/s", ".0f"),
    "bits_bigram": ("bigram", ".0f"),
    "perplexity_unigram": ("ppl", ".0f"),
    "perplexity_bigram": ("bigram", ".1f"),
    "run_length": ("run", ".2f"),
    "tokens_used": ("used", ".1%"),
    "collapsed_tokens_per_second": ("| collapsed/s", ".1f"),
    "collapsed_bits_unigram": ("bit/s", ".0f"),
    "collapsed_bits_bigram": ("bigram", ".0f"),
    "collapsed_perplexity_unigram": ("ppl", ".0f"),
    "collapsed_perplexity_bigram": ("bigram", ".1f"),
}
CONTENT = {
    "speaker_accuracy": ("speaker", ".1%"),
    "speaker_second": ("of 1 s", ".1%"),
    **{f"distance_{name}": (name.replace("_", " "), ".3f") for name in PERTURBATIONS},
    "distance_other_clip": ("(other clip)", ".3f"),
    "phrase_ratio": ("phrase ratio", ".3f"),
    "phrase_ratio_across_speakers": ("of two voices", ".3f"),
    "pitch_phrase_ratio": ("by pitch", ".3f"),
    "phrase_retrieval": ("found", ".1%"),
    "pitch_phrase_retrieval": ("by pitch", ".1%"),
    "pnmi": ("PNMI", ".3f"),
    "phone_purity": ("purity", ".3f"),
}
LEGEND = """\
bit/s, ppl: cross-entropy and perplexity under unigram, then bigram counts of the train split;
  lower is easier for a language model, which is good only if the second table stays good.
  Collapsed: without repeats of the token before, and so without durations.
speaker, of 1 s: clips, then seconds, whose speaker (or microphone) a histogram of tokens gives
  away. Lower is better, down to chance: what names the voice is not what is said.
pitch ... band: unit edit distance, 0 to 1, of a clip's collapsed tokens to those of itself with
  another voice (pitch and formants x or / 1.125), in noise, 10 dB softer, at 300 to 3400 Hz. Lower
  is better; (other clip) is the ceiling, the distance to another clip of like length.
phrase ratio: distance between takes of a phrase over that to other phrases: lower is better.
found: takes whose nearest clip is a take of the same phrase, not of another: higher is better.
  by pitch: the same with the pitch and formants of one of the two changed, a stand-in for a voice.
±: half of the 95 % interval over clips.
PNMI, purity: how much of the phones (--alignments, from scripts.align_phones) the tokens tell:
  higher is better."""


def encode_clips(
    tokenizers: list[SemanticTokenizer], recordings: list[Recording], perturbed: bool
) -> tuple[list[dict], list[dict]]:
    """Clips as {recording, seconds, version: tokens [T] of each tokenizer}; those not decoded."""
    clips, skipped = [], []
    for seed, recording in enumerate(tqdm(recordings, desc="clips", disable=None)):
        try:
            wav = resample(*read_sound(recording.path), SAMPLE_RATE)  # [1, L]
        except ValueError as error:
            skipped.append({"name": recording.name, "reason": str(error)})
            continue
        clip = {"recording": recording, "seconds": wav.shape[1] / SAMPLE_RATE}
        versions = {"clean": wav} | (metrics.perturb(wav, seed) if perturbed else {})
        for version, changed in versions.items():
            clip[version] = []
            for tokenizer in tokenizers:
                samples = resample(changed, SAMPLE_RATE, tokenizer.sample_rate)
                tokens = tokenizer.encode(samples[None].to(tokenizer.mean.device))[0]  # [T]
                clip[version].append(tokens.cpu().numpy())
        clips.append(clip)
    if not clips:
        raise ValueError(f"none of {len(skipped)} clips can be decoded: {skipped[0]['reason']}")
    return clips, skipped


def tokenizer_row(
    tokenizer: SemanticTokenizer, index: int, train: list[dict], clips: list[dict], phones: dict
) -> dict:
    """All figures of tokenizer number `index`."""
    recordings = [clip["recording"] for clip in clips]
    speakers = [recording.speaker for recording in recordings]
    seconds = [clip["seconds"] for clip in clips]
    clean = [clip["clean"][index] for clip in clips]
    collapsed = [collapse(tokens) for tokens in clean]
    row = {key: getattr(tokenizer, key) for key in ("name", "fingerprint", "num_tokens")}
    learnt = [clip["clean"][index] for clip in train]
    row |= metrics.rate_figures(learnt, clean, tokenizer.num_tokens, sum(seconds))
    chosen = metrics.choose_speakers(speakers)
    voices = [clean[i] for i in chosen], [speakers[i] for i in chosen], tokenizer.num_tokens
    for key, piece in (("speaker_accuracy", None), ("speaker_second", int(tokenizer.frame_rate))):
        hits = metrics.speakers_given_away(*voices, piece)
        row |= {key: mean(hits), f"{key}_interval": confidence_interval(hits)}
    for name in PERTURBATIONS:
        changed = [collapse(clip[name][index]) for clip in clips]
        pairs = zip(collapsed, changed, strict=True)
        distances = [edit_distances(tokens, [other]).item() for tokens, other in pairs]
        row[f"distance_{name}"] = mean(distances)
        row[f"distance_{name}_interval"] = confidence_interval(distances)
    by_length = [collapsed[i] for i in np.argsort(seconds, kind="stable")]
    distances = [edit_distances(a, [b]).item() for a, b in pairwise(by_length)]
    row["distance_other_clip"] = mean(distances)

    about = [recording.text for recording in recordings], speakers, seconds
    row |= metrics.phrase_figures(collapsed, collapsed, *about)
    revoiced = [collapse(clip["pitch"][index]) for clip in clips]
    by_pitch = metrics.phrase_figures(revoiced, collapsed, *about)
    row |= {f"pitch_{key}": value for key, value in by_pitch.items()}
    aligned = [phones.get(recording.name, []) for recording in recordings]
    return row | metrics.phone_figures(clean, aligned, tokenizer.frame_rate)


def read_alignments(path: str) -> dict[str, list[tuple[float, float, str]]]:
    """{name: [(start, end, phone)]} of lines {"name", "phones"}. ValueError: a malformed line."""
    found = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        try:
            entry = json.loads(line) if line.strip() else {"name": "", "phones": []}
            phones = [(float(start), float(end), str(p)) for start, end, p in entry["phones"]]
            found[entry["name"]] = phones
        except (ValueError, TypeError, KeyError):
            expected = '{"name": NAME, "phones": [[START, END, PHONE], ...]}'
            raise ValueError(f"{path}, line {number}: expected {expected}") from None
    return found


def evaluate_semantic(parsed: argparse.Namespace) -> None:
    """Every tokenizer on the same clips of the split: two tables, side by side, and JSON."""
    for option in ("limit", "train_limit"):
        number = getattr(parsed, option)
        if number is not None and number < 1:
            raise ValueError(f"--{option.replace('_', '-')} {number}: at least 1")
    device = find_device(parsed.device)
    phones = read_alignments(parsed.alignments) if parsed.alignments else {}
    tokenizers = [load_semantic(name, device) for name in parsed.tokenizers]
    parsed.split = parsed.split or default_split(parsed.audio, "valid")
    recordings = find_split(parsed.audio, parsed.split)
    recordings = spread(recordings, parsed.limit or len(recordings))
    learnt = spread(find_split(parsed.audio, "train"), parsed.train_limit)
    if phones.keys().isdisjoint(r.name for r in recordings) and phones:
        raise ValueError(f"{parsed.alignments}: no name of it is among the clips of {parsed.audio}")
    train, left_out = encode_clips(tokenizers, learnt, perturbed=False)
    clips, skipped = encode_clips(tokenizers, recordings, perturbed=True)
    speakers = [clip["recording"].speaker for clip in clips]
    chosen = [speakers[i] for i in metrics.choose_speakers(speakers)]
    rows = [tokenizer_row(t, i, train, clips, phones) for i, t in enumerate(tokenizers)]
    report = {
        **{key: getattr(parsed, key) for key in ("split", "limit", "train_limit")},
        **environment(device),
        "num_clips": len(clips),
        "minutes": sum(clip["seconds"] for clip in clips) / 60,
        "train_minutes": sum(clip["seconds"] for clip in train) / 60,
        "speakers": {"names": sorted({*chosen}), "num_clips": len(chosen)},
        "skipped": left_out + skipped,
        "rows": rows,
    }
    print_report(report)
    if parsed.out:
        write_json(parsed.out, report)


def print_report(report: dict) -> None:
    num_speakers, rows = len(report["speakers"]["names"]), report["rows"]
    print(
        f"split {report['split']}: {report['num_clips']} clips, {report['minutes']:.1f} minutes, "
        f"{len(report['skipped'])} skipped; counts from {report['train_minutes']:.1f} of train"
    )
    for columns in (RATES, CONTENT):
        shown = [key for key in columns if any(row[key] is not None for row in rows)]
        table = [["", *(columns[key][0] for key in shown)]]
        for row in rows:
            forms = ((key, columns[key][1]) for key in shown)
            cells = (format_cell(row, key, form, form.endswith("%")) for key, form in forms)
            table.append([row["name"], *cells])
        print(*align(table), sep="\n")
        print()
    print(LEGEND)
    if num_speakers:
        clips = report["speakers"]["num_clips"]
        print(f"speaker: {clips} clips of {num_speakers} speakers, chance {1 / num_speakers:.1%}")
    else:
        print(f"speaker: not measured, it takes two with {metrics.MIN_CLIPS_OF_SPEAKER} clips each")


def add_semantic_options(semantic: argparse.ArgumentParser) -> None:
    semantic.add_argument("--tokenizers", required=True, nargs="+", metavar="FOLDER")
    semantic.add_argument("--audio", required=True, help="folder of recordings or JSONL manifest")
    semantic.add_argument(
        "--split",
        choices=("valid", "test"),
        help="default: test, or valid without splits",
    )
    semantic.add_argument("--limit", type=int, metavar="N", help="only N clips, evenly spread")
    semantic.add_argument(
        "--train-limit", type=int, default=500, metavar="N", help="clips counted (default 500)"
    )
    semantic.add_argument("--alignments", metavar="FILE.jsonl", help="phones: PNMI and purity")
    semantic.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    semantic.add_argument("--out", metavar="FILE.json", help="write the figures there as well")
    semantic.set_defaults(run=evaluate_semantic)
