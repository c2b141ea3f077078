"""A pass over data before an adapter starts: what rules are shown, who shares it, and that the model stays as it is."""

import copy
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc.rewrite import calibration, course
from peftc.rewrite.calibration import run
from tests.support.snapshots import assert_unchanged, snapshot


class ShownConfig(peftc.AdapterSpec):
    peft_type: Any = "SHOWN"
    shown: Any = "inputs"
    rounds: int = 0


SEEN: list[tuple[list[str], Tensor]] = []


class Shown(peftc.Rule[ShownConfig]):
    """W + D that starts as the mean of the inputs seen, or the gradient."""

    name, spec, ops, additive, identity = "shown", ShownConfig, ("linear",), True, False

    def params(self, spec: ShownConfig, site: Any) -> dict[str, peftc.Param]:
        return {"delta": peftc.Param((site.out_features, site.in_features), "rule")}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight + p.delta

    def calibration(self, spec: ShownConfig) -> Any:
        return spec.shown

    def counted(self, spec: ShownConfig, batch: Any) -> Tensor | None:
        return batch.get("mask") if isinstance(batch, dict) else None

    def calibrate(self, spec: ShownConfig, sites: Any, x: Tensor, state: Any) -> Any:
        SEEN.append(([site.fqn for site in sites], x))
        total, count = state or (0.0, 0)
        return total + x.sum(0), count + len(x)

    def settled(self, spec: ShownConfig, states: Mapping[str, Any]) -> Any:
        return {site for site, s in states.items() if s and s[1] >= spec.rounds} if spec.rounds else None

    def initialise(self, weight: Tensor, shapes: Any, p: Any) -> dict[str, Tensor]:
        return {"delta": p.data if isinstance(p.data, Tensor) else (p.data[0] / p.data[1]).expand_as(weight)}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(course, "SHARE", 0)  # A file is written after every batch.
    rule = Shown()
    peftc.register(rule)
    SEEN.clear()
    yield
    peftc.unregister(rule)


