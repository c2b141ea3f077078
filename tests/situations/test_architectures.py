"""all-linear over what transformers' auto maps build small: the base, merged and back, on each of them."""

from typing import Any

import pytest
import torch
from transformers.models.auto import modeling_auto as auto

import peftc
from tests.support.adapters import perturb
from tests.support.small import small_model

# The maps, and how many of their models must build, run alike twice, and hold.
MAPS: dict[str, tuple[Any, int]] = {
    "causal": (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, 80),
    "masked": (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, 25),
    "images": (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, 15),
    "seq2seq": (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, 15),
}
MORE = {
    "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "image_size": 32, "patch_size": 8,
    "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "state_size": 4,
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8]])


def inputs_for(model: Any, kind: str) -> dict[str, Any]:
    if kind == "images":
        size = getattr(model.config, "image_size", 32)
        return {"pixel_values": torch.randn(1, 3, *((size, size) if isinstance(size, int) else (32, 32)))}
    return {"input_ids": IDS, **({"decoder_input_ids": IDS} if kind == "seq2seq" else {})}


def runs_alike(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether the bare model takes these inputs, and does the same with them twice."""
    try:
        return torch.equal(model(**inputs)[0], model(**inputs)[0])
    except Exception:  # It wants others.
        return False


def check(model: Any, inputs: dict[str, Any]) -> None:
    """The laws of an adapter on all linears of `model`."""
    bare = model(**inputs)[0]
    compiled = peftc.compile(model, peftc.LoraConfig(r=4, target_modules="all-linear"))
    assert torch.equal(compiled(**inputs)[0], bare)
    y = perturb(compiled)(**inputs)[0]
    compiled.merge_adapter()
    merged = compiled(**inputs)[0]
    compiled.unmerge_adapter()
    assert torch.equal(compiled(**inputs)[0], y)
    assert float((merged - y).abs().max()) <= 1e-3 * float(y.abs().max()) + 1e-6
    with compiled.disable_adapter():
        assert torch.equal(compiled(**inputs)[0], bare)
    assert torch.equal(model(**inputs)[0], bare)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAPS)
@torch.no_grad()
def test_all_linear_on_every_architecture_that_builds(kind: str) -> None:
    names, least = MAPS[kind]
    held = 0
    for model_type, name in names.items():
        model = small_model(model_type, name[0] if isinstance(name, tuple) else name, **MORE)
        if model is None:
            continue
        torch.manual_seed(0)
        inputs = inputs_for(model, kind)
        if runs_alike(model, inputs):
            check(model, inputs)
            held += 1
    assert held >= least
