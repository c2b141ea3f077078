"""Super-Tuning: W + S, a sparse S where the weight is largest, and a LoRA beside it.  arXiv:2607.09287, section 3."""

from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule, Shapes
from peftc.specs import AdapterSpec
from peftc.specs.selection import Rank, Share


class SupertuningConfig(AdapterSpec):
    """The entries of the weight that are largest are trained (arXiv:2607.09287); the smallest with `select_top=False`.

    All but the share `sparsity` of them. `r`: a LoRA of this rank beside it ("Supra"), scaled by lora_alpha / r (2 by
    default), with dropout of its inputs. Files have the places, if `save_precomputed_indices`; else they follow from the
    base. `init_weights=False`: a random start, which changes the model.

    Example: SupertuningConfig(sparsity=0.99, target_modules=["q_proj", "v_proj"])
    """

    defaults_of, excludes = "LORA", False

    peft_type: Literal["SUPERTUNING"] = "SUPERTUNING"
    sparsity: Annotated[float | int, Field(ge=0, lt=1)] = 0.99
    select_top: bool = True
    r: Rank | None = None
    lora_alpha: float | int | None = None
    lora_dropout: Share = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    @model_validator(mode="after")
    def _check_rank(self) -> Self:
        if self.lora_alpha is not None and self.r is None:
            raise ValueError(f"lora_alpha={self.lora_alpha} needs a rank, r, of the LoRA that it scales")
        return self


class Supertuning(Rule[SupertuningConfig]):
    """On linear sites, as a change of the weight."""

    name, spec, ops, additive = "supertuning", SupertuningConfig, ("linear",), True
    keys = ("supertuning_values", "supertuning_indices", "supertuning_lora_A", "supertuning_lora_B")
    takes = "the places of its largest entries"

    def params(self, spec: SupertuningConfig, site: WeightSite) -> dict[str, Param]:
        count, zero, kept = _count(spec, site), spec.init_weights, spec.save_precomputed_indices
        made = {
            "supertuning_values": Param((count,), "zeros" if zero else "normal", use="vector"),
            "supertuning_indices": Param((count,), "rule", trainable=False, dtype="int32", use="lookup", kept=kept),
        }
        if spec.r is not None:
            down, up = (spec.r, site.in_features), (site.out_features, spec.r)
            made["A"] = Param(down, "kaiming_uniform", "supertuning_lora_A.weight", axes="ri")
            made["B"] = Param(up, "zeros" if zero else "kaiming_uniform", "supertuning_lora_B.weight", axes="or")
        return made

    def constants(self, spec: SupertuningConfig, site: WeightSite) -> dict[str, Constant]:
        r = spec.r or 0
        scaling = 2.0 if spec.lora_alpha is None or not r else spec.lora_alpha / r
        return {"count": _count(spec, site), "largest": spec.select_top, "r": r, "scaling": scaling}

    def dropouts(self, spec: SupertuningConfig, site: WeightSite) -> dict[str, float]:
        return {"supertuning_lora_dropout": spec.lora_dropout} if spec.r else {}

    def check(self, spec: SupertuningConfig, site: WeightSite) -> str | None:
        return None if _count(spec, site) else f"sparsity={spec.sparsity} leaves nothing of its weight to be trained"

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        places = torch.topk(weight.abs().flatten(), p.count, largest=p.largest).indices
        return {"supertuning_indices": places.int()}

    def slots(self, spec: SupertuningConfig, site: WeightSite) -> tuple[str, ...]:
        # The inputs of the LoRA can be dropped only where they are.
        return ("output",) if spec.r and spec.lora_dropout else ("weight",)

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        new = weight + _sparse(weight, p)
        return new + p.scaling * (p.B @ p.A) if p.r else new

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        change = p.op(x, _sparse(p.weight, p))
        return y + change + p.op(p.op(p.supertuning_lora_dropout(x), p.A), p.B) * p.scaling


def _count(spec: SupertuningConfig, site: WeightSite) -> int:
    return int(site.in_features * site.out_features * (1 - spec.sparsity))


def _sparse(weight: Tensor, p: Any) -> Tensor:
    """S (out, in)."""
    blank = torch.zeros_like(weight, dtype=p.supertuning_values.dtype).flatten()
    return blank.scatter(0, p.supertuning_indices.long(), p.supertuning_values).reshape(weight.shape)
