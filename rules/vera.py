"""VeRA: W + diag(b)·B·diag(d)·A, with random A and B that all sites share.  Kopiczko et al. 2023, arXiv:2310.11454."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule, Shapes
from peftc.specs.selection import LayerSelection, Rank, Share


class ProjectedConfig(LayerSelection):
    """What VeRA's and PVeRA's fields have in common."""

    defaults_of, excludes = "LORA", False

    r: Rank = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    init_weights: bool = True


class VeraConfig(ProjectedConfig):
    """Vectors that scale random projections, which stay as they are. Kopiczko et al. 2023, arXiv:2310.11454, section 3.1.

    `r` is the rank; d starts at `d_initial` and b at zero, or both at random (`init_weights=False`). A and B have the
    sizes of the largest site and are drawn with the seed `projection_prng_key`; with `save_projection` files hold them,
    else they are drawn again. `bias` trains base biases (`all`, or those of adapted modules). `fan_in_fan_out` is
    informative: the layout is read off the module.

    Example: VeraConfig(r=256, target_modules=["q_proj", "v_proj"], d_initial=0.1)
    """

    peft_type: Literal["VERA"] = "VERA"
    vera_dropout: Share = 0.0
    bias: Literal["none", "all", "vera_only"] = "none"


S = TypeVar("S", bound=ProjectedConfig)


class VeraRule(Rule[S]):
    """What VeRA and PVeRA have in common: shared projections, `halves`·r rows of them in A, and a vector for either."""

    ops, additive = ("linear",), True
    columns: ClassVar[Mapping[str, str]] = {"r": "r"}
    prefix: ClassVar[str]
    halves: ClassVar[int] = 1
    repeats = False

    def shared(self, spec: S, sites: Sequence[WeightSite]) -> dict[str, Param]:
        out, wide = max(site.out_features for site in sites), max(site.in_features for site in sites)
        seed = None if spec.save_projection else spec.projection_prng_key
        shapes = {"A": (self.halves * spec.r, wide), "B": (out, spec.r)}
        return {
            f"{self.prefix}_{name}": Param(shape, "drawn", trainable=False, seed=seed) for name, shape in shapes.items()
        }

    def params(self, spec: S, site: WeightSite) -> dict[str, Param]:
        b, d = ("zeros", f"constant:{spec.d_initial}") if spec.init_weights else ("ones", "normal")
        return {
            f"{self.prefix}_lambda_b": Param((site.out_features,), b, use="vector"),
            f"{self.prefix}_lambda_d": Param((self.halves * spec.r,), d, use="vector"),
        }

    def constants(self, spec: S, site: WeightSite) -> dict[str, Constant]:
        sizes = (site.out_features, site.in_features)
        return {"r": spec.r, "sizes": sizes, "projection_prng_key": spec.projection_prng_key}

    def draw(self, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        """Kaiming-uniform for ReLU, A first and B after it out of one stream, as peft draws them."""
        generator = torch.Generator().manual_seed(p.projection_prng_key)
        bounds = {name: math.sqrt(6 / shape[1]) for name, shape in shapes.items()}
        return {n: torch.empty(s).uniform_(-bounds[n], bounds[n], generator=generator) for n, s in shapes.items()}

    def projections(self, p: Any) -> tuple[Tensor, Tensor]:
        """A and B as far as this site has inputs and outputs."""
        rows, columns = p.sizes
        return getattr(p, f"{self.prefix}_A")[:, :columns], getattr(p, f"{self.prefix}_B")[:rows]


class Vera(VeraRule[VeraConfig]):
    """On linear sites. The projections of a smaller site are the first rows and columns."""

    name, spec, prefix = "vera", VeraConfig, "vera"
    keys = ("vera_lambda_b", "vera_lambda_d")
    drops = ("vera_dropout",)

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        a, b = self.projections(p)
        return weight + (p.vera_lambda_b[:, None] * b) @ (p.vera_lambda_d[:, None] * a)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        a, b = self.projections(p)
        return y + p.vera_lambda_b * F.linear(p.vera_lambda_d * F.linear(p.vera_dropout(x), a), b)
