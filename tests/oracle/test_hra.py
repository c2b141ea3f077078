"""HRA against peft, on linear sites and convolutions."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc.testing import check_rule
from peftc_rules.hra import Hra, HraConv
from tests.support.against import config_of, half_as_peft, same_as_peft
from tests.support.interchange import quietly


class Net(nn.Module):
    """Convolutions with and without a kernel, and linears."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.k = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1, bias=False)
        self.l, self.n = nn.Linear(8, 16), nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(torch.tanh(self.l(self.k(self.c(x)).mean((2, 3)))))


X = torch.randn(3, 8, 5, 5, generator=torch.Generator().manual_seed(0))
FIELDS = {"r": 4, "target_modules": ["c", "k", "l", "n"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd": {"r": 3},
    "many": {"r": 12},
    "orthogonal": {"apply_GS": True},
    "biases": {"bias": "hra_only"},
    "random": {"init_weights": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_peft_s(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    same_as_peft(Net(), config_of("HRAConfig", {**FIELDS, **VARIANTS[variant]}), X, tmp_path)


def test_half_precision(tmp_path: Path) -> None:
    half_as_peft(Net(), config_of("HRAConfig", FIELDS), X, tmp_path)


def test_half_precision_parameters_are_solved_for_in_float32() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 6)).bfloat16(), torch.randn(2, 8).bfloat16()
    spec = peftc.HRAConfig(r=3, target_modules=["0"])
    ours = peftc.compile(net, spec, autocast_adapter_dtype=False)
    assert ours.base[0].hra_u["default"].dtype == torch.bfloat16
    assert ours(x).dtype == torch.bfloat16


def test_variants_keep_the_laws() -> None:
    for rule in (Hra(), HraConv()):
        assert check_rule(rule, peftc.HRAConfig(r=3, apply_GS=True))


def test_a_fresh_one_is_the_base_but_for_rounding() -> None:
    net = Net()
    torch.testing.assert_close(peftc.compile(net, peftc.HRAConfig(**FIELDS))(X), net(X), rtol=1e-5, atol=1e-6)


def test_orthogonal_vectors_begin_apart_from_each_other() -> None:
    """peft begins with pairs of equal vectors here too, and divides what is left of the second, which is only rounding, by
    its length.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6))
    theirs = quietly(
        peft.get_peft_model, copy.deepcopy(net), config_of("HRAConfig", {**FIELDS, "target_modules": ["0"]})
    )
    pairs = theirs.base_model.model[0].hra_u["default"]
    assert torch.equal(pairs[:, ::2], pairs[:, 1::2])
    ours = peftc.compile(net, peftc.HRAConfig(r=4, apply_GS=True, target_modules=["0"]))
    u = ours.base[0].hra_u["default"]
    assert float(torch.linalg.svdvals(u / u.norm(dim=0)).min()) > 0.05
    with pytest.raises(peftc.NoMatchError, match=r"makes r=12 vectors orthogonal in 8 dimensions"):
        peftc.compile(net, peftc.HRAConfig(r=12, apply_GS=True, target_modules=["0"]))


def test_reflections_keep_lengths() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6, bias=False))
    ours = peftc.compile(net, peftc.HRAConfig(r=5, target_modules=["0"]))
    ours.merge_adapter()
    assert not torch.allclose(ours.base[0].weight, net[0].weight, atol=1e-2)
    torch.testing.assert_close(ours.base[0].weight.norm(dim=1), net[0].weight.norm(dim=1))
