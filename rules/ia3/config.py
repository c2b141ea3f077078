"""(IA)³: which activations to rescale."""

import re
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import model_validator

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
