"""Cartridges against peft: outputs, gradients of what is not frozen, files both ways, starts from a text, composition."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import peftc
import peftc.peft as served
from tests.support.against import near
from tests.support.interchange import perturbed, quietly
from tests.support.models import tiny
from tests.support.prompts import generated, ids, in_peft, padded

TASK = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
IDS = ids()


def spec(family: str = "llama", **more: Any) -> peftc.CartridgeConfig:
    return peftc.CartridgeConfig(**{"num_virtual_tokens": 5, "num_frozen_tokens": 2, "task_type": TASK[family], **more})


def both(family: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Any, Any, Any]:
    """A model, an adapter of it, and the same in peft."""
    torch.manual_seed(0)
    net = tiny(family).to(dtype).eval()
    ours = peftc.compile(net, spec(family, **more)).eval()
    return net, ours, in_peft(ours, net)


def inputs(family: str = "llama") -> dict[str, Any]:
    labels = ids(2, 4, 9) if family == "t5" else IDS
    return {"input_ids": IDS, "attention_mask": padded("right"), "labels": labels}


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("family", TASK)
def test_outputs_and_gradients_are_those_of_peft(family: str, frozen: int) -> None:
    net, ours, theirs = both(family, num_frozen_tokens=frozen)
    found, expected = (model(**inputs(family)) for model in (ours, theirs))
    near(found.logits, expected.logits, 1e-5, "outputs")
    assert not torch.allclose(found.logits, net(**inputs(family)).logits, atol=1e-3)
    for output in (found, expected):
        output.loss.backward()
    own, other = (dict(model.prompt_encoder["default"].named_parameters()) for model in (ours, theirs))
    assert own.keys() == other.keys()
    near(own["trainable_embedding"].grad, other["trainable_embedding"].grad, 1e-4, "gradients of trainable_embedding")
    if frozen:
        assert own["frozen_embedding"].grad is None
        assert not own["frozen_embedding"].requires_grad
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


def test_half_precision() -> None:
    _, ours, theirs = both(dtype=torch.bfloat16)
    found, expected = (model(**inputs()) for model in (ours, theirs))
    near(found.logits.float(), expected.logits.float(), 2e-2, "bfloat16: outputs")
    for output in (found, expected):
        output.loss.backward()
    own, other = (model.prompt_encoder["default"].trainable_embedding.grad for model in (ours, theirs))
    near(own, other, 4e-2, "bfloat16: gradients of trainable_embedding")


@pytest.mark.parametrize("family", TASK)
def test_generated_tokens_are_those_of_peft(family: str) -> None:
    net, ours, theirs = both(family)
    for options in ({}, {"num_beams": 3}):
        found = generated(ours, IDS, **options)
        assert torch.equal(found, generated(theirs, IDS, **options))
    assert not torch.equal(found, generated(net, IDS, num_beams=3))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("frozen", [0, 2, 5])
def test_files_go_both_ways(frozen: int, trainable: bool, tmp_path: Path) -> None:
    net, ours, theirs = both(num_frozen_tokens=frozen)
    y = ours(**inputs()).logits
    ours.save_pretrained(tmp_path / "ours")
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert one.keys() == other.keys() == {"prompt_embeddings"}
    assert torch.equal(one["prompt_embeddings"], other["prompt_embeddings"])
    # The encoder follows from the rows, so it is not there a second time.
    assert not (tmp_path / "ours" / "prompt_encoder.safetensors").exists()
    for name in ("ours", "theirs"):
        again = peftc.load(net, tmp_path / name, is_trainable=trainable).eval()
        assert torch.equal(again(**inputs()).logits, y)
        width = one["prompt_embeddings"].shape[1]
        assert again.get_nb_trainable_parameters()[0] == ((5 - frozen) * width if trainable else 0)
        again.save_pretrained(tmp_path / "again")
        assert torch.equal(
            load_file(tmp_path / "again/adapter_model.safetensors")["prompt_embeddings"], one["prompt_embeddings"]
        )
    back = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(net), str(tmp_path / "ours")).eval()
    near(back(**inputs()).logits, y, 1e-5, "outputs of peft, from files of peftc")


def test_a_step_leaves_what_is_frozen() -> None:
    _, ours, _ = both()
    before = ours.get_prompt_embedding_to_save().clone()
    optimiser = torch.optim.AdamW(ours.parameters(), lr=0.1)
    ours.train()(**inputs()).loss.backward()
    optimiser.step()
    after = ours.get_prompt_embedding_to_save()
    assert torch.equal(after[:2], before[:2])
    assert bool((after[2:] != before[2:]).any(1).all())


def test_it_learns_under_gradient_checkpointing_which_peft_refuses() -> None:
    _, ours, _ = both()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ours.train().zero_grad()
        ours(**inputs()).loss.backward()
        found.append(ours.prompt_encoder["default"].trainable_embedding.grad.clone())
    near(found[1], found[0], 1e-6, "gradients of trainable_embedding")


def test_it_is_switched_disabled_kept_from_merging_and_taken_off() -> None:
    net, ours, _ = both()
    y, base = ours(IDS).logits, net(IDS).logits
    ours.add_adapter("b", spec(num_virtual_tokens=3, num_frozen_tokens=0))
    ours.add_adapter("c", peftc.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    near(ours(IDS).logits, y, 0, "outputs beside others")
    ours.set_adapter(["default", "b", "c"])
    assert not torch.allclose(ours(IDS).logits, y, atol=1e-3)
    with ours.disable_adapter():
        near(ours(IDS).logits, base, 0, "outputs, disabled")
    ours.set_adapter("default")
    with pytest.raises(peftc.MergeError, match="virtual tokens are no part of a weight"):
        ours.merge_adapter()
    with pytest.raises(peftc.AdapterError, match="a prompt method changes the length of every row"):
        ours(IDS, adapter_names=["default", "__base__"])
    assert torch.equal(ours.unload()(IDS).logits, base)


def test_fields_that_make_no_sense_are_refused() -> None:
    with pytest.raises(peftc.SpecError, match="num_frozen_tokens=6 is more than the num_virtual_tokens=5"):
        spec(num_frozen_tokens=6)
    with pytest.raises(peftc.SpecError, match="num_frozen_tokens"):
        spec(num_frozen_tokens=-1)
    with pytest.raises(peftc.NoMatchError, match="contradicts the model"):
        peftc.compile(tiny("llama"), spec(num_layers=7))


class Words:
    """A tokenizer of one word, with or without a template."""

    def __init__(self, template: str | None) -> None:
        self.chat_template = template

    def __call__(self, text: str, **options: Any) -> dict[str, torch.Tensor]:
        length = options.get("max_length") if options.get("truncation") else None
        return {"input_ids": ids(1, 9, len(text))[:, :length]}

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        found = {"input_ids": ids(1, 11, len(messages[0]["content"]) + 1)}
        return found if options.get("return_dict") else found["input_ids"]


@pytest.mark.parametrize("template", [None, "{{ messages }}"])
@pytest.mark.parametrize("config", ["CartridgeConfig", "PrefixTuningConfig"])
def test_it_begins_with_the_keys_and_values_of_a_text_as_in_peft(config: str, template: str | None) -> None:
    net, made = tiny("llama"), []
    for lib in (served, peft):
        model = quietly(
            lib.get_peft_model, copy.deepcopy(net), getattr(lib, config)(num_virtual_tokens=5, task_type="CAUSAL_LM")
        )
        options = {"text": "some text", "use_chat_template": template is not None, "max_length": 8}
        rows = lib.initialize_kv_prefix_from_text(model, Words(template), **options)
        assert torch.equal(model.get_prompt_embedding_to_save("default"), rows)
        made.append((rows, model.eval()(IDS).logits))
    near(made[0][0], made[1][0], 1e-6, "rows")
    near(made[0][1], made[1][1], 1e-5, "outputs")
    # The base that reads the text first says the same.
    tokens = (
        Words(template).apply_chat_template([{"content": "some text"}])
        if template
        else Words(None)("some text")["input_ids"]
    )
    whole = net.eval()(torch.cat([tokens[:, :5].expand(2, -1), IDS], 1)).logits[:, 5:]
    near(made[0][1], whole, 1e-5, "outputs after the text")


def test_what_can_not_begin_with_a_text_is_refused() -> None:
    def adapted(config: Any, family: str = "llama") -> Any:
        return served.get_peft_model(tiny(family), config)

    cartridge = adapted(served.CartridgeConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    cache = tiny("llama")(ids(1, 9), use_cache=True).past_key_values
    fill = served.initialize_kv_prefix_from_past_key_values
    for model, more, said in (
        (cartridge, {"past_key_values": tiny("llama")(IDS, use_cache=True).past_key_values}, r"expected \(1, heads"),
        (cartridge, {"past_key_values": tiny("llama")(ids(1, 3), use_cache=True).past_key_values}, "has 3 tokens"),
        (cartridge, {"past_key_values": cache, "num_virtual_tokens": 4}, "has rows"),
        (cartridge, {"past_key_values": cache, "adapter_name": "b"}, "'b' has no keys and values"),
        (
            adapted(served.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")),
            {"past_key_values": cache},
            "no keys",
        ),
        (
            adapted(served.PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, task_type="CAUSAL_LM")),
            {"past_key_values": cache},
            "by an MLP",
        ),
        (
            adapted(served.CartridgeConfig(num_virtual_tokens=5, task_type="SEQ_2_SEQ_LM"), "t5"),
            {"past_key_values": cache},
            "encoder-decoder",
        ),
    ):
        with pytest.raises(peftc.AdapterError, match=said):
            fill(model, **more)


def test_cartridges_are_put_one_behind_the_other_as_in_peft(tmp_path: Path) -> None:
    net, one, _ = both()
    one.save_pretrained(tmp_path / "one")
    two = peftc.compile(net, spec(num_virtual_tokens=3, num_frozen_tokens=0))
    two.save_pretrained(tmp_path / "two")
    parts = [str(tmp_path / name) for name in ("one", "two")]
    found = []
    for lib in (served, peft):
        lib.compose_cartridge_adapters(parts, output_path=tmp_path / lib.__name__)
        found.append(peftc.load(net, tmp_path / lib.__name__, is_trainable=True).eval())
    near(found[0](IDS).logits, found[1](IDS).logits, 0, "outputs")
    assert found[0].peft_config["default"].num_virtual_tokens == 8
    assert found[0].peft_config["default"].num_frozen_tokens == 2
    peftc.compile(net, peftc.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(peftc.SpecError, match="is not as of a cartridge"):
        served.compose_cartridge_adapters([parts[0], str(tmp_path / "other")], output_path=tmp_path / "three")
    with pytest.raises(peftc.AdapterError, match="two folders at least"):
        served.compose_cartridge_adapters(parts[:1], output_path=tmp_path / "three")


def test_scripts_for_peft_run(tmp_path: Path) -> None:
    net = tiny("llama")
    config = served.CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=1, task_type="CAUSAL_LM")
    model = perturbed(served.get_peft_model(copy.deepcopy(net), config), 1)
    assert isinstance(model.prompt_encoder["default"], served.CartridgeEncoder)
    model(input_ids=IDS, labels=IDS).loss.backward()
    generated(model, IDS)
    model.save_pretrained(tmp_path)
    again = quietly(peft.PeftModel.from_pretrained, net, str(tmp_path)).eval()
    near(again(IDS).logits, model.eval()(IDS).logits, 1e-5, "outputs")
