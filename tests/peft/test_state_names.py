"""State dicts of whole models of peft, as torch.save keeps them, in models of peftc.peft."""

from typing import Any

import peft
import pytest
import torch

import peftc.peft
from tests.support.scripts import base

IDS = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]])
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("LoraConfig", {"use_dora": True}),
    "saved": ("LoraConfig", {"modules_to_save": ["lm_head"], "bias": "all"}),
    "embedding": ("LoraConfig", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tokens": ("LoraConfig", {"trainable_token_indices": [3, 4]}),
    "tokens alone": ("TrainableTokensConfig", {"token_indices": [3, 4], "target_modules": ["embed_tokens"]}),
    "adalora": ("AdaLoraConfig", {"total_step": 9}),
    "vera": ("VeraConfig", {"r": 2}),
    "vblora": ("VBLoRAConfig", {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 8}),
    "shira": ("ShiraConfig", {"r": 2, "random_seed": 1}),
    "prompt": ("PromptTuningConfig", PROMPT),
    "prefix": ("PrefixTuningConfig", PROMPT),
}


def model(lib: Any, name: str) -> Any:
    config, fields = CONFIGS[name]
    targets = {} if fields is PROMPT else {"target_modules": ["q_proj"]}
    torch.manual_seed(0)
    return lib.get_peft_model(base(), getattr(lib, config)(**{**targets, **fields})).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_dict_of_peft_is_loaded(name: str) -> None:
    theirs, ours = model(peft, name), model(peftc.peft, name)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        before, expected = ours(IDS).logits, theirs(IDS).logits
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_state_dict_lacks_is_told(name: str) -> None:
    theirs, ours = model(peft, name), model(peftc.peft, name)
    state = theirs.state_dict()
    first = next(key for key in state if "lora_A" in key or "embed_tokens" in key)
    state["base_model.unknown"] = state.pop(first)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*Unexpected key.*unknown"):
        ours.load_state_dict(state)


@pytest.mark.parametrize("name", CONFIGS)
def test_its_own_state_dict_is_loaded(name: str) -> None:
    one, other = model(peftc.peft, name), model(peftc.peft, name)
    with torch.no_grad():
        for parameter in one.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(IDS).logits, one(IDS).logits)
