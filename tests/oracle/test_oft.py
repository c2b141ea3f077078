"""OFT against peft, on linear, embedding and convolution sites."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc.testing import check_rule
from peftc_rules.oft import Oft, OftConv, OftEmbedding
from tests.support.against import adapted, config_of, half_as_peft, near, same_as_peft
from tests.support.interchange import perturbed, quietly


class Net(nn.Module):
    """An embedding, linears, and a convolution without a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.l, self.n = nn.Embedding(20, 8), nn.Linear(8, 12), nn.Linear(12, 4, bias=False)
        self.c = nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.c(torch.tanh(self.l(self.e(x))).mT.unsqueeze(3)).squeeze(3).mT.contiguous())


X = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0))
FIELDS = {"oft_block_size": 4, "target_modules": ["e", "l", "c", "n"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "exact": {"use_cayley_neumann": False},
    "terms 1": {"num_cayley_neumann_terms": 2},
    "terms 3": {"num_cayley_neumann_terms": 3},
    "terms 4": {"num_cayley_neumann_terms": 4},
    "terms 7": {"num_cayley_neumann_terms": 7},
    "share": {"block_share": True},
    "share exactly": {"block_share": True, "use_cayley_neumann": False},
    "blocks": {"oft_block_size": 0, "r": 2},
    "blocks that don't divide": {"oft_block_size": 5},
    "as many blocks": {"oft_block_size": 0, "r": 3},
    "constrained": {"coft": True, "eps": 0.3},
    "biases": {"bias": "oft_only"},
    "random": {"init_weights": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_peft_s(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    same_as_peft(Net(), config_of("OFTConfig", {**FIELDS, **VARIANTS[variant]}), X, tmp_path)


def test_half_precision(tmp_path: Path) -> None:
    half_as_peft(Net(), config_of("OFTConfig", FIELDS), X, tmp_path)


def test_a_kernel_is_rotated_as_peft_merges_it(tmp_path: Path) -> None:
    """peft's own call of a convolution sums rotated patches where they overlap, so even a fresh adapter changes the model;
    what it merges is right, and is what peftc computes before and after.
    """
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)), torch.randn(2, 4, 6, 6)
    config = config_of("OFTConfig", {"oft_block_size": 6, "target_modules": ["0"]})
    fresh = quietly(peft.get_peft_model, copy.deepcopy(net), config)
    assert float((fresh(x) - net(x)).abs().max()) > 1  # Up to nine times the input.
    model = adapted(net, config)
    model.save_pretrained(tmp_path)
    ours = peftc.load(net, tmp_path).eval()
    y = ours(x)
    near(y, model.merge_and_unload()(x), 1e-5, "outputs of merged")
    ours.merge_adapter()
    near(ours(x), y, 1e-5, "outputs after merging")


@pytest.mark.parametrize(
    "fields",
    [
        {"use_cayley_neumann": False, "r": 2, "oft_block_size": 0},
        {"block_share": True, "oft_block_size": 2, "coft": True, "eps": 0.1},
        {"module_dropout": 0.5, "oft_block_size": 2},
    ],
    ids=str,
)
def test_its_variants_keep_the_laws(fields: dict[str, Any]) -> None:
    for rule in (Oft(), OftConv(), OftEmbedding()):
        assert check_rule(rule, peftc.OFTConfig(**fields))


def test_a_fresh_one_is_the_base() -> None:
    net = Net().requires_grad_(False)
    with torch.no_grad():
        for fields in ({}, {"use_cayley_neumann": False}, {"block_share": True}, {"coft": True}):
            assert torch.equal(peftc.compile(net, peftc.OFTConfig(**FIELDS, **fields))(X), net(X))


def test_an_exact_rotation_keeps_lengths() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6, bias=False))
    spec = peftc.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["0"])
    ours = perturbed(peftc.compile(net, spec), 1)
    ours.merge_adapter()
    assert not torch.allclose(ours.base[0].weight, net[0].weight, atol=1e-2)
    torch.testing.assert_close(ours.base[0].weight.norm(dim=1), net[0].weight.norm(dim=1))


def test_constrained_parameters_are_back_in_bounds_after_a_step() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(5, 8)
    ours = peftc.compile(net, peftc.OFTConfig(oft_block_size=4, coft=True, eps=0.01, target_modules=["0"])).train()
    optimiser = torch.optim.SGD(ours.parameters(), lr=1.0)
    for _ in range(3):
        ours(x).square().sum().backward()
        optimiser.step()
    norms = ours.base[0].oft_R.default.weight.norm(dim=1) * 2**0.5
    torch.testing.assert_close(norms, torch.full((2,), 0.01 / 2**0.5))


def test_dropout_leaves_whole_blocks_out() -> None:
    """As peft documents; peft 0.21.2 makes the layer and does not call it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(64))
    spec = peftc.OFTConfig(oft_block_size=2, module_dropout=0.5, target_modules=["0"])
    ours, x = perturbed(peftc.compile(net, spec), 1), torch.randn(1, 64)
    rotated, dropped = ours.eval()(x).unflatten(-1, (32, 2)), ours.train()(x).unflatten(-1, (32, 2))
    same = [torch.equal(dropped[:, block], x.unflatten(-1, (32, 2))[:, block]) for block in range(32)]
    assert 6 < sum(same) < 26
    for block in range(32):
        if not same[block]:
            torch.testing.assert_close(dropped[:, block], rotated[:, block])


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(peftc.SpecError, match="r=8 and oft_block_size=32: give one of them"):
        peftc.OFTConfig(r=8)
    plan = peftc.plan(nn.Sequential(nn.Linear(12, 4)), peftc.OFTConfig(oft_block_size=5, target_modules=["0"]))
    assert any("has blocks of 4: oft_block_size=5 does not fit" in caution for caution in plan.cautions)
    with pytest.raises(peftc.NoMatchError, match="blocks of one of 7 inputs have no rotation"):
        peftc.compile(nn.Sequential(nn.Linear(7, 4)), peftc.OFTConfig(r=7, oft_block_size=0, target_modules=["0"]))
    with pytest.raises(peftc.NoMatchError, match="in 2 groups don't have all"):
        peftc.compile(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), peftc.OFTConfig(target_modules=["0"]))
