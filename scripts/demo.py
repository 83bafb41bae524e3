"""A page on this machine: give a voice, choose checkpoints, and hear the sound as it is made."""

import os
import signal
import socket
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from model.stages import STAGES
from scripts.cli import make_parser, run_cli
from scripts.sample_options import DEFAULT_TEMPERATURES, add_device_options
from scripts.studio import NONE, Studio

EXAMPLES = """\
  python -m scripts.demo demo/runs/semantic demo/runs/coarse demo/runs/fine
  python -m scripts.demo runs/semantic runs/acoustic --port 8000 --max-seconds 60"""
LOCAL = ("127.0.0.1", "localhost")
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


def build(studio: Studio) -> Any:
    """The page, as a FastAPI application with its sounds under /sound/NAME."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(studio.folder)  # uploads go when the page does
    import gradio
    from fastapi import FastAPI
    from fastapi.middleware.trustedhost import TrustedHostMiddleware
    from fastapi.responses import Response, StreamingResponse

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if studio.parsed.host in LOCAL:  # another site's page may not ask under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL])

    @app.middleware("http")
    async def keep_to_itself(request: Any, answer: Callable) -> Response:
        response = await answer(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    @app.get("/sound/{name}")
    def listen(name: str) -> Response:
        sound = studio.sounds.get(name)
        if sound is None:
            return Response(status_code=404)
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(iter(sound), media_type="audio/wav", headers=headers)

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
                    label="prompt", type="filepath", sources=["upload", "microphone"],
                    elem_id="prompt",
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
        numbers = {"seconds": seconds or 0, "seed": int(seed or 0)}  # a field may be emptied
        numbers |= {"top_k": int(top_k or 0), "top_p": top_p or 1}
        try:
            name = studio.begin(prompt=prompt, temperature=temperature, **stages, **numbers)
        except ValueError as error:
            raise failed(str(error)) from None
        return name, STOP, "reading the prompt" if prompt else "starting", None, None

    def follow(name: str) -> Iterator[tuple]:
        sound = studio.sounds.get(name)
        if sound is None:
            raise failed("this sound has been forgotten: make it again")
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


def check_address(host: str, port: int) -> None:
    """ValueError: nobody can listen there."""
    try:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: {error}; choose another") from None


def main() -> None:
    parsed = demo_parser().parse_args()
    check_address(parsed.host, parsed.port)
    studio = Studio(parsed)
    # uvicorn raises what it got once more when it has ended, and the sounds shall go then
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        if not find_spec("gradio"):
            raise ValueError("the page needs gradio: pip install gradio==5.49.1")
        import uvicorn  # comes with gradio

        print(f"http://{parsed.host}:{parsed.port} (Ctrl-C ends it)", flush=True)
        app, quiet = build(studio), {"log_level": "warning", "timeout_graceful_shutdown": 3}
        uvicorn.run(app, host=parsed.host, port=parsed.port, **quiet)
    finally:
        studio.close()


if __name__ == "__main__":
    run_cli(main)
