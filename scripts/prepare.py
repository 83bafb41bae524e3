"""Turn recordings into a token folder, once: training then never touches a waveform.

Interrupted? Run the same command again: finished shards are kept. Several processes share the
shards and write the same bytes as one; on a CPU each uses one core, so launch as many as there are.
"""

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from configs.files import atomic_write
from data.audio import SPLITS, Recording, audio_seconds, find_recordings, read_audio, resample
from data.shards import (
    HEADER_FILE,
    SKIPPED_FILE,
    EncodedClip,
    read_header,
    read_lines,
    shard_is_finished,
    shard_name,
    write_header,
    write_shard,
)
from model.codec import Codec, load_codec
from model.semantic import SemanticTokenizer, load_semantic
from scripts.cli import make_parser, run_cli

EXAMPLES = """\
  python -m scripts.prepare --audio recordings --out tokens/mine
  python -m scripts.prepare --audio ../shared/corpus/manifest.jsonl --out tokens/corpus
  accelerate launch --cpu --num_processes 8 -m scripts.prepare --audio recordings --out tokens/b
  python -m scripts.prepare --audio recordings --out tokens/24khz --codec encodec_24khz"""

SETTINGS_FILE = "prepare.json"
SILENT_PEAK = 1e-3
"""A recording that never exceeds this (-60 dB) holds no speech."""


@dataclass(frozen=True)
class Options:
    """What shapes the output apart from recordings and tokenizers."""

    min_seconds: float = 0.3
    max_seconds: float = 120.0
    valid: float = 0.05
    """Share of the recordings, by speaker or name, that go to split valid unless they have one."""
    test: float = 0.0
    shard_clips: int = 256
    """Recordings per shard: the unit of work, and what an interruption costs at most."""


@dataclass(frozen=True)
class Plan:
    """What every process works out alike: why recordings are left out, where the others go."""

    recordings: list[Recording]
    reasons: dict[str, str]
    """Name -> why, for those whose header alone rules them out."""
    seconds: dict[str, float]
    splits: dict[str, str]


