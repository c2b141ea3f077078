"""Checkpoints as people have them: ties stored twice, tensors the index does not know, no class, an adapter inside."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftc
from peftc.stream import job, layout, merge, work
from tests.support.checkpoints import (
    adapter_on_disk,
    assert_same_files,
    base_on_disk,
    hashes,
    merged_in_memory,
    on_disk,
)
from tests.support.models import model_of

INDEX = "model.safetensors.index.json"


def merged(base: Path, adapter: Any, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    peftc.merge_checkpoint(base, adapter, out, progress=False, **options)
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


def edit_config(base: Path, **fields: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("architectures", [None, [], ["MyGPT2LMHeadModel"], ["PreTrainedModel"]], ids=str)
def test_a_class_that_is_not_known_has_to_be_given(architectures: Any, tmp_path: Path) -> None:
    model = base_on_disk(model_of("gpt2"), tmp_path)
    adapter = adapter_on_disk(model, tmp_path / "adapter", target_modules=["c_attn", "c_proj"])
    expected = merged(tmp_path / "base", adapter, tmp_path / "expected")
    edit_config(tmp_path / "base", architectures=architectures)
    with pytest.raises(peftc.CheckpointError, match=r"Pass model=|does not make a"):
        merged(tmp_path / "base", adapter, tmp_path / "out")
    found = merged(tmp_path / "base", adapter, tmp_path / "out", model=model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_square_weights_lie_as_those_beside_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(12, 8), Conv1D(12, 12))
    adapter = adapter_on_disk(model, tmp_path / "adapter", r=2, target_modules=["0", "1"])
    found = merged(on_disk(model, tmp_path / "base"), adapter, tmp_path / "out")
    expected = peftc.load(model, adapter).merge_and_unload().state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_given_model_is_tied_as_it_is(tmp_path: Path) -> None:
    model = base_on_disk(model_of("gpt2"), tmp_path)
    adapter = adapter_on_disk(model, tmp_path / "adapter", target_modules=["wte"])
    with pytest.raises(peftc.MergeError, match="untie=True"):
        merged(tmp_path / "base", adapter, tmp_path / "out", model=model)
    found = merged(tmp_path / "base", adapter, tmp_path / "out", model=model, untie=True)
    assert not torch.equal(found["lm_head.weight"], found["transformer.wte.weight"])
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def both_stored(tmp_path: Path, one: str, other: str) -> None:
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, other: tensors[one].clone()}, file, {"format": "pt"})


def test_both_ends_of_a_tie_are_stored(tmp_path: Path) -> None:
    model = base_on_disk(model_of("bert"), tmp_path, "5GB")
    adapter = adapter_on_disk(model, tmp_path / "adapter", target_modules=["query"], bias="all")
    expected = merged(tmp_path / "base", adapter, tmp_path / "expected")
    both_stored(tmp_path, "cls.predictions.bias", "cls.predictions.decoder.bias")
    found = merged(tmp_path / "base", adapter, tmp_path / "out", undo=True)
    assert torch.equal(found["cls.predictions.bias"], expected["cls.predictions.bias"])
    assert torch.equal(found["cls.predictions.decoder.bias"], expected["cls.predictions.bias"])
    peftc.unmerge_checkpoint(tmp_path / "out", tmp_path / "back", progress=False)
    assert_same_files(tmp_path / "back", tmp_path / "base")


def test_a_tie_that_is_stored_twice_is_cut(tmp_path: Path) -> None:
    model = base_on_disk(model_of("gpt2"), tmp_path, "5GB")
    adapter = adapter_on_disk(model, tmp_path / "adapter", target_modules=["wte"])
    both_stored(tmp_path, "transformer.wte.weight", "lm_head.weight")
    before = load_file(tmp_path / "base" / "model.safetensors")
    found = merged(tmp_path / "base", adapter, tmp_path / "out", untie=True)
    assert torch.equal(found["lm_head.weight"], before["lm_head.weight"])
    assert not torch.equal(found["transformer.wte.weight"], before["transformer.wte.weight"])
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("adapted", [False, True], ids=["untouched", "adapted"])
def test_tensors_that_the_index_does_not_count(adapted: bool, tmp_path: Path) -> None:
    """One that is nobody's, and one that is stored in two shards."""
    model = base_on_disk(model_of("llama", torch.bfloat16), tmp_path, "20KB")
    adapter = adapter_on_disk(model, tmp_path / "adapter", target_modules=["q_proj"])
    merged_in_memory(tmp_path / "base", type(model), [adapter], tmp_path / "memory", shard="20KB")
    where = json.loads((tmp_path / "base" / INDEX).read_text())["weight_map"]
    twice = next(name for name in where if ("q_proj" if adapted else "o_proj") in name)
    shard = next(file for file in sorted((tmp_path / "base").glob("model-*")) if file.name != where[twice])
    stale = torch.full_like(dict(model.state_dict())[twice], 3)
    save_file({**load_file(shard), "rotary.inv_freq": torch.ones(7), twice: stale}, shard, {"format": "pt"})
    peftc.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", undo=True, progress=False)
    expected = load_file(tmp_path / "memory" / where[twice])[twice]
    assert torch.equal(load_file(tmp_path / "out" / where[twice])[twice], expected)
    assert torch.equal(load_file(tmp_path / "out" / shard.name)[twice], stale)
    peftc.unmerge_checkpoint(tmp_path / "out", tmp_path / "back", progress=False)
    assert_same_files(tmp_path / "back", tmp_path / "base")


