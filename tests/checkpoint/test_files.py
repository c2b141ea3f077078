"""Files: PEFT's names and keys, whole or not at all, and clear words for what does not fit."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import peftc
from tests.support.adapters import perturb, saved
from tests.support.models import Everything, llama, tiny, token_ids
from tests.support.snapshots import assert_unchanged, snapshot


def test_the_files_are_those_of_peft(tmp_path: Path) -> None:
    saved(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert list(config) == sorted(config)
    assert (config["peft_type"], config["inference_mode"], config["r"]) == ("LORA", True, 2)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert set(file.metadata()) == {"format", "peftc"}
        keys = set(file.keys())
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert len(keys) == 12


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        saved(tmp_path)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o644}


def test_other_adapters_go_to_subfolders(tmp_path: Path) -> None:
    specs = {name: peftc.LoraConfig(target_modules=["linear"], r=2) for name in ("default", "b")}
    model = Everything().eval()
    compiled = perturb(peftc.compile(model, specs))
    compiled.save_pretrained(tmp_path)
    assert (tmp_path / "b" / "adapter_model.safetensors").is_file()
    again = peftc.load(model, tmp_path, subfolder="b", adapter_name="b")
    assert again.active_adapters == ["b"]
    for key, tensor in compiled.adapter_state_dict("b").items():
        assert torch.equal(again.adapter_state_dict("b")[key], tensor)
    compiled.save_pretrained(tmp_path / "one", selected_adapters=["b"])
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["b"]


def test_saving_over_an_adapter_replaces_it_and_keeps_the_card(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    compiled = saved(tmp_path, r=3)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == compiled.adapter_state_dict().keys()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(peftc.CheckpointError, match=r"can't write .* \([\d,]+ bytes needed\)"):
        saved(tmp_path / "file" / "adapter")


def test_loading_is_for_inference_unless_asked(tmp_path: Path) -> None:
    compiled = saved(tmp_path, lora_dropout=0.5)
    again = peftc.load(llama().train(), tmp_path)
    assert not again.training
    assert again.get_nb_trainable_parameters()[0] == 0
    trainable = peftc.load(llama(), tmp_path, is_trainable=True)
    assert trainable.get_nb_trainable_parameters() == compiled.get_nb_trainable_parameters()


def _edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


FAULTS: dict[str, tuple[Any, str]] = {
    "missing": (lambda t: t.pop(next(iter(t))), r"1 missing:\n +base_model\.model\.model\.layers\.0\.self_attn"),
    "unexpected": (
        lambda t: t.update({"base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight": torch.ones(2, 32)}),
        r"1 unexpected:\n.*k_proj\.lora_A\.weight\n  Nearest to .*: .*_proj\.lora_A\.weight",
    ),
    "shape": (
        lambda t: t.update({next(iter(t)): torch.ones(3, 3)}),
        r"1 mis-shaped:\n.* \[3, 3\], here \[2, 32\]",
    ),
    "nan": (lambda t: next(iter(t.values())).fill_(float("nan")), "holds NaN or Inf"),
    "integers": (lambda t: t.update({next(iter(t)): torch.ones(2, 32, dtype=torch.int8)}), "a floating-point tensor"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_tensors_that_do_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    _edit(tmp_path, change)
    model = llama()
    before = snapshot(model)
    with pytest.raises(peftc.CheckpointError, match=message):
        peftc.load(model, tmp_path, inplace=True)
    assert_unchanged(model, before)
    compiled = peftc.compile(model, peftc.LoraConfig(target_modules=["o_proj"]), "mine")
    before = snapshot(compiled)
    with pytest.raises(peftc.CheckpointError, match=message):
        compiled.load_adapter(tmp_path, "theirs")
    assert_unchanged(compiled, before)
    assert list(compiled.peft_config) == ["mine"]


@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff" * 64, b"\x08\x00\x00\x00\x00\x00\x00\x00{}"])
def test_files_that_are_no_safetensors(content: bytes, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(peftc.CheckpointError):
        peftc.load(llama(), tmp_path)


def test_a_truncated_file(tmp_path: Path) -> None:
    compiled = saved(tmp_path)
    loaded = peftc.load(llama(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(peftc.CheckpointError, match="not a readable safetensors file"):
        peftc.load(llama(), tmp_path)
    for key, tensor in compiled.adapter_state_dict().items():
        assert torch.equal(loaded.adapter_state_dict()[key], tensor)


def test_where_there_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(peftc.CheckpointError, match="neither a folder here nor a Hub repository"):
        peftc.load(llama(), tmp_path / "nowhere")
    with pytest.raises(peftc.SpecError, match="no such file"):
        peftc.load(llama(), tmp_path)
    saved(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(peftc.CheckpointError, match=r"holds no adapter_model\.safetensors"):
        peftc.load(llama(), tmp_path)


def test_pickles_are_read_on_request_only(tmp_path: Path) -> None:
    compiled = saved(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    with pytest.raises(peftc.CheckpointError, match="allow_pickle=True"):
        peftc.load(llama(), tmp_path)
    again = peftc.load(llama(), tmp_path, allow_pickle=True)
    for key, tensor in compiled.adapter_state_dict().items():
        assert torch.equal(again.adapter_state_dict()[key], tensor)
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(peftc.CheckpointError, match="weights_only=True"):
        peftc.load(llama(), tmp_path, allow_pickle=True)


def test_an_embedding_that_peft_saved_along(tmp_path: Path) -> None:
    """peft writes whole embeddings that are targets; the same as the base's are passed by, others taken over."""
    model, ids = llama(), token_ids(2, 5, 64)
    spec = peftc.LoraConfig(target_modules=["embed_tokens"], r=2)
    compiled = perturb(peftc.compile(model, spec))
    compiled.save_pretrained(tmp_path)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    _edit(tmp_path, lambda t: t.update({key: model.model.embed_tokens.weight.detach().clone()}))
    assert torch.equal(peftc.load(model, tmp_path)(ids).logits, compiled(ids).logits)
    _edit(tmp_path, lambda t: t.update({key: model.model.embed_tokens.weight.detach() + 1}))
    before = snapshot(model)
    with pytest.warns(UserWarning, match=r"model\.embed_tokens\.weight: the adapter brings its own"):
        other = peftc.load(model, tmp_path)
    assert torch.equal(other.base.model.embed_tokens.weight, model.model.embed_tokens.weight + 1)
    assert_unchanged(model, before)
    assert torch.equal(other.unload()(ids).logits, model(ids).logits)
    _edit(tmp_path, lambda t: t.update({key: torch.ones(3, 32)}))
    with pytest.raises(peftc.CheckpointError, match="resize_token_embeddings"):
        peftc.load(model, tmp_path)


