"""Resynthesis: recordings -> their semantic tokens -> acoustic stages -> sound. Are the words left?

The test of semantic tokens in AudioLM (Borsos et al. 2023, section IV): what a recognizer gets from
the sound is what the tokens (and the stages) kept of the words.
"""

import argparse
import os
from dataclasses import asdict
from functools import partial

import numpy as np
from tqdm import tqdm

from scripts.cli import find_device
from scripts.clips import (
    add_clip_options,
    align,
    format_cell,
    select_recordings,
    write_figures,
)
from scripts.codec_metrics import confidence_interval, mean
from scripts.resynthesis import VERSIONS, Resynthesis, check_wavs
from scripts.run_log import environment
from scripts.sample import load_models
from scripts.sample_options import add_model_options, read_samplings
from scripts.speech_metrics import (
    SpeakerSimilarity,
    Transcriber,
    judge_all,
    not_measured,
    versions_of_packages,
)

STAGES = ("coarse", "fine", "acoustic")
BATCH_SECONDS = {"cpu": 60.0, "cuda": 600.0}
COLUMNS = {  # key in a row -> heading, format
    "wer": ("WER", ".1%"),
    "cer": ("CER", ".1%"),
    "speaker_similarity": ("speaker", ".3f"),
    "num_clips": ("clips", "d"),
    "minutes": ("minutes", ".2f"),
}
LEGEND = """\
±: half of the 95 % interval over clips. speaker: cosine to the original. Low is no fault here: the
tokens are to tell what is said, and nothing else tells the stages whose voice it was.
AudioLM, with other clips and another recognizer: WER 6.0 %, of the originals 2.5 %."""


class Listener:
    """Who speaks, and which words, in every version of a clip; loads its models once."""

    def __init__(self, figures: frozenset[str], asr: str | None):
        self.similarity = SpeakerSimilarity() if "speaker_similarity" in figures else None
        self.transcriber = Transcriber(asr) if "wer" in figures else None

    def __call__(self, wavs: dict[str, np.ndarray], text: str | None) -> dict:
        """{"embedding": the original's voice [256] or None, "figures": {version: figures}}."""
        voice = self.similarity.embed(wavs["original"]) if self.similarity else None
        figures = {}
        for version, wav in wavs.items():
            figures[version] = self.transcriber(wav, text) if self.transcriber and text else {}
            other = self.similarity and version != "original"
            similarity = self.similarity(wav, voice) if other else None
            figures[version]["speaker_similarity"] = similarity
        return {"embedding": voice, "figures": figures}


def version_row(version: str, clips: list[dict]) -> dict:
    """WER and CER over all words and characters, the other figures' means, and intervals."""
    figures = [clip["figures"][version] for clip in clips]
    row = {"version": version, "num_clips": len(clips)}
    row["minutes"] = sum(clip["seconds"][version] for clip in clips) / 60
    for figure, unit in (("wer", "word"), ("cer", "char")):
        heard = [f for f in figures if f"{unit}_errors" in f]
        errors, totals = ([f[key] for f in heard] for key in (f"{unit}_errors", f"num_{unit}s"))
        row[figure] = sum(errors) / sum(totals) if heard else None
        row[f"{figure}_interval"] = confidence_interval(errors, totals) if heard else None
        row[f"num_{unit}s"] = sum(totals)
    values = [f["speaker_similarity"] for f in figures]
    row |= {"speaker_similarity": mean(values)}
    return row | {"speaker_similarity_interval": confidence_interval(values)}


def voices_of_originals(speakers: list[str | None], embeddings: list[np.ndarray | None]) -> dict:
    """What the speaker column could be: the mean similarity of two originals of one speaker (the
    ceiling) and of two speakers (the floor), and how many pairs there are of each."""
    known = [i for i, e in enumerate(embeddings) if e is not None and speakers[i]]
    if len(known) < 2:
        return {}
    stacked = np.stack([embeddings[i] for i in known])  # [N, 256]
    names = np.array([speakers[i] for i in known])
    pairs = np.triu(np.ones((len(known), len(known)), dtype=bool), 1)  # each pair once
    same, found = names[:, None] == names, {}
    for kind, chosen in (("same_speaker", pairs & same), ("other_speaker", pairs & ~same)):
        values = (stacked @ stacked.T)[chosen]
        found[kind] = float(values.mean()) if values.size else None
        found[f"{kind}_pairs"] = int(values.size)
    return found


