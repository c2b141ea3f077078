"""Fold and unfold.

A merge computes every new tensor first and exchanges them after: originals are kept, never written to, so undoing is
putting them back and nothing can be half merged. Weights are computed in float64 (float32 for half precision, and on
devices without float64) over all adapters of a site, and rounded once.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftc.errors import AdapterError, MergeError
from peftc.graph.sites import parameter_name, transformers_config
from peftc.plan import Edit
from peftc.plan.make import MODULES_TO_SAVE
from peftc.registry import find_rule
from peftc.rewrite.attach import canonical
from peftc.rewrite.program import Program, emit, tensor_slots
from peftc.rule import Bound


@dataclass(frozen=True)
class Folded:
    """A new value of a base parameter."""

    name: str
    value: Tensor


def merge(program: Program, names: Sequence[str], untie: bool) -> None:
    """Fold the active adapters `names` into the base weights.

    Raises MergeError, with nothing changed, if an edit has no fold, a result is not finite, a weight is tied and `untie`
    is false, or an unmerged adapter was loaded before at the same site and does not commute.
    """
    if program.merged:
        raise MergeError(f"{', '.join(program.merged)} merged already; call unmerge_adapter() first")
    for name in names:
        if name not in program.active:
            raise AdapterError(
                f"adapter {name!r} is not active ({', '.join(program.active) or 'none is'}); set it first"
            )
    groups = _groups(program, names)
    _require_mergeable(program, names, groups)
    if not untie:
        _require_untied(program, groups)
    folded = [item for fqn, edits in groups.items() for item in _fold_site(program, fqn, edits)]
    emit(program, [name for name in program.active if name not in names])
    for item in folded:
        _exchange(program, item)
    program.merged = tuple(names)


def unmerge(program: Program) -> None:
    """Put the original tensors back, and splice the adapters in again."""
    if not program.merged:
        raise MergeError("no adapter is merged")
    _restore(program)
    program.merged = ()
    emit(program, program.active)


def forget(program: Program) -> None:
    """Make the merge final: the folded weights become the base's, and the merged adapters are done with."""
    program.journal.merged.clear()
    program.journal.untied.clear()
    program.merged = ()


def _groups(program: Program, names: Sequence[str]) -> dict[str, list[Edit]]:
    """The edits to fold, by site, in load order."""
    order = {name: position for position, name in enumerate(program.plan.adapters)}
    groups: dict[str, list[Edit]] = {}
    for edit in sorted(program.plan.edits, key=lambda edit: order[edit.adapter]):
        if edit.adapter in names:
            groups.setdefault(edit.site, []).append(edit)
    return groups


def _require_mergeable(program: Program, names: Sequence[str], groups: dict[str, list[Edit]]) -> None:
    for fqn, edits in groups.items():
        for edit in edits:
            if edit.unmergeable:
                raise MergeError(f"{fqn}: adapter {edit.adapter!r} can't be merged: {edit.unmergeable}")
        _require_order(program, names, fqn, edits)


def _require_untied(program: Program, groups: dict[str, list[Edit]]) -> None:
    """Refuse to fold into a weight that is another module's too."""
    for fqn, edits in groups.items():
        keys = [param.key for param in edits[-1].params] if edits[-1].rule == MODULES_TO_SAVE else ["weight"]
        for key in keys:
            name = parameter_name(fqn, key)
            group = next((group for group in program.plan.ties if name in group), ())
            others = [other for other in group if not other.startswith(f"{fqn}.")]
            if others:
                raise MergeError(
                    f"{fqn}: its {key} is tied to {', '.join(others)}, and folding would change both. Pass untie=True to"
                    " give this end a tensor of its own (the model grows by it), or leave the site out."
                )


def _require_order(program: Program, names: Sequence[str], fqn: str, edits: Sequence[Edit]) -> None:
    """An adapter that stays unmerged may come before a merged one only if both are additive."""
    staying = [
        e for e in program.plan.edits if e.site == fqn and e.adapter in program.active and e.adapter not in names
    ]
    order = list(program.plan.adapters)
    for edit in edits:
        for other in staying:
            earlier = order.index(other.adapter) < order.index(edit.adapter)
            if earlier and not (_additive(program, edit) and _additive(program, other)):
                raise MergeError(
                    f"{fqn}: {edit.adapter!r} was loaded after {other.adapter!r}, which would stay unmerged, and the two"
                    " do not commute. Merge both, or deactivate one."
                )


