"""Weighted combinations of LoRA adapters: the new factors, for a scaling of 1.

With s the scaling of adapter i and w its weight, the exact sum is Σ w·s·B·A. `cat` writes it as one product, `svd` takes
its leading part; the others combine the factors themselves: √|w·s|, with the sign on A.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from peftc.errors import AdapterError
from peftc.graph.sites import WeightSite
from peftc.rule import Adapted, Combination, Part
from peftc.specs.selection import exact_patterns

from .config import LoraConfig
from .starts import start_of
from .task_arithmetic import COMBINE, combine_tensors

COMBINATIONS = ("svd", "cat", *COMBINE, *(f"{name}_svd" for name in COMBINE if name != "linear"))


def combined_spec(specs: Mapping[str, LoraConfig], where: Adapted, how: Combination) -> LoraConfig:
    """The spec of the combination: a rank for every site, and alpha equal to it."""
    first = next(iter(specs.values()))
    if len({spec.variant for spec in specs.values()}) > 1:
        forms = ", ".join(f"{name!r} {spec.variant_field or 'plain LoRA'}" for name, spec in specs.items())
        raise AdapterError(
            f"add_weighted_adapter: the adapters are of several forms ({forms}), which have no common sum"
        )
    if len({spec.lora_bias for spec in specs.values()}) > 1:
        raise AdapterError("add_weighted_adapter: lora_bias is set in some of the adapters only")
    ranks = {fqn: _rank(fqn, {name: specs[name] for name in names}, how) for fqn, names in where.items()}
    r = max(ranks.values(), key=list(ranks.values()).count)
    pattern = exact_patterns(ranks, r)
    update = {"r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": dict(pattern), "use_rslora": False}
    return first.model_copy(update={**update, "init_lora_weights": True})


def _rank(fqn: str, specs: Mapping[str, LoraConfig], how: Combination) -> int:
    ranks = {name: spec.rank_for(fqn) for name, spec in specs.items()}
    # What an adapter started from is a second product, taken off.
    full = sum(rank * (2 if start_of(specs[name]).taken_off else 1) for name, rank in ranks.items())
    if how.combination_type == "cat":
        return full
    if how.combination_type.endswith("svd"):
        return _svd_rank(how)
    started = [name for name, spec in specs.items() if start_of(spec).taken_off]
    if started:
        raise AdapterError(f"{fqn}: {started[0]!r} started from the weight's own factors; combine with 'cat' or 'svd'")
    if len(set(ranks.values())) > 1:
        given = ", ".join(f"{name!r} r={rank}" for name, rank in ranks.items())
        raise AdapterError(f"{fqn}: {how.combination_type!r} needs equal ranks, there are {given}; use 'cat' or 'svd'")
    return next(iter(ranks.values()))


def _svd_rank(how: Combination) -> int:
    assert how.svd_rank is not None, "LoRA's own combination says one"
    return how.svd_rank


def combined_factors(
    a: str, b: str, site: WeightSite, parts: Sequence[Part], how: Combination
) -> tuple[Tensor, Tensor]:
    """The new A and B, under the names `a` and `b` in each part."""
    kind = how.combination_type
    if kind == "cat":
        return _cat(a, b, site, parts)
    if kind.endswith("svd") and site.groups > 1:
        raise AdapterError(
            f"{site.fqn}: a convolution in groups has no one product to decompose; use 'cat' or 'linear'"
        )
    shape_a, shape_b = getattr(parts[0].p, a).shape, getattr(parts[0].p, b).shape
    r = _svd_rank(how) if kind.endswith("svd") else 0
    if kind == "svd" and how.svd_clamp is None:
        new_a, new_b = _svd_of_product(*(factor.flatten(1) for factor in _cat(a, b, site, parts)))
    elif kind.endswith("svd"):
        base = "linear" if kind == "svd" else kind.removesuffix("_svd")
        deltas = [_delta(part, a, b) for part in parts]
        new_a, new_b = _svd(combine_tensors(base, deltas, [part.weight for part in parts], how), r, how)
    else:
        scales = [part.weight * part.p.scaling for part in parts]
        roots = [math.sqrt(abs(scale)) for scale in scales]
        signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
        return (
            combine_tensors(kind, [getattr(part.p, a) for part in parts], signed, how),
            combine_tensors(kind, [getattr(part.p, b) for part in parts], roots, how),
        )
    missing = max(0, r - len(new_a))
    new_a, new_b = F.pad(new_a[:r], (0, 0, 0, missing)), F.pad(new_b[:, :r], (0, missing))
    return new_a.reshape(-1, *shape_a[1:]), new_b.reshape(shape_b[0], -1, *shape_b[2:])


def _cat(a: str, b: str, site: WeightSite, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """[w·s·A …] and [B …], group by group, with −w·s·A0 and B0 for what an adapter started from."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        scale = part.weight * part.p.scaling
        pairs.append((getattr(part.p, a).double() * scale, getattr(part.p, b)))
        if part.p.residual:
            pairs.append((part.p.lora_A0.double() * -scale, part.p.lora_B0))
    grouped = [new.reshape(site.groups, -1, *new.shape[1:]) for new, _ in pairs]
    return torch.cat(grouped, dim=1).flatten(0, 1), torch.cat([new for _, new in pairs], dim=1)


def _delta(part: Part, a: str, b: str) -> Tensor:
    """s·B·A (out, in · kernel), less what the adapter started from."""
    delta = getattr(part.p, b).flatten(1) @ getattr(part.p, a).flatten(1)
    return (delta - part.p.lora_B0 @ part.p.lora_A0 if part.p.residual else delta) * part.p.scaling


def _svd_of_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The leading part of b·a by two thin QR decompositions and the SVD of a small matrix, in float64."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return vh @ q_a.T, q_b @ (u * s)


def _svd(delta: Tensor, r: int, how: Combination) -> tuple[Tensor, Tensor]:
    """The leading part of a dense matrix; with `svd_clamp`, both factors within that quantile of all their entries."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=how.svd_full_matrices, driver=how.svd_driver)
    r = min(len(s), r)
    u, vh = u[:, :r] * s[:r], vh[:r]
    if how.svd_clamp is not None:
        entries = torch.cat([u.flatten(), vh.flatten()]).cpu().numpy()
        limit = float(np.quantile(entries, how.svd_clamp))  # torch.quantile takes 16 million entries at most.
        u, vh = u.clamp(-limit, limit), vh.clamp(-limit, limit)
    return vh, u
