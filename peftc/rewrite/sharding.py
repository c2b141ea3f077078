"""Tensors that are sharded over processes (FSDP2's): whole ones out of them, and values into them.

What gathers is collective: every process of the mesh has to call it. Plain tensors pass through.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor."""
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, detached: gathered, if it is sharded."""
    sharded: Any = tensor.detach()
    return sharded.full_tensor() if is_sharded(tensor) else sharded


def own(tensor: Tensor) -> Tensor:
    """The shard of this process, which shares its memory; of any other tensor, itself."""
    sharded: Any = tensor
    return sharded.detach().to_local() if is_sharded(tensor) else tensor


def put(target: Tensor, value: Tensor) -> None:
    """Copy the whole `value` into `target`, or this process's part of it into its shard."""
    with torch.no_grad():
        if not is_sharded(target):
            target.copy_(value)
            return
        own(target).copy_(own(shard_as(value, target)))


def shard_as(value: Tensor, like: Any) -> Tensor:
    """`value` in the device, dtype and sharding of `like`; every process has the whole of it, so nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    moved = value.detach().to(device=own(like).device, dtype=like.dtype)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Let every module of `model` that FSDP2 has gathered hold its shards again, which outlast the next call."""
    for module in _fully_sharded(model):
        module.reshard()


def follow_flags(model: nn.Module) -> None:
    """Let what FSDP2 has gathered of a parameter want gradients if the parameter does: it looks once, at the first call."""
    for module in _fully_sharded(model):
        group = module._get_fsdp_state()._fsdp_param_group
        for parameter in group.fsdp_params if group is not None else ():
            gathered = getattr(parameter, "_unsharded_param", None)
            if gathered is not None:
                gathered.requires_grad_(parameter.sharded_param.requires_grad)


def _fully_sharded(model: nn.Module) -> list[Any]:
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    cls = getattr(fsdp, "FSDPModule", None) if running else None
    return [] if cls is None else [module for module in model.modules() if isinstance(module, cls)]
