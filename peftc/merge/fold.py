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

from peftc.errors import AdapterError, MergeError, RuleError
from peftc.graph.sites import parameter_name, transformers_config
from peftc.plan import MODULES_TO_SAVE, Edit, PlannedParam
from peftc.registry import find_rule
from peftc.rewrite.attach import canonical
from peftc.rewrite.program import Program, tensor_slots
from peftc.rewrite.switch import emit
from peftc.rule import Bound


@dataclass(frozen=True)
class Folded:
    """A new value of the tensor `leaf` of module `owner`."""

    owner: str
    leaf: str
    value: Tensor


def merge(program: Program, names: Sequence[str], untie: bool) -> None:
    """Fold the active adapters `names` into the base weights.

    Raises MergeError, with nothing changed, if an edit has no fold, a result is not finite, a weight is tied and `untie`
    is false, or an unmerged adapter was loaded before at the same site and does not commute.
    """
    if program.merged:
        raise MergeError(f"{', '.join(program.merged)} merged already; call unmerge_adapter() first")
    if not program.enabled:
        raise MergeError("adapters are disabled; merge outside of disable_adapter()")
    for name in names:
        if name not in program.active:
            raise AdapterError(
                f"adapter {name!r} is not active ({', '.join(program.active) or 'none is'}); set it first"
            )
    groups = _groups(program, names)
    _require_mergeable(program, names, groups)
    device = next((p.device.type for p in program.base.parameters() if not p.is_meta), "cpu")
    # The caller's autocast would round the fold, and tensors made in inference mode can't be trained with.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        folded = [item for fqn, edits in groups.items() for item in _fold_site(program, fqn, edits)]
    if not untie:
        _require_untied(program, folded)
    program.merged = tuple(names)
    try:
        emit(program)
    except BaseException:
        program.merged = ()
        raise
    for item in folded:
        _exchange(program, item)


def unmerge(program: Program) -> None:
    """Put the original tensors back, and splice the adapters in again."""
    if not program.merged:
        raise MergeError("no adapter is merged")
    merged, program.merged = program.merged, ()
    try:
        emit(program)
    except BaseException:
        program.merged = merged
        raise
    _restore(program)


def forget(program: Program) -> None:
    """Make the merge final: the folded weights become the base's, and the merged adapters are done with."""
    program.journal.merged.clear()
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
                raise MergeError(f"{fqn or 'the model'}: adapter {edit.adapter!r} can't be merged: {edit.unmergeable}")
        _require_order(program, names, fqn, edits)


def _require_untied(program: Program, folded: Sequence[Folded]) -> None:
    """Refuse to fold into a tensor that is another module's too."""
    for item in folded:
        partner = _partner(program, item)
        if partner is not None:
            raise MergeError(
                f"{item.owner}: its {item.leaf} is tied to {partner}, and folding would change both. Pass untie=True to"
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
        return [_fold_copy(program, edits[-1], param) for param in edits[-1].params]
    module = program.owners[fqn]
    weight = module.get_parameter("weight").detach()
    bias = module._parameters.get("bias")
    dtype = fold_dtype(weight)
    new = canonical(weight, site).to(dtype, copy=True)
    start_bias = new_bias = bias.detach().to(dtype, copy=True) if bias is not None else None
    for edit in edits:
        rule = find_rule(program.plan.adapters[edit.adapter], site)
        assert rule is not None, "the plan was made with it"
        values = {p.name: program.tensor(edit, p.key).detach().to(dtype) for p in edit.params}
        p = Bound({**values, **edit.constants})
        new = rule.fold(new, p)
        new_bias = rule.fold_bias(new_bias, p) if new_bias is not None else None
    stored = canonical(new, site)
    folded = [_checked(Folded(fqn, "weight", stored.to(weight.dtype).contiguous()), weight, edits[-1])]
    if new_bias is not None and bias is not None and new_bias is not start_bias:
        folded.append(_checked(Folded(fqn, "bias", new_bias.to(bias.dtype)), bias, edits[-1]))
    return folded


def _fold_copy(program: Program, edit: Edit, param: PlannedParam) -> Folded:
    """The trained copy's own tensor, in the place of the base module's. A buffer may hold an infinite mask."""
    value = program.tensor(edit, param.key).detach().clone()
    path, _, leaf = param.key.rpartition(".")
    item = Folded(parameter_name(edit.site, path) if path else edit.site, leaf, value)
    return _checked(item, value, edit) if param.trainable else item


def fold_dtype(weight: Tensor) -> torch.dtype:
    """The dtype a weight is folded in: wide enough that one rounding remains."""
    half = weight.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half or weight.device.type == "mps" else torch.float64


def _checked(item: Folded, old: Tensor, edit: Edit) -> Folded:
    value, name = item.value, parameter_name(item.owner, item.leaf)
    if value.shape != old.shape:
        raise RuleError(
            f"rule {edit.rule!r}: folding into {name} gives shape {tuple(value.shape)}, not {tuple(old.shape)}"
        )
    if value.device.type != "meta" and not bool(torch.isfinite(value).all()):
        raise MergeError(
            f"{name}: folding adapter {edit.adapter!r} gives NaN or Inf (a broken adapter, or a value over the range of"
            f" {value.dtype}); nothing was merged"
        )
    return item


def _exchange(program: Program, item: Folded) -> None:
    """Put the new tensor in the place of the old one, which the journal keeps as it is: the same object, ties and all."""
    partner = _partner(program, item)
    slots = tensor_slots(program.base.get_submodule(item.owner), item.leaf)
    old: Tensor = slots[item.leaf]
    program.journal.merged.append((item.owner, item.leaf, old))
    slots[item.leaf] = nn.Parameter(item.value, requires_grad=False) if isinstance(old, nn.Parameter) else item.value
    if partner is None:
        return
    config = transformers_config(program.base)
    if config is not None and config.tie_word_embeddings:
        config.tie_word_embeddings = False
        program.journal.tie_word_embeddings = True
    name = parameter_name(item.owner, item.leaf)
    warnings.warn(f"{name} is no longer tied to {partner}: it was merged with untie=True", stacklevel=5)


def _partner(program: Program, item: Folded) -> str | None:
    """The name of a parameter of another module that is the very tensor that `item` is about to replace."""
    name = parameter_name(item.owner, item.leaf)
    group = next((group for group in program.plan.ties if name in group), ())
    old = program.base.get_submodule(item.owner)._parameters.get(item.leaf)
    return next((other for other in group if other != name and _lookup(program, other) is old), None)


def _lookup(program: Program, name: str) -> nn.Parameter | None:
    owner, _, leaf = name.rpartition(".")
    return program.base.get_submodule(owner)._parameters.get(leaf)


def _restore(program: Program) -> None:
    journal = program.journal
    for owner, leaf, old in reversed(journal.merged):
        slots = tensor_slots(program.base.get_submodule(owner), leaf)
        # Moved or cast since: the original goes along.
        old.data = old.data.to(device=slots[leaf].device, dtype=slots[leaf].dtype)
        slots[leaf] = old
    journal.merged.clear()
    if journal.tie_word_embeddings:
        config = transformers_config(program.base)
        assert config is not None, "it was there when the tie was cut"
        config.tie_word_embeddings = True
        journal.tie_word_embeddings = False
