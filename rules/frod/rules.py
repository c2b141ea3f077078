"""FRoD: W + U(S + diag(l − l₀))Vᵀ, with V of all weights of one kind.  doi:10.1609/aaai.v40i31.39813, section 3."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from peftc.errors import SpecError
from peftc.graph.sites import WeightSite
from peftc.rule import BySite, Constant, Param, Placed, Rule, Shapes
from peftc.specs.selection import LayerSelection, Share

from .basis import basis, kind_of, layer_of


class FrodConfig(LayerSelection):
    """Full-rank changes in a common basis. AAAI 2026, doi:10.1609/aaai.v40i31.39813.

    Weights of one kind (`self_attn.q_proj` of all layers) share V, out of a joint decomposition of them, and are
    U·diag(l₀)·Vᵀ each. Trained are l and the entries of a sparse S (in, in), the share `sparse_rate` of those off the
    diagonal, drawn with `projection_prng_key`. `regularization_alpha` is a ridge for layers that are alike. Files have V
    and the places in S with `save_projection`, else they follow from the base; U always does. `frod_dropout` drops inputs.
    `bias` trains base biases. `init_weights=False`: a random start, which changes the model.
    `progressbar` and `fan_in_fan_out` are informative.

    Example: FrodConfig(sparse_rate=0.01, target_modules=["q_proj", "v_proj"])
    """

    defaults_of, excludes = "LORA", False
    not_implemented: ClassVar[Mapping[str, Any]] = {"runtime_offload_base_weight": False}

    peft_type: Literal["FROD"] = "FROD"
    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: Share = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "frod_only"] = "none"
    init_weights: bool = True
    sparse_rate: Annotated[float | int, Field(ge=0, le=1)] = 0.01
    regularization_alpha: Annotated[float | int, Field(ge=0)] = 1e-3
    progressbar: bool = True

    def count(self, size: int) -> int:
        """How many entries of S are trained, of a weight with `size` inputs."""
        room = size * (size - 1)
        return max(min(1, room), min(int(size * size * self.sparse_rate), room)) if self.sparse_rate else 0


class Frod(Rule[FrodConfig]):
    """On linear sites. As U·diag(l₀)·Vᵀ is the weight, what is added to it is written as the change of l alone."""

    name, spec, ops, additive = "frod", FrodConfig, ("linear",), True
    keys = ("frod_lambda_l", "frod_lambda_s_values")
    columns: ClassVar[Mapping[str, str]] = {"nonzero": "nonzero"}
    takes = "bases"
    drops, repeats = ("frod_dropout",), False

    def placed(self, spec: FrodConfig, sites: Sequence[WeightSite]) -> Sequence[Placed]:
        kinds = [kind_of(site.name) for site in sites]
        firsts: dict[str, WeightSite] = {}
        for kind, site in zip(kinds, sites, strict=True):
            first = firsts.setdefault(kind, site)
            if site.in_features != first.in_features:
                raise SpecError(
                    f"FrodConfig.target_modules: {site.name} has {site.in_features} inputs and {first.name}, of the same"
                    f" kind {kind!r}, has {first.in_features}: they can't share a basis. Leave one out (exclude_modules)."
                )
        sizes = {kind: first.in_features for kind, first in sorted(firsts.items())}
        before = {kind: tuple(list(sizes.values())[:number]) for number, kind in enumerate(sizes)}
        return [Placed(_shared(spec, firsts[kind], kind), {"drawn_before": before[kind]}) for kind in kinds]

    def params(self, spec: FrodConfig, site: WeightSite) -> dict[str, Param]:
        rows, columns = site.out_features, site.in_features
        start = "zeros" if spec.init_weights else "normal:0.1"
        return {
            "frod_lambda_l": Param((columns,), "rule", use="vector"),
            "frod_lambda_s_values": Param((spec.count(columns),), start, use="lookup"),
            "frod_U": Param((rows, columns), "rule", trainable=False, kept=False),
            "frod_start": Param((columns,), "rule", trainable=False, kept=False, use="vector"),
        }

    def constants(self, spec: FrodConfig, site: WeightSite) -> dict[str, Constant]:
        return {
            "nonzero": spec.count(site.in_features),
            "inputs": site.in_features,
            "ridge": float(spec.regularization_alpha),
            "rounded": site.dtype if site.dtype in ("float16", "bfloat16") else "",
            "noise": 0.0 if spec.init_weights else 0.1,
            "projection_prng_key": spec.projection_prng_key,
        }

    def draw(self, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        """Places off the diagonal, out of one stream for all kinds in alphabetical order, as peft draws them."""
        generator, size = torch.Generator().manual_seed(p.projection_prng_key), p.inputs
        for other in p.drawn_before:
            torch.randperm(other * (other - 1), generator=generator)
        places = torch.randperm(size * (size - 1), generator=generator)[: p.nonzero]
        rows, columns = places // max(1, size - 1), places % max(1, size - 1)
        indices = torch.stack([rows, columns + (columns >= rows)])
        return {"frod_s_indices": indices, "frod_s_size": torch.tensor([size, size])}

    def gather(self, name: str, weights: Mapping[str, Tensor], p: Any) -> Tensor:
        # By layer; of several in one (encoder and decoder), the last stands for them, as in peft.
        layers = {layer_of(fqn, number): weight for number, (fqn, weight) in enumerate(weights.items())}
        found = basis([layers[layer].float().cpu() for layer in sorted(layers)], p.ridge)
        # As peft's: in directions for which a weight has no rows, U follows from the rounding.
        return found.to(getattr(torch, p.rounded)) if p.rounded else found

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        shared, wide = p.frod_V.double().cpu(), weight.double().cpu()
        try:
            found = torch.linalg.solve(shared, wide.mT).mT
        except RuntimeError:  # It is singular.
            found = wide @ torch.linalg.pinv(shared, rtol=1e-6).mT
        lengths = torch.linalg.norm(found, dim=0)
        u = torch.where(lengths > 1e-12, found / lengths, 0)
        start = lengths + p.noise * torch.randn(lengths.shape, dtype=torch.float64)
        return {"frod_U": u, "frod_start": lengths, "frod_lambda_l": start}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight + p.frod_U @ (_middle(p) @ p.frod_V.mT)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return y + F.linear(F.linear(p.frod_dropout(x) @ p.frod_V, _middle(p)), p.frod_U)

    def filed(self, spec: FrodConfig, tensors: BySite, state: Mapping[str, Any]) -> tuple[FrodConfig, BySite]:
        left = () if spec.save_projection else ("frod_V", "frod_s_indices", "frod_s_size")
        return spec, {site: {n: t for n, t in own.items() if n not in left} for site, own in tensors.items()}


def _shared(spec: FrodConfig, site: WeightSite, kind: str) -> dict[str, Param]:
    """What sites of a `kind` share, of which `site` is one."""
    size = site.in_features
    places = partial(Param, init="drawn", trainable=False, use="lookup", dtype="int64")
    return {
        "frod_V": Param((size, size), "gathered", f"frod_V.{kind}", trainable=False),
        "frod_s_indices": places((2, spec.count(size)), key=f"frod_s_indices.{kind}"),
        "frod_s_size": places((2,), key=f"frod_s_size.{kind}"),
    }


def _middle(p: Any) -> Tensor:
    """S + diag(l − l₀), (in, in)."""
    places = p.frod_s_indices[0] * p.inputs + p.frod_s_indices[1]
    sparse = p.frod_lambda_s_values.new_zeros(p.inputs * p.inputs).scatter(0, places, p.frod_lambda_s_values)
    return sparse.reshape(p.inputs, p.inputs) + torch.diag_embed(p.frod_lambda_l - p.frod_start)
