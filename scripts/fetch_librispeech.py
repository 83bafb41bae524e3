"""LibriSpeech (Panayotov et al. 2015) as a manifest: 960 hours of read English, CC BY 4.0."""

from argparse import ArgumentParser
from pathlib import Path
from urllib.error import URLError

from torchaudio.datasets import LIBRISPEECH
from tqdm import tqdm

from data.shards import write_lines
from scripts.cli import make_parser, run_cli

EXAMPLES = """\
  python -m scripts.fetch_librispeech --out librispeech --download
  python -m scripts.fetch_librispeech --out librispeech --subsets train-clean-100 dev-clean"""
GIGABYTES = {  # of each archive; unpacked beside it, it takes as much again
    "train-clean-100": 6.3,
    "train-clean-360": 23,
    "train-other-500": 30,
    "dev-clean": 0.3,
    "dev-other": 0.3,
    "test-clean": 0.3,
    "test-other": 0.3,
}
SPLITS = {"train": "train", "dev": "valid", "test": "test"}
MANIFEST = "manifest.jsonl"


def subset_lines(root: Path, subset: str, download: bool) -> list[dict]:
    """A line for each recording, as scripts.prepare reads them. ValueError: it is not there, or
    cannot be downloaded."""
    try:
        found = LIBRISPEECH(root, subset, download=download)
    except RuntimeError as error:
        if download:  # of a damaged archive
            raise ValueError(f"{root}: {subset} cannot be unpacked ({error}); remove it") from None
        size = f"{GIGABYTES[subset]:g} GB, and as much unpacked"
        raise ValueError(
            f"{root / 'LibriSpeech' / subset}: not there; --download fetches it ({size})"
        ) from None
    except (URLError, OSError) as error:
        raise ValueError(
            f"{subset} cannot be downloaded ({error}); put its archive's contents, "
            f"LibriSpeech/{subset}, into {root}"
        ) from None
    split, lines = SPLITS[subset.partition("-")[0]], []
    for n in tqdm(range(len(found)), desc=subset, disable=None):
        path, _, text, speaker, *_ = found.get_metadata(n)
        path = Path("LibriSpeech", path).as_posix()
        lines.append({"path": path, "text": text, "speaker": str(speaker), "split": split})
    if not lines:
        raise ValueError(f"{root / 'LibriSpeech' / subset}: holds no recordings; remove it")
    return lines


def librispeech_parser() -> ArgumentParser:
    parser = make_parser("Make a manifest of LibriSpeech, download it first if asked.", EXAMPLES)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="it holds, or gets, LibriSpeech/"
    )
    parser.add_argument(
        "--subsets",
        nargs="+",
        choices=GIGABYTES,
        default=list(GIGABYTES),
        metavar="NAME",
        help=f"of {', '.join(GIGABYTES)} (all: {sum(GIGABYTES.values()):.0f} GB)",
    )
    parser.add_argument(
        "--download", action="store_true", help="what is not there, from openslr.org"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    parsed = librispeech_parser().parse_args(arguments)
    root = Path(parsed.out)
    root.mkdir(parents=True, exist_ok=True)
    lines = [x for name in parsed.subsets for x in subset_lines(root, name, parsed.download)]
    write_lines(root / MANIFEST, lines)
    print(f"{root / MANIFEST}: {len(lines):,} recordings")


if __name__ == "__main__":
    run_cli(main)
