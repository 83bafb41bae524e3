"""Token folders: what prepare writes once and training memory-maps. The format is this file.

    header.json          tokenizers, shards and totals; written last: without it nothing is finished
    shard-00000.bin      uint16; for each clip semantic_tokens [T_s], then codes [K, T] row by row
    shard-00000.jsonl    one clip a line: where it lies in the .bin, its split, speaker, text
    skipped.jsonl        {"name", "reason"} of every recording that is not in the shards

At 50 frames/s and 8 codebooks an hour of audio takes 3.2 MB.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from configs.files import atomic_write, write_json

VERSION = 1
HEADER_FILE = "header.json"
SKIPPED_FILE = "skipped.jsonl"
UINT16 = np.dtype("<u2")  # little-endian on every machine
REMEDY = "copy the folder again or rerun scripts.prepare"


@dataclass(frozen=True)
class ClipInfo:
    name: str
    split: str
    speaker: str | None
    text: str | None
    duration: float


@dataclass(frozen=True)
class EncodedClip(ClipInfo):
    """A clip on its way to a shard: semantic_tokens [T_s] and codes [K, T], any integer type."""

    semantic_tokens: np.ndarray
    codes: np.ndarray


@dataclass(frozen=True)
class Clip(ClipInfo):
    """One clip of a token folder; `offset` counts uint16 numbers from the start of its shard."""

    offset: int
    num_semantic: int
    num_frames: int
    shard: int = 0


def shard_file(folder: str | Path, index: int, suffix: str = "jsonl") -> Path:
    """A file of shard `index`; its .jsonl is written last and says that the shard is finished."""
    return Path(folder) / f"shard-{index:05d}.{suffix}"


def write_shard(
    folder: str | Path, index: int, clips: Iterable[EncodedClip], skipped: Iterable[dict]
) -> None:
    """Write shard `index`: .bin, then its list of skipped recordings, then .jsonl as the commit.

    ValueError: a token outside uint16.
    """
    offset, lines = 0, []
    with atomic_write(shard_file(folder, index, "bin"), "wb") as file:
        for clip in clips:
            semantic = _to_uint16(clip.semantic_tokens, f"{clip.name}: semantic tokens")  # [T_s]
            codes = _to_uint16(clip.codes, f"{clip.name}: codes")  # [K, T]
            file.write(semantic.tobytes() + codes.tobytes())
            line = {key: getattr(clip, key) for key in ("name", "split", "speaker", "text")}
            line |= {"duration": round(clip.duration, 4), "offset": offset}
            line |= {"num_semantic": semantic.shape[0], "num_frames": codes.shape[1]}
            lines.append(line)
            offset += semantic.size + codes.size
    write_lines(_skip_list(folder, index), skipped)
    write_lines(shard_file(folder, index), lines)


def write_header(
    folder: str | Path, codec: dict, semantic: dict, num_shards: int, repeated: Iterable[dict] = ()
) -> None:
    """Finish a token folder: gather skipped.jsonl (`repeated` first), then write header.json.

    `codec` and `semantic` are the tokenizers' own facts, see `TokenFolder`. ValueError: not one
    clip in the shards.
    """
    folder = Path(folder)
    skipped, shards, clips = list(repeated), [], []
    for index in range(num_shards):
        found, file = read_lines(shard_file(folder, index)), shard_file(folder, index, "bin")
        size = file.stat().st_size
        shards.append({"name": file.stem, "num_clips": len(found), "num_bytes": size})
        clips += found
        skipped += read_lines(_skip_list(folder, index))
    write_lines(folder / SKIPPED_FILE, skipped)
    if not clips:
        raise ValueError(
            f"{folder}: none of the {len(skipped)} recordings could be used; the reasons are in "
            f"{folder / SKIPPED_FILE}"
        )
    header = {"version": VERSION, "codec": codec, "semantic": semantic, "shards": shards}
    header["totals"] = _totals(clips, num_skipped=len(skipped))
    write_json(folder / HEADER_FILE, header)
    for index in range(num_shards):  # gathered above
        _skip_list(folder, index).unlink(missing_ok=True)


class TokenFolder:
    """A finished token folder, read through memory maps that each process opens for itself.

    Attributes: `header` (dict), `codec` and `semantic` (what header.json says of the tokenizers:
    name, sample_rate, hop_length, frame_rate, num_codebooks, codebook_size, num_tokens,
    fingerprint), `num_codebooks`, `all_clips`. ValueError names what is wrong and the remedy: no
    header, another version, a shard whose files are missing or do not fit each other.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        self.codec: dict = self.header["codec"]
        self.semantic: dict = self.header["semantic"]
        self.num_codebooks: int = self.codec["num_codebooks"]
        self.all_clips: list[Clip] = []
        for index in range(len(self.header["shards"])):
            self.all_clips += self._read_index(index)
        self._maps: dict[int, np.ndarray] = {}

    def clips(self, split: str) -> list[Clip]:
        """The clips of `split` in the order of the shards. ValueError: there are none."""
        found = [clip for clip in self.all_clips if clip.split == split]
        if not found:
            there = ", ".join(sorted({clip.split for clip in self.all_clips}))
            raise ValueError(f"{self.folder}: no clips of split {split!r}, it has {there}")
        return found

    def read(self, clip: Clip) -> tuple[np.ndarray, np.ndarray]:
        """semantic_tokens [T_s] and codes [K, T] of a clip, as uint16 views of the file."""
        if clip.shard not in self._maps:
            path = shard_file(self.folder, clip.shard, "bin")
            self._maps[clip.shard] = np.memmap(path, dtype=UINT16, mode="r")
        end = clip.offset + clip.num_semantic
        flat = self._maps[clip.shard][clip.offset : end + self.num_codebooks * clip.num_frames]
        semantic_tokens, codes = flat[: clip.num_semantic], flat[clip.num_semantic :]
        return semantic_tokens, codes.reshape(self.num_codebooks, clip.num_frames)  # [K * T]

    def __getstate__(self) -> dict:
        """Data-loader workers get the path, not a copy of the mapped numbers."""
        return {**self.__dict__, "_maps": {}}

    def _read_index(self, index: int) -> list[Clip]:
        lines = read_lines(shard_file(self.folder, index))
        clips = [Clip(**line, shard=index) for line in lines]
        tokens = sum(clip.num_semantic + self.num_codebooks * clip.num_frames for clip in clips)
        path = shard_file(self.folder, index, "bin")
        size = path.stat().st_size if path.is_file() else 0
        if size != (expected := tokens * UINT16.itemsize):
            found = f"{size} bytes, its .jsonl describes {expected} (truncated or replaced?)"
            raise ValueError(f"{path}: {found}; {REMEDY}")
        return clips


