"""Virtual tokens in whole programs: those that were captured with embeddings take them, others say what to do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftc
from tests.support.adapters import perturb
from tests.support.programs import gradients, program_inputs, program_model, tensors

METHODS: dict[str, Any] = {
    "prompt": lambda task: peftc.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    "p-tuning": lambda task: peftc.PromptEncoderConfig(task_type=task, num_virtual_tokens=4, encoder_hidden_size=8),
}
KINDS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "gemma3_text": "CAUSAL_LM", "bert": "SEQ_CLS"}
TARGETS = {"llama": "q_proj", "gpt2": "c_attn", "gemma3_text": "down_proj", "bert": "query"}


def embedded(kind: str, model: Any, rows: int = 2, length: int = 8) -> dict[str, Tensor]:
    """Inputs with embeddings for the ids, and a row that is padded."""
    inputs = program_inputs(kind, model, rows, length)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    inputs["attention_mask"][-1, -2:] = 0
    return inputs


def both(kind: str, specs: dict[str, Any], inputs: dict[str, Tensor]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = program_model(kind)
    one = perturb(peftc.compile(model, specs)).eval()
    other = peftc.compile(model, specs, capture="export", inputs=inputs).eval()
    other.load_state_dict(one.state_dict())
    return one, other


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_of_embeddings_is_the_model_with_them(kind: str, method: str) -> None:
    task, model = KINDS[kind], program_model(kind)
    specs = {"tokens": METHODS[method](task), "lora": peftc.LoraConfig(r=2, target_modules=[TARGETS[kind]])}
    one, other = both(kind, specs, embedded(kind, model))
    inputs = embedded(kind, model, 3, 11)
    for names in ("tokens", ["tokens", "lora"], "lora", []):
        one.set_adapter(names), other.set_adapter(names)
        expected, found = tensors(one(**inputs)), tensors(other(**inputs))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    for compiled in (one, other):
        compiled.set_adapter("tokens")
        torch.manual_seed(0)  # For dropouts of the model's own.
        compiled.train()(**inputs).loss.backward()
    expected = gradients(one)
    assert expected
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_files_positions_and_exports_go_with_it(tmp_path: Path) -> None:
    model = program_model("llama")
    inputs = {**embedded("llama", model), "position_ids": torch.arange(8).expand(2, -1).contiguous()}
    del inputs["labels"]
    one, other = both("llama", {"default": METHODS["prompt"]("CAUSAL_LM")}, inputs)
    torch.testing.assert_close(other(**inputs).logits, one(**inputs).logits)
    other.save_pretrained(tmp_path / "adapter")
    again = peftc.load(model, tmp_path / "adapter", capture="export", inputs=inputs)
    assert torch.equal(again(**inputs).logits, other(**inputs).logits)
    certificate = other.export(tmp_path / "out", "pt2", adapters="inside", inputs=inputs)
    assert certificate.difference <= 1e-5 * certificate.scale
    assert certificate.compared


def test_without_embeddings_the_way_out_is_said_and_works(tmp_path: Path) -> None:
    model = program_model("llama")
    ids = program_inputs("llama", model)
    with pytest.raises(peftc.CaptureError, match=r"captured with input_ids.*get_input_embeddings\(\)\(ids\)"):
        peftc.compile(model, METHODS["prompt"]("CAUSAL_LM"), capture="export", inputs=ids)
    peftc.compile(model, METHODS["prompt"]("CAUSAL_LM"), capture="export", inputs=embedded("llama", model))
    with pytest.raises(peftc.AdapterError, match="a prompt method changes the length of every row"):
        both("llama", {"a": METHODS["prompt"]("CAUSAL_LM")}, embedded("llama", model))[1](
            **embedded("llama", model), adapter_names=["a", "__base__"]
        )


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pt2", "onnx"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_prefix_goes_into_a_program_from_modules(kind: str, to: Any, tmp_path: Path) -> None:
    model = program_model(kind)
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    spec = peftc.PrefixTuningConfig(task_type=task, num_virtual_tokens=3)
    with pytest.raises(peftc.PeftcError, match=r"capture='modules'.*export\(…, to='pt2', adapters='inside'\)"):
        peftc.compile(model, spec, capture="export", inputs=program_inputs(kind, model))
    live = perturb(peftc.compile(model, spec))
    given = program_inputs(kind, model, labels=False)
    certificate = live.export(tmp_path, to, adapters="inside", inputs=given)
    assert certificate.difference <= 1e-5 * max(1, certificate.scale)
    assert certificate.compared
    assert not certificate.refused
