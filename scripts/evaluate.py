"""Measure what has been trained. One subcommand per thing measured; `codec` reconstructs clips."""

import argparse
import math
import time

import torch
from torch import Tensor
from torch.distributions import Categorical
from tqdm import tqdm

from configs.files import write_json
from data.audio import load_audio
from data.segments import find_split, spread
from model.codec import Codec, load_codec
from scripts.cli import find_device, make_parser, run_cli
from scripts.codec_losses import MelDistance
from scripts.codec_metrics import mean, mel_distance, si_sdr, stoi

EXAMPLES = """\
  python -m scripts.evaluate codec --codec pretrained/codec_16khz \\
      --audio ../shared/corpus/manifest.jsonl --split test --out runs/codec_test.json
  python -m scripts.evaluate codec --codec pretrained/codec_16khz \\
      --audio ../shared/corpus/manifest.jsonl --num-codebooks 1 2 4 8 --limit 40"""
FIGURES = ("stoi", "si_sdr_db", "mel_distance")
COLUMNS = {  # of the printed table: key in the report -> heading, format
    "num_codebooks": ("K", "d"),
    "bits_per_second": ("bit/s", ".0f"),
    "stoi": ("STOI", ".3f"),
    "si_sdr_db": ("SI-SDR dB", ".2f"),
    "mel_distance": ("mel dist", ".3f"),
    "codes_used": ("codes used", ".1%"),
    "entropy_bits": ("bits/code", ".2f"),
    "times_real_time": ("x real time", ".1f"),
    "num_clips": ("clips", "d"),
    "minutes": ("minutes", ".1f"),
}


def evaluate_codec(parsed: argparse.Namespace) -> None:
    """Reconstruct every clip from its first K codebooks, for each K asked for; table and JSON."""
    device = find_device(parsed.device)
    codec = load_codec(parsed.codec, device)
    counts = sorted(set(parsed.num_codebooks or [codec.num_codebooks]))
    if counts[0] < 1 or counts[-1] > codec.num_codebooks:
        raise ValueError(f"--num-codebooks: {parsed.codec} has 1 to {codec.num_codebooks}")
    recordings = find_split(parsed.audio, parsed.split)
    recordings = [recording for recording in recordings if parsed.match in recording.name]
    if not recordings:
        raise ValueError(f"--match {parsed.match}: in no name of {parsed.audio}, {parsed.split}")
    recordings = spread(recordings, parsed.limit or len(recordings))
    distance = MelDistance(codec.sample_rate)
    clips: dict[int, list[dict]] = {count: [] for count in counts}
    used = torch.zeros(codec.num_codebooks, codec.codebook_size, dtype=torch.int64)
    skipped = []
    for recording in tqdm(recordings, desc="clips", disable=None):
        try:
            wav = load_audio(recording.path, codec.sample_rate)  # [1, L]
        except ValueError as error:
            skipped.append({"name": recording.name, "reason": str(error)})
            continue
        started = time.perf_counter()
        codes = codec.encode(wav[None].to(device))  # [1, K, T]
        used.scatter_add_(1, codes[0].cpu(), torch.ones_like(codes[0], device="cpu"))
        encode_seconds = time.perf_counter() - started
        for count in counts:
            started = time.perf_counter()
            decoded = codec.decode(codes[:, :count], length=wav.shape[-1])[0].cpu()  # [1, L]
            clip = {
                "name": recording.name,
                "seconds": encode_seconds + time.perf_counter() - started,
                "duration": wav.shape[-1] / codec.sample_rate,
                "stoi": stoi(decoded, wav, codec.sample_rate),
                "si_sdr_db": si_sdr(decoded, wav),
                "mel_distance": mel_distance(distance, decoded, wav),
            }
            clips[count].append(clip)
    if not clips[counts[0]]:
        raise ValueError(f"{parsed.audio}: none of {len(recordings)} clips could be decoded")
    report = codec_report(codec, clips, used) | {"split": parsed.split, "skipped": skipped}
    print_codec_report(report)
    if parsed.out:
        write_json(parsed.out, report)


def codec_report(codec: Codec, clips: dict[int, list[dict]], used: Tensor) -> dict:
    """Means per number of codebooks; used [K, codebook_size] counts codes."""
    bits = Categorical(used.double()).entropy() / math.log(2)  # [K]
    rows = []
    for count, entries in clips.items():
        duration = sum(clip["duration"] for clip in entries)
        row = {
            "num_codebooks": count,
            "bits_per_second": count * math.log2(codec.codebook_size) * codec.frame_rate,
            **{figure: mean([clip[figure] for clip in entries]) for figure in FIGURES},
            "codes_used": (used[:count] > 0).float().mean().item(),
            "entropy_bits": bits[:count].mean().item(),
            "times_real_time": duration / sum(clip["seconds"] for clip in entries),
            "num_clips": len(entries),
            "minutes": duration / 60,
        }
        rows.append(row)
    identity = {key: getattr(codec, key) for key in ("name", "fingerprint", "sample_rate")}
    return {"codec": identity, "rows": rows}


def print_codec_report(report: dict) -> None:
    codec, num_skipped = report["codec"], len(report["skipped"])
    split = f"split {report['split']}, {num_skipped} skipped"
    print(f"{codec['name']} ({codec['fingerprint']}), {split}")
    print("  ".join(f"{heading:>11}" for heading, _ in COLUMNS.values()))
    for row in report["rows"]:
        cells = (
            "-" if row[key] is None else format(row[key], form)
            for key, (_, form) in COLUMNS.items()
        )
        print("  ".join(f"{cell:>11}" for cell in cells))


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("Measure a trained part on recordings.", EXAMPLES)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    codec = commands.add_parser(
        "codec",
        help="reconstruction of a codec: STOI, SI-SDR, mel distance, use of the codebooks, speed",
    )
    codec.add_argument("--codec", required=True, help="folder, encodec_24khz[:FILE]")
    codec.add_argument("--audio", required=True, help="folder of recordings or JSONL manifest")
    codec.add_argument("--split", default="test", choices=("train", "valid", "test"))
    codec.add_argument("--num-codebooks", type=int, nargs="+", metavar="K", help="default: all")
    codec.add_argument("--match", default="", metavar="TEXT", help="only names with TEXT in them")
    codec.add_argument("--limit", type=int, metavar="N", help="only N clips, evenly spread")
    codec.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    codec.add_argument("--out", metavar="FILE.json", help="write the figures there as well")
    codec.set_defaults(run=evaluate_codec)
    parsed = parser.parse_args(arguments)
    parsed.run(parsed)


if __name__ == "__main__":
    run_cli(main)
