"""RandLoRA: W + s·Σₙ Bₙ·Λₙ·A·Γₙ, random bases with trained diagonals.  Albert et al. 2025, arXiv:2502.00987, section 4."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.product import Product
from peftc.rule import Constant, Factors, Param, Shapes
from peftc.specs.selection import LayerSelection, Rank, Share


class RandLoraConfig(LayerSelection):
    """Full-rank changes out of shared random bases. Albert et al. 2025, arXiv:2502.00987, section 4.1.

    `r` is the rank of each basis, so the smaller it is the more diagonals are trained; s = randlora_alpha / r. Bases have
    the sizes of the largest site and are drawn with the seed `projection_prng_key`: uniform, or of −1, 0 and 1 (`sparse`,
    `very_sparse`). With `save_projection` files hold them, else they are drawn again. `init_weights=False`: a random start,
    which changes the model. `bias` trains base biases (`all`, or those of adapted modules). `fan_in_fan_out` only informs.

    Example: RandLoraConfig(r=32, randlora_alpha=640, target_modules=["q_proj", "v_proj"])
    """

    defaults_of, excludes = "LORA", False

    peft_type: Literal["RANDLORA"] = "RANDLORA"
    r: Rank = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: Share = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: float | int = 640
    bias: Literal["none", "all", "randlora_only"] = "none"
    init_weights: bool = True


class RandLora(Product[RandLoraConfig]):
    """On linear sites. A has the shorter side of the weight, B the longer one; smaller sites take the first of both."""

    name, spec, ops = "randlora", RandLoraConfig, ("linear",)
    scale, keys = "scaling", ("randlora_lambda", "randlora_gamma")
    columns: ClassVar[Mapping[str, str]] = {"r": "r", "alpha": "randlora_alpha"}
    # peft's files have the shared bases once more for every site.
    spellings = ((r"^base_model\.model\..*\.(randlora_[AB])$", r"base_model.\1"),)
    drops = ("randlora_dropout",)
    repeats = False

    def shared(self, spec: RandLoraConfig, sites: Sequence[WeightSite]) -> dict[str, Param]:
        largest = max(site.out_features for site in sites), max(site.in_features for site in sites)
        seed = None if spec.save_projection else spec.projection_prng_key
        shapes = {
            "randlora_A": (spec.r, 1, min(largest)),
            "randlora_B": (max(largest), math.ceil(min(largest) / spec.r), spec.r),
        }
        return {name: Param(shape, "drawn", trainable=False, seed=seed) for name, shape in shapes.items()}

    def params(self, spec: RandLoraConfig, site: WeightSite) -> dict[str, Param]:
        short, long = sorted((site.out_features, site.in_features))
        bases = math.ceil(short / spec.r)
        gamma = 1 / max(bases, short) if spec.init_weights else 1 / long
        return {
            "randlora_lambda": Param((spec.r, bases), "zeros" if spec.init_weights else "normal", use="vector"),
            "randlora_gamma": Param((bases, short), f"constant:{gamma}", use="vector"),
        }

    def constants(self, spec: RandLoraConfig, site: WeightSite) -> dict[str, Constant]:
        scaling, sizes = spec.randlora_alpha / spec.r, (site.out_features, site.in_features)
        kind = "very_sparse" if spec.very_sparse else "sparse" if spec.sparse else "uniform"
        numbers = {"r": spec.r, "randlora_alpha": float(spec.randlora_alpha), "scaling": scaling}
        return {**numbers, "sizes": sizes, "bases": kind, "projection_prng_key": spec.projection_prng_key}

    def draw(self, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        """A first and B after it out of one stream, as peft draws them; both are divided by their deviation."""
        generator = torch.Generator().manual_seed(p.projection_prng_key)
        if p.bases == "uniform":
            made = {"randlora_A": _uniform(shapes["randlora_A"], generator)}
            long, bases, r = shapes["randlora_B"]
            made["randlora_B"] = torch.cat([_uniform((long, 1, r), generator) for _ in range(bases)], dim=1)
        else:
            rarity = math.sqrt(shapes["randlora_A"][2]) if p.bases == "very_sparse" else 3
            drawn = {name: torch.rand(shapes[name], generator=generator) for name in ("randlora_A", "randlora_B")}
            made = {name: _signs(value, 1 / (2 * rarity)) for name, value in drawn.items()}
        return {name: value / value.std() for name, value in made.items()}

    def factors(self, p: Any) -> Factors:
        """(out, bases·r) and (bases·r, in): A with its diagonals is on the shorter side."""
        short, long = sorted(p.sizes)
        bases = -(-short // p.r)
        scaled = (p.randlora_lambda[:, :, None] * p.randlora_A[:, :, :short] * p.randlora_gamma[None]).flatten(0, 1)
        other = p.randlora_B[:long, :bases].flatten(1)
        up, down = (other, scaled) if short == p.sizes[1] else (scaled.mT, other.mT)
        return Factors(up, down, p.scaling)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # In bfloat16, where peft draws it; other dtypes give other numbers.
    return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)


def _signs(drawn: Tensor, share: float) -> Tensor:
    """−1 and 1 for that share of numbers each, and 0 for the others."""
    return (drawn > 1 - share).float() - (drawn < share).float()
