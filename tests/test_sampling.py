"""Sampling: cached == uncached, a clip does not depend on its batch, filters do what they say."""

import pytest
import torch

from configs.schema import ModelConfig
from model.backends import AttentionChoice
from model.drawing import Sampling, draw, filter_logits
from model.sampling import extend, generate
from model.stages import STAGES, Stage, stage_spec

GREEDY = Sampling(temperature=0)
KINDS = (*STAGES, "coarse delay", "fine delay", "acoustic flatten")


def build(name, backend="einsum", semantic_rate=1.0):
    """A random stage, its weights large enough that its choices differ from place to place."""
    torch.manual_seed(1)
    config = ModelConfig(dim=32, num_layers=2, num_heads=4, head_dim=8)
    name, _, pattern = name.partition(" ")
    spec = stage_spec(name, 20, 8, 16, 3, semantic_rate, pattern or "auto")
    stage = Stage(spec, config, AttentionChoice((backend,), "test"))
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.mul_(8)
    return stage.eval()


def ragged(stage):
    """Conditions and prompts of three lengths."""
    generator = torch.Generator().manual_seed(2)

    def codes(num_codebooks, num_frames):
        return torch.randint(0, 16, (num_codebooks, num_frames), generator=generator)

    K_c = len(stage.layout.condition_sizes)
    conditions = [codes(K_c, T) if K_c else None for T in (5, 9, 3)]
    return conditions, [codes(stage.layout.num_codebooks, T) for T in (0, 4, 2)], [10, 14, 9]


