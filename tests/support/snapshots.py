"""What a model is made of, to be compared with what it is later."""

from typing import Any

import torch
from torch import Tensor, nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that must not change: classes, tensors, flags."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "grad": {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)},
        "identity": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "tensors": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any], identity: bool = True) -> None:
    """Raise if `model` differs from its snapshot."""
    after = snapshot(model)
    for part in ("classes", "training", "grad", *(["identity"] if identity else [])):
        assert after[part] == before[part], part
    assert set(after["tensors"]) == set(before["tensors"])
    for name, tensor in before["tensors"].items():
        assert torch.equal(_bits(after["tensors"][name]), _bits(tensor)), name


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaN equals NaN and -0 is not 0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
