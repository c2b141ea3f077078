"""Specs and adapters that most tests of them want: small, and moved away from where training starts."""

from pathlib import Path
from typing import Any

import torch

import peftc
from peftc import registry
from tests.support.models import llama

# By method, what its spec has to say more than where, for small models.
EVERY_METHOD: dict[str, dict[str, Any]] = {
    **{name: {} for name in registry.spec_classes()},
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 10},
    "OFT": {"oft_block_size": 8},
    "IA3": {"target_modules": ["k_proj", "down_proj"]},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "VERA": {"r": 4},
    "VBLORA": {"vector_length": 8, "num_vectors": 8},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "WAVEFT": {"n_frequency": 10},
    "ADAPTION_PROMPT": {"target_modules": "self_attn", "adapter_len": 4, "adapter_layers": 2},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2], "target_modules": ["embed_tokens"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
}


def lora(*targets: str, **fields: Any) -> peftc.LoraConfig:
    """A LoRA of rank 4."""
    return peftc.LoraConfig(target_modules=list(targets), r=4, **fields)


def perturb(compiled: peftc.CompiledModel) -> peftc.CompiledModel:
    """Move every adapter tensor away from its start, by torch's own generator."""
    with torch.no_grad():
        for name in compiled.peft_config:
            for tensor in compiled.adapter_state_dict(name).values():
                if tensor.is_floating_point():
                    tensor.add_(0.3 * torch.randn(tensor.shape).to(tensor.dtype))
    return compiled


def saved(folder: Path, **fields: Any) -> peftc.CompiledModel:
    """A llama with a LoRA of rank 2, and that LoRA in `folder`."""
    spec = peftc.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 2, "task_type": "CAUSAL_LM", **fields})
    compiled = perturb(peftc.compile(llama(), spec))
    compiled.save_pretrained(folder)
    return compiled
