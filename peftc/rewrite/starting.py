"""How an adapter's tensors begin: drawn, by the rule, from the weights of its sites, from data."""

import functools
from collections.abc import Callable, Collection, Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from peftc.errors import AdapterError, PeftcError, RuleError
from peftc.graph.sites import WeightSite, canonical
from peftc.plan import Edit, PlannedParam
from peftc.rewrite.parts import Part, gathered_copy
from peftc.rewrite.sharding import is_sharded, own, put, spread, whole
from peftc.rule import Bound
from peftc.specs import AdapterSpec


def start(
    part: Part,
    spec: AdapterSpec,
    params: Collection[PlannedParam],
    host: nn.Module,
    weight: nn.Parameter | None,
    mesh: Any,
    sharing: Callable[[Edit, PlannedParam], Mapping[str, Tensor]],
    data: Any = None,
) -> None:
    """Initialise `params` of a part as a new adapter has them: the same on all processes of `mesh`, if that is not None.

    `host`: the site's module, `weight` its weight; `sharing` gives the weights of the sites that share a parameter; `data`:
    what calibration found there.
    """
    if part.edit.rule.container is not None:
        if params and not part.edit.whole:
            with torch.no_grad():
                inside = functools.partial(gathered_copy, host)
                part.edit.rule.start_module(part.module, spec, part.edit.constants, host, inside)
            spread(part.module.parameters(), mesh)
        return
    live = {param.name: part.tensor(param.key) for param in params}
    given = [param for param in params if not live[param.name].is_meta]
    tensors = {param.name: _unsharded(live[param.name]) for param in given}
    drawn_ones = drawn(part.edit) if any(param.init == "drawn" for param in given) else {}
    with torch.no_grad():
        for param in given:
            if param.init == "gathered":
                tensors[param.name].copy_(gathered(part.edit, param, sharing(part.edit, param)))
            elif param.init == "drawn":
                tensors[param.name].copy_(drawn_ones[param.name])
            elif param.init != "rule":
                fill(tensors[param.name], param.init, param.seed)
        by_rule = [param for param in given if param.init == "rule"]
        if by_rule:
            _start_by_rule(part, by_rule, tensors, weight, host._parameters.get("bias"), data)
    spread(tensors.values(), mesh)
    for name, tensor in tensors.items():
        if is_sharded(live[name]):
            put(live[name], tensor)


def _unsharded(tensor: Tensor) -> Tensor:
    """A whole tensor to be filled in the place of a sharded one; any other is itself."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=own(tensor).device) if is_sharded(tensor) else tensor


def drawn(edit: Edit) -> dict[str, Tensor]:
    """What the rule of `edit` draws, by name. Raises RuleError if the shapes are others than declared."""
    shapes = {param.name: param.shape for param in edit.params if param.init == "drawn"}
    values = edit.rule.draw(shapes, Bound(edit.constants))
    wrong = [name for name, shape in shapes.items() if name not in values or tuple(values[name].shape) != shape]
    if wrong:
        raise RuleError(f"rule {edit.rule.name!r} ({type(edit.rule).__name__}.draw): {wrong[0]} is not as declared")
    return values


def gathered(edit: Edit, param: PlannedParam, weights: Mapping[str, Tensor]) -> Tensor:
    """What the rule of `edit` makes of the `weights` of the sites that share `param`. Raises RuleError if it can't."""
    rule = edit.rule
    try:
        value = rule.gather(param.name, weights, Bound(edit.constants))
    except (NotImplementedError, RuntimeError) as error:
        raise RuleError(f"rule {rule.name!r} ({type(rule).__name__}.gather): {param.key}: {error!r}") from error
    if tuple(value.shape) != param.shape:
        raise RuleError(f"rule {rule.name!r} ({type(rule).__name__}.gather): {param.key} is not as declared")
    return value


def require_there(edit: Edit, weight: Tensor) -> None:
    """Raise AdapterError if `weight` has no values here to start from."""
    if weight.is_meta:
        raise AdapterError(
            f"{edit.site}: {edit.rule.name} starts from the weight here, which accelerate has offloaded. Load the model"
            " without offloading, or let the adapter start otherwise."
        )


def _start_by_rule(
    part: Part,
    params: list[PlannedParam],
    tensors: Mapping[str, Tensor],
    weight: nn.Parameter | None,
    bias: nn.Parameter | None,
    data: Any,
) -> None:
    edit, rule, site = part.edit, part.edit.rule, part.site
    assert isinstance(site, WeightSite), "other rules declare modules"
    if weight is not None:
        require_there(part.edit, weight)
    shapes = {param.name: param.shape for param in edit.params if param.init == "rule"}
    loaded = shapes.keys() - {param.name for param in params}
    try:
        stored = torch.empty(0) if weight is None else canonical(whole(weight), site)
        # Of the largest weights some rows are taken, which needs no copy of all.
        base = stored if rule.replaces_rows else wide(stored)
        lazy: dict[str, Callable[[], Any]] = {
            "bias": lambda: None if bias is None else wide(whole(bias)),
            "data": lambda: data,
            "loaded": lambda: {name: whole(value) for name, value in part.tensors().items() if name in loaded},
        }
        values = rule.initialise(base, shapes, Bound({**_others(part, tensors, shapes), **edit.constants}, lazy))
        for param in params:
            tensors[param.name].copy_(values[param.name])
    except PeftcError:
        raise
    except (NotImplementedError, KeyError, RuntimeError, TypeError) as error:
        raise RuleError(f"rule {rule.name!r} ({type(rule).__name__}.initialise) at {edit.site}: {error!r}") from error


def _others(part: Part, started: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters that have their values already, for those that start from them; `started` with them, whole."""
    names = [name for name in part.tensors() if name not in shapes]
    found = {name: started[name] if name in started else whole(part.tensors()[name]) for name in names}
    return {name: wide(tensor.detach()) for name, tensor in found.items()}


def wide(weight: Tensor) -> Tensor:
    """`weight` in float32 at least, as rules get it to start from."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def fill(tensor: Tensor, init: str, seed: int | None = None) -> None:
    """Initialise `tensor` in place as `init` says (see Param). kaiming_uniform has a = √5, as nn.Linear's default."""
    name, _, argument = init.partition(":")
    fillers: Mapping[str, Callable[[Tensor], Any]] = {
        "zeros": nn.init.zeros_,
        "ones": nn.init.ones_,
        "constant": lambda t: nn.init.constant_(t, float(argument)),
        "normal": lambda t: nn.init.normal_(t, std=float(argument or 1)),
        "uniform": lambda t: nn.init.uniform_(t, -float(argument), float(argument)),
        "kaiming_uniform": lambda t: nn.init.kaiming_uniform_(t, a=sqrt(5)),
    }
    with torch.no_grad():
        if seed is None:
            fillers[name](tensor)
            return
        # On the CPU in float32, so that it is the same on every device and in every dtype.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = torch.empty(tensor.shape)
            fillers[name](drawn)
        tensor.copy_(drawn)
