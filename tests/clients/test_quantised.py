"""bitsandbytes' and torchao's quantised bases, with the real packages."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import peftc
from tests.support.adapters import lora, perturb

IDS = torch.tensor([[5, 6, 7, 8]])
KINDS: dict[str, Any] = {
    "bitsandbytes, 8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes, 4 bits": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "torchao, 8 bits": Int8WeightOnlyConfig(),
    "torchao, 8 bits and activations": Int8DynamicActivationInt8WeightConfig(),
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A small Llama whose linears are quantised."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
    plain = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
    kind = KINDS[request.param]
    if not isinstance(kind, BitsAndBytesConfig):
        quantize_(plain.model, kind)
        return plain
    plain.save_pretrained(tmp_path / "base")
    return LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=kind, device_map="cpu").eval()


def logits(model: Any) -> torch.Tensor:
    """Without gradients: some of these linears take other kernels then."""
    with torch.no_grad():
        return model(IDS).logits


def passes_gradients(model: Any) -> bool:
    """Whether a quantised linear passes a gradient on; torchao's that quantise activations don't."""
    x = torch.randn(2, 64, requires_grad=True)
    y = model.model.layers[0].self_attn.q_proj(x)
    return y.requires_grad and torch.autograd.grad(y.sum(), x, allow_unused=True)[0] is not None


def test_planning_leaves_no_trace(model: Any) -> None:
    before = model(IDS).logits
    plan = peftc.plan(model, lora("q_proj", "down_proj"))
    assert torch.equal(model(IDS).logits, before)
    assert torch.equal(copy.deepcopy(model)(IDS).logits, before)
    assert {edit.unmergeable is not None for edit in plan.edits} == {True}


def test_training_saving_and_loading(model: Any, tmp_path: Path) -> None:
    base = logits(model)
    compiled = peftc.compile(model, lora("q_proj", "down_proj"))
    assert torch.equal(logits(compiled), base)
    optimiser = torch.optim.SGD([p for p in compiled.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimiser.zero_grad()
        compiled.train()(IDS, labels=IDS).loss.backward()
        lost = compiled.get_model_status().without_gradient
        if passes_gradients(model):
            assert lost == []
        else:  # So the layers in front of a quantised one learn nothing, and are named.
            assert lost
            assert not [name for name in lost if "layers.1.mlp" in name]
        optimiser.step()
    y = logits(compiled.eval())
    assert not torch.equal(y, base)
    with compiled.disable_adapter():
        assert torch.equal(logits(compiled), base)
    compiled.save_pretrained(tmp_path / "a")
    assert torch.equal(logits(peftc.load(model, tmp_path / "a")), y)
    assert torch.equal(logits(model), base)


def test_merging_is_refused_for_the_reason_that_the_plan_gives(model: Any) -> None:
    compiled = perturb(peftc.compile(model, lora("q_proj")))
    y = compiled(IDS).logits
    reason = str(compiled.plan.edits[0].unmergeable)
    assert "its weight is" in reason
    with pytest.raises(peftc.MergeError) as error:
        compiled.merge_adapter()
    assert reason in str(error.value)
    assert torch.equal(compiled(IDS).logits, y)


def test_modules_that_are_not_quantised_merge(model: Any) -> None:
    compiled = perturb(peftc.compile(model, lora("lm_head")))
    y = compiled(IDS).logits
    with compiled.merged():
        torch.testing.assert_close(compiled(IDS).logits, y, rtol=1e-4, atol=1e-4)


def test_a_linear_of_torchao_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    quantize_(model, Int8WeightOnlyConfig())
    compiled, x = perturb(peftc.compile(model, lora("0", "2"))), torch.randn(2, 32)
    compiled(x).sum().backward()
    with pytest.raises(peftc.MergeError, match="its weight is quantised, as "):
        compiled.merge_adapter()
