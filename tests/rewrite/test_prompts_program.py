"""Virtual tokens in whole programs: of embeddings, or with a cache, where they enter; others say what to do."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import peftc
from tests.support.adapters import perturb
from tests.support.programs import cached_inputs, gradients, program_inputs, program_model, tensors

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


CACHED: dict[str, Any] = {
    "prefix": lambda task: peftc.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
    "projected": lambda task: peftc.PrefixTuningConfig(task_type=task, num_virtual_tokens=4, prefix_projection=True),
    "cartridge": lambda task: peftc.CartridgeConfig(task_type=task, num_virtual_tokens=2),
}
_SLOW_KINDS = ("qwen2", "qwen3", "gemma3_text", "opt", "t5", "bart", "whisper", "mixtral", "qwen3_moe")


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((kind, "prefix") for kind in ("llama", "gpt2")),
        *(pytest.param(kind, "prefix", marks=pytest.mark.slow) for kind in _SLOW_KINDS),
        *(pytest.param("llama", method, marks=pytest.mark.slow) for method in ("projected", "cartridge")),
    ],
)
def test_a_program_with_a_cache_is_the_model_with_a_prefix(kind: str, method: str) -> None:
    model = program_model(kind)
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    specs = {"prefix": CACHED[method](task), "lora": peftc.LoraConfig(r=2, target_modules="all-linear")}
    one, other = both(kind, specs, cached_inputs(kind, model))
    inputs = program_inputs(kind, model, 3, 11)
    if "attention_mask" in inputs:
        inputs["attention_mask"][-1, -2:] = 0
    # OPT's trace takes one side where a cache is empty, and says so.
    for names in ("prefix", ["prefix", "lora"], *(("lora", []) if kind != "opt" else ())):
        one.set_adapter(names), other.set_adapter(names)
        expected, found = tensors(one(**inputs)), tensors(other(**inputs))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    for compiled in (one, other):
        compiled.set_adapter("prefix")
        torch.manual_seed(0)
        compiled.train()(**inputs).loss.backward()
    expected, found = gradients(one), gradients(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(bool(gradient.any()) for gradient in found.values())


def step(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> Any:
    """One call that goes on from a cache, with padding on the left."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)


