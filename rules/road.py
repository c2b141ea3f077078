"""RoAd: pairs of outputs are rotated and scaled.  Liao and Monz 2024, arXiv:2409.00119, section 3."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule, Shapes
from peftc.specs import AdapterSpec


class RoadConfig(AdapterSpec):
    """Rotation adaptation of outputs in pairs, by an angle θ and a scale α. Liao and Monz 2024, arXiv:2409.00119.

    In groups of `group_size` outputs each of the first half is paired with one of the second. `variant`: one θ and one α
    for a pair ("road_1"), for each of its rows ("road_2"), or for each entry of its matrix ("road_4").
    `init_weights=False`: a random start, which changes the model.

    Example: RoadConfig(variant="road_2", group_size=64, target_modules=["q_proj", "v_proj"])
    """

    defaults_of = "LORA"

    peft_type: Literal["ROAD"] = "ROAD"
    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: Annotated[int, Field(gt=0, multiple_of=2)] = 64
    init_weights: bool = True


class Road(Rule[RoadConfig]):
    """R·y on linear sites: y with its bias, which is rotated too."""

    name, spec, ops, local = "road", RoadConfig, ("linear",), "i"
    keys = ("road_theta", "road_alpha")
    columns: ClassVar[Mapping[str, str]] = {"variant": "variant"}

    def params(self, spec: RoadConfig, site: WeightSite) -> dict[str, Param]:
        size = site.out_features * {"road_1": 1, "road_2": 2, "road_4": 4}[spec.variant] // 2
        theta, alpha = ("zeros", "ones") if spec.init_weights else ("normal:0.5", "rule")
        return {
            "road_theta": Param((size,), theta, use="vector", axes="."),
            "road_alpha": Param((size,), alpha, use="vector", axes="."),
        }

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        return {"road_alpha": 1 + 0.5 * torch.randn(shapes["road_alpha"], dtype=weight.dtype, device=weight.device)}

    def constants(self, spec: RoadConfig, site: WeightSite) -> dict[str, Constant]:
        return {"variant": spec.variant, "group_size": spec.group_size}

    def check(self, spec: RoadConfig, site: WeightSite) -> str | None:
        if site.out_features % spec.group_size:
            return f"group_size={spec.group_size} does not divide its {site.out_features} outputs"
        if not spec.init_weights and site.weight is None:
            return "init_weights=False needs a weight that is a plain parameter"
        return None

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return _turned(weight.mT, p).mT

    def bias(self, bias: Tensor, p: Any) -> Tensor:
        return _turned(bias, p)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return _turned(y, p)


def _turned(y: Tensor, p: Any) -> Tensor:
    """R·y along the last dimension."""
    half, theta, alpha = p.group_size // 2, p.road_theta, p.road_alpha
    if p.variant == "road_1":
        # Both outputs of a pair have the same.
        theta, alpha = (value.reshape(-1, half).repeat_interleave(2, 0).flatten() for value in (theta, alpha))
    angle, scale = theta, alpha
    if p.variant == "road_4":
        # In every group, those of y and then those of what y is paired with.
        theta, angle = _halves(theta, p)
        alpha, scale = _halves(alpha, p)
    pairs = y.unflatten(-1, (-1, 2, half))
    other = torch.stack((-pairs[..., 1, :], pairs[..., 0, :]), -2).flatten(-3)
    return y * (alpha * theta.cos()) + other * (scale * angle.sin())


def _halves(value: Tensor, p: Any) -> tuple[Tensor, Tensor]:
    both = value.reshape(-1, 2, p.group_size)
    return both[:, 0].flatten(), both[:, 1].flatten()
