"""Folders from elsewhere: what looks like an interrupted save, links, folders with a file's name, and races."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from peftc.checkpoint import atomic
from tests.support.adapters import saved
from tests.support.checkpoints import hashes
from tests.support.models import llama


def claim(folder: Path, order: Any) -> Path:
    """Something that looks like a save that was interrupted."""
    commit = folder / ".peftc-commit"
    (commit / "files").mkdir(parents=True)
    (commit / "commit.json").write_text(order if isinstance(order, str) else json.dumps(order))
    return commit


@pytest.mark.parametrize("name", ["../victim", "../../victim", "/{}/victim", "sub/../../victim", "link/victim"])
@pytest.mark.parametrize("part", ["remove", "heads", "files"])
def test_nothing_out_of_the_folder_is_moved(part: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "adapter"
    saved(folder)
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a" / "victim").write_text("precious")
    (folder / "link").symlink_to(tmp_path)
    commit = claim(folder, {"files": [], "heads": [], "remove": [], part: [name.format(tmp_path)]})
    if part != "remove":
        (commit / "files" / "link").mkdir()
        (commit / "files" / "link" / "victim").write_text("evil")
    before = hashes(tmp_path)
    for use in (
        lambda: peftc.load(llama(), folder),
        lambda: saved(folder),
        lambda: peftc.merge_checkpoint(folder, folder, tmp_path / "out", progress=False),
    ):
        with pytest.raises(peftc.CheckpointError, match=r"\.peftc-commit: was not left by a save .*; remove it"):
            use()
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("inner", ["old", "files", ""])
def test_no_link_in_a_commit_is_followed(inner: str, tmp_path: Path) -> None:
    saved(tmp_path / "adapter")
    (tmp_path / "home").mkdir()
    commit = claim(tmp_path / "adapter", {"files": [], "heads": [], "remove": ["adapter_config.json"]})
    place = commit / inner if inner else commit
    if place.is_dir():
        os.rename(place, tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.symlink_to(tmp_path / "home")
    before = hashes(tmp_path)
    with pytest.raises(peftc.CheckpointError, match="was not left by a save"):
        peftc.load(llama(), tmp_path / "adapter")
    assert hashes(tmp_path) == before


@pytest.mark.parametrize(
    "order", ["{", "{}", "[]", '{"files": 5}', '{"files": [1], "heads": [], "remove": []}', "[" * 9999]
)
def test_a_commit_that_makes_no_sense(order: str, tmp_path: Path) -> None:
    saved(tmp_path)
    claim(tmp_path, order)
    with pytest.raises(peftc.CheckpointError, match="was not left by a save"):
        peftc.load(llama(), tmp_path)


def test_a_folder_with_the_name_of_a_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").mkdir()
    (tmp_path / "adapter_model.safetensors" / "notes.txt").write_text("mine")
    before = hashes(tmp_path)
    with pytest.raises(peftc.CheckpointError, match=r"'adapter_model\.safetensors' is a folder"):
        saved(tmp_path)
    assert hashes(tmp_path) == before


def test_an_interrupted_save_is_found_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a relative path, and by a link to the folder of one adapter."""
    specs = {name: peftc.LoraConfig(target_modules=["q_proj"], r=2) for name in ("default", "b")}
    compiled = peftc.compile(llama(), specs)
    for number, path in enumerate((Path("."), tmp_path / "link")):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "_move", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                compiled.save_pretrained(folder)
        (folder / "b").mkdir()
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(folder / "b")
        monkeypatch.chdir(folder / "b")
        assert peftc.load(llama(), path).active_adapters == ["default"]
        assert not (folder / ".peftc-commit").exists()


def test_many_threads_that_save_at_once(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def save(number: int) -> None:
        try:
            for _ in range(40):
                atomic.replace_files(tmp_path, {"a": bytes([number]), "b/c": bytes([number])}, ["a"])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b" / "c").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_lock_does_not_live_on_in_a_fork(tmp_path: Path) -> None:
    with atomic.locked(tmp_path):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(reader, 1)
            os._exit(0)
    with atomic.locked(tmp_path, wait=False):
        os.write(writer, b"x")
    assert os.waitpid(child, 0)[1] == 0


def test_misspelt_options(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(peftc.CheckpointError, match="no such argument: 'is_trainble'"):
        peftc.load(llama(), tmp_path, is_trainble=True)  # pyright: ignore


def test_a_module_with_a_transformers_config_of_another_class(tmp_path: Path) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()
            self.config = self.inner.config
            self.score = torch.nn.Linear(64, 2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.score(self.inner(ids).logits)

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Wrapper().eval()
    compiled = peftc.compile(model, peftc.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    compiled.save_pretrained(tmp_path)
    ids = torch.arange(6)[None]
    assert torch.equal(peftc.load(model, tmp_path)(ids), compiled(ids))


@pytest.mark.parametrize("kind", ["wav2vec2", "resnet"])
def test_models_without_embeddings(kind: str, tmp_path: Path) -> None:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "resnet":
            config: Any = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
            model = transformers.ResNetForImageClassification(config).eval()
            spec = peftc.LoraConfig(target_modules=["convolution"], r=2)
        else:
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
            config = transformers.Wav2Vec2Config(
                **sizes,
                vocab_size=16,
                conv_dim=[8, 8],
                conv_stride=[2, 2],
                conv_kernel=[3, 3],
                num_conv_pos_embedding_groups=4,
                num_conv_pos_embeddings=8,
            )
            model = transformers.Wav2Vec2ForCTC(config).eval()
            spec = peftc.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    compiled = peftc.compile(model, spec)
    compiled.save_pretrained(tmp_path)
    assert peftc.load(model, tmp_path).active_adapters == ["default"]


def test_a_merged_model_takes_no_state(tmp_path: Path) -> None:
    compiled = saved(tmp_path, target_modules=["q_proj", "embed_tokens"])
    state = peftc.get_peft_model_state_dict(compiled)
    compiled.merge_adapter()
    with pytest.raises(peftc.MergeError, match="unmerge_adapter"):
        peftc.set_peft_model_state_dict(compiled, state)
    compiled.unmerge_adapter()


def test_a_manifest_under_another_name_is_noticed(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[content.find(b'"peftc":') + 1] ^= 1
    file.write_bytes(content)
    with pytest.raises(peftc.CheckpointError, match="its manifest is damaged"):
        peftc.load(llama(), tmp_path)
    assert peftc.load(llama(), tmp_path, verify="nothing").active_adapters == ["default"]


def test_a_file_in_the_place_of_its_folder(tmp_path: Path) -> None:
    saved(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with pytest.raises(peftc.CheckpointError, match=rf"{name}: is a file; give the folder of the adapter"):
            peftc.load(llama(), tmp_path / name)


def test_a_folder_of_adapters_says_which_it_has(tmp_path: Path) -> None:
    compiled = peftc.compile(llama(), {name: peftc.LoraConfig(target_modules=["q_proj"]) for name in ("one", "two")})
    compiled.save_pretrained(tmp_path)
    with pytest.raises(peftc.CheckpointError, match=r"adapters in folders of their own: one, two\. .*subfolder='one'"):
        peftc.load(llama(), tmp_path)
    assert peftc.load(llama(), tmp_path / "two").active_adapters == ["default"]
    assert peftc.load(llama(), tmp_path, subfolder="one").active_adapters == ["default"]
