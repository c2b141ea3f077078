"""Methods under PEFT's names: configs, defaults by model type, tensors, layers and results are peft's."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import constants

import peftc
import peftc.peft as served
from peftc.peft.methods import METHODS
from tests.support.interchange import perturbed, quietly
from tests.support.models import inputs_for, tiny

# Fields that the small model needs, or that let a fresh adapter change something.
FIELDS: dict[str, dict[str, Any]] = {
    "MISS": {"r": 8},
    "ROAD": {"group_size": 4},
    "C3A": {"block_size": 8},
    "SUPERTUNING": {"sparsity": 0.9},
}
# What a call takes besides, of methods that ask for it. These can't be merged.
CALLS: dict[str, dict[str, Any]] = {"POLY": {"task_ids": torch.zeros(2, dtype=torch.long)}}
# Those that change biases.
BIASED = ("BEFT", "GLORA")
# Trained tokens are for embeddings: tests/peft/test_tokens.py.
NAMES = [name for name in METHODS if name not in ("LORA", "IA3", "TRAINABLE_TOKENS")]
# Those that tests/peft/test_method_scripts.py or tests/oracle/test_adamss.py runs, with fields that a small model needs.
SCRIPTED = (
    *("VERA", "LN_TUNING", "ADALORA", "FOURIERFT", "RANDLORA", "VBLORA", "SHIRA"),
    *("ADAMSS", "FROD", "OSF", "PSOFT", "PVERA", "UNILORA", "WAVEFT"),
)


def classes(name: str) -> tuple[Any, Any]:
    """The config's class in peft, and here."""
    theirs = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name]
    return theirs, getattr(served, theirs.__name__)


@pytest.mark.parametrize("name", NAMES)
def test_fields_and_defaults_are_peft_s(name: str) -> None:
    theirs, ours = classes(name)
    left_out = {"peft_version", "peft_type"}
    needed = {"total_step": 10} if name == "ADALORA" else {}
    # What no file can hold.
    left_out |= {"mask_fn", "runtime_config", "_custom_modules"}
    expected = {key: value for key, value in vars(theirs(**needed)).items() if key not in left_out}
    # Every spec here can exclude modules.
    left_out |= {"exclude_modules"} - expected.keys()
    found = {key: value for key, value in vars(ours(**needed)).items() if key not in left_out}
    assert found == expected


@pytest.mark.parametrize("name", NAMES)
def test_default_targets_are_peft_s(name: str) -> None:
    table = f"TRANSFORMERS_MODELS_TO_{name.replace('_', '')}_TARGET_MODULES_MAPPING"
    found, expected = dict(getattr(served.utils.constants, table)), dict(getattr(constants, table))
    if name == "LN_TUNING":
        del expected["llava"]  # Containers, which are refused (docs/migration.md).
        found = {kind: targets for kind, targets in found.items() if kind in expected}
    if name == "OSF":
        # Older names of falcon have its targets here.
        found = {kind: targets for kind, targets in found.items() if not kind.startswith("RefinedWeb")}
    assert found == expected


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SCRIPTED])
def test_a_model_of_transformers_is_adapted_as_by_peft(name: str, tmp_path: Path) -> None:
    theirs, ours = classes(name)
    method, fields, model = (
        METHODS[served.PeftType(name)],
        FIELDS.get(name, {}),
        tiny("llama", attention_bias=name in BIASED),
    )
    base = copy.deepcopy(model)
    one = perturbed(quietly(peft.get_peft_model, copy.deepcopy(base), theirs(task_type="CAUSAL_LM", **fields)), 1)
    other = served.get_peft_model(model, ours(task_type="CAUSAL_LM", **fields))
    state, own = (library.get_peft_model_state_dict(m) for library, m in ((peft, one), (served, other)))
    assert {key: tensor.shape for key, tensor in own.items()} == {key: tensor.shape for key, tensor in state.items()}
    # What is frozen is a parameter here, and may be a buffer there.
    saved = one.state_dict().keys()
    buffers = sum(tensor.numel() for key, tensor in one.named_buffers() if method.prefix in key and key in saved)
    trained, total = one.get_nb_trainable_parameters()
    assert other.get_nb_trainable_parameters() == (trained, total + buffers)
    layer = getattr(getattr(served.tuners, method.module), method.layer)
    adapted = [module for module in other.modules() if isinstance(module, layer)]
    assert len(adapted) == len(one.base_model.targeted_module_names)
    assert layer.adapter_layer_names
    assert isinstance(other.base_model, getattr(served, method.model))
    assert all(key.rpartition("model.")[2].partition(method.prefix)[1] for key in state)
    served.set_peft_model_state_dict(other, state)
    inputs = {**inputs_for("llama"), **CALLS.get(name, {})}
    expected = one(**inputs).logits
    torch.testing.assert_close(other.eval()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    other.save_pretrained(tmp_path)
    again = quietly(peft.PeftModel.from_pretrained, base, tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    if name in CALLS:
        with pytest.raises(peftc.MergeError, match="weight of its own"):
            other.merge_and_unload()
        return
    merged = other.merge_and_unload()
    assert merged is model
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-3, atol=1e-4)
