"""replace_lora_weights_loftq on a base of bitsandbytes in 4 bits, against peft."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import loftq_utils
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import peftc
import peftc.peft as served
from tests.support.against import near
from tests.support.interchange import quietly

FIELDS: dict[str, Any] = {"r": 32, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def bases(tmp_path: Path) -> tuple[Any, Any]:
    """A small Llama, saved, and as quantised."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "pad_token_id": 0}
    plain = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
    plain.save_pretrained(tmp_path / "base")
    kind = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    options = {"quantization_config": kind, "device_map": "cpu"}
    return plain, LlamaForCausalLM.from_pretrained(tmp_path / "base", **options).eval()


def test_it_is_that_of_peft_and_nearer_to_the_plain_model(
    bases: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, quantised = bases
    code = loftq_utils._loftq_init_new.__wrapped__.__code__  # It asks for a GPU by name.
    constants = tuple("cpu" if value == "cuda" else value for value in code.co_consts)
    monkeypatch.setattr(loftq_utils._loftq_init_new.__wrapped__, "__code__", code.replace(co_consts=constants))
    made = []
    for library in (peft, served):
        model = quietly(library.get_peft_model, copy.deepcopy(quantised), library.LoraConfig(**FIELDS)).eval()
        replace = (
            library.replace_lora_weights_loftq
            if library is peft
            else served.utils.loftq_utils.replace_lora_weights_loftq
        )
        quietly(replace, model, str(tmp_path / "base"))
        made.append(model)
    with torch.no_grad():
        y, z, ours = plain(IDS).logits, quantised(IDS).logits, made[1](IDS).logits
        near(ours, made[0](IDS).logits, 1e-4, "outputs")
    assert float((ours - y).norm()) < 0.9 * float((z - y).norm())


def test_modules_can_be_taken_back_and_wrong_calls_are_told(bases: tuple[Any, Any], tmp_path: Path) -> None:
    plain, quantised = bases
    replace = served.utils.loftq_utils.replace_lora_weights_loftq
    model = served.get_peft_model(quantised, served.LoraConfig(**FIELDS))
    asked: list[str] = []

    def keep(model: Any, name: str) -> bool:
        asked.append(name)
        return name.endswith("q_proj")

    replace(model, callback=keep)
    assert len(asked) == 2 * 7
    layers = model.get_base_model().model.layers
    assert layers[0].self_attn.q_proj.lora_B["default"].weight.any()
    assert not layers[0].mlp.down_proj.lora_B["default"].weight.any()
    with pytest.raises(peftc.CheckpointError, match="is no folder here, nor a model in the cache; pass model_path"):
        replace(model, "no/such")
    other = served.get_peft_model(plain, served.LoraConfig(**FIELDS))
    with pytest.raises(peftc.AdapterError, match="no LoRA is on a quantised linear"):
        replace(other)


def test_starts_from_the_weight_are_refused_on_a_quantised_one_and_eva_is_not(bases: tuple[Any, Any]) -> None:
    _, quantised = bases
    fields: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"]}
    loftq = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    for more in ({"init_lora_weights": "pissa"}, {"init_lora_weights": "mica"}, {"kasa_config": {}}, loftq):
        with pytest.raises(peftc.NoMatchError, match="plain"):
            peftc.compile(quantised, peftc.LoraConfig(**fields, **more))
    data = [{"input_ids": torch.randint(1, 64, (4, 8))} for _ in range(3)]
    ours = peftc.compile(quantised, peftc.LoraConfig(**fields, init_lora_weights="eva"), calibration=data)
    plain = peftc.compile(quantised, peftc.LoraConfig(**fields))
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, plain(IDS).logits)
