"""Who sees to it that adapters learn the same in all processes: DDP, FSDP2, or what averages gradients here."""

import weakref
from collections.abc import Iterable
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


def _is_around(wrapper: Any, base: nn.Module) -> bool:
    return wrapper.process_group.size() > 1 and any(module is base for module in wrapper.modules())