def read_header(folder: str | Path) -> dict:
    """header.json of a token folder. ValueError: none there, not JSON, or of another version."""
    path = Path(folder) / HEADER_FILE
    if not Path(folder).exists():
        make = f"`python -m scripts.prepare --audio ... --out {folder}` makes one"
        raise ValueError(f"{folder}: no such folder of tokens; {make}")
    if not path.is_file():
        raise ValueError(
            f"{folder}: no {HEADER_FILE}, so not a finished token folder; rerun "
            f"`python -m scripts.prepare --audio ... --out {folder}` until it says prepared"
        )
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        version = header["version"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: damaged; rerun scripts.prepare with another --out") from None
    if version != VERSION:
        raise ValueError(f"{path}: format {version}, this code reads {VERSION}; prepare again")
    return header


def semantic_rate(codec: dict, semantic: dict) -> Fraction:
    """Semantic tokens per codec frame, exactly, of the tokenizers that a header describes."""
    frame_rate = Fraction(codec["sample_rate"], codec["hop_length"])
    return Fraction(semantic["frame_rate"]).limit_denominator(1_000_000) / frame_rate


def unigram_counts(
    folder: TokenFolder, split: str = "train", collapse: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """How often each token occurs in `split`: [num_tokens] and [K, codebook_size] int64.

    Its entropy is the loss of the best model that ignores all context: the baseline to beat.
    `collapse` drops repeats of semantic tokens.
    """
    semantic = np.zeros(folder.semantic["num_tokens"], dtype=np.int64)
    codes = np.zeros((folder.num_codebooks, folder.codec["codebook_size"]), dtype=np.int64)
    for clip in folder.clips(split):
        clip_semantic, clip_codes = folder.read(clip)
        if collapse:
            clip_semantic = clip_semantic[np.diff(clip_semantic, prepend=-1) != 0]
        semantic += np.bincount(clip_semantic, minlength=len(semantic))
        for counts, row in zip(codes, clip_codes, strict=True):
            counts += np.bincount(row, minlength=len(counts))
    return semantic, codes


def write_lines(path: Path, entries: Iterable[dict]) -> None:
    """One JSON object a line, atomically."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def read_lines(path: Path) -> list[dict]:
    """What `write_lines` wrote. ValueError: missing or damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; {REMEDY}") from None
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); {REMEDY}") from None


def _skip_list(folder: str | Path, index: int) -> Path:
    file = shard_file(folder, index, "skipped.jsonl")
    return file.with_name(f".{file.name}")


def _to_uint16(tokens: np.ndarray, what: str) -> np.ndarray:
    if tokens.size and (tokens.min() < 0 or tokens.max() > np.iinfo(UINT16).max):
        raise ValueError(f"{what} from {tokens.min()} to {tokens.max()} do not fit uint16")
    return tokens.astype(UINT16)


def _totals(clips: list[dict], num_skipped: int) -> dict:
    def total(key: str, split: str | None = None) -> float:
        return round(sum(clip[key] for clip in clips if split in (None, clip["split"])), 4)

    splits = Counter(clip["split"] for clip in clips)
    return {
        "num_clips": len(clips),
        "num_skipped": num_skipped,
        "num_speakers": len({clip["speaker"] for clip in clips} - {None}),
        "num_unknown_speaker": sum(clip["speaker"] is None for clip in clips),
        "seconds": total("duration"),
        "num_semantic": total("num_semantic"),
        "num_frames": total("num_frames"),
        "splits": {
            split: {"num_clips": splits[split], "seconds": total("duration", split)}
            for split in sorted(splits)
        },
    }
