"""TinyLoRA: W + B·(Σᵢ vᵢPᵢ)·A with the weight's own A and B.  Morris et al. 2026, arXiv:2602.04118, section 4."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Placed, Rule, Shapes
from peftc.specs.selection import Count, LayerSelection, Rank, Share


class TinyLoraConfig(LayerSelection):
    """A few numbers turn the largest singular vectors of the weights. Morris et al. 2026, arXiv:2602.04118.

    A and B are the weight's first `r` singular vectors, each with the root of its value; the `u` matrices P are random,
    drawn with `projection_seed` (files hold them, if `save_projection`). `weight_tying`: the share of sites that have
    no v of their own, from 0 (each has one) to 1 (one for all). v starts as zero, or `init_weights="uniform"` within
    `init_v_bound`, which changes the model. `bias` trains base biases. `fan_in_fan_out` is informative.

    Example: TinyLoraConfig(r=2, u=13, weight_tying=1.0, target_modules=["q_proj", "v_proj"])
    """

    defaults_of, excludes = "LORA", False

    peft_type: Literal["TINYLORA"] = "TINYLORA"
    r: Rank = 2
    u: Count = 64
    weight_tying: Annotated[float | int, Field(ge=0, le=1)] = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: Share = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "tinylora_only"] = "none"
    init_weights: bool | Literal["uniform"] = True


class TinyLora(Rule[TinyLoraConfig]):
    """On linear sites."""

    name, spec, ops, additive = "tinylora", TinyLoraConfig, ("linear", "embedding"), True
    keys = ("tinylora_A", "tinylora_B", "tinylora_P")
    columns: ClassVar[Mapping[str, str]] = {"r": "r", "u": "u"}
    takes = "singular vectors"
    drops, repeats = ("tinylora_dropout",), False

    def placed(self, spec: TinyLoraConfig, sites: Sequence[WeightSite]) -> Sequence[Placed]:
        groups = max(1, round(len(sites) * (1 - spec.weight_tying)))
        size = max(1, len(sites) // groups)
        init = "zeros" if spec.init_weights is True else f"uniform:{spec.init_v_bound}"
        made: list[Placed] = []
        for number in range(len(sites)):
            key = f"tinylora_v.{min(number // size, groups - 1)}"
            shared = {"v": Param((spec.u,), init, key, use="vector")}
            made.append(Placed(shared, {"seed": spec.projection_seed + number}))
        return made

    def params(self, spec: TinyLoraConfig, site: WeightSite) -> dict[str, Param]:
        # In the stored layout of an embedding, which has a token a row, as peft has it.
        rows, columns = (
            (site.in_features, site.out_features) if site.op == "embedding" else (site.out_features, site.in_features)
        )
        r = min(spec.r, rows, columns)
        return {
            "tinylora_A": Param((r, columns), "rule", trainable=False),
            "tinylora_B": Param((rows, r), "rule", trainable=False),
            "tinylora_P": Param((spec.u, r, r), "drawn", trainable=False, seed=self._seed(spec), use="lookup"),
        }

    def _seed(self, spec: TinyLoraConfig) -> int | None:
        return None if spec.save_projection else spec.projection_seed

    def constants(self, spec: TinyLoraConfig, site: WeightSite) -> dict[str, Constant]:
        return {"r": min(spec.r, site.out_features, site.in_features), "u": spec.u, "turned": site.op == "embedding"}

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        up, values, down = torch.linalg.svd(weight.mT if p.turned else weight, full_matrices=False)
        roots = values[: p.r].sqrt()
        return {"tinylora_A": roots[:, None] * down[: p.r], "tinylora_B": up[:, : p.r] * roots}

    def draw(self, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(p.seed)
        return {"tinylora_P": torch.normal(0.0, p.r**-0.5, shapes["tinylora_P"], generator=generator)}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        change = p.tinylora_B @ _turn(p) @ p.tinylora_A
        return weight + (change.mT if p.turned else change)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        if p.turned:
            rows = p.tinylora_dropout(p.op(x, p.tinylora_B))
            return y + rows @ _turn(p) @ p.tinylora_A
        return y + F.linear(F.linear(F.linear(p.tinylora_dropout(x), p.tinylora_A), _turn(p)), p.tinylora_B)


def _turn(p: Any) -> Tensor:
    """The matrix (r, r) that v makes of the random ones."""
    return torch.einsum("i,ijk->jk", p.v, p.tinylora_P)
