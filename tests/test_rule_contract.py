"""A new method is one file and no engine change; a broken one is reported with its place."""

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc import registry
from peftc.graph.sites import WeightSite
from peftc.product import Product
from peftc.registry import rules
from peftc.rule import Bound, Factors
from peftc.testing import check_rule
from tests.support import made_up_method
from tests.support.made_up_method import Gated, GatedConfig
from tests.support.models import Net, tiny
from tests.support.snapshots import snapshot


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    rule = Gated()
    peftc.register(rule)
    yield
    peftc.unregister(rule)


class Pair(Product[GatedConfig]):
    """W + 2·BA, and nothing else is said of it."""

    name, spec, ops, local = "pair", GatedConfig, ("linear", "conv1d"), "oi"

    def params(self, spec: GatedConfig, site: WeightSite) -> dict[str, peftc.Param]:
        return {
            "a": peftc.Param((3, site.in_features), "normal", axes="ri"),
            "b": peftc.Param((site.out_features, 3), axes="or"),
        }

    def check(self, spec: GatedConfig, site: WeightSite) -> str | None:
        return "it has a kernel" if site.kernel_size else None

    def factors(self, p: Any) -> Factors:
        return Factors(p.b, p.a, 2.0)


def test_a_product_keeps_the_laws_by_its_factors_alone(tmp_path: Path) -> None:
    peftc.unregister(Gated())
    try:
        assert check_rule(Pair())
        peftc.register(Pair())
        model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(5, 6)
        compiled: Any = peftc.compile(model, GatedConfig(target_modules=["0"]))
        with torch.no_grad():
            compiled.base[0].b["default"].normal_()
        a, b = compiled.base[0].a["default"], compiled.base[0].b["default"]
        torch.testing.assert_close(compiled(x), model(x) + 2 * x @ a.T @ b.T)
        compiled.save_pretrained(tmp_path, form="serving")
        torch.testing.assert_close(peftc.load(model, tmp_path)(x), compiled(x))
        peftc.unregister(Pair())
    finally:
        peftc.register(Gated())


