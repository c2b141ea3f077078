"""Uni-LoRA: W + BA, of one trained vector whose entries stand in A and B.  Li et al. 2025, arXiv:2506.00799, section 3."""

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.product import Product
from peftc.rule import Constant, Factors, Param, Placed, Shapes
from peftc.specs.selection import Count, LayerSelection, Rank, Share

# Numbers first: an input is cast to what comes first.
_DRAWN = ("unilora_scales_A", "unilora_scales_B", "unilora_indices_A", "unilora_indices_B")


class UniLoraConfig(LayerSelection):
    """One vector for the whole model. Li et al. 2025, arXiv:2506.00799.

    Each entry of the `theta_d_length` stands at equally many random places (drawn with `proj_seed`) of all A and B, divided
    by the root of their number, so the projection is an isometry. It starts uniform within `init_theta_d_bound`, or normal
    (`init_weights=False`); both change the model. `save_indices`: files have the places. `bias` trains base biases.

    Example: UniLoraConfig(r=4, theta_d_length=23040, target_modules=["q_proj", "v_proj"])
    """

    defaults_of, excludes = "LORA", False

    peft_type: Literal["UNILORA"] = "UNILORA"
    r: Rank = 4
    proj_seed: int = 42
    theta_d_length: Count = 256
    unilora_dropout: Share = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "unilora_only"] = "none"
    init_theta_d_bound: Annotated[float, Field(gt=0)] = 0.02
    init_weights: bool = True
    save_indices: bool = False


class UniLora(Product[UniLoraConfig]):
    """On linear sites."""

    name, spec, ops, identity = "unilora", UniLoraConfig, ("linear",), False  # Its start is random.
    keys = _DRAWN
    columns: ClassVar[Mapping[str, str]] = {"r": "r"}
    drops = ("unilora_dropout",)
    repeats = False

    def shared(self, spec: UniLoraConfig, sites: Sequence[WeightSite]) -> dict[str, Param]:
        init = f"uniform:{spec.init_theta_d_bound}" if spec.init_weights else "normal"
        return {"unilora_theta_d": Param((spec.theta_d_length,), init, use="lookup")}

    def placed(self, spec: UniLoraConfig, sites: Sequence[WeightSite]) -> Sequence[Placed]:
        sizes = [spec.r * (site.in_features + site.out_features) for site in sites]
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        return [Placed(constants={"first": first, "places": sum(sizes)}) for first in starts]

    def params(self, spec: UniLoraConfig, site: WeightSite) -> dict[str, Param]:
        seed = None if spec.save_indices else spec.proj_seed
        shapes = ((spec.r, site.in_features), (site.out_features, spec.r)) * 2
        dtypes = (None, None, "int64", "int64")
        return {
            name: Param(shape, "drawn", trainable=False, dtype=dtype, seed=seed, use="lookup" if dtype else "matrix")
            for name, shape, dtype in zip(_DRAWN, shapes, dtypes, strict=True)
        }

    def constants(self, spec: UniLoraConfig, site: WeightSite) -> dict[str, Constant]:
        return {"r": spec.r, "length": spec.theta_d_length, "proj_seed": spec.proj_seed}

    def draw(self, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        places = _places(p.places, p.length, p.proj_seed)
        scales = places.bincount(minlength=p.length).float().clamp(min=1).rsqrt()
        a, b = (shapes[name] for name in _DRAWN[:2])
        middle = p.first + a[0] * a[1]
        found = places[p.first : middle].reshape(a), places[middle : middle + b[0] * b[1]].reshape(b)
        return dict(zip(_DRAWN, (*(scales[own] for own in found), *found), strict=True))

    def factors(self, p: Any) -> Factors:
        theta = p.unilora_theta_d
        up = theta[p.unilora_indices_B] * p.unilora_scales_B
        return Factors(up, theta[p.unilora_indices_A] * p.unilora_scales_A, 1.0)


@functools.lru_cache(maxsize=2)
def _places(count: int, length: int, seed: int) -> Tensor:
    """Which entry stands where, in the A and B of all sites; every entry as often as any other, or once more."""
    generator = np.random.default_rng(seed)
    found = np.repeat(np.arange(length), count // length)
    if count % length:
        found = np.concatenate([found, generator.choice(length, size=count % length, replace=False)])
    generator.shuffle(found)
    return torch.as_tensor(found, dtype=torch.int64)
