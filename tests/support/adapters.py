"""Specs and adapters that most tests of them want: small, and moved away from where training starts."""

from pathlib import Path
from typing import Any

import torch

import peftc
from tests.support.models import llama


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
