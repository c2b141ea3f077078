"""Planning and compiling leave no trace in the model that was given, whatever its modules keep in their attributes."""

import copy
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftc
from tests.support.adapters import lora, perturb

Pair = namedtuple("Pair", "first second")


@dataclass
class State:
    """What a module keeps, to any depth."""

    seen: list[Any] = field(default_factory=list)
    inner: Any = None
    last: Any = None


class Keeps(nn.Linear):
    """Writes into its state on every call."""

    def __init__(self, state: Any, write: Any) -> None:
        super().__init__(4, 4)
        self.state, self.write = state, write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.state, x)
        return super().forward(x)


def deep(state: Any, x: Any) -> None:
    state.inner.last = x


def item(state: Any, x: Any) -> None:
    state["a"][0] = x


def grow(state: Any, x: Any) -> None:
    state.first.append(1)


def count(state: Any, x: Any) -> None:
    state.seen.append(len(state.seen))


STATES: dict[str, tuple[Any, Any]] = {
    "an object in an object": (State(inner=State()), deep),
    "a list in a dict": ({"a": [0]}, item),
    "an ordered dict": (OrderedDict(a=[0]), item),
    "a default dict": (defaultdict(list, a=[0]), item),
    "a list in a named tuple": (Pair([], 2), grow),
    "a counter": (State(), count),
}


def refers_to_proxies(value: Any, depth: int = 6) -> bool:
    if isinstance(value, torch.fx.Proxy):
        return True
    if depth == 0 or isinstance(value, Tensor | nn.Module | type):
        return False
    if isinstance(value, dict):
        return any(refers_to_proxies(item, depth - 1) for item in value.values())
    if isinstance(value, list | tuple | set):
        return any(refers_to_proxies(item, depth - 1) for item in value)
    return any(refers_to_proxies(item, depth - 1) for item in getattr(value, "__dict__", {}).values())


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_nested_state_is_not_touched_and_goes_on_being_kept(kind: str, capture: Any) -> None:
    state, write = copy.deepcopy(STATES[kind])
    model = nn.Sequential(Keeps(state, write), nn.Linear(4, 2))
    before = copy.deepcopy(state)
    peftc.plan(model, lora("0", "1"))
    assert repr(model[0].state) == repr(before)
    assert model[0].state is state
    if capture == "modules":
        compiled, x = peftc.compile(model, lora("0", "1")), torch.randn(3, 4)
        assert repr(state) == repr(before)
        reference = copy.deepcopy(model)
        for _ in range(2):
            assert torch.equal(compiled(x), reference(x))
        assert repr(compiled.base[0].state) == repr(reference[0].state)
        assert not refers_to_proxies(vars(compiled.base[0]))
        y = perturb(compiled)(x)
        with compiled.merged():
            torch.testing.assert_close(compiled(x), y)
    assert not refers_to_proxies(vars(model[0]))


class Slots:
    """State without a __dict__."""

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last: Any = None


def test_state_that_can_not_be_copied_safely_is_left_alone() -> None:
    def write(state: Slots, x: Any) -> None:
        state.last = x

    model = nn.Sequential(Keeps(Slots(), write))
    compiled, x = peftc.compile(model, lora("0")), torch.randn(2, 4)
    assert model[0].state.last is None
    assert torch.equal(compiled(x), nn.functional.linear(x, model[0].weight, model[0].bias))


class Assigns(nn.Linear):
    """Assigns buffers, new attributes, counters and parameters' companions in its forward."""

    def __init__(self, how: str) -> None:
        super().__init__(4, 4)
        self.how, self.calls = how, 0
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "buffer":
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        elif self.how == "in place":
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        elif self.how == "attribute":
            self.last_input = x
        elif self.how == "counter":
            self.calls += 1
        elif self.how == "deleted":
            self.__dict__.pop("note", None)
        return super().forward(x - self.mean)


