"""Which kernels may compute attention, and whether clips are packed: chosen once, at start-up."""

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec

import torch

BACKENDS = ("auto", "einsum", "cudnn", "flash", "efficient", "math", "triton")
HALF = (torch.float16, torch.bfloat16)
# Of a padded batch holds tokens: then packing saves a fifth or more. (H100, coarse_small, 4.2 hours
# of real clips, batches 48 % full: 46.5 ms a step instead of 75.7.)
PACKED_BELOW = 0.8


@dataclass(frozen=True)
class AttentionChoice:
    """The backends to try, in order, and why these."""

    backends: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"attention: {' > '.join(self.backends)} ({self.reason})"


def select_backends(
    device_type: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    *,
    has_mask: bool = False,
    has_bias: bool = False,
    has_dropout: bool = False,
    torch_version: tuple[int, int] = (2, 11),
    has_triton: bool = True,
    requested: str = "auto",
) -> AttentionChoice:
    """Order the attention backends for a device. Pure: asks nothing of the machine it runs on.

    `capability` is CUDA's (major, minor), None elsewhere. `has_*` say what the run will pass to
    Attend. ValueError: `requested` is unknown, or cannot run, with the reason. Our own kernels,
    "triton", are for calls with a mask or bias; unasked they run where they have been timed.
    """
    if requested == "triton" and not has_triton:
        raise ValueError(
            "attention.backend=triton needs Triton and a C compiler: one is missing; use auto"
        )
    facts = (device_type, capability or (0, 0), dtype, head_dim)
    uses = (has_mask, has_bias, has_dropout, torch_version)
    if requested not in BACKENDS:
        raise ValueError(f"attention.backend={requested}: expected one of {', '.join(BACKENDS)}")
    if requested != "auto":
        if objection := _objection(requested, *facts, *uses):
            raise ValueError(
                f"attention.backend={requested} cannot run here: {objection}; use auto"
            )
        return AttentionChoice((requested,), "as configured")
    order, reason = _preference(device_type, capability or (0, 0))
    if not has_triton or dtype not in HALF or head_dim > 128:
        order = tuple(name for name in order if name != "triton")
    able = tuple(name for name in order if _objection(name, *facts, *uses) is None)
    ruled_out = [f"no {n}: {_objection(n, *facts, *uses)}" for n in order if n not in able]
    return AttentionChoice(able, "; ".join([reason, *ruled_out]))


def _preference(device_type: str, capability: tuple[int, int]) -> tuple[tuple[str, ...], str]:
    """Fastest first; `Attend` leaves Triton to calls with a mask or bias. H100, bf16, causal MQA
    [16,16,2048,64], forward + backward (benchmarks/h100_attend.json): cuDNN 1.6 ms, flash 2.4,
    memory-efficient 4.9, einsum 56; with a learnt bias Triton 2.9, memory-efficient 13."""
    if device_type == "cpu":
        return ("flash", "math"), "CPU: what PyTorch fuses there"
    if device_type != "cuda":
        return ("math",), f"{device_type}: only the portable kernel is known to hold there"
    name = f"sm_{capability[0]}{capability[1]}"
    if capability == (9, 0):
        order = ("cudnn", "flash", "triton", "efficient", "math")
        return order, f"{name}: cuDNN's kernel is the fastest, with a mask or bias ours"
    if capability[0] in (9, 10):
        return ("cudnn", "flash", "efficient", "math"), f"{name}: cuDNN's kernel is the fastest"
    if capability[0] >= 8:
        return ("flash", "cudnn", "efficient", "math"), f"{name}: flash is the fastest"
    return ("efficient", "math"), f"{name}: older than the flash kernels"


