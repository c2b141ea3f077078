"""Broken files, wrong bases, full disks: what a user is told, and that neither the model nor a file was changed."""

import errno
import json
import os
import shutil
import struct
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftc
from peftc.checkpoint import atomic
from tests.support.adapters import saved
from tests.support.checkpoints import hashes
from tests.support.models import llama, tiny
from tests.support.snapshots import assert_unchanged, snapshot

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Spoil = Callable[[Path], None]


def rewritten(change: Callable[[bytearray], Any], name: str = WEIGHTS) -> Spoil:
    """A change of the bytes of a file: in place, or what `change` returns."""

    def spoil(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        returned = change(content)
        (folder / name).write_bytes(content if returned is None else returned)

    return spoil


def flip(position: int, name: str = WEIGHTS) -> Spoil:
    def change(content: bytearray) -> None:
        content[position] ^= 1

    return rewritten(change, name)


def header(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """A change of what a file says of itself."""

    def changed(content: bytearray) -> bytes:
        length = int.from_bytes(content[:8], "little")
        items = json.loads(content[8 : 8 + length])
        change(items)
        text = json.dumps(items).encode()
        return struct.pack("<Q", len(text)) + text + bytes(content[8 + length :])

    return rewritten(changed)


def manifest(change: Callable[[str], str]) -> Spoil:
    return header(lambda items: items["__metadata__"].update(peftc=change(items["__metadata__"]["peftc"])))


def tensors(change: Callable[[dict[str, Tensor]], Any], keep_manifest: bool = False) -> Spoil:
    """A change of the tensors, by a tool that keeps the metadata, or one that does not."""

    def spoil(folder: Path) -> None:
        with safe_open(folder / WEIGHTS, "pt") as file:
            metadata = file.metadata() if keep_manifest else None
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, metadata)

    return spoil


def config(**fields: Any) -> Spoil:
    return rewritten(lambda content: json.dumps({**json.loads(content), **fields}).encode(), CONFIG)


def first(found: dict[str, Tensor]) -> str:
    return next(iter(found))


def overlap(items: dict[str, Any]) -> None:
    names = [name for name in items if name != "__metadata__"]
    items[names[1]]["data_offsets"] = items[names[0]]["data_offsets"]


FAULTS: dict[str, tuple[Spoil, str]] = {
    # Not the file that was meant, or not all of it.
    "an empty file": (rewritten(lambda _: b""), "0 bytes, not even a header's length"),
    "a file cut short": (rewritten(lambda content: content[:-100]), "it is cut short"),
    "cut within the header": (rewritten(lambda content: content[:60]), "its header would have"),
    "bytes after the last tensor": (rewritten(lambda content: content + b"more"), "4 bytes follow its last tensor"),
    "an HTML page": (rewritten(lambda _: b"<!DOCTYPE html><html>Please log in</html>"), "an HTML or XML page"),
    "a Git LFS pointer": (rewritten(lambda _: b"version https://git-lfs.github.com/spec/v1\noid x"), "git lfs pull"),
    "a pickle": (rewritten(lambda _: b"\x80\x02}q\x00." * 9), "it is a pickle"),
    "a zip archive": (rewritten(lambda _: b"PK\x03\x04" * 9), "a zip archive, probably a pickle"),
    "a GGUF file": (rewritten(lambda _: b"GGUF\x03\0\0\0" * 9), "a GGUF file"),
    # A header that lies.
    "a huge header": (rewritten(lambda content: struct.pack("<Q", 2**62) + content[8:]), "its header would have"),
    "a header that is no JSON": (rewritten(lambda c: c[:8] + b"[" * (len(c) - 8)), "not a readable safetensors file"),
    "overlapping tensors": (header(overlap), "does not begin where those before it end"),
    "negative offsets": (header(lambda h: h[list(h)[1]].update(data_offsets=[-8, 0])), "is not dtype, shape and"),
    "a shape beyond the data": (header(lambda h: h[list(h)[1]].update(shape=[2**40, 2**40])), "is not 256 bytes"),
    "an unknown dtype": (header(lambda h: h[list(h)[1]].update(dtype="F12")), "torch has no dtype F12"),
    "metadata of numbers": (header(lambda h: h.update(__metadata__={"format": 1})), "no mapping of texts"),
    # What was saved is not what is there.
    "a bit of a weight": (flip(-5), "1 of 12 tensors are not what was saved: base_model.model.model.layers.2"),
    "a weight that was swapped": (
        tensors(lambda t: t.update({first(t): t[first(t)].flip(0)}), keep_manifest=True),
        "1 of 12 tensors are not what was saved: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    ),
    "a tensor less than the manifest has": (tensors(lambda t: t.pop(first(t)), True), "1 of 12 tensors are not"),
    "a bit of the manifest": (manifest(lambda text: text[:-9] + "x" + text[-8:]), "its manifest is damaged"),
    "an edited alpha": (config(lora_alpha=64), "lora_alpha is 64, was 8. Put it back"),
    "an edited target": (config(target_modules=["k_proj", "v_proj"]), "target_modules is"),
    "the config of another save": (config(r=4, use_rslora=True), "r is 4, was 2; use_rslora is True, was False"),
    # A config that can't be read.
    "a config that is no JSON": (rewritten(lambda content: content[:-30], CONFIG), "not valid JSON"),
    "a config that is a list": (rewritten(lambda _: b"[1, 2]", CONFIG), "holds a list, expected a mapping"),
    "a config that nests for ever": (rewritten(lambda _: b"[" * 100_000, CONFIG), "not valid JSON"),
    "a config of 17 MiB": (rewritten(lambda _: b" " * (17 << 20), CONFIG), "it is over 16,777,216 bytes"),
    "an unknown method": (config(peft_type="LORRA"), "Nearest: 'LORA'"),
    "a rank that is a text": (config(r="8"), "did you mean 8, without quotes?"),
    # Tensors that can't be meant, in a file without a manifest.
    "NaN": (tensors(lambda t: t[first(t)].fill_(float("nan"))), "holds NaN or Inf"),
    "Inf in one entry": (tensors(lambda t: t[first(t)][1, 3].fill_(float("inf"))), "holds NaN or Inf"),
    "int8": (tensors(lambda t: t.update({first(t): t[first(t)].to(torch.int8)})), "torch.int8, a floating-point"),
    "an unknown key": (tensors(lambda t: t.update(more=torch.ones(2))), "1 unexpected"),
    "a missing key": (tensors(lambda t: t.pop(first(t))), "1 missing"),
    "no tensors": (tensors(dict.clear), "12 missing"),
    "another shape": (tensors(lambda t: t.update({first(t): torch.ones(2, 31)})), "[2, 31], here [2, 32]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_and_nothing_is_changed(fault: str, tmp_path: Path) -> None:
    spoil, message = FAULTS[fault]
    saved(tmp_path)
    spoil(tmp_path)
    model, files = llama(), hashes(tmp_path)
    compiled = peftc.compile(model, peftc.LoraConfig(target_modules=["q_proj"], r=3), "mine")
    before, original = snapshot(compiled), snapshot(model)
    for load in (lambda: compiled.load_adapter(tmp_path, "theirs"), lambda: peftc.load(model, tmp_path, inplace=True)):
        with pytest.raises(peftc.PeftcError) as caught:
            load()
        assert message in str(caught.value)
        assert str(tmp_path) in str(caught.value)
    assert_unchanged(compiled, before)
    assert_unchanged(model, original)
    assert list(compiled.peft_config) == ["mine"]
    assert hashes(tmp_path) == files


@pytest.mark.parametrize("fault", ["a bit of a weight", "a bit of the manifest", "an edited alpha"])
def test_what_the_manifest_says_can_be_overridden(fault: str, tmp_path: Path) -> None:
    saved(tmp_path)
    FAULTS[fault][0](tmp_path)
    with pytest.raises(peftc.CheckpointError, match="verify='nothing'"):
        peftc.load(llama(), tmp_path, verify="files")
    loaded = peftc.load(llama(), tmp_path, verify="nothing")
    assert loaded.peft_config["default"].to_dict()["lora_alpha"] == (64 if "alpha" in fault else 8)


def test_the_config_may_name_another_place(tmp_path: Path) -> None:
    saved(tmp_path)
    config(base_model_name_or_path="/moved/here", revision="v2")(tmp_path)
    assert peftc.load(llama(), tmp_path).active_adapters == ["default"]


def test_files_of_another_version_of_the_manifest_load(tmp_path: Path) -> None:
    """As files without one; a later peftc may say more than is understood here."""
    saved(tmp_path)

    def later(text: str) -> str:
        import hashlib

        new = json.dumps({**json.loads(text.partition(" ")[2]), "version": 2})
        return f"{hashlib.sha256(new.encode()).hexdigest()[:32]} {new}"

    manifest(later)(tmp_path)
    assert peftc.load(llama(), tmp_path).active_adapters == ["default"]


def other(change: Callable[[Any], Any]) -> Callable[[], Any]:
    def made() -> Any:
        model = llama()
        with torch.no_grad():
            change(model)
        return model

    return made


BASES: dict[str, tuple[Callable[[], Any], str]] = {
    "other weights": (other(lambda model: [p.add_(0.01) for p in model.parameters()]), "not those the adapter was"),
    "the adapted weights": (
        other(lambda model: [p.mul_(1.1) for name, p in model.named_parameters() if "proj" in name]),
        "sampled weights of the base model are not those",
    ),
    "another architecture": (
        lambda: tiny("mistral", num_hidden_layers=3),
        "The adapter's base was LlamaForCausalLM (llama)",
    ),
}


@pytest.mark.parametrize("base", BASES)
def test_another_base_is_refused_unless_it_is_meant(base: str, tmp_path: Path) -> None:
    make, message = BASES[base]
    saved(tmp_path)
    model = make()
    before = snapshot(model)
    with pytest.raises(peftc.CheckpointError) as caught:
        peftc.load(model, tmp_path, inplace=True)
    assert message in str(caught.value)
    assert "verify='files'" in str(caught.value)
    assert_unchanged(model, before)
    assert peftc.load(model, tmp_path, verify="files").active_adapters == ["default"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_base_in_another_dtype_is_the_base(dtype: torch.dtype, tmp_path: Path) -> None:
    compiled = saved(tmp_path)
    loaded = peftc.load(llama().to(dtype), tmp_path)
    assert loaded.adapter_state_dict().keys() == compiled.adapter_state_dict().keys()


def test_a_part_that_differs_is_a_caution(tmp_path: Path) -> None:
    saved(tmp_path)
    model = other(lambda model: model.lm_head.weight.add_(1))()
    with pytest.warns(UserWarning, match=r"1 of \d+ sampled weights .*: lm_head\.weight"):
        loaded = peftc.load(model, tmp_path)
    assert loaded.active_adapters == ["default"]


def test_a_merged_base_is_known_by_what_it_was(tmp_path: Path) -> None:
    """Saved and loaded while another adapter is merged: the base is that under it."""
    saved(tmp_path / "one")
    compiled = saved(tmp_path / "two", target_modules=["q_proj"])
    compiled.merge_adapter()
    compiled.save_pretrained(tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peftc.load(llama(), tmp_path / "merged")
    assert loaded.active_adapters == ["default"]
    assert peftc.load(llama(), tmp_path / "merged").active_adapters == ["default"]
    compiled.unmerge_adapter()
    compiled.load_adapter(tmp_path / "one", "one")


def test_narrower_tensors_are_told(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors(lambda t: t.update({key: value.double() for key, value in t.items()}))(tmp_path)
    compiled = peftc.compile(llama(), peftc.LoraConfig(target_modules=["o_proj"]))
    with pytest.warns(UserWarning, match=r"12 tensors are rounded from float64 to float32"):
        result = compiled.load_adapter(tmp_path, "b")
    assert set(result.casts.values()) == {("float64", "float32")}


def test_without_strictness_what_fits_is_taken_and_the_rest_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    compiled = saved(tmp_path)
    key = next(iter(compiled.adapter_state_dict()))
    tensors(lambda t: (t.pop(key), t.update(more=torch.ones(2))))(tmp_path)
    model = peftc.compile(llama(), peftc.LoraConfig(target_modules=["o_proj"]))
    # Memory that is left as it is would hold NaN.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    with pytest.warns(UserWarning, match="1 missing"):
        result = model.load_adapter(tmp_path, "b", strict=False)
    assert (result.missing_keys, result.unexpected_keys, result.fits) == ((key,), ("more",), False)
    for name, value in compiled.adapter_state_dict().items():
        loaded = model.adapter_state_dict("b")[name]
        assert torch.equal(loaded, value) == (name != key)
        assert bool(torch.isfinite(loaded).all())


def test_no_import_that_a_config_names_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "adapter"
    saved(folder)
    trap = {"base_model_class": "Trap", "parent_library": "trap"}
    config(auto_mapping=trap, base_model_name_or_path="trap", megatron_core="trap")(folder)
    assert peftc.load(llama(), folder, verify="nothing").active_adapters == ["default"]


def test_a_loaded_adapter_does_not_need_its_file(tmp_path: Path) -> None:
    compiled = saved(tmp_path)
    loaded = peftc.load(llama(), tmp_path)
    os.truncate(tmp_path / WEIGHTS, 0)
    for key, value in compiled.adapter_state_dict().items():
        assert torch.equal(loaded.adapter_state_dict()[key], value)


def test_a_full_disk(small_disk: Path) -> None:
    saved(small_disk / "adapter")
    files = hashes(small_disk)
    with pytest.raises(
        peftc.CheckpointError, match=r"can't write .* \([\d,]+ bytes needed; [\d,]+ are free\): No space"
    ):
        saved(small_disk / "adapter", r=64)
    assert hashes(small_disk) == files
    assert peftc.load(llama(), small_disk / "adapter").peft_config["default"].to_dict()["r"] == 2


def test_a_disk_that_can_only_be_read(small_disk: Path) -> None:
    compiled = saved(small_disk / "adapter")
    files = hashes(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(peftc.CheckpointError, match=r"\([\d,]+ bytes needed\): Read-only file system"):
        compiled.save_pretrained(small_disk / "adapter")
    with pytest.raises(peftc.CheckpointError, match="Read-only file system"):
        compiled.create_or_update_model_card(small_disk / "adapter")
    assert hashes(small_disk) == files
    assert peftc.load(llama(), small_disk / "adapter").active_adapters == ["default"]


@pytest.mark.parametrize("call", ["rename", "replace", "mkdir", "fsync", "write"])
def test_an_error_of_the_disk_at_any_step(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there is there still, or else the save is done; the error says which."""
    saved(tmp_path / "old")
    new = saved(tmp_path / "new", r=3)
    old_files, new_files = hashes(tmp_path / "old"), hashes(tmp_path / "new")
    for step in range(1, 30):
        folder = Path(shutil.copytree(tmp_path / "old", tmp_path / str(step)))
        where, name = (atomic, "write") if call == "write" else (os, call)
        real, left = getattr(where, name), [step]

        def failing(*args: Any, real: Any = real, left: list[int] = left, **kwargs: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(where, name, failing)
            try:
                new.save_pretrained(folder)
            except peftc.CheckpointError as error:
                message = str(error)
            else:
                message = ""
        if left[0] > 0:
            assert step > 1
            break
        if message:
            assert "What was there is as it was" in message
            assert hashes(folder) == old_files, step
        else:
            assert hashes(folder) == {**new_files, "README.md": old_files["README.md"]}, step
    else:
        pytest.fail("it never came to an end")


def test_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    compiled = saved(tmp_path / "one")
    compiled.save_pretrained(tmp_path / "two")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
