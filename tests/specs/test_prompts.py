"""Specs of the prompt methods: PEFT's fields, read as PEFT writes them, and wrong ones refused by name."""

from typing import Any

import peft
import pytest
import torch

import peftc
from tests.support.models import tiny
from tests.support.prompts import METHODS, N

BOTH = (
    (peftc.PrefixTuningConfig, peft.PrefixTuningConfig),
    (peftc.PromptTuningConfig, peft.PromptTuningConfig),
    (peftc.PromptEncoderConfig, peft.PromptEncoderConfig),
)


@pytest.mark.parametrize(("ours", "theirs"), BOTH)
def test_the_fields_and_defaults_are_those_of_peft(ours: Any, theirs: Any) -> None:
    mine = ours(num_virtual_tokens=7, task_type="CAUSAL_LM")
    other = theirs(num_virtual_tokens=7, task_type="CAUSAL_LM").to_dict()
    assert peftc.load_spec(other).to_dict() == other
    assert mine.to_dict() == {name: value for name, value in other.items() if name != "peft_version"}


def test_enums_of_peft_are_taken() -> None:
    init: Any = peft.tuners.prompt_tuning.PromptTuningInit.SAMPLE_VOCAB
    task: Any = peft.TaskType.CAUSAL_LM
    spec = peftc.PromptTuningConfig(num_virtual_tokens=3, task_type=task, prompt_tuning_init=init)
    assert (spec.task_type, spec.prompt_tuning_init) == ("CAUSAL_LM", "SAMPLE_VOCAB")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "num_virtual_tokens is missing"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens: got 0"),
        ({"num_virtual_tokens": "8"}, "did you mean 8"),
        ({"num_virtual_tokens": 8, "prompt_tuning_init": "TXT"}, "nearest: 'TEXT'"),
        ({"num_virtual_tokens": 8, "prompt_tuning_init": "TEXT"}, "tokenizer_name_or_path is missing"),
        (
            {"num_virtual_tokens": 8, "prompt_tuning_init": "text", "tokenizer_name_or_path": "gpt2"},
            "prompt_tuning_init_text is missing",
        ),
        ({"num_virtual_tokens": 8, "tokenizer_kwargs": {"use_fast": True}}, "tokenizer_kwargs is for"),
        ({"num_virtual_tokens": 8, "target_modules": ["q_proj"]}, "not modules of it"),
        ({"num_virtual_tokens": 8, "num_transformer_submodules": 3}, "num_transformer_submodules: got 3"),
        ({"num_virtual_tokens": 8, "num_virtual_token": 8}, "Nearest: 'num_virtual_tokens'"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(peftc.SpecError, match=message):
        peftc.PromptTuningConfig(**fields)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.arange(3), "cpt_token_ids.0: got"),
        (torch.ones(2, 3, dtype=torch.long), "cpt_token_ids.0: got"),
        (3, "cpt_token_ids: got 3; input should be a valid tuple"),
        ("abc", "cpt_token_ids: got 'abc'; input should be a valid tuple"),
    ],
)
def test_ids_that_are_no_list_are_refused(ids: Any, message: str) -> None:
    with pytest.raises(peftc.SpecError, match=message):
        peftc.CPTConfig(cpt_token_ids=ids)


def test_a_width_without_effect_is_told() -> None:
    with pytest.warns(UserWarning, match="encoder_num_layers=3 has no effect"):
        spec = peftc.PromptEncoderConfig(num_virtual_tokens=8, encoder_num_layers=3)
    assert spec.encoder_num_layers == 3


def test_facts_are_read_off_the_model() -> None:
    plan = peftc.plan(tiny("llama"), METHODS["projected prefix"]("CAUSAL_LM"))
    spec: Any = plan.adapters["default"]
    assert (spec.token_dim, spec.num_attention_heads, spec.num_layers) == (16, 2, 3)  # of the keys: 2 heads of 8
    assert spec.num_transformer_submodules == 1
    spec = peftc.plan(tiny("t5"), METHODS["p-tuning"]("SEQ_2_SEQ_LM")).adapters["default"]
    assert (spec.token_dim, spec.num_attention_heads, spec.num_layers, spec.num_transformer_submodules) == (32, 4, 2, 2)
    # An embedding narrower than the model; PEFT takes the model's width and fails.
    spec = peftc.plan(tiny("opt", word_embed_proj_dim=16), METHODS["prompt"]("CAUSAL_LM")).adapters["default"]
    assert spec.token_dim == 16


