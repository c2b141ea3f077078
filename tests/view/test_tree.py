"""The tree of a model: every site is in it once, equal layers are one branch, and the sums are those of the plan."""

import re
from collections import Counter
from collections.abc import Iterator
from math import prod
from typing import Any

import pytest
import torch
from torch import nn

import peftc
from peftc.view.charts import TALL, layer_charts
from peftc.view.tree import Branch, layers, total, tree
from tests.support.adapters import EVERY_METHOD
from tests.support.models import tiny
from tests.support.pages import names
from tests.support.plans import SEVEN, golden_plans, meta_llama

PLANS = golden_plans()


def branches(branch: Branch) -> Iterator[Branch]:
    yield branch
    for child in branch.children:
        yield from branches(child)


def rows(branch: Branch) -> list[str]:
    """The tree as text: names, how often, and how many edits."""
    return [f"{own.path or 'root'} {own.count} {[len(here.edits) for here in own.here]}" for own in branches(branch)]


def all_plans() -> dict[str, peftc.Plan]:
    plans = dict(PLANS)
    for method in ("VERA", "VBLORA", "RANDLORA", "TRAINABLE_TOKENS", "SHIRA"):
        fields = {"target_modules": ["q_proj"], **EVERY_METHOD[method]}
        plans[method] = peftc.plan(tiny("llama"), peftc.registry.spec_classes()[method](**fields))
    tied = tiny("gpt2")
    plans["a tie that follows"] = peftc.plan(tied, peftc.TrainableTokensConfig(token_indices=[1]))
    return plans


@pytest.mark.parametrize("name", all_plans())
def test_every_edit_is_in_it_once_and_the_root_has_the_costs(name: str) -> None:
    plan = all_plans()[name]
    root = tree([plan])
    found = Counter(
        (fqn, edit.adapter, edit.rule.name)
        for branch in branches(root)
        for edit in branch.here[0].edits
        for fqn in names(branch.path)
    )
    assert found == Counter((edit.site, edit.adapter, edit.rule.name) for edit in plan.edits)
    assert all(branch.count == len(names(branch.path)) for branch in branches(root))
    trained = {fqn for branch in branches(root) if branch.here[0].trained for fqn in names(branch.path)}
    assert trained == {tensor.name.rpartition(".")[0] for tensor in plan.trained}
    amounts = root.here[0].amounts
    assert (amounts.trained, amounts.flops) == (plan.costs.trainable, plan.costs.flops_per_token)


@pytest.mark.parametrize("method", ["LORA", "VERA", "VBLORA", "SHIRA"])
def test_bytes_are_those_that_the_plan_adds(method: str) -> None:
    model = tiny("llama")
    fields = {"target_modules": ["q_proj", "v_proj"], **EVERY_METHOD[method]}
    plan = peftc.plan(model, peftc.registry.spec_classes()[method](**fields))
    base = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert tree([plan]).here[0].amounts.bytes == plan.costs.weight_bytes - base


def test_what_sites_share_is_no_sites_own() -> None:
    fields = {"target_modules": ["q_proj", "v_proj"], **EVERY_METHOD["VBLORA"]}
    plan = peftc.plan(tiny("llama"), peftc.VBLoRAConfig(**fields))
    shared = {param.numel for edit in plan.edits for param in edit.params if param.shared and param.trainable}
    assert shared == {64}
    root = tree([plan])
    assert root.here[0].amounts.trained - 64 == total(child.here[0].amounts for child in root.children).trained
    # The printed table says the same: a row for each of the two.
    rows = [int(line.split()[-1].replace(",", "")) for line in str(plan).splitlines() if " vblora @" in line]
    assert sum(rows) == plan.costs.trainable - 64


def test_a_parent_is_the_sum_of_what_is_in_it() -> None:
    model = meta_llama(3, 256, 512, vocab_size=99)
    spec = peftc.LoraConfig(target_modules=SEVEN, bias="none", rank_pattern={r"layers\.1\..*q_proj": 3})
    plan = peftc.plan(model, spec)
    for branch in branches(tree([plan], model)):
        if branch.children:
            own = [] if branch.here[0].edits else [child.here[0].amounts for child in branch.children]
            assert branch.here[0].amounts == total(own)
            inside = sum(child.own or 0 for child in branch.children)
            module = model.get_submodule(names(branch.path)[0]) if branch.path else model
            assert branch.own == inside + branch.count * sum(p.numel() for p in module.parameters(recurse=False))
    root = tree([plan], model)
    assert root.own == sum(parameter.numel() for parameter in model.parameters())
    assert root.module == "LlamaForCausalLM"


def test_equal_layers_are_one_branch() -> None:
    assert rows(tree([PLANS["llama70b"]]))[:8] == [
        "root 1 [0]",
        "model.layers 1 [0]",
        "model.layers.{0–3} 4 [0]",
        "model.layers.{0–3}.self_attn 4 [0]",
        "model.layers.{0–3}.self_attn.q_proj 4 [1]",
        "model.layers.{0–3}.self_attn.k_proj 4 [1]",
        "model.layers.{0–3}.self_attn.v_proj 4 [1]",
        "model.layers.{0–3}.self_attn.o_proj 4 [1]",
    ]
    assert len(rows(tree([PLANS["llama70b"]]))) == 22


