"""Models that others have wrapped: torch.compile, accelerate's hooks, and what wrappers leave in files."""

import copy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import peftc
from tests.support.adapters import lora, perturb
from tests.support.models import tiny, token_ids

IDS = token_ids(2, 5, 64)


def llama() -> Any:
    """The same small Llama every time."""
    torch.manual_seed(0)
    return tiny("llama")


def on_one_device(model: Any) -> dict[str, Any]:
    """A device map that gives every layer its own entry, so that accelerate hooks all of them."""
    layers = {f"model.layers.{number}": "cpu" for number in range(len(model.model.layers))}
    return {**layers, **dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")}


class TestCompiledBases:
    @pytest.mark.parametrize("inplace", [False, True])
    def test_what_torch_compile_wrapped_is_adapted_and_named_as_if_it_were_not(
        self, inplace: bool, tmp_path: Path
    ) -> None:
        with pytest.warns(UserWarning, match=r"LlamaForCausalLM went through torch.compile.*torch.compile\(compiled\)"):
            compiled = peftc.compile(torch.compile(llama(), backend="eager"), lora("q_proj"), inplace=inplace)
        y = perturb(compiled)(IDS).logits
        torch.testing.assert_close(torch.compile(compiled, backend="eager")(IDS).logits, y)  # The advice.
        assert not [key for key in peftc.get_peft_model_state_dict(compiled) if "_orig_mod" in key]
        compiled.save_pretrained(tmp_path)
        assert torch.equal(peftc.load(llama(), tmp_path)(IDS).logits, y)
        with pytest.warns(UserWarning, match="torch.compile"):
            assert torch.equal(peftc.load(torch.compile(llama(), backend="eager"), tmp_path)(IDS).logits, y)
        with pytest.warns(UserWarning, match="torch.compile"):
            peftc.plan(torch.compile(llama(), backend="eager"), lora("q_proj"))

    def test_layers_that_were_compiled_alone(self, tmp_path: Path) -> None:
        model = llama()
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
        compiled = perturb(peftc.compile(model, lora("q_proj", modules_to_save=["lm_head"])))
        y = compiled(IDS).logits
        compiled.save_pretrained(tmp_path)
        assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "_orig_mod" in key]
        torch.testing.assert_close(peftc.load(llama(), tmp_path)(IDS).logits, y)
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
        torch.testing.assert_close(theirs(IDS).logits, y)
        again = llama()
        again.model.layers[1] = torch.compile(again.model.layers[1], backend="eager")
        torch.testing.assert_close(peftc.load(again, tmp_path)(IDS).logits, y)
        with compiled.merged():
            torch.testing.assert_close(compiled(IDS).logits, y)


@pytest.mark.parametrize(
    "left",
    ["module.{}", "_orig_mod.{}", "_orig_mod.module.{}", "base_model.model._orig_mod.{}", "base_model.model.module.{}"],
)
def test_prefixes_that_wrappers_leave_in_files_are_read(left: str, tmp_path: Path) -> None:
    compiled = perturb(peftc.compile(llama(), lora("q_proj", modules_to_save=["lm_head"])))
    compiled.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    inner = "base_model.model."
    keys = {key: left.format(key.removeprefix(inner) if left.startswith(inner) else key) for key in state}
    for name in tmp_path.glob("peftc*"):
        name.unlink()
    save_file({keys[key]: value for key, value in state.items()}, file)
    assert torch.equal(peftc.load(llama(), tmp_path)(IDS).logits, compiled(IDS).logits)


def test_an_input_that_is_replaced_reaches_a_patched_forward_of_any_arguments() -> None:
    spec = peftc.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    compiled = perturb(peftc.compile(llama(), spec))
    model = llama()
    for layer in model.model.layers:
        linear = layer.mlp.down_proj
        linear.forward = lambda *args, own=linear.forward, **kwargs: own(*args, **kwargs)
    patched = peftc.compile(model, spec, inplace=True)
    peftc.set_peft_model_state_dict(patched, peftc.get_peft_model_state_dict(compiled))
    assert torch.equal(patched(IDS).logits, compiled(IDS).logits)
    down = patched.base.model.layers[0].mlp.down_proj
    x = torch.randn(2, down.in_features)
    assert torch.equal(down(input=x), down(x))


