"""HiRA against peft, on linear, embedding and convolution sites."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftc
from peftc.testing import check_rule
from peftc_rules.hira import Hira, HiraConv, HiraEmbedding
from tests.support.against import config_of, half_as_peft, same_as_peft
from tests.support.interchange import perturbed, quietly
from tests.support.models import Everything, token_ids

LAYERS = ["embed", "linear", "transposed", "conv1d", "conv2d", "conv3d"]
FIELDS: dict[str, Any] = {"r": 2, "target_modules": LAYERS}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"target_modules": [name]} for name in LAYERS},
    "all": {},
    "gaussian": {"init_weights": "gaussian"},
    "random": {"init_weights": False},
    "dropout in eval": {"hira_dropout": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_peft_s(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = config_of("HiraConfig", {**FIELDS, **VARIANTS[variant]})
    same_as_peft(Everything().eval(), config, token_ids(), tmp_path, tolerance=1e-4)


def test_ranks_go_by_the_pattern_which_peft_leaves_out(tmp_path: Path) -> None:
    """peft 0.21.2 writes rank_pattern and makes every rank r; such files are read as what they are."""
    torch.manual_seed(0)
    net, fields = Everything().eval(), {**FIELDS, "rank_pattern": {"conv.d": 3, "linear": 5}}
    theirs = perturbed(quietly(peft.get_peft_model, copy.deepcopy(net), config_of("HiraConfig", fields)), 1)
    assert theirs.base_model.model.linear.hira_A["default"].shape == (2, 16)
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    torch.testing.assert_close(peftc.load(net, tmp_path / "theirs")(token_ids()), theirs(token_ids()))
    ours = perturbed(peftc.compile(net, peftc.HiraConfig(**fields)), 1)
    assert ours.base.linear.hira_A["default"].shape == (5, 16)
    assert ours.base.conv2d.hira_B["default"].shape == (4, 3, 1, 1)
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(peftc.load(net, tmp_path / "ours")(token_ids()), ours(token_ids()))


def test_half_precision(tmp_path: Path) -> None:
    half_as_peft(Everything().eval(), config_of("HiraConfig", FIELDS), token_ids(), tmp_path, tolerance=5e-2)


def test_its_form_on_the_output_keeps_the_laws() -> None:
    for rule in (Hira(), HiraEmbedding(), HiraConv()):
        assert check_rule(rule, peftc.HiraConfig(r=2, hira_dropout=0.5))


def test_a_fresh_one_is_the_base() -> None:
    net = Everything().eval().requires_grad_(False)
    with torch.no_grad():
        for init in (True, "gaussian", "GAUSSIAN"):
            ours = peftc.compile(net, peftc.HiraConfig(**FIELDS, init_weights=init))
            assert torch.equal(ours(token_ids()), net(token_ids()))


def test_dropout_draws_peft_s_mask() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    fields = {"r": 2, "hira_dropout": 0.5, "target_modules": ["0"]}
    theirs = perturbed(quietly(peft.get_peft_model, copy.deepcopy(net), config_of("HiraConfig", fields)), 1).train()
    ours = peftc.compile(net, peftc.HiraConfig(**fields)).train()
    with torch.no_grad():
        for name in ("hira_A", "hira_B"):
            getattr(ours.base[0], name)["default"].copy_(getattr(theirs.base_model.model[0], name)["default"])
    torch.manual_seed(3)
    expected = theirs(x)
    torch.manual_seed(3)
    torch.testing.assert_close(ours(x), expected)


def test_groups_are_refused() -> None:
    with pytest.raises(peftc.NoMatchError, match="its 2 groups have weights that BA does not fit"):
        peftc.compile(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), peftc.HiraConfig(target_modules=["0"]))