def test_an_embedding_that_the_base_lacks_is_not_dropped(tmp_path: Path) -> None:
    model = base_on_disk(model_of("llama"), tmp_path, "5GB")
    compiled = peftc.compile(model, peftc.LoraConfig(target_modules=["q_proj"]))
    compiled.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    file = tmp_path / "base" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "lm_head.weight"}, file, {"format": "pt"})
    with (
        pytest.warns(UserWarning, match="brings its own"),
        pytest.raises(peftc.CheckpointError, match=r"has no tensor lm_head\.weight"),
    ):
        merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify="files")


def test_an_adapter_in_the_folder_of_its_base(tmp_path: Path) -> None:
    model = base_on_disk(model_of("llama"), tmp_path)
    adapter_on_disk(model, tmp_path / "base", target_modules=["q_proj"])
    merged(tmp_path / "base", tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    type(model).from_pretrained(tmp_path / "out")


def test_experts_that_do_not_fit_each_other(tmp_path: Path) -> None:
    model = base_on_disk(model_of("mixtral"), tmp_path, "5GB")
    adapter = adapter_on_disk(model, tmp_path / "adapter", target_parameters=["experts.gate_up_proj"])
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("experts.0.w1.weight"))
    for wrong in (tensors[name].bfloat16(), tensors[name].to(torch.int8), tensors[name][1:], None):
        changed = {key: value for key, value in {**tensors, name: wrong}.items() if value is not None}
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(peftc.CheckpointError, match="experts"):
            merged(tmp_path / "base", adapter, tmp_path / "out", verify="nothing")
        assert not (tmp_path / "out" / "config.json").exists()


