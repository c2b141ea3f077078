"""BOFT against peft, on linear sites and convolutions. peft makes several factors with its CUDA extension only: here
another function stands in for that.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft_layer
from torch import Tensor, nn

import peftc
from peftc.testing import check_rule
from peftc_rules.boft import Boft, BoftConv
from tests.support.against import config_of, half_as_peft, same_as_peft
from tests.support.interchange import perturbed, quietly


class Net(nn.Module):
    """Convolutions with and without a kernel, and linears."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.k = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1, bias=False)
        self.l, self.n = nn.Linear(8, 16), nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(torch.tanh(self.l(self.k(self.c(x)).mean((2, 3)))))


X = torch.randn(3, 8, 5, 5, generator=torch.Generator().manual_seed(0))
LINEAR = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


class _Diagonal:
    """peft's extension: blocks (n, d, b, b) → matrices (n, d·b, d·b), and back."""

    def forward(self, blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*own) for own in blocks])]

    def backward(self, gradient: Tensor, blocks: Tensor) -> list[Tensor]:
        n, d, b, _ = blocks.shape
        split = gradient.reshape(n, d, b, d, b)
        return [torch.stack([split[:, i, :, i] for i in range(d)], 1)]


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", _Diagonal)


FIELDS = {"boft_block_size": 2, "target_modules": ["c", "k", "l", "n"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "blocks": {"boft_block_size": 0, "boft_block_num": 2},
    "two factors": {"boft_n_butterfly_factor": 2, "target_modules": ["c", "l", "n"]},
    "three factors": {"boft_n_butterfly_factor": 3, "target_modules": ["l", "n"]},
    "four factors": {"boft_n_butterfly_factor": 4, "target_modules": ["n"]},
    "two factors of larger blocks": {"boft_block_size": 4, "boft_n_butterfly_factor": 2, "target_modules": ["l", "n"]},
    "biases": {"bias": "boft_only", "target_modules": ["c", "l"]},
    "random": {"init_weights": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("several")
def test_it_is_peft_s(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    same_as_peft(Net(), config_of("BOFTConfig", {**FIELDS, **VARIANTS[variant]}), X, tmp_path)


@pytest.mark.usefixtures("several")
def test_half_precision(tmp_path: Path) -> None:
    config = config_of("BOFTConfig", {"boft_block_size": 2, "boft_n_butterfly_factor": 2, "target_modules": ["0"]})
    half_as_peft(nn.Sequential(nn.Linear(8, 16), nn.Tanh()), config, LINEAR, tmp_path)


def test_what_peft_makes_without_its_extension_is_read(tmp_path: Path) -> None:
    """It has one factor then, whatever its config says."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6))
    config = config_of("BOFTConfig", {"boft_n_butterfly_factor": 2, "boft_block_size": 2, "target_modules": ["0"]})
    model = perturbed(quietly(peft.get_peft_model, nn.Sequential(nn.Linear(8, 6)), config), 1)
    model.base_model.model[0].base_layer.load_state_dict(net[0].state_dict())
    model.save_pretrained(tmp_path)
    ours = peftc.load(net, tmp_path)
    assert ours.peft_config["default"].boft_n_butterfly_factor == 1
    torch.testing.assert_close(ours(LINEAR), model(LINEAR))


@pytest.mark.parametrize(
    "fields",
    [
        {"boft_block_size": 2, "boft_n_butterfly_factor": 2},
        {"boft_block_size": 0, "boft_block_num": 4, "boft_n_butterfly_factor": 3, "boft_dropout": 0.5},
    ],
    ids=str,
)
def test_its_variants_keep_the_laws(fields: dict[str, Any]) -> None:
    for rule in (Boft(), BoftConv()):
        assert check_rule(rule, peftc.BOFTConfig(**fields))


def test_a_fresh_one_is_the_base() -> None:
    net = Net().requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(peftc.compile(net, peftc.BOFTConfig(**FIELDS))(X), net(X))


def test_dropout_leaves_blocks_out() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(64))
    spec = peftc.BOFTConfig(boft_block_size=2, boft_dropout=0.5, target_modules=["0"])
    ours, x = peftc.compile(net, spec), torch.randn(1, 64)
    with torch.no_grad():
        ours.base[0].boft_R["default"].add_(torch.randn(1, 32, 2, 2))
    rotated, dropped = ours.eval()(x).unflatten(-1, (32, 2)), ours.train()(x).unflatten(-1, (32, 2))
    same = [torch.equal(dropped[:, block], x.unflatten(-1, (32, 2))[:, block]) for block in range(32)]
    assert 6 < sum(same) < 26
    for block in range(32):
        if not same[block]:
            torch.testing.assert_close(dropped[:, block], rotated[:, block])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(peftc.SpecError, match="boft_block_size=4 and boft_block_num=2: give one of them"):
        peftc.BOFTConfig(boft_block_num=2)
    net = nn.Sequential(nn.Linear(12, 4))
    for fields, message in (
        ({"boft_block_size": 5}, "boft_block_size=5 does not divide its 12 inputs"),
        ({"boft_block_size": 0, "boft_block_num": 24}, "boft_block_num=24 does not divide its 12 inputs"),
        (
            {"boft_block_size": 4, "boft_n_butterfly_factor": 3},
            "needs blocks of an even size, and of 4 times the size 4",
        ),
        ({"boft_block_size": 3, "boft_n_butterfly_factor": 2}, "needs blocks of an even size"),
    ):
        with pytest.raises(peftc.NoMatchError, match=message):
            peftc.compile(net, peftc.BOFTConfig(**fields, target_modules=["0"]))
