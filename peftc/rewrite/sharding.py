"""Tensors that are sharded over processes (FSDP2's, tensor parallel ones): whole ones out of them, and values into them.

What gathers is collective: every process of the mesh has to call it. Plain tensors pass through.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftc.graph.sites import Site, WeightSite


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor."""
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def has_processes() -> bool:
    """Whether this is one of several processes, or could be: without, nothing is sharded, and nobody has to look."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_flattened(tensor: Tensor) -> bool:
    """Whether FSDP1 manages `tensor`: a piece of flat memory between calls."""
    return getattr(tensor, "_fsdp_flattened", False)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, detached: gathered, if it is sharded."""
    sharded: Any = tensor.detach()
    return sharded.full_tensor() if is_sharded(tensor) else sharded


def own(tensor: Tensor) -> Tensor:
    """The shard of this process, which shares its memory; of any other tensor, itself."""
    sharded: Any = tensor
    return sharded.detach().to_local() if is_sharded(tensor) else tensor


def put(target: Tensor, value: Tensor) -> None:
    """Copy `value` into `target`: the whole of it, or into a shard this process's part."""
    with torch.no_grad():
        if not is_sharded(target):
            target.copy_(value)
            return
        own(target).copy_(own(value if is_sharded(value) else shard_as(value, target)))


def exchanged(parameter: Any, value: Tensor) -> Tensor:
    """What `parameter` had, which has `value` now: each in its own memory, as others may share that."""
    if not is_sharded(parameter):
        before, parameter.data = parameter.data, value
        return before
    before = parameter.detach()
    new: Any = value if is_sharded(value) else shard_as(value, parameter)
    parameter._local_tensor.data = new._local_tensor
    return before


def shard_as(value: Tensor, like: Any) -> Tensor:
    """`value` in the device, dtype and sharding of `like`; every process has the whole of it, so nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    moved = value.detach().to(device=own(like).device, dtype=like.dtype)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def shard_like(local: Tensor, like: Any) -> Tensor:
    """The tensor of the sharding and shape of `like` whose shard in this process is `local`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@dataclass(frozen=True)
class Layout:
    """How tensor parallelism lays a weight out: its mesh, and for each dimension of that the axis of the canonical weight
    (`o` rows, `i` columns) that is split over it, or "".
    """

    mesh: Any
    axes: tuple[str, ...]

    def placements(self, axes: str | None) -> list[Any]:
        """Those of a tensor that runs along `axes` of the canonical weight: split as the weight is, or else everywhere."""
        from torch.distributed.tensor import Replicate, Shard

        known = axes or ""
        return [Shard(known.index(axis)) if axis and axis in known else Replicate() for axis in self.axes]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, axes: str | None) -> Tensor:
        """A tensor of `shape` laid out as the weight is; not initialised."""
        from torch.distributed import tensor

        return tensor.empty(*shape, dtype=dtype, device_mesh=self.mesh, placements=self.placements(axes))


@dataclass(frozen=True)
class Places:
    """What new tensors of a model go by. `laid`: by id of a tensor parallel parameter, its mesh and placements, apart from
    what FSDP2 adds to them; `mesh`: the processes that share the model, if any do.
    """

    laid: Mapping[int, tuple[Any, tuple[Any, ...]]]
    mesh: Any | None

    def layout(self, site: Site, weight: Tensor | None) -> Layout | None:
        """The layout of the weight of `site`; None if each process computes with all of it."""
        placed = self.laid.get(id(weight))
        return layout_of(site, placed) if placed is not None and isinstance(site, WeightSite) else None


def places_of(model: nn.Module) -> Places:
    """What new tensors of `model` go by."""
    return Places(_laid(model), widest_mesh(model))


def _laid(model: nn.Module) -> Mapping[int, tuple[Any, tuple[Any, ...]]]:
    found: dict[int, tuple[Any, tuple[Any, ...]]] = {}
    known = managed(model)
    for parameter in _sharded_parameters(model):
        spec: Any = parameter._spec
        if id(parameter) in known:
            inside = known[id(parameter)]
            spec = getattr(inside, "_unsharded_dtensor_spec", None) or getattr(inside, "_tp_spec", None)
        if spec is not None:
            found[id(parameter)] = (spec.mesh, tuple(spec.placements))
    return found


def layout_of(site: WeightSite, placed: tuple[Any, tuple[Any, ...]]) -> Layout:
    """The layout of the weight of `site`, whose mesh and placements are `placed`."""
    from torch.distributed.tensor import Shard

    mesh, placements = placed
    stored = ("e" if site.experts is not None else "") + ("io" if site.layout == "in_out" else "oi")
    # A weight of packed parts is cut inside of each: what is whole everywhere is right for it too.
    dims = (p.dim if type(p) is Shard else len(stored) for p in placements)
    return Layout(mesh, tuple(stored[dim] if dim < len(stored) else "" for dim in dims))


