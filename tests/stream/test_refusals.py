"""What merging on disk refuses, what it says, and that nothing is written then."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftc
from peftc.checkpoint.atomic import locked
from peftc.stream import write
from tests.support.checkpoints import adapter_on_disk, assert_same_files, base_on_disk, hashes
from tests.support.models import model_of

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals")
    model = base_on_disk(model_of("llama"), folder)
    adapter_on_disk(model, folder / "adapter", target_modules=["q_proj", "down_proj"])
    merge(folder, folder / "merged", undo=True)
    return folder


@pytest.fixture
def disk(made: Path, tmp_path: Path) -> Path:
    """A copy of a base in shards, an adapter, and the two merged, to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "disk"))


def merge(disk: Path, out: Path, **options: Any) -> None:
    peftc.merge_checkpoint(disk / "base", disk / "adapter", out, progress=False, **options)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def map_to(name: str) -> Callable[[Path], None]:
    def spoil(disk: Path) -> None:
        index = json.loads((disk / "base" / INDEX).read_text())
        index["weight_map"][next(iter(index["weight_map"]))] = name
        (disk / "base" / INDEX).write_text(json.dumps(index))

    return spoil


def link_out(disk: Path) -> None:
    shard = shards(disk / "base")[0]
    (disk / "elsewhere").mkdir()
    shutil.move(shard, disk / "elsewhere" / "file")
    shard.symlink_to(disk / "elsewhere" / "file")


def link_out_config(disk: Path) -> None:
    (disk / "secret").write_text("{}")
    (disk / "base" / "tokenizer.json").symlink_to(disk / "secret")


def cut(disk: Path) -> None:
    os.truncate(shards(disk / "base")[0], 20_000)


def lengthen(disk: Path) -> None:
    with shards(disk / "base")[0].open("ab") as file:
        file.write(b"more")


def html(disk: Path) -> None:
    shards(disk / "base")[0].write_text("<!DOCTYPE html><html>Please log in</html>" * 10)


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def spoil(disk: Path) -> None:
        file = disk / "base" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return spoil


def other_weights(disk: Path) -> None:
    for shard in shards(disk / "base"):
        save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})


def nan(disk: Path) -> None:
    change_adapter(disk, lambda name, tensor: tensor.fill_(float("nan")) if "lora_B" in name else tensor)


def too_large(disk: Path) -> None:
    change_adapter(disk, lambda name, tensor: tensor.fill_(1e30))


def int8(disk: Path) -> None:
    change_adapter(disk, lambda name, tensor: tensor.to(torch.int8))


def unknown_key(disk: Path) -> None:
    change_adapter(
        disk, lambda name, tensor: tensor, {"base_model.model.model.layers.9.mlp.lora_A.weight": torch.ones(2)}
    )


def change_adapter(
    disk: Path, change: Callable[[str, torch.Tensor], torch.Tensor], more: dict[str, torch.Tensor] | None = None
) -> None:
    """By a tool that keeps no manifest."""
    file = disk / "adapter" / "adapter_model.safetensors"
    tensors = {name: change(name, tensor.clone()) for name, tensor in load_file(file).items()}
    save_file({**tensors, **(more or {})}, file)


def flip(disk: Path) -> None:
    file = disk / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def head_of_its_own(disk: Path) -> None:
    model = model_of("llama", auto="AutoModelForSequenceClassification")
    adapter_on_disk(
        model, disk / "adapter", target_modules=["q_proj"], task_type="SEQ_CLS", base_model_name_or_path=None
    )


def prompt(disk: Path) -> None:
    spec = peftc.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peftc.compile(model_of("llama"), spec).save_pretrained(disk / "adapter")


