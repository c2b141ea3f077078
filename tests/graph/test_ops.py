"""The table of ops: functions and aten overloads, where operands lie, how weights lie, and that it is open."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import peftc
from peftc.graph.ops import op_named, ops, use_of
from peftc.graph.sites import index_sites
from peftc.testing import check_rule

aten = torch.ops.aten


class Raw(nn.Module):
    """One function of its input and two parameters."""

    def __init__(self, function: Any, weight: tuple[int, ...]) -> None:
        super().__init__()
        self.function, self.w, self.b = function, nn.Parameter(torch.randn(weight)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w, self.b)


FORMS: dict[str, tuple[Any, tuple[int, ...], str, str]] = {
    "linear": (lambda x, w, b: F.linear(x, w, b), (6, 8), "linear", "out_in"),
    "linear by keyword": (lambda x, w, b: F.linear(x, bias=b, weight=w), (6, 8), "linear", "out_in"),
    "aten linear": (lambda x, w, b: aten.linear.default(x, w, b), (6, 8), "linear", "out_in"),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), (8, 6), "linear", "in_out"),
    "aten addmm": (lambda x, w, b: aten.addmm.default(b, x, w), (8, 6), "linear", "in_out"),
    "addmm, turned": (lambda x, w, b: aten.addmm.default(b, x, aten.t.default(w)), (6, 8), "linear", "out_in"),
    "matmul": (lambda x, w, b: x @ w, (8, 6), "linear", "in_out"),
    "matmul, turned": (lambda x, w, b: x @ w.T, (6, 8), "linear", "out_in"),
    "matmul, turned twice": (lambda x, w, b: x @ w.t().mT, (8, 6), "linear", "in_out"),
    "matmul, transposed": (lambda x, w, b: torch.matmul(x, w.transpose(0, 1)), (6, 8), "linear", "out_in"),
    "aten mm": (lambda x, w, b: aten.mm.default(x, aten.transpose.int(w, -1, -2)), (6, 8), "linear", "out_in"),
    "embedding": (lambda x, w, b: F.embedding(x, w), (8, 6), "embedding", "in_out"),
    "aten embedding": (lambda x, w, b: aten.embedding.default(w, x), (8, 6), "embedding", "in_out"),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b), (6, 8, 3), "conv1d", "out_in"),
    "aten conv2d": (lambda x, w, b: aten.conv2d.default(x, w, b, [2, 2]), (6, 8, 3, 3), "conv2d", "out_in"),
    "conv3d": (lambda x, w, b: F.conv3d(x, w, b), (6, 8, 1, 1, 1), "conv3d", "out_in"),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (6,), w, b), (6,), "norm", "out_in"),
    "aten layer norm": (lambda x, w, b: aten.layer_norm.default(x, [6], w, b), (6,), "norm", "out_in"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_function_is_known_with_its_operands_and_the_layout_of_its_weight(name: str) -> None:
    function, shape, op, layout = FORMS[name]
    graph = fx.Tracer().trace(Raw(function, shape))
    uses = [use for node in graph.nodes if (use := use_of(node, lambda _: len(shape))) is not None]
    assert [(use.op.name, use.weight.target, use.layout) for use in uses] == [(op, "w", layout)]
    x = next(node for node in graph.nodes if node.op == "placeholder")
    position, keyword = uses[0].form.x
    given = uses[0].node.args[position] if position < len(uses[0].node.args) else uses[0].node.kwargs[keyword]
    assert given is x


@pytest.mark.parametrize(
    "function", [lambda x, w, b: x * w, lambda x, w, b: F.linear(x, w * 2), lambda x, w, b: x @ w.relu()], ids=range(3)
)
def test_what_is_no_op_of_a_weight_is_none(function: Any) -> None:
    graph = fx.Tracer().trace(Raw(function, (8, 8)))
    assert not [node for node in graph.nodes if use_of(node) is not None]


def test_modules_are_known_by_what_they_compute() -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 3), "turned": Conv1D(3, 4), "embed": nn.Embedding(5, 3),
            "attn": nn.MultiheadAttention(4, 2), "c1": nn.Conv1d(2, 4, 3, groups=2), "c3": nn.Conv3d(2, 4, 1),
            "norm": nn.LayerNorm(3), "batch": nn.BatchNorm1d(3), "relu": nn.ReLU(), "pool": nn.AdaptiveAvgPool1d(1),
        }
    )  # fmt: skip
    index = index_sites(model, lambda fqn: "role:" + fqn)
    found = {fqn: (site.op, site.in_features, site.out_features, site.layout) for fqn, site in index.sites.items()}
    assert found == {
        "linear": ("linear", 4, 3, "out_in"),
        "turned": ("linear", 4, 3, "in_out"),
        "embed": ("embedding", 5, 3, "in_out"),
        "attn": ("attention", 4, 4, "out_in"),
        "attn.out_proj": ("linear", 4, 4, "out_in"),
        "c1": ("conv1d", 2, 4, "out_in"),
        "c3": ("conv3d", 2, 4, "out_in"),
        "norm": ("norm", 1, 3, "out_in"),
        "batch": ("norm", 1, 3, "out_in"),
    }
    assert index.sites["c1"].groups == 2
    assert index.sites["linear"].role == "role:linear"
    assert set(index.inner) == {"attn.in_proj_weight", "attn.out_proj.weight"}
    assert index.inner["attn.in_proj_weight"].owner == "attn"
    assert index.inner["attn.out_proj.weight"].holder == "attn.adapted_out_proj_weight"


class Scale(nn.Module):
    """A module of no op that peftc knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(x, self.weight)


