"""Who sees to it that adapters learn the same in all processes: DDP, FSDP2, or what averages gradients here."""

import weakref
from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from peftc.errors import AdapterError
from peftc.rewrite.program import Program
from peftc.rewrite.sharding import data_mesh, managed

# By wrapper, the ids of the parameters whose gradients it averages: those that trained when it was made.
_WRAPPERS = weakref.WeakKeyDictionary[nn.Module, frozenset[int]]()


def _note_wrapper(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if isinstance(parent, DistributedDataParallel) and name == "module" and child is not None:
        _WRAPPERS[parent] = frozenset(id(parameter) for parameter in child.parameters() if parameter.requires_grad)


register_module_module_registration_hook(_note_wrapper)


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


def require_same_gradients(program: Program, names: Collection[str]) -> None:
    """Raise AdapterError if a batch of rows for the adapters `names` could give others gradients than in other processes.

    FSDP2 adds up what got one, and processes that bring other tensors than each other fail, or hang.
    """
    left = [name for name in program.learning if name not in names and name in program.adapters]
    known = managed(program.base) if left else {}
    missing = [name for name in left if any(id(holder[leaf]) in known for holder, leaf in program.adapters[name].trained)]
    mesh = data_mesh(program.base) if missing else None
    if mesh is not None and mesh.size() > 1:
        raise AdapterError(
            f"adapter_names: {missing[0]!r} trains and has no row in this batch; under fully_shard all processes have to give"
            " gradients to the same adapters in every step. Give each process's batch a row of each that trains, or let"
            f" fewer train (set_requires_grad({missing[0]!r}, False)). Adapters that are added after fully_shard are free of"
            " this."
        )


def _is_around(wrapper: Any, base: nn.Module) -> bool:
    return wrapper.process_group.size() > 1 and any(module is base for module in wrapper.modules())