def spread(tensors: Iterable[Tensor], mesh: Any | None) -> None:
    """Let whole tensors, which every process has drawn by itself, be on all of `mesh` what the first has."""
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)] if mesh is not None else []
    for tensor in tensors:
        for group in groups:
            torch.distributed.broadcast(tensor.detach(), torch.distributed.get_global_rank(group, 0), group)


def part_of(tensor: Any) -> tuple[slice, ...] | None:
    """Which part of a sharded tensor this process has, by dimension; None if that is no one piece."""
    from torch.distributed.tensor import Replicate, Shard

    parts = [(0, size) for size in tensor.shape]
    coordinate = tensor.device_mesh.get_coordinate()
    for number, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        if type(placement) is not Shard:
            return None
        start, stop = parts[placement.dim]
        length = -(-(stop - start) // tensor.device_mesh.size(number))
        first = min(stop, start + coordinate[number] * length)
        parts[placement.dim] = (first, min(stop, first + length))
    return tuple(slice(start, stop) for start, stop in parts)


def values_at(tensor: Tensor, places: Sequence[Tensor]) -> Tensor:
    """The values of a tensor at these `places`, indices by dimension; of a sharded one, from whoever has them."""
    part = part_of(tensor) if is_sharded(tensor) else None
    if part is None:
        return whole(tensor)[tuple(places)]
    sharded, local = cast(Any, tensor), own(tensor)
    mine = torch.stack([(at >= one.start) & (at < one.stop) for at, one in zip(places, part, strict=True)]).all(0)
    # Of those that have the same, one.
    mesh, coordinate = sharded.device_mesh, sharded.device_mesh.get_coordinate()
    mine &= all(coordinate[dim] == 0 for dim, placed in enumerate(sharded.placements) if placed.is_replicate())
    bits = _BITS[local.itemsize]
    found = torch.zeros(len(mine), dtype=torch.int64, device=local.device)
    inside = tuple(at[mine] - one.start for at, one in zip(places, part, strict=True))
    found[mine] = local[inside].view(bits).long()
    add_up(found, mesh)
    return found.to(bits).view(local.dtype)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def widest_mesh(model: nn.Module) -> Any | None:
    """The mesh of most processes that parameters of `model` lie on; None if none is sharded."""
    return _widest(parameter.device_mesh for parameter in _sharded_parameters(model))


def _widest(meshes: Iterable[Any]) -> Any | None:
    return max(meshes, key=lambda mesh: mesh.size(), default=None)


def managed(model: nn.Module) -> dict[int, Any]:
    """What FSDP2 knows of its parameters of `model`, by their ids."""
    return {id(known.sharded_param): known for group in _groups(model) for known in group.fsdp_params}


def data_mesh(model: nn.Module) -> Any | None:
    """The mesh over which FSDP2 averages gradients; None if it does not manage any of `model`."""
    return _widest(group.mesh_info.mesh for group in _groups(model))


def _sharded_parameters(model: nn.Module) -> list[Any]:
    return [parameter for parameter in model.parameters() if is_sharded(parameter)] if has_processes() else []


def add_up(tensor: Tensor, mesh: Any) -> None:
    """Let `tensor` be, on every process of `mesh`, the sum of what all have."""
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(tensor, group=mesh.get_group(dim))


def is_shared(model: nn.Module) -> bool:
    """Whether several processes hold `model` together."""
    mesh = widest_mesh(model)
    return mesh is not None and mesh.size() > 1


def agreed(model: nn.Module, error: Exception | None) -> bool:
    """Whether no process that shares `model` has an `error`: what one refuses, all have to."""
    mesh = widest_mesh(model)
    if mesh is None:
        return error is None
    parameter = next(iter(_sharded_parameters(model)), None)
    count = torch.tensor(float(error is not None), device="cpu" if parameter is None else own(parameter).device)
    add_up(count, mesh)
    return not bool(count)


def reshard(model: nn.Module) -> None:
    """Let every module of `model` that FSDP2 has gathered hold its shards again, which outlast the next call."""
    for module in _fully_sharded(model):
        module.reshard()


def follow_flags(model: nn.Module) -> None:
    """Let what FSDP2 has gathered of a parameter want gradients if the parameter does: it looks once, at the first call."""
    for group in _groups(model):
        for parameter in group.fsdp_params:
            gathered = getattr(parameter, "_unsharded_param", None)
            if gathered is not None:
                gathered.requires_grad_(parameter.sharded_param.requires_grad)


def _groups(model: nn.Module) -> list[Any]:
    """FSDP2's groups of parameters, which it gathers together."""
    found: list[Any] = []
    for module in _fully_sharded(model):
        state = module._get_fsdp_state()
        several = getattr(state, "_fsdp_param_groups", None)  # One, before torch 2.10.
        found += [state._fsdp_param_group] if several is None else several
    return [group for group in found if group is not None]


def _fully_sharded(model: nn.Module) -> list[Any]:
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    cls = getattr(fsdp, "FSDPModule", None) if has_processes() else None
    return [] if cls is None else [module for module in model.modules() if isinstance(module, cls)]
