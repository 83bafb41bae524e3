"""A codec on clips, by number of codebooks: quality, words, use of the codebooks, speed."""

import argparse
import math
import os
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn import functional as F
from tqdm import tqdm

from data.audio import Recording, load_audio, read_sound, resample
from data.segments import spread
from model.codec import Codec, load_codec
from scripts.cli import find_device
from scripts.clips import (
    add_clip_options,
    align,
    format_cell,
    select_recordings,
    write_figures,
)
from scripts.codec_metrics import confidence_interval, mean
from scripts.figures import draw_spectrograms
from scripts.run_log import device_name, environment
from scripts.speech_metrics import (
    PACKAGES,
    SAMPLE_RATE,
    Judge,
    judge_all,
    not_measured,
    versions_of_packages,
)

FIGURES = ("pesq", "stoi", "si_sdr_db", "mel_distance", "speaker_similarity")
COLUMNS = {  # of the printed table: key in the report -> heading, format
    "num_codebooks": ("K", "d"),
    "bits_per_second": ("bit/s", ".0f"),
    "pesq": ("PESQ", ".2f"),
    "stoi": ("STOI", ".3f"),
    "si_sdr_db": ("SI-SDR", ".2f"),
    "mel_distance": ("mel dist", ".3f"),
    "speaker_similarity": ("speaker", ".3f"),
    "wer": ("WER", ".1%"),
    "wer_of_originals": ("orig.", ".1%"),
    "wer_ratio": ("ratio", ".2f"),
    "codes_used": ("used", ".1%"),
    "entropy_bits": ("bits/code", ".2f"),
    "num_clips": ("clips", "d"),
    "minutes": ("minutes", ".1f"),
}
WITH_INTERVAL = ("pesq", "stoi", "wer")
OF_OTHERS = """\
For comparison, measured by others on other clips:
  EnCodec 24 kHz, 8 LibriSpeech clips: PESQ 1.59 / 2.15 / 2.85, STOI 0.841 / 0.895 / 0.937
    at 1500 / 3000 / 6000 bit/s
  Lyra v2, 16 clips: STOI 0.746 / 0.831 / 0.890 / 0.935, WER (whisper-base) 36.0 / 14.0 / 11.0 /
    12.2 % (of the originals 10.1 %) at 800 / 1600 / 3200 / 9200 bit/s"""
SPEED_CLIPS, PICTURE_CLIPS = 8, 2


def evaluate_codec(parsed: argparse.Namespace) -> None:
    """Reconstruct every clip from its first K codebooks, for each K asked for; table and JSON."""
    device = find_device(parsed.device)
    codec = load_codec(parsed.codec, device)
    counts = sorted(set(parsed.num_codebooks or [codec.num_codebooks]))
    if counts[0] < 1 or counts[-1] > codec.num_codebooks:
        raise ValueError(f"--num-codebooks: {parsed.codec} has 1 to {codec.num_codebooks}")
    recordings = select_recordings(parsed)
    options = {"wer": parsed.asr, "picture": parsed.picture}
    wanted = [figure for figure in PACKAGES if figure in FIGURES or options.get(figure)]
    notes = not_measured(wanted)
    for line in notes.values():
        print(line)
    figures = frozenset(wanted) - set(notes)

    reconstruction = Reconstruction(codec, device, counts, recordings)
    workers = min(parsed.workers or os.cpu_count() or 1, len(recordings))
    judged = judge_all(reconstruction, partial(Judge, figures, parsed.asr), workers)
    judged = list(tqdm(judged, desc="clips", total=len(recordings), disable=None))
    clips = [clip | found for clip, found in zip(reconstruction.clips, judged, strict=True)]
    if not clips:
        raise ValueError(f"{parsed.audio}: none of {len(recordings)} clips could be decoded")
    report = {
        "codec": {key: getattr(codec, key) for key in ("name", "fingerprint", "sample_rate")},
        **{key: getattr(parsed, key) for key in ("split", "match", "limit", "asr")},
        **environment(device),
        "not_measured": notes,
        "skipped": reconstruction.skipped,
        "rows": codec_rows(codec, clips, counts, parsed.by),
        "speed": codec_speed(codec, recordings, counts, device),
    }
    report["versions"] |= versions_of_packages()
    table = print_codec_report(report)
    if "picture" in figures:
        draw_spectrograms(parsed.picture, reconstruction.pictures, SAMPLE_RATE)
    details = [{key: clip[key] for key in clip if key != "codes"} for clip in clips]
    write_figures(parsed.out, report | {"clips": details}, table)


