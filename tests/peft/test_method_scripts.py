"""Methods by PEFT's names: the same small program on peft and on peftc.peft gives the same, and files go both ways."""

import importlib
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peftc.peft
from tests.support.scripts import base

IDS = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]])
# By method: the names of its config, its model and its layers, and fields.
METHODS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "randlora": ("RandLoraConfig", "RandLoraModel", "RandLoraLayer", {"r": 8, "randlora_alpha": 16}),
    "vblora": ("VBLoRAConfig", "VBLoRAModel", "VBLoRALayer", {"num_vectors": 20, "vector_length": 8, "topk": 2}),
    "shira": ("ShiraConfig", "ShiraModel", "ShiraLayer", {"r": 4, "random_seed": 3}),
    "vera": ("VeraConfig", "VeraModel", "VeraLayer", {"r": 4}),
    "adalora": ("AdaLoraConfig", "AdaLoraModel", "AdaLoraLayer", {"total_step": 10, "init_r": 4}),
    "fourierft": ("FourierFTConfig", "FourierFTModel", "FourierFTLayer", {"n_frequency": 50, "scaling": 20.0}),
    "osf": ("OSFConfig", "OSFModel", "OSFLayer", {}),
    "frod": ("FrodConfig", "FrodModel", "FrodLayer", {}),
    "psoft": ("PsoftConfig", "PsoftModel", "PsoftLayer", {"r": 4}),
    "pvera": ("PveraConfig", "PveraModel", "PveraLayer", {"r": 4}),
    "unilora": ("UniLoraConfig", "UniLoraModel", "UniLoraLayer", {"theta_d_length": 50}),
    "waveft": ("WaveFTConfig", "WaveFTModel", "WaveFTLayer", {"n_frequency": 50, "scaling": 10.0}),
    "ln_tuning": ("LNTuningConfig", "LNTuningModel", "LNTuningLayer", {}),
}


def place(name: str) -> tuple[bool, str]:
    """What parameters are sorted by: what all modules share is last, whatever it is named after."""
    return "vector_bank" in name or "theta_d" in name, name.rpartition("layers.")[2]


def program(lib: Any, method: str, folder: Path) -> Any:
    """Adapt, move, save and merge as a script does; what it has seen on the way."""
    config, model_class, layer, fields = METHODS[method]
    tuners = importlib.import_module(f"{lib.__name__}.tuners.{method}.layer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lib.get_peft_model(base(), getattr(lib, config)(task_type="CAUSAL_LM", **fields))
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters(), key=lambda pair: place(pair[0])):
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.eval().save_pretrained(folder)
    seen = {
        "config": {key: value for key, value in model.peft_config["default"].to_dict().items() if key in fields},
        "type": str(model.peft_config["default"].peft_type.value),
        "tuner": isinstance(model.base_model, getattr(lib, model_class)),
        "layers": sorted(name for name, m in model.named_modules() if isinstance(m, getattr(tuners, layer))),
        "trainable": model.get_nb_trainable_parameters()[0],
        "logits": model(IDS).logits,
    }
    with model.disable_adapter():
        seen["off"] = model(IDS).logits
    seen["merged"] = model.merge_and_unload()(IDS).logits
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_a_script_sees_the_same(method: str, tmp_path: Path) -> None:
    ours, theirs = (program(lib, method, tmp_path / lib.__name__) for lib in (peftc.peft, peft))
    assert ours["tuner"]
    assert ours["layers"]
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert ours[name] == value, name
    assert not torch.allclose(ours["logits"], ours["off"], atol=1e-3)
    for lib, folder in ((peftc.peft, "peft"), (peft, "peftc.peft")):
        model = lib.PeftModel.from_pretrained(base(), tmp_path / folder).eval()
        torch.testing.assert_close(model(IDS).logits, theirs["logits"], rtol=1e-4, atol=1e-5)
