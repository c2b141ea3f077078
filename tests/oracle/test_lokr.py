"""LoKr against peft, on linear sites and convolutions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc.testing import check_rule
from peftc_rules.lokr import Lokr, _factor
from tests.support.against import config_of, half_as_peft, same_as_peft
from tests.support.interchange import perturbed
from tests.support.models import QuantisedLinear


class Net(nn.Module):
    """Convolutions in two dimensions and in one, with groups too, and linears."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.k = nn.Conv2d(3, 12, 3, padding=1, stride=2), nn.Conv2d(12, 12, 1)
        self.g, self.d = nn.Conv2d(12, 12, 3, padding=1, groups=2), nn.Conv1d(12, 18, 3)
        self.l, self.n = nn.Linear(14, 24), nn.Linear(24, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(torch.tanh(self.l(self.d(self.g(self.k(self.c(x))).flatten(2)))))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TARGETS = ["c", "k", "g", "d", "l", "n"]
# peft's own product of 1d convolutions in the effective form fails on their strides.
TWO = ["c", "k", "g", "l", "n"]
FIELDS = {"r": 2, "alpha": 6, "target_modules": TARGETS}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 1},
    "whole": {"r": 16},
    "both": {"r": 1, "decompose_both": True},
    "factor": {"decompose_factor": 3},
    "effective": {"r": 1, "use_effective_conv2d": True, "target_modules": TWO},
    "effective both": {
        "target_modules": TWO,
        "r": 1,
        "use_effective_conv2d": True,
        "decompose_both": True,
        "decompose_factor": 6,
    },
    "patterns": {"rank_pattern": {"l": 3}, "alpha_pattern": {"n": 1}},
    "lycoris": {"init_weights": "lycoris"},
    "random": {"init_weights": False},
    "dropouts in eval": {"rank_dropout": 0.5, "module_dropout": 0.5, "rank_dropout_scale": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_peft_s(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    same_as_peft(Net(), config_of("LoKrConfig", {**FIELDS, **VARIANTS[variant]}), X, tmp_path)


def test_effective_form_of_a_1d_convolution() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv1d(12, 18, 3)), torch.randn(2, 12, 9)
    spec = peftc.LoKrConfig(r=1, alpha=2, use_effective_conv2d=True, target_modules=["0"])
    ours = perturbed(peftc.compile(net, spec), 1)
    core, up, down = (getattr(ours.base[0], f"lokr_{name}")["default"] for name in ("t2", "w2_a", "w2_b"))
    inner = torch.einsum("ijk,io,jn->onk", core[..., 0], up, down)
    outer = ours.base[0].lokr_w1["default"]
    weight = torch.stack([torch.kron(outer, inner[..., k].contiguous()) for k in range(3)], -1)
    torch.testing.assert_close(ours(x), nn.functional.conv1d(x, net[0].weight + 2 * weight, net[0].bias))


def test_half_precision(tmp_path: Path) -> None:
    half_as_peft(Net(), config_of("LoKrConfig", FIELDS), X, tmp_path)


@pytest.mark.parametrize("init", [True, "lycoris"])
def test_a_fresh_one_is_the_base(init: Any) -> None:
    net = Net().requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(peftc.compile(net, peftc.LoKrConfig(**FIELDS, init_weights=init))(X), net(X))
        random = peftc.LoKrConfig(**FIELDS, init_weights=False)
        assert not torch.equal(peftc.compile(net, random)(X), net(X))


@pytest.mark.parametrize(
    "fields", [{"rank_dropout": 0.5}, {"r": 1, "use_effective_conv2d": True, "module_dropout": 0.2}], ids=str
)
def test_its_form_on_the_output_keeps_the_laws(fields: dict[str, Any]) -> None:
    assert check_rule(Lokr(), peftc.LoKrConfig(**fields))


def test_sizes_are_split_as_peft_splits_them() -> None:
    from peft.tuners.lokr.layer import factorization

    for size in (1, 2, 7, 8, 12, 16, 30, 64, 96, 127, 768):
        for near in (-1, 1, 2, 3, 4, 5, 8, 13, 96, 1000):
            assert _factor(size, near) == factorization(size, near)[0], (size, near)


@pytest.mark.parametrize("name", ["LoKrConfig", "LoHaConfig"])
def test_dropouts_drop_outputs_of_the_change(name: str) -> None:
    torch.manual_seed(0)
    net, cls = nn.Sequential(nn.Linear(8, 64)), getattr(peftc, name)
    x = torch.randn(5, 8)

    def change(**fields: Any) -> tuple[Tensor, Tensor]:
        """What the adapter adds in train(), and in eval()."""
        compiled = perturbed(peftc.compile(net, cls(r=4, target_modules=["0"], **fields)), 1)
        return compiled.train()(x) - net(x), compiled.eval()(x) - net(x)

    found, whole = change(rank_dropout=0.5)
    kept = found.abs().sum(0) > 0
    assert 16 < int(kept.sum()) < 48
    # LoHa scales up what is left, LoKr if it is told to.
    gain = 64 / float(kept.sum()) if name == "LoHaConfig" else 1.0
    torch.testing.assert_close(found[:, kept], whole[:, kept] * gain, rtol=1e-4, atol=1e-5)
    if name == "LoKrConfig":
        found, whole = change(rank_dropout=0.5, rank_dropout_scale=True)
        kept = found.abs().sum(0) > 0
        torch.testing.assert_close(found[:, kept], whole[:, kept] * 64 / float(kept.sum()), rtol=1e-4, atol=1e-5)
    present = [bool(change(module_dropout=0.5)[0].abs().sum() > 0) for _ in range(20)]
    assert 3 < sum(present) < 17


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(peftc.SpecError, match="decompose_factor: got 0; give a positive number, or -1"):
        peftc.LoKrConfig(decompose_factor=0)
    with pytest.raises(peftc.SpecError, match="rank_dropout"):
        peftc.LoKrConfig(rank_dropout=1.0)


def test_quantised_linears_are_adapted_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(QuantisedLinear(nn.Linear(8, 6)))
    compiled = perturbed(peftc.compile(net, peftc.LoKrConfig(r=2, target_modules=["0"])), 1)
    x, one, other = torch.randn(3, 8), *(getattr(compiled.base[0], f"lokr_w{i}")["default"] for i in (1, 2))
    torch.testing.assert_close(compiled(x), net(x) + x @ torch.kron(one, other).T * 4)
