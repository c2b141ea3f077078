"""DeLoRA against peft, on linear sites."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftc
from tests.support.against import config_of, half_as_peft, same_as_peft
from tests.support.interchange import perturbed, quietly


class Net(nn.Module):
    """Linears with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.m, self.n = nn.Linear(8, 12), nn.Linear(12, 16, bias=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.m(torch.tanh(self.l(x))))


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
FIELDS = {"r": 4, "delora_lambda": 3, "target_modules": ["l", "m", "n"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "random": {"init_weights": False},
    "patterns": {"rank_pattern": {"l": 2}, "lambda_pattern": {"m": 7}},
    "dropout in eval": {"module_dropout": 0.5},
    "biases": {"bias": "delora_only"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_peft_s(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    same_as_peft(Net(), config_of("DeloraConfig", {**FIELDS, **VARIANTS[variant]}), X, tmp_path)


def test_half_precision(tmp_path: Path) -> None:
    half_as_peft(Net(), config_of("DeloraConfig", FIELDS), X, tmp_path)


def test_a_fresh_one_is_the_base_and_trains() -> None:
    net = Net().requires_grad_(False)
    ours = peftc.compile(net, peftc.DeloraConfig(**FIELDS))
    with torch.no_grad():
        assert torch.equal(ours(X), net(X))
    assert float(ours.base.l.delora_lambda["default"]) == 3
    torch.testing.assert_close(ours.base.l.delora_w_norm["default"], net.l.weight.norm(dim=0))
    assert not ours.base.l.delora_w_norm["default"].requires_grad
    ours(X).square().sum().backward()
    assert bool(ours.base.l.delora_B["default"].grad.isfinite().all())
    assert bool(ours.base.l.delora_B["default"].grad.any())


def test_dropout_draws_peft_s_mask() -> None:
    net, fields = Net(), {**FIELDS, "module_dropout": 0.5}
    theirs = perturbed(quietly(peft.get_peft_model, copy.deepcopy(net), config_of("DeloraConfig", fields)), 1).train()
    ours = peftc.compile(net, peftc.DeloraConfig(**fields)).train()
    with torch.no_grad():
        for site in "lmn":
            one, other = getattr(ours.base, site), getattr(theirs.base_model.model, site)
            for name in ("delora_A", "delora_B", "delora_lambda"):
                getattr(one, name)["default"].copy_(getattr(other, name)["default"])
    torch.manual_seed(3)
    expected = theirs(X)
    torch.manual_seed(3)
    torch.testing.assert_close(ours(X), expected)


def test_its_length_is_at_most_lambda() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6, bias=False))
    ours = perturbed(peftc.compile(net, peftc.DeloraConfig(r=4, delora_lambda=2, target_modules=["0"])), 1)
    strength = float(ours.base[0].delora_lambda["default"])
    ours.merge_adapter()
    change = (ours.base[0].weight - net[0].weight) / net[0].weight.norm(dim=0)
    assert 0 < float(change.norm()) <= abs(strength) + 1e-5