@pytest.mark.parametrize("backend", ["einsum", "flash", "math"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, top_k=8)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_cached_equals_uncached_token_for_token(name, sampling, backend):
    stage = build(name, backend)
    conditions, prompts, limits = ragged(stage)
    arguments = (conditions, prompts, limits, [1, 2, 3], sampling)
    cached = generate(stage, *arguments)
    oracle = generate(build(name), *arguments, use_cache=False)
    for a, b, prompt, limit in zip(cached, oracle, prompts, limits, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[:, : prompt.shape[1]], prompt)
        assert 1 <= a.shape[1] <= limit
        assert a.min() >= 0
        assert a.max() < max(stage.layout.target_sizes)


@torch.no_grad()
def test_matrices_of_half_precision_are_sampled_from():
    """As on a GPU: nearly all the codes of full precision, with a cache and without."""
    (conditions, prompts, limits), clips = ragged(build("coarse")), []
    for dtype, use_cache in (
        (torch.float32, True),
        (torch.bfloat16, True),
        (torch.bfloat16, False),
    ):
        stage = build("coarse").sampled_in(dtype)
        assert stage.transformer.make_cache(1, 1).dtype == dtype
        stage.heads[0].weight[stage.layout.eos] = 0
        arguments = (conditions, prompts, limits, [1, 2, 3], GREEDY)
        clips.append(generate(stage, *arguments, use_cache=use_cache))
    for others in clips[1:]:
        agree = [
            (a[:, :6] == b[:, :6]).float().mean() for a, b in zip(clips[0], others, strict=True)
        ]
        assert sum(agree) / 3 > 0.8


@pytest.mark.parametrize("semantic_rate", [0.5, 2 / 3, 1.0, 1.6])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_what_is_sampled_is_what_training_would_predict(name, semantic_rate):
    """Greedy clips, laid out as for training: at every place after the prompt, the most likely
    class is the code that was sampled. Ids, positions and marks are the same on both roads."""
    stage = build(name, semantic_rate=semantic_rate)
    layout, (conditions, prompts, limits) = stage.layout, ragged(stage)
    begins = [0, 7, 0]
    clips = generate(stage, conditions, prompts, limits, [1, 2, 3], GREEDY, begins)
    num_compared = 0
    for condition, prompt, clip, begin, limit in zip(
        conditions, prompts, clips, begins, limits, strict=True
    ):
        ids, targets = layout.encode(condition, clip, begin == 0, clip.shape[1] < limit)
        batch = layout.collate([(ids, targets)])
        hidden = stage.hidden(batch.ids, batch.positions)[0]
        step = torch.arange(len(ids)) - layout.positions(ids).tolist().index(0)
        for k, head in enumerate(stage.heads):
            logits = head(hidden)
            frame = step // layout.num_codebooks if layout.pattern == "flatten" else step - k
            if k == 0:  # EOS is not drawn before the first frame
                logits[frame < 1, layout.eos] = float("-inf")
            drawn = (targets[:, k] >= 0) & (frame >= prompt.shape[1])
            assert torch.equal(logits.argmax(dim=-1)[drawn], targets[drawn, k])
            num_compared += int(drawn.sum())
    assert num_compared >= 10


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_clip_does_not_depend_on_its_batch(name):
    stage = build(name)
    conditions, prompts, limits = ragged(stage)
    together = generate(stage, conditions, prompts, limits, [1, 2, 3], Sampling())
    for n in (2, 0, 1):
        alone = generate(
            stage, conditions[n : n + 1], prompts[n : n + 1], limits[n : n + 1], [n + 1], Sampling()
        )
        assert torch.equal(alone[0], together[n])


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_eos_ends_a_clip_in_every_stage(name):
    """All classes equally likely, EOS among them: most of 64 clips end before 30 frames, at
    lengths of their own, and none is empty."""
    stage = build(name)
    conditions, prompts, _ = ragged(stage)
    stage.heads[0].weight.zero_()
    clips = generate(
        stage, conditions[:1] * 64, prompts[:1] * 64, [30] * 64, list(range(64)), Sampling()
    )
    lengths = [clip.shape[1] for clip in clips]
    assert sum(length < 30 for length in lengths) > 32
    least = [5, 20] * 32
    arguments = (conditions[:1] * 64, prompts[:1] * 64, [30] * 64, list(range(64)), Sampling())
    clips_later = generate(stage, *arguments, min_frames=least)
    assert all(clip.shape[1] >= n for clip, n in zip(clips_later, least, strict=True))
    assert len(set(lengths)) > 10
    assert min(lengths) >= 1


@pytest.mark.parametrize("name", ["coarse", "acoustic"])  # flattened, delayed
@torch.no_grad()
def test_windows_cover_what_is_asked_and_keep_the_prompt(name):
    stage = build(name)
    K = stage.layout.num_codebooks
    stage.heads[0].weight[stage.layout.eos] = 0  # never the best of 17 spread around 0
    semantic = torch.arange(40)[None] % 20
    prompt = torch.arange(3 * K).reshape(K, 3) % 16
    asked = []

    def condition_of(row, a, b):
        asked.append((a, b))
        return semantic[:, a:b]

    codes = extend(stage, condition_of, [prompt], [30], [3], GREEDY, windows=[12], overlap=4)[0]
    assert asked == [(0, 12), (8, 20), (16, 28), (18, 30)]
    assert codes.shape == (K, 30)
    assert torch.equal(codes[:, :3], prompt)
    first = generate(stage, [semantic[:, :12]], [prompt], [12], [3], GREEDY)[0]
    assert torch.equal(codes[:, :12], first)
    second = generate(stage, [semantic[:, 8:20]], [codes[:, 8:12]], [12], [3], GREEDY, [8])[0]
    assert torch.equal(codes[:, 8:20], second)
    assert (second[:, 4:] != second[:, 4:5]).any()  # something that windows could get wrong


@torch.no_grad()
def test_delayed_windows_end_where_each_clip_ends():
    """Clips of a batch that need 1, 2 and 3 windows, one of them ended by EOS: no code is missing
    where codebooks are delayed past a window's end, and each clip is what it would be alone."""
    stage = build("acoustic")
    semantic = torch.arange(40)[None] % 20
    limits, seeds, sampling = [7, 17, 28], [1, 2, 3], Sampling(temperature=3.0)

    def windows(rows, **options):
        def condition_of(n, a, b):
            return (semantic + rows[n])[:, a:b] % 20

        prompts = [torch.full((8, 2), 5)] * len(rows)
        most, own_seeds = [limits[n] for n in rows], [seeds[n] for n in rows]
        arguments = (stage, condition_of, prompts, most, own_seeds, sampling)
        return extend(*arguments, windows=[12] * len(rows), overlap=3, **options)

    together = windows([0, 1, 2], min_frames=limits)
    assert [clip.shape for clip in together] == [(8, n) for n in limits]
    assert min(clip.min() for clip in together) >= 0
    assert max(clip.max() for clip in together) < 16
    for n in range(3):
        assert torch.equal(windows([n], min_frames=limits[n : n + 1])[0], together[n])
    stage.heads[0].weight[stage.layout.eos] *= 3
    assert any(clip.shape[1] < n for clip, n in zip(windows([0, 1, 2]), limits, strict=True))


def test_filters():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()[None]

    def kept(**options):
        return torch.isfinite(filter_logits(logits, Sampling(**options)))[0].tolist()

    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.51) == [True, True, False, False]
    assert kept(min_p=0.4) == [True, True, False, False]
    assert kept() == [True] * 4
    assert torch.allclose(filter_logits(logits, Sampling(temperature=0.5)), 2 * logits)


def test_draw_follows_the_probabilities():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    logits = probs.log().expand(10_000, 4)
    drawn = draw(logits, uniform, Sampling())
    torch.testing.assert_close(drawn.bincount(minlength=4) / 10_000, probs, atol=2e-3, rtol=0)
    assert draw(logits[:1], torch.zeros(1), Sampling()).item() == 0
    assert (draw(logits, uniform, GREEDY) == 0).all()


@pytest.mark.parametrize("option", [{"temperature": -1}, {"top_p": 0}, {"min_p": 1}, {"top_k": -1}])
def test_impossible_sampling_options_are_errors(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Sampling(**option)
