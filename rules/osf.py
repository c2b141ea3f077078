"""OSF: W + U·S·V − U₀·S₀·V₀, the small singular values in the space of their own.  Nayak et al. 2025, arXiv:2504.07097."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.product import Product
from peftc.rule import Constant, Factors, Param, Shapes
from peftc.specs import AdapterSpec
from peftc.specs.base import require_regex
from peftc.specs.selection import Count

Size = Count | Annotated[float, Field(gt=0, le=1)]
_TRAINED = ("U_low", "S_low", "V_low")


class OSFConfig(AdapterSpec):
    """Orthogonal subspace finetuning, for tasks one after another. Nayak et al. 2025, arXiv:2504.07097, section 3.

    The first `effective_rank` singular directions (a float is a share; half of them by default; `rank_pattern`: others
    where `re.search` finds a key) stay, and gradients of the others have nothing in them. `init_weights=False`: a random
    start, which changes the model.

    Example: OSFConfig(effective_rank=0.5, target_modules=["q_proj", "v_proj"])
    """

    excludes = False
    apart = frozenset({"rank_pattern"})
    not_implemented: ClassVar[Mapping[str, Any]] = {"target_svd_config": None}

    peft_type: Literal["OSF"] = "OSF"
    effective_rank: Size | None = None
    rank_pattern: dict[str, Size] | None = None
    init_weights: bool | None = True

    def rank_for(self, site: WeightSite) -> int:
        """How many singular directions of `site` stay."""
        least = min(site.in_features, site.out_features)
        patterns = self.rank_pattern or {}
        for pattern in patterns:
            require_regex("rank_pattern", pattern)
        rank = next((size for key, size in patterns.items() if re.search(key, site.name)), self.effective_rank)
        if rank is None:
            return least // 2
        return min(least, int(least * rank) if isinstance(rank, float) else rank)


class OSF(Product[OSFConfig]):
    """On linear sites."""

    name, spec, ops, identity = "osf", OSFConfig, ("linear",), False  # A fresh one changes roundings.
    keys = ("osf_svd_params", *(f"_osf_{name}_init" for name in _TRAINED), "_osf_U_high", "_osf_V_high")
    columns: ClassVar[Mapping[str, str]] = {"kept": "kept"}
    takes = "singular values"

    def params(self, spec: OSFConfig, site: WeightSite) -> dict[str, Param]:
        rows, columns, kept = site.out_features, site.in_features, spec.rank_for(site)
        rank = min(rows, columns) - kept
        shapes = dict(zip(_TRAINED, ((rows, rank), (rank,), (rank, columns)), strict=True))
        start = "normal" if spec.init_weights is False else "rule"
        made = {name: Param(shape, start, f"osf_svd_params.{name}") for name, shape in shapes.items()}
        made |= {
            f"{name}_init": Param(shape, "rule", f"_osf_{name}_init", trainable=False) for name, shape in shapes.items()
        }
        # What a square factor has beside the trained directions follows from these.
        if rows > columns:
            made["U_high"] = Param((rows, kept), "rule", "_osf_U_high", trainable=False)
        if columns > rows:
            made["V_high"] = Param((kept, columns), "rule", "_osf_V_high", trainable=False)
        return made

    def constants(self, spec: OSFConfig, site: WeightSite) -> dict[str, Constant]:
        shape = site.out_features - site.in_features
        return {"kept": spec.rank_for(site), "tall": shape > 0, "flat": shape < 0}

    def check(self, spec: OSFConfig, site: WeightSite) -> str | None:
        full = spec.rank_for(site) >= min(site.in_features, site.out_features)
        return "all of its singular directions stay: give a smaller effective_rank" if full else None

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        low = dict(zip(_TRAINED, (u[:, p.kept :], s[p.kept :], v[p.kept :]), strict=True))
        found = {**low, **{f"{name}_init": value.clone() for name, value in low.items()}}
        found |= {"U_high": u[:, : p.kept], "V_high": v[: p.kept]}
        return {name: found[name] for name in shapes}

    def factors(self, p: Any) -> Factors:
        """The gradients of U and V are kept out of the directions that stay."""
        u, v = p.U_low - p.U_low.detach(), p.V_low - p.V_low.detach()
        u = u - p.U_high @ (p.U_high.mT @ u) if p.tall else p.U_low_init @ (p.U_low_init.mT @ u)
        v = v - (v @ p.V_high.mT) @ p.V_high if p.flat else (v @ p.V_low_init.mT) @ p.V_low_init
        u, v = p.U_low.detach() + u, p.V_low.detach() + v
        up = torch.cat([u * p.S_low, -p.U_low_init * p.S_low_init], dim=1)
        return Factors(up, torch.cat([v, p.V_low_init]), 1.0)
