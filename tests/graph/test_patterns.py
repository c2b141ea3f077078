"""Patterns over dataflow: what they mean in real programs, as selectors and in passes, and what is said of the others."""

import json
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import peftc
from peftc import Pattern
from peftc.graph.patterns import Dataflow, matching, unmet
from tests.support.adapters import perturb
from tests.support.programs import program_inputs, program_model


class Block(nn.Module):
    """Attention by products around a softmax, a norm on the query, a gated feed-forward part, a weight in a raw op."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.raw = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.matmul(self.norm(self.q(x)), self.k(x).transpose(-1, -2)) / 8**0.5
        y = x + self.o(torch.matmul(F.softmax(scores, -1), self.v(x)))
        return F.linear(y + self.down(F.silu(self.gate(y)) * self.up(y)), self.raw)


X = torch.randn(2, 5, 8)
# What each selects in Block.
MEANT: dict[str, tuple[Pattern, list[str]]] = {
    "query": (Pattern(op="linear", feeds="attention.query"), ["q"]),
    "key": (Pattern(op="linear", feeds="attention.key"), ["k"]),
    "value": (Pattern(op="linear", feeds="attention.value"), ["v"]),
    "after attention": (Pattern(op="linear", follows=Pattern(op="softmax")), ["o"]),
    "gates": (Pattern(op="linear", feeds=Pattern(op="silu")), ["gate"]),
    "siblings of a gate": (Pattern(op="linear", beside=Pattern(feeds=Pattern(op="silu"))), ["up"]),
    "what a product gives": (Pattern(op="linear", input=Pattern(op="mul")), ["down"]),
    "wide ones": (Pattern(op="linear", out_features=(9, None)), ["gate", "up"]),
    "by size and name": (Pattern(op="linear", in_features=8, out_features=8, name="[qk]"), ["q", "k"]),
}


def plan_of(pattern: Any, capture: Any = "export", model: nn.Module | None = None) -> Any:
    inputs = {"x": X} if capture == "export" else None
    return peftc.plan(model or Block(), peftc.LoraConfig(r=2, target_modules=pattern), capture=capture, inputs=inputs)


@pytest.mark.parametrize("name", MEANT)
def test_what_is_meant_in_a_trace(name: str) -> None:
    pattern, sites = MEANT[name]
    plan = plan_of(pattern, "symbolic")
    assert [edit.site for edit in plan.edits] == sites
    assert plan.adapters["default"].target_modules == tuple(sites)  # As any reader of the file knows it.
    assert peftc.Plan.from_json(plan.to_json()) == plan


def test_a_program_means_the_same_and_learns() -> None:
    torch.manual_seed(0)
    pattern = (*MEANT["query"][:1],)[0]
    compiled = peftc.compile(Block(), peftc.LoraConfig(r=2, target_modules=pattern), capture="export", inputs={"x": X})
    assert list(compiled.peft_config["default"].target_modules) == ["q"]
    perturb(compiled)(x=X).sum().backward()
    assert any(p.grad is not None for name, p in compiled.named_parameters() if "lora_A" in name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "place", "ends"),
    [
        ("llama", "attention.query", {"q_proj"}),
        ("qwen3", "attention.query", {"q_proj"}),
        ("bert", "attention.key", {"key"}),
        ("t5", "attention.value", {"v"}),
        ("gpt2", "attention.query", {"c_attn"}),
    ],
)
def test_places_in_the_attention_of_real_models(kind: str, place: str, ends: set[str]) -> None:
    model = program_model(kind)
    spec = peftc.LoraConfig(r=2, target_modules=Pattern(op="linear", feeds=place))
    plan = peftc.plan(model, spec, capture="export", inputs=program_inputs(kind, model, labels=False))
    assert {edit.site.rpartition(".")[2] for edit in plan.edits} == ends
    assert not plan.misses


def test_what_nearly_matched_is_named_with_what_it_lacks() -> None:
    plan = plan_of(Pattern(op="linear", out_features=12, feeds=Pattern(op="gelu")), "symbolic")
    (miss,) = plan.misses
    assert miss.error
    assert miss.reason.endswith("sites. Nearest: gate (feeds no gelu), up (feeds no gelu).")
    with pytest.raises(peftc.NoMatchError, match="feeds no gelu"):
        peftc.compile(Block(), plan)


def test_modules_have_sizes_and_names_but_no_dataflow() -> None:
    assert [edit.site for edit in plan_of(MEANT["wide ones"][0], "modules").edits] == ["gate", "up"]
    (miss,) = plan_of(MEANT["query"][0], "modules").misses
    assert "asks for dataflow, which capture='modules' has not" in miss.reason
    assert "use capture='export'" in miss.reason


def test_a_weight_in_a_raw_op_is_meant_by_its_own_name() -> None:
    plan = plan_of(Pattern(op="linear", out_features=6), "symbolic")
    spec: Any = plan.adapters["default"]
    assert (spec.target_modules, spec.target_parameters) == ((), ("raw",))
    assert [edit.site for edit in plan.edits] == ["raw"]


def test_a_pattern_is_data() -> None:
    pattern = Pattern(op="linear", out_features=(1, None), feeds="attention.query", beside=[Pattern(dims=2)])
    spec = peftc.LoraConfig(target_modules=pattern)
    data = json.loads(json.dumps(spec.to_dict()))
    assert peftc.LoraConfig.from_dict(data) == spec
    assert Pattern(**data["target_modules"]) == pattern
    assert hash(pattern) == hash(Pattern(**data["target_modules"]))
    assert str(Pattern(op="linear", dims=2)) == "Pattern(op='linear', dims=2)"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"opp": "linear"}, "Pattern: opp"),
        ({"feeds": "attention.qury"}, "'attention.qury' is no name of a place; there are attention.query"),
        ({"name": "("}, "is no regular expression"),
        ({"dims": "2"}, "Pattern: dims: got '2'"),
    ],
)
def test_a_wrong_pattern_is_explained(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(peftc.SpecError, match=message.replace("(", r"\(")):
        Pattern(**wrong)
    with pytest.raises(peftc.SpecError, match=message.split(": ")[-1].replace("(", r"\(")):
        peftc.LoraConfig(target_modules=wrong)


def test_a_misspelt_list_is_not_told_of_patterns() -> None:
    with pytest.raises(peftc.SpecError) as error:
        peftc.LoraConfig(target_modules=5)  # type: ignore[arg-type]
    assert "attern" not in str(error.value)


def test_matching_a_graph_of_ones_own() -> None:
    graph = fx.symbolic_trace(Block()).graph
    flow = Dataflow(graph, lambda node: ())
    (silu,) = matching(Pattern(op="silu"), flow)
    assert matching(Pattern(feeds=Pattern(op="softmax"), op="truediv"), flow)
    missing = list(unmet(Pattern(op="gelu", follows=Pattern(op="tanh")), silu, flow))
    assert missing == ["is silu, not gelu", "follows no tanh"]


def test_a_plan_of_a_program_has_its_dataflow() -> None:
    graph = plan_of(MEANT["gates"][0]).to_networkx()
    flow = nx.subgraph_view(graph, filter_edge=lambda a, b, key: graph.edges[a, b, key]["relation"] == "feeds")
    assert set(flow.successors("gate")) == {"down"}
    assert set(flow.predecessors("o")) == {"q", "k", "v"}
    assert nx.has_path(flow, "q", "raw")
    assert not nx.has_path(flow, "up", "o")
    assert peftc.plan(Block(), peftc.LoraConfig(target_modules=["q"])).flows == ()
