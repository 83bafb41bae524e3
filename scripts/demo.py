"""A page on this machine: give a voice, choose checkpoints, and hear the sound as it is made."""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.files import atomic_write
from data.audio import WavStream
from model.checkpoint import find_checkpoint, list_checkpoints, read_state
from model.pipeline import STREAM_SECONDS, Chunks, Models, decode_stream, generate_codes
from model.stages import STAGES
from scripts.cli import find_device, make_parser, run_cli
from scripts.figures import spectrogram_png
from scripts.sample import describe, load_models, make_request, write_clips
from scripts.sample_options import (
    DEFAULT_TEMPERATURES,
    add_device_options,
    check_request,
    read_samplings,
    sample_parser,
)

EXAMPLES = """\
  python -m scripts.demo demo/runs/semantic demo/runs/coarse demo/runs/fine
  python -m scripts.demo runs/semantic runs/acoustic --port 8000 --max-seconds 60"""
NONE = "(none)"
# An <audio> element waits until it believes that it will not have to wait again. This plays what
# comes as it comes, a wav of 16 bits and one channel, as `WavStream` sends it.
HEAR = """\
async (name) => {
  if (window.hearing) window.hearing.close();
  const context = window.hearing = new AudioContext();
  window.heard = 0;
  const reader = (await fetch("sound/" + name)).body.getReader();
  let bytes = new Uint8Array(0), rate = 0, at = 0;
  const play = async () => {
    for (let read = await reader.read(); !read.done; read = await reader.read()) {
      const joined = new Uint8Array(bytes.length + read.value.length);
      joined.set(bytes);
      joined.set(read.value, bytes.length);
      bytes = joined;
      if (!rate && bytes.length >= 44) {
        rate = new DataView(bytes.buffer).getUint32(24, true);
        bytes = bytes.slice(44);
      }
      const length = rate ? bytes.length >> 1 : 0;
      if (!length || context.state === "closed") continue;
      const buffer = context.createBuffer(1, length, rate), samples = buffer.getChannelData(0);
      const view = new DataView(bytes.buffer, bytes.byteOffset);
      for (let n = 0; n < length; n++) samples[n] = view.getInt16(2 * n, true) / 32768;
      bytes = bytes.slice(2 * length);
      const source = context.createBufferSource();
      source.buffer = buffer;
      source.connect(context.destination);
      at = Math.max(at, context.currentTime + 0.05);
      source.start(at);
      at += buffer.duration;
      window.heard += buffer.duration;
    }
  };
  play();
}"""
FRAME = "border:1px solid;border-radius:6px;padding:2px 12px;margin-bottom:8px"
STOP = f'<button onclick="window.hearing.close()" style="{FRAME}">stop playing</button>'
# nothing of the page is fetched from anywhere else
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
NUM_KEPT = 8  # sounds that can still be fetched


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
        self.parsed, self.sounds, self.lock = parsed, {}, threading.Lock()
        self.choices = find_choices(parsed.runs)
        self.folder = Path(tempfile.mkdtemp(prefix="mini-audiolm-"))
        self.loaded: tuple[tuple, Models] | None = None

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self, **wanted: Any) -> str:
        """Make a sound in a thread of its own. ValueError, before: what cannot be."""
        name = uuid.uuid4().hex
        arguments = self.arguments(name, **wanted)
        check_request(arguments)
        samplings = read_samplings(arguments)
        self.sounds[name] = sound = Sound()
        for old in list(self.sounds)[:-NUM_KEPT]:
            del self.sounds[old]
            shutil.rmtree(self.folder / old, ignore_errors=True)
        threading.Thread(target=self._make, args=(arguments, samplings, sound), daemon=True).start()
        return name

    def arguments(self, name: str, **wanted: Any) -> Namespace:
        """As scripts.sample would read them."""
        out, words = self.folder / name / "out.wav", []
        for stage in STAGES:
            if wanted.get(stage) not in (None, NONE):
                words += [f"--{stage}", wanted[stage]]
        if wanted.get("prompt"):
            words += ["--prompt", wanted["prompt"]]
        temperatures = [
            f"{s}={wanted['temperature'].get(s, v)}" for s, v in DEFAULT_TEMPERATURES.items()
        ]
        words += ["--temperature", *temperatures]
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
            with self.lock:  # one at a time
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


