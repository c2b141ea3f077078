"""Prompt methods give what peft gives, on the same weights: logits, losses, gradients, generated tokens."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import peftc
from tests.support.compare import assert_close
from tests.support.models import CAUSAL, ENCODERS, SEQ2SEQ, tiny
from tests.support.prompts import IN_CACHE, METHODS, N, generated, ids, in_peft, padded

TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def _both(model: Any, method: str, task: str) -> tuple[peftc.CompiledModel, Any]:
    compiled = peftc.compile(model, METHODS[method](task)).eval()
    return compiled, in_peft(compiled, model)


def assert_same(
    compiled: peftc.CompiledModel, theirs: Any, inputs: dict[str, Any], fields: tuple[str, ...], shown: int = 0
) -> None:
    """Equal outputs (from position `shown` of peft's), and equal gradients of the encoder and the heads."""
    ours, other = compiled(**inputs), theirs(**inputs)
    for field in fields:
        value = other[field][:, shown:] if shown and other[field].dim() > 1 else other[field]
        assert ours[field].shape == value.shape, field
        assert_close(ours[field], value, field)
    cotangents = [torch.randn(ours[f].shape, generator=torch.Generator().manual_seed(3)) for f in fields]
    sum((ours[f] * c).sum() for f, c in zip(fields, cotangents, strict=True)).backward()
    sum((_cut(other[f], ours[f]) * c).sum() for f, c in zip(fields, cotangents, strict=True)).backward()
    expected = dict(theirs.prompt_encoder["default"].named_parameters())
    found = dict(compiled.prompt_encoder["default"].named_parameters())
    assert set(found) == set(expected)
    largest = max(float(p.grad.abs().max()) for p in expected.values())
    assert largest > 0
    for name, parameter in found.items():
        assert float((parameter.grad - expected[name].grad).abs().max()) <= 1e-6 * largest, name


def assert_generates_alike(compiled: peftc.CompiledModel, theirs: Any, tokens: Tensor, mask: Tensor) -> None:
    """Equal tokens, greedily, by beams and sampled."""
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "temperature": 3.0}):
        made: list[Tensor] = []
        for model in (compiled, theirs):
            torch.manual_seed(5)
            made.append(generated(model, tokens, mask, **options))
        assert torch.equal(*made), options
    assert len(set(made[0].flatten().tolist())) > 3, "the samples tell models apart"
    # peft goes wrong with use_cache=False and a prefix: it goes on from the cache, or cuts the tokens to the last one.
    assert torch.equal(generated(compiled, tokens, mask, use_cache=False), generated(compiled, tokens, mask))