def _additive(program: Program, edit: Edit) -> bool:
    rule = find_rule(program.plan.adapters[edit.adapter], program.plan.sites[edit.site])
    return rule is not None and rule.additive


def _fold_site(program: Program, fqn: str, edits: Sequence[Edit]) -> list[Folded]:
    site = program.plan.sites[fqn]
    if edits[-1].rule == MODULES_TO_SAVE:
        edit = edits[-1]
        copies = [(param.key, program.tensor(edit, param.key)) for param in edit.params]
        return [_checked(parameter_name(fqn, key), copy.detach().clone(), edit) for key, copy in copies]
    module = program.base.get_submodule(fqn)
    weight = module.get_parameter("weight").detach()
    bias = module._parameters.get("bias")
    dtype = fold_dtype(weight)
    new = canonical(weight, site).to(dtype)
    start_bias = new_bias = bias.detach().to(dtype) if bias is not None else None
    for edit in edits:
        rule = find_rule(program.plan.adapters[edit.adapter], site)
        assert rule is not None  # the plan was made with it
        values = {p.name: program.tensor(edit, p.key).detach().to(dtype) for p in edit.params}
        p = Bound({**values, **edit.constants})
        new = rule.fold(new, p)
        new_bias = rule.fold_bias(new_bias, p) if new_bias is not None else None
    stored = canonical(new, site).to(weight.dtype).contiguous()
    folded = [_checked(parameter_name(fqn, "weight"), stored, edits[-1])]
    if new_bias is not None and bias is not None and new_bias is not start_bias:
        folded.append(_checked(parameter_name(fqn, "bias"), new_bias.to(bias.dtype), edits[-1]))
    return folded


def fold_dtype(weight: Tensor) -> torch.dtype:
    """The dtype a weight is folded in: wide enough that one rounding remains."""
    half = weight.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half or weight.device.type == "mps" else torch.float64


def _checked(name: str, value: Tensor, edit: Edit) -> Folded:
    if value.device.type != "meta" and value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise MergeError(
            f"{name}: folding adapter {edit.adapter!r} gives NaN or Inf (a broken adapter, or a value over the range of"
            f" {value.dtype}); nothing was merged"
        )
    return Folded(name, value)


def _exchange(program: Program, item: Folded) -> None:
    """Point a base parameter at its new value; one that is tied elsewhere is replaced at this end only."""
    owner, _, leaf = item.name.rpartition(".")
    module = program.base.get_submodule(owner)
    parameter = module._parameters.get(leaf)
    if parameter is None:
        program.journal.merged[item.name] = module.get_buffer(leaf)
        module._buffers[leaf] = item.value
        return
    partner = _partner(program, item.name, parameter)
    if partner is None:
        program.journal.merged[item.name] = parameter.data
        parameter.data = item.value
        return
    program.journal.untied[item.name] = partner
    module._parameters[leaf] = nn.Parameter(item.value, requires_grad=False)
    config = transformers_config(program.base)
    if config is not None and config.tie_word_embeddings:
        config.tie_word_embeddings = False
        program.journal.tie_word_embeddings = True
    warnings.warn(f"{item.name} is no longer tied to {partner}: it was merged with untie=True", stacklevel=5)


def _partner(program: Program, name: str, parameter: nn.Parameter) -> str | None:
    """Another name that is bound to the very same parameter."""
    group = next((group for group in program.plan.ties if name in group), ())
    return next((other for other in group if other != name and _lookup(program, other) is parameter), None)


def _lookup(program: Program, name: str) -> nn.Parameter | None:
    owner, _, leaf = name.rpartition(".")
    return program.base.get_submodule(owner)._parameters.get(leaf)


def _restore(program: Program) -> None:
    journal = program.journal
    for name, original in journal.merged.items():
        owner, _, leaf = name.rpartition(".")
        slots = tensor_slots(program.base.get_submodule(owner), leaf)
        now: Tensor = slots[leaf]
        # Moved or cast since: the original goes along.
        back = original.to(device=now.device, dtype=now.dtype)
        if isinstance(now, nn.Parameter):
            now.data = back
        else:
            slots[leaf] = back
    for name, partner in reversed(journal.untied.items()):
        owner, _, leaf = name.rpartition(".")
        program.base.get_submodule(owner)._parameters[leaf] = program.base.get_parameter(partner)
    if journal.tie_word_embeddings:
        config = transformers_config(program.base)
        assert config is not None
        config.tie_word_embeddings = True
    journal.merged.clear()
    journal.untied.clear()
    journal.tie_word_embeddings = False