def pickle(disk: Path) -> None:
    file = disk / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), disk / "adapter" / "adapter_model.bin")
    file.unlink()


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a path upwards": (map_to("../adapter/adapter_model.safetensors"), "out of the folder; nothing was read"),
    "an absolute path": (map_to("/etc/model.safetensors"), "out of the folder; nothing was read"),
    "a link out of the folder": (link_out, "link out of the folder"),
    "a tokenizer that is a link out": (link_out_config, "link out of the folder"),
    "a shard that is not there": (map_to("model-9.safetensors"), "lacks the file 'model-9.safetensors'"),
    "no safetensors": (map_to("model.bin"), "no mapping of tensors to safetensors files"),
    "a shard without the tensor": (map_to("model-00002-of-00002.safetensors"), "which does not have it"),
    "a shard cut short": (cut, "it is cut short: 20,000 of"),
    "bytes after the last tensor": (lengthen, "4 bytes follow its last tensor"),
    "an HTML page": (html, "an HTML or XML page"),
    "a config of another size": (edit_config(hidden_size=64), "but config.json makes it"),
    "a config that makes no model": (edit_config(num_attention_heads="many"), "config.json does not make a"),
    "a quantised base": (edit_config(quantization_config={"quant_method": "gptq"}), "is quantised"),
    "other weights": (other_weights, "are not those the adapter was trained on"),
    "NaN": (nan, "holds NaN or Inf"),
    "too large": (too_large, "NaN or Inf"),
    "integers": (int8, "torch.int8, a floating-point tensor is expected"),
    "an unknown key": (unknown_key, "1 unexpected"),
    "a bit flipped": (flip, "are not what was saved"),
    "a head that the base lacks": (head_of_its_own, "score"),
    "a prompt": (prompt, "no part of a weight"),
    "a pickle": (pickle, "A pickle can be loaded, and saved again"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_and_nothing_is_written(fault: str, disk: Path, tmp_path: Path) -> None:
    spoil, message = FAULTS[fault]
    spoil(disk)
    before = hashes(disk)
    with pytest.raises(peftc.PeftcError) as caught:
        merge(disk, tmp_path / "out")
    assert message in str(caught.value)
    assert hashes(disk) == before
    assert not list((tmp_path / "out").glob("*"))


def test_a_snapshot_of_the_hub_is_made_of_links(disk: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "models--user--base"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    for number, file in enumerate((disk / "base").iterdir()):
        shutil.copy(file, cache / "blobs" / str(number))
        (cache / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{number}")
    peftc.merge_checkpoint(cache / "snapshots" / "abc", disk / "adapter", tmp_path / "out", progress=False)
    assert (
        hashes(tmp_path / "out").items()
        >= {name: digest for name, digest in hashes(disk / "merged").items() if name.startswith("model-")}.items()
    )
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


def test_a_folder_with_something_in_it_is_left_alone(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for out in (tmp_path / "out", disk / "base", disk / "merged"):
        before = hashes(out)
        with pytest.raises(peftc.CheckpointError, match="there is something in it already"):
            merge(disk, out)
        assert hashes(out) == before


def test_two_at_once(disk: Path, tmp_path: Path) -> None:
    stage = tmp_path / "out" / ".peftc-merge"
    stage.mkdir(parents=True)
    with locked(stage), pytest.raises(peftc.CheckpointError, match="another process is writing it"):
        merge(disk, tmp_path / "out")
    merge(disk, tmp_path / "out")


def test_arguments(disk: Path, tmp_path: Path) -> None:
    with pytest.raises(peftc.CheckpointError, match="2 weights for 1 adapters"):
        merge(disk, tmp_path / "out", weights=[1, 2])
    with pytest.raises(peftc.CheckpointError, match="no adapter given"):
        peftc.merge_checkpoint(disk / "base", [], tmp_path / "out")
    with pytest.raises(peftc.PeftcError, match="nan"):
        merge(disk, tmp_path / "out", weights=[float("nan")])
    with pytest.raises(peftc.CheckpointError, match="no such folder"):
        peftc.merge_checkpoint(tmp_path / "nowhere", disk / "adapter", tmp_path / "out")
    with pytest.raises(peftc.CheckpointError, match=r"holds no model\.safetensors"):
        peftc.merge_checkpoint(disk / "adapter", disk / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verify", ["files", "nothing"])
def test_another_base_can_be_meant(verify: Any, disk: Path, tmp_path: Path) -> None:
    other_weights(disk)
    merge(disk, tmp_path / "out", verify=verify)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_full_disk_is_told_before_anything_is_written(disk: Path, small_disk: Path) -> None:
    with pytest.raises(peftc.CheckpointError, match=r"\d+ bytes are needed and [\d,]+ are free; nothing was written"):
        merge(disk, small_disk / "out")
    assert not list(small_disk.iterdir())


def test_a_disk_that_can_only_be_read(disk: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro,size=100m", str(small_disk)], check=True)
    with pytest.raises(peftc.CheckpointError, match=r"Read-only file system|are free"):
        merge(disk, small_disk / "out")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_in_the_midst_keeps_what_was_done(
    code: int, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "EVERY", 4000)
    real, left = os.pwrite, [12]

    def failing(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(peftc.CheckpointError, match=rf"can't merge .*{os.strerror(code)}"):
            merge(disk, tmp_path / "out", undo=True)
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".peftc-merge"]
    merge(disk, tmp_path / "out", undo=True)
    peftc.merge_checkpoint(disk / "base", disk / "adapter", tmp_path / "other", undo=True, progress=False)
    assert_same_files(tmp_path / "out", tmp_path / "other")


def flip_at(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


UNDO_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no undo": (lambda merged: shutil.rmtree(merged / "peftc_undo"), "was not merged with undo=True"),
    "no log": (lambda merged: next((merged / "peftc_undo").glob("*.log")).unlink(), "lacks the file"),
    "a log cut short": (
        lambda merged: os.truncate(next((merged / "peftc_undo").glob("*1-of*.log")), 300),
        "log",
    ),
    "a flipped bit in a log": (lambda merged: flip_at(next((merged / "peftc_undo").glob("*1-of*.log")), 200), "log"),
    "a flipped bit in a factor": (
        lambda merged: flip_at(merged / "peftc_undo" / "adapter0" / "adapter_model.safetensors", -5),
        "are not what was saved",
    ),
    "a config that was edited": (
        lambda merged: flip_at(merged / "generation_config.json", 3),
        "changed since the merge",
    ),
    "a header of the base": (
        lambda merged: next((merged / "peftc_undo" / "originals").glob("*.header")).write_bytes(b"x"),
        "is damaged",
    ),
}


@pytest.mark.parametrize("fault", UNDO_FAULTS)
def test_what_undoing_refuses(fault: str, disk: Path, tmp_path: Path) -> None:
    spoil, message = UNDO_FAULTS[fault]
    spoil(disk / "merged")
    with pytest.raises(peftc.CheckpointError, match=message):
        peftc.unmerge_checkpoint(disk / "merged", tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").glob("*"))


def test_a_merged_weight_that_was_trained_on_is_refused(disk: Path, tmp_path: Path) -> None:
    shard = shards(disk / "merged")[0]
    tensors = load_file(shard)
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][0, 0] += 1
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(peftc.CheckpointError, match=f"{name}: is not what the merge wrote"):
        peftc.unmerge_checkpoint(disk / "merged", tmp_path / "out", progress=False)
