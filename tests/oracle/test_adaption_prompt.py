"""LLaMA-Adapter against peft: outputs, gradients, files both ways, generation, half precision; and beside other methods."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import peftc
from tests.support.interchange import perturbed, quietly
from tests.support.models import model_of, tiny, token_ids

IDS = token_ids(2, 7, 64).clamp_min(3)
FIELDS = {"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM"}
KINDS = ("llama", "mistral", "gpt2")


def trained(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    """A model, the same in peft with an adapter that is as if trained, and that read from peft's files."""
    model = model_of(kind, dtype)
    theirs = perturbed(quietly(peft.get_peft_model, copy.deepcopy(model), peft.AdaptionPromptConfig(**FIELDS)), 1)
    theirs.save_pretrained(folder / "theirs")
    return model, theirs, peftc.load(model, folder / "theirs", is_trainable=True).eval()


def gradients(model: Any) -> dict[str, Tensor]:
    model(IDS).logits.float().square().mean().backward()
    found = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        name.partition("base.")[2] or name.removeprefix("base_model.model."): value for name, value in found.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_gradients_files_and_generation(kind: str, tmp_path: Path) -> None:
    model, theirs, ours = trained(kind, tmp_path)
    y = theirs(IDS).logits
    assert not torch.allclose(y, model(IDS).logits, atol=1e-3)
    torch.testing.assert_close(ours(IDS).logits, y)
    own, other = gradients(ours), gradients(theirs)
    assert own.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-8)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(IDS).logits, y)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(ours.generate(input_ids=IDS, **options), theirs.generate(input_ids=IDS, **options))
    with ours.disable_adapter():
        assert torch.equal(ours(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16(kind: str, tmp_path: Path) -> None:
    _, theirs, ours = trained(kind, tmp_path, torch.bfloat16)
    y = ours(IDS).logits
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), theirs(IDS).logits.float(), rtol=3e-2, atol=1e-2)


@pytest.mark.parametrize("kind", [*KINDS, "qwen2"])
def test_a_fresh_one_is_the_base_and_trains(kind: str) -> None:
    model = tiny(kind)
    name = None if kind in KINDS else "self_attn"
    ours = peftc.compile(model, peftc.AdaptionPromptConfig(**FIELDS, target_modules=name))
    assert torch.equal(ours(IDS).logits, model(IDS).logits)
    rate, losses = 0.5, []
    trained_ones = [p for p in ours.parameters() if p.requires_grad]
    assert len(trained_ones) == 4
    optimizer = torch.optim.Adam(trained_ones, lr=rate)
    for _ in range(8):
        loss = ours(IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1e-3


def test_with_padding_and_gradient_checkpointing(tmp_path: Path) -> None:
    _, theirs, ours = trained("llama", tmp_path)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    torch.testing.assert_close(
        ours(input_ids=IDS, attention_mask=mask).logits[:, 3:], theirs(IDS, attention_mask=mask).logits[:, 3:]
    )
    plain = gradients(ours)
    ours.zero_grad()
    ours.gradient_checkpointing_enable()
    ours.train()
    for name, value in gradients(ours).items():
        torch.testing.assert_close(value, plain[name])


def test_beside_lora_on_its_projections(tmp_path: Path) -> None:
    """The queries and the prompts go through what LoRA makes of the projections, as in a merged model."""
    model = tiny("llama").double()
    lora = peftc.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ours = peftc.compile(model, {"lora": lora, "prompt": peftc.AdaptionPromptConfig(**FIELDS)})
    ours.set_adapter(["lora", "prompt"])
    perturbed(ours, 3)
    y = ours(IDS).logits
    for name in ("lora", "prompt"):
        ours.set_adapter([name])
        assert not torch.allclose(ours(IDS).logits, y, atol=1e-6)
    ours.set_adapter(["lora", "prompt"])
    ours.merge_adapter(["lora"])
    torch.testing.assert_close(ours(IDS).logits, y)


def test_several_add_up_and_switch(tmp_path: Path) -> None:
    _, _, ours = trained("llama", tmp_path)
    y = ours(IDS).logits
    ours.load_adapter(tmp_path / "theirs", "b")
    ours.set_adapter("b")
    assert torch.equal(ours(IDS).logits, y)
    ours.set_adapter(["default", "b"])
    assert not torch.allclose(ours(IDS).logits, y)
    ours.delete_adapter("b")
    assert torch.equal(copy.deepcopy(ours)(IDS).logits, y)


def test_what_can_t_be_is_refused_with_what_to_do() -> None:
    for kind, fields, said in (
        ("llama", {**FIELDS, "adapter_layers": 4}, "asks for 4 of the 3 attention modules"),
        ("llama", {**FIELDS, "adapter_len": None}, "give how many"),
        ("llama", {**FIELDS, "target_modules": "mlp"}, "no projections of the names"),
        ("llama", {**FIELDS, "target_modules": "attn"}, "names no module"),
        ("qwen3", {**FIELDS, "target_modules": "self_attn"}, "normalises its queries"),
        ("bloom", FIELDS, "give the name of its attention modules"),
    ):
        with pytest.raises(peftc.PeftcError, match=said):
            peftc.compile(tiny(kind), peftc.AdaptionPromptConfig(**fields))
    ours = peftc.compile(tiny("llama"), peftc.AdaptionPromptConfig(**FIELDS))
    with pytest.raises(peftc.MergeError, match="nothing to fold"):
        ours.merge_adapter()
    with pytest.raises(peftc.PeftcError, match="attended to by all rows"):
        ours(IDS, adapter_names=["default", "__base__"])
    inputs = {"input_ids": IDS}
    with pytest.raises(peftc.PeftcError, match="needs capture='modules'"):
        peftc.compile(tiny("llama"), peftc.AdaptionPromptConfig(**FIELDS), capture="export", inputs=inputs)
