"""Passes: one as a user would write it, what the pipeline says of it, and what the verifier refuses."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import peftc
from peftc.rewrite.products import linear_with_products


class Attention(nn.Module):
    """An attention layer written with raw products; torch.fx traces it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        for name in ("wq", "wk", "wv", "wo"):
            self.register_parameter(name, nn.Parameter(torch.randn(width, width) / 3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.wq), F.linear(x, self.wk), F.linear(x, self.wv)
        return F.linear(torch.softmax(q @ k.mT, -1) @ v, self.wo)


class Block(nn.Module):
    """It, in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = Attention(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.attention(x))


NAMES = ["wq", "wk", "wv"]


def source_of(node: fx.Node) -> fx.Node:
    """What `node` is, past casts."""
    while node.op == "call_method" and node.target == "to":
        node = node.args[0]
    return node


@dataclass(frozen=True)
class OneProduct:
    """The A products of sites that read one input become one: A = [A₁; A₂; A₃], whose result is split."""

    name: str = "one product"

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.target is F.linear and str(node.args[1].target).endswith("lora_A.weight"):
                groups.setdefault(source_of(node.args[0]), []).append(node)
        for nodes in groups.values():
            if len(nodes) > 1:
                self._join(graph, nodes)
        graph.eliminate_dead_code()
        return graph

    def _join(self, graph: fx.Graph, nodes: list[fx.Node]) -> None:
        with graph.inserting_before(nodes[0]):
            factors = [graph.get_attr(node.args[1].target) for node in nodes]
            together = graph.call_function(F.linear, (nodes[0].args[0], graph.call_function(torch.cat, (factors,))))
            sizes = [graph.call_method("size", (factor, 0)) for factor in factors]
            pieces = graph.call_method("split", (together, sizes, -1))
            for number, node in enumerate(nodes):
                piece = graph.call_function(lambda pieces, i: pieces[i], (pieces, number))
                piece.target = __import__("operator").getitem
                node.replace_all_uses_with(piece)


def compiled(passes: Any = ()) -> tuple[Block, peftc.CompiledModel]:
    torch.manual_seed(0)
    model = Block().double()
    spec = peftc.LoraConfig(r=2, target_modules=["out"], target_parameters=NAMES, init_lora_weights=False)
    return model, peftc.compile(model, spec, capture="symbolic", passes=passes)


def products(model: peftc.CompiledModel) -> int:
    """How many products there are with an A, or with several of them together."""
    nodes = list(model.graph_of("").nodes)
    together = [node for node in nodes if node.target is F.linear and node.args[1].target is torch.cat]
    terms = [term for node in nodes if node.target is linear_with_products for term in node.args[3]]
    return len(together) + len([inner for inner, *_ in terms if isinstance(inner, tuple)])


def test_parameters_in_raw_ops_are_sites_of_these_ops() -> None:
    model, adapted = compiled()
    sites = {edit.site: (adapted.plan.sites[edit.site].op, edit.slots) for edit in adapted.plan.edits}
    assert sites == {
        **{f"attention.{name}": ("linear", ("output",)) for name in NAMES},
        "out": ("linear", ("output",)),
    }
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y = adapted(x)
    plain = peftc.compile(model, peftc.LoraConfig(r=2, target_modules=["out"], target_parameters=NAMES))
    assert {edit.slots for edit in plain.plan.edits if edit.site != "out"} == {("weight",)}
    plain.load_state_dict(adapted.state_dict())
    torch.testing.assert_close(plain(x), y)
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(x), y)
    adapted.unmerge_adapter()
    assert torch.equal(adapted(x), y)
    assert torch.equal(adapted.unload()(x), model(x))


def test_three_products_become_one() -> None:
    _, before = compiled()
    _, after = compiled([OneProduct()])
    after.load_state_dict(before.state_dict())
    assert (products(before), products(after)) == (4, 2)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(after(x), before(x))
    before(x).square().sum().backward()
    after(x).square().sum().backward()
    gradients = {name: p.grad for name, p in before.named_parameters() if p.grad is not None}
    assert len(gradients) == 8
    for name, parameter in after.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name])
    (ran,) = after.passes.values()
    assert [one.name for one in ran] == ["splice", "one product", "products-fused"]
    assert ran[0].after == ran[1].before > ran[1].after - 8
    with after.disable_adapter():
        assert after.passes == {}


def test_a_pass_changes_each_graph_once_and_the_hosts_that_share_it() -> None:
    """A pass runs on a graph, not on a host: what it does is in the code that equal hosts share, and in no other."""
    seen: list[int] = []

    @dataclass(frozen=True)
    class Count:
        name: str = "count"

        def __call__(self, graph: fx.Graph) -> fx.Graph:
            seen.append(len(graph.nodes))
            return graph

    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)), nn.Linear(4, 4, bias=False))
    adapted = peftc.compile(model, peftc.LoraConfig(r=1, target_modules="all-linear"), passes=[Count()])
    assert len(seen) == 2
    codes = {host: binding.code for host, binding in adapted.program.installed.items()}
    assert len(set(map(id, codes.values()))) == 2
    adapted.add_adapter("b", peftc.LoraConfig(r=3, target_modules="all-linear"))
    adapted.set_adapter("b")
    assert {host: binding.code for host, binding in adapted.program.installed.items()} == codes
    adapted.set_adapter("default")
    assert len(seen) == 4


@dataclass(frozen=True)
class Broken:
    fault: str
    name: str = "broken"

    def __call__(self, graph: fx.Graph) -> Any:
        if self.fault == "raises":
            raise ZeroDivisionError("no")
        if self.fault == "nothing":
            return None
        output = next(node for node in graph.nodes if node.op == "output")
        with graph.inserting_before(output):
            call = {
                "shape": lambda n: graph.call_method("sum", (n,)),
                "dtype": lambda n: graph.call_method("half", (n,)),
            }
            output.args = (call[self.fault](output.args[0]),)
        return graph


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raises", "pass 'broken': ZeroDivisionError: no"),
        ("nothing", "pass 'broken' returns NoneType, no graph"),
        ("shape", r"broken: the graph returns torch.float32 of shape \[\] where the module returns"),
        ("dtype", "broken: the graph returns torch.float16 of shape"),
    ],
)
def test_a_broken_pass_is_named_and_nothing_is_changed(fault: str, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    spec = peftc.LoraConfig(r=1, target_modules=["0"])
    with pytest.raises(peftc.RuleError, match=message):
        peftc.compile(model, spec, inplace=True, passes=[Broken(fault)])
    assert type(model[0]) is nn.Linear
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("given", [None, Broken, [3], [Broken("raises"), "siblings-fused"], Broken("raises")], ids=repr)
def test_what_is_no_pass_is_said_before_anything_is_done(given: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    spec = peftc.LoraConfig(r=1, target_modules=["0"])
    said = "pass 'broken': ZeroDivisionError" if isinstance(given, Broken) else "is no pass; give a list of objects"
    with pytest.raises(peftc.RuleError, match=said):
        peftc.compile(model, spec, inplace=True, passes=given)
    assert type(model[0]) is nn.Linear


@dataclass(frozen=True)
class NoCasts:
    """Casts taken out, as one would who thinks that they do nothing."""

    name: str = "no casts"

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        for node in list(graph.nodes):
            if node.op == "call_method" and node.target == "to":
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        graph.eliminate_dead_code()
        return graph


def test_casts_are_needed_where_dtypes_differ_and_the_verifier_knows() -> None:
    spec = peftc.LoraConfig(r=1, target_modules=["0"])
    peftc.compile(nn.Sequential(nn.Linear(4, 3)), spec, passes=[NoCasts()])
    half = nn.Sequential(nn.Linear(4, 3)).to(torch.bfloat16)
    with pytest.raises(peftc.RuleError, match=r"no casts: .*torch.bfloat16 and torch.float32"):
        peftc.compile(half, spec, passes=[NoCasts()])


def test_passes_run_over_the_code_of_mixed_batches_too() -> None:
    seen: list[list[str]] = []

    @dataclass(frozen=True)
    class See:
        name: str = "see"

        def __call__(self, graph: fx.Graph) -> fx.Graph:
            seen.append([node.name for node in graph.nodes])
            return graph

    model, spec = nn.Sequential(nn.Linear(4, 3)), peftc.LoraConfig(r=1, target_modules=["0"])
    adapted = peftc.compile(model, {"a": spec, "b": spec}, passes=[See()])
    adapted(torch.randn(2, 4), adapter_names=["a", "b"])
    assert any("add_products" in name for names in seen for name in names)
