"""When each phone of recordings is said, found by pocketsphinx from their texts (English, offline):
the alignments that `scripts.evaluate semantic` reads."""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from configs.files import atomic_write
from data.audio import SPLITS, Recording, load_audio
from data.segments import default_split, find_split
from scripts.cli import make_parser, run_cli

if TYPE_CHECKING:
    from pocketsphinx import Decoder

EXAMPLES = """\
  python -m scripts.align_phones --audio data/demo/manifest.jsonl --split valid --out demo.jsonl
  python -m scripts.align_phones --audio ../shared/corpus/manifest.jsonl --split test \\
      --out alignments.jsonl
  python -m scripts.evaluate semantic --audio ../shared/corpus/manifest.jsonl \\
      --tokenizers pretrained/semantic_mfcc --alignments alignments.jsonl"""

SAMPLE_RATE, FRAME_RATE = 16_000, 100  # of pocketsphinx's acoustic model
SYMBOLS = "#$%&+=@£€"  # read aloud, like digits, but in no dictionary: not to be passed over
WORD = re.compile(rf"[^\W_]+(?:'[^\W_]+)*|[{SYMBOLS}]")
MAX_REASONS, MAX_NAMES = 20, 3  # shown of what was left out

Phones = list[tuple[float, float, str]]  # (start, end, phone), in seconds


def split_words(text: str) -> list[str]:
    """Lower-case words, without punctuation except the apostrophes inside them."""
    return WORD.findall(text.lower().replace("\u2019", "'"))  # the curly one, too


def load_decoder() -> "Decoder":
    """pocketsphinx with the model and dictionary of its wheel. ValueError: it is not installed."""
    try:
        from pocketsphinx import Decoder
    except ImportError as error:
        reason = f"phones cannot be aligned ({error})"
        raise ValueError(f"{reason}; pip install pocketsphinx==5.0.4") from None
    # By default, bestpath ends clips in silences of one frame, which no phone can have: the second
    # pass failed on one clip in nine. And silprob 0.005 gave half of the pauses, the short ones,
    # to the phones beside them.
    return Decoder(lm=None, bestpath=False, silprob=1.0, loglevel="FATAL")


def align(decoder: "Decoder", wav: Tensor, words: list[str]) -> Phones:
    """wav [1, L] at 16 kHz and its words -> phones of CMUdict without stress, in order and end to
    end, up to less than 20 ms before the end; pauses and noises are "SIL".

    The first pass finds pronunciations, pauses and the times of words; the second, of phones in
    them. ValueError: the dictionary lacks a word, or the words do not fit the audio.
    """
    lacking = dict.fromkeys(word for word in words if decoder.lookup_word(word) is None)
    if lacking:
        raise ValueError(f"not in the dictionary: {' '.join(lacking)}")
    pcm = (wav[0].clamp(-1, 1) * 32767).round().to(torch.int16).numpy().tobytes()
    try:
        for set_pass in (lambda: decoder.set_align_text(" ".join(words)), decoder.set_alignment):
            set_pass()
            decoder.reinit_feat()  # else noise is estimated from the clips before, too
            decoder.start_utt()
            decoder.process_raw(pcm, full_utt=True)
            decoder.end_utt()
    except RuntimeError:
        raise ValueError("the text does not fit the audio") from None
    phones = []
    for phone in (phone for word in decoder.get_alignment() for phone in word):
        edges = phone.start / FRAME_RATE, (phone.start + phone.duration) / FRAME_RATE
        phones.append((*edges, "SIL" if phone.name.startswith("+") else phone.name))
    return phones


def align_all(recordings: list[Recording]) -> tuple[dict[str, Phones], dict[str, list[str]]]:
    """{name: phones} of what can be aligned, and {reason: names} of what cannot."""
    decoder = load_decoder()
    aligned, left_out = {}, {}
    for recording in tqdm(recordings, desc="phones", unit="clip", disable=None):
        try:
            words = split_words(recording.text or "")
            if not words:
                raise ValueError("no text")
            wav = load_audio(recording.path, SAMPLE_RATE)  # [1, L]
            aligned[recording.name] = align(decoder, wav, words)
        except ValueError as error:
            left_out.setdefault(str(error), []).append(recording.name)
    return aligned, left_out


def print_left_out(left_out: dict[str, list[str]]) -> None:
    """A line for each of the most common reasons, on stderr."""
    reasons = sorted(left_out.items(), key=lambda item: -len(item[1]))
    for reason, names in reasons[:MAX_REASONS]:
        more = ", ..." if len(names) > MAX_NAMES else ""
        shown = ", ".join(names[:MAX_NAMES]) + more
        print(f"left out {len(names)}, {reason} ({shown})", file=sys.stderr)
    if rest := sum(len(names) for _, names in reasons[MAX_REASONS:]):
        print(f"left out {rest} for other reasons like these", file=sys.stderr)


def main() -> None:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("--audio", required=True, help="JSONL manifest of recordings with texts")
    parser.add_argument("--split", choices=SPLITS, help="default: test, or valid without splits")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="where to write them")
    parser.add_argument("--force", action="store_true", help="overwrite --out")
    args = parser.parse_args()

    out = Path(args.out)
    if out.is_dir() or (out.exists() and not args.force):
        hint = "name a file in it" if out.is_dir() else "choose another --out or pass --force"
        raise ValueError(f"{out}: already exists; {hint}")
    args.split = args.split or default_split(args.audio, "valid")
    recordings = find_split(args.audio, args.split)
    if not any(recording.text for recording in recordings):
        raise ValueError(f'{args.audio}, {args.split}: no recording has a "text" to align')
    aligned, left_out = align_all(recordings)
    print_left_out(left_out)
    if not aligned:
        raise ValueError(f"none of {len(recordings)} recordings could be aligned: see above")
    with atomic_write(out) as file:
        for name, phones in aligned.items():
            file.write(json.dumps({"name": name, "phones": phones}, ensure_ascii=False) + "\n")
    print(f"wrote {out}: phones of {len(aligned)} of {len(recordings)} recordings")


if __name__ == "__main__":
    run_cli(main)
