"""FRoD: which sites, and how much of the sparse matrix is trained."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftc.specs.selection import LayerSelection, Share


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
