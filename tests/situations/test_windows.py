"""Virtual tokens, padding and layers that see a window of positions."""

from typing import Any

import pytest
import torch
import transformers

import peftc
from tests.support.adapters import perturb
from tests.support.models import tiny

GEMMA: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
METHODS = {
    "prompt": peftc.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": peftc.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
LEFT = torch.tensor([[0, 0, 0, 8, 9, 10]])
SEEN = (LEFT != 0).long()
POSITIONS = (SEEN.cumsum(-1) - 1).clamp(min=0)


def gemma(**changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**{**GEMMA, **changes})).eval()


@pytest.mark.parametrize("method", METHODS)
def test_left_padding_that_would_cost_virtual_tokens_is_refused_and_the_advice_holds(method: str) -> None:
    compiled = perturb(peftc.compile(gemma(), METHODS[method]))
    with pytest.raises(peftc.AdapterError, match=r"padded on the left.*see 4 positions back.*Pad on the right"):
        compiled(LEFT, attention_mask=SEEN, position_ids=POSITIONS)
    alone = compiled(LEFT[:, 3:]).logits
    right = torch.cat([LEFT[:, 3:], LEFT[:, :3]], 1)
    padded = compiled(right, attention_mask=(right != 0).long()).logits[:, : alone.shape[1]]
    torch.testing.assert_close(padded, alone)
    with compiled.disable_adapter():
        compiled(LEFT, attention_mask=SEEN, position_ids=POSITIONS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changes", [{"sliding_window": 16}, {"layer_types": ["full_attention"] * 2}])
def test_left_padding_where_it_costs_nothing(method: str, changes: dict[str, Any]) -> None:
    compiled = perturb(peftc.compile(gemma(**changes), METHODS[method]))
    padded = compiled(LEFT, attention_mask=SEEN, position_ids=POSITIONS).logits[:, -3:]
    torch.testing.assert_close(padded, compiled(LEFT[:, 3:]).logits[:, -3:])


def test_models_without_windows_are_asked_nothing() -> None:
    torch.manual_seed(0)
    compiled = perturb(peftc.compile(tiny("llama"), METHODS["prompt"]))
    padded = compiled(LEFT, attention_mask=SEEN, position_ids=POSITIONS).logits[:, -3:]
    torch.testing.assert_close(padded, compiled(LEFT[:, 3:]).logits[:, -3:])
