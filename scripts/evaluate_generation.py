"""Clips that go on from recordings, and clips from nothing, as sets beside real ones."""

import argparse
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.audio import Recording, audio_seconds, read_audio, resample, save_audio
from data.shards import TokenFolder
from model.pipeline import (
    Models,
    Prompt,
    Request,
    continuation,
    continuations,
    decode_stream,
    generate_codes,
)
from model.semantic import load_semantic
from model.stages import STAGES
from scripts import generation_metrics as metrics
from scripts.cli import find_device
from scripts.clips import (
    add_selection_options,
    align,
    check_out,
    format_cell,
    select_recordings,
    write_figures,
)
from scripts.codec_metrics import confidence_interval, mean
from scripts.evaluate_lm import read_tokens
from scripts.resynthesis import clip_seed, wav_file
from scripts.run_log import environment
from scripts.sample import check_collapsed, encode_prompt, load_models
from scripts.sample_options import add_model_options, read_samplings
from scripts.semantic_metrics import collapse
from scripts.speech_metrics import SAMPLE_RATE, SpeakerSimilarity, mos, not_measured

SETS = ("real", "reconstruction", "continued", "unprompted")
COLUMNS = {
    "num_clips": ("clips", "d"),
    "seconds": ("seconds", ".1f"),
    "silent": ("silent", ".1%"),
    "frechet": ("Frechet", ".2f"),
    "speaker_similarity": ("speaker", ".3f"),
    "mos": ("DNSMOS", ".2f"),
    "unlike": ("unlike", ".3f"),
    "distinct": ("distinct", ".0%"),
    "copied": ("copied", ".1f"),
}
LEGEND = """\
real: what follows the prompt in the recordings; reconstruction: that through the codec: the rulers.
Frechet: distance to the distribution of prompts and real together, of seconds as the tokenizer's
  features have them; real is a part of that, and so the floor. It grows where clips are fewer.
speaker: cosine to the prompt's voice; DNSMOS: what listeners are expected to say of it, 1 to 5.
unlike: edit distance of semantic tokens, without repeats, to the clip of the next length;
  distinct: clips that are the same tokens as no other.
copied: the longest run of such tokens that the training set also has. More than real is copying.
±: half of the 95 % interval over clips."""


def cut(recording: Recording, first: float, last: float) -> Tensor:
    """Seconds [first, last) of it: wav [1,L] at SAMPLE_RATE."""
    wav = resample(*read_audio(recording.path), SAMPLE_RATE)
    return wav[:, round(first * SAMPLE_RATE) : round(last * SAMPLE_RATE)]


class Generator:
    """Makes the sets, and remembers which recordings are too short or cannot be read."""

    def __init__(self, models: Models, parsed: argparse.Namespace):
        self.models, self.parsed, self.samplings = models, parsed, read_samplings(parsed)
        self.skipped: list[dict] = []

    def prompts(self, recordings: list[Recording]) -> list[tuple[Recording, Prompt]]:
        found, parsed = [], self.parsed
        least = parsed.prompt_seconds + 1
        for recording in tqdm(recordings, desc="prompts", disable=None):
            try:
                if audio_seconds(recording.path) < least:
                    raise ValueError(f"{recording.path}: shorter than {least:g} s")
                prompt = encode_prompt(str(recording.path), parsed.prompt_seconds, self.models)
                found.append((recording, prompt))
            except ValueError as error:
                self.skipped.append({"name": recording.name, "reason": str(error)})
        if not found:
            raise ValueError(f"no recording can be continued: {self.skipped[0]['reason']}")
        return found

    def continued(self, part: list[tuple[Recording, Prompt]]) -> list[Tensor]:
        """What comes after the prompts: wavs [1,L] at SAMPLE_RATE."""
        seeds = [clip_seed(self.parsed.seed, recording.name) for recording, _ in part]
        prompts = [prompt for _, prompt in part]
        request = continuations(self.models, prompts, self.parsed.seconds, seeds)
        wavs = self._made(request)
        given = [clip.shape[1] * self.models.codec.hop_length for clip in request.codes]
        return [self._heard(wav[:, n:]) for wav, n in zip(wavs, given, strict=True)]

    def unprompted(self, seeds: list[int]) -> list[Tensor]:
        request = continuation(self.models, None, self.parsed.seconds, seeds)
        return [self._heard(wav) for wav in self._made(request)]

    def reconstructed(self, wav: Tensor) -> Tensor:
        """wav [1,L] at SAMPLE_RATE through the codec."""
        codec, device = self.models.codec, self.models.device
        there = resample(wav, SAMPLE_RATE, codec.sample_rate).to(device)
        with torch.no_grad():
            return self._heard(codec.decode(codec.encode(there[None]), there.shape[1])[0])

    def _made(self, request: Request) -> list[Tensor]:
        codes = generate_codes(self.models, request, self.samplings)
        return [torch.cat(x, dim=1) for x in zip(*decode_stream(self.models, codes), strict=True)]

    def _heard(self, wav: Tensor) -> Tensor:
        return resample(wav.cpu(), self.models.codec.sample_rate, SAMPLE_RATE)


