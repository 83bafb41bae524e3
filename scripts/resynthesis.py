"""Recordings, batch by batch: through the codec, and drawn anew from their semantic tokens."""

import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.audio import Recording, audio_seconds, read_audio, resample, save_audio
from model.drawing import Sampling
from model.pipeline import Models, decode_stream, generate_codes, resynthesis
from scripts.encoding import cut_batches
from scripts.sample import check_collapsed, encode_prompt
from scripts.speech_metrics import SAMPLE_RATE

VERSIONS = ("original", "reconstruction", "resynthesis")


class Resynthesis:
    """Iterates over ({version: wav [L] at SAMPLE_RATE}, text) of each recording, by length.

    Remembers what it has passed: `clips`, those `skipped`, the `seconds` that sampling took.
    """

    def __init__(
        self,
        models: Models,
        recordings: list[Recording],
        samplings: dict[str, Sampling],
        seed: int,
        batch_seconds: float,
        wavs: str | None = None,
    ):
        self.models, self.samplings, self.seed, self.wavs = models, samplings, seed, wavs
        self.clips, self.skipped, self.seconds = [], [], 0.0
        lengths, readable = {}, []
        for recording in recordings:
            try:
                lengths[recording.name] = audio_seconds(recording.path)
                if not lengths[recording.name]:
                    raise ValueError(f"{recording.path}: empty")
                readable.append(recording)
            except ValueError as error:
                self._skip(recording, error)
        self.batches = cut_batches(readable, lengths, batch_seconds)

    def __iter__(self) -> Iterator[tuple[dict[str, np.ndarray], str | None]]:
        for batch in self.batches:
            found = []
            for recording in batch:
                try:
                    prompt = encode_prompt(str(recording.path), None, self.models)
                    seconds = prompt.codes.shape[1] / self.models.codec.frame_rate
                    check_collapsed(self.models, seconds, "its length")
                    found.append((recording, prompt))
                except ValueError as error:
                    self._skip(recording, error)
            if not found:
                continue
            seeds = [clip_seed(self.seed, recording.name) for recording, _ in found]
            prompts = [prompt for _, prompt in found]
            started = time.perf_counter()
            try:
                request = resynthesis(self.models, prompts, seeds)
                codes = generate_codes(self.models, request, self.samplings)
                parts = zip(*decode_stream(self.models, codes), strict=True)
                made = [torch.cat(clip, dim=1) for clip in parts]
            except torch.OutOfMemoryError:
                raise ValueError(
                    "--batch-seconds: too much for this GPU's memory; pass less"
                ) from None
            self.seconds += time.perf_counter() - started
            for (recording, prompt), wav, seed in zip(found, made, seeds, strict=True):
                yield self._finish(recording, prompt.codes, wav, seed), recording.text

    def _finish(
        self, recording: Recording, true_codes: Tensor, made: Tensor, seed: int
    ) -> dict[str, np.ndarray]:
        """What was made [1, L], beside the original and its codes [K, T] decoded; kept as files
        where asked for."""
        codec, wavs = self.models.codec, {"original": read_audio(recording.path)}
        again = codec.decode(true_codes[None].to(self.models.device))[0]  # [1, L]
        for version, wav in zip(VERSIONS[1:], (again, made), strict=True):
            wavs[version] = wav.cpu(), codec.sample_rate
        clip = {key: getattr(recording, key) for key in ("name", "speaker", "text")}
        clip |= {"seed": seed, "seconds": {v: w.shape[1] / rate for v, (w, rate) in wavs.items()}}
        self.clips.append(clip)
        if self.wavs:
            for version, (wav, rate) in wavs.items():
                save_audio(wav_file(self.wavs, recording.name, version), wav, rate)
        return {v: resample(wav, rate, SAMPLE_RATE)[0].numpy() for v, (wav, rate) in wavs.items()}

    def _skip(self, recording: Recording, error: ValueError) -> None:
        self.skipped.append({"name": recording.name, "reason": str(error)})


def clip_seed(seed: int, name: str) -> int:
    """A clip's own, whatever else is measured with it; scripts.sample --seed takes it as well."""
    return int.from_bytes(sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def wav_file(folder: str, name: str, version: str) -> Path:
    """folder/a/b-version.wav for a recording a/b.flac; inside of `folder` whatever the name."""
    path = Path(
        folder, *(part for part in Path(name).parts if part not in (Path(name).anchor, ".."))
    )
    return path.with_name(f"{path.stem}-{version}.wav")


def check_wavs(folder: str, recordings: list[Recording]) -> None:
    """ValueError if a wav would replace a recording, or another's wav."""
    sources = {recording.path.resolve() for recording in recordings}
    names = {recording.name for recording in recordings}
    files = {wav_file(folder, name, v).resolve() for name in names for v in VERSIONS}
    if files & sources or len(files) < len(names) * len(VERSIONS):
        raise ValueError(f"--wavs {folder}: would replace a recording, or two clips share a name")
