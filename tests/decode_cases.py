"""A decoding step's kernels against plain ones, and whole clips. Run by itself, in Triton's
interpreter, which must be asked for before Triton is imported."""

from unittest import mock

import torch
import torch.nn.functional as F

from configs.schema import ModelConfig
from model.attend import Attend
from model.backends import AttentionChoice
from model.decoder import Decoders, use_decoding
from model.drawing import Rows, Sampling, first_ids, to_ids
from model.fused import EPS, rotate_heads
from model.layouts import Layout
from model.sampling import generate
from model.stages import Stage, stage_spec
from model.transformer import rotary_angles

SIZES = [(1, 40, 4, 1, 8, 20), (3, 32, 4, 2, 16, 24), (17, 24, 3, 3, 12, 20)]  # B, C, H, G, D, F
SIZES += [(129, 20, 2, 2, 4, 33)]
BIG = [(1, 1024, 16, 1, 64, 2752), (32, 1024, 16, 1, 64, 2752), (64, 1024, 16, 1, 64, 2752)]
BIG += [(80, 512, 8, 2, 128, 1408)]


def same(ours, theirs, dtype):
    tolerance = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def compare(device, sizes, capacity, dtypes):
    """Every kernel. (Triton's interpreter takes bf16 for integers.)"""
    from model import decode_triton as ours

    for B, C, H, G, D, ff in sizes:
        for dtype in dtypes:
            torch.manual_seed(0)

            def made(*shape, dtype=dtype):
                return torch.randn(shape, dtype=dtype).to(device)

            x, y = made(B, C), made(B, ff)
            normed = F.rms_norm(x, (C,), eps=EPS)
            qkv_weight, out_weight, both = (
                made(n, m) * m**-0.5 for n, m in ((H * D, C), (C, ff), (2 * ff, C))
            )
            sums = x.float().square().sum(dim=1, keepdim=True)
            same(ours.norm_linear(x, sums, qkv_weight), F.linear(normed, qkv_weight), dtype)
            gate, value = F.linear(normed, both).chunk(2, dim=-1)
            same(ours.norm_swiglu(x, sums, both), F.silu(gate) * value, dtype)
            onto = made(B, C)
            wanted = onto + F.linear(y, out_weight)
            sums = ours.add_linear(onto, y, out_weight)
            same(onto, wanted, dtype)
            torch.testing.assert_close(sums.sum(dim=1), onto.float().square().sum(dim=1))
            for length, has_gains in ((0, False), (1, True), (capacity - 1, False)):
                for gains in (None, (made(D), made(D))):
                    if device == "cuda" or (B < 4 and bool(gains) == has_gains):
                        attend(ours, made, device, dtype, (B, H, G, D), capacity, length, gains)


def attend(ours, made, device, dtype, sizes, capacity, length, gains):
    """Clips that begin at places of their own; of one all places but the new one are hidden."""
    B, H, G, D = sizes
    qkv, cache = made(B, H + 2 * G, D), (made(B, G, capacity, D), made(B, G, capacity, D))
    first = torch.arange(B, device=device) % (length + 2)
    place = torch.tensor([length], device=device)
    cos, sin = rotary_angles(torch.arange(B, device=device)[:, None] + 3.5, D, 10_000.0)
    normed = qkv
    if gains is not None:
        q, k, v = qkv.float().split([H, G, G], dim=1)
        q, k = (F.rms_norm(t, (D,), g.float()) for t, g in zip((q, k), gains, strict=True))
        normed = torch.cat([q, k, v], dim=1).to(dtype)
    q, k, v = rotate_heads(normed[:, None], torch.ones(B, 1, 1, device=device), (cos, sin), G)
    past = [
        torch.cat([old[:, :, :length], new.transpose(1, 2)], dim=2)
        for old, new in zip(cache, (k, v), strict=True)
    ]
    mask = torch.arange(length + 1, device=device) >= first.clamp(max=length)[:, None]
    wanted = Attend(causal=True)(q.transpose(1, 2), *past, mask)  # [B,H,1,D]
    angles = (cos.reshape(B, -1), sin.reshape(B, -1))
    num_done = torch.zeros(B * G, dtype=torch.int32, device=device)
    out = ours.attend_new(qkv, angles, gains, cache, place, first, num_done)
    same(out, wanted.flatten(1), dtype)
    assert not num_done.any()
    for old, new in zip(cache, (k, v), strict=True):
        same(old[:, :, length], new[:, 0], dtype)


SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(0.7),
    Sampling(1.3, top_k=8),
    Sampling(top_p=0.7),
    Sampling(min_p=0.05),
    Sampling(0.9, top_k=20, top_p=0.8, min_p=0.02),
]


