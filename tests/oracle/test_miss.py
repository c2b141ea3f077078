"""MiSS against peft, which has Bone by that name now, on linear sites."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc.testing import check_rule
from peftc_rules.miss import Bat, Miss
from tests.support.against import config_of, half_as_peft, same_as_peft
from tests.support.interchange import perturbed


class Net(nn.Module):
    """Linears, whose sizes r divides or not."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.m, self.n = nn.Linear(8, 12), nn.Linear(12, 16, bias=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.m(torch.tanh(self.l(x))))


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
FIELDS = {"r": 4, "target_modules": ["l", "m", "n"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "does not divide": {"r": 5},
    "random": {"init_weights": False},
    "mini": {"init_weights": "mini", "mini_r": 2},
    "mini that does not divide the inputs": {"init_weights": "mini", "mini_r": 4, "r": 3},
    "bat": {"init_weights": "bat"},
    "dropout in eval": {"miss_dropout": 0.5},
    "biases": {"bias": "MiSS_only"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_peft_s(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    same_as_peft(Net(), config_of("MissConfig", {**FIELDS, **VARIANTS[variant]}), X, tmp_path)


@pytest.mark.parametrize("init", [True, "mini", "bat"])
def test_half_precision(init: Any, tmp_path: Path) -> None:
    half_as_peft(Net(), config_of("MissConfig", {**FIELDS, "init_weights": init}), X, tmp_path)


@pytest.mark.parametrize("fields", [{"r": 3}, {"r": 2, "init_weights": "mini", "mini_r": 3}], ids=str)
def test_variants_keep_the_laws(fields: dict[str, Any]) -> None:
    assert check_rule(Miss(), peftc.MissConfig(**fields))


def test_bat_keeps_the_laws() -> None:
    assert check_rule(Bat(), peftc.MissConfig(r=2, init_weights="bat"))


def test_a_fresh_one_is_the_base() -> None:
    net = Net().requires_grad_(False)
    with torch.no_grad():
        for init in (True, "mini", "bat"):
            assert torch.equal(peftc.compile(net, peftc.MissConfig(**FIELDS, init_weights=init))(X), net(X))


def test_dropout_draws_peft_s_mask() -> None:
    from peft import get_peft_model

    net = Net()
    config = config_of("MissConfig", {**FIELDS, "miss_dropout": 0.5})
    theirs = perturbed(get_peft_model(copy.deepcopy(net), config), 1).train()
    ours = perturbed(peftc.compile(net, peftc.MissConfig(**FIELDS, miss_dropout=0.5)), 1).train()
    torch.manual_seed(3)
    expected = theirs(X)
    torch.manual_seed(3)
    torch.testing.assert_close(ours(X), expected)


def test_rows_of_a_batch_have_adapters_of_their_own_by_batched_products() -> None:
    torch.manual_seed(0)
    net, spec = Net(), peftc.MissConfig(**FIELDS)
    ours = perturbed(peftc.compile(net, {"a": spec, "b": peftc.MissConfig(r=5, target_modules=["l"])}), 1)
    with torch.no_grad():
        for name in ("a", "b"):
            for tensor in ours.adapter_state_dict(name).values():
                tensor.add_(torch.randn_like(tensor))
    together = ours(X, adapter_names=["a", "__base__", "b"])
    for row, name in enumerate(["a", "__base__", "b"]):
        ours.set_adapter([] if name == "__base__" else name)
        torch.testing.assert_close(together[row], ours(X)[row], rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    net = nn.Sequential(nn.Linear(12, 8))
    for fields, message in (
        ({}, "r=64 is over its 12 inputs"),
        ({"r": 4, "init_weights": "mini", "mini_r": 3}, "mini_r=3 does not divide its 8 outputs"),
        ({"r": 3, "init_weights": "bat"}, "needs blocks of r × r, and r=3 does not divide its 12 inputs and 8 outputs"),
    ):
        with pytest.raises(peftc.NoMatchError, match=message):
            peftc.compile(net, peftc.MissConfig(**fields, target_modules=["0"]))
