"""PEANuT: W + s·f(W), a small network that makes the change out of the weight.  Zhong et al. 2024, arXiv:2410.01870."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule
from peftc.specs.selection import LayerSelection, Rank

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
}


class PeanutConfig(LayerSelection):
    """Weight-aware neural tweakers. Zhong et al. 2024, arXiv:2410.01870, section 3.

    Columns of the weight go through A into `r` numbers, through `depth` encoders and as many decoders (r × r, each with a
    residual from the other side), and through B back into columns; `act_fn` is between. `init_weights=False`: a random
    B, which changes the model.

    Example: PeanutConfig(r=32, depth=1, target_modules=["q_proj", "v_proj"])
    """

    defaults_of = "LORA"

    peft_type: Literal["PEANUT"] = "PEANUT"
    r: Rank = 32
    depth: Annotated[int, Field(ge=0)] = 0
    act_fn: Literal["relu", "gelu", "silu", "swish", "tanh", "sigmoid", "mish", "leaky_relu", "linear"] = "relu"
    scaling: float | int = 1.0
    init_weights: bool = True


class Peanut(Rule[PeanutConfig]):
    """On linear sites."""

    name, spec, ops, local = "peanut", PeanutConfig, ("linear",), "i"
    keys = ("peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders")
    columns: ClassVar[Mapping[str, str]] = {"r": "r", "depth": "depth"}
    takes = "its change"

    def params(self, spec: PeanutConfig, site: WeightSite) -> dict[str, Param]:
        r, rows, zero = spec.r, site.out_features, "zeros" if spec.init_weights else "kaiming_uniform"
        inner = [(side, number) for side in ("encoder", "decoder") for number in range(spec.depth)]
        return {
            "A": Param((r, rows), "kaiming_uniform", "peanut_A.weight", axes="ro"),
            **{
                f"{side}{number}": Param((r, r), "kaiming_uniform", f"peanut_{side}s.{number}.weight", axes="..")
                for side, number in inner
            },
            "B": Param((rows, r), zero, "peanut_B.weight", axes="or"),
        }

    def constants(self, spec: PeanutConfig, site: WeightSite) -> dict[str, Constant]:
        return {"r": spec.r, "depth": spec.depth, "act_fn": spec.act_fn, "scaling": float(spec.scaling)}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight + p.scaling * _change(weight, p)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return y + p.op(x, _change(p.weight, p)) * p.scaling


def _change(weight: Tensor, p: Any) -> Tensor:
    """f(W) (out, in)."""
    act = _ACTIVATIONS[p.act_fn]
    hidden = act(F.linear(weight.mT.to(p.A.dtype), p.A))
    residuals: list[Tensor] = []
    for number in range(p.depth):
        residuals.append(hidden)
        hidden = act(F.linear(hidden, getattr(p, f"encoder{number}")))
    for number in range(p.depth):
        hidden = act(F.linear(hidden, getattr(p, f"decoder{number}"))) + residuals[-1 - number]
    return F.linear(hidden, p.B).mT
