"""What a rule asks for at a site, and the edit that it becomes."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from peftc.edits import Edit, PlannedParam
from peftc.errors import CaptureError, RuleError
from peftc.graph.sites import Site, WeightSite, dtype_of
from peftc.rule import SLOTS, Constant, Param, Placed, Rule
from peftc.specs import AdapterSpec


@dataclass(frozen=True)
class Claim:
    """A rule at a site: the operands it replaces, and the constants and parameters it brings. As in `Edit`."""

    site: Site
    rule: Rule[Any]
    slots: tuple[str, ...]
    params: tuple[PlannedParam, ...]
    constants: dict[str, Constant]
    unmergeable: str | None = None

    def edit(self, adapter: str) -> Edit:
        """The edit that this is for `adapter`."""
        return Edit(
            self.site.fqn, adapter, self.rule, self.slots, self.params, self.constants, {}, unmergeable=self.unmergeable
        )


@dataclass(frozen=True)
class Access:
    """What of a site can be reached. `operands`: input and output of its op, in a graph. `opaque`: its module is called as
    it is; `known`: it is a linear map all the same (its class is torch's own, or another library's). `weights`: a weight
    that no op in a graph uses can be replaced too. `parallel`: what is around its op is transformers' tensor parallelism.
    """

    operands: bool = True
    opaque: bool = False
    known: bool = False
    weights: bool = True
    parallel: bool = False


def weight_edit(
    adapter: str,
    spec: AdapterSpec,
    rule: Rule[Any],
    site: WeightSite,
    access: Access,
    dtype: str,
    placed: Placed,
    saved_as: str | None,
) -> Edit:
    """The edit that `rule` makes at a weight's site, `placed` among others.

    Raises CaptureError if the rule needs an operand that can't be reached, RuleError if it breaks the contract.
    """
    params, dropouts, shared = rule.params(spec, site), rule.dropouts(spec, site), placed.shared
    constants = {**rule.constants(spec, site), **placed.constants}
    slots = _reachable(rule, spec, site, access)
    _validate(rule, slots, {**params, **shared}, constants, dropouts)
    own = [planned(name, param, dtype) for name, param in params.items()]
    own += [planned(name, param, dtype, shared=True) for name, param in shared.items()]
    return Edit(
        site=site.fqn,
        adapter=adapter,
        rule=rule,
        slots=slots,
        params=tuple(own),
        constants=constants,
        dropouts=dropouts,
        flops_per_token=0 if slots == ("weight",) else _flops_per_token({**params, **shared}),
        opaque=access.opaque,
        unmergeable=_unmergeable(rule, spec, site, slots, access),
        saved_as=saved_as,
    )


def _reachable(rule: Rule[Any], spec: AdapterSpec, site: WeightSite, access: Access) -> tuple[str, ...]:
    """The slots of `site` that the rule takes: those it wants, or the weight, if only that can be replaced."""
    wanted = rule.slots(spec, site)
    if "weight" not in wanted and (access.operands or (access.known and site.op == "linear")):
        return wanted
    reason = _no_weight(site) or rule.cannot_fold(spec, site) or site.no_fold
    if reason is None and not access.operands and not access.weights:
        raise CaptureError(f"{site.fqn}: its weights can be adapted with capture='modules' only")
    if reason is None:
        return ("weight",) if not access.operands else wanted
    raise CaptureError(
        f"{site.fqn}: this {site.module} can only be adapted through its weight, and that can't be: {reason}. Leave it"
        " out (exclude_modules)."
    )


def _no_weight(site: WeightSite) -> str | None:
    if site.weight is None:
        return "its weight is no plain parameter"
    return None if site.has_plain_weight else f"its weight is {site.dtype}"


def _unmergeable(
    rule: Rule[Any], spec: AdapterSpec, site: WeightSite, slots: Sequence[str], access: Access
) -> str | None:
    reason = _no_weight(site) or site.no_fold
    if reason is None and access.opaque and not access.parallel and "weight" not in slots:
        return f"the forward of {site.module} can't be traced, so what it does with its weight is not known"
    return reason or rule.cannot_fold(spec, site)


def planned(name: str, param: Param, dtype: str, shared: bool = False) -> PlannedParam:
    """A parameter that a rule declares, for an adapter of `dtype`."""
    own = param.dtype or dtype
    trainable = param.trainable and dtype_of(own).is_floating_point
    more: dict[str, Any] = {"key": param.key or name, "dtype": own, "trainable": trainable}
    return PlannedParam(name=name, shared=shared, **{**vars(param), **more})


def adapter_dtype(weight: str, autocast: bool) -> str:
    """float32 for half precision (if `autocast`) and for everything that is no dtype to train in (int8, float8)."""
    dtype = dtype_of(weight)
    trainable = dtype.is_floating_point and dtype.itemsize > 1
    return "float32" if not trainable or (autocast and dtype.itemsize == 2) else weight


_INITS = r"zeros|ones|kaiming_uniform|rule|gathered|drawn|normal(:[\d.e-]+)?|(uniform|constant):[\d.e+-]+"


def _validate(
    rule: Rule[Any],
    slots: Sequence[str],
    params: Mapping[str, Param],
    constants: Mapping[str, Constant],
    dropouts: Mapping[str, float],
) -> None:
    """Raise RuleError, naming the rule, if a declaration breaks the contract."""
    types = tuple((name, type(value)) for name, value in constants.items())
    wrong = _wrong(tuple(slots), tuple(params.items()), types, tuple(dropouts))
    if wrong:
        raise RuleError(f"rule {rule.name!r} ({type(rule).__name__}): {'; '.join(wrong)}")


@functools.lru_cache(maxsize=1024)
def _wrong(
    slots: tuple[str, ...],
    declared: tuple[tuple[str, Param], ...],
    constants: tuple[tuple[str, type], ...],
    dropouts: tuple[str, ...],
) -> list[str]:
    """What breaks the contract. Equal layers declare the same, and are looked at once."""
    params = dict(declared)
    keys = [param.key or name for name, param in params.items()]
    firsts = {key.partition(".")[0] for key in keys}
    others = [*(name for name, _ in constants), *dropouts]
    names = [*params, *others]
    return [
        *(f"slot {slot!r} is none of {', '.join(SLOTS)}" for slot in slots if slot not in SLOTS),
        *([] if params else ["it declares no parameter"]),
        *(f"{name!r} is declared twice" for name in dict.fromkeys(names) if names.count(name) > 1),
        *(f"{name!r} is declared twice" for name in others if name in firsts - set(params)),
        *(f"key {key!r} is used twice" for key in dict.fromkeys(keys) if keys.count(key) > 1),
        *(f"{name!r} is a name that modules have" for name in [*keys, *dropouts] if name.partition(".")[0] in _TAKEN),
        *(f"{n}: unknown init {p.init!r}" for n, p in params.items() if not re.fullmatch(_INITS, p.init)),
        *(f"{n}: a seed for init 'rule'" for n, p in params.items() if p.seed is not None and p.init == "rule"),
        *(
            f"{n}: axes {p.axes!r} for shape {p.shape}"
            for n, p in params.items()
            if len(p.axes or p.shape) != len(p.shape)
        ),
        *(f"constant {name!r} is a {kind.__name__}" for name, kind in constants if kind not in _PLAIN),
    ]


_PLAIN = (float, int, bool, str, tuple)
_TAKEN = frozenset({*dir(nn.Module()), "weight", "bias", "op"})


def _flops_per_token(params: Mapping[str, Param]) -> int:
    """The FLOPs that a rule's parameters add per token, or per output position of a convolution."""
    each = {"matrix": 2, "vector": 1, "lookup": 0}
    return sum(each[param.use] * prod(param.shape) for param in params.values())
