"""Sounds for the page of `scripts.demo`: made one after the other, heard while they are made."""

import shutil
import tempfile
import threading
import time
import uuid
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.files import atomic_write
from data.audio import WavStream, audio_seconds
from model.checkpoint import find_checkpoint, list_checkpoints, read_state
from model.pipeline import STREAM_SECONDS, Chunks, Models, decode_stream, generate_codes
from model.stages import STAGES
from scripts.cli import find_device
from scripts.figures import spectrogram_png
from scripts.sample import describe, load_models, make_request, write_clips
from scripts.sample_options import (
    DEFAULT_TEMPERATURES,
    check_request,
    read_samplings,
    sample_parser,
)

NONE = "(none)"
NUM_KEPT = 8  # finished sounds that can still be fetched
NUM_WAITING = 4  # sounds, the one being made among them


class Sound:
    """A wav that grows: written by the thread that makes it, read by any number of listeners."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.changed, self.done, self.seconds = threading.Condition(), False, 0.0
        self.result: dict[str, Any] | Exception | None = None

    def write(self, data: bytes) -> None:  # a file's methods, for `WavStream`
        with self.changed:
            self.parts.append(data)
            self.changed.notify_all()

    def flush(self) -> None:
        pass

    def finish(self, result: dict[str, Any] | Exception) -> None:
        with self.changed:
            self.result, self.done = result, True
            self.changed.notify_all()

    def __iter__(self) -> Iterator[bytes]:
        """From its beginning; waits for what is still to come."""
        n = 0
        while True:
            with self.changed:
                self.changed.wait_for(lambda n=n: self.done or len(self.parts) > n)
                fresh, n = self.parts[n:], len(self.parts)
            yield from fresh
            if self.done and n == len(self.parts):
                return


class Studio:
    """The runs that were given, the models that were used last, and the sounds being made."""

    def __init__(self, parsed: Namespace):
        self.parsed, self.sounds, self.closing = parsed, {}, False
        self.lock, self.busy = threading.Lock(), threading.Lock()  # of `sounds`, of the models
        self.threads: list[threading.Thread] = []
        self.choices = find_choices(parsed.runs)
        self.folder = Path(tempfile.mkdtemp(prefix="mini-audiolm-"))
        self.loaded: tuple[tuple, Models] | None = None

    def close(self) -> None:
        """End what is being made, after its chunk, and remove everything."""
        self.closing = True
        with self.lock:
            sounds, threads = [*self.sounds.values()], [*self.threads]
        for sound in sounds:
            if not sound.done:
                sound.finish(ValueError("the server was ended"))
        for thread in threads:
            thread.join(timeout=30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self, **wanted: Any) -> str:
        """Make a sound in a thread of its own. ValueError, before: what cannot be."""
        name = uuid.uuid4().hex
        arguments = self.arguments(name, **wanted)
        check_request(arguments)
        self.check_prompt(arguments.prompt)
        sound, samplings = Sound(), read_samplings(arguments)
        thread = threading.Thread(
            target=self._make, args=(arguments, samplings, sound), daemon=True
        )
        with self.lock:
            done = [old for old, sound in self.sounds.items() if sound.done]
            if len(self.sounds) - len(done) >= NUM_WAITING:
                raise ValueError(f"{NUM_WAITING} sounds are waiting already: try again in a while")
            for old in done[: max(0, len(done) - NUM_KEPT + 1)]:
                del self.sounds[old]
                shutil.rmtree(self.folder / old, ignore_errors=True)
            self.sounds[name] = sound
            self.threads = [old for old in self.threads if old.is_alive()] + [thread]
        thread.start()
        return name

    def check_prompt(self, prompt: str | None) -> None:
        """ValueError: it cannot be read, or is too long."""
        most = self.parsed.max_prompt_seconds
        if prompt and (seconds := audio_seconds(prompt)) > most:
            raise ValueError(f"the prompt is {seconds:.0f} s long: at most {most} s")

    def arguments(self, name: str, **wanted: Any) -> Namespace:
        """As scripts.sample would read them."""
        out, words = self.folder / name / "out.wav", []
        given = [stage for stage in STAGES if wanted.get(stage) not in (None, NONE)]
        for stage in given:
            words += [f"--{stage}", wanted[stage]]
        if wanted.get("prompt"):
            words += ["--prompt", wanted["prompt"]]
        chosen = DEFAULT_TEMPERATURES | wanted["temperature"]
        if given:
            words += ["--temperature", *(f"{stage}={chosen[stage]}" for stage in given)]
        for option in ("seconds", "seed", "top_k", "top_p"):
            words += [f"--{option.replace('_', '-')}", str(wanted[option])]
        for option in ("device", "decoding", "precision", "attention"):
            if getattr(self.parsed, option) is not None:
                words += [f"--{option}", getattr(self.parsed, option)]
        arguments = sample_parser().parse_args([*words, "--out", str(out)])
        if arguments.seconds > self.parsed.max_seconds:
            raise ValueError(f"at most {self.parsed.max_seconds:g} s at a time (--max-seconds)")
        return arguments

    def models(self, arguments: Namespace) -> Models:
        """Loaded once for as long as the choice stays."""
        key = tuple(getattr(arguments, stage) for stage in STAGES), bool(arguments.prompt)
        if self.loaded is None or self.loaded[0] != key:
            self.loaded = None  # the old ones leave before the new ones come
            self.loaded = key, load_models(arguments, find_device(arguments.device))
        return self.loaded[1]

    def _make(self, arguments: Namespace, samplings: dict, sound: Sound) -> None:
        try:
            with self.busy:  # one at a time
                if not self.closing:
                    sound.finish(self._sample(arguments, samplings, sound))
        except Exception as error:  # whatever it is, somebody waits for it
            sound.finish(error)

    @torch.no_grad()
    def _sample(self, arguments: Namespace, samplings: dict, sound: Sound) -> dict[str, Any]:
        models = self.models(arguments)
        request, prompt = make_request(arguments, models)
        chunks = None if models.collapsed else Chunks.of_seconds(models, *STREAM_SECONDS)
        began, stream, parts = time.perf_counter(), None, []
        for (fresh,) in decode_stream(models, generate_codes(models, request, samplings, chunks)):
            parts.append(fresh.cpu())
            stream = stream or WavStream(sound, models.codec.sample_rate)
            stream.write(parts[-1])
            sound.seconds += parts[-1].shape[1] / models.codec.sample_rate
            if self.closing:
                raise ValueError("the server was ended")
        wav, elapsed = torch.cat(parts, dim=1), time.perf_counter() - began
        record = describe(arguments, models, request, samplings) | {"complete": True}
        write_clips(arguments, models, prompt, [wav], record)
        out = Path(arguments.out)
        made = wav.shape[1] / models.codec.sample_rate
        made -= request.codes[0].shape[1] / models.codec.frame_rate  # what was given
        return {
            "wav": str(out),
            "settings": str(out.with_suffix(".json")),
            "spectrogram": save_spectrogram(out.with_suffix(".png"), wav, models),
            "said": f"{made:.1f} s made, {made / elapsed:.1f} x real time",
        }


def save_spectrogram(path: Path, wav: Tensor, models: Models) -> str:
    with atomic_write(path, "wb") as file:
        file.write(spectrogram_png(wav, models.codec.sample_rate))
    return str(path)


def find_choices(runs: list[str]) -> dict[str, list[str]]:
    """Stage -> its runs, and their checkpoints. ValueError: none can make a sound."""
    choices: dict[str, list[str]] = {stage: [] for stage in STAGES}
    for run in runs:
        stage = read_state(find_checkpoint(run, prefer_best=True))["spec"]["name"]
        choices[stage] += [run, *(str(folder) for folder in list_checkpoints(run))]
    whole = choices["acoustic"] or (choices["coarse"] and choices["fine"])
    if not choices["semantic"] or not whole:
        there = ", ".join(stage for stage in STAGES if choices[stage]) or "none"
        raise ValueError(
            "a sound takes a semantic run, and coarse and fine ones or an acoustic one; there are: "
            f"{there}"
        )
    return choices