def make_sets(
    generator: Generator, found: list[tuple[Recording, Prompt]], batch: int
) -> dict[str, list[Tensor]]:
    """As many wavs of each set as there are prompts."""
    parsed, sets = generator.parsed, {name: [] for name in SETS}
    for recording, _ in found:
        first = parsed.prompt_seconds
        sets["real"].append(cut(recording, first, first + parsed.seconds))
        sets["reconstruction"].append(generator.reconstructed(sets["real"][-1]))
    for n in tqdm(range(0, len(found), batch), desc="batches", disable=None):
        part = found[n : n + batch]
        sets["continued"] += generator.continued(part)
        seeds = [clip_seed(parsed.seed, f"unprompted {k}") for k in range(n, n + len(part))]
        sets["unprompted"] += generator.unprompted(seeds)
    return sets


class Judge:
    """Figures of a set of wavs, beside the prompts that came before them."""

    def __init__(
        self,
        models: Models,
        parsed: argparse.Namespace,
        train: list[np.ndarray],
        prompts: list[Tensor],
    ):
        self.tokenizer, self.copies = models.semantic, metrics.Copies(train)
        self.embedder = load_semantic(parsed.embedder, models.device) if parsed.embedder else None
        self.embedder, self.prompts = self.embedder or models.semantic, prompts
        self.notes = not_measured(["speaker_similarity", "mos"])
        self.similarity = None if "speaker_similarity" in self.notes else SpeakerSimilarity()

    def refer_to(self, wavs: list[Tensor]) -> None:
        """Real ones, whose distribution all sets are to be near."""
        reference = self.features(wavs)
        self.center, self.directions = metrics.main_directions(reference)
        self.reference = (reference - self.center) @ self.directions

    def features(self, wavs: list[Tensor]) -> np.ndarray:
        rate = self.embedder.sample_rate
        heard = [resample(wav, SAMPLE_RATE, rate) for wav in wavs if wav.numel()]
        seconds = [metrics.second_features(wav, self.embedder) for wav in heard]
        return np.concatenate([np.zeros((0, self.embedder.num_features)), *seconds])

    def tokens(self, wav: Tensor) -> np.ndarray:
        if not wav.numel():
            return np.zeros(0, dtype=np.int64)
        wav = resample(wav, SAMPLE_RATE, self.tokenizer.sample_rate)
        return collapse(
            self.tokenizer.encode(wav[None].to(self.tokenizer.mean.device))[0].cpu().numpy()
        )

    def row(self, name: str, wavs: list[Tensor]) -> dict[str, Any]:
        own = (self.features(wavs) - self.center) @ self.directions
        tokens = [self.tokens(wav) for wav in wavs]
        by_clip = {
            "seconds": [wav.shape[1] / SAMPLE_RATE for wav in wavs],
            "silent": [metrics.silent_share(wav[0].numpy(), SAMPLE_RATE) for wav in wavs],
            "copied": [float(self.copies.longest(clip)) for clip in tokens],
            "unlike": metrics.unlikeness(tokens),
            "speaker_similarity": self.voices(name, wavs),
            "mos": [None if "mos" in self.notes else mos(wav[0].numpy()) for wav in wavs],
        }
        kinds = [clip.tobytes() for clip in tokens]
        row = {"set": name, "num_clips": len(wavs)}
        row["frechet"] = metrics.frechet_distance(own, self.reference)
        row["distinct"] = sum(kinds.count(kind) == 1 for kind in kinds) / len(kinds)
        for key, values in by_clip.items():
            row |= {key: mean(values), f"{key}_interval": confidence_interval(values)}
        return row

    def voices(self, name: str, wavs: list[Tensor]) -> list[float | None]:
        if self.similarity is None or name == "unprompted":
            return [None] * len(wavs)
        voices = [self.similarity.embed(prompt[0].numpy()) for prompt in self.prompts]
        return [self.similarity(w[0].numpy(), v) for w, v in zip(wavs, voices, strict=True)]


