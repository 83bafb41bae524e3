"""The page: sounds that grow while they are listened to, requests, and a click in a browser."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from world import make_world, save_wav

from data.audio import read_audio, save_audio
from scripts.demo import check_address, clicked, demo_parser, starting
from scripts.studio import NONE, Sound, Studio, find_choices

ROOT = Path(__file__).parent.parent
THREE = ("semantic", "coarse", "fine")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def studio(world):
    made = Studio(parse(world, "--max-seconds", 3))
    yield made
    made.close()
    assert not made.folder.exists()


def parse(world, *words, stages=THREE):
    return demo_parser().parse_args([*(str(world / s) for s in stages), *map(str, words)])


def wanted(world, **changes):
    chosen = {stage: str(world / stage) for stage in THREE}
    numbers = {"seconds": 0.6, "seed": 3, "top_k": 0, "top_p": 1.0}
    return {**chosen, **numbers, "prompt": None, "temperature": {"semantic": 1.5}, **changes}


def test_every_listener_hears_all_of_a_sound_that_is_still_being_made():
    sound, heard = Sound(), [[], []]
    sound.write(b"a")

    def listen(n):
        heard[n] += list(sound)

    threads = [threading.Thread(target=listen, args=(n,)) for n in range(2)]
    threads[0].start()
    sound.write(b"b")
    threads[1].start()
    sound.write(b"c")
    sound.finish({})
    for thread in threads:
        thread.join(timeout=10)
    assert heard == [[b"a", b"b", b"c"]] * 2
    assert list(sound) == [b"a", b"b", b"c"]


def test_a_sound_is_streamed_and_kept_with_its_settings(studio, world):
    name = studio.begin(**wanted(world))
    streamed = b"".join(studio.sounds[name])
    result = studio.sounds[name].result
    wav, rate = read_audio(result["wav"])
    assert rate == 16_000
    assert streamed[:4] == b"RIFF"
    assert len(streamed) == 44 + 2 * wav.shape[1]
    assert 0 < wav.shape[1] <= 0.6 * rate
    settings = json.loads(Path(result["settings"]).read_text())
    assert settings["seeds"] == [3]
    assert settings["sampling"]["semantic"]["temperature"] == 1.5
    assert Path(result["spectrogram"]).read_bytes()[:4] == b"\x89PNG"
    again = studio.begin(**wanted(world))
    assert b"".join(studio.sounds[again]) == streamed


def test_old_sounds_are_forgotten(studio, world, monkeypatch):
    monkeypatch.setattr("scripts.studio.NUM_KEPT", 1)
    for _ in range(3):
        name = studio.begin(**wanted(world, seconds=0.1))
        b"".join(studio.sounds[name])
        while not studio.sounds[name].done:
            threading.Event().wait(0.01)
    assert [*studio.sounds] == [name]
    assert [path.name for path in studio.folder.iterdir()] == [name]


def test_few_wait_and_an_end_is_an_end(world, monkeypatch):
    """What is being made ends after its chunk, what waits is not begun, listeners are told."""
    studio, begun, go_on = Studio(parse(world)), threading.Event(), threading.Event()
    make = studio._sample

    def slow(*arguments):
        begun.set()
        go_on.wait(10)
        return make(*arguments)

    monkeypatch.setattr(studio, "_sample", slow)
    names = [studio.begin(**wanted(world)) for _ in range(4)]
    with pytest.raises(ValueError, match="4 sounds are waiting already"):
        studio.begin(**wanted(world))
    assert begun.wait(10)
    heard = []
    listener = threading.Thread(target=lambda: heard.append(list(studio.sounds[names[3]])))
    listener.start()
    closer = threading.Thread(target=studio.close)
    closer.start()
    listener.join(timeout=10)
    assert heard == [[]]
    go_on.set()
    closer.join(timeout=30)
    assert not closer.is_alive()
    assert not any(thread.is_alive() for thread in studio.threads)
    assert all("was ended" in str(studio.sounds[name].result) for name in names)
    assert not studio.folder.exists()


def test_an_address_that_cannot_be_is_said_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: .*in use; choose another"):
            check_address("127.0.0.1", port)
    with pytest.raises(ValueError, match="--port 99999: "):
        check_address("127.0.0.1", 99999)


def test_a_prompt_is_continued(studio, world, tmp_path):
    prompt = str(save_wav(tmp_path / "p.wav", 0.5))
    name = studio.begin(**wanted(world, prompt=prompt, seconds=0.3))
    samples = (len(b"".join(studio.sounds[name])) - 44) / 2
    assert 0.45 * 16_000 < samples <= 0.8 * 16_000
    assert json.loads(Path(studio.sounds[name].result["settings"]).read_text())["prompt"]


def test_what_goes_wrong_is_said(studio, world, tmp_path):
    class FailedError(Exception):
        pass

    begin, follow = clicked(studio, ("temperature semantic", *THREE), FailedError)
    runs = [str(world / stage) for stage in THREE]
    with pytest.raises(FailedError, match=r"at most 3 s at a time \(--max-seconds\)"):
        begin(None, 4, 0, 0, 1.0, 0.5, *runs)
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    with pytest.raises(FailedError, match=r"bad\.wav: cannot be decoded"):
        begin(str(tmp_path / "bad.wav"), 0.2, 0, 0, 1.0, 0.5, *runs)
    long = str(save_wav(tmp_path / "long.wav", 61))
    with pytest.raises(FailedError, match="the prompt is 61 s long: at most 60 s"):
        begin(long, 0.2, 0, 0, 1.0, 0.5, *runs)
    with pytest.raises(FailedError, match="must be positive"):
        begin(None, None, None, None, None, 0.5, *runs)
    with pytest.raises(FailedError, match="forgotten"):
        list(follow("nobody"))
    silent = tmp_path / "silent.wav"
    save_audio(silent, torch.zeros(1, 16_000), 16_000)
    name, *_ = begin(str(silent), 0.2, 0, 0, 1.0, 0.5, *runs)
    with pytest.raises(FailedError, match=r"silent\.wav: silent"):
        list(follow(name))
    name, *_ = begin(None, 0.2, None, 0, 1.0, 0.5, *runs)
    *_, (player, said, picture, files) = follow(name)
    assert f'src="sound/{name}"' in player
    assert "x real time" in said
    assert picture.endswith(".png")
    assert [Path(file).suffix for file in files] == [".wav", ".json"]


def test_runs_are_sorted_by_what_they_are(world):
    choices = find_choices([str(world / stage) for stage in (*THREE, "acoustic")])
    assert all(choices[stage][0] == str(world / stage) for stage in choices)
    assert choices["coarse"][1].endswith("step-00000001")
    assert starting("semantic", choices) == (choices["semantic"], str(world / "semantic"))
    assert starting("acoustic", choices) == ([NONE, *choices["acoustic"]], NONE)
    alone = {"acoustic": choices["acoustic"], "semantic": choices["semantic"]}
    assert starting("acoustic", alone)[1] == str(world / "acoustic")
    with pytest.raises(ValueError, match="an acoustic one; there are: semantic, coarse"):
        find_choices([str(world / "semantic"), str(world / "coarse")])


def test_an_acoustic_run_replaces_two(world):
    studio = Studio(parse(world, stages=(*THREE, "acoustic")))
    seen = []
    studio.begin = lambda **wanted: seen.append(wanted) or "name"
    names = ("temperature semantic", *THREE, "acoustic")
    begin, _ = clicked(studio, names, ValueError)
    begin(None, 1, 0, 0, 1.0, 0.5, *(str(world / stage) for stage in (*THREE, "acoustic")))
    assert (seen[0]["coarse"], seen[0]["fine"]) == (NONE, NONE)
    assert seen[0]["acoustic"] == str(world / "acoustic")
    studio.close()


def test_without_gradio_one_line_says_what_to_do(world):
    hidden = (
        "import sys; sys.modules['gradio'] = None; import importlib.util as u; f = u.find_spec; "
    )
    hidden += "u.find_spec = lambda n: None if n == 'gradio' else f(n); "
    hidden += "from scripts import demo, cli; cli.run_cli(demo.main)"
    command = [sys.executable, "-c", hidden, *(str(world / stage) for stage in THREE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: the page needs gradio: pip install gradio==5.49.1"


@pytest.fixture
def server(world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = [str(world / stage) for stage in THREE]
    command = [sys.executable, "-u", "-m", "scripts.demo", *runs, "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    address = process.stdout.readline().split()[0]
    assert address == f"http://127.0.0.1:{port}"
    for _ in range(100):
        try:
            urllib.request.urlopen(address, timeout=30)
            break
        except OSError:
            threading.Event().wait(0.3)
    yield address
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM


@pytest.mark.skipif(
    not (find_spec("gradio") and find_spec("playwright") and CHROMIUM),
    reason="needs gradio, playwright and chromium",
)
def test_a_click_is_heard(server):
    """In a browser that may not leave this machine, and need not."""
    from playwright.sync_api import sync_playwright

    fetched, errors = [], []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("requestfinished", lambda request: fetched.append(request.url))
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(server)
        with page.expect_response(lambda answer: "/upload" in answer.url):
            # a format that gradio itself could not read without another program
            page.set_input_files("input[type=file]", ROOT / "data/demo/audio/vm-newuser.opus")
        page.wait_for_selector("#prompt audio, #prompt [data-testid*=waveform]", state="attached")
        page.click("#make")
        page.wait_for_selector("#player audio", timeout=60_000)
        page.wait_for_function("window.heard > 0", timeout=20_000)
        page.wait_for_function("document.querySelector('#player audio').duration > 0")
        heard, length = page.evaluate(
            "[window.heard, document.querySelector('#player audio').duration]"
        )
        assert heard == pytest.approx(length, abs=0.01)
        page.wait_for_selector("#picture img")
        file = page.get_attribute("#files a[href*='out.json']", "href")
        settings = page.evaluate("async (file) => await (await fetch(file)).json()", file)
        assert settings["mode"] == "continuation"
        assert settings["prompt"]["path"].endswith("vm-newuser.opus")
        browser.close()
    assert not errors
    assert all(url.startswith((server, "data:", "blob:")) for url in fetched)
