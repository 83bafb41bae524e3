"""Tensors that FSDP2 shards over processes (DTensor), whole and back. Plain ones pass through.

What gathers or spreads a shard is a collective: every process must call it, in the same order.
"""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(tensors: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """All of them, on the CPU, gathered one at a time; {} where a process only helps to."""
    gathered = ((name, whole(tensor.detach())) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in gathered if keep}


def laid_out_as(reference: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor in the place of `reference`: its device, dtype and shard.

    Each process cuts its shard out of its own copy: nothing is sent.
    """
    tensor = tensor.to(reference.device, reference.dtype)
    if not isinstance(reference, DTensor):
        return tensor
    mesh, placements = reference.device_mesh, reference.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def forget_gathered(model: nn.Module) -> None:
    """Drop gathered copies of sharded weights: while a module holds them, after a forward pass
    without a backward one, they are its parameters, and a change of the shards does not reach them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def copy_into(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Overwrite the parameters by name; shards by shards, or by whole tensors."""
    forget_gathered(model)
    for name, parameter in model.named_parameters():
        tensor = tensors[name]
        if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor):
            tensor = laid_out_as(parameter, tensor)
        parameter.copy_(tensor)
