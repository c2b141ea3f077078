"""SHiRA: W + S with a sparse S at places that stay.  Bhardwaj et al. 2024, arXiv:2406.13175, section 3."""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from peftc.errors import SpecError
from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule, Shapes
from peftc.specs import AdapterSpec
from peftc.specs.selection import Rank


class ShiraConfig(AdapterSpec):
    """A few entries of the weight, trained. Bhardwaj et al. 2024, arXiv:2406.13175, section 3.1.

    r·(inputs + outputs) of them, as many numbers as LoRA of rank `r` has, at places that are drawn with `random_seed`
    (None is a seed, too) and that files hold. `init_weights=False`: a random start, which changes the model. Files with
    another `mask_type` can be loaded; their places can't be drawn. `fan_in_fan_out` is informative.

    Example: ShiraConfig(r=32, target_modules=["q_proj", "v_proj"])
    """

    defaults_of, excludes = "LORA", False

    peft_type: Literal["SHIRA"] = "SHIRA"
    r: Rank = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True


class Shira(Rule[ShiraConfig]):
    """On linear sites, as a change of the weight."""

    name, spec, ops, additive = "shira", ShiraConfig, ("linear",), True
    scale, keys = "scaling", ("shira_weight", "shira_indices")
    columns: ClassVar[Mapping[str, str]] = {"r": "r"}

    def params(self, spec: ShiraConfig, site: WeightSite) -> dict[str, Param]:
        count = spec.r * (site.in_features + site.out_features)
        return {
            "shira_weight": Param((count,), "zeros" if spec.init_weights else "normal", use="vector"),
            "shira_indices": Param((2, count), "drawn", trainable=False, dtype="int32", use="lookup"),
        }

    def constants(self, spec: ShiraConfig, site: WeightSite) -> dict[str, Constant]:
        # Constants are numbers or text, and a seed may be None.
        draw = {"mask_type": spec.mask_type, "random_seed": str(spec.random_seed)}
        return {"r": spec.r, "scaling": 1.0, "sizes": (site.out_features, site.in_features), **draw}

    def check(self, spec: ShiraConfig, site: WeightSite) -> str | None:
        count, size = spec.r * (site.in_features + site.out_features), site.in_features * site.out_features
        return f"its weight has {size} entries, fewer than the {count} of r={spec.r}" if count > size else None

    def draw(self, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        if p.mask_type != "random":
            raise SpecError(
                f"ShiraConfig.mask_type={p.mask_type!r}: only 'random' places can be drawn. Load a file that has them, or"
                " leave mask_type out"
            )
        return {"shira_indices": _places(p.sizes, shapes["shira_indices"][1], p.random_seed)}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        dense = torch.zeros_like(weight, dtype=p.shira_weight.dtype)
        rows, columns = p.shira_indices[0], p.shira_indices[1]
        return weight + p.scaling * dense.index_put((rows, columns), p.shira_weight)


@functools.lru_cache(maxsize=8)
def _places(sizes: tuple[int, int], count: int, seed: str) -> Tensor:
    """The rows and columns of `count` entries, in the order of the weight, as peft draws them."""
    generator = torch.Generator()  # Of torch's own seed, which is always the same, if there is none.
    if seed != "None":
        generator.manual_seed(int(seed))
    rows, columns = sizes
    chosen = torch.randperm(rows * columns, generator=generator)[:count].sort().values
    return torch.stack([chosen // columns, chosen % columns]).int()
