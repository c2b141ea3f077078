"""VB-LoRA: W + B·A, whose pieces are mixed from one bank of vectors.  Li et al. 2024, arXiv:2405.15179, section 3."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from peftc.errors import SpecError
from peftc.graph.sites import WeightSite
from peftc.product import Product
from peftc.rule import BySite, Constant, Factors, Param
from peftc.specs.selection import Count, LayerSelection, Rank, Share

_LOGITS = ("vblora_logits_A", "vblora_logits_B")
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
# Logits that no softmax sees, in every dtype: of vectors that are not among the first, and the least of those that are.
_NEVER, _LEAST = -3e4, -2e4


class VBLoRAConfig(LayerSelection):
    """LoRA of rank `r` out of shared vectors. Li et al. 2024, arXiv:2405.15179, section 3.

    Rows of A and columns of B are cut into pieces of `vector_length`, each a mixture of `topk` of the `num_vectors` in the
    bank by trained logits. `init_vector_bank_bound` and `init_logits_std` say how both start. With `save_only_topk_weights`
    files hold the mixtures in the place of the logits: small, and not to be trained further. `bias` trains base biases
    (`all`, or those of adapted modules). `fan_in_fan_out` is informative.

    Example: VBLoRAConfig(r=4, num_vectors=256, vector_length=256, target_modules=["q_proj", "v_proj"])
    """

    peft_type: Literal["VBLORA"] = "VBLORA"
    r: Rank = 4
    num_vectors: Count = 256
    vector_length: Count = 256
    topk: Count = 2
    save_only_topk_weights: bool = False
    vblora_dropout: Share = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vblora_only"] = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    @model_validator(mode="after")
    def _check_topk(self) -> Self:
        if self.topk > self.num_vectors:
            raise ValueError(f"topk={self.topk} is more than there are vectors, num_vectors={self.num_vectors}")
        return self

    def on_model(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[Self, Mapping[str, Tensor]]:
        mixed = [key.removesuffix(_INDICES) for key in tensors if key.endswith(_INDICES)]
        if not mixed:
            return self, tensors
        if not self.inference_mode:
            raise SpecError(
                "VBLoRAConfig.save_only_topk_weights: the file has no logits, so training can't go on from it. Load it with"
                " is_trainable=False, or save without save_only_topk_weights"
            )
        plain = {key: value for key, value in tensors.items() if not key.endswith((_INDICES, _WEIGHTS))}
        logits = {key: self._logits(tensors[key + _INDICES], tensors[key + _WEIGHTS]) for key in mixed}
        return self, {**plain, **logits}

    def _logits(self, indices: Tensor, weights: Tensor) -> Tensor:
        """Logits that give these mixtures; files leave the last weight out, as they add up to 1."""
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
        blank = torch.full((*weights.shape[:-1], self.num_vectors), _NEVER, dtype=weights.dtype)
        return blank.scatter(-1, indices.long(), weights.clamp_min(0).log().clamp_min(_LEAST))


class VBLoRA(Product[VBLoRAConfig]):
    """On linear sites whose sides can be cut into vectors."""

    name, spec, ops, identity = "vblora", VBLoRAConfig, ("linear",), False
    keys = tuple(name + end for name in _LOGITS for end in ("", _INDICES, _WEIGHTS))
    columns: ClassVar[Mapping[str, str]] = {"r": "r", "topk": "topk"}
    drops = ("vblora_dropout",)
    repeats = False

    def shared(self, spec: VBLoRAConfig, sites: Sequence[WeightSite]) -> dict[str, Param]:
        shape, init = (spec.num_vectors, spec.vector_length), f"uniform:{spec.init_vector_bank_bound}"
        return {"vblora_vector_bank": Param(shape, init, use="lookup")}

    def params(self, spec: VBLoRAConfig, site: WeightSite) -> dict[str, Param]:
        rows, columns = (size // spec.vector_length for size in (site.out_features, site.in_features))
        shapes = ((spec.r, columns, spec.num_vectors), (rows, spec.r, spec.num_vectors))
        return dict(zip(_LOGITS, (Param(shape, f"normal:{spec.init_logits_std}") for shape in shapes), strict=True))

    def constants(self, spec: VBLoRAConfig, site: WeightSite) -> dict[str, Constant]:
        return {"r": spec.r, "topk": spec.topk}

    def check(self, spec: VBLoRAConfig, site: WeightSite) -> str | None:
        sides = {"inputs": site.in_features, "outputs": site.out_features}
        odd = next((f"{size} {side}" for side, size in sides.items() if size % spec.vector_length), None)
        return f"its {odd} can't be cut into vectors of vector_length={spec.vector_length}" if odd else None

    def factors(self, p: Any) -> Factors:
        """Mixtures of the likeliest vectors, put together again."""
        mixed: list[Tensor] = []
        for logits in (p.vblora_logits_A, p.vblora_logits_B):
            first, indices = logits.topk(p.topk, dim=-1)
            mixed.append((F.softmax(first, dim=-1)[..., None] * p.vblora_vector_bank[indices]).sum(-2))
        return Factors(mixed[1].mT.flatten(0, 1), mixed[0].flatten(1), 1.0)

    def filed(self, spec: VBLoRAConfig, tensors: BySite, state: Mapping[str, Any]) -> tuple[VBLoRAConfig, BySite]:
        if not spec.save_only_topk_weights:
            return spec, tensors
        return spec, {site: _mixtures(spec, own) for site, own in tensors.items()}


def _mixtures(spec: VBLoRAConfig, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What files hold of a site: the places of the likeliest vectors, in the least integers, and all shares but one."""
    sizes = {torch.uint8: 2**8, torch.int16: 2**15, torch.int32: 2**31}
    integer = next((dtype for dtype, size in sizes.items() if spec.num_vectors < size), torch.int64)
    made = {name: value for name, value in own.items() if name not in _LOGITS}
    for name in _LOGITS:
        first, indices = own[name].topk(spec.topk)
        shares = torch.softmax(first, dim=-1)[..., :-1].contiguous()
        made |= {name + _INDICES: indices.to(integer), name + _WEIGHTS: shares}
    return made
