"""Measure what has been trained. One subcommand per thing measured; `codec` reconstructs clips."""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from configs.files import atomic_write
from data.audio import load_audio
from data.segments import find_split, spread
from model.codec import Codec, load_codec
from scripts.cli import make_parser, run_cli
from scripts.codec_losses import MelDistance
from scripts.codec_metrics import mean, mel_distance, si_sdr, stoi

EXAMPLES = """\
  python -m scripts.evaluate codec --codec pretrained/codec_16khz \\
      --audio ../shared/corpus/manifest.jsonl --split test --out runs/codec_test.json
  python -m scripts.evaluate codec --codec pretrained/codec_16khz \\
      --audio ../shared/corpus/manifest.jsonl --num-codebooks 1 2 4 8 --limit 40"""
FIGURES = ("stoi", "si_sdr_db", "mel_distance")
COLUMNS = ("K", "kbit/s", "STOI", "SI-SDR dB", "mel dist", "codes used", "bits/code", "x real time")


def evaluate_codec(parsed: argparse.Namespace) -> None:
    """Reconstruct every clip from its first K codebooks, for each K asked for; table and JSON."""
    codec = load_codec(parsed.codec, parsed.device)
    counts = sorted(set(parsed.num_codebooks or [codec.num_codebooks]))
    if counts[0] < 1 or counts[-1] > codec.num_codebooks:
        raise ValueError(f"--num-codebooks: {parsed.codec} has 1 to {codec.num_codebooks}")
    recordings = find_split(parsed.audio, parsed.split)
    if parsed.limit:
        recordings = spread(recordings, parsed.limit)
    distance = MelDistance(codec.sample_rate).to(parsed.device)
    clips: dict[int, list[dict]] = {count: [] for count in counts}
    used = torch.zeros(codec.num_codebooks, codec.codebook_size, dtype=torch.int64)
    skipped = []
    for recording in tqdm(recordings, desc="clips", disable=None):
        try:
            wav = load_audio(recording.path, codec.sample_rate).to(parsed.device)  # [1, L]
        except ValueError as error:
            skipped.append({"name": recording.name, "reason": str(error)})
            continue
        started = time.perf_counter()
        codes = codec.encode(wav[None])  # [1, K, T]
        encode_seconds = time.perf_counter() - started
        for k in range(codec.num_codebooks):
            used[k] += torch.bincount(codes[0, k].cpu(), minlength=codec.codebook_size)
        for count in counts:
            started = time.perf_counter()
            decoded = codec.decode(codes[:, :count], length=wav.shape[-1])[0].cpu()  # [1, L]
            seconds = encode_seconds + time.perf_counter() - started
            target = wav.cpu()
            clips[count].append(
                {
                    "name": recording.name,
                    "duration": wav.shape[-1] / codec.sample_rate,
                    "stoi": stoi(decoded, target, codec.sample_rate),
                    "si_sdr_db": si_sdr(decoded, target),
                    "mel_distance": mel_distance(
                        distance, decoded.to(parsed.device), target.to(parsed.device)
                    ),
                    "seconds": seconds,
                }
            )
    if not clips[counts[0]]:
        raise ValueError(f"{parsed.audio}: none of {len(recordings)} clips could be decoded")
    report = codec_report(codec, clips, used) | {"split": parsed.split, "skipped": skipped}
    print_codec_report(report)
    if parsed.out:
        with atomic_write(parsed.out) as file:
            json.dump(report, file, indent=1)


def codec_report(codec: Codec, clips: dict[int, list[dict]], used: torch.Tensor) -> dict:
    """Means per number of codebooks, and per source at the largest; used [K, size] counts codes."""
    share = used / used.sum(dim=1, keepdim=True).clamp(min=1)  # [K, codebook_size]
    bits = -(share * share.clamp(min=1e-12).log2()).sum(dim=1)  # [K], entropy of each codebook
    bits_per_frame = torch.tensor(float(codec.codebook_size)).log2().item()
    rows = []
    for count, entries in clips.items():
        duration = sum(entry["duration"] for entry in entries)
        rows.append(
            {
                "num_codebooks": count,
                "num_clips": len(entries),
                "minutes": duration / 60,
                "bits_per_second": count * bits_per_frame * codec.frame_rate,
                **{figure: mean([entry[figure] for entry in entries]) for figure in FIGURES},
                "codes_used": (used[:count] > 0).float().mean().item(),
                "entropy_bits": bits[:count].mean().item(),
                "times_real_time": duration / sum(entry["seconds"] for entry in entries),
            }
        )
    groups = defaultdict(list)
    for entry in clips[max(clips)]:
        groups[source_of(entry["name"])].append(entry)
    by_source = {
        source: {"num_clips": len(entries)}
        | {figure: mean([entry[figure] for entry in entries]) for figure in FIGURES}
        for source, entries in sorted(groups.items())
    }
    identity = {key: getattr(codec, key) for key in ("name", "fingerprint", "sample_rate")}
    return {"codec": identity, "rows": rows, "by_source": by_source}


def source_of(name: str) -> str:
    """The folder a clip comes from: audio/librispeech/84/x.opus -> audio/librispeech."""
    return "/".join(Path(name).parts[:-1][:2]) or "."


def print_codec_report(report: dict) -> None:
    """The report as two plain-text tables."""
    first = report["rows"][0]
    print(
        f"{report['codec']['name']} ({report['codec']['fingerprint']}), split {report['split']}: "
        f"{first['num_clips']} clips, {first['minutes']:.1f} min, {len(report['skipped'])} skipped"
    )
    print("  ".join(f"{column:>11}" for column in COLUMNS))
    for row in report["rows"]:
        cells = [str(row["num_codebooks"]), f"{row['bits_per_second'] / 1000:.2f}"]
        cells += [_cell(row[figure]) for figure in FIGURES]
        cells += [f"{row['codes_used']:.1%}", f"{row['entropy_bits']:.2f}"]
        cells += [f"{row['times_real_time']:.1f}"]
        print("  ".join(f"{cell:>11}" for cell in cells))
    print(f"by source, K = {report['rows'][-1]['num_codebooks']}:")
    for source, row in report["by_source"].items():
        figures = "  ".join(f"{figure} {_cell(row[figure])}" for figure in FIGURES)
        print(f"  {source:<24} {row['num_clips']:>5} clips  {figures}")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("Measure a trained part on recordings.", EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_codec_command(commands)
    parsed = parser.parse_args(arguments)
    parsed.run(parsed)


def add_codec_command(commands: argparse._SubParsersAction) -> None:
    codec = commands.add_parser(
        "codec",
        help="reconstruction of a codec: STOI, SI-SDR, mel distance, use of the codebooks, speed",
    )
    codec.add_argument("--codec", required=True, help="folder, encodec_24khz[:FILE]")
    codec.add_argument("--audio", required=True, help="folder of recordings or JSONL manifest")
    codec.add_argument("--split", default="test", choices=("train", "valid", "test"))
    codec.add_argument("--num-codebooks", type=int, nargs="+", metavar="K", help="default: all")
    codec.add_argument("--limit", type=int, metavar="N", help="only N clips, evenly spread")
    codec.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    codec.add_argument("--out", metavar="FILE.json", help="write the figures there as well")
    codec.set_defaults(run=evaluate_codec)


if __name__ == "__main__":
    run_cli(main)