def build(studio: Studio) -> Any:
    """The page, as a FastAPI application with its sounds under /sound/NAME."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(studio.folder)  # uploads go when the page does
    import gradio
    from fastapi import FastAPI
    from fastapi.responses import Response, StreamingResponse

    app = FastAPI()

    @app.middleware("http")
    async def keep_to_itself(request: Any, answer: Callable) -> Response:
        response = await answer(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    @app.get("/sound/{name}")
    def listen(name: str) -> Response:
        if name not in studio.sounds:
            return Response(status_code=404)
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(iter(studio.sounds[name]), media_type="audio/wav", headers=headers)

    limits = {
        "max_file_size": f"{studio.parsed.max_upload_mb}mb",
        "allowed_paths": [str(studio.folder)],
    }
    return gradio.mount_gradio_app(app, page(studio, gradio), path="/", **limits)


def page(studio: Studio, gradio: Any) -> Any:
    parsed, given = studio.parsed, {s: c for s, c in studio.choices.items() if c}
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    with gradio.Blocks(title="mini-audiolm", theme=theme, analytics_enabled=False) as blocks:
        gradio.Markdown(
            "# mini-audiolm\nA recording is continued; without one the sound begins anew."
        )
        with gradio.Row():
            with gradio.Column():
                prompt = gradio.Audio(
                    label="prompt", type="filepath", sources=["microphone", "upload"],
                    max_length=parsed.max_prompt_seconds,
                )  # fmt: skip
                most = parsed.max_seconds
                seconds = gradio.Slider(0.5, most, min(5, most), step=0.1, label="seconds")
                seed = gradio.Number(0, label="seed", precision=0)
                with gradio.Accordion("sampling", open=False):
                    temperatures = {
                        s: gradio.Slider(0, 2, DEFAULT_TEMPERATURES[s], label=f"temperature, {s}")
                        for s in given
                    }
                    top_k = gradio.Slider(0, 1024, 0, step=1, label="top-k (0: all)")
                    top_p = gradio.Slider(0.01, 1, 1, label="top-p")
                with gradio.Accordion("checkpoints", open=False):
                    stages = {s: gradio.Dropdown(*starting(s, given), label=s) for s in given}
                button = gradio.Button("Make sound", variant="primary", elem_id="make")
            with gradio.Column():
                player = gradio.HTML(label="as it is made", elem_id="player")
                said = gradio.Markdown(elem_id="said")
                picture = gradio.Image(label="spectrogram", interactive=False, elem_id="picture")
                files = gradio.File(
                    label="wav and settings", file_count="multiple", elem_id="files"
                )
        names = (*(f"temperature {s}" for s in given), *given)
        inputs = [prompt, seconds, seed, top_k, top_p, *temperatures.values(), *stages.values()]
        outputs, name = [player, said, picture, files], gradio.Textbox(visible=False)
        begin, follow = clicked(studio, names, gradio.Error)
        begun = button.click(begin, inputs, [name, *outputs], concurrency_limit=None)
        begun.success(None, name, None, js=HEAR)
        begun.success(follow, name, outputs, concurrency_limit=None)
    return blocks


def starting(stage: str, given: dict[str, list[str]]) -> tuple[list[str], str]:
    """A stage's choices and the first: coarse and fine before an acoustic one."""
    both = {"coarse", "fine"} <= given.keys()
    if stage == "semantic" or not ("acoustic" in given and both):
        return given[stage], given[stage][0]
    return [NONE, *given[stage]], NONE if stage == "acoustic" else given[stage][0]


def clicked(
    studio: Studio, names: tuple[str, ...], failed: type
) -> tuple[Callable[..., tuple], Callable[[str], Iterator[tuple]]]:
    """What the button does: begin, which names the sound; then say how far it is, and show it."""

    def begin(
        prompt: str | None, seconds: float, seed: float, top_k: float, top_p: float, *chosen: Any
    ) -> tuple:
        by_name = dict(zip(names, chosen, strict=True))
        temperature = {
            key.removeprefix("temperature "): value
            for key, value in by_name.items()
            if key.startswith("temperature ")
        }
        stages = {stage: by_name[stage] for stage in STAGES if stage in by_name}
        if stages.get("acoustic", NONE) != NONE:
            stages |= {"coarse": NONE, "fine": NONE}
        numbers = {"seconds": seconds, "seed": int(seed), "top_k": int(top_k), "top_p": top_p}
        try:
            name = studio.begin(prompt=prompt, temperature=temperature, **stages, **numbers)
        except ValueError as error:
            raise failed(str(error)) from None
        return name, STOP, "reading the prompt" if prompt else "starting", None, None

    def follow(name: str) -> Iterator[tuple]:
        sound = studio.sounds[name]
        while not sound.done:
            yield STOP, f"{sound.seconds:.1f} s so far", None, None
            with sound.changed:
                sound.changed.wait(0.5)
        if isinstance(sound.result, Exception):
            raise failed(str(sound.result))
        result, player = sound.result, f'<audio controls src="sound/{name}"></audio>'
        files = [result["wav"], result["settings"]]
        yield STOP + player, result["said"], result["spectrogram"], files

    return begin, follow


def demo_parser() -> ArgumentParser:
    parser = make_parser("Sample in a browser, on this machine.", EXAMPLES)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs of all stages that are needed")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=7860, help="(7860)")
    parser.add_argument("--max-seconds", type=float, default=30.0, help="of new audio (30)")
    parser.add_argument("--max-prompt-seconds", type=int, default=60, help="of a prompt (60)")
    parser.add_argument("--max-upload-mb", type=int, default=20, help="of a file (20)")
    add_device_options(parser)
    return parser


def main() -> None:
    parsed = demo_parser().parse_args()
    if not find_spec("gradio"):
        raise ValueError("the page needs gradio: pip install gradio==5.49.1")
    studio = Studio(parsed)
    import uvicorn  # comes with gradio

    # uvicorn raises what it got once more when it has ended, and the sounds shall go then
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    print(f"http://{parsed.host}:{parsed.port} (Ctrl-C ends it)", flush=True)
    try:
        uvicorn.run(build(studio), host=parsed.host, port=parsed.port, log_level="warning")
    finally:
        studio.close()


if __name__ == "__main__":
    run_cli(main)
