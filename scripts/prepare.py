"""Turn recordings into a token folder, once: training then never touches a waveform.

Interrupted? Run the same command again: finished shards are kept. One process keeps one GPU or all
CPU cores busy; several, one for each GPU, share the shards and write the same bytes.
"""

import hashlib
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from configs.files import write_json
from data.audio import Recording, audio_seconds, find_recordings
from data.shards import (
    HEADER_FILE,
    SKIPPED_FILE,
    EncodedClip,
    read_header,
    read_lines,
    shard_file,
    write_header,
    write_shard,
)
from model.codec import Codec, load_codec
from model.semantic import SemanticTokenizer, load_semantic
from scripts.cli import make_parser, run_cli
from scripts.encoding import Encoder, Machine, Tokens, cut_batches, reason_of

EXAMPLES = """\
  python -m scripts.prepare --audio recordings --out tokens/mine
  python -m scripts.prepare --audio ../shared/corpus/manifest.jsonl --out tokens/corpus
  torchrun --standalone --nproc-per-node 8 -m scripts.prepare --audio recordings --out tokens/b
  python -m scripts.prepare --audio recordings --out tokens/24khz --codec encodec_24khz"""

SETTINGS_FILE = "prepare.json"


@dataclass(frozen=True)
class Options:
    """What shapes the output apart from recordings and tokenizers. ValueError: senseless ones."""

    min_seconds: float = 0.3
    max_seconds: float = 120.0
    valid: float = 0.05
    """Share of the recordings, by speaker or name, that go to split valid unless they have one."""
    test: float = 0.0
    shard_clips: int = 256
    """Recordings per shard: the unit of work, and what an interruption costs at most."""

    def __post_init__(self):
        if not 0 < self.min_seconds <= self.max_seconds:
            given = f"--min-seconds {self.min_seconds} --max-seconds {self.max_seconds}"
            raise ValueError(f"{given}: expected 0 < min <= max")
        if min(self.valid, self.test) < 0 or self.valid + self.test >= 1:
            given = f"--valid {self.valid} --test {self.test}"
            raise ValueError(f"{given}: expected shares that leave some recordings for train")
        if self.shard_clips < 1:
            raise ValueError(f"--shard-clips {self.shard_clips}: expected 1 or more")


def prepare(
    recordings: list[Recording],
    codec: Codec,
    semantic: SemanticTokenizer,
    out: str | Path,
    options: Options | None = None,
    rank: int = 0,
    world: int = 1,
    wait_for_everyone: Callable[[], None] = lambda: None,
    machine: Machine | None = None,
) -> None:
    """Encode this process's shards (those with index % world == rank) into the folder `out`.

    Rank 0 also checks the folder first and finishes it last. ValueError: `out` begun with other
    settings or full of other files, not one usable recording, too small a GPU.
    """
    out, options, show, started = Path(out), options or Options(), rank == 0, time.monotonic()
    tokenizers = tokenizer_facts(codec, semantic)
    recordings, repeated = drop_repeated(recordings)
    if show:
        open_folder(out, settings_of(recordings, tokenizers, options))
    wait_for_everyone()
    if (out / HEADER_FILE).is_file():
        if show:
            print(f"{out} is already prepared, nothing to do\n{describe(out)}")
        return
    size = options.shard_clips
    shards = [recordings[first : first + size] for first in range(0, len(recordings), size)]
    todo = [index for index in range(len(shards)) if not shard_file(out, index).is_file()]
    if show and len(todo) < len(shards):
        print(f"continuing {out}: {len(shards) - len(todo)} of {len(shards)} shards are finished")
    with Encoder(codec, semantic, machine or Machine()) as encoder:
        seconds, reasons = look(shards, options, encoder, show)
        usable = [recording for recording in recordings if recording.name in seconds]
        splits = assign_splits(usable, options.valid, options.test)
        mine = {index: shards[index] for index in todo if index % world == rank}
        encode_shards(mine, encoder, seconds, reasons, splits, out, show)
    wait_for_everyone()
    if show:
        write_header(out, **tokenizers, num_shards=len(shards), repeated=repeated)
        elapsed = time.monotonic() - started
        audio = sum(seconds.get(r.name, 0) for index in todo for r in shards[index])
        print(f"prepared {out} in {elapsed:.0f} s, {audio / elapsed:,.0f} times real time")
        steps = ", ".join(f"{step} {spent:.1f} s" for step, spent in encoder.spent.items())
        print(
            f"  time of all threads (--workers {encoder.machine.workers}): {steps}\n{describe(out)}"
        )


