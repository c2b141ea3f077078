"""PSOFT: W + s·B(R − I)A, a rotation R in the weight's principal subspace.  Wu et al. 2026, openreview FSHrinMArK."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule, Shapes
from peftc.specs.selection import Count, LayerSelection, Rank, Share

from .rotation import cayley, eye, series, unpacked, wide


class PsoftConfig(LayerSelection):
    """Orthogonal finetuning of the first `r` singular directions. Wu et al. 2026 (ICLR).

    A has the directions of inputs and B those of outputs with the singular values ("psoft_init"), or both have their roots
    ("pissa_init"); by a full SVD, or a random one with `random_seed` ("lowrank"). peft's files don't have them, as they
    follow from the base; those of peftc do. R is orthogonal by Cayley's transform (`psoft_orth`), or by the first terms
    of its series (`use_cayley_neumann`, of a generator within `cayley_neumann_eps`), between two vectors that scale
    (`psoft_mag_a`, `psoft_mag_b`). s = psoft_alpha / r cancels. `psoft_dropout` drops inputs. `init_weights=False`: a
    random start.

    Example: PsoftConfig(r=32, target_modules=["q_proj", "v_proj"])
    """

    defaults_of = "LORA"

    peft_type: Literal["PSOFT"] = "PSOFT"
    r: Rank = 32
    psoft_alpha: float | int = 32
    psoft_dropout: Share = 0.0
    fan_in_fan_out: bool = False
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: Annotated[int, Field(ge=0)] = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: Count = 5
    cayley_neumann_eps: Annotated[float, Field(gt=0, lt=1)] | None = None
    init_weights: bool = True


class Psoft(Rule[PsoftConfig]):
    """On linear sites."""

    name, spec, ops = "psoft", PsoftConfig, ("linear",)
    keys = ("psoft_R", "psoft_A", "psoft_B")
    columns: ClassVar[Mapping[str, str]] = {"r": "r", "alpha": "alpha"}
    drops = ("psoft_dropout",)
    takes = "singular vectors"

    def params(self, spec: PsoftConfig, site: WeightSite) -> dict[str, Param]:
        r = spec.r
        shape = (r * (r - 1) // 2,) if spec.psoft_orth else (r, r)
        start = ("zeros" if spec.init_weights else "normal:0.1") if spec.psoft_orth else "rule"
        vectors = {"vector_b": spec.psoft_mag_b, "vector_a": spec.psoft_mag_a}
        return {
            "turn": Param(shape, start, "psoft_R.weight"),
            **{name: Param((r,), "ones", f"psoft_R.{name}", use="vector") for name, there in vectors.items() if there},
            "psoft_A": Param((r, site.in_features), "rule", trainable=False, axes="ri"),
            "psoft_B": Param((site.out_features, r), "rule", trainable=False, axes="or"),
        }

    def constants(self, spec: PsoftConfig, site: WeightSite) -> dict[str, Constant]:
        return {
            "r": spec.r,
            "alpha": float(spec.psoft_alpha),
            "scaling": spec.psoft_alpha / spec.r,
            "start": spec.ab_svd_init,
            "noise": 0.0 if spec.init_weights else 0.1,
            "iterations": spec.psoft_svd_lowrank_niter if spec.psoft_svd == "lowrank" else -1,
            "random_seed": spec.random_seed,
            "orthogonal": spec.psoft_orth,
            "before": spec.psoft_mag_a,
            "after": spec.psoft_mag_b,
            "terms": spec.num_cayley_neumann_terms if spec.use_cayley_neumann else 0,
            "bounded": spec.use_cayley_neumann and spec.cayley_neumann_eps is not None,
            "eps": spec.cayley_neumann_eps or 1.0,
        }

    def check(self, spec: PsoftConfig, site: WeightSite) -> str | None:
        least = min(site.in_features, site.out_features)
        return f"its weight has {least} singular directions, fewer than r={spec.r}" if spec.r > least else None

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        # A and B are the same from float32 on, whatever the base's dtype, and are made so that peft makes the same.
        first, values, second = _svd(weight.float(), p)
        values = values / p.scaling
        roots = values.sqrt()
        a, b = (second, first * values) if p.start == "psoft_init" else (roots[:, None] * second, first * roots)
        free = torch.eye(p.r, dtype=weight.dtype, device=weight.device)
        made = {"psoft_A": a, "psoft_B": b, "turn": free + p.noise * torch.randn_like(free)}
        return {name: value for name, value in made.items() if name in shapes}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        turn = _rotation(p)
        return weight + p.scaling * (p.psoft_B @ (turn - eye(turn)) @ p.psoft_A)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        inner, turn = F.linear(p.psoft_dropout(x), p.psoft_A), _rotation(p)
        return y + F.linear(F.linear(inner, (turn - eye(turn)).to(inner.dtype)), p.psoft_B) * p.scaling


def _svd(weight: Tensor, p: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The first r singular vectors (out, r), values and vectors (r, in)."""
    if p.iterations < 0:
        first, values, second = torch.linalg.svd(weight, full_matrices=False)
        return first[:, : p.r], values[: p.r], second[: p.r]
    with torch.random.fork_rng():
        torch.manual_seed(p.random_seed)
        first, values, second = torch.svd_lowrank(weight, q=p.r, niter=p.iterations)
    return first, values, second.mT


def _rotation(p: Any) -> Tensor:
    """R (r, r)."""
    turn = p.turn
    if p.orthogonal:
        skew = unpacked(wide(turn)[None], p.r)[0]
        if p.bounded:
            skew = skew * (p.eps / (torch.linalg.vector_norm(skew) + 1e-12)).clamp(max=1)
        turn = series(skew, p.terms) if p.terms else cayley(-skew)
    turn = p.vector_b[:, None] * turn if p.after else turn
    return turn * p.vector_a if p.before else turn
