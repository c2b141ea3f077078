"""MiSS: one piece of r columns, D, is added to every r columns of the weight.  Kang and Yin 2024, arXiv:2409.15371.

The paper's first versions called it Bone; Bat is its form that goes by the weight (section 3.2).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Factors, Param, Rule
from peftc.specs.selection import Count, LayerSelection, Rank, Share


class MissConfig(LayerSelection):
    """Matrix shard sharing. Kang and Yin 2024, arXiv:2409.15371.

    `r` inputs next to each other have their sums over all such pieces taken, and D is applied to these. `init_weights`:
    true (D starts as zero), false (a random start, which changes the model), "mini" (D has `mini_r` columns, which the
    outputs share), "bat" (blocks B of r × r, which add W·B + B to those of the weight). `miss_dropout` drops inputs, but
    for "bat". `bias` trains base biases (`all`, or those of adapted modules).

    Example: MissConfig(r=64, target_modules=["q_proj", "v_proj"])
    """

    defaults_of = "LORA"

    peft_type: Literal["MISS"] = "MISS"
    r: Rank = 64
    miss_dropout: Share = 0.0
    mini_r: Count = 1
    init_weights: bool | Literal["bat", "mini"] = True
    bias: Literal["none", "all", "MiSS_only"] = "none"


class Miss(Rule[MissConfig]):
    """W + [Dᵀ Dᵀ …], on linear sites."""

    name, spec, ops, local, additive = "miss", MissConfig, ("linear",), "o", True
    keys = ("miss_block",)
    columns: ClassVar[Mapping[str, str]] = {"r": "r"}
    drops = ("miss_dropout",)

    def serves(self, spec: MissConfig) -> bool:
        return spec.init_weights != "bat"

    def params(self, spec: MissConfig, site: WeightSite) -> dict[str, Param]:
        mini, start = spec.init_weights == "mini", "zeros" if spec.init_weights else "kaiming_uniform"
        shape = (spec.r, spec.mini_r if mini else site.out_features)
        return {"miss_block": Param(shape, start, axes=None if mini else "ro")}

    def constants(self, spec: MissConfig, site: WeightSite) -> dict[str, Constant]:
        copies = site.out_features // spec.mini_r if spec.init_weights == "mini" else 1
        return {"r": spec.r, "copies": copies, "columns": site.in_features}

    def check(self, spec: MissConfig, site: WeightSite) -> str | None:
        if spec.r > site.in_features:
            return f"r={spec.r} is over its {site.in_features} inputs: choose a smaller r"
        if spec.init_weights == "mini" and site.out_features % spec.mini_r:
            return f"mini_r={spec.mini_r} does not divide its {site.out_features} outputs"
        return None

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight + _piece(p).repeat(1, -(-p.columns // p.r))[:, : p.columns]

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        padded = F.pad(p.miss_dropout(x), (0, -p.columns % p.r))
        return y + F.linear(padded.unflatten(-1, (-1, p.r)).sum(-2), _piece(p))

    def factors(self, p: Any) -> Factors | None:
        up = _piece(p)
        sums = torch.diag_embed(up.new_ones(p.r)).repeat(1, -(-p.columns // p.r))[:, : p.columns]
        return Factors(up, sums, 1.0)


def _piece(p: Any) -> Tensor:
    """Dᵀ, (out, r)."""
    return p.miss_block.mT.repeat(p.copies, 1) if p.copies > 1 else p.miss_block.mT


class Bat(Rule[MissConfig]):
    """W + W·B + B in blocks of r × r; each row of blocks has a B."""

    name, spec, ops = "miss", MissConfig, ("linear",)
    keys = ("miss_block",)

    def serves(self, spec: MissConfig) -> bool:
        return spec.init_weights == "bat"

    def params(self, spec: MissConfig, site: WeightSite) -> dict[str, Param]:
        return {"miss_block": Param((site.out_features // spec.r, spec.r, spec.r))}

    def constants(self, spec: MissConfig, site: WeightSite) -> dict[str, Constant]:
        return {"r": spec.r}

    def check(self, spec: MissConfig, site: WeightSite) -> str | None:
        rows, columns = site.out_features, site.in_features
        if rows % spec.r or columns % spec.r:
            return (
                f"init_weights='bat' needs blocks of r × r, and r={spec.r} does not divide its {columns} inputs and {rows}"
                " outputs"
            )
        return (
            "init_weights='bat' needs the weight, which is not a plain parameter here" if site.weight is None else None
        )

    def slots(self, spec: MissConfig, site: WeightSite) -> tuple[str, ...]:
        return ("weight",) if site.has_wide_weight else ("output",)

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight + _bat(weight, p)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return y + F.linear(x, _bat(p.weight.to(p.miss_block.dtype), p))


def _bat(weight: Tensor, p: Any) -> Tensor:
    """W·B + B, (out, in)."""
    blocks = weight.unflatten(1, (-1, p.r)).unflatten(0, (-1, p.r))
    change = torch.einsum("orik,okc->oric", blocks, p.miss_block) + p.miss_block[:, :, None]
    return change.flatten(2).flatten(0, 1)
