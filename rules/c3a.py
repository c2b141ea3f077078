"""C3A: circulant blocks are added to the weight.  Chen et al. 2024, arXiv:2407.19342, section 3."""

from collections.abc import Mapping
from math import sqrt
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule
from peftc.specs.selection import Count, LayerSelection, Patterned, first_match

from .rotation import wide


class C3AConfig(LayerSelection, Patterned):
    """Circular convolution adaptation. Chen et al. 2024, arXiv:2407.19342.

    The weight is cut into blocks of `block_size` × `block_size` (`block_size_pattern`: others at some modules), and each
    has a vector, whose rotations are the rows of what is added, divided by the number of inputs. `init_weights`:
    "xavier_uniform" (also false), "kaiming_uniform", "gaussian", which change the model, or true (zeros, which does not).
    `bias` trains base biases (`all`, or those of adapted modules).

    Example: C3AConfig(block_size=128, target_modules=["q_proj", "v_proj"])
    """

    defaults_of, patterns = "LORA", ("block_size_pattern",)

    peft_type: Literal["C3A"] = "C3A"
    block_size: Count = 256
    bias: Literal["none", "all", "c3a_only"] = "none"
    block_size_pattern: dict[str, Count] = Field(default_factory=dict)
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = "xavier_uniform"

    def block_for(self, fqn: str) -> int:
        """The size of blocks at module `fqn`, after `block_size_pattern`."""
        return first_match(self.block_size_pattern, fqn, self.block_size)


class C3A(Rule[C3AConfig]):
    """On linear sites."""

    name, spec, ops, additive, identity = "c3a", C3AConfig, ("linear",), True, False  # Its default start is random.
    keys = ("c3a_kernel",)
    columns: ClassVar[Mapping[str, str]] = {"block": "block"}

    def params(self, spec: C3AConfig, site: WeightSite) -> dict[str, Param]:
        block, rows, columns = spec.block_for(site.name), site.out_features, site.in_features
        inits = {
            True: "zeros",
            "gaussian": "normal",
            "kaiming_uniform": f"uniform:{1 / sqrt(columns)}",
            "xavier_uniform": f"uniform:{sqrt(6 / (rows + columns))}",
        }
        init = inits[spec.init_weights or "xavier_uniform"]
        return {"c3a_kernel": Param((rows // block, columns // block, block), init)}

    def constants(self, spec: C3AConfig, site: WeightSite) -> dict[str, Constant]:
        return {"block": spec.block_for(site.name), "inputs": site.in_features}

    def check(self, spec: C3AConfig, site: WeightSite) -> str | None:
        block = spec.block_for(site.name)
        if site.in_features % block or site.out_features % block:
            return f"block_size={block} does not divide its {site.in_features} inputs and {site.out_features} outputs"
        return None

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        # Row j of a block has the vector turned by j places.
        places = p.c3a_kernel.new_ones(p.block, dtype=torch.int64).cumsum(0)
        turned = ((places[None] - places[:, None]) % p.block).flatten()
        blocks = p.c3a_kernel.index_select(2, turned).unflatten(2, (p.block, p.block))
        return weight + blocks.transpose(1, 2).flatten(2).flatten(0, 1) / p.inputs

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        """By the convolution theorem: a product with the conjugate, as the vectors run against the rows."""
        kernel = wide(p.c3a_kernel)
        of_x = torch.fft.rfft(x.to(kernel.dtype).unflatten(-1, (-1, p.block)))
        products = torch.einsum("...nk,mnk->...mk", of_x, torch.fft.rfft(kernel).conj())
        return y + torch.fft.irfft(products, n=p.block).flatten(-2) / p.inputs