def encode_shards(
    shards: dict[int, list[Recording]],
    encoder: Encoder,
    seconds: dict[str, float],
    reasons: dict[str, str],
    splits: dict[str, str],
    out: Path,
    show: bool,
) -> None:
    """Encode and write `shards` one by one; while one is encoded, the next ones are decoded."""
    usable = ([r for r in shard if r.name in seconds] for shard in shards.values())
    limit = encoder.machine.batch_seconds
    stream = encoder.encode(
        batch for shard in usable for batch in cut_batches(shard, seconds, limit)
    )
    num_files = sum(map(len, shards.values()))
    bar = tqdm(total=num_files, desc="encoding", unit="file", disable=None if show else True)
    for done, (index, shard) in enumerate(shards.items(), start=1):
        found = {r.name: reasons[r.name] for r in shard if r.name in reasons}
        bar.update(len(found))
        while len(found) < len(shard):
            batch = next(stream)
            found |= batch
            bar.update(len(batch))
        clips = [
            EncodedClip(r.name, splits[r.name], r.speaker, r.text, **vars(tokens))
            for r in shard
            if isinstance(tokens := found[r.name], Tokens)
        ]
        skipped = [
            {"name": r.name, "reason": found[r.name]}
            for r in shard
            if isinstance(found[r.name], str)
        ]
        with encoder.clock("writing"):
            write_shard(out, index, clips, skipped)
        if show and bar.disable:
            print(f"shard {done} of {len(shards)}", file=sys.stderr)
    bar.close()


def tokenizer_facts(codec: Codec, semantic: SemanticTokenizer) -> dict[str, dict]:
    """What header.json records of the two tokenizers."""
    codec_keys = "name sample_rate hop_length frame_rate num_codebooks codebook_size fingerprint"
    semantic_keys = "name sample_rate frame_rate num_tokens fingerprint"
    return {
        "codec": {key: getattr(codec, key) for key in codec_keys.split()},
        "semantic": {key: getattr(semantic, key) for key in semantic_keys.split()},
    }


def drop_repeated(recordings: list[Recording]) -> tuple[list[Recording], list[dict]]:
    """The recordings without those whose file was listed before, and skip entries for these."""
    first: dict[str, Recording] = {}
    repeated = []
    for recording in recordings:
        if first.setdefault(os.path.normpath(recording.path), recording) is not recording:
            repeated.append({"name": recording.name, "reason": "listed twice"})
    return list(first.values()), repeated


def settings_of(recordings: list[Recording], tokenizers: dict, options: Options) -> dict:
    """Everything the output depends on, as kept in prepare.json."""
    digest = hashlib.sha256()
    for r in recordings:
        size = r.path.stat().st_size if r.path.is_file() else None
        digest.update(json.dumps([r.name, size, r.speaker, r.split, r.text]).encode())
    return {
        **{kind: "{name} ({fingerprint})".format(**facts) for kind, facts in tokenizers.items()},
        "recordings": f"{len(recordings)} files (names and sizes {digest.hexdigest()[:16]})",
        **asdict(options),
    }


def open_folder(out: Path, settings: dict) -> None:
    """Begin `out` or check that it was begun with these settings; clear what a kill left there.

    ValueError: other settings (named, old and new), or a folder of other files.
    """

    def identity(setting: object) -> str:  # the fingerprint of "name (fingerprint)": a tokenizer
        return str(setting).rpartition(" (")[2]  # may have moved

    path = out / SETTINGS_FILE
    if path.is_file():
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
            changed = [key for key in settings if identity(begun[key]) != identity(settings[key])]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: damaged; delete {out} or choose another --out") from None
        if changed:
            now = "; ".join(f"{key} was {begun[key]}, is now {settings[key]}" for key in changed)
            raise ValueError(f"{out} was begun with other settings: {now}; choose another --out")
        for leftover in out.glob(".*.part"):
            leftover.unlink()
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: holds other files; choose another --out")
    else:
        write_json(path, settings)


