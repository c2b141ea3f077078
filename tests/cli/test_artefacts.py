"""`merge`, `unmerge`, `export`, `verify`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import peftc as library
from tests.support.checkpoints import adapter_on_disk, assert_same_files
from tests.support.command import peftc
from tests.support.gguf_files import write_llama
from tests.support.models import model_of
from tests.support.words import word_tokenizer

pytestmark = pytest.mark.usefixtures("here")


def test_merged_and_back() -> None:
    assert peftc("merge", "model", "adapter", "merged", "--undo").out == "merged into merged\n"
    library.merge_checkpoint("model", "adapter", "expected", undo=True, progress=False)
    assert_same_files(Path("merged"), Path("expected"))
    peftc("unmerge", "merged", "restored")
    assert_same_files(Path("restored"), Path("model"))
    peftc("merge", "model", "adapter", "plain")
    assert not Path("plain/peftc_undo").exists()


def test_a_tie_is_cut_only_if_that_is_said() -> None:
    tied = model_of("llama", tie_word_embeddings=True)
    tied.save_pretrained("tied")
    adapter_on_disk(tied, Path("head"), target_modules=["lm_head"], r=2)
    assert "untie" in peftc("merge", "tied", "head", "merged", code=1).err
    peftc("merge", "tied", "head", "merged", "--untie")
    assert "lm_head.weight" in load_file("merged/model.safetensors")
    assert peftc("verify", "tied", "head", "merged", code=1).err
    peftc("verify", "tied", "head", "merged", "--untie")


def test_a_base_whose_config_names_no_class() -> None:
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "architectures": None}))
    assert "(peftc merge: --class)" in peftc("merge", "model", "adapter", "merged", code=1).err
    peftc("merge", "model", "adapter", "merged", "--class", "LlamaForCausalLM")
    assert peftc("merge", "model", "adapter", "other", "--class", "LlamaConfig", code=1).err.startswith(
        "CheckpointError"
    )


def test_another_base_is_taken_if_that_is_said() -> None:
    base = LlamaForCausalLM.from_pretrained("model")
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter)
    base.save_pretrained("else")
    commands = [
        ("merge", "else", "adapter", "merged"),
        ("export", "else", "adapter", "exported"),
        ("convert", "adapter", "served", "--base", "else"),
        ("combine", "adapter", "other", "mix", "--base", "else", "--weights", "1,1"),
    ]
    for command in commands:
        assert "(--verify files)" in peftc(*command, code=1).err
        peftc(*command, "--verify", "files")


def test_what_is_there_is_not_written_over() -> None:
    Path("full").mkdir()
    Path("full/note").write_text("mine")
    Path("file").write_text("mine")
    before = Path("adapter/adapter_model.safetensors").read_bytes()
    for out in ("full", "file", "adapter"):
        for command in (
            ("merge", "model", "adapter", out),
            ("export", "model", "adapter", out),
            ("convert", "adapter", out, "--base", "model"),
            ("combine", "adapter", "other", out, "--base", "model", "--weights", "1,1"),
        ):
            assert "there is something in it already" in peftc(*command, code=1).err
    assert [file.name for file in Path("full").iterdir()] == ["note"]
    assert Path("adapter/adapter_model.safetensors").read_bytes() == before


def test_an_export_and_its_check() -> None:
    ran = peftc("export", "model", "adapter", "exported", "--json")
    assert (ran.json["to"], ran.json["adapters"], ran.json["names"]) == ("hf", "merged", ["default"])
    assert ran.json["difference"] < 1e-4 * ran.json["scale"]
    assert ran.json == json.loads(Path("exported/certificate.json").read_text())
    assert peftc("verify", "exported").out.startswith("hf, adapters merged (default): outputs differ by ")
    assert peftc("verify", "exported", "--json").json["files"] == ran.json["files"]
    Path("exported/generation_config.json").write_text("{}")
    assert "generation_config.json is not what was exported" in peftc("verify", "exported", code=1).err


def test_a_merge_of_others_is_checked_by_tensor() -> None:
    peftc("merge", "model", "adapter", "merged")
    assert peftc("verify", "model", "adapter", "merged", "--json").json["difference"] == 0
    tensors = load_file("merged/model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, "merged/model.safetensors", {"format": "pt"})
    assert "lm_head.weight differs by 1" in peftc("verify", "model", "adapter", "merged", code=1).err
    peftc("verify", "model", "adapter", "merged", "--tolerance", 100)


@pytest.mark.slow
def test_a_program_with_what_generates_text_beside_it() -> None:
    word_tokenizer().save_pretrained("model")
    told = peftc("export", "model", "adapter", "exported", "--to", "pt2", "--generation").out
    assert "greedy tokens (with caches): 8 of 8 are the same" in told
    assert Path("exported/generation/tokenizer.json").is_file()


def test_the_base_as_gguf_with_the_adapter_in_it() -> None:
    write_llama(LlamaForCausalLM.from_pretrained("model"), Path("base.gguf"))
    assert (
        "give gguf=" in peftc("export", "model", "adapter", "out", "--to", "gguf", "--adapters", "merged", code=1).err
    )
    how = ["--to", "gguf", "--adapters", "merged", "--gguf", "base.gguf"]
    assert "merged weights differ by 0 at most" in peftc("export", "model", "adapter", "out", *how).out
    assert peftc("verify", "out").out.startswith("gguf, adapters merged (default): merged weights")


def test_an_adapter_for_another_runtime() -> None:
    ran = peftc("export", "model", "adapter", "for-mlx", "--to", "mlx", "--json")
    assert (ran.json["adapters"], ran.json["of"]) == ("beside", "weight changes")
    assert [file.parent.name for file in Path("for-mlx").rglob("adapters.safetensors")] == ["default"]


@pytest.mark.slow
def test_a_program_with_adapters_as_inputs() -> None:
    ran = peftc("export", "model", "adapter", "program", "--to", "pt2", "--adapters", "inputs", "--json")
    assert (ran.json["to"], ran.json["adapters"]) == ("pt2", "inputs")
    peftc("verify", "program")
