"""Graph to graph: what edits put into a graph, counted and computed, beside graphs of a few nodes."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import peftc
from peftc.graph.region import Anchor, Source
from peftc.graph.sites import WeightSite
from peftc.plan import Edit, PlannedParam
from peftc.rewrite.hosts import Code, install
from peftc.rewrite.splice import ORIGIN, Active, splice
from peftc.rewrite.verify import Example, signature_of, verify


class Spec(peftc.AdapterSpec):
    peft_type: Any = "GRAPH"


class Add(peftc.Rule[Spec]):
    """W + u, or y + u·x."""

    name, spec, ops = "add", Spec, ("linear",)

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight + p.u

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return y + F.linear(x, p.u)


class Scale(peftc.Rule[Spec]):
    """W ⊙ u by columns, or the op on u ⊙ x."""

    name, spec, ops = "scale", Spec, ("linear",)

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight * p.u

    def input(self, x: Tensor, p: Any) -> Tensor:
        return x * p.u


class Turn(peftc.Rule[Spec]):
    """−W and −b; it has no other form."""

    name, spec, ops = "turn", Spec, ("linear",)

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return -weight + 0 * p.u

    def bias(self, bias: Tensor, p: Any) -> Tensor:
        return -bias


U = {"add": torch.randn(3, 4), "scale": torch.rand(4) + 0.5, "turn": torch.ones(3, 4)}
RULES: dict[str, peftc.Rule[Any]] = {"add": Add(), "scale": Scale(), "turn": Turn()}


def linear() -> tuple[Source, nn.Linear]:
    module = nn.Linear(4, 3)
    graph = fx.Graph()
    x, w, b = graph.placeholder("x"), graph.get_attr("weight"), graph.get_attr("bias")
    node = graph.call_function(F.linear, (x, w, b))
    graph.output(node)
    return Source(graph, (Anchor("", node.name, "weight", "bias"),)), module


SITE = WeightSite("site", "linear", "Linear", in_features=4, out_features=3, weight="site.weight", bias="site.bias")


def active(rules: Sequence[str], **changes: Any) -> list[Active]:
    made: list[Active] = []
    for number, name in enumerate(rules):
        rule = RULES[name]
        param = PlannedParam("u", "u.weight", tuple(U[name].shape), "float32", "zeros")
        edit = Edit("site", f"n{number}", rule, rule.slots(Spec(), SITE), (param,), {}, {}, **changes)
        made.append(Active(edit, SITE, f"a{number}"))
    return made


def run(graph: fx.Graph, module: nn.Module, rules: Sequence[str], x: Tensor) -> Tensor:
    parts = {f"a{n}": SimpleNamespace(u=SimpleNamespace(weight=U[name])) for n, name in enumerate(rules)}
    return Code(graph).forward(SimpleNamespace(host=host(module), **parts), x)


def host(module: nn.Module) -> nn.Module:
    """The module with its weights readable by generated code."""
    install(module, ["weight", "bias"])
    return module


@pytest.mark.parametrize(
    "rules",
    [[], ["add"], ["scale"], ["turn"], ["add", "scale"], ["scale", "add"], ["add", "turn"], ["turn", "add"],
     ["scale", "turn", "add"], ["add", "scale", "turn"], ["turn", "turn", "scale", "add"]],
    ids="+".join,
)  # fmt: skip
def test_edits_compose_as_their_folds_do(rules: list[str]) -> None:
    source, module = linear()
    before = str(source.graph)
    graph = splice(source, {"": active(rules)})
    assert str(source.graph) == before
    x, weight, bias = torch.randn(5, 4), module.weight, module.bias
    for name in rules:
        p = SimpleNamespace(u=U[name])
        weight, bias = RULES[name].weight(weight, p), RULES[name].bias(bias, p)
    torch.testing.assert_close(run(graph, module, rules, x), F.linear(x, weight, bias))


def test_nothing_is_inserted_without_an_edit() -> None:
    source, _ = linear()
    graph = splice(source, {})
    assert len(graph.nodes) == len(source.graph.nodes)
    assert not [node for node in graph.nodes if ORIGIN in node.meta]


@pytest.mark.parametrize(
    ("rules", "inserted", "linears"), [(["add"], 7, 2), (["scale"], 6, 1), (["turn"], 9, 1), (["add", "scale"], 13, 2)]
)
def test_what_is_inserted_is_counted_and_says_where_it_is_from(rules: list[str], inserted: int, linears: int) -> None:
    source, _ = linear()
    graph = splice(source, {"": active(rules)})
    own = [node for node in graph.nodes if ORIGIN in node.meta]
    assert len([node for node in graph.nodes if node.target is F.linear]) == linears
    assert len(graph.nodes) - len(source.graph.nodes) <= inserted
    assert {node.meta[ORIGIN].rule for node in own} == set(rules)
    assert all("test_splice.py:" in node.meta[ORIGIN].function for node in own)


def test_an_edit_that_cannot_be_in_the_weight_excludes_one_that_must() -> None:
    source, _ = linear()
    edits = [*active(["add"], unmergeable="it can't"), Active(active(["turn"])[0].edit, SITE, "a1")]
    with pytest.raises(peftc.AdapterError, match=r"'n0' can't be active together with 'n0'.*: it can't"):
        splice(source, {"": edits})


class TestVerifier:
    def test_a_graph_that_fits_passes_and_shapes_are_told(self) -> None:
        source, module = linear()
        root = SimpleNamespace(host=host(module), a0=SimpleNamespace(u=SimpleNamespace(weight=U["add"])))
        example = Example((2, 4), torch.float32)
        expected = signature_of(source.graph, root, example, bare=True)
        assert expected == ((2, 3), torch.float32)
        verify(splice(source, {"": active(["add"])}), root, example, expected, "splice")

    @pytest.mark.parametrize("fault", ["shape", "dtype", "order", "operand"])
    def test_a_graph_that_does_not_fit_is_refused_with_its_maker(self, fault: str) -> None:
        source, module = linear()
        graph = splice(source, {})
        output = next(node for node in graph.nodes if node.op == "output")
        op = next(node for node in graph.nodes if node.target is F.linear)
        message = {
            "shape": r"of shape \[2, 1\] where",
            "dtype": "float64 of shape",
            "order": "well-formed",
            "operand": "does not run",
        }
        with graph.inserting_before(output):
            if fault == "shape":
                output.args = (graph.call_function(torch.sum, (op, -1, True)),)
            if fault == "dtype":
                output.args = (graph.call_method("double", (op,)),)
        if fault == "operand":
            op.args = (op.args[2], op.args[1], op.args[2])
        if fault == "order":
            next(node for node in graph.nodes if node.target == "host.peftc_weight").append(op)
            graph._root._prev.prepend(next(node for node in graph.nodes if node.op == "placeholder"))
        with pytest.raises(peftc.RuleError, match=rf"mine: .*{message[fault]}"):
            verify(
                graph,
                SimpleNamespace(host=host(module)),
                Example((2, 4), torch.float32),
                ((2, 3), torch.float32),
                "mine",
            )