def test_embeddings_that_an_adapter_brings_come_and_go_with_it(tmp_path: Path) -> None:
    model, ids = tiny("llama", tie_word_embeddings=False), token_ids(2, 5, 64)
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(target_modules=["embed_tokens"], r=2), "mine"))
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    for name, shift in (("first", 1), ("second", -2)):
        compiled.save_pretrained(tmp_path / name)
        _edit(
            tmp_path / name / "mine", lambda t, s=shift: t.update({key: model.model.embed_tokens.weight.detach() + s})
        )
    y, weight = compiled(ids).logits, compiled.base.model.embed_tokens.weight
    for name in ("first", "second"):
        with pytest.warns(UserWarning, match="in the place of the base model's while it is active"):
            compiled.load_adapter(tmp_path / name / "mine", name)
    assert torch.equal(compiled(ids).logits, y)
    for names, shift in ((["first"], 1), (["first", "second"], -2), (["mine", "first"], 1), (["mine"], 0)):
        compiled.set_adapter(names)
        assert torch.equal(weight, model.model.embed_tokens.weight + shift), names
        with compiled.disable_adapter():
            assert torch.equal(compiled(ids).logits, model(ids).logits)
    with pytest.raises(peftc.AdapterError, match="brings embeddings of its own"):
        compiled(ids, adapter_names=["mine", "first"])
    compiled.set_adapter("second")
    compiled.delete_adapter("second")
    assert compiled.active_adapters == ["mine"]
    assert torch.equal(compiled(ids).logits, y)
    compiled.set_adapter("first")
    compiled.merge_adapter()
    compiled.unmerge_adapter()
    assert torch.equal(weight, model.model.embed_tokens.weight + 1)
    assert torch.equal(compiled.unload()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_special_inits_reload_to_the_same_function(init: str, tmp_path: Path) -> None:
    model, ids = Everything().eval(), token_ids()
    compiled = peftc.compile(
        model, peftc.LoraConfig(target_modules=["linear", "transposed"], r=4, init_lora_weights=init)
    )
    torch.testing.assert_close(compiled(ids), model(ids))
    with torch.no_grad():
        compiled.base.linear.lora_A.default.weight.add_(0.1)
    compiled.save_pretrained(tmp_path)
    again = peftc.load(model, tmp_path)
    assert torch.equal(again(ids), compiled(ids))
    y = compiled(ids)
    compiled.merge_adapter()
    torch.testing.assert_close(compiled(ids), y)
    with again.disable_adapter():
        assert torch.equal(again(ids), model(ids))


def test_meta_models_compile_and_load_nothing_but_shapes() -> None:
    with torch.device("meta"):
        model = llama()
    compiled = peftc.compile(model, peftc.LoraConfig(target_modules="all-linear"))
    assert compiled.base.model.layers[0].mlp.up_proj.lora_A.default.weight.is_meta
    compiled.merge_adapter()
    compiled.unmerge_adapter()
    assert compiled.unload() is not model