def training_tokens(folder: TokenFolder) -> list[np.ndarray]:
    """Of the train split, without repeats."""
    return [collapse(folder.read(clip)[0].astype(np.int64)) for clip in folder.clips("train")]


def evaluate_generation(parsed: argparse.Namespace) -> None:
    """Four sets of clips: a table, and JSON and wavs where asked for."""
    for option, least in (("seconds", 1), ("prompt_seconds", 0.5), ("batch_size", 1)):
        if getattr(parsed, option) < least:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} {getattr(parsed, option)}: at least {least}")
    check_out(parsed.out)
    recordings = select_recordings(parsed)
    models = load_models(parsed, find_device(parsed.device))
    check_collapsed(models, parsed.prompt_seconds + parsed.seconds, "--seconds")
    folder = read_tokens(parsed.semantic, parsed.tokens, models.any_state)
    train = training_tokens(folder)  # which may have been learnt by heart
    generator = Generator(models, parsed)
    found = generator.prompts(recordings)
    prompts = [cut(recording, 0, parsed.prompt_seconds) for recording, _ in found]
    judge = Judge(models, parsed, train, prompts)
    sets = make_sets(generator, found, parsed.batch_size)
    judge.refer_to(prompts + sets["real"])  # beginnings, which are alike, and what follows them
    rows = [judge.row(name, wavs) for name, wavs in sets.items()]
    if parsed.wavs:
        for name, wavs in sets.items():
            for (recording, _), wav in zip(found, wavs, strict=True):
                save_audio(wav_file(parsed.wavs, recording.name, name), wav, SAMPLE_RATE)
    options = ("split", "match", "limit", "seed", "seconds", "prompt_seconds", "embedder")
    report = {
        **{key: getattr(parsed, key) for key in options},
        "sampling": {name: asdict(generator.samplings[name]) for name in models.stages},
        "checkpoints": {name: state["path"] for name, state in models.states.items()},
        "tokenizers": models.any_state["tokenizers"],
        **environment(models.device),
        "not_measured": judge.notes,
        "skipped": generator.skipped,
        "rows": rows,
    }
    write_figures(parsed.out, report, print_report(report))


def print_report(report: dict) -> list[list[str]]:
    """Returns the table."""
    stages = ", ".join(report["checkpoints"].values())
    skipped = report["skipped"]
    first = f" (the first: {skipped[0]['reason']})" if skipped else ""
    print(f"{stages}: split {report['split']}, {len(skipped)} skipped{first}")
    table = [["", *(heading for heading, _ in COLUMNS.values())]]
    for row in report["rows"]:
        cells = (format_cell(row, key, form) for key, (_, form) in COLUMNS.items())
        table.append([row["set"], *cells])
    print(*align(table), sep="\n")
    print(LEGEND, *report["not_measured"].values(), sep="\n")
    return table


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=evaluate_generation, prompt=True, resynthesize=None)
    add_model_options(parser, STAGES)
    add_selection_options(parser)
    parser.add_argument(
        "--tokens", metavar="FOLDER", help="of the training set; default: the run's"
    )
    parser.add_argument("--prompt-seconds", type=float, default=3.0, metavar="S", help="(3)")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="made at most (5)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (0)")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="clips at a time (8)"
    )
    parser.add_argument(
        "--embedder", metavar="FOLDER", help="another tokenizer for the Frechet distance"
    )
    parser.add_argument("--wavs", metavar="FOLDER", help="keep every clip there, to listen to")
