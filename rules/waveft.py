"""WaveFT: W + s·(inverse wavelet transform of a sparse spectrum).  Bilican et al. 2025, arXiv:2505.12532, section 3."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule, Shapes
from peftc.specs.selection import Count, LayerSelection, OtherPatterns, first_match

from .fourierft import places
from .wavelets import WAVELETS, filter_length, low_pass


class WaveFTConfig(LayerSelection, OtherPatterns):
    """Some coefficients of the change's wavelet transform. Bilican et al. 2025, arXiv:2505.12532.

    `n_frequency` of them are trained (`n_frequency_pattern`: others at some modules), at places that are drawn with
    `random_loc_seed`; s is `scaling`. `wavelet_family`: Daubechies' db1 (Haar's) to db10, or with PyWavelets
    (`peftc[wavelets]`) sym2 to sym10 and coif1 to coif3. Without `use_idwt` the coefficients are the change itself.
    `init_weights=False`: a random start. `bias` trains base biases.

    Example: WaveFTConfig(n_frequency=2592, scaling=25.0, target_modules=["q_proj", "v_proj"])
    """

    defaults_of, patterns = "LORA", ("n_frequency_pattern",)
    not_implemented: ClassVar[Mapping[str, Any]] = {"proportional_parameters": False}

    peft_type: Literal["WAVEFT"] = "WAVEFT"
    n_frequency: Count = 2592
    scaling: float | int = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "waveft_only"] = "none"
    n_frequency_pattern: dict[str, Count] = Field(default_factory=dict)
    init_weights: bool = True

    @model_validator(mode="after")
    def _check_family(self) -> Self:
        if not re.fullmatch(WAVELETS, self.wavelet_family):
            raise ValueError(
                f"wavelet_family={self.wavelet_family!r}: take one of db1 to db10, sym2 to sym10 and coif1 to coif3"
            )
        return self

    def scaled(self, factor: float) -> Self:
        return self.model_copy(update={"scaling": self.scaling * factor})


class WaveFT(Rule[WaveFTConfig]):
    """On linear sites: the change has a product of its own, so that half precision does not round it with the weight."""

    name, spec, ops, additive = "waveft", WaveFTConfig, ("linear",), True
    scale, keys = "scaling", ("waveft_spectrum",)
    columns: ClassVar[Mapping[str, str]] = {"n": "n_frequency"}
    repeats = False

    def params(self, spec: WaveFTConfig, site: WeightSite) -> dict[str, Param]:
        n, seed = first_match(spec.n_frequency_pattern, site.name, spec.n_frequency), spec.random_loc_seed
        return {
            "waveft_spectrum": Param((n,), "zeros" if spec.init_weights else "normal:0.01", use="vector"),
            "waveft_filter": Param(
                (filter_length(spec.wavelet_family),), "drawn", trainable=False, seed=seed, use="lookup"
            ),
            "waveft_indices": Param((2, n), "drawn", trainable=False, dtype="int64", seed=seed, use="lookup"),
        }

    def constants(self, spec: WaveFTConfig, site: WeightSite) -> dict[str, Constant]:
        return {
            "n_frequency": first_match(spec.n_frequency_pattern, site.name, spec.n_frequency),
            "random_loc_seed": spec.random_loc_seed,
            "scaling": float(spec.scaling),
            "sizes": (site.out_features, site.in_features),
            "transformed": spec.use_idwt,
            "wavelet": spec.wavelet_family,
        }

    def check(self, spec: WaveFTConfig, site: WeightSite) -> str | None:
        n, size = (
            first_match(spec.n_frequency_pattern, site.name, spec.n_frequency),
            site.out_features * site.in_features,
        )
        return f"its weight has {size} entries, fewer than n_frequency={n}" if n > size else None

    def draw(self, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        found = places(p.sizes, p.n_frequency, p.random_loc_seed)
        return {"waveft_indices": found, "waveft_filter": torch.tensor(low_pass(p.wavelet))}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight + p.scaling * _change(p)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return y + F.linear(x, _change(p)) * p.scaling


def _change(p: Any) -> Tensor:
    """The change (out, in); the spectrum is padded by what the transform takes away, to even sizes."""
    rows, columns = p.sizes
    more = p.waveft_filter.shape[0] - 2 if p.transformed else 0
    height, width = rows + more, columns + more
    if p.transformed:
        height, width = height + height % 2, width + width % 2
    down, right = (height - rows) // 2, (width - columns) // 2
    blank = p.waveft_spectrum.new_zeros(height, width)
    dense = blank.index_put((p.waveft_indices[0] + down, p.waveft_indices[1] + right), p.waveft_spectrum)
    if not p.transformed:
        return dense
    low = p.waveft_filter.to(dense.dtype)
    signs = 1 - 2 * (torch.ones_like(low).cumsum(0) % 2 == 0).to(low.dtype)
    high = low.flip(0) * signs
    bands = dense.unflatten(0, (2, -1)).unflatten(2, (2, -1)).permute(0, 2, 1, 3).flatten(0, 1)
    # In the order of the bands; the one on the right has the high rows, as peft has it.
    pairs = ((low, low), (high, low), (low, high), (high, high))
    kernel = torch.stack([a[:, None] * b for a, b in pairs])[:, None]
    return F.conv_transpose2d(bands[None], kernel, stride=2, padding=more)[0, 0, :rows, :columns]


RULES = (WaveFT(),)
