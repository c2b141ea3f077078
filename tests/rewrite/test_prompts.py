"""Prompt methods in a model's life: caches, masks, checkpointing, other adapters, and the way back."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache, Trainer, TrainingArguments

import peftc
from tests.support.models import CAUSAL, SEQ2SEQ, inputs_for, tiny
from tests.support.prompts import IN_CACHE, METHODS, N, generated, ids, padded
from tests.support.snapshots import assert_unchanged, snapshot

LORA = peftc.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
IA3 = peftc.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False)


def compiled_llama(method: str = "prompt", **changes: Any) -> tuple[Any, peftc.CompiledModel]:
    model = tiny("llama", **changes)
    return model, peftc.compile(model, METHODS[method]("CAUSAL_LM")).eval()


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


# The way there and back


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inplace", [False, True])
def test_unload_gives_the_model_back(method: str, inplace: bool) -> None:
    model = tiny("llama")
    before, expected = snapshot(model), logits(model, input_ids=ids())
    compiled = peftc.compile(model, METHODS[method]("CAUSAL_LM"), inplace=inplace)
    compiled(input_ids=ids(), labels=ids()).loss.backward()
    assert not torch.equal(logits(compiled, input_ids=ids())[:, -7:], expected)
    assert isinstance(compiled.base, type(model))
    assert str(type(compiled.base)) == str(type(tiny("llama")))
    assert type(compiled.base).__name__ == "LlamaForCausalLM"
    if not inplace:
        assert_unchanged(model, before)
    base = compiled.unload()
    assert (base is model) == inplace
    assert_unchanged(base, before, identity=inplace)
    assert set(base.__dict__) == set(tiny("llama").__dict__)
    assert torch.equal(logits(base, input_ids=ids()), expected)


def test_only_the_encoder_and_the_head_learn() -> None:
    model = tiny("bert", "AutoModelForSequenceClassification")
    compiled = peftc.compile(model, METHODS["prompt"]("SEQ_CLS"))
    trained = [name for name, parameter in compiled.named_parameters() if parameter.requires_grad]
    assert trained == [
        "base.classifier.modules_to_save.default.weight",
        "base.classifier.modules_to_save.default.bias",
        "base.prompt_encoder.default.embedding.weight",
    ]
    head = model.classifier.weight.clone()
    optimiser = torch.optim.SGD([p for p in compiled.parameters() if p.requires_grad], lr=0.1)
    compiled(input_ids=ids(), labels=torch.tensor([0, 1])).loss.backward()
    optimiser.step()
    assert torch.equal(model.classifier.weight, head)
    assert not torch.equal(compiled.base.classifier.modules_to_save["default"].weight, head)


def test_encoders_have_the_documented_shapes() -> None:
    _, compiled = compiled_llama("projected prefix")
    encoder = compiled.prompt_encoder["default"]
    assert encoder.prefix_projection
    assert [tuple(p.shape) for p in encoder.parameters()] == [(N, 16), (24, 16), (24,), (96, 24), (96,)]
    assert encoder(torch.arange(N).expand(3, -1)).shape == (3, N, 3 * 2 * 16)
    _, compiled = compiled_llama("p-tuning lstm")
    encoder = compiled.prompt_encoder["default"]
    assert (encoder.input_size, encoder.hidden_size, encoder.output_size, encoder.total_virtual_tokens) == (
        32,
        12,
        32,
        N,
    )
    assert encoder.lstm_head.bidirectional
    assert encoder(torch.arange(N).expand(3, -1)).shape == (3, N, 32)
    assert compiled.get_prompt(4).shape == (4, N, 32)
    torch.testing.assert_close(compiled.get_prompt(1)[0].detach(), compiled.get_prompt_embedding_to_save())


def test_copies_and_pickles_generate_alike() -> None:
    for method in ("projected prefix", "p-tuning"):
        _, compiled = compiled_llama(method)
        expected = generated(compiled, ids())
        for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
            assert torch.equal(generated(other, ids()), expected)
            with torch.no_grad():
                other.prompt_encoder["default"].embedding.weight.add_(1)
        assert torch.equal(generated(compiled, ids()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["projected prefix", "prompt"])
def test_torch_compile_takes_the_whole_graph(method: str) -> None:
    _, compiled = compiled_llama(method)
    inputs = {"input_ids": ids(), "attention_mask": padded("right"), "labels": ids()}
    for mode in (compiled.train(), compiled.eval()):
        whole = torch.compile(mode, fullgraph=True, backend="aot_eager")
        loss = whole(**inputs).loss
        torch.testing.assert_close(loss, mode(**inputs).loss)
        loss.backward()
        torch._dynamo.reset()
    assert compiled.prompt_encoder["default"].embedding.weight.grad is not None


# What the caller passes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", CAUSAL)
def test_a_left_padded_row_generates_what_it_does_alone(model_type: str, method: str) -> None:
    compiled = peftc.compile(tiny(model_type), METHODS[method]("CAUSAL_LM")).eval()
    tokens = ids()
    alone = generated(compiled, tokens[1:, 2:], num_beams=2)
    assert torch.equal(generated(compiled, tokens, padded("left"), num_beams=2)[1:], alone)


@pytest.mark.parametrize("method", METHODS)
def test_masks_with_and_without_the_virtual_tokens_are_the_same(method: str) -> None:
    _, compiled = compiled_llama(method)
    tokens = ids()
    expected = logits(compiled, input_ids=tokens)
    for mask in (torch.ones(2, 7), torch.ones(2, 7, dtype=torch.bool), torch.ones(2, 7 + N, dtype=torch.long)):
        torch.testing.assert_close(logits(compiled, input_ids=tokens, attention_mask=mask), expected)
    positions = torch.arange(7).expand(2, -1)
    torch.testing.assert_close(logits(compiled, input_ids=tokens, position_ids=positions), expected)
    with pytest.raises(peftc.AdapterError, match="covers 9 tokens; this call sees 7, or 12"):
        compiled(input_ids=tokens, attention_mask=torch.ones(2, 9))
    with pytest.raises(peftc.AdapterError, match=r"of shape \(7,\); pass a 2-D one"):
        compiled(input_ids=tokens, attention_mask=torch.ones(7))
    with pytest.raises(peftc.AdapterError, match="tuple of tensors; pass a transformers Cache"):
        compiled(input_ids=tokens, past_key_values=((torch.zeros(2, 2, 3, 8),) * 2,) * 3)


def test_four_dimensional_masks() -> None:
    tokens = ids()
    causal = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    additive = torch.zeros(2, 1, 7, 7).masked_fill(~causal, torch.finfo(torch.float32).min)
    _, compiled = compiled_llama("prefix")
    for mask in (causal, additive):
        torch.testing.assert_close(
            logits(compiled, input_ids=tokens, attention_mask=mask), logits(compiled, input_ids=tokens)
        )
    _, compiled = compiled_llama("prompt")
    with pytest.raises(peftc.AdapterError, match="no rows for virtual tokens"):
        compiled(input_ids=tokens, attention_mask=causal)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_embeds_and_logits_to_keep(method: str) -> None:
    model, compiled = compiled_llama(method)
    tokens = ids()
    embeds = model.get_input_embeddings()(tokens).detach()
    expected = logits(compiled, input_ids=tokens)
    assert torch.equal(logits(compiled, inputs_embeds=embeds), expected)
    made = compiled.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(made, generated(compiled, tokens))
    # Fewer rows at a time can be another routine of the BLAS, which rounds otherwise on some processors.
    last = expected.shape[1] - 1
    for keep, places in ((torch.tensor([1, 6]), [last - 5, last]), (torch.tensor([-1]), [last]), (2, [last - 1, last])):
        kept = logits(compiled, input_ids=tokens, logits_to_keep=keep)
        torch.testing.assert_close(kept, expected[:, places], rtol=1e-6, atol=1e-6)
    some = compiled(input_ids=tokens, labels=tokens[:, -3:], logits_to_keep=3).loss
    torch.testing.assert_close(
        some, nn.functional.cross_entropy(expected[:, -3:-1].flatten(0, 1), tokens[:, -2:].flatten())
    )
    both = {"input_ids": tokens, "inputs_embeds": embeds}
    with pytest.raises((peftc.AdapterError, ValueError), match="input_ids or inputs_embeds"):
        compiled(**both)
    with pytest.raises(peftc.AdapterError, match="the call has neither"):
        compiled()
    as_tuple = compiled(input_ids=tokens, return_dict=False)
    torch.testing.assert_close(as_tuple[0].detach(), expected)


@pytest.mark.parametrize("method", METHODS)
def test_going_on_from_a_cache(method: str) -> None:
    model, compiled = compiled_llama(method)
    tokens = ids()
    whole = logits(compiled, input_ids=tokens)[:, -3:]
    for mask in (None, torch.ones(2, 7), torch.ones(2, 7 + N)):
        cache = compiled(input_ids=tokens[:, :4], use_cache=True).past_key_values
        part = logits(compiled, input_ids=tokens[:, 4:], past_key_values=cache, attention_mask=mask)
        torch.testing.assert_close(part, whole)
    for given in (tokens, tokens[:, 4:]):
        with torch.no_grad():
            cache = compiled(input_ids=tokens[:, :4], past_key_values=DynamicCache()).past_key_values
        made = compiled.generate(
            input_ids=given,
            attention_mask=torch.ones_like(tokens),
            past_key_values=copy.deepcopy(cache),
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert torch.equal(made[:, given.shape[1] :], generated(compiled, tokens))
    foreign = model(input_ids=tokens[:, :4], use_cache=True).past_key_values
    with pytest.raises(peftc.AdapterError, match=r"of no adapter, active are those of 'default' \(5\)"):
        compiled(input_ids=tokens[:, 4:], past_key_values=foreign)
    with torch.no_grad():
        cache = compiled(input_ids=tokens[:, :4], use_cache=True).past_key_values
    cropped = copy.deepcopy(cache)
    cropped.crop(-6)
    with pytest.raises(peftc.AdapterError, match="do not crop"):
        compiled(input_ids=tokens[:, 4:], past_key_values=cropped)
    with pytest.raises(peftc.AdapterError, match="prefill_chunk_size"):
        generated(compiled, tokens, past_key_values=copy.deepcopy(cache), prefill_chunk_size=2)
    assert torch.equal(generated(compiled, tokens, prefill_chunk_size=2), generated(compiled, tokens))
    compiled.add_adapter("other", METHODS[method]("CAUSAL_LM"))
    compiled.set_adapter("other")
    with pytest.raises(peftc.AdapterError, match="of 'default' \\(5\\), active are those of 'other'"):
        compiled(input_ids=tokens[:, 4:], past_key_values=cache)
    compiled.set_adapter("default")
    with pytest.raises(peftc.AdapterError, match="cache of fixed size has no room"):
        generated(compiled, tokens, cache_implementation="static")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5", "whisper"])
def test_a_prefix_gives_no_cache_to_who_wants_none(model_type: str) -> None:
    model = tiny(model_type)
    compiled = peftc.compile(
        model, METHODS["prefix"]("SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM")
    )
    inputs = {**inputs_for(model_type), "use_cache": False, "output_hidden_states": True}
    for module in (compiled.train(), compiled.eval()):
        ours, bare = module(**inputs), model(**inputs)
        assert list(ours) == list(bare)
        assert len(module(**inputs, return_dict=False)) == len(model(**inputs, return_dict=False))
    assert compiled(**{**inputs, "use_cache": True}).past_key_values is not None
    if model_type != "whisper":
        mask = torch.ones_like(inputs["input_ids"])
        for options in ({}, {"num_beams": 2}):
            slow = generated(compiled, inputs["input_ids"], mask, use_cache=False, **options)
            assert torch.equal(slow, generated(compiled, inputs["input_ids"], mask, **options))


def test_generation_aids() -> None:
    model, compiled = compiled_llama("projected prefix")
    one = ids(1)
    expected = generated(compiled, one, max_new_tokens=12)
    assert torch.equal(generated(compiled, one, max_new_tokens=12, prompt_lookup_num_tokens=2), expected)
    assert torch.equal(generated(compiled, one, max_new_tokens=12, assistant_model=model), expected)


def test_heads_see_the_callers_tokens_only() -> None:
    """Per-token answers are for the caller's tokens; a decoder's classification looks at the last one that is real."""
    tokens, labels = ids(), torch.randint(0, 2, (2, 7))
    model = tiny("bert", "AutoModelForTokenClassification")
    compiled = peftc.compile(model, METHODS["prompt"]("TOKEN_CLS")).eval()
    out = compiled(input_ids=tokens, labels=labels, output_hidden_states=True)
    assert out.logits.shape == (2, 7, 2)
    assert len(out.hidden_states) == 3
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))
    model = tiny("bert", "AutoModelForQuestionAnswering")
    compiled = peftc.compile(model, METHODS["prompt"]("QUESTION_ANS")).eval()
    start, end = torch.tensor([0, 6]), torch.tensor([3, 6])
    out = compiled(input_ids=tokens, start_positions=start, end_positions=end)
    assert out.start_logits.shape == (2, 7)
    expected = [nn.functional.cross_entropy(x, y) for x, y in ((out.start_logits, start), (out.end_logits, end))]
    torch.testing.assert_close(out.loss, sum(expected) / 2)
    model = tiny("llama", "AutoModelForSequenceClassification", pad_token_id=0)
    compiled = peftc.compile(model, METHODS["prompt"]("SEQ_CLS")).eval()
    mask = padded("right")
    alone = logits(compiled, input_ids=tokens[1:, :5])
    torch.testing.assert_close(logits(compiled, input_ids=tokens * mask, attention_mask=mask)[1:], alone)


# Training


def _without_dropout(model: Any) -> Any:
    for module in model.modules():
        for name in ("dropout", "attention_dropout", "activation_dropout", "p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", [*CAUSAL, *SEQ2SEQ])
def test_gradient_checkpointing_changes_nothing(model_type: str, method: str) -> None:
    task = "SEQ_2_SEQ_LM" if model_type in SEQ2SEQ else "CAUSAL_LM"
    compiled = peftc.compile(_without_dropout(tiny(model_type)), METHODS[method](task)).train()
    inputs = {"input_ids": ids(), "attention_mask": padded("right"), "labels": ids()}

    def gradients() -> dict[str, Tensor]:
        compiled.zero_grad()
        compiled(**inputs).loss.backward()
        return {name: p.grad.clone() for name, p in compiled.named_parameters() if p.grad is not None}

    expected = gradients()
    calls: list[int] = []
    layer = next(m for m in compiled.base.modules() if hasattr(m, "_can_checkpoint_with_cache"))
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    compiled.gradient_checkpointing_enable()
    found = gradients()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-7) for name in expected)
    assert any(float(value.abs().max()) > 0 for value in expected.values())
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).loss, compiled.eval()(**inputs).loss)
    compiled.train()
    if method in IN_CACHE:
        compiled.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with pytest.raises(peftc.AdapterError, match="use_reentrant"):
            gradients()
    compiled.gradient_checkpointing_disable()
    assert all(torch.equal(a, b) for a, b in zip(gradients().values(), expected.values(), strict=True))


@pytest.mark.parametrize("method", ["projected prefix", "p-tuning"])
def test_trainer(method: str, tmp_path: Path) -> None:
    """A Trainer with checkpointing and evaluation: the loss falls, and what it saved is loaded and trained on."""
    model = tiny("bert", "AutoModelForSequenceClassification")
    compiled = peftc.compile(model, METHODS[method]("SEQ_CLS"))
    data = [
        {"input_ids": row, "attention_mask": torch.ones(7, dtype=torch.long), "labels": int(row[0] > 33)}
        for row in ids(64, 7)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=16,
        learning_rate=0.02,
        gradient_checkpointing=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=compiled, args=arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    assert trainer.predict(data).predictions.shape == (64, 2)
    compiled.save_pretrained(tmp_path / "adapter")
    again = peftc.load(model, tmp_path / "adapter", is_trainable=True)
    trained = {name: parameter for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert {name for name, p in compiled.named_parameters() if p.requires_grad} == set(trained)
    assert all(torch.equal(parameter, compiled.get_parameter(name)) for name, parameter in trained.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_dtypes(method: str, dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    compiled = peftc.compile(model, METHODS[method]("CAUSAL_LM"))
    kept = torch.float64 if dtype is torch.float64 else torch.float32
    assert {p.dtype for p in compiled.prompt_encoder["default"].parameters()} == {kept}
    out = compiled(input_ids=ids(), labels=ids())
    assert out.logits.dtype == dtype
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in compiled.prompt_encoder["default"].parameters())
    half = peftc.compile(model, METHODS[method]("CAUSAL_LM"), autocast_adapter_dtype=False)
    assert {p.dtype for p in half.prompt_encoder["default"].parameters()} == {dtype}
    if dtype is not torch.float16:  # which the CPU's autocast knows nothing of
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.isfinite(compiled(input_ids=ids(), labels=ids()).loss)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("method", METHODS)
def test_distributed_data_parallel(method: str) -> None:
    """Every parameter that learns takes part in every step, which DDP insists on."""
    for model_type, task in (("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")):
        compiled = peftc.compile(tiny(model_type), METHODS[method](task))
        wrapped = DistributedDataParallel(compiled)
        for _ in range(2):
            wrapped(input_ids=ids(), labels=ids()).loss.backward()
        assert all(p.grad is not None for p in compiled.parameters() if p.requires_grad)


def test_a_pipeline_labels_the_callers_tokens(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path, ["is", "this", "spam"])
    compiled = peftc.compile(tiny("bert", "AutoModelForTokenClassification"), METHODS["prompt"]("TOKEN_CLS")).eval()
    found = transformers.pipeline("token-classification", model=compiled, tokenizer=tokenizer)("this is spam")
    assert [item["word"] for item in found] == ["this", "is", "spam"]


# Beside other adapters


def test_any_mix_of_methods_switches_and_unloads() -> None:
    model, tokens = tiny("llama"), ids()
    specs: dict[str, Any] = {
        "p": METHODS["prompt"]("CAUSAL_LM"),
        "x": METHODS["prefix"]("CAUSAL_LM"),
        "l": LORA,
        "i": IA3,
    }
    compiled = peftc.compile(model, specs).eval()
    outputs = {}
    for names in (["p"], ["x"], ["l"], ["p", "l"], ["x", "i"], ["p", "x"], ["p", "x", "l", "i"]):
        compiled.set_adapter(names)
        outputs[tuple(names)] = logits(compiled, input_ids=tokens)
        assert outputs[tuple(names)].shape[1] == 7 + N * ("p" in names)
        compiled.zero_grad()
        compiled(input_ids=tokens, labels=tokens).loss.backward()
        learned = {
            part
            for name, parameter in compiled.named_parameters()
            if parameter.grad is not None and float(parameter.grad.abs().max()) > 0
            for part in name.split(".")
            if part in specs
        }
        assert learned == set(names)
        alone = generated(compiled, tokens[1:, 2:])
        assert torch.equal(generated(compiled, tokens, padded("left"))[1:], alone)
        with compiled.disable_adapter():
            assert torch.equal(logits(compiled, input_ids=tokens), logits(model, input_ids=tokens))
    # A mix is the prompt on the model that the others make.
    compiled.set_adapter(["l"])
    compiled.merge_adapter(["l"])
    base = copy.deepcopy(compiled).merge_and_unload()
    compiled.unmerge_adapter()
    on_merged = peftc.compile(base, {"p": specs["p"]}).eval()
    on_merged.prompt_encoder["p"].load_state_dict(compiled.prompt_encoder["p"].state_dict())
    torch.testing.assert_close(logits(on_merged, input_ids=tokens), outputs[("p", "l")])
    compiled.set_adapter(["p", "l"])
    with pytest.raises(peftc.MergeError, match="the model: adapter 'p' can't be merged: virtual tokens"):
        compiled.merge_adapter()
    assert compiled.merged_adapters == []
    compiled.merge_adapter(["l"])
    torch.testing.assert_close(logits(compiled, input_ids=tokens), outputs[("p", "l")])
    compiled.unmerge_adapter()
    compiled.delete_adapter("x")
    assert list(compiled.prompt_encoder) == ["p"]
    assert torch.equal(logits(compiled, input_ids=tokens), outputs[("p", "l")])
    base = compiled.unload()
    assert torch.equal(logits(base, input_ids=tokens), logits(model, input_ids=tokens))


def test_position_ids_count_prefix_and_prompt() -> None:
    compiled = peftc.compile(
        tiny("gpt2", n_positions=64), {"x": METHODS["prefix"]("CAUSAL_LM"), "p": METHODS["prompt"]("CAUSAL_LM")}
    ).eval()
    compiled.set_adapter(["x", "p"])
    given = logits(compiled, input_ids=ids(), position_ids=torch.arange(7)[None])
    torch.testing.assert_close(given, logits(compiled, input_ids=ids()))


def test_two_prompts_stand_in_load_order() -> None:
    model, tokens = tiny("llama"), ids()
    compiled = peftc.compile(model, {"a": METHODS["prompt"]("CAUSAL_LM"), "b": METHODS["p-tuning"]("CAUSAL_LM")}).eval()
    compiled.set_adapter(["b", "a"])
    first, second = (compiled.get_prompt_embedding_to_save(name) for name in ("a", "b"))
    embeds = torch.cat([torch.cat([first, second]).expand(2, -1, -1), model.get_input_embeddings()(tokens)], dim=1)
    torch.testing.assert_close(logits(compiled, input_ids=tokens), logits(model, inputs_embeds=embeds))


def test_tasks_of_two_prompts_do_not_depend_on_their_order() -> None:
    specs = {"a": METHODS["prompt"]("FEATURE_EXTRACTION"), "b": METHODS["prompt"]("CAUSAL_LM")}
    for names in (["a", "b"], ["b", "a"]):
        compiled = peftc.compile(tiny("llama"), {name: specs[name] for name in names})
        compiled.set_adapter(names)
        assert torch.isfinite(compiled(input_ids=ids(), labels=ids()).loss)


def test_a_refused_adapter_leaves_everything_as_it_was(tmp_path: Path) -> None:
    _, compiled = compiled_llama("prompt")
    before, tokens = generated(compiled, ids()), ids()
    bad = peftc.PromptTuningConfig(
        num_virtual_tokens=3,
        task_type="CAUSAL_LM",
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="x",
        tokenizer_name_or_path=str(tmp_path),
    )
    with pytest.raises(peftc.AdapterError, match="no tokenizer can be loaded"):
        compiled.add_adapter("bad", bad)
    with pytest.raises(peftc.NoMatchError, match="contradicts"):
        compiled.add_adapter("bad", METHODS["prompt"]("CAUSAL_LM").model_copy(update={"token_dim": 7}))
    assert list(compiled.peft_config) == ["default"] == list(compiled.prompt_encoder)
    assert torch.equal(generated(compiled, tokens), before)


def word_tokenizer(folder: Path, words: list[str]) -> Any:
    """A tokenizer of whole words, the first of which is token 1; saved in `folder`."""
    numbers = {word: number for number, word in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")
    fast.save_pretrained(folder)
    return fast


def test_a_text_starts_a_prompt(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, ["is", "this", "spam"])
    spec = peftc.PromptTuningConfig(
        num_virtual_tokens=N,
        task_type="CAUSAL_LM",
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="is this spam",
        tokenizer_name_or_path=str(tmp_path),
    )
    model = tiny("gemma3_text")  # whose embedding scales what it looks up
    rows = peftc.compile(model, spec).get_prompt_embedding_to_save()
    assert torch.equal(rows, model.get_input_embeddings()(torch.tensor([1, 2, 3, 1, 2])).detach())
    # A saved one is loaded, and trained on, without the tokenizer.
    peftc.compile(model, spec).save_pretrained(tmp_path / "adapter")
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    again = peftc.load(model, tmp_path / "adapter", is_trainable=True)
    assert torch.equal(again.get_prompt_embedding_to_save(), rows)
    with pytest.raises(peftc.AdapterError, match="no tokenizer can be loaded"):
        peftc.compile(model, spec)