def evaluate_resynthesis(parsed: argparse.Namespace) -> None:
    """Every clip's semantic tokens through the acoustic stages; a table of versions, and JSON."""
    device, samplings = find_device(parsed.device), read_samplings(parsed)
    recordings = select_recordings(parsed, with_text=bool(parsed.asr))
    if parsed.wavs:
        check_wavs(parsed.wavs, recordings)
    batch_seconds = parsed.batch_seconds
    if batch_seconds is None:
        batch_seconds = BATCH_SECONDS.get(device.type, BATCH_SECONDS["cpu"])
    if not batch_seconds > 0:
        raise ValueError(f"--batch-seconds {batch_seconds:g}: expected more than 0")
    models = load_models(parsed, device)
    wanted = {"speaker_similarity", *(["wer"] if parsed.asr else [])}
    notes = not_measured(sorted(wanted))
    for note in notes.values():
        print(note)
    listener = partial(Listener, frozenset(wanted - set(notes)), parsed.asr)
    made = Resynthesis(models, recordings, samplings, parsed.seed, batch_seconds, parsed.wavs)
    workers = min(parsed.workers or os.cpu_count() or 1, len(recordings))
    heard = judge_all(made, listener, workers)
    heard = list(tqdm(heard, desc="clips", total=len(recordings), disable=None))
    if not heard:
        reason = made.skipped[0]["reason"]
        raise ValueError(f"{parsed.audio}: none of {len(recordings)} clips can be used: {reason}")
    clips = [clip | {"figures": h["figures"]} for clip, h in zip(made.clips, heard, strict=True)]
    embeddings = [h["embedding"] for h in heard]
    rows = [version_row(version, clips) for version in VERSIONS]
    report = {
        **{key: getattr(parsed, key) for key in ("split", "match", "limit", "asr", "seed")},
        "sampling": {name: asdict(samplings[name]) for name in models.stages},
        "checkpoints": {name: state["path"] for name, state in models.states.items()},
        "tokenizers": models.any_state["tokenizers"],
        **environment(device),
        "not_measured": notes,
        "skipped": made.skipped,
        "rows": rows,
        "voices": voices_of_originals([clip["speaker"] for clip in clips], embeddings),
        "seconds_per_second": made.seconds / (rows[-1]["minutes"] * 60),
    }
    report["versions"] |= versions_of_packages()
    details = sorted(clips, key=lambda clip: clip["name"])
    write_figures(parsed.out, report | {"clips": details}, print_report(report))


def print_report(report: dict) -> list[list[str]]:
    """Returns the table."""
    stages = ", ".join(report["checkpoints"].values())
    print(f"{stages}: split {report['split']}, {len(report['skipped'])} skipped")
    table = [["", *(heading for heading, _ in COLUMNS.values())]]
    for row in report["rows"]:
        cells = (format_cell(row, key, form) for key, (_, form) in COLUMNS.items())
        table.append([row["version"], *cells])
    print(*align(table), sep="\n")
    print(LEGEND)
    voices = report["voices"]
    for kind, title in (("same_speaker", "one speaker"), ("other_speaker", "two speakers")):
        if voices.get(kind) is not None:
            pairs = voices[f"{kind}_pairs"]
            print(f"speaker, two originals of {title}: {voices[kind]:.3f} ({pairs} pairs)")
    speed, device = report["seconds_per_second"], report["device"]
    print(f"sampling took {speed:.2f} s per second of audio on {device}")
    return table


def add_resynthesis_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, STAGES)
    add_clip_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="of all draws (0)")
    parser.add_argument(
        "--batch-seconds",
        type=float,
        metavar="S",
        help="audio sampled at once; default: 60, on a GPU 600",
    )
    parser.add_argument("--wavs", metavar="FOLDER", help="keep every version there, to listen to")
    parser.set_defaults(run=evaluate_resynthesis, semantic=None, prompt=None, resynthesize=True)