_REFUSED: dict[str, tuple[Any, Any, str]] = {
    "no task": (lambda: tiny("llama"), {"task_type": None}, "task_type: 'None' leaves open"),
    "another width": (lambda: tiny("llama"), {"token_dim": 64}, "token_dim=64 contradicts the model"),
    "two halves of one": (lambda: tiny("llama"), {"num_transformer_submodules": 2}, "for encoder-decoder models"),
    "seq2seq of a decoder": (lambda: tiny("llama"), {"task_type": "SEQ_2_SEQ_LM"}, "LlamaForCausalLM needs CAUSAL_LM"),
    "causal of both": (lambda: tiny("t5"), {"task_type": "CAUSAL_LM"}, "needs SEQ_2_SEQ_LM"),
    "no tokens": (lambda: tiny("vit"), {"task_type": "FEATURE_EXTRACTION"}, "takes no inputs_embeds"),
    "a task without its head": (lambda: tiny("llama"), {"task_type": "SEQ_CLS"}, "predicts tokens: give CAUSAL_LM"),
    "another cache": (lambda: tiny("mamba"), {}, "keeps its past in cache_params"),
    "plain torch": (lambda: torch.nn.Linear(2, 2), {}, "needs a transformers model"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_what_can_not_be_is_refused_before_anything_changed(case: str) -> None:
    make, fields, message = _REFUSED[case]
    model = make()
    spec = METHODS["prompt"]("CAUSAL_LM").model_copy(update=fields)
    plan = peftc.plan(model, spec)
    assert [message in miss.reason or message in str(miss) for miss in plan.misses if miss.error] == [True]
    for on_unmatched in ("error", "warn"):
        with pytest.raises(peftc.NoMatchError, match=message):
            peftc.compile(model, spec, inplace=True, on_unmatched=on_unmatched)
    assert "prompt_encoder" not in model._modules


@pytest.mark.parametrize("model_type", ["deberta-v2", "vit"])
def test_no_prefix_without_a_cache(model_type: str) -> None:
    with pytest.raises(peftc.NoMatchError, match="takes no past_key_values"):
        peftc.compile(tiny(model_type), METHODS["prefix"]("FEATURE_EXTRACTION"))


def test_no_prefix_of_another_shape() -> None:
    spec = peftc.PrefixTuningConfig(num_virtual_tokens=N, task_type="CAUSAL_LM", token_dim=32, num_attention_heads=4)
    with pytest.raises(peftc.NoMatchError, match="2 heads × 8 = 16 wide; leave both out"):
        peftc.compile(tiny("llama"), spec)
    with pytest.raises(peftc.NoMatchError, match="num_layers=1 contradicts the model, which has 3"):
        peftc.compile(
            tiny("llama"), peftc.PrefixTuningConfig(num_virtual_tokens=N, task_type="CAUSAL_LM", num_layers=1)
        )


def test_no_prefix_where_layers_differ() -> None:
    for model_type in ("deepseek_v3", "gemma4_text"):
        with pytest.raises(peftc.NoMatchError, match="no prefix fits into its cache"):
            peftc.compile(tiny(model_type), METHODS["prefix"]("CAUSAL_LM"))
    compiled = peftc.compile(tiny("deepseek_v3"), METHODS["prompt"]("CAUSAL_LM")).eval()
    assert compiled(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape[1] == 3 + N
    with pytest.raises(peftc.NoMatchError, match="by token id, and virtual tokens have none"):
        peftc.compile(tiny("gemma4_text"), METHODS["prompt"]("CAUSAL_LM"))
    halves = peftc.PrefixTuningConfig(num_virtual_tokens=N, task_type="CAUSAL_LM", num_transformer_submodules=2)
    with pytest.raises(peftc.NoMatchError, match="for encoder-decoder models"):
        peftc.compile(tiny("llama"), halves)


def test_prompts_need_the_model_s_own_call() -> None:
    plan = peftc.plan(tiny("llama"), METHODS["prompt"]("CAUSAL_LM"))
    assert [edit.slots for edit in plan.edits] == [("embeds",)]
    with pytest.raises(peftc.PeftcError):
        peftc.compile(tiny("llama"), METHODS["prompt"]("CAUSAL_LM"), capture="symbolic")