class Net(nn.Module):
    """Two linears that read one tensor, a third that reads another, and one that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.o, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.o(self.drop(torch.relu_(self.q(x)) * self.k(x)))


SPEC = ShownConfig(target_modules=["q", "k", "o"])
BATCHES: list[Any] = [torch.randn(5, 4), (torch.randn(2, 4),), {"x": torch.randn(3, 2, 4)}]


def test_an_adapter_starts_from_data_that_the_bare_model_is_run_on() -> None:
    net = Net()
    before = snapshot(net)
    compiled = peftc.compile(net, SPEC, calibration=BATCHES)
    assert_unchanged(net, before)
    seen = torch.cat([BATCHES[0], BATCHES[1][0], BATCHES[2]["x"].flatten(0, 1)])
    net.eval()
    for name, x in {"q": seen, "k": seen, "o": torch.relu(net.q(seen)) * net.k(seen)}.items():
        delta = compiled.base.get_submodule(name).delta["default"]
        torch.testing.assert_close(delta[0].detach(), x.mean(0).detach())
    assert not net.q._forward_pre_hooks
    assert not compiled.base.q._forward_pre_hooks


def test_sites_that_read_one_tensor_are_looked_at_once() -> None:
    peftc.calibrate(Net(), SPEC, iter(BATCHES))
    assert [names for names, _ in SEEN] == [["q", "k"], ["o"]] * 3


def test_positions_that_do_not_count_are_left_out_and_rows_may_be_chosen() -> None:
    x, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [False, True, True]])
    peftc.calibrate(Net(), SPEC, [{"x": x, "mask": mask}])
    assert torch.equal(SEEN[0][1], x[mask])
    SEEN.clear()
    peftc.calibrate(Net(), SPEC, [{"x": x}], rows=lambda x, batch, fqn: x[:, 0] if fqn == "q" else x[:, 1])
    assert torch.equal(SEEN[0][1], x[:, 0])
    assert len(SEEN[1][1]) == 2


def test_batches_are_gone_through_until_all_sites_are_settled() -> None:
    spec = SPEC.model_copy(update={"rounds": 22})
    peftc.calibrate(Net(), spec, BATCHES)
    assert sum(len(x) for names, x in SEEN if "q" in names) == 13 + 13  # Looked at batch by batch: 13, 18, 20, 26.
    with pytest.raises(peftc.AdapterError, match=r"q \(and 2 more\) did not settle. Give more batches, as a list"):
        peftc.calibrate(Net(), spec, iter(BATCHES))


def test_gradients_are_means_over_calls_and_those_of_autograd() -> None:
    net, x, y = Net().eval(), torch.randn(2, 6, 4), torch.randn(2, 6, 3)

    def loss(model: Any, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().sum()

    spec, batches = ShownConfig(shown="gradients", target_modules=["q", "k", "o"]), list(zip(x, y, strict=True))
    before = snapshot(net)
    found = peftc.calibrate(net, spec, batches, call=loss)
    assert_unchanged(net, before)
    assert all(parameter.grad is None for parameter in net.parameters())
    for batch in batches:
        loss(net, batch).backward()
    for name, gradient in found.data.items():
        torch.testing.assert_close(gradient, net.get_submodule(name).weight.grad / 2)
    compiled = peftc.compile(net, spec, calibration=found)
    assert torch.equal(compiled.base.k.delta["default"], found.data["k"])


def test_an_adapter_that_is_added_starts_from_data_too_while_the_others_rest() -> None:
    compiled = peftc.compile(Net(), {"a": peftc.LoraConfig(r=2, init_lora_weights=False, target_modules=["q"])})
    compiled.train()
    y = compiled.eval()(BATCHES[0])
    compiled.add_adapter("b", SPEC, calibration=BATCHES)
    expected = peftc.compile(Net(), SPEC, calibration=BATCHES)
    assert torch.equal(compiled.base.o.delta["b"], expected.base.o.delta["default"])
    assert torch.equal(compiled(BATCHES[0]), y)


def test_the_given_model_is_calibrated_in_place_and_left_as_it_was() -> None:
    net = Net().train()
    net.q.weight.requires_grad_(False)
    compiled = peftc.compile(net, SPEC, calibration=BATCHES, inplace=True)
    expected = peftc.compile(Net(), SPEC, calibration=BATCHES)
    assert torch.equal(compiled.base.o.delta["default"], expected.base.o.delta["default"])
    assert compiled.unload() is net
    assert net.training
    assert net.drop.training
    assert not net.q.weight.requires_grad
    assert net.k.weight.requires_grad


def test_what_comes_of_data_can_be_kept_and_goes_with_its_spec_alone(tmp_path: Any) -> None:
    found = peftc.calibrate(Net(), SPEC, BATCHES)
    again = copy.deepcopy(found)
    one = peftc.compile(Net(), SPEC, calibration=found)
    two = peftc.compile(Net(), found.spec, calibration=again)
    planned = peftc.compile(Net(), peftc.plan(Net(), found.spec), calibration=found)
    for other in (two, planned):
        assert torch.equal(one.base.o.delta["default"], other.base.o.delta["default"])
    with pytest.raises(peftc.AdapterError, match="was made with another spec; calibrate again"):
        peftc.compile(Net(), ShownConfig(target_modules=["q"]), calibration=found)


def test_missing_data_are_asked_for_before_anything_is_changed() -> None:
    net = Net()
    with pytest.raises(
        peftc.AdapterError, match=r"'default' starts from data, the inputs of its sites, .*calibration="
    ):
        peftc.compile(net, SPEC, inplace=True)
    assert type(net.q) is nn.Linear
    assert not hasattr(net.q, "delta")
    compiled = peftc.compile(net, peftc.LoraConfig(r=1, target_modules=["q"]))
    with pytest.raises(peftc.AdapterError, match=r"'b' starts from data"):
        compiled.add_adapter("b", SPEC)
    assert list(compiled.plan.adapters) == ["default"]
    with pytest.raises(peftc.AdapterError, match="labels included"):
        peftc.compile(net, SPEC.model_copy(update={"shown": "gradients"}))
    with pytest.raises(peftc.AdapterError, match=r"the output has no loss.* pass call="):
        peftc.calibrate(net, SPEC.model_copy(update={"shown": "gradients"}), BATCHES)


class Killed(BaseException):
    """What no handler takes for an error of the model."""


def dying(after: int, batches: list[Any] = BATCHES) -> Iterator[Any]:
    yield from batches[:after]
    raise Killed


def counting(calls: list[Any]) -> Any:
    def call(model: Any, batch: Any) -> Any:
        calls.append(batch)
        return run(model, batch)

    return call


@pytest.mark.parametrize("after", [1, 2, 3])
def test_what_was_learned_before_a_kill_is_gone_on_from(after: int, tmp_path: Path) -> None:
    file, calls = tmp_path / "seen.pt", []
    expected = peftc.calibrate(Net(), SPEC, BATCHES)
    with pytest.raises(Killed):
        peftc.calibrate(Net(), SPEC, dying(after), resume=file)
    found = peftc.calibrate(Net(), SPEC, BATCHES, resume=file, call=counting(calls))
    assert len(calls) == 3 - after  # Which sites read the same is known, too.
    for name, (total, count) in expected.data.items():
        assert torch.equal(found.data[name][0], total)
        assert found.data[name][1] == count
    again = peftc.calibrate(Net(), SPEC, BATCHES, resume=str(file), call=counting(calls))
    assert len(calls) == 3 - after
    assert again.data.keys() == found.data.keys()
    assert list(tmp_path.iterdir()) == [file]


def test_gradients_and_rounds_are_gone_on_with_too(tmp_path: Path) -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        return model(batch).square().sum()

    spec, batches = (
        ShownConfig(shown="gradients", target_modules=["q", "k", "o"]),
        [torch.randn(2, 4) for _ in range(3)],
    )
    net = Net()
    with pytest.raises(Killed):
        peftc.calibrate(net, spec, dying(2, batches), call=loss, resume=tmp_path / "gradients.pt")
    found = peftc.calibrate(net, spec, batches, call=loss, resume=tmp_path / "gradients.pt")
    for name, gradient in peftc.calibrate(net, spec, batches, call=loss).data.items():
        assert torch.equal(found.data[name], gradient)
    several, calls = SPEC.model_copy(update={"rounds": 22}), []
    with pytest.raises(peftc.AdapterError, match="did not settle"):
        peftc.calibrate(Net(), several, iter(BATCHES), resume=tmp_path / "rounds.pt")
    peftc.calibrate(Net(), several, BATCHES, resume=tmp_path / "rounds.pt", call=counting(calls))
    assert len(calls) == 3  # 13 rows were known, and come up to 26 in a second round.


def test_eva_goes_on_with_directions_that_sites_share(tmp_path: Path) -> None:
    torch.manual_seed(1)
    batches, file = [torch.randn(32, 4) for _ in range(40)], tmp_path / "eva.pt"
    spec = peftc.LoraConfig(r=1, init_lora_weights="eva", eva_config={"tau": 0.5}, target_modules=["q", "k", "o"])
    with pytest.raises(Killed):
        peftc.calibrate(Net(), spec, dying(1, batches), resume=file)
    found, expected = peftc.calibrate(Net(), spec, batches, resume=file), peftc.calibrate(Net(), spec, batches)
    assert found.spec == expected.spec
    assert all(torch.equal(found.data[name], value) for name, value in expected.data.items())


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "seen.pt"
    peftc.calibrate(Net(), SPEC, BATCHES, resume=file)
    with pytest.raises(peftc.AdapterError, match=r"seen\.pt' is of another spec, or of other sites: delete it"):
        peftc.calibrate(Net(), ShownConfig(target_modules=["q"]), BATCHES, resume=file)
    for content in (b"", b"no such thing", pickle.dumps(Killed), file.read_bytes()[:200]):
        file.write_bytes(content)
        with pytest.raises(peftc.AdapterError, match=r"seen\.pt' can't be read"):
            peftc.calibrate(Net(), SPEC, BATCHES, resume=file)
    with pytest.raises(peftc.AdapterError, match="can't be written"):
        peftc.calibrate(Net(), SPEC, BATCHES, resume=tmp_path / "no" / "folder.pt")


@pytest.mark.parametrize("wrong", [3, None, "text", {"x": BATCHES[0]}])
def test_what_can_not_be_gone_through_is_no_batches(wrong: Any) -> None:
    with pytest.raises(peftc.AdapterError, match=f"batches is one {type(wrong).__name__}: give a list of batches"):
        peftc.calibrate(Net(), SPEC, wrong)


@pytest.mark.parametrize("wrong", [3, {"no": 1}, {1: 2}, (), torch.randn(2, 7), {"x": "text"}])
@pytest.mark.parametrize("shown", ["inputs", "gradients"])
def test_a_batch_that_the_model_can_not_be_called_with_is_named(wrong: Any, shown: str) -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        return run(model, batch).sum()

    spec, net = ShownConfig(shown=shown, target_modules=["q"]), Net()
    before = snapshot(net)
    with pytest.raises(peftc.AdapterError, match=r"batch number 2 \(.*\) failed with .*: .* A batch is what") as caught:
        peftc.calibrate(net, spec, [BATCHES[0], wrong], call=loss)
    assert isinstance(caught.value.__cause__, Exception)
    assert_unchanged(net, before)
    assert not net.q._forward_pre_hooks
    assert not net.q._forward_hooks


def test_a_call_that_gives_no_loss_is_named() -> None:
    with pytest.raises(peftc.AdapterError, match="call= gave int: it is to return the loss"):
        peftc.calibrate(Net(), ShownConfig(shown="gradients", target_modules=["q"]), BATCHES, call=lambda *_: 3)


def test_a_bar_is_told_of_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    @contextmanager
    def bar(*given: Any) -> Iterator[Any]:
        told.append(given)
        yield lambda count=1, doing=None: told.append(count)

    monkeypatch.setattr(calibration, "bar", bar)
    peftc.calibrate(Net(), SPEC, BATCHES)
    peftc.calibrate(Net(), SPEC, iter(BATCHES), progress=False)
    assert told == [("calibrate", 3, "batches", True), 1, 1, 1, ("calibrate", None, "batches", False), 1, 1, 1]


def test_data_that_reach_nothing_or_that_nobody_asks_for_are_refused() -> None:
    with pytest.raises(peftc.AdapterError, match=r"nothing was learned of idle \(and 0 more\): no batch reached it"):
        peftc.compile(Net(), ShownConfig(target_modules=["q", "idle"]), calibration=BATCHES)
    with pytest.raises(peftc.AdapterError, match=r"nothing was learned of q \(and 2 more\)"):
        peftc.compile(Net(), SPEC, calibration=[])
    lora = peftc.LoraConfig(r=1, target_modules=["q"])
    with pytest.raises(peftc.AdapterError, match="no adapter here starts from data; leave it out"):
        peftc.compile(Net(), lora, calibration=BATCHES)
    with pytest.raises(peftc.AdapterError, match=r"no rule of 'default' \(LORA\) learns from data"):
        peftc.calibrate(Net(), lora, BATCHES)
    with pytest.raises(peftc.AdapterError, match="gone through for one adapter only; give a list"):
        peftc.compile(Net(), {"a": SPEC, "b": SPEC}, calibration=iter(BATCHES))
