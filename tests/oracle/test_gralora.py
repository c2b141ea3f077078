"""GraLoRA against peft, on linear sites of either layout."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftc
from peftc.testing import check_rule
from peftc_rules.gralora import Gralora
from tests.support.against import config_of, half_as_peft, same_as_peft
from tests.support.interchange import perturbed, quietly


class Net(nn.Module):
    """Linears, one of them stored (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.t, self.n = nn.Linear(8, 12), Conv1D(16, 12), nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.t(torch.tanh(self.l(x))))


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
FIELDS = {"r": 4, "alpha": 6, "target_modules": ["l", "n"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "four by four": {"r": 8, "gralora_k": 4},
    "one": {"gralora_k": 1},
    "hybrid": {"hybrid_r": 3},
    "random": {"init_weights": False, "hybrid_r": 2},
    "stored (in, out)": {"target_modules": ["t"], "fan_in_fan_out": True, "hybrid_r": 2},
    "dropout in eval": {"gralora_dropout": 0.5},
    "biases": {"bias": "gralora_only"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_peft_s(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    same_as_peft(Net(), config_of("GraloraConfig", {**FIELDS, **VARIANTS[variant]}), X, tmp_path)


def test_half_precision(tmp_path: Path) -> None:
    half_as_peft(Net(), config_of("GraloraConfig", {**FIELDS, "hybrid_r": 2}), X, tmp_path)


def test_variants_keep_the_laws() -> None:
    assert check_rule(Gralora(), peftc.GraloraConfig(r=4, hybrid_r=2))


def test_a_fresh_one_is_the_base_and_starts_as_peft_s() -> None:
    net = Net().requires_grad_(False)
    with torch.no_grad():
        ours = peftc.compile(net, peftc.GraloraConfig(**{**FIELDS, "r": 64}))
        assert torch.equal(ours(X), net(X))
    bound = float(ours.base.l.gralora_A["default"].abs().max())
    theirs = quietly(peft.get_peft_model, copy.deepcopy(net), config_of("GraloraConfig", {**FIELDS, "r": 64}))
    other = float(theirs.base_model.model.l.gralora_A["default"].abs().max())
    assert bound == pytest.approx(0.5, abs=0.03)
    assert other == pytest.approx(0.5, abs=0.03)


def test_dropout_draws_peft_s_masks() -> None:
    net, fields = Net(), {**FIELDS, "gralora_dropout": 0.5, "hybrid_r": 2}
    theirs = perturbed(quietly(peft.get_peft_model, copy.deepcopy(net), config_of("GraloraConfig", fields)), 1).train()
    ours = perturbed(peftc.compile(net, peftc.GraloraConfig(**fields)), 1).train()
    theirs.load_state_dict({f"base_model.model.{n}": v for n, v in _renamed(ours, theirs).items()}, strict=False)
    torch.manual_seed(3)
    expected = theirs(X)
    torch.manual_seed(3)
    torch.testing.assert_close(ours(X), expected)


def _renamed(ours: Any, theirs: Any) -> dict[str, Tensor]:
    return {name.removeprefix("base."): value for name, value in ours.named_parameters() if "gralora" in name}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(peftc.SpecError, match="gralora_k=3 does not divide r=32"):
        peftc.GraloraConfig(gralora_k=3)
    net = nn.Sequential(nn.Linear(6, 9))
    with pytest.raises(peftc.NoMatchError, match="gralora_k=2 does not divide its 6 inputs and 9 outputs"):
        peftc.compile(net, peftc.GraloraConfig(target_modules=["0"]))
