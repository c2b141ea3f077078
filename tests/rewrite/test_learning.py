"""What rules do around training: a term of the loss, something after every step."""

import copy
import gc
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc.rewrite.learning import FOLLOWERS


class SparseConfig(peftc.AdapterSpec):
    peft_type: Any = "SPARSE"


class Sparse(peftc.Rule[SparseConfig]):
    """W + D with small D (its penalty), clamped after every step."""

    name, spec, ops, additive = "sparse", SparseConfig, ("linear",), True

    def params(self, spec: SparseConfig, site: Any) -> dict[str, peftc.Param]:
        return {"delta": peftc.Param((site.out_features, site.in_features))}

    def constants(self, spec: SparseConfig, site: Any) -> dict[str, Any]:
        return {"strength": 0.5}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight + p.delta

    def penalty(self, p: Any) -> Tensor:
        return p.strength * p.delta.abs().sum()

    def after_step(
        self, spec: SparseConfig, tensors: Mapping[str, Mapping[str, Tensor]], step: int, state: dict[str, Any]
    ) -> None:
        for own in tensors.values():
            own["delta"].clamp_(-0.01 * step, 0.01 * step)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    rule = Sparse()
    peftc.register(rule)
    yield
    peftc.unregister(rule)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))


SPEC = SparseConfig(target_modules=["0", "2"])


def test_the_penalty_is_that_of_the_active_adapters_and_learns() -> None:
    compiled = peftc.compile(model(), {"a": SPEC, "b": SPEC, "c": peftc.LoraConfig(r=1, target_modules=["0"])})
    with torch.no_grad():
        compiled.base[0].delta["a"].fill_(0.25)
        compiled.base[2].delta["b"].fill_(-1.0)
    assert float(compiled.penalty()) == pytest.approx(0.5 * 16 * 0.25)
    compiled.penalty().backward()
    torch.testing.assert_close(compiled.base[0].delta["a"].grad, torch.full((4, 4), 0.5))
    compiled.set_adapter(["a", "b"])
    assert float(compiled.penalty()) == pytest.approx(0.5 * (16 * 0.25 + 12))
    compiled.set_adapter("c")
    assert compiled.penalty() is None
    with compiled.disable_adapter():
        assert compiled.penalty() is None


def test_steps_of_an_optimiser_that_holds_the_adapter_are_followed() -> None:
    compiled = peftc.compile(model(), {"a": SPEC, "b": SPEC})
    own = [p for p in compiled.parameters() if p.requires_grad]
    optimiser, other = torch.optim.SGD(own, lr=10.0), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    for step in (1, 2, 3):
        compiled(torch.randn(8, 4)).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        other.step()
        assert float(compiled.base[0].delta["a"].detach().abs().max()) == pytest.approx(0.01 * step)
    assert not compiled.base[0].delta["b"].any()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "added"])
def test_steps_of_copies_and_of_adapters_that_come_later_are_followed_too(how: str) -> None:
    if how == "added":
        compiled = peftc.compile(model(), peftc.LoraConfig(r=1, target_modules=["0"]))
        compiled.add_adapter("a", SPEC)
        compiled.set_adapter("a")
    else:
        first = peftc.compile(model(), {"a": SPEC})
        compiled = copy.deepcopy(first) if how == "deepcopy" else pickle.loads(pickle.dumps(first))
    optimiser = torch.optim.SGD([p for p in compiled.parameters() if p.requires_grad], lr=10.0)
    compiled(torch.randn(8, 4)).square().sum().backward()
    optimiser.step()
    assert float(compiled.base[0].delta["a"].detach().abs().max()) == pytest.approx(0.01)


def test_an_optimiser_that_goes_on_counts_on() -> None:
    counted: list[float] = []
    state: Any = None
    for _ in range(2):
        compiled = peftc.compile(model(), SPEC)
        optimiser = torch.optim.Adam([p for p in compiled.parameters() if p.requires_grad], lr=10.0)
        if state is not None:
            optimiser.load_state_dict(state)
        for _ in range(2):
            compiled(torch.randn(8, 4)).square().sum().backward()
            optimiser.step()
            counted.append(float(compiled.base[0].delta["default"].detach().abs().max()))
        state = optimiser.state_dict()
    assert counted == pytest.approx([0.01, 0.02, 0.03, 0.04])


def test_a_model_that_is_gone_is_not_followed() -> None:
    gc.collect()
    before = [len(own) for own in FOLLOWERS.values()]
    compiled = peftc.compile(model(), SPEC)
    assert [len(own) for own in FOLLOWERS.values()] == [count + 1 for count in before]
    del compiled
    gc.collect()
    assert [len(own) for own in FOLLOWERS.values()] == before


def test_a_model_may_go_while_another_one_takes_a_step() -> None:
    """Its hook can't be taken off a list that torch is going through."""
    first, others = peftc.compile(model(), SPEC), [peftc.compile(model(), SPEC) for _ in range(3)]
    optimiser = torch.optim.SGD([p for p in first.parameters() if p.requires_grad], lr=10.0)

    def go(_: Any) -> None:
        others.clear()
        gc.collect()

    for own in FOLLOWERS.values():
        own[-1] = go
    try:
        first(torch.randn(8, 4)).square().sum().backward()
        optimiser.step()
    finally:
        for own in FOLLOWERS.values():
            del own[-1]
    assert float(first.base[0].delta["default"].detach().abs().max()) == pytest.approx(0.01)
