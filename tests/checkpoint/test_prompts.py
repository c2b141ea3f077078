"""Prompt adapters in files: PEFT's one tensor, the encoder beside it, and training that goes on."""

import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import peftc
from tests.support.models import tiny
from tests.support.prompts import METHODS, REPARAMETERISED, N, ids, in_peft

MODELS = {
    "CAUSAL_LM": ("llama", None),
    "SEQ_2_SEQ_LM": ("t5", None),
    "SEQ_CLS": ("bert", "AutoModelForSequenceClassification"),
}
SHAPES = {
    ("CAUSAL_LM", True): (N, 3 * 2 * 16),
    ("CAUSAL_LM", False): (N, 32),
    ("SEQ_2_SEQ_LM", True): (N, 2 * 2 * 32),
    ("SEQ_2_SEQ_LM", False): (2 * N, 32),
    ("SEQ_CLS", True): (N, 2 * 2 * 32),
    ("SEQ_CLS", False): (N, 32),
}


def _inputs(task: str) -> dict[str, Any]:
    return {"input_ids": ids(), **({"decoder_input_ids": ids(2, 4)} if task == "SEQ_2_SEQ_LM" else {})}


def _logits(model: Any, task: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**_inputs(task)).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", MODELS)
def test_both_libraries_read_both_files(task: str, method: str, tmp_path: Path) -> None:
    model = tiny(*MODELS[task])
    compiled = peftc.compile(model, METHODS[method](task)).eval()
    expected = _logits(compiled, task)
    compiled.save_pretrained(tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert tuple(tensors["prompt_embeddings"].shape) == SHAPES[task, "prefix" in method]
    heads = {"base_model.classifier.weight", "base_model.classifier.bias"} if task == "SEQ_CLS" else set[str]()
    assert set(tensors) == {"prompt_embeddings"} | heads
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft finds every key it wants, and none it does not
        read = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    torch.testing.assert_close(_logits(read, task), expected)
    read.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = peftc.load(model, tmp_path / folder)
        torch.testing.assert_close(_logits(again, task), expected)
        assert not [name for name, p in again.named_parameters() if p.requires_grad]
    assert _config(tmp_path / "ours") == _config(tmp_path / "theirs")


def _config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "adapter_config.json").read_text())
    # peft writes its version, the heads of the task, and a width that nothing has.
    unsaid = {
        "peft_version",
        "modules_to_save",
        *([] if config.get("prefix_projection", True) else ["encoder_hidden_size"]),
    }
    return {name: value for name, value in config.items() if name not in unsaid}


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_where_it_stopped(method: str, tmp_path: Path) -> None:
    """Ten steps are five steps, a save, a load, and five more."""
    model, batch = tiny("llama"), {"input_ids": ids(), "labels": ids()}

    def train(compiled: peftc.CompiledModel, steps: int) -> None:
        learned = [parameter for parameter in compiled.parameters() if parameter.requires_grad]
        for _ in range(steps):
            compiled.zero_grad()
            compiled(**batch).loss.backward()
            with torch.no_grad():
                for parameter in learned:
                    parameter.sub_(0.1 * parameter.grad)

    straight = peftc.compile(model, METHODS[method]("CAUSAL_LM"))
    train(straight, 5)
    straight.save_pretrained(tmp_path)
    assert (tmp_path / "prompt_encoder.safetensors").exists() == (method in REPARAMETERISED)
    resumed = peftc.load(model, tmp_path, is_trainable=True)
    assert (
        resumed.peft_config["default"].model_copy(update={"inference_mode": False}) == straight.peft_config["default"]
    )
    train(straight, 5)
    train(resumed, 5)
    assert torch.equal(straight.get_prompt_embedding_to_save(), resumed.get_prompt_embedding_to_save())
    other = peftc.compile(model, METHODS[method]("CAUSAL_LM"), "other")
    other.load_adapter(tmp_path, "again", is_trainable=True)
    other.set_adapter("again")
    train(other, 5)
    assert torch.equal(straight.get_prompt_embedding_to_save(), other.get_prompt_embedding_to_save("again"))


