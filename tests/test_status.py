"""get_layer_status and get_model_status, and that peft says the same of the same adapters."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

import peftc
from tests.support.compare import to_peft
from tests.support.models import Everything, QuantisedLinear, tiny


def test_the_status_equals_pefts(tmp_path: Path) -> None:
    model = tiny("llama")
    specs = {
        "default": peftc.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        "other": peftc.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    }
    compiled = peftc.compile(model, specs)
    theirs: Any = to_peft(compiled, model, tmp_path)
    for action in (lambda m: None, lambda m: m.set_adapter("other"), lambda m: m.merge_adapter()):
        action(compiled)
        action(theirs)
        ours, expected = compiled.get_layer_status(), theirs.get_layer_status()
        assert len(ours) == len(expected)
        for mine, other in zip(ours, expected, strict=True):
            # peft goes on training what is merged, and names layers with its wrappers.
            same = {"name": f"model.{mine.name}", "requires_grad": other.requires_grad}
            assert dataclasses.asdict(dataclasses.replace(mine, **same)) == dataclasses.asdict(other)
        mine, other = compiled.get_model_status(), theirs.get_model_status()
        for field in ("base_model_type", "peft_types", "num_adapter_layers", "enabled", "active_adapters", "devices"):
            assert getattr(mine, field) == getattr(other, field), field
        assert mine.total_params == other.total_params
        assert mine.merged_adapters == other.merged_adapters


def test_what_is_learning() -> None:
    specs = {
        "a": peftc.LoraConfig(target_modules=["linear", "conv2d"], r=2),
        "b": peftc.IA3Config(target_modules=["linear"], feedforward_modules=[], modules_to_save=["head"]),
    }
    compiled = peftc.compile(Everything(), specs)
    compiled.set_requires_grad("b")
    assert compiled.get_model_status().requires_grad == {"a": True, "b": True}
    compiled.set_requires_grad(["a", "b"], False)
    assert compiled.get_model_status().requires_grad == {"a": False, "b": False}
    assert compiled.get_nb_trainable_parameters()[0] == 0
    compiled.base.linear.lora_A.a.weight.requires_grad_(True)
    status = {layer.name: layer for layer in compiled.get_layer_status()}
    assert status["linear"].requires_grad == {"a": "irregular", "b": False}
    assert status["linear"].module_type == "lora+ia3.Linear"
    assert status["linear"].active_adapters == ["a"]
    assert status["conv2d"].available_adapters == ["a"]
    assert status["head"].module_type == "modules_to_save.Linear"
    assert compiled.get_model_status().requires_grad["a"] == "irregular"
    compiled.enable_adapters(False)
    assert not compiled.get_model_status().enabled
    compiled.enable_adapters()
    compiled.set_adapter("b")
    assert compiled.get_model_status().requires_grad == {"a": "irregular", "b": True}


def test_quantised_layers_are_named() -> None:
    model = torch.nn.Sequential(QuantisedLinear(torch.nn.Linear(4, 4)), torch.nn.Linear(4, 4))
    compiled = peftc.compile(model, peftc.LoraConfig(target_modules=["0", "1"], r=2))
    assert [layer.quantization_backend for layer in compiled.get_layer_status()] == ["QuantisedLinear", None]
    assert compiled.get_model_status().quantization_backend == "QuantisedLinear"
