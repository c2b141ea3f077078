"""WaveFT: W + s·(inverse wavelet transform of a sparse spectrum).  Bilican et al. 2025, arXiv:2505.12532, section 3."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Shapes
from peftc.specs.selection import Count

from .fourierft import Spectral, SpectralConfig, places
from .wavelets import WAVELETS, filter_length, low_pass


class WaveFTConfig(SpectralConfig):
    """Some coefficients of the change's wavelet transform. Bilican et al. 2025, arXiv:2505.12532.

    `n_frequency` of them are trained (`n_frequency_pattern`: others at some modules), at places that are drawn with
    `random_loc_seed`; s is `scaling`. `wavelet_family`: Daubechies' db1 (Haar's) to db10, or with PyWavelets
    (`peftc[wavelets]`) sym2 to sym10 and coif1 to coif3. Without `use_idwt` the coefficients are the change itself.
    `init_weights=False`: a random start. `bias` trains base biases.

    Example: WaveFTConfig(n_frequency=2592, scaling=25.0, target_modules=["q_proj", "v_proj"])
    """

    not_implemented: ClassVar[Mapping[str, Any]] = {"proportional_parameters": False}

    peft_type: Literal["WAVEFT"] = "WAVEFT"
    n_frequency: Count = 2592
    scaling: float | int = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    bias: Literal["none", "all", "waveft_only"] = "none"
    init_weights: bool = True

    @model_validator(mode="after")
    def _check_family(self) -> Self:
        if not re.fullmatch(WAVELETS, self.wavelet_family):
            raise ValueError(
                f"wavelet_family={self.wavelet_family!r}: take one of db1 to db10, sym2 to sym10 and coif1 to coif3"
            )
        return self


class WaveFT(Spectral[WaveFTConfig]):
    """The change is the spectrum's inverse wavelet transform."""

    name, spec, keys = "waveft", WaveFTConfig, ("waveft_spectrum",)

    def params(self, spec: WaveFTConfig, site: WeightSite) -> dict[str, Param]:
        n, seed = spec.count_for(site.name), spec.random_loc_seed
        return {
            "waveft_spectrum": Param((n,), "zeros" if spec.init_weights else "normal:0.01", use="vector"),
            "waveft_filter": Param(
                (filter_length(spec.wavelet_family),), "drawn", trainable=False, seed=seed, use="lookup"
            ),
            "waveft_indices": Param((2, n), "drawn", trainable=False, dtype="int64", seed=seed, use="lookup"),
        }

    def constants(self, spec: WaveFTConfig, site: WeightSite) -> dict[str, Constant]:
        return {**super().constants(spec, site), "transformed": spec.use_idwt, "wavelet": spec.wavelet_family}

    def draw(self, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        found = places(p.sizes, p.n_frequency, p.random_loc_seed)
        return {"waveft_indices": found, "waveft_filter": torch.tensor(low_pass(p.wavelet))}

    def change(self, p: Any) -> Tensor:
        # The spectrum is padded by what the transform takes away, to even sizes.
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