@pytest.mark.parametrize("method", REPARAMETERISED)
def test_pefts_files_are_trained_on_without_the_encoder_they_lack(method: str, tmp_path: Path) -> None:
    model = tiny("llama")
    compiled = peftc.compile(model, METHODS[method]("CAUSAL_LM")).eval()
    in_peft(compiled, model).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="saved without its encoder"):
        resumed = peftc.load(model, tmp_path, is_trainable=True)
    torch.testing.assert_close(_logits(resumed.eval(), "CAUSAL_LM"), _logits(compiled, "CAUSAL_LM"))
    trained = {name: parameter for name, parameter in resumed.named_parameters() if parameter.requires_grad}
    assert list(trained) == ["base.prompt_encoder.default.embedding.weight"]
    resumed(input_ids=ids(), labels=ids()).loss.backward()
    assert float(next(iter(trained.values())).grad.abs().max()) > 0
    resumed.save_pretrained(tmp_path / "again")
    assert torch.equal(_logits(peftc.load(model, tmp_path / "again"), "CAUSAL_LM"), _logits(resumed, "CAUSAL_LM"))


def test_an_encoder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    compiled = peftc.compile(model, METHODS["p-tuning"]("CAUSAL_LM"))
    compiled.save_pretrained(tmp_path)
    file = tmp_path / "prompt_encoder.safetensors"
    good = load_file(file)
    save_file({**good, "embedding.weight": good["embedding.weight"] + 1}, file)
    with pytest.raises(peftc.CheckpointError, match="does not make the saved prompt_embeddings"):
        peftc.load(model, tmp_path, is_trainable=True)
    with pytest.raises(peftc.CheckpointError, match="does not make"):
        compiled.load_adapter(tmp_path, "bad", is_trainable=True)
    assert list(compiled.prompt_encoder) == ["default"] == compiled.active_adapters
    peftc.load(model, tmp_path)  # for inference, the prompt_embeddings are enough
    save_file({name: value for name, value in good.items() if name != "mlp_head.0.bias"}, file)
    with pytest.raises(peftc.CheckpointError, match=r"not of the encoder in the config: mlp_head\.0\.bias"):
        peftc.load(model, tmp_path, is_trainable=True)
    file.write_bytes(b"nonsense")
    with pytest.raises(peftc.CheckpointError, match="not a readable safetensors file"):
        peftc.load(model, tmp_path, is_trainable=True)


def test_a_save_without_an_encoder_leaves_none_behind(tmp_path: Path) -> None:
    model = tiny("llama")
    peftc.compile(model, METHODS["p-tuning"]("CAUSAL_LM")).save_pretrained(tmp_path)
    peftc.compile(model, METHODS["prompt"]("CAUSAL_LM")).save_pretrained(tmp_path)
    assert not (tmp_path / "prompt_encoder.safetensors").exists()
    peftc.load(model, tmp_path, is_trainable=True)


def test_a_failed_save_leaves_the_encoder_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    first = peftc.compile(model, METHODS["p-tuning"]("CAUSAL_LM"))
    first.save_pretrained(tmp_path)

    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if str(target).endswith("adapter_config.json") and "peftc-commit/files" in str(source):
            raise OSError("input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", refuse)
        with pytest.raises(peftc.CheckpointError, match=r"can't write .*bytes needed"):
            peftc.compile(model, METHODS["prompt"]("CAUSAL_LM")).save_pretrained(tmp_path)
    again = peftc.load(model, tmp_path, is_trainable=True)
    assert again.peft_config["default"].peft_type == "P_TUNING"
    for name, parameter in first.prompt_encoder["default"].named_parameters():
        assert torch.equal(again.prompt_encoder["default"].get_parameter(name), parameter)


