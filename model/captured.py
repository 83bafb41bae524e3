"""A function as CUDA graphs: its kernels are recorded once, then launched all at one go."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

WARM_UP = 3  # plain calls before a capture: they choose algorithms, compile, allocate state


class Captured:
    """function(variant, **inputs) -> {name: tensor}, captured once per variant.

    What it reads and changes besides its inputs (weights, moments, running averages) must be
    tensors that stay where they are, and nothing in it may wait for the GPU. The inputs of a
    variant must keep their shapes. All variants share memory: only what they return survives, as a
    copy.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]]):
        self.function, self.stream = function, torch.cuda.Stream()
        self.num_calls: dict[Hashable, int] = {}
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, dict, dict]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, variant: Hashable, **inputs: Tensor) -> dict[str, Tensor]:
        calls = self.num_calls[variant] = self.num_calls.get(variant, 0) + 1
        if calls <= WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(variant, **inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if variant not in self.graphs:
            held = {name: value.clone() for name, value in inputs.items()}
            graph = torch.cuda.CUDAGraph()
            # a loader's thread, which pins memory meanwhile, is not to be captured
            how = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, **how):
                outputs = self.function(variant, **held)
            self.graphs[variant] = (graph, held, outputs)
        graph, held, outputs = self.graphs[variant]
        for name, value in inputs.items():
            held[name].copy_(value)
        graph.replay()
        return {name: value.clone() for name, value in outputs.items()}