def _cut(value: Tensor, like: Tensor) -> Tensor:
    return value[:, value.shape[1] - like.shape[1] :] if value.dim() > 1 else value


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", CAUSAL)
def test_causal_language_models(model_type: str, method: str) -> None:
    model, tokens = tiny(model_type), ids()
    for mask in (None, padded("right"), padded("left")):
        compiled, theirs = _both(model, method, "CAUSAL_LM")
        inputs = {"input_ids": tokens, "labels": tokens, **({} if mask is None else {"attention_mask": mask})}
        assert_same(compiled, theirs, inputs, ("logits", "loss"))
        embeds = {"inputs_embeds": model.get_input_embeddings()(tokens).detach(), "labels": tokens}
        assert_same(*_both(model, method, "CAUSAL_LM"), embeds, ("logits", "loss"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", CAUSAL)
def test_generated_tokens(model_type: str, method: str) -> None:
    compiled, theirs = _both(tiny(model_type), method, "CAUSAL_LM")
    tokens = ids()
    assert_generates_alike(compiled, theirs, tokens, torch.ones_like(tokens))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", SEQ2SEQ)
def test_sequence_to_sequence(model_type: str, method: str) -> None:
    model, tokens = tiny(model_type), ids()
    compiled, theirs = _both(model, method, "SEQ_2_SEQ_LM")
    inputs = {"input_ids": tokens, "attention_mask": padded("right")}
    assert_same(compiled, theirs, {**inputs, "labels": ids(2, 4, 9)}, ("logits", "loss"))
    decoder = {"decoder_input_ids": ids(2, 7, 9), "decoder_attention_mask": padded("right")}
    assert_same(*_both(model, method, "SEQ_2_SEQ_LM"), {**inputs, **decoder}, ("logits",))
    assert_generates_alike(compiled, theirs, tokens, padded("right"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoders(model_type: str, task: str, method: str) -> None:
    if model_type == "deberta-v2" and method in IN_CACHE:
        with pytest.raises(peftc.NoMatchError, match="no cache"):
            _both(tiny(model_type, TASKS[task]), method, task)
        return
    model = tiny(model_type, TASKS[task])
    compiled, theirs = _both(model, method, task)
    inputs: dict[str, Any] = {"input_ids": ids(), "attention_mask": padded("right")}
    if model_type == "bert" and task in ("SEQ_CLS", "TOKEN_CLS"):  # peft drops token types for the other two
        inputs["token_type_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    if task == "SEQ_CLS":
        assert_same(compiled, theirs, {**inputs, "labels": torch.tensor([0, 1])}, ("logits", "loss"))
        return
    fields = {"TOKEN_CLS": ("logits",), "QUESTION_ANS": ("start_logits", "end_logits")}.get(
        task, ("last_hidden_state",)
    )
    # Heads that answer for every token answer for the user's: peft's answers for virtual tokens come first.
    shown = N if task != "FEATURE_EXTRACTION" and method not in IN_CACHE else 0
    assert_same(compiled, theirs, inputs, fields, shown)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_heads_on_decoders(task: str, method: str) -> None:
    model = tiny("llama", TASKS[task], pad_token_id=0)
    compiled, theirs = _both(model, method, task)
    shown = N if task == "TOKEN_CLS" and method not in IN_CACHE else 0
    assert_same(compiled, theirs, {"input_ids": ids(), "attention_mask": padded("left")}, ("logits",), shown)


@pytest.mark.parametrize("method", ["SAMPLE_VOCAB", "RANDOM"])
def test_a_seed_starts_where_peft_starts(method: Any) -> None:
    model = tiny("llama")
    spec = peftc.PromptTuningConfig(num_virtual_tokens=N, task_type="CAUSAL_LM", prompt_tuning_init=method)
    torch.manual_seed(11)
    ours = peftc.compile(model, spec).get_prompt_embedding_to_save()
    torch.manual_seed(11)
    theirs = _fresh_in_peft(model, spec)
    assert torch.equal(ours, theirs)
    if method == "SAMPLE_VOCAB":
        rows = {tuple(row) for row in model.get_input_embeddings().weight.tolist()}
        assert all(tuple(row) in rows for row in ours.tolist())


def _fresh_in_peft(model: Any, spec: peftc.PromptSpec) -> Tensor:
    fields = spec.to_dict()
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[fields.pop("peft_type")](**fields)
    return peft.get_peft_model(copy.deepcopy(model), config).get_prompt_embedding_to_save("default")


@pytest.mark.parametrize("task", [task for task in TASKS if task != "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("method", ["lora", "ia3", "prompt"])
def test_tasks_train_and_save_the_heads_that_peft_does(method: str, model_type: str, task: Any, tmp_path: Path) -> None:
    model = tiny(model_type, TASKS[task])
    names = ["q_proj", "v_proj"] if model_type == "llama" else ["query", "value"]
    specs: dict[str, Any] = {
        "lora": peftc.LoraConfig(task_type=task, target_modules=names),
        "ia3": peftc.IA3Config(task_type=task, target_modules=names, feedforward_modules=[]),
        "prompt": METHODS["prompt"](task),
    }
    compiled = peftc.compile(model, specs[method])
    compiled.save_pretrained(tmp_path)
    fields = compiled.peft_config["default"].to_dict()
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[fields.pop("peft_type")](**fields)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    expected = peft.get_peft_model_state_dict(theirs)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in expected.items()}
    assert any(name in key for key in found for name in ("classifier", "score", "qa_outputs"))
    assert compiled.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
