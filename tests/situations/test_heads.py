"""Heads of tasks: trained and saved whatever they are called, and what nobody saves is said at compile."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto as auto

import peftc
from tests.support.adapters import perturb
from tests.support.models import tiny
from tests.support.small import small_model

BART = {"vocab_size": 64, "d_model": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MAPS = {
    "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


@pytest.mark.slow
@pytest.mark.parametrize("task", MAPS)
def test_every_module_beside_the_body_is_saved_over_all_models_of_a_task(task: str) -> None:
    built = 0
    for kind, name in MAPS[task].items():
        model = small_model(kind, name[0] if isinstance(name, tuple) else name, "meta")
        if model is None or model.base_model is model:
            continue
        built += 1
        beside = [
            n for n, c in model.named_children() if c is not model.base_model and any(True for _ in c.parameters())
        ]
        plan = peftc.plan(model, peftc.LoraConfig(target_modules="all-linear", task_type=task))
        saved = {edit.site for edit in plan.edits if edit.whole}
        assert set(beside) <= saved, name
    assert built > {"SEQ_CLS": 60, "TOKEN_CLS": 50, "QUESTION_ANS": 40}[task]


def bart() -> Any:
    torch.manual_seed(0)
    config = transformers.BartConfig(**BART, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                                     decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)  # fmt: skip
    return transformers.BartForSequenceClassification(config).eval()


IDS = torch.tensor([[5, 6, 7, 2]])


def test_a_head_of_another_name_is_saved_and_loaded_by_both(tmp_path: Path) -> None:
    model = bart()
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")))
    assert compiled.peft_config["default"].modules_to_save == ("classification_head",)
    y = compiled(IDS).logits
    compiled.save_pretrained(tmp_path)
    assert torch.equal(peftc.load(bart(), tmp_path)(IDS).logits, y)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(bart(), tmp_path).eval()(IDS).logits, y)


def test_a_file_of_peft_without_the_head_loads_as_it_is(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    theirs = peft.get_peft_model(bart(), config).eval()
    theirs.save_pretrained(tmp_path)
    loaded = peftc.load(bart(), tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, theirs(IDS).logits)
    loaded.load_adapter(tmp_path, "again")


def test_an_adapter_added_later_gets_a_head_too() -> None:
    compiled = peftc.compile(bart(), peftc.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS"))
    compiled.add_adapter("b", peftc.LoraConfig(target_modules=["k_proj"], task_type="SEQ_CLS"))
    assert {edit.adapter for edit in compiled.plan.edits if edit.site == "classification_head"} == {"default", "b"}


class TestNewWeights:
    def loaded(self, folder: Path) -> Any:
        tiny("bert").base_model.save_pretrained(folder)
        return transformers.BertForSequenceClassification.from_pretrained(folder)

    def test_what_is_new_and_saved_by_nobody_is_said_at_compile_and_the_advice_holds(self, tmp_path: Path) -> None:
        model = self.loaded(tmp_path)
        spec = peftc.LoraConfig(target_modules=["query"])
        assert any("classifier" in text and "random" in text for text in peftc.plan(model, spec).cautions)
        with pytest.warns(UserWarning, match=r"random weights.*modules_to_save=\['bert.pooler.dense', 'classifier'\]"):
            peftc.compile(model, spec)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            peftc.compile(model, spec.model_copy(update={"modules_to_save": ("bert.pooler.dense", "classifier")}))
            compiled = peftc.compile(model, peftc.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
        assert {edit.site for edit in compiled.plan.edits if edit.whole} == {"bert.pooler.dense", "classifier"}

    def test_a_model_that_nobody_loaded_is_not_warned_of(self) -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            peftc.compile(tiny("bert"), peftc.LoraConfig(target_modules=["query"]))
        assert said == []
