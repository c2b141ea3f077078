"""HiRA: W ⊙ (1 + BA), of full rank though A and B are not.  Huang et al. 2025, ICLR (openreview TwJrTz9cRS), section 3."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BeforeValidator
from torch import Tensor, nn

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule
from peftc.specs.selection import LayerSelection, PatternedRank, Rank, Share


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


class HiraConfig(LayerSelection, PatternedRank):
    """Hadamard high-rank adaptation. Huang et al. 2025 (ICLR).

    `r` is the rank of BA, by which each number of the weight is raised; `rank_pattern` as in LoraConfig. `hira_dropout`
    drops inputs of the change. `init_weights`: true (B starts as zero), "gaussian" (A normal, B zero), false (a random
    start, which changes the model). `fan_in_fan_out` is informative.

    Example: HiraConfig(r=32, target_modules=["q_proj", "v_proj"])
    """

    defaults_of = "LORA"

    peft_type: Literal["HIRA"] = "HIRA"
    r: Rank = 32
    hira_dropout: Share = 0.0
    fan_in_fan_out: bool = False
    init_weights: Annotated[bool | Literal["gaussian"], BeforeValidator(_lower)] = True

    def on_model(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[Self, Mapping[str, Tensor]]:
        # peft writes rank_pattern and does not go by it.
        found = {tensor.shape[0] for key, tensor in tensors.items() if key.endswith("_A")}
        return (
            self.model_copy(update={"rank_pattern": {}}) if self.rank_pattern and found == {self.r} else self
        ), tensors


class Hira(Rule[HiraConfig]):
    """On linear sites."""

    name, spec, ops, local = "hira", HiraConfig, ("linear",), "oi"
    keys = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")
    columns: ClassVar[Mapping[str, str]] = {"r": "r"}
    drops = ("hira_dropout",)

    def params(self, spec: HiraConfig, site: WeightSite) -> dict[str, Param]:
        r = spec.rank_for(site.name)
        inits = {
            True: ("kaiming_uniform", "zeros"),
            "gaussian": (f"normal:{1 / r}", "zeros"),
            False: ("normal", "normal"),
        }
        a, b = inits[spec.init_weights]
        return {
            "hira_A": Param((r, site.in_features), a, axes="ri"),
            "hira_B": Param((site.out_features, r), b, axes="or"),
        }

    def constants(self, spec: HiraConfig, site: WeightSite) -> dict[str, Constant]:
        return {"r": spec.rank_for(site.name)}

    def check(self, spec: HiraConfig, site: WeightSite) -> str | None:
        return f"its {site.groups} groups have weights that BA does not fit" if site.groups > 1 else None

    def slots(self, spec: HiraConfig, site: WeightSite) -> tuple[str, ...]:
        drops = self.dropouts(spec, site).get("hira_dropout")  # No input can be dropped in the weight.
        return ("weight",) if site.has_wide_weight and not drops else ("output",)

    def product(self, p: Any) -> Tensor:
        """BA, of the weight's shape."""
        return p.hira_B @ p.hira_A

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight + weight * self.product(p)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return y + p.op(p.hira_dropout(x), p.weight * self.product(p))


class HiraEmbedding(Hira):
    """On embeddings."""

    ops = ("embedding",)
    drops = ()  # Token ids can't be dropped; peft does not either.

    def params(self, spec: HiraConfig, site: WeightSite) -> dict[str, Param]:
        r = spec.rank_for(site.name)
        return {
            "hira_embedding_A": Param((r, site.in_features), "zeros" if spec.init_weights else "normal", axes="ri"),
            "hira_embedding_B": Param((site.out_features, r), "normal", axes="or"),
        }

    def product(self, p: Any) -> Tensor:
        return p.hira_embedding_B @ p.hira_embedding_A

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return y + p.op(x, (p.weight * self.product(p)).mT)


class HiraConv(Hira):
    """On convolutions: A has the kernel."""

    ops = ("conv1d", "conv2d", "conv3d")

    def params(self, spec: HiraConfig, site: WeightSite) -> dict[str, Param]:
        r, ones = spec.rank_for(site.name), (1 for _ in site.kernel_size)
        a, b = ("kaiming_uniform", "zeros") if spec.init_weights else ("normal", "normal")
        return {
            "hira_A": Param((r, site.in_features, *site.kernel_size), a),
            "hira_B": Param((site.out_features, r, *ones), b),
        }

    def product(self, p: Any) -> Tensor:
        return torch.einsum("or,ri...->oi...", p.hira_B.flatten(1), p.hira_A)
