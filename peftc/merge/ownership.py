"""Whose memory a weight is: merging in place must not change a tensor that somebody else holds."""

import gc
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peftc.errors import MergeError
from peftc.rewrite.program import Program


def require_own(program: Program, weights: Mapping[str, Tensor]) -> None:
    """Raise MergeError if another tensor shares the memory of one of `weights`, by name.

    Of a model that was given with inplace=True, plain tensors may (a state dict follows its model); another model's
    parameters may not. What the autograd graph of an earlier forward holds does not count.
    """
    for name, weight in weights.items():
        if not program.inplace and not weight.untyped_storage().resizable():
            raise MergeError(
                f"{name}: undo='residual' merges in place, and the memory of this tensor is not torch's own (an array, or a"
                " file it is mapped from). Compile with inplace=True, or use undo='keep'."
            )
    if all(_references(weight) <= 2 for weight in weights.values()):
        return
    gc.collect()  # A model that was dropped may still be there, in a cycle.
    shared = {w.untyped_storage().data_ptr(): name for name, w in weights.items() if _references(w) > 2}
    own = {id(tensor) for tensor in [*program.base.parameters(), *program.base.buffers()]}
    for other in gc.get_objects() if shared else ():
        if type(other) not in ((nn.Parameter,) if program.inplace else (Tensor, nn.Parameter)) or id(other) in own:
            continue
        name = shared.get(other.untyped_storage().data_ptr()) if not other.is_meta else None
        if name is not None:
            raise MergeError(
                f"{name}: undo='residual' merges in place, but the tensor is not this model's own: the original model,"
                " another one compiled from it, or a state dict holds it too. Drop those, compile with inplace=True, or use"
                " undo='keep', which copies nothing while the original is alive."
            )


def _references(weight: Tensor) -> int:
    """How many hold the memory: the parameter, the storage object asked for here, and others."""
    storage = weight.untyped_storage()  # Held while it is asked: some versions of torch keep it alive, others do not.
    return torch._C._storage_Use_Count(storage._cdata)  # pyright: ignore
