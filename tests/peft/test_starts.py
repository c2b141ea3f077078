"""PEFT's scripts for LoRA's starts from data, run with both: the same factors, configs and outputs."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor

import peftc
import peftc.peft as served
from tests.support.against import near
from tests.support.interchange import quietly
from tests.support.models import tiny, token_ids

IDS = token_ids(2, 7, 64)
TARGETS = ["q_proj", "k_proj", "down_proj"]


def batches(count: int, rows: int = 8) -> list[dict[str, Tensor]]:
    found = [torch.randint(0, 64, (rows, 12), generator=torch.Generator().manual_seed(n)) for n in range(count)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in found]


def lora_layers(model: Any, cls: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, cls)}


def same_factors(one: Any, other: Any, tolerance: float = 1e-3) -> None:
    theirs, ours = lora_layers(one, peft.tuners.lora.LoraLayer), lora_layers(other, served.tuners.lora.LoraLayer)
    assert theirs.keys() == ours.keys()
    for name, layer in theirs.items():
        own = ours[name]
        assert own.r["default"] == layer.r["default"]
        assert own.scaling["default"] == pytest.approx(layer.scaling["default"])
        a, b, own_a, own_b = (m["default"].weight for one in (layer, own) for m in (one.lora_A, one.lora_B))
        near(own_a.mT @ own_a, a.mT @ a, tolerance, f"AᵀA of {name}")
        near(own_b @ own_a, b @ a, tolerance, f"B·A of {name}")


def test_a_script_with_eva_runs_as_with_peft(tmp_path: Path) -> None:
    base, data = tiny("llama").eval(), batches(4)
    fields: dict[str, Any] = {"r": 4, "target_modules": TARGETS, "init_lora_weights": "eva", "task_type": "CAUSAL_LM"}
    made = []
    for library in (peft, served):
        config = library.LoraConfig(**fields, eva_config=library.EvaConfig(rho=2.0))
        model = quietly(library.get_peft_model, copy.deepcopy(base), config)
        state = quietly(library.get_eva_state_dict, model, data, show_progress_bar=False)
        quietly(library.initialize_lora_eva_weights, model, data, show_progress_bar=False)
        made.append((model.eval(), state, config))
    (one, theirs, config), (other, ours, own) = made
    same_factors(one, other)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape for name in theirs)
    assert own.rank_pattern == config.rank_pattern
    assert own.alpha_pattern == config.alpha_pattern
    assert own.eva_config.rho == config.eva_config.rho
    near(other(IDS).logits, base(IDS).logits, 1e-6, "outputs of a fresh one")
    assert [n for n, p in other.named_parameters() if p.requires_grad] == [
        n for n, p in one.named_parameters() if p.requires_grad
    ]
    other.save_pretrained(tmp_path)
    again = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(base), str(tmp_path)).eval()
    near(again(IDS).logits, other(IDS).logits, 1e-6, "outputs in peft")
    # From a state that was found before, on the bare base.
    config = served.LoraConfig(**fields)
    state = served.get_eva_state_dict(copy.deepcopy(base), data, config)
    model = served.get_peft_model(copy.deepcopy(base), config)
    served.initialize_lora_eva_weights(model, eva_state_dict=state)
    same_factors(one, model.eval())


def test_functions_that_prepare_inputs_are_asked(tmp_path: Path) -> None:
    base, data = tiny("llama").eval(), batches(3)
    fields: dict[str, Any] = {"r": 2, "target_modules": TARGETS, "init_lora_weights": "eva"}
    found = []
    for library in (peft, served):
        model = quietly(library.get_peft_model, copy.deepcopy(base), quietly(library.LoraConfig, **fields))
        options: dict[str, Any] = {
            "prepare_model_inputs_fn": lambda batch, config: batch["input_ids"] < 40,
            "prepare_layer_inputs_fn": lambda x, given, name: x[0][given] if isinstance(x, tuple) else x[given],
        }
        quietly(library.initialize_lora_eva_weights, model, data, show_progress_bar=False, **options)
        found.append(model.eval())
    same_factors(*found)


@pytest.mark.parametrize("again", [False, True])
def test_a_script_with_corda_runs_as_with_peft(again: bool, tmp_path: Path) -> None:
    base, data = tiny("llama").eval(), batches(12, rows=1)
    fields: dict[str, Any] = {"r": 4, "target_modules": TARGETS, "init_lora_weights": "corda"}
    found = []
    for library, told, preprocess in (
        (peft, CordaConfig, preprocess_corda),
        (served, served.tuners.lora.config.CordaConfig, served.tuners.lora.corda.preprocess_corda),
    ):
        model = copy.deepcopy(base)
        file = str(tmp_path / ("their" if library is peft or again else "our") / "covariance.pt")
        config = library.LoraConfig(**fields, corda_config=told(covariance_file=file))
        asked: list[int] = []
        quietly(preprocess, model, config, run_model=lambda m=model, a=asked: [(a.append(1), m(**b)) for b in data])
        assert len(asked) == (0 if again and library is served else len(data))
        found.append(quietly(library.get_peft_model, model, config).eval())
    same_factors(*found)
    near(found[1](IDS).logits, base(IDS).logits, 1e-5, "outputs of a fresh one")
    with pytest.raises(peftc.AdapterError, match="call preprocess_corda first"):
        served.get_peft_model(copy.deepcopy(base), config)


@pytest.mark.parametrize("again", [False, True])
def test_a_script_with_lora_ga_runs_as_with_peft(again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exactly(x: Tensor, q: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return u[:, :q], s[:q], vh[:q].mT

    monkeypatch.setattr(torch, "svd_lowrank", exactly)
    base, data = tiny("llama").eval(), batches(2)
    fields: dict[str, Any] = {"r": 4, "target_modules": TARGETS, "init_lora_weights": "lora_ga"}
    found = []
    for library in (peft, served):
        model = copy.deepcopy(base)
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        file = str(tmp_path / ("their" if library is peft or again else "our") / "gradients.pt")
        config = library.LoraConfig(**fields, lora_ga_config=library.LoraGAConfig(direction="ArBr"))
        step = lambda m=model: [m(**batch).loss.backward() for batch in data]  # noqa: E731
        quietly(library.preprocess_loraga, model, config, step, cache_file=file)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert all(p.grad is None for p in model.parameters())
        found.append(quietly(library.get_peft_model, model, config).eval())
    same_factors(*found)
    near(found[1](IDS).logits, base(IDS).logits, 1e-5, "outputs of a fresh one")


def test_gradients_of_transposed_weights_are_kept_as_peft_keeps_them(tmp_path: Path) -> None:
    base, data, found = tiny("gpt2").eval(), batches(2), []
    config = served.LoraConfig(
        r=2, target_modules=["c_attn"], init_lora_weights="lora_ga", lora_ga_config=served.LoraGAConfig()
    )
    for _ in range(2):
        model = copy.deepcopy(base)
        step = lambda m=model: [m(**batch).loss.backward() for batch in data]  # noqa: E731
        served.preprocess_loraga(model, config, step, cache_file=str(tmp_path / "gradients.pt"))
        torch.manual_seed(0)
        found.append(served.get_peft_model(model, config))
    kept = torch.load(tmp_path / "gradients.pt")
    name = "transformer.h.0.attn.c_attn"
    assert kept[f"{name}._peft_loraga_grad"].shape == base.get_submodule(name).weight.shape
    one, other = (model.get_base_model().get_submodule(name).lora_A["default"].weight for model in found)
    near(one, other, 1e-6, "A of a gradient that was kept")


def test_what_is_missing_is_told() -> None:
    base = tiny("llama").eval()
    model = served.get_peft_model(base, served.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(peftc.AdapterError, match="no init_lora_weights='eva'"):
        served.initialize_lora_eva_weights(model, batches(1))
    model = served.get_peft_model(
        tiny("llama"), served.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva")
    )
    with pytest.raises(peftc.AdapterError, match="give a dataloader, or an eva_state_dict"):
        served.initialize_lora_eva_weights(model)
    config = served.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="lora_ga")
    with pytest.raises(peftc.AdapterError, match="needs lora_ga_config"):
        served.preprocess_loraga(tiny("llama"), config, lambda: None)


def test_configs_are_told_in_classes_and_read_from_files(tmp_path: Path) -> None:
    config = served.LoraConfig(init_lora_weights="corda", corda_config={"corda_method": "kpm"})
    assert config.corda_config == served.tuners.lora.config.CordaConfig(corda_method="kpm")
    assert served.LoraConfig(init_lora_weights="eva").eva_config == served.EvaConfig()
    told = served.LoftQConfig(loftq_bits=8, loftq_iter=2)
    config = served.LoraConfig(init_lora_weights="loftq", loftq_config=told)
    assert config.loftq_config == {"loftq_bits": 8, "loftq_iter": 2}
    config.save_pretrained(tmp_path)
    assert peft.LoraConfig.from_pretrained(tmp_path).loftq_config == config.loftq_config
    assert served.LoraConfig.from_pretrained(tmp_path).loftq_config == config.loftq_config
