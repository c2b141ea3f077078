"""A method in peft and here, on the same weights: outputs, gradients, files both ways, merging and undoing."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import peftc


class Linears(nn.Module):
    """Linears of two sizes and layouts, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.c, self.n = nn.Linear(8, 6), Conv1D(12, 6), nn.Linear(12, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(torch.tanh(self.c(torch.tanh(self.l(x)))))


LINEARS = ["l", "c", "n"]
ROWS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


def in_peft(net: nn.Module, config: Any, moved: float = 0.2) -> Any:
    """`net` in peft, with an adapter that is as if it had been trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(copy.deepcopy(net), config).eval()
    freeze_ranknum(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += moved * torch.randn(parameter.shape, dtype=parameter.dtype)
    return model


def freeze_ranknum(model: nn.Module) -> None:
    """Keep AdaLoRA's count of ranks in peft what its file says: of a base that is not float32 it gets a gradient, and is
    trained and not saved.
    """
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)


# What sites share, which peft names after the first of them.
_SHARED = re.compile(r".*(?=vblora_vector_bank|unilora_theta_d|tinylora_v\.)")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by the parameter's name, without what stands before and around the base's names."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    plain = {name.removeprefix("base_model.model.").removeprefix("base."): gradient for name, gradient in found.items()}
    return _together({_SHARED.sub("", name.replace(".base_layer.", ".")): gradient for name, gradient in plain.items()})


# AdaMSS's factors, which peft has by subspace.
_SUBSPACE = re.compile(r"(.*adamss_([AB])\.\w+)\.\d+")


def _together(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with the gradients of a site's subspaces in one tensor, as peftc has them."""
    made: dict[str, Tensor] = {}
    for name, gradient in found.items():
        match = _SUBSPACE.fullmatch(name)
        if match is None:
            made[name] = gradient
            continue
        own = [other for key, other in found.items() if key.startswith(f"{match[1]}.")]
        rank = max(len(factor) if match[2] == "A" else factor.shape[1] for factor in own)
        widened = [F.pad(f, (0, 0, 0, rank - len(f)) if match[2] == "A" else (0, rank - f.shape[1])) for f in own]
        made[match[1]] = torch.stack(widened) if match[2] == "A" else torch.cat(widened)
    return made


# How far a bfloat16 model may be off: peft multiplies its activations, cast up, by the adapter; peftc casts the adapter.
# Against float64 both are equally near, to a factor of 1.5.
HALF = 2 * torch.finfo(torch.bfloat16).eps


def assert_near(found: Tensor, expected: Tensor, within: float, what: str) -> None:
    """Equal within a part of the largest magnitude."""
    scale = float(expected.detach().abs().max().clamp_min(1e-30))
    error = float((found.detach() - expected.detach()).abs().max()) / scale
    assert error <= within, f"{what}: off by {error:.2e} of the largest"


def compare(
    net: nn.Module,
    x: Tensor,
    config: Any,
    folder: Path,
    within: float = 2e-6,
    moved: float = 0.2,
    merged: float | None = None,
) -> tuple[Any, peftc.CompiledModel]:
    """Hold an adapter of `config`, moved off its start, to peft's; both models are returned.

    `merged`: how much outputs may be off after merging, where that rounds weights.
    """
    model = in_peft(net, config, moved)
    y = model(x)
    assert not torch.allclose(y, net(x), atol=1e-2), "the adapter changes nothing, so nothing would be compared"
    model.save_pretrained(folder / "theirs")
    ours = peftc.load(net, folder / "theirs", is_trainable=True).eval()
    assert_near(ours(x), y, within, "outputs, from peft's files")
    for one in (model, ours):
        one(x).float().square().sum().backward()
    own, theirs = gradients(ours), gradients(model)
    assert own.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        error = float((own[name] - gradient).abs().max()) / largest
        assert error <= 2 * within, f"gradient of {name}: off by {error:.2e} of the largest"
    ours.save_pretrained(folder / "ours")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(folder / "ours")).eval()
    assert not [str(one.message) for one in said if "nexpected" in str(one.message)], "peft knows all fields and keys"
    assert torch.equal(again(x), y), "peft reads other values out of the file"
    assert torch.equal(peftc.load(net, folder / "ours")(x), ours(x))
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    y = ours(x)
    with ours.merged():
        assert_near(ours(x), y, merged or 2 * within, "outputs, merged")
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    return model, ours