def look(
    shards: list[list[Recording]], options: Options, encoder: Encoder, show: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """Name -> length in seconds, and name -> why it is left out, going by the files' headers."""

    def look_at(recording: Recording) -> float | str:
        try:
            length = audio_seconds(recording.path)
            if length == 0:
                raise ValueError("empty")
            if length < options.min_seconds:
                raise ValueError(f"too short ({length:.2f} s)")
            if length > options.max_seconds:
                raise ValueError(f"too long ({length:.1f} s)")
        except ValueError as error:
            return reason_of(error, recording)
        return length

    def look_through(shard: list[Recording]) -> dict[str, float | str]:
        with encoder.clock("looking"):
            return {recording.name: look_at(recording) for recording in shard}

    seconds, reasons = {}, {}
    found = encoder.ahead(lambda shard: encoder.pool.submit(look_through, shard), shards)
    hidden = None if show else True
    for shard in tqdm(found, "looking", len(shards), leave=False, unit="shard", disable=hidden):
        for name, length in shard.items():
            if isinstance(length, str):
                reasons[name] = length
            else:
                seconds[name] = length
    return seconds, reasons


def assign_splits(recordings: list[Recording], valid: float, test: float) -> dict[str, str]:
    """The split of each recording by name; the same whatever the order and the machine.

    1. A split given in the manifest stays. Other recordings of that speaker go to train if it has
       some of the speaker's, else to a split that has.
    2. The others go together by speaker, or alone where the speaker is unknown or the only one;
       such a group's hash in [0, 1) puts it into valid, test or train.
    3. A split that was wanted and got nothing takes a whole group: train the largest, valid and
       test the smallest of train, if that leaves train another. So two recordings are enough.
    """
    splits = {r.name: r.split for r in recordings if r.split}
    homes: dict[str | None, str] = {}
    for split in ("valid", "test", "train"):  # the last one stays
        homes |= {r.speaker: split for r in recordings if r.split == split and r.speaker}
    splits |= {r.name: homes[r.speaker] for r in recordings if not r.split and r.speaker in homes}

    free = [r for r in recordings if r.name not in splits]
    single = len({r.speaker for r in free}) == 1
    groups: dict[str, list[str]] = defaultdict(list)
    for r in free:
        alone = single or r.speaker is None
        groups[f"name {r.name}" if alone else f"speaker {r.speaker}"].append(r.name)
    place = {}
    for key in groups:
        u = _unit_hash(key)
        place[key] = "valid" if u < valid else "test" if u < valid + test else "train"
    by_size = sorted(groups, key=lambda key: (len(groups[key]), _unit_hash(key)))
    if by_size and "train" not in {*splits.values(), *place.values()}:
        place[by_size[-1]] = "train"
    for split, share in (("valid", valid), ("test", test)):
        movable = [key for key in by_size if place[key] == "train"]
        if "train" not in splits.values():
            movable = movable[:-1]
        if share > 0 and movable and split not in {*splits.values(), *place.values()}:
            place[movable[0]] = split
    return splits | {name: place[key] for key, names in groups.items() for name in names}


def describe(out: Path) -> str:
    """Hours, clips, speakers, splits, tokens and skipped recordings of a finished folder."""
    header = read_header(out)
    totals, codec, semantic = header["totals"], header["codec"], header["semantic"]
    who = f"{totals['num_speakers']} speakers ({totals['num_unknown_speaker']} clips: unknown)"
    lines = [f"{totals['seconds'] / 3600:.2f} h in {totals['num_clips']} clips, {who}"]
    for split, part in totals["splits"].items():
        lines.append(f"{split:6} {part['seconds'] / 3600:8.3f} h {part['num_clips']:8} clips")
    frames = f"{totals['num_frames']} frames of {codec['num_codebooks']} codes ({codec['name']})"
    lines.append(f"{totals['num_semantic']} semantic tokens ({semantic['name']}), {frames}")
    if "valid" not in totals["splits"]:
        lines.append("no clip is in split valid: give some recordings that split in a manifest")
    skipped = read_lines(out / SKIPPED_FILE)
    if skipped:
        reasons = Counter(entry["reason"].partition(" (")[0] for entry in skipped).most_common()
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons)
        lines.append(f"{len(skipped)} recordings skipped: {counts}; see {out / SKIPPED_FILE}")
    return "\n".join(f"  {line}" for line in lines)


def _unit_hash(key: str) -> float:
    """[0, 1) from text, the same on every machine and run."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def main() -> None:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("--audio", required=True, help="folder of recordings or JSONL manifest")
    parser.add_argument("--out", required=True, help="token folder to write or to continue")
    codec, semantic = "pretrained/codec_16khz", "pretrained/semantic_hubert"
    parser.add_argument("--codec", default=codec, help="folder (%(default)s) or encodec_24khz")
    parser.add_argument("--semantic", default=semantic, help="folder (%(default)s)")
    parser.add_argument(
        "--min-seconds",
        type=float,
        default=Options.min_seconds,
        help="shorter recordings are left out (%(default)g)",
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=Options.max_seconds,
        help="longer ones, too (%(default)g); a worker needs 9 MiB a second for the longest",
    )
    parser.add_argument("--valid", type=float, default=Options.valid, help="share, default 0.05")
    parser.add_argument("--test", type=float, default=Options.test, help="share, default 0")
    parser.add_argument("--shard-clips", type=int, default=Options.shard_clips)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--workers", type=int, help="threads; default: one for each core")
    parser.add_argument(
        "--batch-seconds", type=float, help="encoded at once; default: 10 on a CPU, 320 on a GPU"
    )
    args = parser.parse_args()

    options = Options(args.min_seconds, args.max_seconds, args.valid, args.test, args.shard_clips)
    recordings = find_recordings(args.audio)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device here; use --device cpu")
    # a process that has finished its shards may wait long for the last one
    cpu = args.device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(days=7))
    # a GPU's convolutions would round to 10 bits (TF32) unasked: not the tokens of a CPU
    torch.backends.cudnn.allow_tf32 = False
    machine = Machine.with_defaults(state.device, args.workers, args.batch_seconds)
    codec, semantic = (
        load_codec(args.codec, state.device),
        load_semantic(args.semantic, state.device),
    )
    rank, world, wait = state.process_index, state.num_processes, state.wait_for_everyone
    if cpu and world > 1:  # accelerate's own asks CUDA, where there is a GPU
        wait = torch.distributed.barrier
    try:
        prepare(recordings, codec, semantic, args.out, options, rank, world, wait, machine)
    except KeyboardInterrupt:
        if rank == 0:
            print("\nrun the same command again to continue", file=sys.stderr)
        raise


if __name__ == "__main__":
    run_cli(main)
