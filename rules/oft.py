"""OFT: W·Rᵀ with R block-diagonal and orthogonal.  Qiu et al. 2023, arXiv:2306.07280; 2025, arXiv:2506.19847."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.rule import BySite, Constant, Param, Rule
from peftc.specs.selection import Count, LayerSelection, Share

from .rotation import cayley, constrained, kept, nearest_divisor, rotated, series, unfit, unpacked, width


class OFTConfig(LayerSelection):
    """Orthogonal finetuning: inputs are rotated in blocks (outputs of an embedding). Qiu et al. 2023, arXiv:2306.07280.

    `oft_block_size` inputs are rotated with each other, or `r` blocks made (the other is 0); what does not divide the
    inputs is replaced by the nearest that does. `block_share`: one block for all. `use_cayley_neumann`: the first
    `num_cayley_neumann_terms` of a series, not an inverse (arXiv:2506.19847), turned the other way. `coft`: blocks within
    `eps` of the identity. `module_dropout`: of blocks. `bias`: as in LoRA. `init_weights=False`: a random start.
    Example: OFTConfig(oft_block_size=32, target_modules=["q_proj", "v_proj"])
    """

    defaults_of = "LORA"

    peft_type: Literal["OFT"] = "OFT"
    r: Annotated[int, Field(ge=0)] = 0
    oft_block_size: Annotated[int, Field(ge=0)] = 32
    module_dropout: Share = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "oft_only"] = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: Count = 5

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if bool(self.r) == bool(self.oft_block_size):
            raise ValueError(
                f"r={self.r} and oft_block_size={self.oft_block_size}: give one of them and let the other be 0, since"
                " their product is the number of inputs"
            )
        return self

    def block_for(self, size: int) -> int:
        """How many of `size` inputs a block has."""
        return size // nearest_divisor(size, self.r) if self.r else nearest_divisor(size, self.oft_block_size)


class OftConv(Rule[OFTConfig]):
    """On convolutions: rows of the weight are rotated with their kernel."""

    name, spec, ops, local = "oft", OFTConfig, ("conv2d",), "o"
    keys = ("oft_R", "oft_embedding_R")
    columns: ClassVar[Mapping[str, str]] = {"block": "block"}
    key: ClassVar[str] = "oft_R.weight"
    drops = ("module_dropout",)

    def params(self, spec: OFTConfig, site: WeightSite) -> dict[str, Param]:
        size, block = width(site), spec.block_for(width(site))
        # The upper triangle of each skew-symmetric matrix, row by row.
        shape = (1 if spec.block_share else size // block, block * (block - 1) // 2)
        return {"oft_R": Param(shape, "zeros" if spec.init_weights else "normal:0.1", self.key, axes="..")}

    def constants(self, spec: OFTConfig, site: WeightSite) -> dict[str, Constant]:
        block = spec.block_for(width(site))
        return {
            "block": block,
            "asked": f"r={spec.r}" if spec.r else f"oft_block_size={spec.oft_block_size}",
            "fits": width(site) // block == spec.r if spec.r else block == spec.oft_block_size,
            "shared": spec.block_share,
            "terms": spec.num_cayley_neumann_terms if spec.use_cayley_neumann else 0,
            "eps": float(spec.eps),
            "constrained": spec.coft,
            "drops": spec.module_dropout > 0 and not spec.block_share and not site.kernel_size,
        }

    def check(self, spec: OFTConfig, site: WeightSite) -> str | None:
        if spec.block_for(width(site)) == 1:
            return (
                f"blocks of one of {width(site)} inputs have no rotation: give a larger oft_block_size, or a smaller r"
            )
        return unfit(site)

    def cautions(self, constants: Mapping[str, Constant], slots: Sequence[str]) -> list[str]:
        return [] if constants["fits"] else [f"has blocks of {constants['block']}: {constants['asked']} does not fit"]

    def after_step(self, spec: OFTConfig, tensors: BySite, step: int, state: dict[str, Any]) -> None:
        for own in tensors.values() if spec.coft else ():
            own["oft_R"].copy_(constrained(own["oft_R"], spec.eps))

    def rotation(self, p: Any, training: bool = False) -> Tensor:
        """The blocks of R, (n, b, b), or one for all (b, b)."""
        packed = p.oft_R
        if p.constrained:
            # As if the parameter were what the constraint makes of it.
            packed = packed + (constrained(packed, p.eps) - packed).detach()
        skew = unpacked(packed, p.block)
        blocks = series(skew, p.terms) if p.terms else cayley(skew)
        if p.shared:
            return blocks[0]
        return kept(blocks, p.module_dropout) if training and p.drops else blocks

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return rotated(weight.flatten(1), self.rotation(p).mT, p.shared).reshape(weight.shape)


class Oft(OftConv):
    """On linear sites: the op on x·R."""

    ops = ("linear",)

    def input(self, x: Tensor, p: Any) -> Tensor:
        return rotated(x, self.rotation(p, training=True), p.shared)


class OftEmbedding(OftConv):
    """On embeddings: e·R."""

    ops, local, key = ("embedding",), "i", "oft_embedding_R.weight"

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return rotated(weight.mT, self.rotation(p), p.shared).mT

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        blocks = self.rotation(p, training=True)
        return rotated(y.to(blocks.dtype), blocks, p.shared)
