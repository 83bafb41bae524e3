"""Decoding steps: kernels and whole clips, in Triton's interpreter and, where one is, on a GPU; how
a way is chosen. (test_sampling has the plain way, against the loop without a cache.)"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from decode_cases import BIG, SIZES, check_clips, compare, compare_draws

from model.decoder import Decoders, choose_decoding
from model.drawing import Sampling
from model.stages import STAGES

HERE = Path(__file__).parent
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_kernels_and_captured_clips_in_the_interpreter():
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-W", "ignore", str(HERE / "decode_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


INTEGERS = (
    "num_rows num_outputs num_inputs num_sums num_kv shared half capacity width num_slots dim"
)
INTEGERS += " per_frame delay num_steps first_head eos"
LONG = "place ids prompt_frames min_frames num_frames step known drawn firsts classes"
FLOATS = "sums out_sums cos sin lse parts table frequencies positions uniform"
TYPES = (
    dict.fromkeys(INTEGERS.split(), "i32")
    | dict.fromkeys(LONG.split(), "*i64")
    | dict.fromkeys(["first", "starts", "num_done"], "*i32")
    | dict.fromkeys(FLOATS.split(), "*fp32")
    | dict.fromkeys(["eps", "scale", "temperature", "top_k", "top_p", "min_p"], "fp32")
)
FILTERS = {"GREEDY": False, "TOP_K": True, "TOP_P": True, "MIN_P": True}
COMPILED = {  # kernel -> its constants
    "_attend": {"NORM": True, "PARTS": 16, "M": 16, "LINE": 64},
    "_begin": {"C": 1024, "HALF": 64},
    "_draw": {**FILTERS, "EMPTY": -2, "IGNORE": -1, "PAD": 0, "C": 2048},
}
SHARED = {86: 99, 90: 227, 120: 99}  # KB that a program may have, by compute capability


def check_compiled(name, constants, capability, bits, num_warps, num_stages):
    """Down to machine code, with what a launch knows of its arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model import decode_triton, draw_triton

    kernel = getattr(decode_triton, name, None) or getattr(draw_triton, name)
    ahead = capability >= 90
    constants = constants | {"AHEAD": ahead}
    weights = f"*{'bf16' if bits == 16 else 'fp32'}"
    signature = {key: TYPES.get(key, weights) for key in kernel.arg_names}
    even = [
        key in ("num_inputs", "num_outputs", "half", "capacity") or kind[0] == "*"
        for key, kind in signature.items()
    ]
    hints = {(n,): [["tt.divisibility", 16]] for n, is_even in enumerate(even) if is_even}
    signature |= dict.fromkeys(constants, "constexpr")
    options = {"num_warps": num_warps, "num_stages": num_stages}
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(ASTSource(kernel, signature, constants, hints), target, options)
    assert made.asm["cubin"]
    assert made.metadata.shared < SHARED[capability] * 1024
    assert ("griddepcontrol" in made.asm["ptx"]) == ahead


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize(("capability", "bits"), [(86, 32), (90, 16), (120, 16)])
def test_kernels_compile_for_gpus_that_are_not_here(name, capability, bits):
    from model import decode_triton

    variants, (_, warps, stages) = [COMPILED[name]], decode_triton.KEYS
    if name == "_attend":
        halves = {half: decode_triton.keys_of(half, bits // 8) for half in (16, 32, 64)}
        assert halves == ({16: 128, 32: 64, 64: 32} if bits == 32 else {16: 128, 32: 128, 64: 64})
        variants = [COMPILED[name] | {"HALF": half, "N": n} for half, n in halves.items()]
    for constants in variants:
        check_compiled(name, constants, capability, bits, warps, stages)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(("capability", "bits"), [(86, 32), (90, 16), (120, 16)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("B", [1, 16, 64, 129])
def test_every_tile_fits_gpus_that_are_not_here(B, gated, capability, bits):
    from model.decode_triton import tile_of

    rows, outputs, inputs, warps, stages = tile_of(B, 2752, bits // 8, gated, capability == 90)
    constants = {"NORM": gated, "GATED": gated, "ADD": not gated, "SUMS": 64}
    constants |= {"B": rows, "N": outputs, "K": inputs, "LINE": 1024 // bits, "LINES": 64}
    check_compiled("_product", constants, capability, bits, warps, stages)


def test_one_clips_tile_holds_no_more_of_a_larger_model():
    """Of the weights, in bytes a thread: registers hold 1,020."""
    from model.decode_triton import tile_of

    for num_inputs in (300, 1024, 2752, 5504, 8192, 11008):
        for size in (2, 4):
            for gated in (False, True):
                rows, outputs, inputs, warps, _ = tile_of(1, num_inputs, size, gated, True)
                held = outputs * inputs * size * (2 if gated else 1) / (32 * warps)
                assert rows == 1 <= outputs
                assert inputs >= num_inputs
                assert held <= 256


@needs_gpu
@torch.no_grad()
def test_kernels_equal_plain_ones_on_a_gpu():
    compare("cuda", SIZES, 150, (torch.float32, torch.bfloat16))
    compare("cuda", BIG, 2048, (torch.bfloat16,))
    compare_draws("cuda", 300, 9)


@needs_gpu
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(1.0, 8, 0.9, 0.01)])
@pytest.mark.parametrize("name", [*STAGES, "coarse delay", "fine delay", "acoustic flatten"])
@torch.no_grad()
def test_every_way_makes_the_same_clips_on_a_gpu(name, sampling):
    ways = ["plain", "triton", "captured"]
    for changes in ({}, {"qk_norm": True}, {"num_kv_heads": 1, "head_dim": 128}):
        decoders = check_clips(name, sampling, ways, "cuda", more=12, **changes)
        graphs = {"coarse": 2, "fine": 2, "acoustic flatten": 4}.get(name, 1)  # one a head
        assert all(len(decoder.replay.graphs) == graphs for decoder in decoders.kept.values())


def test_a_way_is_chosen_once_and_an_order_that_cannot_be_met_is_an_error(monkeypatch):
    cpu, gpu, capability = torch.device("cpu"), torch.device("cuda"), [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability[0])
    monkeypatch.setattr("model.backends.find_spec", lambda _: object())
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/cc")
    assert choose_decoding("auto", gpu) == ("captured", "a step is launched as one graph")
    assert choose_decoding("captured", gpu) == ("captured", "as configured")
    assert choose_decoding("auto", cpu) == ("plain", "captured steps need a CUDA GPU")
    assert choose_decoding("plain", gpu) == ("plain", "as configured")
    with pytest.raises(ValueError, match="decoding=captured needs a CUDA GPU; take plain"):
        choose_decoding("captured", cpu)
    capability[0] = (7, 5)
    assert choose_decoding("auto", gpu)[0] == "plain"
    monkeypatch.setattr("model.backends.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs triton and compute capability 8.0"):
        choose_decoding("triton", gpu)


def test_decoders_serve_batches_and_lengths_rounded_up(monkeypatch):
    made = []

    class Noted:
        def __init__(self, stage, batch_size, capacity, sampling, how):
            made.append((batch_size, capacity, how))
            self.replay = self  # as a captured step holds its decoder

    monkeypatch.setattr("model.decoder.Decoder", Noted)
    decoders, greedy = Decoders(), Sampling(temperature=0)
    first = decoders.of(None, 3, 600, greedy)
    assert decoders.of(None, 4, 1024, greedy) is first
    decoders.of(None, 100, 512, greedy)
    assert decoders.of(None, 3, 600, greedy) is first
    decoders.of(None, 1, 1, greedy)  # the one of 100 has not been used for longest
    assert decoders.of(None, 3, 600, greedy) is first
    decoders.of(None, 128, 512, greedy)
    assert made == [(4, 1024, "captured"), (128, 512, "captured"), *made[2:]]
    assert made[2:] == [(1, 512, "captured"), (128, 512, "captured")]
    freed = list(decoders.kept.values())
    decoders.forget(all_but=0)
    assert not decoders.kept
    assert not any(hasattr(decoder, "replay") for decoder in freed)
