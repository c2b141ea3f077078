"""(IA)³: activations are scaled by learned vectors.  Liu et al. 2022, arXiv:2205.05638, section 3.3."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from peftc.errors import AdapterError
from peftc.graph.sites import WeightSite
from peftc.rule import Adapted, Combination, Constant, Param, Part, Read, Rule, Shapes
from peftc.specs import AdapterSpec
from peftc.specs.base import Selector


class IA3Config(AdapterSpec):
    """Infused adapter by inhibiting and amplifying inner activations. Liu et al. 2022, arXiv:2205.05638, section 3.3.

    Targeted modules have their output scaled by a learned vector `ia3_l`, feed-forward ones their input.
    `feedforward_modules`: a list (a module is feed-forward if its fqn ends with a name) or one regular expression.
    `init_ia3_weights`: ones (true) or normal (false).

    Example: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    """

    selectors = (*AdapterSpec.selectors, "feedforward_modules")
    defaulted = ("target_modules", "feedforward_modules")

    peft_type: Literal["IA3"] = "IA3"
    feedforward_modules: Selector | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    @model_validator(mode="after")
    def _check_ia3(self) -> Self:
        if isinstance(self.feedforward_modules, tuple) and isinstance(self.target_modules, tuple):
            alone = [name for name in self.feedforward_modules if name not in self.target_modules]
            if alone:
                raise ValueError(
                    f"feedforward_modules: {alone[0]!r} is not in target_modules={list(self.target_modules)!r};"
                    " every feed-forward module must be a target"
                )
        return self

    def is_feedforward(self, fqn: str) -> bool:
        """Whether the input of module `fqn` is scaled instead of its output."""
        if isinstance(self.feedforward_modules, str):
            return re.fullmatch(self.feedforward_modules, fqn) is not None
        return fqn.endswith(self.feedforward_modules) if self.feedforward_modules else False

    def respelled(self, names: Mapping[str, str]) -> Self:
        chosen = tuple(new for old, new in names.items() if self.is_feedforward(old))
        return super().respelled(names).model_copy(update={"feedforward_modules": chosen})

    @property
    def goes_by_plain_names(self) -> bool:
        return super().goes_by_plain_names and not isinstance(self.feedforward_modules, str)


class _IA3(Rule[IA3Config]):
    name, spec, local = "ia3", IA3Config, "oi"
    keys, combinations = ("ia3_l",), ("linear",)

    def read_shape(self, tensors: Shapes, weight: tuple[int, ...]) -> Read | None:
        if "ia3_l" not in tensors:
            return None
        if len(weight) > 2:
            return f"conv{len(weight) - 2}d", "out_in", 1
        return "linear", "out_in" if len(set(weight)) > 1 else None, 1

    def constants(self, spec: IA3Config, site: WeightSite) -> dict[str, Constant]:
        return {"feedforward": spec.is_feedforward(site.fqn), "groups": site.groups}

    def combined(self, specs: Mapping[str, IA3Config], where: Adapted, how: Combination) -> IA3Config:
        for fqn, names in where.items():
            if len({specs[name].is_feedforward(fqn) for name in names}) > 1:
                raise AdapterError(
                    f"{fqn}: is feed-forward for some of the adapters only, so their vectors don't add up"
                )
        first = next(iter(specs.values()))
        assert isinstance(first.target_modules, tuple), "the engine names them"
        feedforward = tuple(fqn for fqn, names in where.items() if specs[names[0]].is_feedforward(fqn))
        chosen = tuple(name for name in first.target_modules if any(fqn.endswith(name) for fqn in feedforward))
        new = first.model_copy(update={"feedforward_modules": chosen})
        wrong = [fqn for fqn in where if new.is_feedforward(fqn) != (fqn in feedforward)]
        if wrong:
            raise AdapterError(f"{wrong[0]}: has the name of a feed-forward module, but is none")
        return new

    def combine(self, site: WeightSite, parts: Sequence[Part], how: Combination) -> dict[str, Tensor]:
        return {"ia3_l": torch.stack([part.weight * part.p.ia3_l for part in parts]).sum(0)}

    def slots(self, spec: IA3Config, site: WeightSite) -> tuple[str, ...]:
        return ("input",) if spec.is_feedforward(site.fqn) else ("output",)

    def bias(self, bias: Tensor, p: Any) -> Tensor:
        return bias if p.feedforward else bias * p.ia3_l.flatten()

    def unfold(self, weight: Tensor, p: Any) -> Tensor:
        return weight / self.weight(torch.ones_like(weight), p)


class IA3Linear(_IA3):
    """l ⊙ y, or the op on l ⊙ x for feed-forward modules."""

    ops = ("linear",)

    def params(self, spec: IA3Config, site: WeightSite) -> dict[str, Param]:
        feedforward = spec.is_feedforward(site.fqn)
        shape, axes = ((1, site.in_features), ".i") if feedforward else ((site.out_features, 1), "o.")
        return {"ia3_l": Param(shape, "ones" if spec.init_ia3_weights else "normal", use="vector", axes=axes)}

    def input(self, x: Tensor, p: Any) -> Tensor:
        return x * p.ia3_l.flatten()

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return y * p.ia3_l.flatten()

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight * p.ia3_l


class IA3Conv(_IA3):
    """The same per channel: `ia3_l` is (1, channels, 1 …)."""

    ops = ("conv1d", "conv2d", "conv3d")

    def params(self, spec: IA3Config, site: WeightSite) -> dict[str, Param]:
        channels = site.in_features if spec.is_feedforward(site.fqn) else site.out_features
        shape = (1, channels, *(1 for _ in site.kernel_size))
        return {"ia3_l": Param(shape, "ones" if spec.init_ia3_weights else "normal", use="vector")}

    def input(self, x: Tensor, p: Any) -> Tensor:
        return x * p.ia3_l[0]

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return y * p.ia3_l[0]

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        if not p.feedforward:
            return weight * p.ia3_l.transpose(0, 1)
        # Each group of output channels sees its own slice of the input channels.
        per_group = p.ia3_l.flatten().reshape(p.groups, 1, weight.shape[1])
        per_row = per_group.expand(-1, weight.shape[0] // p.groups, -1).reshape(weight.shape[:2])
        return weight * per_row.reshape(*weight.shape[:2], *(1 for _ in weight.shape[2:]))
