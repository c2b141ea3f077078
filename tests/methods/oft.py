"""OFT: W·R with R block-diagonal and orthogonal, by Cayley's transform.  Qiu et al. 2023, arXiv:2306.07280, section 4."""

from typing import Any, Literal

import torch
from torch import Tensor

from peftc import AdapterSpec, Param, Rule


class OftConfig(AdapterSpec):
    """`block_size`: rows and columns of the blocks of R."""

    peft_type: Literal["TEST_OFT"] = "TEST_OFT"
    block_size: int = 2


class Oft(Rule[OftConfig]):
    """By its weight alone: rotates the inputs, so a piece of rows needs those rows only."""

    name, spec, ops, local = "test_oft", OftConfig, ("linear",), "o"

    def params(self, spec: OftConfig, site: Any) -> dict[str, Param]:
        b = spec.block_size
        return {"oft_q": Param((site.in_features // b, b, b), "zeros", axes="...")}

    def check(self, spec: OftConfig, site: Any) -> str | None:
        uneven = site.in_features % spec.block_size
        return f"its {site.in_features} inputs are not divisible by block_size={spec.block_size}" if uneven else None

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        skew = p.oft_q - p.oft_q.mT
        eye = torch.diag_embed(torch.ones_like(skew[..., 0]))
        rotation = torch.linalg.solve(eye + skew, eye - skew)
        blocks = weight.unflatten(1, (rotation.shape[0], -1))
        return torch.einsum("obi,bij->obj", blocks, rotation).flatten(1)
