"""Sampling where semantic tokens are not one a frame: other rates, and tokens without repeats."""

import json
from fractions import Fraction
from math import ceil

import pytest
import soundfile
import torch
from world import RATE, make_world, save_wav

from model import pipeline
from model.checkpoint import find_checkpoint
from model.pipeline import generate_codes
from scripts import sample as module
from scripts.sample_options import read_samplings, sample_parser

THREE, TWO = ("semantic", "coarse", "fine"), ("semantic", "acoustic")


def parse(world, *words, stages):
    flags = [word for name in stages for word in (f"--{name}", str(world / name))]
    return sample_parser().parse_args([*flags, *map(str, words)])


@pytest.fixture
def calls(monkeypatch):
    """{stage: what `extend` was asked: the condition of each (row, a, b), and gave in the end}."""
    found, extend = {}, pipeline.extend

    def recorded(stage, condition_of, *others, **options):
        conditions = found.get(stage.spec.name, {"conditions": {}})["conditions"]

        def asked(*place):
            conditions[place] = condition_of(*place)
            return conditions[place]

        made = extend(stage, asked, *others, **options)
        found[stage.spec.name] = {"conditions": conditions, "made": made, "most": others[1]}
        return made

    monkeypatch.setattr(pipeline, "extend", recorded)
    return found


def generate(world, tmp_path, stages, *words, seconds=1.0, num=1):
    """codes of each clip, and the recording's tokens."""
    most = (("--seconds", seconds), ("--num", num), ("--out", tmp_path / "y.wav"))
    arguments = parse(world, *(w for words in most for w in words), *words, stages=stages)
    models = module.load_models(arguments, torch.device("cpu"))
    request, prompt = module.make_request(arguments, models)
    *_, codes = generate_codes(models, request, read_samplings(arguments))
    return codes, prompt


@pytest.fixture(scope="module", params=[640, 480, 200], ids=["25/s", "33.3/s", "80/s"])
def rated(request, tmp_path_factory):
    """A world and its semantic tokens per frame of the codec's 50/s."""
    root = tmp_path_factory.mktemp("rated")
    return make_world(root, semantic_hop=request.param), Fraction(320, request.param)


def test_each_window_reads_the_tokens_of_its_time(rated, tmp_path, calls):
    """A recording of 2.3 contexts, resynthesized: every window of it reads what overlaps it, the
    last one all that is left, and the clip ends where the tokens do."""
    world, ratio = rated
    wav = save_wav(tmp_path / "x.wav", 2.3)
    for stages in (THREE[1:], TWO[1:]):
        calls.clear()
        clips, prompt = generate(world, tmp_path, stages, "--resynthesize", wav, num=2)
        assert len(prompt.semantic) == ceil(115 * ratio)
        assert all(113 <= clip.shape[1] <= 115 for clip in clips)
        first = calls[stages[0]]
        assert len(first["conditions"]) >= 2 * 3
        for (_, a, b), condition in first["conditions"].items():
            ahead = ceil((b + 5) * ratio) if b < 115 else None  # a tenth of the context, if any
            same_time = prompt.semantic[int(a * ratio) : ahead]
            assert torch.equal(condition, same_time[None])
            assert b - a <= 45
        if "fine" in stages:
            for (row, a, b), condition in calls["fine"]["conditions"].items():
                assert torch.equal(condition, calls["coarse"]["made"][row][:, a:b])
                assert condition.shape[1] == b - a


def test_clips_end_where_their_semantic_tokens_do(rated, tmp_path, calls):
    world, ratio = rated
    wav, lengths = save_wav(tmp_path / "x.wav", 0.5), set()
    for stages in (THREE, TWO):
        for words, seconds in (((), 1.7), (("--prompt", wav), 0.4)):
            calls.clear()
            clips, prompt = generate(world, tmp_path, stages, *words, seconds=seconds, num=6)
            start = 0 if prompt is None else 25
            most_tokens = ceil(start * ratio) + ceil(seconds * 50 * ratio)
            windows = [b for _, a, b in calls["semantic"]["conditions"] if a == 0]
            assert windows == [min(most_tokens, round(50 * ratio))] * 6  # a context of 1 s
            for clip, tokens in zip(clips, calls["semantic"]["made"], strict=True):
                assert tokens.shape[1] <= most_tokens
                frames = min(ceil(tokens.shape[1] / ratio), start + ceil(seconds * 50))
                assert max(frames - 2, start) <= clip.shape[1] <= max(frames, start + 1)
                lengths.add(frames)
                if prompt is not None:
                    assert torch.equal(tokens[0, : len(prompt.semantic)], prompt.semantic)
                    assert torch.equal(clip[:, :25], prompt.codes)
    assert len(lengths) > 5


