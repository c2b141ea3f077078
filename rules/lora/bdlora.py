"""BD-LoRA: A, or B, has blocks on its diagonal only, of which every device of a server holds some.

Wang et al. 2025, arXiv:2510.23346.
"""

from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Factors, Param

from .config import LoraConfig
from .linear import LoraLinear
from .sub_configs import BdLoraConfig


class BdLoraLinear(LoraLinear):
    """y + s·B(A(drop(x))), the factors of plain LoRA where blocks are asked for neither of A nor of B."""

    local, variant = "", "bdlora"

    def params(self, spec: LoraConfig, site: WeightSite) -> dict[str, Param]:
        found, (side, blocks) = super().params(spec, site), _blocks(spec, site)
        a, b = found["lora_A"].shape, found["lora_B"].shape
        if side == "A":
            bound = sqrt(6 * blocks / a[1])
            found["lora_A"] = Param((a[0], a[1] // blocks), f"uniform:{bound}", "lora_A.weight", axes="r.")
        elif side == "B":
            found["lora_B"] = Param((b[0], b[1] // blocks), "zeros", "lora_B.weight", axes="o.")
        return found

    def constants(self, spec: LoraConfig, site: WeightSite) -> dict[str, Constant]:
        side, blocks = _blocks(spec, site)
        return {**super().constants(spec, site), "side": side, "blocks": blocks}

    def check(self, spec: LoraConfig, site: WeightSite) -> str | None:
        side, blocks = _blocks(spec, site)
        told, r = spec.use_bdlora, spec.rank_for(site.name)
        assert told is not None, "that makes it this variant"
        if not side and told.match_strict:
            return (
                "neither target_modules_bd_a nor target_modules_bd_b of use_bdlora names it; or set match_strict=False"
            )
        size = site.in_features if side == "A" else site.out_features
        if side and (r % blocks or size % blocks):
            return f"nblocks={blocks} of use_bdlora does not divide r={r} and its {size} features"
        return None

    def factors(self, p: Any) -> Factors:
        up = _diagonal(p.lora_B, p.blocks) if p.side == "B" else p.lora_B
        down = _diagonal(p.lora_A, p.blocks) if p.side == "A" else p.lora_A
        return Factors(up, down, p.scaling)

    def change(self, x: Tensor, p: Any) -> Tensor:
        inner = _product(x, p.lora_A, p.blocks if p.side == "A" else 1) * p.scaling
        return _product(inner, p.lora_B, p.blocks if p.side == "B" else 1)


def _blocks(spec: LoraConfig, site: WeightSite) -> tuple[str, int]:
    """Which factor has blocks at a site, "" for none, and how many."""
    told = spec.use_bdlora or BdLoraConfig()
    leaf = site.name.rpartition(".")[2]
    for side, names in (("A", told.target_modules_bd_a), ("B", told.target_modules_bd_b)):
        if any(name in leaf for name in names or ()):
            return side, told.nblocks
    return "", told.nblocks


def _diagonal(blocks: Tensor, count: int) -> Tensor:
    """The matrix with these blocks, which are one below the other, on its diagonal."""
    return torch.block_diag(*blocks.chunk(count))


def _product(x: Tensor, blocks: Tensor, count: int) -> Tensor:
    """`x` through a matrix with blocks on its diagonal."""
    if count == 1:
        return F.linear(x, blocks)
    own = blocks.unflatten(0, (count, -1))
    return torch.einsum("...bi,boi->...bo", x.unflatten(-1, (count, -1)), own).flatten(-2)
