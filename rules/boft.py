"""BOFT: s ⊙ (W·Rᵀ) with R a product of butterfly factors, orthogonal.  Liu et al. 2023, arXiv:2311.06243, section 4."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule, Shapes
from peftc.specs.selection import Count, LayerSelection, Share

from .rotation import cayley, kept, rotated, unfit, width


class BOFTConfig(LayerSelection):
    """Orthogonal butterfly: inputs are rotated by several factors, outputs scaled. Liu et al. 2023, arXiv:2311.06243.

    A factor has blocks of `boft_block_size` inputs, or `boft_block_num` blocks: give one of the two, the other is 0. Of
    `boft_n_butterfly_factor` factors each after the first brings halves of blocks that are further apart together.
    `boft_dropout`: the share of one factor's blocks that are left out while training. `bias` trains base biases (`all`, or
    those of adapted modules). `init_weights=False`: a random start. `fan_in_fan_out` is informative.

    Example: BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["q_proj", "v_proj"])
    """

    defaults_of = "LORA"

    peft_type: Literal["BOFT"] = "BOFT"
    boft_block_size: Annotated[int, Field(ge=0)] = 4
    boft_block_num: Annotated[int, Field(ge=0)] = 0
    boft_n_butterfly_factor: Count = 1
    boft_dropout: Share = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "boft_only"] = "none"
    init_weights: bool = True

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if bool(self.boft_block_size) == bool(self.boft_block_num):
            raise ValueError(
                f"boft_block_size={self.boft_block_size} and boft_block_num={self.boft_block_num}: give one of them and"
                " let the other be 0, since their product is the number of inputs"
            )
        return self

    def on_model(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[Self, Mapping[str, Tensor]]:
        # Without its CUDA extension peft makes one factor, and writes the number that was asked for.
        found = {len(tensor) for key, tensor in tensors.items() if key.endswith("boft_R")}
        return (
            self.model_copy(update={"boft_n_butterfly_factor": 1})
            if self.boft_n_butterfly_factor > 1 and found == {1}
            else self
        ), tensors

    def block_for(self, size: int) -> int:
        """How many of `size` inputs a block has."""
        return size // self.boft_block_num if self.boft_block_num else self.boft_block_size


class BoftConv(Rule[BOFTConfig]):
    """On convolutions: rows of the weight are rotated with their kernel."""

    name, spec, ops, local = "boft", BOFTConfig, ("conv2d",), "o"
    keys = ("boft_R", "boft_s")
    columns: ClassVar[Mapping[str, str]] = {"block": "block", "factors": "factors"}

    def params(self, spec: BOFTConfig, site: WeightSite) -> dict[str, Param]:
        block, fresh = spec.block_for(width(site)), spec.init_weights
        shape = (spec.boft_n_butterfly_factor, width(site) // block, block, block)
        gain, axes = ((1, site.out_features), ".o") if site.kernel_size else ((site.out_features, 1), "o.")
        return {
            "boft_R": Param(shape, "zeros" if fresh else "normal:0.1", axes="...."),
            "boft_s": Param(gain, "ones" if fresh else "rule", use="vector", axes=axes),
        }

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        return {"boft_s": 1 + 0.1 * torch.randn(shapes["boft_s"], dtype=weight.dtype, device=weight.device)}

    def constants(self, spec: BOFTConfig, site: WeightSite) -> dict[str, Constant]:
        drops = spec.boft_dropout > 0 and not site.kernel_size
        return {"block": spec.block_for(width(site)), "factors": spec.boft_n_butterfly_factor, "drops": drops}

    def dropouts(self, spec: BOFTConfig, site: WeightSite) -> dict[str, float]:
        return {"boft_dropout": spec.boft_dropout / spec.boft_n_butterfly_factor}

    def check(self, spec: BOFTConfig, site: WeightSite) -> str | None:
        size, block = width(site), spec.block_for(width(site))
        apart = 2 ** (spec.boft_n_butterfly_factor - 1)
        if block == 0 or size % block:
            asked = f"boft_block_num={spec.boft_block_num}" if spec.boft_block_num else f"boft_block_size={block}"
            return f"{asked} does not divide its {size} inputs"
        if size % (block * apart) or (apart > 1 and block % 2):
            return (
                f"boft_n_butterfly_factor={spec.boft_n_butterfly_factor} needs blocks of an even size, and of {apart} times"
                f" the size {block} a number that makes {size}"
            )
        if not spec.init_weights and site.weight is None:
            return "init_weights=False needs a weight that is a plain parameter"
        return unfit(site)

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        rows, blocks = weight.flatten(1), _rotations(p).mT
        for factor in range(p.factors):
            rows = _apart(rotated(_together(rows, factor, p), blocks[factor]), factor, p)
        return (rows * p.boft_s.reshape(-1, 1)).reshape(weight.shape)


class Boft(BoftConv):
    """On linear sites: s ⊙ the op on x·R."""

    ops = ("linear",)

    def input(self, x: Tensor, p: Any) -> Tensor:
        blocks = kept(_rotations(p), p.boft_dropout) if p.drops else _rotations(p)
        for factor in reversed(range(p.factors)):
            x = _apart(rotated(_together(x, factor, p), blocks[factor]), factor, p)
        return x

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        """Scaled but for the bias: y + (s − 1)(y − bias), which a fresh adapter leaves at y."""
        plain = y if p.bias is None else y - p.bias
        return y + plain * (p.boft_s.flatten() - 1)


def _rotations(p: Any) -> Tensor:
    """The blocks of all factors, (factors, n, b, b)."""
    return cayley(0.5 * (p.boft_R - p.boft_R.mT))


def _together(x: Tensor, factor: int, p: Any) -> Tensor:
    """x·P: the halves of blocks in the order in which factor number `factor` pairs them.  Section 4.1, figure 3."""
    return x.unflatten(-1, (-1, 2, 2**factor, p.block // 2)).transpose(-3, -2).flatten(-4) if factor else x


def _apart(x: Tensor, factor: int, p: Any) -> Tensor:
    """x·Pᵀ: back in their places."""
    return x.unflatten(-1, (-1, 2**factor, 2, p.block // 2)).transpose(-3, -2).flatten(-4) if factor else x
