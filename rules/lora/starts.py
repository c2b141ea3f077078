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
class Start:
    """A value of `init_lora_weights`. `make(weight, shapes, p)` gives A (r, in) and B (out, r), those with the init `rule`.

    `taken_off`: s·B·A is subtracted again, as the start A0, B0. `limit`: r may be the weight's smaller side, over this;
    None: anything. `of_weight`: it needs the weight. `keeps_b`: B is not trained. `kind`: what it asks of data, and the
    functions of the rule contract that are told of it.
    """

    make: Callable[[Tensor, Shapes, Any], Made]
    inits: tuple[str, str] = ("rule", "rule")
    taken_off: bool = False
    limit: int | None = None
    of_weight: bool = True
    keeps_b: bool = False
    kind: Literal["inputs", "gradients"] | None = None
    calibrated: Callable[[LoraConfig, Mapping[str, Any]], tuple[LoraConfig, Mapping[str, Any]]] = lambda spec, data: (
        spec,
        data,
    )
    calibrate: Callable[[LoraConfig, Sequence[WeightSite], Tensor, Any], Any] = lambda spec, sites, x, state: state
    counted: Callable[[LoraConfig, Any], Tensor | None] = lambda spec, batch: None
    settled: Callable[[LoraConfig, Mapping[str, Any]], Collection[str] | None] = lambda spec, states: None


# Factors that are drawn, by their declaration alone.
DRAWN = Start(lambda weight, shapes, p: {}, of_weight=False)


def start_of(spec: LoraConfig) -> Start:
    """How A and B of `spec` start."""
    name = spec.init_lora_weights
    return STARTS.get(name.partition("_niter_")[0], DRAWN) if isinstance(name, str) else DRAWN


def unfit(spec: LoraConfig, site: WeightSite) -> str | None:
    """The reason why A and B can't start so at a linear site, or None."""
    start, r, name = start_of(spec), spec.rank_for(site.name), spec.init_lora_weights
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
    if start.kind is not None and p.data is None:
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
        kind="inputs",
        calibrated=eva.decide,
        calibrate=eva.observe,
        counted=eva.counted,
        settled=eva.settled,
    ),
    "corda": Start(
        lambda weight, shapes, p: from_weight.named(*corda.start(weight, p.data, p.r, p.scaling)),
        taken_off=True,
        limit=1,
        kind="inputs",
        calibrated=corda.decide,
        calibrate=corda.observe,
    ),
    "lora_ga": Start(
        lambda weight, shapes, p: from_weight.named(*lora_ga.start(weight, p.data, p.r, p.scaling)),
        taken_off=True,
        limit=2,
        kind="gradients",
        calibrated=lora_ga.decide,
    ),
}