def test_an_index_with_metadata_of_its_own(tmp_path: Path) -> None:
    model = base_on_disk(model_of("gpt2"), tmp_path, "20KB")
    adapter = adapter_on_disk(model, tmp_path / "adapter", target_modules=["wte"])
    for i, metadata in enumerate(({"mergekit_version": "0.0.4"}, {"total_size": "123"}, None, [])):
        index = json.loads((tmp_path / "base" / INDEX).read_text())
        (tmp_path / "base" / INDEX).write_text(json.dumps({**index, "metadata": metadata}))
        merged(tmp_path / "base", adapter, tmp_path / f"out{i}", untie=True)
        assert json.loads((tmp_path / f"out{i}" / INDEX).read_text())["metadata"] == metadata


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    model = base_on_disk(model_of("llama", torch.bfloat16), tmp_path, "20KB")
    adapter_on_disk(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    return tmp_path


def test_weights_of_any_kind(disk: Path) -> None:
    merged(disk / "base", [disk / "adapter"], disk / "one", weights=[np.float32(0.5)])
    merged(disk / "base", [disk / "adapter"], disk / "two", weights=np.array([0.5]))
    assert_same_files(disk / "one", disk / "two")
    for weights in (["a"], [None], 3):
        with pytest.raises(peftc.CheckpointError, match="a number for each adapter"):
            merged(disk / "base", [disk / "adapter"], disk / "out", weights=weights)


def test_what_is_done_is_known_by_any_path_to_it(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged(disk / "base", disk / "adapter", disk / "out")
    before = hashes(disk / "out")
    monkeypatch.chdir(disk)
    (disk / "link").symlink_to(disk / "base")
    for base in ("base", "base/", "./link"):
        merged(Path(base), "adapter", Path("out"))
    assert hashes(disk / "out") == before
    next((disk / "out").glob("model-*.safetensors")).unlink()
    with pytest.raises(peftc.CheckpointError, match="there is something in it already"):
        merged(disk / "base", disk / "adapter", disk / "out")


def test_a_base_that_changes_while_it_is_merged(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = job._write_outputs

    def writing(*args: Any) -> None:
        real(*args)
        shard = next((disk / "base").glob("model-*.safetensors"))
        shard.write_bytes(shard.read_bytes())

    monkeypatch.setattr(job, "_write_outputs", writing)
    with pytest.raises(peftc.CheckpointError, match="were changed meanwhile"):
        merged(disk / "base", disk / "adapter", disk / "out")
    assert not list((disk / "out").iterdir())


def test_another_process_that_was_faster(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = merge.thought_through

    def slow(*args: Any) -> Any:
        found = real(*args)
        monkeypatch.setattr(merge, "thought_through", real)
        merged(disk / "base", [disk / "adapter"], disk / "out", weights=[0.5])
        return found

    monkeypatch.setattr(merge, "thought_through", slow)
    with pytest.raises(peftc.CheckpointError, match="another process has written it meanwhile"):
        merged(disk / "base", disk / "adapter", disk / "out")
    merged(disk / "base", [disk / "adapter"], disk / "expected", weights=[0.5])
    assert_same_files(disk / "out", disk / "expected")


@pytest.mark.parametrize("spoil", ["cut", "gone", "far", "odd"])
def test_a_stage_that_is_not_what_it_says(spoil: str, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a file is begun anew."""
    merged(disk / "base", disk / "adapter", disk / "expected")
    with monkeypatch.context() as patch:
        patch.setattr(job, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            merged(disk / "base", disk / "adapter", disk / "out")
    stage = disk / "out" / ".peftc-merge"
    shard, progress = next((stage / "files").glob("model-*")), json.loads((stage / "progress.json").read_text())
    if spoil == "cut":
        shard.write_bytes(b"")
    elif spoil == "gone":
        shard.unlink()
    else:
        progress[shard.name]["pieces"] = 10**6 if spoil == "far" else "a"
        shard.write_bytes(b"")
        (stage / "progress.json").write_text(json.dumps(progress))
    merged(disk / "base", disk / "adapter", disk / "out")
    assert_same_files(disk / "out", disk / "expected")


@pytest.mark.parametrize("where", ["files", "adapters", "shards", "originals is a link", "version", "no tile"])
def test_undo_files_that_lead_out_of_the_folder(where: str, disk: Path) -> None:
    merged(disk / "base", disk / "adapter", disk / "out", undo=True)
    undo = disk / "out" / "peftc_undo"
    told = json.loads((undo / "undo.json").read_text())
    if where == "files":
        told["files"]["../evil.txt"] = "0"
    elif where == "adapters":
        told["adapters"] = ["../../adapter"]
    elif where == "shards":
        told["shards"]["/etc/x"] = 3
    elif where == "version":
        told["version"] = 2
    elif where == "no tile":
        told.pop("tile")
    else:
        shutil.move(undo / "originals", disk / "elsewhere")
        (undo / "originals").symlink_to(disk / "elsewhere")
    (undo / "undo.json").write_text(json.dumps(told))
    with pytest.raises(peftc.CheckpointError, match=r"out of the folder|is damaged"):
        peftc.unmerge_checkpoint(disk / "out", disk / "back", progress=False)
    assert not (disk / "evil.txt").exists()


def test_several_blocks(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = merged(disk / "base", disk / "adapter", disk / "expected")
    monkeypatch.setattr(layout, "BLOCK", 1100)
    monkeypatch.setattr(work.fold, "TILE", 256)
    found = merged(disk / "base", disk / "adapter", disk / "out", undo=True)
    assert {name: bool(torch.allclose(found[name], value)) for name, value in expected.items()} == dict.fromkeys(
        found, True
    )
    peftc.unmerge_checkpoint(disk / "out", disk / "back", progress=False)
    assert_same_files(disk / "back", disk / "base")
