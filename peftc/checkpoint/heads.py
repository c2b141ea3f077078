"""Heads of another size than the base's: an adapter's copy of one is as large as its file says."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftc.checkpoint.spelling import respelled
from peftc.checkpoint.state import key_of
from peftc.edits import Edit
from peftc.graph.sites import is_pretrained
from peftc.rewrite.parts import Part
from peftc.rewrite.program import Program


def fit_heads(program: Program, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Give the copies of linears that adapter `name` saves whole, and are no embeddings, as many outputs as `tensors` have.

    Only the number of outputs may differ, and weight and bias must agree in it; the rest is left to be refused.
    """
    adapter = program.adapters[name]
    own = {key_of(adapter.spec, edit, p): edit for edit in adapter.edits if edit.whole for p in edit.params}
    if not own:
        return
    names = respelled(program.base, adapter.spec, list(tensors), own, program.given.requires_grad)
    given = {new: tensors[old] for old, new in names.items()}
    for part in [part for part in adapter.parts.values() if part.edit.whole and not _is_embedding(program, part)]:
        found = {p.key: given.get(key_of(adapter.spec, part.edit, p)) for p in part.edit.params}
        shapes = {key: tuple(tensor.shape) for key, tensor in found.items() if tensor is not None}
        changed = {key: shape for key, shape in shapes.items() if shape != tuple(part.tensor(key).shape)}
        if changed and all(_is_output(part, key, shapes) for key in changed):
            before, after = part.edit, _resized(part, changed)
            edits = tuple(after if edit is before else edit for edit in program.plan.edits)
            program.plan = replace(program.plan, edits=edits)


def _is_embedding(program: Program, part: Part) -> bool:
    if not is_pretrained(program.base):
        return False
    base: Any = program.base
    module = program.modules[part.edit.site]
    return isinstance(module, nn.Embedding) or module is base.get_output_embeddings()


def _is_output(part: Part, key: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the tensor is of a linear, and differs in the number of outputs as its weight and bias together do."""
    module, leaf = part.owners[key]
    if type(module) is not nn.Linear:
        return False
    path = key.removesuffix(leaf)
    weight, bias = shapes.get(f"{path}weight"), shapes.get(f"{path}bias")
    whole = weight is not None and (module._parameters.get("bias") is None or bias == weight[:1])
    return whole and weight is not None and len(weight) == 2 and weight[1] == module.in_features


def _resized(part: Part, shapes: Mapping[str, tuple[int, ...]]) -> Edit:
    """The edit of `part` after giving its tensors these shapes."""
    for key, shape in shapes.items():
        module, leaf = part.owners[key]
        old = cast(nn.Parameter, module._parameters[leaf])
        module._parameters[leaf] = nn.Parameter(
            torch.zeros(shape, dtype=old.dtype, device=old.device), old.requires_grad
        )
        cast(nn.Linear, module).out_features = shape[0]
    params = tuple(replace(p, shape=shapes[p.key]) if p.key in shapes else p for p in part.edit.params)
    part.become(replace(part.edit, params=params))
    return part.edit