@pytest.mark.slow
def test_a_program_goes_on_from_its_cache_as_modules_do(tmp_path: Path) -> None:
    model = program_model("llama")
    captured = cached_inputs("llama", model, labels=False) | {"position_ids": torch.arange(5, 13).expand(2, -1)}
    specs = {name: CACHED[name]("CAUSAL_LM") for name in ("prefix", "cartridge")}
    one, other = both("llama", specs, captured)
    ids, mask = torch.arange(4, 16).view(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    caches: list[Any] = []
    for names in ("prefix", ["prefix", "cartridge"], []):
        made: list[list[Tensor]] = []
        for compiled in (one, other):
            compiled.set_adapter(names)
            cache, longer = transformers.DynamicCache(config=model.config), mask
            first = step(compiled, ids, mask, cache)
            assert first.past_key_values is cache  # As a model's own: the cache that is given grows.
            made.append([first.logits])
            for token in (7, 9):
                longer = torch.cat([longer, torch.ones_like(mask[:, :1])], 1)
                made[-1].append(step(compiled, torch.full((2, 1), token), longer, cache).logits)
            made[-1] += [cache.layers[0].keys, cache.layers[0].values]
            caches.append(cache)
        for expected, found in zip(*made, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    other.set_adapter("cartridge")
    longer = torch.ones(2, 9, dtype=torch.int64)
    with pytest.raises(peftc.AdapterError, match=r"holds the virtual tokens of 'prefix' \(3\)"):
        step(other, ids[:, :1], longer, caches[1])
    with pytest.raises(peftc.CaptureError, match="is StaticCache; the program takes a DynamicCache"):
        step(other, ids, mask, transformers.StaticCache(config=model.config, max_cache_len=9))
    wide = torch.ones(2, 8, dtype=torch.int64)  # A mask that counts the virtual tokens already.
    own = step(other, ids, wide[:, 2:], None).logits
    positions = torch.arange(6).expand(2, -1)
    assert torch.equal(other(input_ids=ids, attention_mask=wide, position_ids=positions).logits, own)
    with pytest.raises(peftc.AdapterError, match="covers 7 tokens; this call sees 6, or 8 with the virtual ones"):
        other(input_ids=ids, attention_mask=wide[:, 1:], position_ids=positions)


@pytest.mark.slow
def test_a_prefix_in_a_program_is_saved_loaded_switched_and_copied(tmp_path: Path) -> None:
    model = program_model("gpt2")
    captured = cached_inputs("gpt2", model, labels=False)
    one, other = both("gpt2", {"default": CACHED["projected"]("CAUSAL_LM")}, captured)
    inputs = program_inputs("gpt2", model, 3, 6, labels=False)
    expected = one(**inputs).logits
    assert torch.equal(other(**inputs).logits, expected)
    plan = peftc.plan(model, {"default": CACHED["prefix"]("CAUSAL_LM")}, capture="export", inputs=captured)
    assert [(edit.slots, edit.site) for edit in plan.edits] == [(("past",), "")]
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(copied(**inputs).logits, expected)
    with other.disable_adapter():
        assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    other.save_pretrained(tmp_path)
    again = peftc.load(model, tmp_path, capture="export", inputs=captured)
    torch.testing.assert_close(again(**inputs).logits, expected)
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    torch.testing.assert_close(again(**inputs).logits, expected)


@pytest.mark.slow
def test_a_program_with_a_cache_generates_as_modules_do() -> None:
    model = program_model("llama")
    captured = cached_inputs("llama", model, labels=False) | {"position_ids": torch.arange(5, 13).expand(2, -1)}
    specs = {"prefix": CACHED["prefix"]("CAUSAL_LM"), "lora": peftc.LoraConfig(r=2, target_modules="all-linear")}
    one, other = both("llama", specs, captured)
    ids, mask = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 3]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])

    def begun(compiled: Any) -> Any:
        cache = transformers.DynamicCache(config=model.config)
        step(compiled, ids[:1, :3], mask[:1, :3], cache)
        return cache

    def require_equal(names: Any, ids: Tensor, going_on: bool = False, **how: Any) -> None:
        found: list[Tensor] = []
        for compiled in (one, other):
            compiled.set_adapter(names)
            torch.manual_seed(0)
            more = {"past_key_values": begun(compiled)} if going_on else {}
            found.append(compiled.generate(ids, max_new_tokens=5, **{"do_sample": False, **how, **more}))
        assert torch.equal(*found)
        assert found[0].shape[1] > ids.shape[1]

    for names in ("prefix", ["prefix", "lora"], []):
        require_equal(names, ids, attention_mask=mask)
        require_equal(names, ids[:1])
        require_equal(names, ids, attention_mask=mask, num_beams=2)
        require_equal(names, ids, attention_mask=mask, do_sample=True)
        require_equal(names, ids[:1], going_on=True)
    require_equal([], ids, attention_mask=mask, adapter_names=["lora", "__base__"])


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("t5", "whisper")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bart", *SLOW])
def test_an_encoder_decoder_generates_as_modules_do(kind: str) -> None:
    model = program_model(kind)
    specs = {"prefix": CACHED["prefix"]("SEQ_2_SEQ_LM"), "lora": peftc.LoraConfig(r=2, target_modules="all-linear")}
    one, other = both(kind, specs, cached_inputs(kind, model, labels=False))
    given = program_inputs(kind, model, 3, 6, labels=False)
    given.pop("decoder_input_ids")
    if "attention_mask" in given:
        given["attention_mask"][-1, -2:] = 0

    def require_equal(names: Any, **how: Any) -> None:
        found: list[Tensor] = []
        for compiled in (one, other):
            compiled.set_adapter(names)
            torch.manual_seed(0)
            how = {"do_sample": False, "max_new_tokens": 5, "decoder_start_token_id": 1, **how}
            found.append(compiled.generate(**given, **how))
        assert torch.equal(*found)

    for names in ("prefix", ["prefix", "lora"], []):
        require_equal(names)
        require_equal(names, num_beams=2)
        require_equal(names, do_sample=True)
    require_equal([], adapter_names=["lora", "__base__", "lora"])
    assert "get_encoder" not in vars(other.base)
    if kind == "bart":
        without = peftc.compile(
            model, specs["lora"], capture="export", inputs=program_inputs(kind, model, labels=False)
        )
        with pytest.raises(peftc.AdapterError, match="Capture it with input_ids, attention_mask, decoder_input_ids "):
            without.generate(**given)