@pytest.mark.parametrize("value", ["peftc.registry:GROUP", "tests.support.made_up_method:Gated.ops"])
def test_an_entry_point_names_the_class_of_a_rule(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def points(group: str) -> list[EntryPoint]:
        return [EntryPoint("gated", value, group)]

    monkeypatch.setattr(registry, "entry_points", points)
    with pytest.raises(peftc.RuleError, match=f"entry point 'gated' = '{value}' is no class: name that of the rule"):
        registry._installed.__wrapped__()
    value = "tests.support.made_up_method:Gated"
    assert registry._installed.__wrapped__() == (Gated(),)


def test_the_method_is_one_short_file() -> None:
    assert len(Path(made_up_method.__file__).read_text().splitlines()) <= 40


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_it_compiles_trains_saves_loads_merges_and_unmerges(capture: Any, tmp_path: Path) -> None:
    model, x = Net().eval(), torch.randn(4, 3, 8, 8)
    target = torch.randn(4, 5)
    spec = GatedConfig(target_modules=["fc", "out"])
    compiled = peftc.compile(model, spec, capture=capture)
    assert torch.equal(compiled(x), model(x))
    assert [edit.rule.name for edit in compiled.plan.edits] == ["gated", "gated"]
    assert compiled.get_nb_trainable_parameters()[0] == 8 + 8 + 1 + 8 + 5 + 1

    optimiser = torch.optim.Adam([p for p in compiled.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(compiled(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]

    y = compiled(x)
    compiled.save_pretrained(tmp_path)
    again = peftc.load(model, tmp_path, capture=capture)
    assert torch.equal(again(x), y)
    before = snapshot(again.base)["tensors"]
    again.merge_adapter()
    torch.testing.assert_close(again(x), y)
    assert not torch.equal(again.base.fc.weight, model.fc.weight)
    again.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.base.state_dict().items())
    assert torch.equal(again.unload()(x), model(x))


def test_two_rules_for_one_place_are_refused() -> None:
    with pytest.raises(peftc.RuleError, match=r"GATED on linear sites is taken by Gated \(.*made_up_method\.py:\d+\)"):
        peftc.register(Gated())


def test_an_incomplete_rule_is_refused() -> None:
    class Nameless(peftc.Rule[GatedConfig]):
        spec = GatedConfig
        ops = ("conv1d",)

    with pytest.raises(peftc.RuleError, match="must set 'name'"):
        peftc.register(Nameless())


@pytest.mark.parametrize("fault", ["branches", "misspells", "returns"])
def test_a_rule_that_does_not_trace_changes_nothing(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def output(self: Any, x: Tensor, y: Tensor, p: Any) -> Any:
        if fault == "branches" and bool(y.sum() > 0):
            return y
        return 3 if fault == "returns" else y + p.gated_w

    monkeypatch.setattr(Gated, "output", output)
    model = Net()
    before = snapshot(model)
    message = {"branches": "does not trace", "misspells": r"p\.gated_w, but declares only", "returns": "no tensor"}
    with pytest.raises(peftc.RuleError, match=message[fault]):
        peftc.compile(model, GatedConfig(target_modules=["fc"]), inplace=True)
    after = snapshot(model)
    assert after["classes"] == before["classes"]
    assert set(after["tensors"]) == set(before["tensors"])


def test_a_rule_without_a_fold_is_unmergeable_and_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Gated, "weight")
    compiled = peftc.compile(Net(), GatedConfig(target_modules=["fc"]))
    assert "can't be merged: rule 'gated' declares no fold" in str(compiled.plan)
    with pytest.raises(peftc.MergeError, match="declares no fold"):
        compiled.merge_adapter()


def test_its_files_name_the_method(tmp_path: Path) -> None:
    peftc.compile(Net(), GatedConfig(target_modules=["fc"], gate=0.5)).save_pretrained(tmp_path)
    spec = peftc.load_spec(tmp_path, {"GATED": GatedConfig})
    assert spec == GatedConfig(target_modules=["fc"], gate=0.5, inference_mode=True)


def test_bound_says_what_it_has() -> None:
    with pytest.raises(peftc.RuleError, match="declares only a, b"):
        _ = Bound({"a": 1, "b": 2}).c


class Shifted(nn.Module):
    """Rows that are a table plus one learned shift."""

    def __init__(self, spec: peftc.PromptSpec) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.rows, spec.fact("token_dim"))
        self.shift = None if spec.inference_mode else nn.Parameter(torch.zeros(spec.fact("token_dim")))

    def forward(self, rows: Tensor) -> Tensor:
        made = self.embedding(rows)
        return made if self.shift is None else made + self.shift


class ShiftedConfig(peftc.PromptSpec):
    peft_type: Any = "SHIFTED"


class ShiftedPrompt(peftc.PromptRule[ShiftedConfig]):
    name = "shifted"
    spec = ShiftedConfig
    at = "embeds"

    def encoder(self, spec: ShiftedConfig) -> nn.Module:
        return Shifted(spec)


@pytest.fixture
def shifted() -> Iterator[ShiftedPrompt]:
    rule = ShiftedPrompt()
    peftc.register(rule)
    yield rule
    peftc.unregister(rule)


def test_a_prompt_method_is_a_module_and_a_place(shifted: ShiftedPrompt, tmp_path: Path) -> None:
    model, tokens = tiny("llama"), torch.arange(3, 10)[None]
    spec = ShiftedConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    compiled = peftc.compile(model, spec)
    with torch.no_grad():
        compiled.prompt_encoder["default"].shift.add_(0.5)
    compiled(input_ids=tokens, labels=tokens).loss.backward()
    assert compiled.prompt_encoder["default"].shift.grad is not None
    expected = compiled.eval()(input_ids=tokens).logits
    compiled.save_pretrained(tmp_path)
    torch.testing.assert_close(peftc.load(model, tmp_path)(input_ids=tokens).logits, expected)
    again = peftc.load(model, tmp_path, is_trainable=True)
    assert torch.equal(again.prompt_encoder["default"].shift, compiled.prompt_encoder["default"].shift)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": lambda self, spec: 1 / 0}, "ZeroDivisionError"),
        ({"encoder": lambda self, spec: nn.Embedding(3, 5)}, r"shape \(1, 4, 5\)"),
        ({"encoder": lambda self, spec: nn.Embedding(4, 32)}, "not the one parameter embedding.weight"),
        ({"at": "nowhere"}, "'embeds' or 'past'"),
        ({"weight": lambda self, weight, p: weight}, "a prompt rule has no weight, which would never be called"),
    ],
)
def test_a_broken_prompt_rule_is_reported_with_its_place(change: dict[str, Any], message: str) -> None:
    rule = type("Broken", (ShiftedPrompt,), change)()
    spec = ShiftedConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", inference_mode=True)
    with pytest.raises(peftc.RuleError, match=message):
        _compile_with(rule, spec)


def _compile_with(rule: Any, spec: Any) -> None:
    peftc.register(rule)
    try:
        peftc.compile(tiny("llama"), spec)
    finally:
        peftc.unregister(rule)


def test_a_rule_that_takes_something_from_the_weight_refuses_sites_without_a_plain_one() -> None:
    site = WeightSite("l", "linear", "Linear4bit", in_features=8, out_features=6)
    taking = [rule for rule in rules() if rule.takes]
    assert len(taking) > 5
    for rule in taking:
        reason = f"it takes {rule.takes} from the weight, which is not a plain parameter here"
        assert rule.refusal(rule.spec(), site) == reason


def test_dropouts_are_the_fields_that_a_rule_names() -> None:
    spec, site = peftc.LoHaConfig(rank_dropout=0.25), WeightSite("l", "linear", "Linear", in_features=8, out_features=6)
    (rule,) = (rule for rule in rules() if rule.spec is peftc.LoHaConfig and "linear" in rule.ops)
    assert rule.dropouts(spec, site) == {"rank_dropout": 0.25, "module_dropout": 0.0}
