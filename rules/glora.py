"""GLoRA: W + W ⊙ A + B, and b + b ⊙ D + E + W·C.  Chavan et al. 2023, arXiv:2306.07967, section 2."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule
from peftc.specs import AdapterSpec
from peftc.specs.selection import Rank


class GloraConfig(AdapterSpec):
    """Generalized LoRA: weight and bias are scaled and shifted. Chavan et al. 2023, arXiv:2306.07967.

    `config_A_B`: A and B are products of rank `r` ("lora"), one number a row ("vector"), one number ("constant"), or zero
    ("none"); `config_C` (over inputs) and `config_D_E` (over outputs) likewise, and only where there is a bias.
    `init_weights=False`: a random start, which changes the model. `bias` trains base biases.

    Example: GloraConfig(r=8, target_modules=["q_proj", "v_proj"])
    """

    defaults_of, excludes = "LORA", False

    peft_type: Literal["GLORA"] = "GLORA"
    r: Rank = 8
    bias: Literal["none", "all", "glora_only"] = "none"
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"  # noqa: N815 - PEFT's names
    config_C: Literal["lora", "vector", "none"] = "lora"  # noqa: N815
    config_D_E: Literal["vector", "constant", "none"] = "constant"  # noqa: N815
    init_weights: bool = True

    def on_model(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[Self, Mapping[str, Tensor]]:
        # peft's files have zeros for what is left out.
        return self, {key: tensor for key, tensor in tensors.items() if not key.endswith(".zeros")}


class Glora(Rule[GloraConfig]):
    """On linear sites."""

    name, spec, ops, local = "glora", GloraConfig, ("linear",), "oi"
    keys = tuple(f"glora_{path}" for path in "ABCDE")
    columns: ClassVar[Mapping[str, str]] = {"r": "r"}
    takes = "what it scales"

    def params(self, spec: GloraConfig, site: WeightSite) -> dict[str, Param]:
        rows, columns, zero = site.out_features, site.in_features, spec.init_weights
        made: dict[str, Param] = {}
        for path, form in _forms(spec, site).items():
            height, width = (columns, 1) if path == "C" else (rows, columns)
            axis = "." if path == "C" else "o"
            if form == "lora":
                along = ".." if path == "C" else "ri"
                down = "zeros" if zero else "kaiming_uniform"
                made[f"{path}d"] = Param((height, spec.r), down, f"glora_{path}.Xd", axes=f"{axis}r")
                made[f"{path}u"] = Param((spec.r, width), "kaiming_uniform", f"glora_{path}.Xu", axes=along)
            elif form == "constant":
                made[path] = Param((1,), "zeros" if zero else "normal:0.02", f"glora_{path}.X", use="vector", axes=".")
            elif form == "vector":
                shape, axes = ((height,), axis) if path in "DE" else ((height, 1), f"{axis}.")
                init = "zeros" if zero else "uniform:1" if path in "ABC" else f"uniform:{rows**-0.5}"
                made[path] = Param(shape, init, f"glora_{path}.X", use="vector", axes=axes)
        return made

    def constants(self, spec: GloraConfig, site: WeightSite) -> dict[str, Constant]:
        return {"r": spec.r, **{f"form_{path}": form for path, form in _forms(spec, site).items()}}

    def check(self, spec: GloraConfig, site: WeightSite) -> str | None:
        return None if set(_forms(spec, site).values()) != {"none"} else "all five of its tensors are left out (none)"

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight if p.form_A == "none" else weight + _change(weight, p)

    def bias(self, bias: Tensor, p: Any) -> Tensor:
        return bias + _shift(bias, p.weight, p)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        if p.form_A != "none":
            y = y + p.op(x, _change(p.weight, p))
        return y if p.bias is None else y + _shift(p.bias, p.weight, p)


def _forms(spec: GloraConfig, site: WeightSite) -> dict[str, str]:
    """What each of the five is."""
    a_b, c, d_e = spec.config_A_B, spec.config_C, spec.config_D_E
    of_bias = {"C": c, "D": d_e, "E": d_e}
    return {"A": a_b, "B": a_b, **(of_bias if site.bias is not None else dict.fromkeys(of_bias, "none"))}


def _change(weight: Tensor, p: Any) -> Tensor:
    return weight * _value(p, "A") + _value(p, "B")


def _shift(bias: Tensor, weight: Tensor, p: Any) -> Tensor:
    c, d = _value(p, "C"), _value(p, "D")
    change = torch.zeros_like(bias) if c is None else (weight @ c.to(weight.dtype)).squeeze(-1)
    return change if d is None else change + bias * d + _value(p, "E")


def _value(p: Any, path: str) -> Any:
    form = getattr(p, f"form_{path}")
    if form == "none":
        return None
    return getattr(p, f"{path}d") @ getattr(p, f"{path}u") if form == "lora" else getattr(p, path)