class Doubles(ModelHook):
    """Changes what goes in and what comes out."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return tuple(2 * arg for arg in args), kwargs

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output + 1


class TestHooks:
    @pytest.mark.parametrize("inplace", [False, True])
    def test_a_dispatched_model_is_adapted_merged_switched_and_given_back(self, inplace: bool, tmp_path: Path) -> None:
        plain = perturb(peftc.compile(llama(), {n: lora("q_proj", "embed_tokens", "down_proj") for n in "ab"}))
        plain.save_pretrained(tmp_path)
        model = dispatch_model(llama(), on_one_device(llama()), force_hooks=True)
        base = model(IDS).logits
        compiled = peftc.load(model, tmp_path / "a", "a", inplace=inplace)
        compiled.load_adapter(tmp_path / "b", "b")
        assert not [edit.site for edit in compiled.plan.edits if edit.opaque]
        for name in ("a", "b"):
            plain.set_adapter(name)
            compiled.set_adapter(name)
            y = plain(IDS).logits
            torch.testing.assert_close(compiled(IDS).logits, y)
            with compiled.merged():
                torch.testing.assert_close(compiled(IDS).logits, y)
            with compiled.disable_adapter():
                assert torch.equal(compiled(IDS).logits, base)
        torch.testing.assert_close(copy.deepcopy(compiled)(IDS).logits, y)
        rows = compiled(IDS, adapter_names=["b", "__base__"]).logits
        torch.testing.assert_close(rows, torch.cat([y[:1], base[1:]]))
        back = compiled.unload()
        assert torch.equal(back(IDS).logits, base)
        assert type(back.model.layers[0].self_attn.q_proj) is nn.Linear
        assert torch.equal(remove_hook_from_module(back, recurse=True)(IDS).logits, base)

    def test_the_graph_of_a_hooked_module_is_that_of_its_class(self) -> None:
        model = dispatch_model(llama(), on_one_device(llama()), force_hooks=True)
        hooked, plain = (peftc.compile(m, lora("q_proj", "embed_tokens")).site_code() for m in (model, llama()))
        assert hooked == plain

    def test_a_hook_runs_once_around_whatever_the_module_runs(self) -> None:
        fc, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(2, 6)
        add_hook_to_module(fc[0], Doubles())
        compiled = peftc.compile(fc, lora("0"))
        assert torch.equal(compiled(x), fc(x))
        y = perturb(compiled)(x)
        a, b = (getattr(compiled.base[0], name)["default"].weight for name in ("lora_A", "lora_B"))
        delta = 2 * x @ a.T @ b.T
        torch.testing.assert_close(y, fc(x) + delta * compiled.plan.edits[0].constants["scaling"])
        with compiled.merged():
            torch.testing.assert_close(compiled(x), y)

    def test_hooks_that_come_and_go_after_compiling(self) -> None:
        fc, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(2, 6)
        compiled = perturb(peftc.compile(fc, lora("0")))
        y, half = compiled(x), compiled(x / 2)
        add_hook_to_module(compiled.base[0], Doubles())
        torch.testing.assert_close(compiled(x / 2), y + 1)
        with compiled.merged():
            torch.testing.assert_close(compiled(x / 2), y + 1)
        remove_hook_from_module(compiled.base[0])
        torch.testing.assert_close(compiled(x / 2), half)
        base = compiled.unload()
        torch.testing.assert_close(base(x), fc(x))


class TestOffload:
    def offloaded(self, folder: Path) -> Any:
        llama().save_pretrained(folder / "base")
        devices = {**on_one_device(llama()), "model.layers.1": "disk", "lm_head": "disk"}
        return LlamaForCausalLM.from_pretrained(
            folder / "base", device_map=devices, offload_folder=folder / "offload"
        ).eval()

    def test_adapters_on_offloaded_layers(self, tmp_path: Path) -> None:
        plain = perturb(peftc.compile(llama(), lora("q_proj", "lm_head")))
        plain.save_pretrained(tmp_path / "a")
        model = self.offloaded(tmp_path)
        assert model.model.layers[1].self_attn.q_proj.weight.is_meta
        compiled = peftc.load(model, tmp_path / "a")
        torch.testing.assert_close(compiled(IDS).logits, plain(IDS).logits)
        with compiled.disable_adapter():
            torch.testing.assert_close(compiled(IDS).logits, llama()(IDS).logits)
        new = peftc.compile(model, lora("q_proj"))
        assert not [name for name, p in new.named_parameters() if p.requires_grad and p.is_meta]
        new(IDS, labels=IDS).loss.backward()
        assert new.get_model_status().without_gradient == []

    def test_merging_there_is_refused_with_the_way_out_that_works(self, tmp_path: Path) -> None:
        plain = perturb(peftc.compile(llama(), lora("q_proj")))
        plain.save_pretrained(tmp_path / "a")
        compiled = peftc.load(self.offloaded(tmp_path), tmp_path / "a")
        with pytest.raises(peftc.MergeError, match="offloaded its weight; merge_checkpoint merges on disk"):
            compiled.merge_adapter()
        peftc.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
        merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(IDS).logits, plain(IDS).logits)

    def test_what_starts_from_the_weight_says_that_it_is_not_there(self, tmp_path: Path) -> None:
        model = self.offloaded(tmp_path)
        with pytest.raises(peftc.AdapterError, match="offloaded"):
            peftc.compile(model, lora("q_proj", init_lora_weights="pissa"))
        with pytest.raises(peftc.PeftcError, match="offloaded"):
            peftc.compile(model, lora("q_proj", modules_to_save=["lm_head"]))
        assert isinstance(model.model.layers[1].self_attn.q_proj._hf_hook, AlignDevicesHook)


def test_a_model_that_deepspeed_has_taken_apart_is_refused_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    vars(model[1].weight)["ds_id"] = 7  # As ZeRO-3 marks what it partitions.
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(peftc.AdapterError, match=r"1.weight: DeepSpeed's ZeRO-3 .* Use ZeRO-2"):
        peftc.compile(model, peftc.LoraConfig(target_modules=["0"]), inplace=True)
    assert {name: type(module) for name, module in model.named_modules()} == before