def prepare(
    recordings: list[Recording],
    codec: Codec,
    semantic: SemanticTokenizer,
    out: str | Path,
    options: Options | None = None,
    rank: int = 0,
    world: int = 1,
    wait_for_everyone: Callable[[], None] = lambda: None,
    device: str | torch.device = "cpu",
) -> None:
    """Encode this process's shards (those with index % world == rank) into the folder `out`.

    Rank 0 also checks the folder first and finishes it last. ValueError: options that make no
    sense, `out` begun with other settings or full of other files, not one usable recording.
    """
    out, options, started = Path(out), options or Options(), time.monotonic()
    check_options(options)
    tokenizers = tokenizer_facts(codec, semantic)
    unique, repeated = drop_repeated(recordings)
    if rank == 0:
        open_folder(out, settings_of(unique, tokenizers, options))
    wait_for_everyone()
    if (out / HEADER_FILE).is_file():
        if rank == 0:
            print(f"{out} is already prepared, nothing to do\n{describe(out)}")
        return
    num_shards = -(-len(unique) // options.shard_clips)
    todo = [index for index in range(num_shards) if not shard_is_finished(out, index)]
    if rank == 0 and len(todo) < num_shards:
        print(f"continuing {out}: {num_shards - len(todo)} of {num_shards} shards are finished")
    plan = make_plan(unique, options, show=rank == 0)
    encode = Encoder(codec, semantic, device)
    encode_shards([i for i in todo if i % world == rank], plan, options, encode, out, rank == 0)
    wait_for_everyone()
    if rank == 0:
        write_header(out, **tokenizers, num_shards=num_shards, repeated=repeated)
        elapsed = time.monotonic() - started
        clips = [clip for index in todo for clip in read_lines(out / f"{shard_name(index)}.jsonl")]
        speed = sum(clip["duration"] for clip in clips) / elapsed
        print(f"prepared {out} in {elapsed:.0f} s, {speed:.0f} x real time\n{describe(out)}")


def check_options(options: Options) -> None:
    """ValueError names the option that makes no sense."""
    if not 0 < options.min_seconds <= options.max_seconds:
        given = f"--min-seconds {options.min_seconds} --max-seconds {options.max_seconds}"
        raise ValueError(f"{given}: expected 0 < min <= max")
    if min(options.valid, options.test) < 0 or options.valid + options.test >= 1:
        given = f"--valid {options.valid} --test {options.test}"
        raise ValueError(f"{given}: expected shares of the recordings that leave some for train")
    if options.shard_clips < 1:
        raise ValueError(f"--shard-clips {options.shard_clips}: expected 1 or more")


def tokenizer_facts(codec: Codec, semantic: SemanticTokenizer) -> dict[str, dict]:
    """What header.json records of the two tokenizers. ValueError: tokens would not fit uint16."""
    keys = ("name", "sample_rate", "hop_length", "frame_rate", "num_codebooks", "codebook_size")
    facts = {
        "codec": {key: getattr(codec, key) for key in (*keys, "fingerprint")},
        "semantic": {
            key: getattr(semantic, key)
            for key in ("name", "sample_rate", "frame_rate", "num_tokens", "fingerprint")
        },
    }
    if max(codec.codebook_size, semantic.num_tokens) > 65_536:
        raise ValueError(f"{codec.name}, {semantic.name}: more than 65536 tokens do not fit uint16")
    return facts


def drop_repeated(recordings: list[Recording]) -> tuple[list[Recording], list[dict]]:
    """The recordings without those whose file was listed before, and skip entries for these."""
    first: dict[str, Recording] = {}
    repeated = []
    for recording in recordings:
        file = os.path.normpath(recording.path)
        if file in first:
            repeated.append({"name": recording.name, "reason": "listed twice"})
        else:
            first[file] = recording
    return list(first.values()), repeated


def settings_of(recordings: list[Recording], tokenizers: dict, options: Options) -> dict:
    """Everything the output depends on, as kept in prepare.json."""
    digest = hashlib.sha256()
    for r in recordings:
        size = r.path.stat().st_size if r.path.is_file() else None
        digest.update(json.dumps([r.name, size, r.speaker, r.split, r.text]).encode())
    return {
        "codec": "{name} ({fingerprint})".format(**tokenizers["codec"]),
        "semantic": "{name} ({fingerprint})".format(**tokenizers["semantic"]),
        "recordings": f"{len(recordings)} files (names and sizes {digest.hexdigest()[:16]})",
        **asdict(options),
    }


def open_folder(out: Path, settings: dict) -> None:
    """Begin `out` or check that it was begun with these settings; clear what a kill left there.

    ValueError: other settings (named, old and new), or a folder of other files.
    """
    path = out / SETTINGS_FILE
    if path.is_file():
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
            changed = [key for key in settings if _identity(begun[key]) != _identity(settings[key])]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: damaged; delete {out} or choose another --out") from None
        if changed:
            now = "; ".join(f"{key} was {begun[key]}, is now {settings[key]}" for key in changed)
            raise ValueError(f"{out} was begun with other settings: {now}; choose another --out")
        for leftover in out.glob(".*.part"):
            leftover.unlink()
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: holds other files; choose another --out")
    with atomic_write(path) as file:
        file.write(json.dumps(settings, indent=1) + "\n")


def make_plan(recordings: list[Recording], options: Options, show: bool) -> Plan:
    """Read every header: lengths, what is out of question, then the splits of the others."""
    reasons, seconds = {}, {}
    quiet = None if show else True
    for recording in tqdm(recordings, desc="looking", unit="file", disable=quiet, leave=False):
        try:
            length = audio_seconds(recording.path)
        except ValueError as error:
            reasons[recording.name] = _reason(error, recording)
            continue
        if length == 0:
            reasons[recording.name] = "empty"
        elif length < options.min_seconds:
            reasons[recording.name] = f"too short ({length:.2f} s)"
        elif length > options.max_seconds:
            reasons[recording.name] = f"too long ({length:.1f} s)"
        seconds[recording.name] = length
    usable = [recording for recording in recordings if recording.name not in reasons]
    return Plan(recordings, reasons, seconds, assign_splits(usable, options.valid, options.test))


def assign_splits(recordings: list[Recording], valid: float, test: float) -> dict[str, str]:
    """The split of each recording by name; the same whatever the order and the machine.

    1. A split given in the manifest stays. Other recordings of that speaker go to train if it has
       some of the speaker's, else to a split that has.
    2. The others go together by speaker, or alone where the speaker is unknown or the only one;
       such a group's hash in [0, 1) puts it into valid, test or train.
    3. A split that was wanted and got nothing takes a whole group: valid and test the smallest of
       train, if that leaves train another; train the largest. So two recordings are enough.
    """
    splits = {r.name: r.split for r in recordings if r.split is not None}
    homes: dict[str | None, set[str]] = {}
    for r in recordings:
        if r.split is not None and r.speaker is not None:
            homes.setdefault(r.speaker, set()).add(r.split)
    free = [r for r in recordings if r.split is None and r.speaker not in homes]
    for r in recordings:
        if r.split is None and r.speaker in homes:
            splits[r.name] = "train" if "train" in homes[r.speaker] else min(homes[r.speaker])

    single = len({r.speaker for r in free}) == 1
    groups: dict[str, list[str]] = {}
    for r in free:
        alone = single or r.speaker is None
        groups.setdefault(f"name {r.name}" if alone else f"speaker {r.speaker}", []).append(r.name)
    place = {}
    for key in groups:
        u = _unit_hash(key)
        place[key] = "valid" if u < valid else "test" if u < valid + test else "train"
    wanted = [s for s, share in zip(SPLITS, (1, valid, test), strict=True) if share > 0]
    for split in wanted:
        if split in splits.values() or split in place.values():
            continue
        source = [key for key in place if split == "train" or place[key] == "train"]
        source.sort(key=lambda key: (len(groups[key]), _unit_hash(key)))
        if split == "train" and source:
            place[source[-1]] = split
        elif len(source) > 1 or (source and "train" in splits.values()):
            place[source[0]] = split
    return splits | {name: place[key] for key, names in groups.items() for name in names}


class Encoder:
    """Recording -> EncodedClip through both tokenizers, one at a time."""

    def __init__(self, codec: Codec, semantic: SemanticTokenizer, device: str | torch.device):
        self.codec, self.semantic, self.device = codec, semantic, device

    def decode(self, recording: Recording) -> tuple[Tensor, int]:
        """wav [1, L] and its sample rate. ValueError: damaged, empty, not finite or silent."""
        wav, rate = read_audio(recording.path)
        peak = wav.abs().max().item()
        if peak < SILENT_PEAK:
            raise ValueError(f"silent (peak {peak:.5f})")
        return wav, rate

    def __call__(self, recording: Recording, wav: Tensor, rate: int, split: str) -> EncodedClip:
        """wav [1, L] at `rate` Hz, resampled for each tokenizer -> its tokens."""
        tokens = [
            model.encode(resample(wav, rate, model.sample_rate)[None].to(self.device))
            for model in (self.semantic, self.codec)
        ]  # [1, T_s], [1, K, T]
        semantic_tokens, codes = (t[0].cpu().numpy() for t in tokens)
        assert codes.shape[0] == self.codec.num_codebooks
        duration = wav.shape[1] / rate
        who = (recording.name, split, recording.speaker, recording.text)
        return EncodedClip(*who, duration, semantic_tokens, codes)


def encode_shards(
    indices: list[int], plan: Plan, options: Options, encode: Encoder, out: Path, show: bool
) -> None:
    """Encode and write the shards `indices`, each a fixed slice of the sorted recordings."""
    size = options.shard_clips
    slices = {i: plan.recordings[i * size : (i + 1) * size] for i in indices}
    names = [recording.name for shard in slices.values() for recording in shard]
    total = sum(plan.seconds[name] for name in names if name not in plan.reasons)
    bar = tqdm(total=round(total), unit="s", desc="audio", disable=None if show else True)
    done = 0.0
    for number, (index, recordings) in enumerate(slices.items(), start=1):
        clips, skipped = [], []
        for recording in recordings:
            name = recording.name
            try:
                if name in plan.reasons:
                    raise ValueError(plan.reasons[name])
                wav, rate = encode.decode(recording)
            except ValueError as error:
                skipped.append({"name": name, "reason": _reason(error, recording)})
                continue
            clips.append(encode(recording, wav, rate, plan.splits[name]))
            done += plan.seconds[name]
            bar.update(round(done) - bar.n)
        write_shard(out, index, clips, skipped)
        if show and bar.disable:
            progress = f"shard {number} of {len(indices)}, {done:.0f} of {total:.0f} s of audio"
            print(progress, file=sys.stderr)
    bar.close()


def describe(out: Path) -> str:
    """Hours, clips, speakers, splits, tokens and skipped recordings of a finished folder."""
    header = read_header(out)
    totals, codec, semantic = header["totals"], header["codec"], header["semantic"]
    unknown = totals["num_unknown_speaker"]
    lines = [
        f"  {totals['seconds'] / 3600:.2f} h in {totals['num_clips']} clips, "
        f"{totals['num_speakers']} speakers" + (f" ({unknown} clips: unknown)" if unknown else "")
    ]
    for split, part in totals["splits"].items():
        lines.append(f"  {split:6} {part['seconds'] / 3600:8.3f} h {part['num_clips']:8} clips")
    lines += [
        f"  {totals['num_semantic']} semantic tokens ({semantic['name']}, "
        f"{semantic['frame_rate']:g}/s, {semantic['num_tokens']} kinds)",
        f"  {totals['num_frames']} frames of {codec['num_codebooks']} codes ({codec['name']}, "
        f"{codec['frame_rate']:g}/s, {codec['codebook_size']} kinds)",
    ]
    if "valid" not in totals["splits"]:
        lines.append("  no clip is in split valid: give some recordings that split in a manifest")
    if totals["num_skipped"]:
        skipped = read_lines(out / SKIPPED_FILE)
        reasons = Counter(entry["reason"].partition(" (")[0] for entry in skipped).most_common()
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons)
        lines.append(f"  {len(skipped)} recordings skipped: {counts}; see {out / SKIPPED_FILE}")
    return "\n".join(lines)