class Reconstruction:
    """Iterates over (target, {K: estimate}, text) of each recording, arrays [L] at SAMPLE_RATE.

    Remembers what it has passed: `clips` with their codes [K, T], those `skipped`, `pictures`.
    """

    def __init__(
        self, codec: Codec, device: torch.device, counts: list[int], recordings: list[Recording]
    ):
        self.codec, self.device, self.counts, self.recordings = codec, device, counts, recordings
        self.clips, self.skipped, self.pictures = [], [], {}

    def __iter__(self) -> Iterator[tuple]:
        for index, recording in enumerate(self.recordings):
            try:
                wav, rate = read_sound(recording.path)  # [1, L]
            except ValueError as error:
                self.skipped.append({"name": recording.name, "reason": str(error)})
                continue
            target = resample(wav, rate, SAMPLE_RATE)[0]  # [L]
            codes, estimates = self.reconstruct(resample(wav, rate, self.codec.sample_rate))
            estimates = {
                count: F.pad(estimate, (0, len(target) - len(estimate)))  # a sample, by rounding
                for count, estimate in estimates.items()
            }
            clip = {
                "name": recording.name,
                "folder": str(Path(recording.name).parent),
                "speaker": recording.speaker or "unknown",
                "duration": len(target) / SAMPLE_RATE,
                "text": recording.text,
                "codes": codes.short(),
            }
            self.clips.append(clip)
            place = (len(self.pictures) + 0.5) / PICTURE_CLIPS  # evenly spread, unless undecodable
            if place * len(self.recordings) < index + 1:
                versions = {f"K = {count}": estimate for count, estimate in estimates.items()}
                self.pictures[Path(recording.name).stem] = {"original": target, **versions}
            arrays = {count: estimate.numpy() for count, estimate in estimates.items()}
            yield target.numpy(), arrays, recording.text

    def reconstruct(self, wav: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """wav [1, L] at the codec's rate -> codes [K, T], {K: estimate [L'] at SAMPLE_RATE}."""
        codes = self.codec.encode(wav[None].to(self.device))  # [1, K, T]
        estimates = {}
        for count in self.counts:
            decoded = self.codec.decode(codes[:, :count], length=wav.shape[-1])[0, 0].cpu()  # [L]
            estimates[count] = resample(decoded, self.codec.sample_rate, SAMPLE_RATE)
        return codes[0].cpu(), estimates


def codec_rows(codec: Codec, clips: list[dict], counts: list[int], by: str | None) -> list[dict]:
    """A row per number of codebooks over all clips, then per group: their `folder` or `speaker`."""
    groups = {"all": clips}
    for name in sorted({clip[by] for clip in clips}) if by else ():
        groups[name] = [clip for clip in clips if clip[by] == name]
    return [
        {"group": name, **codec_row(codec, group, count)}
        for name, group in groups.items()
        for count in counts
    ]


def codec_row(codec: Codec, clips: list[dict], count: int) -> dict:
    """Means over clips and their 95 % intervals, the use of the codebooks, WER over all words."""
    codes = torch.cat([clip["codes"][:count] for clip in clips], dim=1).long()  # [count, T]
    used = torch.stack([row.bincount(minlength=codec.codebook_size) for row in codes])
    row = {
        "num_codebooks": count,
        "bits_per_second": count * math.log2(codec.codebook_size) * codec.frame_rate,
        "codes_used": (used > 0).float().mean().item(),
        "entropy_bits": Categorical(used.double()).entropy().mean().item() / math.log(2),
        "num_clips": len(clips),
        "minutes": sum(clip["duration"] for clip in clips) / 60,
    }
    for figure in FIGURES:
        values = [clip["figures"][count][figure] for clip in clips]
        row |= {figure: mean(values), f"{figure}_interval": confidence_interval(values)}
    spoken = [clip for clip in clips if clip["original"]]
    words = [clip["original"]["num_words"] for clip in spoken]
    errors = [clip["figures"][count]["word_errors"] for clip in spoken]
    at_first = sum(clip["original"]["word_errors"] for clip in spoken)
    return row | {
        "wer": sum(errors) / sum(words) if words else None,
        "wer_interval": confidence_interval(errors, words),
        "wer_of_originals": at_first / sum(words) if words else None,
        "wer_ratio": sum(errors) / at_first if at_first else None,
        "num_words": sum(words),
    }


def codec_speed(
    codec: Codec, recordings: list[Recording], counts: list[int], device: torch.device
) -> list[dict]:
    """Multiples of real time of encode (all codebooks) and of decode, batch 1, clip by clip.

    On the CPU, and on the GPU where there is one; warm, for all clips go through twice.
    """
    devices = {"cpu": torch.device("cpu"), device.type: device}
    if torch.cuda.is_available():
        devices.setdefault("cuda", torch.device("cuda"))
    wavs = []
    for recording in spread(recordings, SPEED_CLIPS):
        try:
            wavs.append(load_audio(recording.path, codec.sample_rate)[None])  # [1, 1, L]
        except ValueError:
            continue
    speeds = []
    duration = sum(wav.shape[-1] for wav in wavs) / codec.sample_rate
    for place in devices.values() if wavs else ():
        codec.to(place)
        seconds = dict.fromkeys(("encode", *counts), 0.0)  # or decode from so many codebooks
        # a GPU's first two seconds are slow even at lengths it has seen: time the second pass
        for timed, wav in product((False, True), wavs):
            for part in seconds:
                started = time.perf_counter()
                if part == "encode":
                    codes = codec.encode(wav.to(place))  # [1, K, T]
                    codes.cpu()  # waits for it
                else:
                    codec.decode(codes[:, :part]).cpu()
                seconds[part] += (time.perf_counter() - started) * timed
        rates = {part: duration / spent for part, spent in seconds.items()}
        speed = {"device": device_name(place), "minutes": duration / 60}
        speeds.append(speed | {"encode": rates.pop("encode"), "decode": rates})
    codec.to(device)
    return speeds


def print_codec_report(report: dict) -> list[list[str]]:
    """Returns the table."""
    codec, num_skipped = report["codec"], len(report["skipped"])
    split = f"split {report['split']}, {num_skipped} skipped"
    print(f"{codec['name']} ({codec['fingerprint']}), {split}")
    table = [[heading for heading, _ in COLUMNS.values()]]
    for row in report["rows"]:
        items = ((key, form, key in WITH_INTERVAL) for key, (_, form) in COLUMNS.items())
        table.append([format_cell(row, *item) for item in items])
    groups = ["all", *(row["group"] for row in report["rows"])]
    for line, group, before in zip(align(table), groups, ["all", *groups[:-1]], strict=True):
        if group not in (before, "all"):
            print(f"{group}:")
        print(line)
    print("Taken at 16 kHz. ±: half of the 95 % interval over clips; mel dist: of log10 magnitudes")
    if not report["asr"]:
        print("WER: not measured; --asr FOLDER takes a Whisper model in CTranslate2's format")
    for speed in report["speed"]:
        encode, rates = speed["encode"], speed["decode"]
        decode = " / ".join(f"{rate:.1f}" for rate in rates.values())
        where = f"{speed['device']}, clip by clip, x real time"
        print(f"{where}: encode {encode:.1f}, decode {decode} (K = {' / '.join(map(str, rates))})")
    print(OF_OTHERS)
    return table


def add_codec_options(codec: argparse.ArgumentParser) -> None:
    codec.add_argument("--codec", required=True, help="folder, encodec_24khz[:FILE]")
    add_clip_options(codec)
    codec.add_argument("--num-codebooks", type=int, nargs="+", metavar="K", help="default: all")
    codec.add_argument("--by", choices=("folder", "speaker"), help="rows for each of them as well")
    codec.add_argument("--picture", metavar="FILE.png", help="spectrograms of two of the clips")
    codec.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    codec.set_defaults(run=evaluate_codec)
