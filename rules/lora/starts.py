"""How A and B start where that is more than a draw: from the weight, from data, or from both."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from peftc.errors import AdapterError
from peftc.graph.sites import WeightSite
from peftc.rule import Shapes

from . import corda, eva, from_weight, lora_ga
from .config import LoraConfig
from .from_weight import Made


@dataclass(frozen=True)
class Learns:
    """What a start asks of data: its `kind`, and the functions of the rule contract that are told of it."""

    kind: Literal["inputs", "gradients"] | None = None
    decide: Callable[[LoraConfig, Mapping[str, Any]], tuple[LoraConfig, Mapping[str, Any]]] = lambda spec, data: (
        spec,
        data,
    )
    observe: Callable[[LoraConfig, Sequence[WeightSite], Tensor, Any], Any] = lambda spec, sites, x, state: state
    counted: Callable[[LoraConfig, Any], Tensor | None] = lambda spec, batch: None
    settled: Callable[[LoraConfig, Mapping[str, Any]], Collection[str] | None] = lambda spec, states: None


@dataclass(frozen=True)
class Start:
    """A value of `init_lora_weights`. `make(weight, shapes, p)` gives A (r, in) and B (out, r), those with the init `rule`.

    `taken_off`: s·B·A is subtracted again, as the start A0, B0. `limit`: r may be the weight's smaller side, over this;
    None: anything. `of_weight`: it needs the weight. `keeps_b`: B is not trained.
    """

    make: Callable[[Tensor, Mapping[str, tuple[int, ...]], Any], Made]
    inits: tuple[str, str] = ("rule", "rule")
    taken_off: bool = False
    limit: int | None = None
    of_weight: bool = True
    keeps_b: bool = False
    learns: Learns = Learns()


def start_of(spec: LoraConfig) -> Start | None:
    """How A and B of `spec` start, unless they are just drawn."""
    name = spec.init_lora_weights
    return STARTS.get(name.partition("_niter_")[0]) if isinstance(name, str) else None


def starts_from_weight(spec: LoraConfig) -> bool:
    """Whether the factors start as a part of the weight, which is then subtracted again."""
    start = start_of(spec)
    return start is not None and start.taken_off


def learns(spec: LoraConfig) -> Learns:
    """What adapters of `spec` ask of data before they start."""
    start = start_of(spec)
    return Learns() if start is None else start.learns


def unfit(spec: LoraConfig, site: WeightSite) -> str | None:
    """The reason why A and B can't start so at a linear site, or None."""
    start, r, name = start_of(spec), spec.rank_for(site.name), spec.init_lora_weights
    if start is None:
        return None
    if name == "orthogonal" and r % 2:
        return f"orthogonal initialisation needs an even rank, got r={r}"
    side = min(site.in_features, site.out_features)
    if start.limit is not None and r * start.limit > side:
        times = "" if start.limit == 1 else f"{start.limit} times "
        return f"{name} takes factors of the weight: {times}r={r} is over its smaller side, {side}"
    if start.of_weight and not site.has_plain_weight:
        return f"{name} initialisation needs the weight, which is not a plain parameter here"
    return None


def made(weight: Tensor, shapes: Shapes, p: Any) -> Made:
    """The factors of an adapter, and what is taken off again. Raises AdapterError if data that they need are not there."""
    start = STARTS[p.init.partition("_niter_")[0]]
    if start.learns.kind is not None and p.data is None:
        raise AdapterError(
            f"init_lora_weights={p.init!r} starts from data, and what it started from is not in the file. If the base has"
            " it taken off, as PEFT leaves it, write init_lora_weights=true into the file's config"
        )
    found = start.make(weight, shapes, p)
    taken = {f"{name}0": value.clone() for name, value in found.items()} if start.taken_off else {}
    return found | taken


STARTS: Mapping[str, Start] = {
    "olora": Start(from_weight.olora, taken_off=True, limit=1),
    "pissa": Start(from_weight.pissa, taken_off=True, limit=1),
    "orthogonal": Start(from_weight.orthogonal),
    "mica": Start(from_weight.mica, ("zeros", "rule"), limit=1, keeps_b=True),
    "eva": Start(
        lambda weight, shapes, p: {"lora_A": p.data},
        ("rule", "zeros"),
        of_weight=False,
        learns=Learns("inputs", eva.decide, eva.observe, eva.counted, eva.settled),
    ),
    "corda": Start(
        lambda weight, shapes, p: from_weight.named(*corda.start(weight, p.data, p.r, p.scaling)),
        taken_off=True,
        limit=1,
        learns=Learns("inputs", corda.decide, corda.observe),
    ),
    "lora_ga": Start(
        lambda weight, shapes, p: from_weight.named(*lora_ga.start(weight, p.data, p.r, p.scaling)),
        taken_off=True,
        limit=2,
        learns=Learns("gradients", lora_ga.decide),
    ),
}
