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
INDICES = "place first ids prompt_frames min_frames num_frames step starts known drawn firsts"
INDICES += " classes num_done"
FLOATS = "sums out_sums cos sin lse parts table frequencies positions uniform"
TYPES = (
    dict.fromkeys(INTEGERS.split(), "i32")
    | dict.fromkeys(INDICES.split(), "*i64")
    | dict.fromkeys(FLOATS.split(), "*fp32")
    | dict.fromkeys(["eps", "scale", "temperature", "top_k", "top_p", "min_p"], "fp32")
)
FILTERS = {"GREEDY": False, "TOP_K": True, "TOP_P": True, "MIN_P": True}
COMPILED = {  # kernel -> its constants
    "_product": {"NORM": True, "GATED": True, "ADD": True, "B": 64, "N": 32, "K": 128}
    | {"SUMS": 64, "LINE": 64, "LINES": 16},
    "_attend": {"NORM": True, "PARTS": 16, "M": 16, "N": 64, "HALF": 64, "LINE": 64},
    "_begin": {"C": 1024, "HALF": 64},
    "_draw": {**FILTERS, "EMPTY": -2, "IGNORE": -1, "PAD": 0, "C": 2048},
}


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize(("capability", "bits"), [(86, 32), (90, 16)])
def test_kernels_compile_for_gpus_that_are_not_here(name, capability, bits):
    """Down to machine code, in the shared memory that the smallest of them has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model import decode_triton, draw_triton

    kernel = getattr(decode_triton, name, None) or getattr(draw_triton, name)
    ahead = capability >= 90
    constants = COMPILED[name] | {"AHEAD": ahead}
    options = {"num_warps": 4, "num_stages": 4 if ahead and name != "_attend" else 2}
    if bits == 32:
        constants |= {key: constants[key] // 2 for key in ("K",) if key in constants}
        constants |= {"N": 32} if name == "_attend" else {}
    signature = {
        key: TYPES.get(key, f"*{'bf16' if bits == 16 else 'fp32'}") for key in kernel.arg_names
    }
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.asm["cubin"]
    assert made.metadata.shared < (227 if ahead else 99) * 1024
    assert ("griddepcontrol" in made.asm["ptx"]) == ahead


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
