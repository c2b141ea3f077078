"""FourierFT: W + s·Re(F⁻¹(E)), with a spectrum E of few entries.  Gao et al. 2024, arXiv:2405.03003, section 3.1."""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule, Shapes
from peftc.specs.selection import Count, LayerSelection, Patterned, first_match


class SpectralConfig(LayerSelection, Patterned):
    """What FourierFT's and WaveFT's fields have in common."""

    defaults_of, patterns = "LORA", ("n_frequency_pattern",)

    n_frequency: Count = 1000
    scaling: float | int = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    n_frequency_pattern: dict[str, Count] = Field(default_factory=dict)
    init_weights: bool = False

    def count_for(self, fqn: str) -> int:
        """The number of coefficients at module `fqn`."""
        return first_match(self.n_frequency_pattern, fqn, self.n_frequency)

    def scaled(self, factor: float) -> Self:
        return self.model_copy(update={"scaling": self.scaling * factor})


class FourierFTConfig(SpectralConfig):
    """Some coefficients of the change's Fourier transform. Gao et al. 2024, arXiv:2405.03003, section 3.1.

    `n_frequency` of them are trained, at places that are drawn with the seed `random_loc_seed`; `n_frequency_pattern`
    overrides that per module, as patterns of ranks do in LoraConfig. s is `scaling`. They start at random, which changes
    the model, or at zero (`init_weights=True`). `bias` trains base biases (`all`, or those of adapted modules).
    `fan_in_fan_out` is informative.

    Example: FourierFTConfig(n_frequency=1000, scaling=150.0, target_modules=["q_proj", "v_proj"])
    """

    peft_type: Literal["FOURIERFT"] = "FOURIERFT"
    scaling: float = 150.0
    bias: Literal["none", "all", "fourier_only"] = "none"


S = TypeVar("S", bound=SpectralConfig)


class Spectral(Rule[S]):
    """On linear sites: the change has a product of its own, so that half precision does not round it with the weight."""

    ops, additive, scale, repeats = ("linear",), True, "scaling", False
    columns: ClassVar[Mapping[str, str]] = {"n": "n_frequency"}

    def constants(self, spec: S, site: WeightSite) -> dict[str, Constant]:
        numbers = {"n_frequency": spec.count_for(site.name), "random_loc_seed": spec.random_loc_seed}
        return {**numbers, "scaling": float(spec.scaling), "sizes": (site.out_features, site.in_features)}

    def check(self, spec: S, site: WeightSite) -> str | None:
        n, size = spec.count_for(site.name), site.out_features * site.in_features
        return f"its weight has {size} entries, fewer than n_frequency={n}" if n > size else None

    def change(self, p: Any) -> Tensor:
        """The change (out, in) that the spectrum is of."""
        raise NotImplementedError

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight + p.scaling * self.change(p)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return y + F.linear(x, self.change(p)) * p.scaling


class FourierFT(Spectral[FourierFTConfig]):
    """The change is the real part of the spectrum's inverse transform."""

    name, spec, identity = "fourierft", FourierFTConfig, False
    keys = ("fourierft_spectrum",)

    def params(self, spec: FourierFTConfig, site: WeightSite) -> dict[str, Param]:
        n, seed = spec.count_for(site.name), spec.random_loc_seed
        return {
            "fourierft_spectrum": Param((n,), "zeros" if spec.init_weights else "normal", use="vector"),
            "fourierft_indices": Param((2, n), "drawn", trainable=False, dtype="int64", seed=seed, use="lookup"),
        }

    def draw(self, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        return {"fourierft_indices": places(p.sizes, p.n_frequency, p.random_loc_seed)}

    def change(self, p: Any) -> Tensor:
        # Half precision has no transform.
        values = p.fourierft_spectrum.to(torch.promote_types(p.fourierft_spectrum.dtype, torch.float32))
        blank = torch.zeros(p.sizes, dtype=values.dtype, device=values.device)
        dense = blank.index_put((p.fourierft_indices[0], p.fourierft_indices[1]), values)
        return torch.fft.ifft2(dense).real.to(p.fourierft_spectrum.dtype)


@functools.lru_cache(maxsize=8)
def places(sizes: tuple[int, int], count: int, seed: int) -> Tensor:
    """The rows and columns of `count` entries, as peft draws them; layers of one size have the same."""
    rows, columns = sizes
    chosen = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.stack([chosen // columns, chosen % columns])
