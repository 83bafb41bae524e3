"""Chunks: whatever is made at a time, a clip goes through the same stages to the same sound."""

import io
import json
import os
import sys
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch
from world import RATE, make_world, save_wav

from data.audio import WavStream
from model import pipeline
from model.pipeline import (
    STREAM_SECONDS,
    Chunks,
    decode_stream,
    generate_codes,
    usual_chunks,
)
from scripts import sample as module
from scripts.sample_options import check_request, read_samplings, sample_parser

THREE, TWO = ("semantic", "coarse", "fine"), ("semantic", "acoustic")
DRAWN = ("--temperature", "semantic=0.05")
STREAM = Chunks(20, 40, 20)
WHOLE = Chunks(10_000, 10_000, 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def clips_are_long(monkeypatch):
    """Stages of two steps draw all classes alike; so that EOS is not soon among them, the semantic
    one takes the best of them (see `parse`), and its EOS is never that."""
    load = module.load_models

    def loaded(*arguments):
        models = load(*arguments)
        stage = models.stages.get("semantic")
        if stage:
            stage.heads[0].weight.data[stage.layout.eos] = 0
        return models

    monkeypatch.setattr(module, "load_models", loaded)


def parse(world, out, *words, stages=THREE):
    flags = [word for name in stages for word in (f"--{name}", world / name)]
    words = (*flags, "--temperature", "semantic=0", *words, "--out", out)
    return sample_parser().parse_args([*map(str, words)])


def prepare(world, *words, stages=THREE):
    arguments = parse(world, "y.wav", *words, stages=stages)
    models = module.load_models(arguments, torch.device("cpu"))
    return models, module.make_request(arguments, models)[0], read_samplings(arguments)


@pytest.mark.parametrize("stages", [THREE, TWO], ids=["fine", "acoustic"])
@pytest.mark.parametrize("chunks", [STREAM, Chunks(5, 15, 0), None])
def test_what_is_streamed_is_what_is_decoded_in_the_end(stages, chunks, world):
    """Four clips of their own lengths: each chunk adds to the codes before, and the chunks' sound
    is that of all codes at once, sample for sample."""
    words = ("--seconds", 2.4, "--num", 4, *DRAWN)
    models, request, samplings = prepare(world, *words, stages=stages)
    seen = []

    def listened():
        for codes in generate_codes(models, request, samplings, chunks):
            seen.append(codes)
            yield codes

    parts = list(decode_stream(models, listened()))
    for before, after in pairwise(seen):
        for a, b in zip(before, after, strict=True):
            assert torch.equal(b[:, : a.shape[1]], a)
    assert len(seen) > 2
    assert len({clip.shape[1] for clip in seen[-1]}) > 1
    for n, clip in enumerate(seen[-1]):
        streamed = torch.cat([part[n] for part in parts], dim=1)
        at_once = models.codec.decode(clip[None])[0]
        torch.testing.assert_close(streamed, at_once, atol=1e-5, rtol=0)
        assert clip.shape[1] * models.codec.hop_length == streamed.shape[1]


def test_the_first_sound_comes_before_the_last_tokens(world):
    models, request, samplings = prepare(world, "--seconds", 2, "--seed", 3)
    events = []
    made = generate_codes(models, request, samplings, STREAM, lambda name, _: events.append(name))
    for _ in decode_stream(models, made):
        events.append("sound")
    first = events.index("sound")
    assert set(events[:first]) == set(THREE)
    assert events[:first].count("semantic") == 40  # 0.4 s, and 0.4 s that coarse hears ahead
    assert events[:first].count("fine") == 20
    assert "semantic" in events[first:]


@torch.no_grad()
def test_semantic_tokens_do_not_depend_on_the_chunks(world, monkeypatch):
    """Within one context: the same numbers are drawn at the same steps."""
    models, request, samplings = prepare(world, "--seconds", 0.9, "--num", 2, *DRAWN)
    found = []
    extend_codes = pipeline._Clips.extend_codes

    def noted(clips):
        found[-1] = [list(tokens) for tokens in clips.semantics]
        extend_codes(clips)

    monkeypatch.setattr(pipeline._Clips, "extend_codes", noted)
    for chunks in (WHOLE, Chunks(5, 10, 5), Chunks(15, 15, 0)):
        found.append(None)
        list(generate_codes(models, request, samplings, chunks))
    assert found[0] == found[1] == found[2]


def test_a_long_clip_takes_the_memory_of_one_context(world, monkeypatch):
    """12 contexts; no stage is shown more at a time than it was trained on."""
    longest = {}
    hidden = pipeline.Stage.hidden

    def watched(stage, ids, positions, mask=None, kv_cache=None, segments=None):
        places = kv_cache.max_length
        longest[stage.spec.name] = max(places, longest.get(stage.spec.name, 0))
        return hidden(stage, ids, positions, mask, kv_cache, segments)

    monkeypatch.setattr(pipeline.Stage, "hidden", watched)
    models, request, samplings = prepare(world, "--seconds", 12)
    for stage in models.stages.values():  # EOS is never drawn
        stage.heads[0].weight.data[stage.layout.eos] = 0
        samplings[stage.spec.name] = type(samplings["fine"])(temperature=0)
    *_, codes = generate_codes(models, request, samplings)
    assert codes[0].shape == (4, 600)
    assert longest == {"semantic": 51, "coarse": 51 + 90, "fine": 101 + 100}


def test_usual_chunks_are_one_for_what_fits(world):
    models, *_ = prepare(world)
    assert Chunks.of_seconds(models, *STREAM_SECONDS) == STREAM
    assert usual_chunks(models, 0, 50) == Chunks(50, 50, 0)
    assert usual_chunks(models, 0, 51) == Chunks(45, 33, 5)
    assert usual_chunks(models, 5, 51) == Chunks(40, 33, 5)
    assert usual_chunks(models, 40, 51) == Chunks(33, 33, 5)
    models.states["coarse"]["crop_seconds"] = 1.03  # frames that no share of a second makes
    assert usual_chunks(models, 0, 60) == Chunks(47, 34, 5)


def test_a_clip_does_not_depend_on_its_batch_or_its_chunks_company(world):
    models, together, samplings = prepare(world, "--seconds", 1.6, "--num", 4, *DRAWN)
    *_, codes = generate_codes(models, together, samplings, STREAM)
    for n in (3, 1):
        models, alone, samplings = prepare(world, "--seconds", 1.6, "--seed", n, *DRAWN)
        *_, own = generate_codes(models, alone, samplings, STREAM)
        assert torch.equal(own[0], codes[n])


def test_ctrl_c_leaves_what_is_finished(world, tmp_path, monkeypatch, capsys):
    """In the third chunk: the first two are written, and the record says so."""
    generate = module.generate_codes

    def interrupted(*arguments):
        for n, codes in enumerate(generate(*arguments)):
            if n == 2:
                raise KeyboardInterrupt
            yield codes

    monkeypatch.setattr(module, "generate_codes", interrupted)
    with pytest.raises(SystemExit) as stopped:
        module.sample(parse(world, tmp_path / "y.wav", "--seconds", 3, "--seed", 3))
    assert stopped.value.code == 130
    file = tmp_path / "y.wav"
    record = json.loads((tmp_path / "y.json").read_text())
    assert record["complete"] is False
    assert soundfile.info(file).duration == record["seconds"][0] == 0.9 + 0.66
    assert "1.56 s, as far as it was finished" in capsys.readouterr().out
    monkeypatch.setattr(module, "generate_codes", lambda *_: iter(interrupted_at_once, None))
    with pytest.raises(KeyboardInterrupt):  # which a command ends with, too
        module.sample(parse(world, tmp_path / "z.wav"))
    assert not (tmp_path / "z.wav").exists()


def interrupted_at_once():
    raise KeyboardInterrupt


def test_a_streamed_command_sends_the_sound_that_it_writes(world, tmp_path, monkeypatch, capfd):
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "__stdout__", type("Pipe", (), {"buffer": pipe}))
    words = ("--seconds", 1.5, "--seed", 3, "--stream")
    (file,) = module.sample(parse(world, tmp_path / "y.wav", *words))
    written, _ = soundfile.read(file, dtype="int16")
    assert pipe.getvalue()[:4] == b"RIFF"
    sent = np.frombuffer(pipe.getvalue()[44:], "<i2")
    assert len(sent) == len(written) > RATE
    assert abs(sent.astype(int) - written).max() <= 1
    out, err = capfd.readouterr()
    assert out == ""  # nothing but sound
    assert "first sound after" in err
    with pytest.raises(ValueError, match="ffplay"):
        check_request(parse(world, tmp_path / "y.wav", "--stream", "--num", 2))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(ValueError, match="ffplay"):
        check_request(parse(world, tmp_path / "y.wav", "--stream"))


