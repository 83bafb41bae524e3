"""Every feature that Attend accepts, on every backend: none may fall off a cliff unseen."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from model.attend import Attend
from model.backends import BACKENDS, resolve
from scripts.bench_tools import add_result_options, median_ms, report
from scripts.cli import find_device


@dataclass(frozen=True)
class Case:
    """A call: heads that share keys (None: all), queries (None: as many as keys), and extras."""

    num_kv_heads: int | None = 1
    queries: int | None = None
    mask: bool = False
    bias: str | None = None  # "fixed", "learnt"
    dropout: float = 0.0


CASES = {
    "multi-query": Case(),
    "grouped, 4 share": Case(num_kv_heads=-4),
    "multi-head": Case(num_kv_heads=None),
    "key mask": Case(mask=True),
    "fixed bias": Case(bias="fixed"),
    "learnt bias": Case(bias="learnt"),
    "key mask, learnt bias": Case(mask=True, bias="learnt"),
    "dropout 0.1": Case(dropout=0.1),
    "64 queries after a cache": Case(queries=64),
    "1 query after a cache": Case(queries=1),
    "1 query, key mask": Case(queries=1, mask=True),
}


def make_inputs(case: Case, parsed: argparse.Namespace, device: torch.device) -> tuple:
    """q, k, v, mask, bias of a case, random; lengths of 3/4 to all keys where there is a mask."""
    b, h, j, d = parsed.batch, parsed.heads, parsed.length, parsed.head_dim
    g, i = case.num_kv_heads or h, case.queries or j
    g = max(1, h // -g) if g < 0 else g
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator, device=device)
        return x.to(parsed.dtype).requires_grad_()

    q, k, v = random(b, h, i, d), random(b, g, j, d), random(b, g, j, d)
    mask = bias = None
    if case.mask:
        lengths = torch.linspace(0.75 * j, j, b, device=device).long()
        mask = torch.arange(j, device=device) < lengths[:, None]  # [b, j]
    if case.bias:
        bias = random(1, h, i, j)
        bias = bias if case.bias == "learnt" else bias.detach()
    return q, k, v, mask, bias


def measure(case: Case, backend: str, parsed: argparse.Namespace, device: torch.device) -> dict:
    """{"forward", "both"}: ms; or {"objection"}: why the backend does not do this."""
    inputs = make_inputs(case, parsed, device)
    uses = {"has_mask": case.mask, "has_bias": bool(case.bias), "has_dropout": case.dropout > 0}
    try:
        choice = resolve(device, parsed.dtype, parsed.head_dim, backend, **uses)
        attend = Attend(case.dropout, causal=True, flash=backend != "einsum", choice=choice)
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        gradient = torch.randn_like(inputs[0])

        def forward() -> Tensor:
            return attend(*inputs)

        def both() -> None:
            torch.autograd.grad(forward(), wanted, gradient)

        timed: dict[str, Callable] = {"forward": forward, "both": both}
        if case.queries == 1:  # a decoding step: nobody trains it
            del timed["both"]
        with torch.set_grad_enabled(True):
            times = {name: median_ms(function) for name, function in timed.items()}
    except (ValueError, RuntimeError) as error:
        return {"objection": str(error).splitlines()[0]}
    return times | {"chosen": list(choice.backends)}


def bench_attend(parsed: argparse.Namespace) -> None:
    """Cases x backends; `auto` also beside the plain multi-query case."""
    device = find_device(parsed.device)
    parsed.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    for name, case in tqdm(CASES.items(), unit="case"):
        cells = {b: measure(case, b, parsed, device) for b in parsed.backends}
        rows.append({"case": name, "backends": cells})
    plain = rows[0]["backends"].get("auto", {})
    table = [["ms, forward / with backward", *parsed.backends, "auto : multi-query"]]
    for row in rows:
        cells = []
        for cell in row["backends"].values():
            times = [cell[key] for key in ("forward", "both") if key in cell]
            cells.append(" / ".join(f"{ms:.2f}" for ms in times) or "-")
        auto = row["backends"].get("auto", {})
        both = "both" in auto and "both" in plain
        table.append(
            [row["case"], *cells, f"{auto['both'] / plain['both']:.1f} x" if both else "-"]
        )
    sizes = {name: getattr(parsed, name) for name in ("batch", "heads", "length", "head_dim")}
    print({**sizes, "dtype": str(parsed.dtype)})
    report(rows, table, parsed, sizes=sizes, dtype=str(parsed.dtype))
    objections: dict[str, list[str]] = {}
    for row in rows:
        for backend, cell in row["backends"].items():
            if "objection" in cell:
                objections.setdefault(f"{backend}: {cell['objection']}", []).append(row["case"])
    for objection, cases in objections.items():
        print(f"  {objection} ({'all' if len(cases) == len(rows) else ', '.join(cases)})")


def add_attend_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=bench_attend)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048, help="keys; and queries, mostly")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    add_result_options(parser)