SCALE = peftc.Op(
    "scale",
    {torch.mul: peftc.Form(weight=(1, "other"), bias=None)},
    lambda module: peftc.Shape(1, 4) if isinstance(module, Scale) else None,
)


class ShiftConfig(peftc.AdapterSpec):
    peft_type: Any = "SHIFT"


class Shift(peftc.Rule[ShiftConfig]):
    name, spec, ops = "shift", ShiftConfig, ("scale",)

    def params(self, spec: ShiftConfig, site: Any) -> dict[str, peftc.Param]:
        return {"shift": peftc.Param((site.out_features,))}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight + p.shift


@pytest.fixture
def scale() -> Iterator[None]:
    peftc.register_op(SCALE)
    yield
    peftc.unregister_op(SCALE)


def test_an_op_of_ones_own_is_planned_spliced_and_merged(scale: None) -> None:
    rule = Shift()
    peftc.register(rule)
    try:
        model, x = nn.Sequential(nn.Linear(4, 4), Scale()), torch.randn(2, 4)
        compiled = peftc.compile(model, ShiftConfig(target_modules=["1"]))
        assert torch.equal(compiled(x), model(x))
        with torch.no_grad():
            compiled.base[1].shift["default"].fill_(0.5)
        torch.testing.assert_close(compiled(x), model(x) * 1.5)
        compiled.merge_adapter()
        torch.testing.assert_close(compiled.base[1].weight, torch.full((4,), 1.5))
    finally:
        peftc.unregister(rule)


def test_a_rule_for_an_op_of_ones_own_keeps_the_laws_on_a_module_that_is_given(scale: None) -> None:
    with pytest.raises(peftc.RuleError, match="accepts no case of its ops"):
        check_rule(Shift())
    assert "scale (given): tiles equal the whole" in check_rule(
        Shift(), modules={"scale": (Scale(), torch.randn(3, 4))}
    )


def test_rows_that_clash_or_are_not_there_are_refused(scale: None) -> None:
    assert list(ops())[-1] == "scale"
    for clash in (peftc.Op("scale"), peftc.Op("other", {F.linear: peftc.Form()})):
        with pytest.raises(peftc.RuleError, match="is in the table already"):
            peftc.register_op(clash)
    with pytest.raises(peftc.RuleError, match="no op 'nothing'; there are linear"):
        op_named("nothing")
    with pytest.raises(peftc.RuleError, match="not registered"):
        peftc.unregister_op(peftc.Op("other"))
    for change in (peftc.register_op, peftc.unregister_op):
        with pytest.raises(peftc.RuleError, match="3 is not an Op: a row of the table"):
            change(3)  # type: ignore[arg-type]


def test_rules_of_the_old_contract_are_told_what_has_come_in_its_place() -> None:
    for name, value, successor in (
        ("kinds", ("linear",), "declare ops"),
        ("slot", lambda self, spec, site: "output", "declare slots"),
        ("fold", lambda self, weight, p: weight, "declare weight"),
        ("fold_bias", lambda self, bias, p: bias, "declare bias"),
    ):
        rule = type("Old", (Shift,), {name: value, "ops": ("linear",)})()
        with pytest.raises(peftc.RuleError, match=rf"'{name}' is of peftc 0.1; {successor}"):
            peftc.register(rule)


def test_a_field_that_the_engine_would_not_use_is_an_error_in_the_rule() -> None:
    class LayeredConfig(ShiftConfig):
        layers_to_transform: tuple[int, ...] | None = None

    rule = type("Layered", (Shift,), {"spec": LayeredConfig, "ops": ("linear",)})()
    with pytest.raises(peftc.RuleError, match=r"layers_to_transform would do nothing: .* inherit LayerSelection"):
        peftc.register(rule)
