"""How A and B start where that is more than a draw: from the weight, from data, or from both."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from peftc.errors import AdapterError
from peftc.graph.sites import WeightSite, dtype_of

from . import corda, eva, lora_ga
from .config import LoraConfig

Made = dict[str, Tensor]


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


def has_weight(site: WeightSite) -> bool:
    """Whether the site has a weight of floating-point numbers to start from; a quantised one has not."""
    dtype = dtype_of(site.dtype)
    return site.weight is not None and dtype.is_floating_point and dtype.itemsize > 1


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
    if start.of_weight and not has_weight(site):
        return f"{name} initialisation needs the weight, which is not a plain parameter here"
    return None


def made(weight: Tensor, shapes: Mapping[str, tuple[int, ...]], p: Any) -> Made:
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


def _named(a: Tensor, b: Tensor) -> Made:
    return {"lora_A": a, "lora_B": b}


def _olora(weight: Tensor, shapes: Mapping[str, tuple[int, ...]], p: Any) -> Made:
    """The QR factors.  Büyükakyüz 2024, arXiv:2406.01775."""
    q, upper = torch.linalg.qr(weight)
    return _named(upper[: p.r].contiguous(), q[:, : p.r].contiguous())


def _pissa(weight: Tensor, shapes: Mapping[str, tuple[int, ...]], p: Any) -> Made:
    """The principal singular triplets (Meng et al. 2024, arXiv:2404.02948, equations 2–4); pissa_niter_<n> by randomised
    SVD.
    """
    name, r = p.init, p.r
    if name == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=int(name.rpartition("_")[2]))
        vh = v.T
    root = torch.sqrt(s[:r] / p.scaling)
    return _named(root[:, None] * vh[:r], u[:, :r] * root)


def _mica(weight: Tensor, shapes: Mapping[str, tuple[int, ...]], p: Any) -> Made:
    """B has the least left singular vectors; A is zero.  arXiv:2604.01694."""
    return {"lora_B": torch.linalg.svd(weight, full_matrices=False)[0][:, -p.r :]}


def _orthogonal(weight: Tensor, shapes: Mapping[str, tuple[int, ...]], p: Any) -> Made:
    """Orthogonal row spaces, so that B·A = 0 though neither is zero."""
    (r, in_features), (out_features, _) = shapes["lora_A"], shapes["lora_B"]
    q, _ = torch.linalg.qr(torch.randn(r, r))
    return _named((torch.randn(in_features, r // 2) @ q[0::2]).T / 10, torch.randn(out_features, r // 2) @ q[1::2] / 10)


STARTS: Mapping[str, Start] = {
    "olora": Start(_olora, taken_off=True, limit=1),
    "pissa": Start(_pissa, taken_off=True, limit=1),
    "orthogonal": Start(_orthogonal),
    "mica": Start(_mica, ("zeros", "rule"), limit=1, keeps_b=True),
    "eva": Start(
        lambda weight, shapes, p: {"lora_A": p.data},
        ("rule", "zeros"),
        of_weight=False,
        learns=Learns("inputs", eva.decide, eva.observe, eva.counted, eva.settled),
    ),
    "corda": Start(
        lambda weight, shapes, p: _named(*corda.start(weight, p.data, p.r, p.scaling)),
        taken_off=True,
        limit=1,
        learns=Learns("inputs", corda.decide, corda.observe),
    ),
    "lora_ga": Start(
        lambda weight, shapes, p: _named(*lora_ga.start(weight, p.data, p.r, p.scaling)),
        taken_off=True,
        limit=2,
        learns=Learns("gradients", lora_ga.decide),
    ),
}
