"""RoAd against peft, on linear sites."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc.testing import check_rule
from peftc_rules.road import Road
from tests.support.against import config_of, half_as_peft, same_as_peft


class Net(nn.Module):
    """Linears with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.m, self.n = nn.Linear(8, 12), nn.Linear(12, 16, bias=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.m(torch.tanh(self.l(x))))


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
FIELDS = {"group_size": 4, "target_modules": ["l", "m", "n"]}


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("group_size", [2, 4])
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_it_is_peft_s(variant: str, group_size: int, init_weights: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = {**FIELDS, "variant": variant, "group_size": group_size, "init_weights": init_weights}
    same_as_peft(Net(), config_of("RoadConfig", fields), X, tmp_path)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_half_precision(variant: str, tmp_path: Path) -> None:
    half_as_peft(Net(), config_of("RoadConfig", {**FIELDS, "variant": variant}), X, tmp_path)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_variants_keep_the_laws(variant: Any) -> None:
    assert check_rule(Road(), peftc.RoadConfig(variant=variant, group_size=2))


def test_a_fresh_one_is_the_base() -> None:
    net = Net().requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(peftc.compile(net, peftc.RoadConfig(**FIELDS))(X), net(X))


def test_a_random_start_is_around_one() -> None:
    torch.manual_seed(0)
    ours = peftc.compile(nn.Sequential(nn.Linear(2, 6400)), peftc.RoadConfig(init_weights=False, target_modules=["0"]))
    alpha, theta = ours.base[0].road_alpha["default"], ours.base[0].road_theta["default"]
    assert abs(float(alpha.mean()) - 1) < 0.05
    assert abs(float(alpha.std()) - 0.5) < 0.05
    assert abs(float(theta.std()) - 0.5) < 0.05


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(peftc.NoMatchError, match="group_size=64 does not divide its 12 outputs"):
        peftc.compile(nn.Sequential(nn.Linear(4, 12)), peftc.RoadConfig(target_modules=["0"]))
    with pytest.raises(peftc.SpecError, match=r"group_size: got 3"):
        peftc.RoadConfig(group_size=3)
    with pytest.raises(peftc.SpecError, match=r"variant: got 'road_3'"):
        peftc.RoadConfig(variant="road_3")