@pytest.mark.parametrize("method", REPARAMETERISED)
def test_a_prompt_loaded_for_inference_keeps_its_encoder(method: str, tmp_path: Path) -> None:
    model = tiny("llama")
    peftc.compile(model, METHODS[method]("CAUSAL_LM")).save_pretrained(tmp_path)
    good = load_file(tmp_path / "prompt_encoder.safetensors")
    loaded = peftc.load(model, tmp_path)
    assert len(list(loaded.prompt_encoder["default"].parameters())) == 1
    loaded.save_pretrained(tmp_path)  # over what it was loaded from
    copy.deepcopy(loaded).save_pretrained(tmp_path / "copy")
    for folder in (tmp_path, tmp_path / "copy"):
        kept = load_file(folder / "prompt_encoder.safetensors")
        assert kept.keys() == good.keys()
        assert all(torch.equal(kept[name], good[name]) for name in good)
        peftc.load(model, folder, is_trainable=True)
    with torch.no_grad():
        loaded.prompt_encoder["default"].embedding.weight.add_(1)  # which that encoder did not make
    loaded.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed" / "prompt_encoder.safetensors").exists()
    (tmp_path / "prompt_encoder.safetensors").write_bytes(b"nonsense")
    with pytest.warns(UserWarning, match="Inference does not need it"):
        peftc.load(model, tmp_path)


def test_what_is_saved_has_no_dropout_in_it(tmp_path: Path) -> None:
    spec = peftc.PromptEncoderConfig(
        num_virtual_tokens=N,
        task_type="CAUSAL_LM",
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=12,
        encoder_dropout=0.5,
    )
    compiled = peftc.compile(tiny("llama"), spec).train()
    assert torch.equal(compiled.get_prompt_embedding_to_save(), compiled.get_prompt_embedding_to_save())
    assert not torch.equal(compiled.get_prompt(1), compiled.get_prompt(1))
    compiled.save_pretrained(tmp_path)
    assert compiled.prompt_encoder["default"].training


@pytest.mark.parametrize("change", ["missing", "shape", "nan", "unexpected"])
def test_tensors_that_do_not_fit_are_refused(change: str, tmp_path: Path) -> None:
    model = tiny("llama")
    peftc.compile(model, METHODS["prompt"]("CAUSAL_LM")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    rows = load_file(file)["prompt_embeddings"]
    broken = {
        "missing": {"prompt": rows},
        "shape": {"prompt_embeddings": rows[:-1].clone()},
        "nan": {"prompt_embeddings": rows.clone().fill_(float("nan"))},
        "unexpected": {"prompt_embeddings": rows, "base_model.lm_hed.weight": rows.clone()},
    }[change]
    save_file(broken, file)
    expected = {"missing": "1 missing", "shape": "1 mis-shaped", "nan": "NaN", "unexpected": "1 unexpected"}[change]
    with pytest.raises(peftc.CheckpointError, match=expected):
        peftc.load(model, tmp_path)


def test_a_config_of_an_older_peft(tmp_path: Path) -> None:
    """The fields that smangrul/roberta-large-peft-p-tuning, of PEFT 0.2, has."""
    model = tiny("roberta", "AutoModelForSequenceClassification")
    config = {
        "base_model_name_or_path": "roberta-large",
        "encoder_dropout": 0.0,
        "encoder_hidden_size": 24,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",
        "inference_mode": True,
        "num_attention_heads": 4,
        "num_layers": 2,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": N,
        "peft_type": "P_TUNING",
        "task_type": "SEQ_CLS",
        "token_dim": 32,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    head = {f"base_model.classifier.{name}": value.clone() for name, value in model.classifier.state_dict().items()}
    torch.save({"prompt_embeddings": torch.randn(N, 32), **head}, tmp_path / "adapter_model.bin")
    compiled = peftc.load(model, tmp_path, allow_pickle=True)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    torch.testing.assert_close(_logits(compiled, "SEQ_CLS"), _logits(theirs, "SEQ_CLS"))