def _objection(
    backend: str,
    device_type: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    has_mask: bool,
    has_bias: bool,
    has_dropout: bool,
    torch_version: tuple[int, int],
) -> str | None:
    """Why `backend` cannot run, or None."""
    if backend in ("einsum", "math"):
        return None
    if device_type == "cpu" and backend == "flash":
        if has_dropout:
            return "the CPU kernel has no dropout"
        return "the CPU kernel has no gradient for a bias" if has_bias else None
    if device_type != "cuda":
        return f"it needs CUDA, this is {device_type}"
    if dtype == torch.bfloat16 and capability < (8, 0):
        return "bf16 needs compute capability 8.0"
    if backend == "efficient":
        return None if capability >= (5, 0) else "it needs compute capability 5.0"
    if dtype not in HALF and backend != "triton":
        return f"it needs fp16 or bf16, not {str(dtype).removeprefix('torch.')}"
    if capability < (8, 0):
        return "it needs compute capability 8.0"
    if backend == "triton" and has_dropout:
        return "it has no dropout"
    if backend == "triton":
        return "head_dim is over 256" if head_dim > 256 else None
    if backend == "flash":
        if has_mask or has_bias:
            return f"it takes no {'mask' if has_mask else 'bias'}"
        return "head_dim is over 256" if head_dim > 256 else None
    if torch_version < (2, 5):
        return "cuDNN attention needs torch 2.5"
    if has_bias:
        return "it has no gradient for a bias"
    return "head_dim must be a multiple of 8 up to 128" if head_dim % 8 or head_dim > 128 else None


def missing_for_triton(
    device_type: str = "cuda", capability: tuple[int, int] | None = (8, 0)
) -> list[str]:
    """What our Triton kernels would need there, and is not. Triton builds a small C program when it
    first runs, so a GPU alone is not enough."""
    if device_type != "cuda":
        return ["a CUDA GPU"]
    missing = [] if find_spec("triton") else ["triton"]
    if not has_compiler("CC", "gcc", "clang"):
        missing.append("a C compiler")
    if (capability or (0, 0)) < (8, 0):
        missing.append("compute capability 8.0")
    return missing


def has_compiler(variable: str, *names: str) -> bool:
    """Whether the one that an environment variable names is there, or one of these."""
    return any(shutil.which(name) for name in (os.environ.get(variable), *names) if name)


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """CUDA's (major, minor), None elsewhere."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def sampling_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Of weights that are sampled from: "bf16", "fp32", or "auto". ValueError: it cannot be."""
    if wanted not in ("auto", "bf16", "fp32"):
        raise ValueError(f"precision={wanted}: expected one of auto, bf16, fp32")
    able = device.type == "cpu" or (device.type == "cuda" and capability_of(device) >= (8, 0))
    if wanted == "bf16" and not able:
        raise ValueError(f"precision=bf16: not on this {device.type} device; take fp32")
    half = wanted == "bf16" or (wanted == "auto" and able and device.type == "cuda")
    return torch.bfloat16 if half else torch.float32


def resolve(
    device: torch.device, dtype: torch.dtype, head_dim: int, requested: str = "auto", **uses: bool
) -> AttentionChoice:
    """`select_backends` for the machine at hand; `uses`: has_mask, has_bias, has_dropout."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return select_backends(
        device.type,
        capability_of(device),
        dtype,
        head_dim,
        torch_version=version,
        has_triton=not missing_for_triton(),
        requested=requested,
        **uses,
    )


def let_segments_grow() -> None:
    """Let PyTorch's allocator lengthen pieces of GPU memory instead of taking new ones: packed
    batches have a size of their own at each step, and it would take and free memory all the time.
    (H200, coarse_270m on real speech, first 40 steps: 116 ms each instead of 215.) Before the
    first use of a GPU; what the user has set stays."""
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def choose_packing(
    wanted: bool | None, filled: float, choice: AttentionChoice, device_type: str, head_dim: int
) -> tuple[bool, str]:
    """Whether clips come one after another rather than padded to the longest, and why.

    `filled`: the share of padded batches that is not padding. ValueError: asked for, and no kernel
    here can.
    """
    flash = "flash" in choice.backends and head_dim % 8 == 0
    able = device_type == "cpu" or (device_type == "cuda" and flash)
    if wanted and not able:
        raise ValueError(
            "data.packed=true needs PyTorch's flash kernel (fp16 or bf16, head_dim a multiple of "
            f"8), and the choice here is {choice}; set data.packed=false"
        )
    if wanted is not None:
        return wanted, "as configured"
    said = f"padded batches would be at worst {filled:.0%} full"
    return able and filled < PACKED_BELOW, said
