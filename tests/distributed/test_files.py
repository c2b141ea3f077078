"""Files of models that two processes hold together: adapters whole, merged models without any process holding all."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard

import peftc
from tests.support.adapters import perturb
from tests.support.processes import batch, close, full, llama, run

pytestmark = pytest.mark.slow

SPECS = {
    "default": peftc.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
    "biases": peftc.LoraConfig(r=4, target_modules=["v_proj"], bias="all"),
    "pissa": peftc.LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights="pissa"),
    "encoded": peftc.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, task_type="CAUSAL_LM"),
    "recurrent": peftc.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=8, encoder_reparameterization_type="LSTM", task_type="CAUSAL_LM"
    ),
    "prompt": peftc.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def compiled_llama() -> peftc.CompiledModel:
    torch.manual_seed(0)
    return perturb(peftc.compile(llama(attention_bias=True), copy.deepcopy(SPECS)))


def sharded(order: str) -> peftc.CompiledModel:
    """A model with the same adapters, whose numbers are others."""
    torch.manual_seed(1)
    model = llama(attention_bias=True)
    compiled = peftc.compile(model, copy.deepcopy(SPECS), inplace=True) if order == "after" else None
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return compiled or peftc.compile(model, copy.deepcopy(SPECS), inplace=True)


def tensors(compiled: peftc.CompiledModel, name: str) -> dict[str, Tensor]:
    return {key: full(value) for key, value in compiled.adapter_state_dict(name).items()}


def outputs(compiled: peftc.CompiledModel) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in compiled.peft_config:
        compiled.set_adapter(name)
        with torch.no_grad():
            found[name] = compiled(**batch(0)).logits
    compiled.set_adapter("default")
    return found


def _saves(rank: int, folder: Path, order: str) -> None:
    alone, compiled = compiled_llama(), sharded(order)
    if rank == 0:
        alone.save_pretrained(folder / "alone")
    distributed.barrier()
    for name in SPECS:
        path = folder / "alone" if name == "default" else folder / "alone" / name
        compiled.load_adapter(path, name, is_trainable=True)
    for name, expected in outputs(alone).items():
        found = outputs(compiled)[name]
        assert torch.allclose(found, expected, atol=1e-5), name
    compiled.save_pretrained(folder / "saved", is_main_process=rank == 0)
    distributed.barrier()
    written = sorted(path.relative_to(folder / "alone") for path in (folder / "alone").rglob("*") if path.is_file())
    for path in written:
        assert (folder / "saved" / path).read_bytes() == (folder / "alone" / path).read_bytes(), path


@pytest.mark.parametrize("order", ["before", "after"])
def test_files_are_byte_for_byte_those_of_one_process(order: str, tmp_path: Path) -> None:
    run(_saves, order, folder=tmp_path)
