"""C3A against peft, on linear sites."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftc
from tests.support.against import config_of, half_as_peft, same_as_peft
from tests.support.interchange import quietly


class Net(nn.Module):
    """Linears with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.m, self.n = nn.Linear(8, 12), nn.Linear(12, 16, bias=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.m(torch.tanh(self.l(x))))


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
FIELDS = {"block_size": 4, "target_modules": ["l", "m", "n"]}
# What is in front of the last layer.
BEFORE = ("l.c3a", "l.bias", "m.c3a")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zeros": {"init_weights": True},
    "gaussian": {"init_weights": "gaussian"},
    "odd blocks": {"block_size": 3, "target_modules": ["m"], "init_weights": "gaussian"},
    "patterns": {"block_size_pattern": {"m": 2, "n": 1}},
    "biases": {"bias": "c3a_only"},
}


class Odd(nn.Module):
    """Sizes that three divides."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_peft_s(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = (Odd(), torch.randn(3, 9)) if variant == "odd blocks" else (Net(), X)
    fields = {**FIELDS, **VARIANTS[variant]}
    # What peft's backward passes on to the layers before is wrong, as the next test shows.
    without = () if variant in ("odd blocks", "patterns") else BEFORE
    same_as_peft(net, config_of("C3AConfig", fields), x, tmp_path, without=without)


def test_gradients_of_inputs_are_those_of_differences() -> None:
    """peft's backward turns the vectors the other way; from blocks of three on that is another gradient."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(1, 8)
    fields = {"block_size": 4, "init_weights": "gaussian", "target_modules": ["0"]}
    theirs = quietly(peft.get_peft_model, copy.deepcopy(net), config_of("C3AConfig", fields))
    ours = peftc.compile(net, peftc.C3AConfig(**fields))
    with torch.no_grad():
        ours.base[0].c3a_kernel["default"].copy_(theirs.base_model.model[0].c3a_kernel["default"])

    def gradient(model: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        model(leaf)[0, 1].backward()
        assert leaf.grad is not None
        return leaf.grad

    exact = [float(ours(x + step)[0, 1] - ours(x - step)[0, 1]) / 0.2 for step in 0.1 * torch.eye(8)]
    torch.testing.assert_close(gradient(ours), torch.tensor([exact]), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(gradient(theirs), torch.tensor([exact]), atol=1e-2)


def test_half_precision(tmp_path: Path) -> None:
    config = config_of("C3AConfig", {**FIELDS, "init_weights": "gaussian"})
    half_as_peft(Net(), config, X, tmp_path, without=BEFORE)


def test_half_precision_parameters_are_transformed_in_float32() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8)).bfloat16(), torch.randn(2, 8).bfloat16()
    ours = peftc.compile(net, peftc.C3AConfig(block_size=4, target_modules=["0"]), autocast_adapter_dtype=False)
    assert ours.base[0].c3a_kernel["default"].dtype == torch.bfloat16
    assert ours(x).dtype == torch.bfloat16


@pytest.mark.parametrize("init", [True, False, "xavier_uniform", "kaiming_uniform", "gaussian"])
def test_starts_are_as_wide_as_peft_s(init: Any) -> None:
    net = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    fields = {"block_size": 2, "init_weights": init, "target_modules": ["0"]}
    ours = peftc.compile(net, peftc.C3AConfig(**fields))
    theirs = quietly(peft.get_peft_model, copy.deepcopy(net), config_of("C3AConfig", fields))
    one, other = ours.base[0].c3a_kernel["default"], theirs.base_model.model[0].c3a_kernel["default"]
    torch.testing.assert_close(one.std(), other.std(), rtol=0.1, atol=0)
    x = torch.randn(2, 64)
    assert torch.equal(ours(x), net(x)) is (init is True)


def test_what_does_not_fit_is_refused_and_unused_patterns_are_told() -> None:
    net = nn.Sequential(nn.Linear(6, 9))
    with pytest.raises(peftc.NoMatchError, match="block_size=256 does not divide its 6 inputs and 9 outputs"):
        peftc.compile(net, peftc.C3AConfig(target_modules=["0"]))
    plan = peftc.plan(net, peftc.C3AConfig(block_size=3, target_modules=["0"], block_size_pattern={"q_proj": 2}))
    assert any(miss.field == "block_size_pattern" for miss in plan.misses)
    with pytest.raises(peftc.SpecError, match=r"block_size_pattern: '\(' is not a regular expression"):
        peftc.C3AConfig(block_size_pattern={"(": 2})