@pytest.mark.slow
def test_positions_that_follow_from_a_cache_can_be_given() -> None:
    model, spec = program_model("opt"), peftc.LoraConfig(r=2, target_modules="all-linear")
    inputs, given = cached_inputs("opt", model, labels=False), program_inputs("opt", model, 3, 6, labels=False)
    with pytest.raises(
        peftc.CaptureError, match=r"past_key_values is empty, .*: name position_ids among the inputs, too"
    ):
        peftc.compile(model, spec, capture="export", inputs=inputs)(**given)
    inputs["position_ids"] = torch.arange(5, 13).expand(2, -1)
    program = peftc.compile(model, spec, capture="export", inputs=inputs)
    assert torch.equal(program(**given, position_ids=torch.arange(6).expand(3, -1)).logits, model(**given).logits)
    ids = given["input_ids"]
    assert torch.equal(*(one.generate(ids, max_new_tokens=5, do_sample=False) for one in (program, model)))


class Silent(transformers.LlamaForCausalLM):
    """Keeps its cache to itself."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, past_key_values: Any = None) -> Any:
        own = super().forward(input_ids, attention_mask=attention_mask, past_key_values=past_key_values)
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=own.logits)


_SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 64, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.slow
def test_what_a_program_lacks_to_generate_is_said() -> None:
    model, spec = program_model("llama"), peftc.LoraConfig(r=2, target_modules=["q_proj"])
    ids = torch.tensor([[5, 6, 7, 8]])
    cached = cached_inputs("llama", model, labels=False)
    without = peftc.compile(model, spec, capture="export", inputs=cached)
    with pytest.raises(peftc.CaptureError, match=r"position_ids not known\. Name what it is called with in inputs="):
        without.generate(ids, max_new_tokens=2, do_sample=False)
    for inputs in (cached_inputs("llama", model), program_inputs("llama", model)):
        with pytest.raises(peftc.AdapterError, match=r"captured with .*Capture it with input_ids, attention_mask, pos"):
            peftc.compile(model, spec, capture="export", inputs=inputs).generate(ids)
    silent = Silent(transformers.LlamaConfig(**_SMALL)).eval()
    cached = cached_inputs("llama", transformers.LlamaForCausalLM(silent.config), labels=False)
    with pytest.raises(peftc.AdapterError, match=r"with config\.use_cache=True; or compile it with capture='modules'"):
        peftc.compile(silent, spec, capture="export", inputs=cached).generate(ids)


@pytest.mark.slow
def test_a_program_without_a_cache_says_how_to_capture_one() -> None:
    model = program_model("llama")
    inputs: dict[str, Any] = program_inputs("llama", model)
    spec = CACHED["prefix"]("CAUSAL_LM")
    with pytest.raises(peftc.NoMatchError, match=r"past_key_values.* = model\(\*\*few\)\.past_key_values") as told:
        peftc.compile(model, spec, capture="export", inputs=inputs)
    for misled in (transformers.DynamicCache(), transformers.DynamicCache(config=model.config)):
        with pytest.raises(peftc.CaptureError, match=r"holds no two tokens.* past_key_values = model\(\*\*inputs\)"):
            peftc.compile(model, spec, capture="export", inputs=inputs | {"past_key_values": misled})
    few = {name: value for name, value in inputs.items() if name != "labels"}
    advice = str(told.value).partition("too: with torch.no_grad(): ")[2].partition(" (few")[0]
    with torch.no_grad():
        exec(advice, {"inputs": inputs, "model": model, "few": few})
    inputs["attention_mask"] = torch.ones(2, 16, dtype=torch.int64)
    compiled = peftc.compile(model, spec, capture="export", inputs=inputs)
    assert compiled(**program_inputs("llama", model, 3, 4)).past_key_values.get_seq_length() == 7
    scores = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**_SMALL)).eval()
    prefix = peftc.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    with pytest.raises(peftc.NoMatchError, match="needs capture='modules', which keeps the model's own call"):
        peftc.compile(scores, prefix, capture="export", inputs=few | {"labels": torch.tensor([0, 1])})
    peftc.compile(scores, prefix)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pt2", "onnx"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_program_with_a_prefix_is_exported(kind: str, to: Any, tmp_path: Path) -> None:
    model = program_model(kind)
    spec = CACHED["prefix"]("SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM")
    captured = cached_inputs(kind, model, labels=False)
    live = perturb(peftc.compile(model, spec, capture="export", inputs=captured)).eval()
    given = program_inputs(kind, model, labels=False)
    certificate = live.export(tmp_path, to, adapters="inside", inputs=given)
    assert certificate.difference <= 1e-5 * max(1, certificate.scale)
    assert certificate.compared
    assert not certificate.refused
    assert peftc.verify(tmp_path).difference == certificate.difference


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