def _identity(setting: object) -> object:
    """Of a tokenizer, "name (fingerprint)", the fingerprint: a copy elsewhere is the same one."""
    return setting.rpartition(" (")[2] if isinstance(setting, str) else setting


def _reason(error: ValueError, recording: Recording) -> str:
    """Without the path: the same on every machine."""
    return str(error).removeprefix(f"{recording.path}: ")


def _unit_hash(key: str) -> float:
    """[0, 1) from text, the same on every machine and run."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def main() -> None:
    defaults = Options()
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("--audio", required=True, help="folder of recordings or JSONL manifest")
    parser.add_argument("--out", required=True, help="token folder to write or to continue")
    parser.add_argument("--codec", default="pretrained/codec_16khz", help="folder or encodec_24khz")
    parser.add_argument("--semantic", default="pretrained/semantic_mfcc", help="folder")
    parser.add_argument("--min-seconds", type=float, default=defaults.min_seconds)
    parser.add_argument("--max-seconds", type=float, default=defaults.max_seconds)
    parser.add_argument("--valid", type=float, default=defaults.valid, help="share, default 0.05")
    parser.add_argument("--test", type=float, default=defaults.test, help="share, default 0")
    parser.add_argument("--shard-clips", type=int, default=defaults.shard_clips)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args()

    options = Options(args.min_seconds, args.max_seconds, args.valid, args.test, args.shard_clips)
    check_options(options)
    recordings = find_recordings(args.audio)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device here; use --device cpu")
    # a process that has finished its shards may wait long for the last one
    state = PartialState(cpu=args.device == "cpu", timeout=timedelta(days=7))
    device = state.device
    if device.type == "cpu":
        # more threads add in another order, which changes a code now and then; processes scale
        torch.set_num_threads(1)
    codec, semantic = load_codec(args.codec, device), load_semantic(args.semantic, device)
    rank, world, wait = state.process_index, state.num_processes, state.wait_for_everyone
    try:
        prepare(recordings, codec, semantic, args.out, options, rank, world, wait, device)
    except KeyboardInterrupt:
        if rank == 0:
            again = f"{args.out} keeps its finished shards; run the same command again to continue"
            print(f"\n{again}", file=sys.stderr)
        raise


if __name__ == "__main__":
    run_cli(main)
