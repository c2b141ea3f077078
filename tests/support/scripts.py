"""Small models for what scripts do with peft and with peftc.peft alike."""

from typing import Any

import torch

from tests.support.small import small_model


def base(cls: str = "LlamaForCausalLM", kind: str = "llama", **more: Any) -> Any:
    """A model of transformers that is the same every time."""
    torch.manual_seed(0)
    model = small_model(kind, cls, **more)
    assert model is not None
    return model


def filled(model: Any, seed: int = 1) -> Any:
    """`model` with values in its adapters that depend on their sorted names alone."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted((name.replace(".base_layer", ""), p) for name, p in model.named_parameters()):
        if "lora_" in name or "prompt_encoder" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
