"""PEFT's optimisers whose parameters learn at rates of their own."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from peftc.peft.layers import Embedding

__all__ = ["create_loraplus_optimizer"]


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): an optimiser with which B learns `loraplus_lr_ratio` times as fast as A.

    Vectors (biases, magnitudes) learn as B, embeddings with LoRA by `loraplus_lr_embedding` (1e-6), all else that trains by
    `lr`. `loraplus_weight_decay` (0.0) is for all but biases and layer norms that learn as B; `kwargs` are the optimiser's.

    Example: optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=5e-5, loraplus_lr_ratio=16)
    """
    embedding_lr, decay = kwargs.pop("loraplus_lr_embedding", 1e-6), kwargs.pop("loraplus_weight_decay", 0.0)
    rates = {"A": lr, "embedding": embedding_lr, "B": lr * loraplus_lr_ratio, "B undecayed": lr * loraplus_lr_ratio}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group(modules, name, parameter)].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": members[name], "lr": rate, "weight_decay": 0.0 if name == "B undecayed" else decay}
        for name, rate in rates.items()
    ]
    make: Any = optimizer_cls
    return make(groups, **kwargs)


def _group(modules: dict[str, nn.Module], name: str, parameter: nn.Parameter) -> str:
    path = name.split(".")
    if any(isinstance(modules[".".join(path[:end])], Embedding) for end in range(len(path))):
        return "embedding"
    if "lora_B" not in name and parameter.ndim != 1:
        return "A"
    norm = isinstance(modules[name.rpartition(".")[0]], nn.LayerNorm)
    return "B undecayed" if norm or "bias" in name else "B"
