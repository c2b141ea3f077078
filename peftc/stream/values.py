"""The tensors of an adapter as loading would leave them: read from its file, or computed as the rule has it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftc.errors import CheckpointError
from peftc.graph.sites import WeightSite, canonical, dtype_of
from peftc.plan import Edit, PlannedParam
from peftc.rewrite.starting import drawn, fill, gathered, wide
from peftc.rule import Bound
from peftc.stream.work import Work, file_key, file_of, stored_name, weight_site


def loaded(work: Work, edit: Edit, param: PlannedParam) -> Tensor:
    """The tensor of an adapter as it would be in memory: read, cast to the dtype that it has there."""
    source, dtype = work.sources[edit.adapter], dtype_of(param.dtype)
    key = file_key(work, edit, param)
    if key in source.fit.sources:
        return (source.tensors[source.fit.sources[key]] / param.stored).to(dtype)
    # What the file does not say: it was drawn, or follows from weights.
    if param.init == "drawn":
        return drawn(edit)[param.name].to(dtype)
    if param.init in ("rule", "gathered"):
        return _computed(work, edit, param).to(dtype)
    made = torch.empty(param.shape, dtype=dtype)
    fill(made, param.init, param.seed)
    return made


def _computed(work: Work, edit: Edit, param: PlannedParam) -> Tensor:
    """A parameter that follows from weights; those of one site are computed together."""
    group = (edit.adapter, param.key if param.shared else edit.site)
    if group in work.computed:
        return work.computed[group][param.name]
    if param.init == "gathered":
        own = [other for other in work.program.adapters[edit.adapter].edits if param in other.params]
        weights = {other.site: _weight(work, weight_site(work, other)) for other in own}
        work.computed[group] = {param.name: gathered(edit, param, weights)}
        return work.computed[group][param.name]
    for other in [other for other in work.computed if other[1] in work.program.plan.sites]:
        del work.computed[other]  # A site is folded once.
    site, values = weight_site(work, edit), {own.name: partial(loaded, work, edit, own) for own in edit.params}
    shapes = {own.name: own.shape for own in edit.params if own.init == "rule"}
    brought = {own.name for own in edit.params if file_key(work, edit, own) in work.sources[edit.adapter].fit.sources}
    lazy: dict[str, Callable[[], Any]] = {
        **{name: partial(_wide, value) for name, value in values.items() if name not in shapes},
        "bias": lambda: None if site.bias is None else wide(_stored(work, site.bias)),
        "data": lambda: None,
        "loaded": lambda: {name: values[name]() for name in shapes.keys() & brought},
    }
    work.computed[group] = edit.rule.initialise(_weight(work, site), shapes, Bound(edit.constants, lazy))
    return work.computed[group][param.name]


def _weight(work: Work, site: WeightSite) -> Tensor:
    """The weight of a site as rules start from it."""
    return wide(canonical(_stored(work, str(site.weight)), site))


def _wide(value: Callable[[], Tensor]) -> Tensor:
    return wide(value())


def _stored(work: Work, parameter: str) -> Tensor:
    stored = stored_name(work, parameter)
    assert stored is not None, "required before"
    return file_of(work, stored)[stored]


def following(work: Work) -> Iterator[str]:
    """The sites at which tensors of an adapter follow from a weight. Raises CheckpointError if that is stored in parts."""
    for name, source in work.sources.items():
        for edit in work.program.adapters[name].edits:
            lost = [
                param.key
                for param in edit.params
                if param.init != "drawn"
                and (not param.kept or (param.saved and file_key(work, edit, param) not in source.fit.sources))
            ]
            if not lost or edit.rule.container is not None:
                continue
            site = weight_site(work, edit)
            if stored_name(work, str(site.weight)) is None:
                raise CheckpointError(
                    f"{source.files.where}: lacks what {site.fqn} was trained from ({lost[0]}). That follows from a weight"
                    " that the checkpoint stores in parts. Load the adapter with peftc, save it, and merge what was saved;"
                    " of what no file has, load base and adapter, and save merge_and_unload()."
                )
            yield edit.site