@pytest.mark.parametrize("how", ["buffer", "in place", "attribute", "counter", "deleted"])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_a_forward_assigns_stays(how: str, inplace: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Assigns(how))
    model[0].note = 1
    reference, x = copy.deepcopy(model), torch.randn(3, 4)
    compiled = peftc.compile(model, lora("0"), inplace=inplace)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), reference(x))
    here, there = compiled.base[0], reference[0]
    torch.testing.assert_close(here.mean, there.mean)
    assert (here.calls, "last_input" in vars(here), "note" in vars(here)) == (
        there.calls,
        "last_input" in vars(there),
        "note" in vars(there),
    )
    with compiled.disable_adapter():
        torch.testing.assert_close(compiled(x), reference(x))
    torch.testing.assert_close(here.mean, there.mean)
    perturb(compiled)
    compiled(x).sum().backward()
    assert compiled.base[0].lora_B["default"].weight.grad is not None


class Counts(nn.Module):
    """A model that counts its calls, or remembers the last one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.how, self.calls, self.notes = nn.Linear(4, 4), how, 0, State()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "counter":
            self.calls += 1
        elif self.how == "buffer":
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        else:
            self.notes.last = x
        return self.fc(x - self.mean)


@pytest.mark.parametrize("how", ["counter", "buffer", "object"])
def test_a_whole_graph_would_lose_what_a_forward_assigns_and_is_refused_for_that(how: str) -> None:
    model = Counts(how)
    with pytest.raises(peftc.CaptureError, match=r"\(Counts\), the forward assigns to its module.*capture='modules'"):
        peftc.compile(model, lora("fc"), capture="symbolic")
    assert (model.calls, model.notes.last) == (0, None)
    compiled, reference, x = peftc.compile(model, lora("fc")), copy.deepcopy(model), torch.randn(3, 4)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), reference(x))
    assert compiled.base.calls == reference.calls


class Empty(nn.Module):
    """A residual block whose shortcut, a container, is empty."""

    def __init__(self, container: Any) -> None:
        super().__init__()
        self.conv, self.shortcut, self.fc = nn.Conv2d(4, 4, 3, padding=1), container, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x) if isinstance(self.shortcut, nn.Sequential) else x
        return self.fc(torch.relu(self.conv(x) + shortcut).mean((2, 3)))


EMPTY = [nn.Sequential(), nn.ModuleList(), nn.ModuleDict(), nn.ParameterList(), nn.ParameterDict()]


@pytest.mark.parametrize("container", EMPTY, ids=lambda container: type(container).__name__)
@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_an_empty_container_is_copied_like_any_module(container: nn.Module, capture: Any) -> None:
    model, x = Empty(container), torch.randn(2, 4, 8, 8)
    compiled = peftc.compile(model, lora("conv", "fc"), capture=capture)
    assert torch.equal(compiled(x), model(x))
    assert type(compiled.base.shortcut) is type(container)
    assert compiled.base.shortcut is not container
    y = perturb(compiled)(x)
    torch.testing.assert_close(compiled.merge_and_unload()(x), y)


def test_scripted_modules_inside_are_left_as_they_are() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    model, x = nn.Sequential(nn.Linear(4, 4), scripted, nn.Linear(4, 2)), torch.randn(3, 4)
    y = model(x)
    with pytest.raises(peftc.CaptureError, match="inplace=True"):
        peftc.compile(model, lora("0", "2"))
    compiled = perturb(peftc.compile(model, lora("0", "2"), inplace=True))
    adapted = compiled(x)
    assert not torch.allclose(adapted, y)
    compiled.merge_adapter()
    torch.testing.assert_close(compiled(x), adapted)
    compiled.unmerge_adapter()
    assert torch.equal(compiled.unload()(x), y)
    with pytest.raises(peftc.NoMatchError, match=r"'1\.0' is a RecursiveScriptModule"):
        peftc.compile(model, lora("1.0"), inplace=True)