def test_a_rate_that_no_float_holds(tmp_path, calls):
    """The window of frames [33, 78) and 5 more reads tokens [22, 56), as in training."""
    world = make_world(tmp_path / "world", semantic_hop=480)
    wav = save_wav(tmp_path / "x.wav", 2.6)
    _, prompt = generate(world, tmp_path, TWO[1:], "--resynthesize", wav)
    found = {(a, b): c[0] for (_, a, b), c in calls["acoustic"]["conditions"].items()}
    assert torch.equal(found[0, 45], prompt.semantic[:34])
    assert torch.equal(found[33, 78], prompt.semantic[22:56])


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("collapsed"), "data.collapse_semantic=true")


@pytest.mark.parametrize("stages", [THREE, TWO], ids=["fine", "acoustic"])
def test_sampling_without_repeats(stages, collapsed, tmp_path, calls):
    """Each kind of request, to wavs and a record; the stages read tokens without repeats."""
    wav = save_wav(tmp_path / "x.wav", 0.7)
    for mode, least, most, used, words in (
        ("unprompted", 0, 0.9, stages, ("--seconds", 0.9)),
        ("continuation", 0.4, 0.9, stages, ("--prompt", wav, "--prompt-seconds", 0.4)),
        ("resynthesis", 0, 0.7, stages[1:], ("--resynthesize", wav)),
    ):
        seconds = ("--seconds", 0.5) if mode == "continuation" else ()
        words = (*words, *seconds, "--num", 2, "--out", tmp_path / "y.wav")
        calls.clear()
        files = module.sample(parse(collapsed, *words, stages=used))
        record = json.loads((tmp_path / "y.json").read_text())
        assert record["mode"] == mode
        chosen = {name: str(find_checkpoint(collapsed / name, True)) for name in used}
        assert record["checkpoints"] == chosen
        lengths = [soundfile.info(file).frames / RATE for file in files]
        assert record["seconds"] == lengths
        assert all(least <= length <= most and length > 0 for length in lengths)
    models = module.load_models(
        parse(collapsed, "--resynthesize", wav, "--out", "y.wav", stages=stages[1:]),
        torch.device("cpu"),
    )
    whole = module.encode_prompt(wav, None, models).semantic
    assert len(torch.unique_consecutive(whole)) < len(whole)
    for condition in calls[stages[1]]["conditions"].values():
        assert torch.equal(condition[0], torch.unique_consecutive(whole))


def test_drawn_repeats_are_dropped(collapsed, tmp_path, calls):
    generate(collapsed, tmp_path, TWO, seconds=0.9, num=6)
    for tokens in calls["acoustic"]["conditions"].values():
        assert torch.equal(tokens[0], torch.unique_consecutive(tokens[0]))


def test_no_more_than_the_seconds_asked_for(collapsed, tmp_path, calls):
    generate(collapsed, tmp_path, TWO, seconds=0.56)
    assert calls["semantic"]["most"] == [28]


@pytest.mark.parametrize(
    ("words", "asked", "option"),
    [
        (("--seconds", 1.5), "1.5", "--seconds"),
        (("--seconds", 0.8, "--prompt", "x.wav", "--prompt-seconds", 0.5), "1.3", "--seconds"),
        (("--resynthesize", "x.wav"), "1.2", "--prompt-seconds"),
    ],
)
def test_tokens_without_timing_reach_no_further_than_one_context(
    words, asked, option, collapsed, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    save_wav(tmp_path / "x.wav", 1.2)
    stages = THREE[1:] if "--resynthesize" in words else THREE
    with pytest.raises(ValueError, match=rf"{asked} s is more than the 1 s .*: lower {option}"):
        module.sample(parse(collapsed, *words, "--out", "y.wav", stages=stages))
    assert [path.name for path in tmp_path.iterdir()] == ["x.wav"]


def test_tokens_without_timing_have_no_least_seconds(collapsed, tmp_path):
    words = ("--min-seconds", 0.5, "--out", tmp_path / "y.wav")
    arguments = parse(collapsed, *words, stages=THREE)
    with pytest.raises(ValueError, match="--min-seconds needs to know when each token"):
        module.sample(arguments)


def test_runs_with_and_without_repeats_do_not_mix(rated, collapsed, tmp_path):
    words = ("--semantic", collapsed / "semantic", "--out", tmp_path / "y.wav")
    arguments = parse(rated[0], *words, stages=("acoustic",))
    with pytest.raises(ValueError, match="do not belong together"):
        module.load_models(arguments, torch.device("cpu"))
