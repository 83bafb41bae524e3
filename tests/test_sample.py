"""The sample command, from checkpoints of random stages and a toy codec to wav files."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import soundfile
import torch

from configs.codec_schema import CodecConfig
from configs.load import load_config
from configs.schema import RunConfig
from data.audio import find_recordings
from model.checkpoint import check_same_tokens, list_checkpoints
from model.codec import Codec
from model.semantic import MfccKMeans
from scripts import prepare
from scripts.sample import sample
from scripts.sample_options import check_request, sample_parser
from train import train

RATE, HOP = 16_000, 320


def save_wav(path, seconds, rate=RATE, channels=1):
    torch.manual_seed(int(seconds * 10))
    tone = torch.sin(torch.arange(int(seconds * rate)) / 20) * torch.rand(int(seconds * rate))
    soundfile.write(path, (0.3 * tone).expand(channels, -1).T.numpy(), rate)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy codec, MFCC tokens, a folder of recordings, and a run of every stage."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    small = {"encoder_filters": 2, "decoder_filters": 2, "num_lstm": 0, "dimension": 8}
    codec = Codec(CodecConfig(num_codebooks=4, codebook_size=16, **small))
    for layer in codec.quantizer.vq.layers:
        layer._codebook.embed.normal_()
    codec.save(root / "codec")
    semantic = MfccKMeans()
    F = semantic.num_features
    semantic.set_codebook(torch.zeros(F), torch.ones(F), torch.randn(12, F))
    semantic.save(root / "mfcc")
    (root / "audio").mkdir()
    for n in range(8):
        save_wav(root / "audio" / f"{n}.wav", 1 + n / 10)
    prepare.prepare(
        find_recordings(root / "audio"),
        prepare.load_codec(str(root / "codec")),
        prepare.load_semantic(str(root / "mfcc")),
        root / "tokens",
    )
    for stage in ("semantic", "coarse", "fine", "acoustic"):
        overrides = [
            f"stage={stage}",
            f"out={root / stage}",
            f"data.tokens={root / 'tokens'}",
            "data.crop_seconds=1.0",
            "num_coarse=2",
            "model={dim: 16, num_layers: 1, num_heads: 2, head_dim: 8}",
            "train={steps: 2, batch_size: 2, save_every: 1, valid_every: 2}",
        ]
        train(load_config(RunConfig, None, overrides))
    return root


def run(world, out, *words, stages=("semantic", "coarse", "fine")):
    flags = [word for name in stages for word in (f"--{name}", str(world / name))]
    arguments = sample_parser().parse_args([*flags, *map(str, words), "--out", str(out)])
    return sample(arguments)


def read(path):
    samples, rate = soundfile.read(path)
    assert rate == RATE
    return samples


def test_unprompted_clips_have_their_own_lengths_and_repeat(world, tmp_path):
    files = run(world, tmp_path / "a.wav", "--num", 6, "--seconds", 1.5, "--seed", 7)
    assert [file.name for file in files] == [f"a-{n}.wav" for n in range(6)]
    lengths = [len(read(file)) for file in files]
    assert all(0 < length <= 1.5 * RATE and length % HOP == 0 for length in lengths)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["mode"] == "unprompted"
    assert record["seeds"] == list(range(7, 13))
    assert record["seconds"] == [length / RATE for length in lengths]
    assert set(record["checkpoints"]) == {"semantic", "coarse", "fine"}
    alone = run(world, tmp_path / "b.wav", "--num", 1, "--seconds", 1.5, "--seed", 9)
    assert (read(alone[0]) == read(files[2])).all()


@pytest.mark.parametrize("stages", [("semantic", "coarse", "fine"), ("semantic", "acoustic")])
def test_no_clip_ends_before_the_seconds_asked_for(stages, world, tmp_path):
    """Across windows, too: the stages know 1 s."""
    words = ("--num", 5, "--seconds", 2.5, "--seed", 7)
    lengths = [len(read(file)) for file in run(world, tmp_path / "a.wav", *words, stages=stages)]
    later = run(world, tmp_path / "b.wav", *words, "--min-seconds", 2, stages=stages)
    later = [len(read(file)) for file in later]
    assert min(lengths) < 1.9 * RATE
    assert min(later) >= 2 * RATE - 2 * HOP  # the acoustic stages may leave out two frames
    assert max(later) <= 2.5 * RATE


def test_a_continuation_keeps_its_prompt(world, tmp_path):
    save_wav(tmp_path / "x.flac", 0.93, rate=44_100, channels=2)
    prompt = ("--prompt", tmp_path / "x.flac", "--prompt-seconds", 0.5)
    for stages in (("semantic", "coarse", "fine"), ("semantic", "acoustic")):
        files = run(world, tmp_path / "c.wav", *prompt, "--num", 2, "--seconds", 1, stages=stages)
        record = json.loads((tmp_path / "c.json").read_text())
        assert record["prompt"]["seconds"] == 0.5
        clips = [read(file) for file in files]
        assert all(0.5 * RATE <= len(clip) <= 1.5 * RATE for clip in clips)
        again = read(tmp_path / record["reconstruction"])
        assert len(again) == len(read(tmp_path / record["original"]))
        # a causal codec decodes the same prompt codes to the same sound, whatever follows
        steady = int(0.4 * RATE)
        assert abs(clips[0][:steady] - clips[1][:steady]).max() < 1e-3


def test_resynthesis_follows_the_recording(world, tmp_path):
    save_wav(tmp_path / "x.wav", 0.8)
    files = run(
        world, tmp_path / "r.wav", "--resynthesize", tmp_path / "x.wav", stages=("coarse", "fine")
    )
    assert 0.75 * RATE <= len(read(files[0])) <= 0.8 * RATE  # ends where its tokens end
    assert json.loads((tmp_path / "r.json").read_text())["mode"] == "resynthesis"


def test_greedy_options_per_stage(world, tmp_path):
    words = ("--seconds", 0.3, "--temperature", "semantic=0", "coarse=0", "fine=0")
    first = run(world, tmp_path / "a.wav", *words, "--seed", 1)
    second = run(world, tmp_path / "b.wav", *words, "--seed", 2)
    assert (read(first[0]) == read(second[0])).all()


@pytest.mark.parametrize(
    ("words", "stages", "message"),
    [
        ([], ("coarse", "fine"), "needs the semantic stage: add --semantic RUN"),
        ([], ("semantic", "coarse"), "needs the fine stage"),
        ([], ("semantic", "coarse", "fine", "acoustic"), "--coarse has no part"),
        (["--num", 0], ("semantic", "acoustic"), "must be positive"),
        (["--seconds", "inf"], ("semantic", "acoustic"), "must be positive"),
        (["--min-seconds", 11], ("semantic", "acoustic"), "--min-seconds 11: 0 to --seconds"),
        (["--min-seconds", 1, "--resynthesize", "x"], ("coarse", "fine"), "has no part"),
        (["--prompt-seconds", 1], ("semantic", "acoustic"), "needs --prompt"),
        (["--prompt", "x", "--prompt-seconds", -1], ("semantic", "acoustic"), "must be a positive"),
        (["--device", "nowhere"], ("semantic", "acoustic"), "--device nowhere: cannot be used"),
        (["--temperature", "1e-40"], ("semantic", "acoustic"), "temperature"),
        (["--temperature", "warm"], ("semantic", "acoustic"), "not a number"),
        (["--top-k", "middle=3"], ("semantic", "acoustic"), "the stages are semantic, acoustic"),
        (["--top-p", "fine=0.9"], ("semantic", "acoustic"), "the stages are semantic, acoustic"),
        (["--prompt", "no.wav"], ("semantic", "acoustic"), "no.wav: no such file"),
        (["--prompt", "a", "--resynthesize", "b"], ("semantic", "acoustic"), "choose one"),
        (["--codec", "nowhere"], ("semantic", "acoustic"), "nowhere"),
    ],
)
def test_impossible_requests_are_errors(world, tmp_path, words, stages, message):
    with pytest.raises(ValueError, match=message):
        run(world, tmp_path / "x.wav", *words, stages=stages)
    assert not list(tmp_path.iterdir())


def test_of_a_prompt_longer_than_the_context_the_last_part_is_taken(world, tmp_path, capsys):
    save_wav(tmp_path / "x.wav", 1.4)
    words = ("--prompt", tmp_path / "x.wav", "--seconds", 0.4)
    (file,) = run(world, tmp_path / "y.wav", *words)
    said = "1.4 s fill the context of the semantic stage, which was trained on 1 s at a time: its "
    assert f"{said}last 0.5 s are the prompt" in capsys.readouterr().out
    record = json.loads((tmp_path / "y.json").read_text())
    assert record["prompt"] == {"path": words[1].__fspath__(), "first_second": 0.9, "seconds": 0.5}
    clip, again = read(file), read(tmp_path / record["reconstruction"])
    assert 0.5 * RATE <= len(clip) <= 0.9 * RATE
    middle = slice(int(0.2 * RATE), int(0.4 * RATE))  # the codec has forgotten how it began
    there = again[int(0.9 * RATE) :][middle]
    assert abs(clip[middle] - there).max() < 0.1 * abs(there).max()


@pytest.mark.parametrize(
    ("samples", "message"),
    [(torch.zeros(8000), "silent"), (torch.full((8000,), float("nan")), "NaN")],
)
def test_a_prompt_without_sound_is_an_error(samples, message, world, tmp_path):
    soundfile.write(tmp_path / "x.wav", samples.numpy(), RATE, subtype="FLOAT")
    with pytest.raises(ValueError, match=rf"x\.wav: .*{message}"):
        run(world, tmp_path / "y.wav", "--prompt", tmp_path / "x.wav")


def test_a_prompt_shorter_than_a_frame_is_an_error(world, tmp_path):
    save_wav(tmp_path / "short.wav", 0.01)
    with pytest.raises(ValueError, match=r"short\.wav: what is left .* is shorter than one frame"):
        run(world, tmp_path / "y.wav", "--prompt", tmp_path / "short.wav")


@pytest.mark.parametrize("out", ["x.wav", "x.json", "x"])
def test_a_recording_is_never_overwritten(world, tmp_path, out):
    save_wav(tmp_path / "x.wav", 0.5)
    before = (tmp_path / "x.wav").read_bytes()
    with pytest.raises(ValueError, match=r"would overwrite|wav is what is written"):
        run(world, tmp_path / out, "--prompt", tmp_path / "x.wav")
    assert (tmp_path / "x.wav").read_bytes() == before


@pytest.mark.parametrize(
    ("source", "num", "refused"),
    [
        ("x.wav", 1, True),
        ("x.wav", 2, False),  # x-0.wav and x-1.wav are written
        ("x-1.wav", 2, True),
        ("x-1.wav", 1, False),
        ("x-2.wav", 2, False),
        ("x-original.wav", 1, True),
        ("x-reconstruction.wav", 1, True),
        ("x.json", 1, True),
        ("x-and-more.wav", 1, False),
    ],
)
def test_only_what_would_overwrite_the_recording_is_refused(tmp_path, source, num, refused):
    (tmp_path / source).touch()
    words = ["--resynthesize", str(tmp_path / source), "--num", str(num)]
    arguments = sample_parser().parse_args([*words, "--out", str(tmp_path / "x.wav")])
    with pytest.raises(ValueError, match="would overwrite") if refused else nullcontext():
        check_request(arguments)


def test_the_same_command_replaces_its_own_files(world, tmp_path):
    save_wav(tmp_path / "x.wav", 0.5)
    words = ("--resynthesize", tmp_path / "x.wav")
    for _ in range(2):
        files = run(world, tmp_path / "y.wav", *words, stages=("acoustic",))
        assert files == [tmp_path / "y.wav"]
    names = {"x.wav", "y.wav", "y.json", "y-original.wav", "y-reconstruction.wav"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_runs_of_different_tokenizers_do_not_mix(world, tmp_path):
    state_file = list_checkpoints(world / "fine")[-1] / "state.json"
    before = state_file.read_text()
    state = json.loads(before)
    state["tokenizers"]["codec"]["fingerprint"] = "another"
    try:
        state_file.write_text(json.dumps(state))
        with pytest.raises(ValueError, match=r"semantic and .*fine do not belong together"):
            run(world, tmp_path / "y.wav")
    finally:
        state_file.write_text(before)
    state = json.loads(before)
    state["spec"]["num_coarse"] = 3
    with pytest.raises(ValueError, match=r"num_coarse=3.*num_coarse=2"):
        check_same_tokens({"a": state, "b": json.loads(before)})
    words = ("--semantic", world / "semantic", "--coarse", world / "fine", "--fine", world / "fine")
    with pytest.raises(ValueError, match=r"--coarse .*: holds a fine stage"):
        run(world, tmp_path / "y.wav", *words, stages=())


def test_a_codec_that_is_not_the_runs_own_is_refused(world, tmp_path):
    small = {"encoder_filters": 2, "decoder_filters": 2, "num_lstm": 0, "dimension": 8}
    Codec(CodecConfig(num_codebooks=4, codebook_size=16, **small)).save(tmp_path / "other")
    with pytest.raises(ValueError, match="is not the codec tokenizer of these runs"):
        run(world, tmp_path / "y.wav", "--codec", tmp_path / "other")


def test_the_command_line_exits_with_2(world):
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "scripts.sample", "--semantic", "nowhere", "--out", "x.wav"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: this request needs the coarse stage")
