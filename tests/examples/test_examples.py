"""The examples run, with small settings, and their own checks hold."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import peftc
from peftc.demo.shop import read_examples
from tests.support.adapters import perturb
from tests.support.smollm2 import tiny_model

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An example as a module; it finds its neighbours as it does when it is run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_finetune_smollm2_on_a_tiny_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """The whole way, with SmolLM2's tokenizer and a random model, which learns nothing worth asking for."""
    finetune = example("finetune_smollm2", monkeypatch)
    tiny_model(tmp_path / "tiny")
    finetune.main(model=str(tmp_path / "tiny"), out=tmp_path / "out", epochs=1, seed=0, require=0.0)
    printed = capsys.readouterr().out
    assert "unmerged: all 20 base tensors are what they were, bit for bit" in printed
    assert "plain transformers gives the same answers" in printed
    with pytest.raises(RuntimeError, match="check failed: at least 75%"):
        finetune.check(False, "at least 75% of the answers are right in every field")


@pytest.mark.slow
def test_deploy_on_a_tiny_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    finetune = example("finetune_smollm2", monkeypatch)
    tiny_model(tmp_path / "tiny")
    compiled = peftc.compile(finetune.load_base(str(tmp_path / "tiny")), finetune.LORA)
    perturb(compiled).save_pretrained(tmp_path / "adapter")
    deploy = example("deploy", monkeypatch)
    deploy.main(
        model=str(tmp_path / "tiny"), adapter=tmp_path / "adapter", out=tmp_path / "out", to=["hf", "pt2", "onnx"]
    )
    printed = capsys.readouterr().out
    assert all(f"{target}: the greedy tokens are the live model's" in printed for target in ("hf", "pt2", "onnx"))


@pytest.mark.slow
def test_deploy_gguf_on_a_tiny_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    finetune = example("finetune_smollm2", monkeypatch)
    tiny_model(tmp_path / "tiny")
    compiled = peftc.compile(finetune.load_base(str(tmp_path / "tiny")), finetune.LORA)
    perturb(compiled).save_pretrained(tmp_path / "adapter")
    deploy = example("deploy_gguf", monkeypatch)
    deploy.main(model=str(tmp_path / "tiny"), adapter=tmp_path / "adapter", out=tmp_path / "out")
    printed = capsys.readouterr().out
    assert "vllm: takes it" in printed
    assert "every change of a weight is the live adapter's" in printed
    assert (tmp_path / "out" / "default.gguf").is_file()


@pytest.mark.slow
def test_ptuning_smollm2_on_a_tiny_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    tiny_model(tmp_path / "tiny")
    example("finetune_smollm2", monkeypatch)
    ptuning = example("ptuning_smollm2", monkeypatch)
    ptuning.main(model=str(tmp_path / "tiny"), out=tmp_path / "out", epochs=1, seed=0, require=0.0)
    printed = capsys.readouterr().out
    assert "disabled: the answers of before" in printed
    assert "loaded: all 24 answers are the same" in printed
    assert "loaded for training, with the encoder: the same loss" in printed


@pytest.mark.slow
def test_minilm_intents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    example("minilm_intents", monkeypatch).main(out=tmp_path, epochs=0.05)
    printed = capsys.readouterr().out
    assert printed.count("loaded into a fresh base: all classes are the same") == 3
    assert len(list(tmp_path.rglob("adapter_model.safetensors"))) == 3


@pytest.mark.slow
def test_minilm_ia3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    example("minilm_ia3", monkeypatch).main(out=tmp_path, epochs=1)
    assert len(list(tmp_path.rglob("adapter_model.safetensors"))) == 1
    assert "loaded into a fresh base: the same embeddings, bit for bit" in capsys.readouterr().out


@pytest.mark.slow
def test_convnet_symbolic(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    example("convnet_symbolic", monkeypatch).main(pretrain_epochs=2, adapt_epochs=1, images=240)
    printed = capsys.readouterr().out
    assert "unmerged: same logits as before, bit for bit" in printed
    assert "unloaded: same logits as the original, bit for bit" in printed


def test_the_examples_data_is_held_out() -> None:
    lines = {part: (EXAMPLES / "data" / f"workshop_{part}.jsonl").read_text("utf-8") for part in ("train", "heldout")}
    requests = {part: {json.loads(line)["request"] for line in text.splitlines()} for part, text in lines.items()}
    messages = {"train": read_examples("train"), "heldout": read_examples("heldout")}
    for rows in (requests, {part: {example.message for example in own} for part, own in messages.items()}):
        assert len(rows["train"]) > len(rows["heldout"]) > 20
        assert not rows["train"] & rows["heldout"]