def compare_draws(device, num_clips, num_frames):
    """Both patterns, every filter: the same codes, ends and next ids from the same logits."""
    from model.draw_triton import draw_codes

    for pattern, samplings in (("flatten", SAMPLINGS), ("delay", SAMPLINGS[-1:] * 4)):
        layout = Layout((), (37, 37), pattern)
        classes = torch.tensor(layout.head_sizes, device=device)
        prompts, lengths = [torch.randint(37, (2, n % 3)) for n in range(num_clips)], set()
        arguments = (
            [num_frames] * num_clips,
            [1] * num_clips,
            list(range(num_clips)),
            [0] * num_clips,
        )
        for sampling in samplings:
            pair = [Rows.of(layout, prompts, *arguments).to(device) for _ in range(2)]
            for rows in pair:  # sums and scans need not agree on the last of them
                rows.uniform[-1] = 1 - 2**-24
            firsts = first_ids(layout).to(device)
            ids = torch.full((num_clips, layout.num_slots), -7, device=device)
            for step in range(pair[0].num_steps):
                head = step % 2 if pattern == "flatten" else 0
                logits = 3 * torch.randn(num_clips, 2, 48).to(device)
                logits[:, 0, layout.eos] += 3

                def logits_of(k, logits=logits, classes=layout.head_sizes):
                    return logits[:, k, : classes[k]].clone()

                wanted = pair[0].draw(layout, logits_of, head, sampling)
                own = logits[:, head:][:, : layout.num_slots].contiguous()
                draw_codes(layout, own, pair[1], head, sampling, ids, firsts, classes)
                assert torch.equal(ids, to_ids(layout, wanted, head, firsts)), (pattern, sampling)
                pair[1].step += 1
            assert torch.equal(pair[0].drawn, pair[1].drawn)
            assert torch.equal(pair[0].num_frames, pair[1].num_frames)
            lengths.update(pair[0].num_frames.tolist())
        assert len(lengths) > 1


REQUESTS = [  # for each clip: frames of the condition, of the prompt, at most; its seed
    [(5, 0, 3, 1), (9, 3, 5, 2), (3, 1, 2, 3)],
    [(2, 0, 2, 4)],
    [(4, 1, 2, 5), (1, 0, 3, 6), (6, 2, 3, 7)],
]


def check_clips(name, sampling, hows, device, more=0, **changes):
    """Three requests of different lengths: each way makes the clips that are made without a cache,
    the captured one with the same decoder."""
    torch.manual_seed(1)
    sizes = {"dim": 32, "ff_dim": 48, "num_layers": 2, "num_heads": 4, "head_dim": 8}
    config = ModelConfig(**sizes | {"num_kv_heads": 2} | changes)
    choice = AttentionChoice(("einsum",), "test")
    name, _, pattern = name.partition(" ")
    spec = stage_spec(name, 20, 4, 16, 2, pattern=pattern or "auto")
    stage = Stage(spec, config, choice).eval()
    for parameter in stage.parameters():
        parameter.data.mul_(8)
    if more:  # no clip shall end before its steps have been captured
        stage.heads[0].weight.data[stage.layout.eos] = 0
    stage, decoders = stage.to(device), Decoders()
    K, K_c = stage.layout.num_codebooks, len(stage.layout.condition_sizes)
    generator = torch.Generator().manual_seed(2)
    for request in REQUESTS:
        numbers, given, most, seeds = zip(*request, strict=True)
        made = [
            [torch.randint(16, (num, T), generator=generator) for T in lengths]
            for num, lengths in ((K_c, numbers), (K, given))
        ]
        conditions = made[0] if K_c else [None] * len(request)
        limits = [n + more for n in most]
        arguments = (stage, conditions, made[1], limits, list(seeds), sampling)
        wanted = generate(*arguments, use_cache=False)
        for how in hows:
            stage.decoding = "plain"  # or the decoders of the request before would be freed
            use_decoding(stage, how)
            if how == "captured":
                stage.decoding = decoders
            heard = []
            clips = generate(*arguments, on_frame=heard.append)
            assert sum(heard) == sum(c.shape[1] - n for c, n in zip(clips, given, strict=True))
            for ours, theirs in zip(clips, wanted, strict=True):
                assert torch.equal(ours.cpu(), theirs.cpu()), (name, how)
    if "captured" in hows:
        assert {key[0] for key in decoders.kept} == {1, 4}
    return decoders


if __name__ == "__main__":
    from attend_triton_cases import mend_interpreter

    mend_interpreter()
    with mock.patch("model.decode_triton.PROGRAMS", 8), torch.no_grad():
        compare("cpu", SIZES, 150, (torch.float32, torch.float16))
        compare_draws("cpu", 3, 3)
        # what is captured is called instead, for there is no GPU to capture it
        with mock.patch("model.decoder.Captured", lambda function: function):
            few = {"num_layers": 1, "qk_norm": True}
            check_clips("coarse", Sampling(), ["captured"], "cpu", **few)
            check_clips("acoustic", Sampling(temperature=0), ["triton"], "cpu", num_layers=1)
            for other in ("coarse delay", "fine delay", "acoustic flatten"):
                check_clips(other, Sampling(), ["captured"], "cpu", num_layers=1)
    print("same")
