"""VeRA: W + diag(b)·B·diag(d)·A, with random A, B that sites share.  Kopiczko et al. 2023, arXiv:2310.11454."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from peftc import AdapterSpec, Param, Rule


class VeraConfig(AdapterSpec):
    """`projection_prng_key` is the seed of the shared matrices, which need not be saved."""

    peft_type: Literal["TEST_VERA"] = "TEST_VERA"
    r: int = 8
    projection_prng_key: int = 0


class Vera(Rule[VeraConfig]):
    name, spec, ops, additive = "test_vera", VeraConfig, ("linear",), True

    def shared(self, spec: VeraConfig, sites: Sequence[Any]) -> dict[str, Param]:
        out, wide = max(site.out_features for site in sites), max(site.in_features for site in sites)
        shapes = {"vera_A": (spec.r, wide), "vera_B": (out, spec.r)}
        seed = spec.projection_prng_key
        return {name: Param(shape, "kaiming_uniform", trainable=False, seed=seed) for name, shape in shapes.items()}

    def params(self, spec: VeraConfig, site: Any) -> dict[str, Param]:
        return {
            "vera_d": Param((spec.r, 1), "ones", use="vector"),
            "vera_b": Param((site.out_features, 1), use="vector"),
        }

    def constants(self, spec: VeraConfig, site: Any) -> dict[str, Any]:
        return {"sizes": (site.out_features, site.in_features)}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        rows, columns = p.sizes
        return weight + (p.vera_b * p.vera_B[:rows]) @ (p.vera_d * p.vera_A[:, :columns])