def test_a_pipe_that_nobody_reads_stops_nothing():
    """Nor does it fail later, when what is buffered is to be sent."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as file:
        stream = WavStream(file, RATE)
        assert stream.file is None
        stream.write(torch.zeros(1, 10))
    whole = io.BytesIO()
    WavStream(whole, RATE).write(torch.tensor([[0.0, 1.0, -2.0]]))
    assert np.frombuffer(whole.getvalue()[44:], "<i2").tolist() == [0, 32767, -32767]


def test_a_prompt_is_continued_by_chunks(world, tmp_path):
    wav = save_wav(tmp_path / "x.wav", 0.5)
    models, request, samplings = prepare(world, "--prompt", wav, "--seconds", 2)
    first, *_, last = generate_codes(models, request, samplings, STREAM)
    assert torch.equal(first[0][:, :25], request.codes[0])
    assert 25 < first[0].shape[1] <= 45
    assert torch.equal(last[0][:, : first[0].shape[1]], first[0])


def test_a_prompt_is_cut_for_the_semantic_stage_alone(world, tmp_path, capsys):
    """The others go on in windows of their own; a cut prompt is no recording's beginning."""
    wav = save_wav(tmp_path / "x.wav", 1.2)
    arguments = parse(world, "y.wav", "--prompt", wav, "--prompt-seconds", 0.8, "--seconds", 0.5)
    models = module.load_models(arguments, torch.device("cpu"))
    models.states["fine"]["crop_seconds"] = models.states["coarse"]["crop_seconds"] = 0.3
    request, prompt = module.make_request(arguments, models)
    assert request.codes[0].shape == (4, 40)
    assert request.first_frame == prompt.first_frame == 0
    assert "context" not in capsys.readouterr().out
    arguments.prompt_seconds = None
    request, prompt = module.make_request(arguments, models)
    assert request.codes[0].shape == (4, 25)
    assert torch.equal(
        request.codes[0], module.encode_prompt(str(wav), None, models).codes[:, -25:]
    )
    assert request.first_frame == 35
    assert len(request.semantics[0]) == 25
    begins = []
    generate = pipeline.extend.__globals__["generate"]

    def watched(*arguments, **others):
        begins.append(arguments[6][0])
        return generate(*arguments, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pipeline.extend.__globals__, "generate", watched)
        list(generate_codes(models, request, read_samplings(arguments)))
    assert min(begins) == 35  # so every window says MIDDLE, none START
