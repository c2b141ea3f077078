"""Activated LoRA against peft: outputs, gradients, files both ways, generation with a cache, batches of several."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftc
import peftc.peft as served
from tests.support.against import near, same_gradients
from tests.support.interchange import perturbed, quietly
from tests.support.models import Everything, tiny

INVOCATION = [7, 8]
TARGETS = {"llama": ["q_proj", "down_proj", "lm_head"], "gpt2": ["c_attn", "c_fc"], "qwen3": ["v_proj", "o_proj"]}


def fields(family: str = "llama", **more: Any) -> dict[str, Any]:
    given = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[family], "alora_invocation_tokens": INVOCATION}
    return {**given, "task_type": "CAUSAL_LM", **more}


def ids() -> Tensor:
    """Rows with the invocation in the middle, twice, at the end, half of it, and without."""
    rows = torch.randint(10, 60, (5, 9), generator=torch.Generator().manual_seed(0))
    for row, places in enumerate(([3], [1, 5], [7], [], [])):
        for place in places:
            rows[row, place : place + 2] = torch.tensor(INVOCATION)
    rows[3, 8] = INVOCATION[0]
    return rows


def both(family: str, folder: Path, **more: Any) -> tuple[nn.Module, Any, peftc.CompiledModel]:
    torch.manual_seed(0)
    net = tiny(family).eval()
    theirs = perturbed(quietly(peft.get_peft_model, copy.deepcopy(net), peft.LoraConfig(**fields(family, **more))), 1)
    theirs.save_pretrained(folder / "theirs")
    return net, theirs, peftc.load(net, folder / "theirs", is_trainable=True).eval()


@pytest.mark.parametrize("family", TARGETS)
def test_outputs_gradients_and_files_are_those_of_peft(family: str, tmp_path: Path) -> None:
    net, theirs, ours = both(family, tmp_path)
    x = ids()
    y = ours(x).logits
    near(y, theirs(x).logits, 1e-5, "outputs")
    base = net(x).logits
    near(y[4], base[4], 1e-6, "outputs of a row without the invocation")
    near(y[0, :3], base[0, :3], 1e-6, "outputs before the invocation")
    assert not torch.allclose(y[0, 3:], base[0, 3:], atol=1e-3)
    same_gradients(ours, theirs, x, 1e-4, of=lambda output: output.logits, apart=True)
    ours.save_pretrained(tmp_path / "ours")
    again = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(net), str(tmp_path / "ours")).eval()
    near(again(x).logits, y, 1e-5, "outputs of peft, from files of peftc")


@pytest.mark.parametrize("family", TARGETS)
def test_generation_with_a_cache_is_that_of_peft_and_of_whole_calls(family: str, tmp_path: Path) -> None:
    net, theirs, ours = both(family, tmp_path)
    x, options = ids(), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(x)
    found = ours.generate(input_ids=x, **options)
    assert torch.equal(found, theirs.generate(input_ids=x, **options))
    assert torch.equal(found, ours.generate(x, use_cache=False, **options))
    assert not torch.equal(found[:3], net.generate(x, **options)[:3])
    whole = ours(found[:3]).logits.argmax(-1)  # Nothing that was generated invokes again.
    assert torch.equal(whole[:, 8:-1], found[:3, 9:])


def test_a_cache_remembers_which_rows_have_begun(tmp_path: Path) -> None:
    _, _, ours = both("llama", tmp_path)
    x = ids()
    more = torch.randint(10, 60, (5, 3))
    with torch.no_grad():
        whole = ours(torch.cat([x, more], 1)).logits[:, 9:]
        first = ours(x, use_cache=True)
        near(ours(more, past_key_values=first.past_key_values).logits, whole, 1e-5, "outputs with a cache")
    # Before the invocation the cache is the base's: that is what it is for.
    with torch.no_grad(), ours.disable_adapter():
        bare = ours(x[:1, :3], use_cache=True).past_key_values
    with torch.no_grad():
        near(ours(x[:1, 3:], past_key_values=bare).logits, ours(x[:1]).logits[:, 3:], 1e-5, "outputs after the base's")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_of_a_batch_have_adapters_and_invocations_of_their_own(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = tiny(family).eval()
    specs = {
        "a": peftc.LoraConfig(**fields(family)),
        "b": peftc.LoraConfig(**fields(family, alora_invocation_tokens=[9])),
        "c": peftc.LoraConfig(r=2, target_modules=TARGETS[family]),
    }
    ours, x, names = perturbed(peftc.compile(net, specs), 1), ids(), ["a", "b", "__base__", "c", "a"]
    for name in specs:
        ours.set_adapter(name)
        perturbed(ours, 2)
    x[1, 6] = 9
    alike = ours(x, adapter_names=["a", "b", "__base__", "b", "a"]).logits  # All of one form.
    together = ours(x, adapter_names=names).logits
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generated = ours.generate(x, adapter_names=names, attention_mask=torch.ones_like(x), **options)
    ours.set_adapter("b")
    near(alike[[1, 3]], ours(x[[1, 3]]).logits, 1e-5, "rows of one form")
    for row, name in enumerate(names):
        ours.set_adapter([] if name == "__base__" else name)
        one = x[row : row + 1]
        near(together[row], ours(one).logits[0], 1e-5, f"row {row}")
        alone = ours.generate(one, attention_mask=torch.ones_like(one), **options)
        assert torch.equal(generated[row], alone[0])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_beams_are_those_of_every_row_alone(family: str, tmp_path: Path) -> None:
    _, _, ours = both(family, tmp_path)
    x, options = (
        ids(),
        {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "num_beams": 3},
    )
    found = ours.generate(x, attention_mask=torch.ones_like(x), **options)
    for row in range(len(x)):
        one = x[row : row + 1]
        assert torch.equal(found[row], ours.generate(one, attention_mask=torch.ones_like(one), **options)[0])


def test_it_learns_under_gradient_checkpointing(tmp_path: Path) -> None:
    _, _, ours = both("llama", tmp_path)
    x = ids()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable()
        ours.train().zero_grad()
        ours(x, labels=x).loss.backward()
        found.append({name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        near(found[1][name], gradient, 1e-6, f"gradients of {name}")


def test_scripts_for_peft_run(tmp_path: Path) -> None:
    net, theirs, _ = both("llama", tmp_path)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ours, x = served.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "theirs")), ids()
    near(ours(input_ids=x).logits, theirs(input_ids=x).logits, 1e-5, "outputs")
    made = [m.generate(input_ids=x, attention_mask=torch.ones_like(x), **options) for m in (ours, theirs)]
    assert torch.equal(*made)


def test_what_can_not_be_is_refused_with_the_reason(tmp_path: Path) -> None:
    net, _, ours = both("llama", tmp_path)
    x = ids()
    with pytest.raises(peftc.MergeError, match="acts on the tokens from the invocation on only, and a weight on all"):
        ours.merge_adapter()
    with pytest.raises(peftc.AdapterError, match="call the model with input_ids, not inputs_embeds"):
        ours(inputs_embeds=net.get_input_embeddings()(x))
    with pytest.raises(peftc.AdapterError, match=r"only calls of the compiled model.*call that, not its base"):
        ours.base(x)
    with pytest.raises(peftc.NoMatchError, match="alora_invocation_tokens is for linear sites, this is conv2d"):
        peftc.compile(Everything(), peftc.LoraConfig(target_modules=["conv2d"], alora_invocation_tokens=[1]))
    with pytest.raises(peftc.SpecError, match="use_dora and alora_invocation_tokens don't go together"):
        peftc.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[1], use_dora=True)
    with pytest.raises(peftc.SpecError, match="alora_invocation_tokens"):
        peftc.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens="now")
    assert "acts from the tokens [7, 8] on" in str(ours.plan)