def test_layers_that_differ_are_not_one() -> None:
    model = meta_llama(6, 256, 512, vocab_size=99)
    spec = peftc.LoraConfig(target_modules=["q_proj"], rank_pattern={"layers.2.self_attn.q_proj": 3}, r=4)
    named = [row for row in rows(tree([peftc.plan(model, spec)])) if row.count(".") == 2]
    assert named == ["model.layers.{0–1,3–5} 5 [0]", "model.layers.2 1 [0]"]
    only = peftc.LoraConfig(target_modules=["q_proj"], layers_to_transform=[4, 5])
    told = rows(tree([peftc.plan(model, only)], model))
    assert "model.layers.{0–3} 4 [0]" in told
    assert "model.layers.{4–5} 2 [0]" in told
    assert "lm_head 1 [0]" in told


def test_lists_in_lists_are_grouped_at_every_level() -> None:
    model = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in range(2))
    root = tree([peftc.plan(model, peftc.LoraConfig(target_modules=r"\d\.\d", r=2))])
    assert rows(root) == ["root 1 [0]", "{0–1} 2 [0]", "{0–1}.{0–2} 6 [1]"]


def test_two_plans_are_one_tree() -> None:
    model = meta_llama(4, 256, 512, vocab_size=99)
    one = peftc.plan(model, peftc.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    two = peftc.plan(model, {"b": peftc.LoraConfig(target_modules=["q_proj"], r=4, layers_to_transform=[0, 1])})
    root = tree([one, two])
    assert "model.layers.{0–1}.self_attn.q_proj 2 [1, 1]" in rows(root)
    assert "model.layers.{2–3}.self_attn.q_proj 2 [1, 0]" in rows(root)
    differs = {branch.path for branch in branches(root) if branch.differs and not branch.children}
    # In layers 0 and 1, q_proj has the same in both; that the adapters have other names is no matter.
    assert differs == {f"model.layers.{at}.self_attn.{name}" for at, name in [
        ("{0–1}", "v_proj"), ("{2–3}", "q_proj"), ("{2–3}", "v_proj")
    ]}  # fmt: skip
    assert [here.amounts.trained for here in root.here] == [one.costs.trainable, two.costs.trainable]


def test_a_plan_of_another_model_is_refused() -> None:
    plan = peftc.plan(tiny("llama"), peftc.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        peftc.PlanError, match=r"q_proj: the plan is of another model: this GPT2LMHeadModel has no such"
    ):
        plan.to_html(model=tiny("gpt2"))


@pytest.mark.parametrize("name", ["llama70b", "misses", "tied", "prompts"])
def test_layers_have_what_is_added_in_them(name: str) -> None:
    plan = PLANS[name]
    expected: Counter[int] = Counter()
    for fqn, numel in [
        *((edit.site, sum(param.numel for param in edit.params if param.trainable)) for edit in plan.edits),
        *((tensor.name, prod(tensor.shape)) for tensor in plan.trained),
    ]:
        number = re.search(r"\.(\d+)\.", fqn)
        if number is not None:
            expected[int(number[1])] += numel
    (found,) = layers(plan).values()
    assert {number: amounts.trained for number, amounts in found.items()} == expected
    flops = sum(edit.flops_per_token for edit in plan.edits if re.search(r"\.\d+\.", edit.site))
    assert total(found.values()).flops == flops


def test_bars_are_as_tall_as_the_amounts() -> None:
    model = meta_llama(5, 256, 512, vocab_size=99)
    plans = [
        peftc.plan(
            model, peftc.LoraConfig(target_modules=["q_proj"], r=8, rank_pattern={"layers.3.self_attn.q_proj": 2})
        ),
        peftc.plan(model, peftc.LoraConfig(target_modules=["q_proj"], r=4, layers_to_transform=[1])),
    ]
    (chart,) = layer_charts(plans)
    assert (chart.path, chart.numbers, chart.count) == ("model.layers", "0–4", 5)
    assert [row for row, _ in chart.rows] == ["0", "1", "2", "3", "4"]
    assert [[amounts.trained for amounts in own] for _, own in chart.rows] == [
        [4096, 0], [4096, 2048], [4096, 0], [1024, 0], [4096, 0]
    ]  # fmt: skip
    trained = chart.bars[0]
    assert (trained.measure, trained.least, trained.most) == ("trained", 0, 4096)
    tall = [[float(bar.split("v-")[1].split("h")[0]) for bar in path.split("M")[1:]] for path in trained.paths]
    assert tall == [[TALL, TALL, TALL, TALL / 4, TALL], [TALL / 2]]


def test_many_experts_are_a_small_tree() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8) for n in ("up", "down")}) for _ in range(32))

    with torch.device("meta"):
        model: Any = nn.ModuleList(Layer() for _ in range(20))
    plan = peftc.plan(model, peftc.LoraConfig(target_modules=["up", "down"], r=1))
    assert rows(tree([plan], model))[-1] == "{0–19}.experts.{0–31}.down 640 [1]"
    assert len(plan.to_html(model=model)) < 60_000
