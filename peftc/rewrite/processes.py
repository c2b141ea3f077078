"""Who sees to it that adapters learn the same in all processes: DDP, FSDP2, or what averages gradients here."""

import sys
import weakref
from collections.abc import Collection, Iterable
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parallel import DistributedDataParallel

from peftc.errors import AdapterError, PeftcError
from peftc.graph.finding import module_at
from peftc.graph.hooked import parallel_style
from peftc.graph.sites import Site, WeightSite
from peftc.plan import Edit, Plan
from peftc.rewrite.hosts import is_host
from peftc.rewrite.parts import Adapter
from peftc.rewrite.program import Program
from peftc.rewrite.sharding import Places, data_mesh, has_processes, is_flattened, is_sharded, managed, places_of

# What DeepSpeed notes on the parameters that it partitions.
_ZERO3 = "ds_id"
# By wrapper, the ids of the parameters whose gradients it averages: those that trained when it was made.
_WRAPPERS = weakref.WeakKeyDictionary[nn.Module, frozenset[int]]()


def _note_wrapper(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if isinstance(parent, DistributedDataParallel) and name == "module" and child is not None:
        _WRAPPERS[parent] = frozenset(id(parameter) for parameter in child.parameters() if parameter.requires_grad)


def _keep_layout(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Refuse to let the weights of a host be laid out over processes past its adapters."""
    old = module._parameters.get(name)
    if old is None or parameter is None or not is_host(module):
        return
    if is_sharded(parameter) and not is_sharded(old):
        raise AdapterError(
            f"{type(module).__name__}.{name}: adapters are on it, which parallelize_module does not lay out with it."
            " Parallelise first, then compile and load adapters, which are laid out as their weights are."
        )


register_module_module_registration_hook(_note_wrapper)
register_module_parameter_registration_hook(cast(Any, _keep_layout))


def require_growable(model: nn.Module) -> None:
    """Raise AdapterError if FSDP1 has flattened `model`, or DeepSpeed has taken its parameters apart."""
    if "deepspeed" not in sys.modules and not has_processes():
        return
    apart = next((name for name, parameter in model.named_parameters() if _ZERO3 in parameter.__dict__), None)
    if apart is not None:
        raise AdapterError(
            f"{apart}: DeepSpeed's ZeRO-3 holds it in pieces, and gathers them in hooks of modules, past which generated"
            " code reads the tensors of adapters. Use ZeRO-2, which leaves parameters whole, or fully_shard."
        )
    flat = next((name for name, parameter in model.named_parameters() if is_flattened(parameter)), None)
    if flat is not None:
        raise AdapterError(
            f"{flat}: FullyShardedDataParallel has flattened the model, which then takes no more parameters. Compile it,"
            " with all adapters, before it is wrapped (use_orig_params=True); or use fully_shard, which may come first."
        )


def require_placed(model: nn.Module, plan: Plan, adapters: Collection[str]) -> None:
    """Raise AdapterError if one of `adapters` can't be laid out as the tensor parallel `model` is."""
    places = places_of(model)
    for edit in plan.edits if places.laid else ():
        reason = _unplaced(model, plan.sites[edit.site], edit, places) if edit.adapter in adapters else None
        if reason is not None:
            raise AdapterError(
                f"{edit.site or 'the model'}: {edit.adapter!r} can't be on a tensor parallel model: {reason}"
            )


def _unplaced(model: nn.Module, site: Site, edit: Edit, places: Places) -> str | None:
    owner = module_at(model, site.owner)
    around = parallel_style(owner.__dict__.get("forward"))
    laid = any(id(parameter) in places.laid for parameter in owner.parameters())
    if "past" in edit.slots:
        return "its keys and values are those of all heads, and each process has some of them. Prompt tuning works."
    if laid and site.op == "attention_call":
        return "it computes with all heads, and each process has some of them. Prompt tuning works."
    if isinstance(site, WeightSite) and laid and edit.rule.arguments:
        given = ", ".join(edit.rule.arguments)
        return f"{edit.rule.name} takes {given} of the call, which lie beside tensors that are laid out over processes."
    if edit.whole and laid and any("forward" in module.__dict__ for module in owner.modules()):
        return (
            "transformers has put tensor parallelism around its forward, which a copy would share with the original."
            " Adapt it (target_modules), or leave it out of the tensor parallel plan."
        )
    if isinstance(site, WeightSite) and laid and site.host is not None:
        return "its module computes with the weight in a way of its own. Leave it out of the tensor parallel plan."
    if around is not None and site.op == "linear" and edit.slots == ("weight",):
        return f"{edit.rule.name} replaces the weight, of which transformers gives each process's forward its own part."
    return None


def require_unflattened(adapter: Adapter, error: type[PeftcError], what: str) -> None:
    """Raise `error` if FSDP1 has made pieces of flat memory of the tensors of `adapter`; `what` to do instead."""
    for part in adapter.parts.values():
        for param in part.edit.params:
            tensor = part.tensor(param.key)
            if is_flattened(tensor) and tuple(tensor.shape) != tuple(param.shape):
                raise error(
                    f"{part.edit.site}.{param.key} of {adapter.name!r}: FullyShardedDataParallel has flattened the model,"
                    f" and a process has no tensor of it, but pieces of memory. Nothing was changed. {what}"
                )


def require_common_gradients(program: Program, parameters: Iterable[Tensor]) -> None:
    """Raise AdapterError if gradients of `parameters` are each process's own."""
    wanted = {id(parameter) for parameter in parameters}
    learning = ", ".join(repr(name) for name in program.learning)
    wrappers = [known for wrapper, known in _WRAPPERS.items() if _is_around(wrapper, program.base)]
    if wrappers and not any(wanted <= known for known in wrappers):
        raise AdapterError(
            f"{learning}: trained since the DistributedDataParallel around the model was made, which averages gradients of"
            " what trained then; each process would learn its own. Nothing was changed. Make the wrapper anew after"
            " choosing adapters, or let all that will train do so (set_requires_grad) before it is made, with"
            " find_unused_parameters=True."
        )
    mesh = data_mesh(program.base)
    averaged = program.made.averaging
    known = {*managed(program.base), *(id(p) for p in (averaged.parameters if averaged is not None else ()))}
    if mesh is not None and mesh.size() > 1 and not wanted <= known:
        raise AdapterError(
            f"{learning}: some of what trains is in modules that fully_shard was not given, so each process would learn"
            " its own. Nothing was changed. Call fully_shard on the whole model too, after its layers; or once more"
            " set_adapter, which sees that nobody averages these gradients."
        )


def require_whole_rows(base: nn.Module) -> None:
    """Raise AdapterError if the model is tensor parallel."""
    if places_of(base).laid:
        raise AdapterError(
            "adapter_names: the model is tensor parallel, and rows of tensors that are laid out over processes can't be"
            " picked one by one. Give each adapter a batch of its own (set_adapter)."
        )


def require_same_gradients(program: Program, names: Collection[str]) -> None:
    """Raise AdapterError if a batch of rows for the adapters `names` could give others gradients than in other processes.

    FSDP2 adds up what got one, and processes that bring other tensors than each other fail, or hang.
    """
    left = [name for name in program.learning if name not in names and name in program.adapters]
    known = managed(program.base) if left else {}
    missing = [
        name for name in left if any(id(holder[leaf]) in known for holder, leaf in program.adapters[name].trained)
    ]
    mesh = data_mesh(program.base) if missing else None
    if mesh is not None and mesh.size() > 1:
        raise AdapterError(
            f"adapter_names: {missing[0]!r} trains and has no row in this batch; under fully_shard all processes have to"
            " give gradients to the same adapters in every step. Give each process's batch a row of each that trains, or"
            f" let fewer train (set_requires_grad({missing[0]!r}, False)). Adapters that are added after fully_shard are"
            " free of this."
        )


def _is_around(wrapper: Any, base: nn.Module) -> bool:
    return wrapper.process_group.size() > 1 and any(module is base for module in wrapper.modules())
