"""Recordings: find them, read them, write them. The only file that touches soundfile.

soundfile (libsndfile) decodes wav, flac, ogg/vorbis, opus and mp3 without ffmpeg; torchaudio
resamples.
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import soundfile
import torch
import torchaudio.functional
from torch import Tensor

from configs.files import atomic_write

AUDIO_SUFFIXES = (".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav")
FOREIGN_SUFFIXES = (".aac", ".amr", ".m4a", ".mp4", ".webm", ".wma")
"""Recordings that libsndfile does not decode: found all the same, so that they are listed."""
SILENT_PEAK = 1e-3
"""A recording that never exceeds this (-60 dB) holds no speech."""
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Recording:
    """One recording as listed: `name` is its path relative to the folder or manifest."""

    name: str
    path: Path
    text: str | None = None
    speaker: str | None = None
    split: str | None = None


def find_recordings(audio: str | Path) -> list[Recording]:
    """List the recordings of a folder (searched recursively) or of a JSONL manifest, by name.

    In a folder, names that begin with a dot are passed over: macOS leaves `._x.wav` beside x.wav.

    A manifest line is an object with `path` (relative to the manifest) and optional `text`,
    `speaker` and `split` (train, valid or test). ValueError: nothing there, or a malformed line.
    """
    audio = Path(audio)
    if audio.is_dir():
        paths = {path.relative_to(audio): path for path in audio.rglob("*")}
        found = [
            Recording(name.as_posix(), path)
            for name, path in paths.items()
            if path.suffix.lower() in AUDIO_SUFFIXES + FOREIGN_SUFFIXES and path.is_file()
            if not any(part.startswith(".") for part in name.parts)
        ]
    elif audio.is_file() and audio.suffix.lower() in AUDIO_SUFFIXES + FOREIGN_SUFFIXES:
        raise ValueError(f"{audio}: a recording; pass the folder it is in, or a JSONL manifest")
    elif audio.is_file():
        found = list(_read_manifest(audio))
    else:
        raise ValueError(f"{audio}: no such folder or manifest; pass --audio FOLDER or FILE.jsonl")
    if not found:
        raise ValueError(f"{audio}: no recordings found (looked for {' '.join(AUDIO_SUFFIXES)})")
    return sorted(found, key=lambda recording: recording.name)


def _read_manifest(manifest: Path) -> Iterator[Recording]:
    try:
        # not splitlines(): a JSON string may hold U+2028, which it takes for the end of a line
        lines = manifest.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{manifest}: not a text file; expected one JSON object a line") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{manifest}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg}); fix or remove the line") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise ValueError(f'{where}: expected an object with a "path", got: {line[:60]}')
        known = {key: entry.get(key) for key in ("text", "speaker", "split")}
        for key, value in known.items():
            if not isinstance(value, str | None):
                raise ValueError(f'{where}: "{key}" must be a string or null')
        if known["split"] not in (None, *SPLITS):
            raise ValueError(f'{where}: split "{known["split"]}" is none of {", ".join(SPLITS)}')
        yield Recording(entry["path"], manifest.parent / entry["path"], **known)


def audio_seconds(path: str | Path) -> float:
    """The length a recording's header gives, without decoding it. ValueError as of `read_audio`."""
    with _open_audio(Path(path)) as file:
        return file.frames / file.samplerate


def read_audio(path: str | Path) -> tuple[Tensor, int]:
    """Decode a recording to wav [1, L] (float32, mono: the channels' mean) and its sample rate.

    ValueError names the file and what is wrong: missing, damaged, cut off, empty, not finite.
    """
    with _open_audio(Path(path)) as file:
        announced, rate = file.frames, file.samplerate
        try:
            samples = file.read(dtype="float32", always_2d=True)  # [L, C]
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{path}: damaged ({_reason(error)})") from None
    wav = torch.from_numpy(samples).mean(dim=1)[None]  # [L, C] -> [1, L]
    if wav.numel() == 0:
        raise ValueError(f"{path}: empty")
    if wav.shape[1] < 0.9 * announced:  # an mp3's header may be a little off; that is no damage
        found = f"{wav.shape[1] / rate:.1f} of {announced / rate:.1f} s can be decoded"
        raise ValueError(f"{path}: damaged ({found})")
    if not torch.isfinite(wav).all():
        raise ValueError(f"{path}: holds NaN or infinite samples")
    return wav, rate


def read_sound(path: str | Path) -> tuple[Tensor, int]:
    """`read_audio`, and a ValueError for what is silent."""
    wav, rate = read_audio(path)
    peak = wav.abs().max().item()
    if peak < SILENT_PEAK:
        raise ValueError(f"{path}: silent (peak {peak:.5f})")
    return wav, rate


def load_audio(path: str | Path, sample_rate: int) -> Tensor:
    """Decode a recording to wav [1, L] at `sample_rate` Hz; errors and the rest: `read_audio`."""
    return resample(*read_audio(path), sample_rate)


def _open_audio(path: Path) -> soundfile.SoundFile:
    if not path.is_file():
        raise ValueError(
            f"{path}: {'a folder, not a recording' if path.is_dir() else 'no such file'}"
        )
    try:
        return soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        reason = _reason(error)
        if path.suffix.lower() in FOREIGN_SUFFIXES:
            reason = f"convert {path.suffix} first: ffmpeg -i {path.name} {path.stem}.flac"
        elif "does not exist" in reason:  # what libsndfile says of an mp3 without a frame in it
            reason = "no audio in it, or its beginning is damaged"
        raise ValueError(f"{path}: cannot be decoded ({reason})") from None


def _reason(error: soundfile.LibsndfileError) -> str:
    return error.error_string.strip().rstrip(".")


def resample(wav: Tensor, rate: int, sample_rate: int) -> Tensor:
    """wav [..., L] at `rate` Hz -> [..., L'] at `sample_rate` Hz, band-limited."""
    if rate == sample_rate or not wav.numel():  # of nothing torchaudio makes an error
        return wav
    return torchaudio.functional.resample(wav, rate, sample_rate)


class WavStream:
    """A wav file of unknown length, written to a pipe as its samples come: 16-bit PCM, mono.

    Says nothing, and goes on, when nobody reads the pipe any more.
    """

    def __init__(self, file: BinaryIO, sample_rate: int):
        self.file, unknown = file, 0xFFFFFFFF
        form = struct.pack("<IHHIIHH", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
        lengths = struct.pack("<I", unknown)
        self._send(b"RIFF" + lengths + b"WAVEfmt " + form + b"data" + lengths)

    def write(self, wav: Tensor) -> None:
        """The next samples, [1, L]; beyond +-1 they are clipped."""
        samples = (wav[0].clamp(-1, 1) * 32767).round().to(torch.int16)
        self._send(samples.cpu().numpy().astype("<i2").tobytes())

    def _send(self, data: bytes) -> None:
        if self.file is None:
            return
        try:
            self.file.write(data)
            self.file.flush()
        except BrokenPipeError:  # what is buffered shall not fail once more when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
            self.file = None


def save_audio(path: str | Path, wav: Tensor, sample_rate: int) -> None:
    """Write wav [C, L] as 16-bit PCM, atomically; samples beyond +-1 are clipped, not wrapped."""
    samples = wav.detach().float().cpu().clamp(-1, 1).T.numpy()  # [C, L] -> [L, C]
    with atomic_write(path, "wb") as file:
        soundfile.write(file, samples, sample_rate, format="WAV", subtype="PCM_16")
