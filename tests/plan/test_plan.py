"""Plans: what they say, what they miss, how they print, and that they hold for one model only."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftc
from peftc.view.groups import ranges, span
from peftc.view.text import render
from tests.support.models import Everything, Net, tiny
from tests.support.plans import SEVEN, golden_plans, meta_llama
from tests.support.prompts import METHODS
from tests.support.snapshots import snapshot

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize("name", ["llama70b", "misses", "tied", "kinds", "prompts", "prompts_t5", "prompts_missed"])
def test_printed_plans_are_golden(name: str) -> None:
    """Write them anew with `python -m tests.plan.test_plan` and read the difference."""
    assert render(golden_plans()[name], width=120) == (GOLDEN / f"{name}.txt").read_text()


def test_seventy_billion_fit_one_screen() -> None:
    lines = (GOLDEN / "llama70b.txt").read_text().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120


def test_generated_code_is_golden() -> None:
    model = Net()
    for capture in ("modules", "symbolic"):
        spec = peftc.LoraConfig(target_modules=["conv", "fc"], r=2, lora_dropout=0.1)
        code = peftc.compile(model, spec, capture=capture).site_code()
        text = "\n\n".join(f"# {where}\n{source}" for where, source in code.items())
        assert text + "\n" == (GOLDEN / f"code_{capture}.txt").read_text()


def prompt_code() -> str:
    """The code that prompt methods leave at the calls of two models."""
    specs = {"prefix": METHODS["prefix"]("CAUSAL_LM"), "prompt": METHODS["prompt"]("CAUSAL_LM")}
    compiled = peftc.compile(tiny("llama"), specs)
    compiled.set_adapter(["prefix", "prompt"])
    both = peftc.compile(tiny("t5"), METHODS["prompt"]("SEQ_2_SEQ_LM"))
    sources = {**compiled.site_code(), **both.site_code()}
    return "\n\n".join(f"# {where}\n{source}" for where, source in sources.items()) + "\n"


def test_the_code_of_calls_is_golden() -> None:
    assert prompt_code() == (GOLDEN / "code_prompts.txt").read_text()


def test_a_plan_with_prompts_is_applied_as_it_was_read() -> None:
    model = tiny("llama")
    spec = METHODS["projected prefix"]("CAUSAL_LM")
    plan = peftc.plan(model, spec)
    read = peftc.Plan.from_json(plan.to_json())
    assert read == plan
    assert plan.diff(read) == ""
    compiled = peftc.compile(model, read)
    assert compiled.site_code() == peftc.compile(model, spec).site_code()
    assert "call" in str(plan.to_networkx().nodes(data=True))


def test_planning_reads_no_weights() -> None:
    """A shape of 405 billion parameters has none to read; benchmarks/compile.py times it."""
    plan = peftc.plan(meta_llama(126, 16384, 53248), peftc.LoraConfig(target_modules=SEVEN))
    assert len(plan.edits) == 126 * 7
    assert plan.costs.total > 400e9


def test_planning_changes_nothing() -> None:
    model = Net().train()
    before = snapshot(model)
    for capture in ("modules", "symbolic"):
        peftc.plan(model, peftc.LoraConfig(target_modules=["conv", "fc"]), capture=capture)
    after = snapshot(model)
    assert {k: v for k, v in after.items() if k != "tensors"} == {k: v for k, v in before.items() if k != "tensors"}


def test_costs_are_those_of_the_compiled_model() -> None:
    model = Everything()
    spec = peftc.LoraConfig(target_modules=["linear", "conv1d"], bias="lora_only", modules_to_save=["head"], r=3)
    compiled = peftc.compile(model, spec)
    costs = compiled.plan.costs
    assert (costs.trainable, costs.total) == compiled.get_nb_trainable_parameters()
    assert costs.weight_bytes == sum(p.numel() * p.element_size() for p in compiled.parameters())
    trained = [p for p in compiled.parameters() if p.requires_grad]
    assert costs.gradient_bytes == sum(p.numel() * p.element_size() for p in trained)
    optimiser = torch.optim.Adam(trained)
    compiled(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    optimiser.step()
    moments = [v for state in optimiser.state.values() for k, v in state.items() if k.startswith("exp_avg")]
    assert costs.adam_bytes == sum(v.numel() * v.element_size() for v in moments)


def test_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    # Torch's table lacks this one.
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}
    model = tiny("llama")
    compiled = peftc.compile(model, peftc.LoraConfig(target_modules="all-linear", r=3))
    counts = []
    for runs in (model, compiled):
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            runs(torch.zeros(1, 5, dtype=torch.long))
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 5 * compiled.plan.costs.flops_per_token


MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "target": ({"target_modules": ["q_prj"]}, r"'q_prj' matches none of \d+ sites\. Nearest: 'q_proj' \(3 sites\)"),
    "one of two": ({"target_modules": ["q_proj", "zzz"]}, r"'zzz' matches none of .* The sites are named"),
    "container": ({"target_modules": ["mlp"]}, r"is a LlamaMLP, not one of .* Inside model\.layers\.0\.mlp: gate_proj"),
    "regex": ({"target_modules": "q_proj"}, r"a string is a regular expression that must match the whole fqn"),
    "layer": ({"target_modules": ["q_proj"], "layers_to_transform": [1, 7]}, r"'7' matches no target: .* 0–2"),
    "list of layers": (
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
        r"'1' matches no target: no target is in a numbered layer of 'h' \(layers_pattern\)",
    ),
    "layer of a full name": (
        {"target_modules": ["model.layers.0.mlp.up_proj", "q_proj"], "layers_to_transform": [5]},
        r"'5' matches no target",
    ),
    "rank": ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}}, r"rank_pattern: 'v_proj' matches none"),
    "alpha": ({"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 2}}, r"alpha_pattern: 'v_proj' matches none"),
    "exclude": ({"target_modules": ["q_proj"], "exclude_modules": ["k_prj"]}, r"exclude_modules: 'k_prj' matches no"),
    "save": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, r"modules_to_save: 'lm_haed'.*'lm_head'"),
    "nothing left": (
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        r"'q_proj' selects nothing: all it matches is excluded",
    ),
    "nothing but what is saved": (
        {"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]},
        r"'lm_head' selects nothing: all it matches is excluded or in modules_to_save",
    ),
    "no target": ({"target_modules": []}, r"target_modules: '' is empty: name the modules"),
    "rank for init": ({"target_modules": ["k_proj"], "r": 17, "init_lora_weights": "pissa"}, r"r=17 is over .* 16"),
    "odd rank": ({"target_modules": ["k_proj"], "r": 3, "init_lora_weights": "orthogonal"}, r"needs an even rank"),
}


def test_without_defaults_it_names_modules_of_the_kind_that_the_method_is_for() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    for spec, told in ((peftc.LoraConfig(), "Linear modules.*: 0"), (peftc.LNTuningConfig(), "Norm modules.*: 1")):
        with pytest.raises(peftc.NoMatchError, match=rf"{told} \(1\)\."):
            peftc.plan(model, spec)


@pytest.mark.parametrize(("fields", "message"), MISSES.values(), ids=MISSES)
def test_what_matches_nothing_is_an_error_and_a_miss(fields: dict[str, Any], message: str) -> None:
    model, spec = tiny("llama"), peftc.LoraConfig(**fields)
    with pytest.raises(peftc.NoMatchError, match=message):
        peftc.compile(model, spec)
    plan = peftc.plan(model, spec)
    assert plan.misses
    with pytest.warns(UserWarning, match=message):
        compiled = peftc.compile(model, spec, on_unmatched="warn")
    assert compiled.plan == plan


def test_unknown_model_types_list_their_linear_names() -> None:
    with pytest.raises(peftc.NoMatchError, match=r"not of transformers; name them.*: linear \(1\), transposed \(1\)"):
        peftc.plan(Everything(), peftc.LoraConfig())
    with pytest.raises(peftc.NoMatchError, match=r"feedforward_modules: .*use \[\] if no target"):
        peftc.plan(Everything(), peftc.IA3Config(target_modules=["linear"]))


def test_conflicts_name_both_owners() -> None:
    model = tiny("bert", "AutoModelForSequenceClassification")
    specs = {
        "a": peftc.LoraConfig(target_modules=["query"], modules_to_save=["classifier"], bias="all"),
        "b": peftc.LoraConfig(target_modules=["query", "classifier"], bias="lora_only"),
    }
    with pytest.raises(peftc.ConflictError, match=r"classifier: 'a' saves it whole.*both train biases"):
        peftc.compile(model, specs)
    assert [c.owners for c in peftc.plan(model, specs).conflicts] == [("a", "b"), ("a", "b")]


def test_a_plan_is_refused_by_another_model() -> None:
    plan = peftc.plan(tiny("llama"), peftc.LoraConfig(target_modules=["q_proj"]))
    for other in (tiny("llama", num_hidden_layers=2), tiny("llama", hidden_size=64), tiny("gpt2")):
        with pytest.raises(peftc.PlanError, match=r"does not hold for this (Llama|GPT2)"):
            peftc.compile(other, plan)
    assert peftc.compile(tiny("llama"), plan).plan == plan


def test_an_edited_plan_is_refused() -> None:
    model = tiny("llama")
    data = json.loads(peftc.plan(model, peftc.LoraConfig(target_modules=["q_proj"])).to_json())
    data["edits"][0]["params"][0]["shape"] = [4, 32]
    with pytest.raises(peftc.PlanError, match=r"edits differs"):
        peftc.compile(model, peftc.Plan.from_json(json.dumps(data)))


def test_shorthands_are_resolved_and_replayed() -> None:
    model = nn.TransformerDecoderLayer(8, 2, 16)
    plan = peftc.plan(model, peftc.LoraConfig(target_modules="all-linear"))
    assert plan.adapters["default"].target_modules == ("out_proj", "linear1", "linear2")
    assert peftc.compile(model, peftc.Plan.from_json(plan.to_json())).plan == plan


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"version": 99}', '{"version": 1}', '{"version": 1, "adapters": {}}']
)
def test_what_is_no_plan(text: str) -> None:
    with pytest.raises(peftc.PlanError):
        peftc.Plan.from_json(text)


def test_diff_names_what_changed() -> None:
    model = tiny("llama")
    one = peftc.plan(model, peftc.LoraConfig(target_modules=["q_proj"], r=4))
    two = peftc.plan(model, peftc.LoraConfig(target_modules=["q_proj", "v_proj"], r=8, layers_to_transform=[0]))
    diff = one.diff(two)
    assert diff.splitlines() == [
        "~ costs: trainable 768 → 896, total 28,128 → 28,256, weights 109.9 KiB → 110.4 KiB, gradients 3 KiB → 3.5 KiB,"
        " Adam states 6 KiB → 7 KiB, compute 1.536 kFLOP → 1.792 kFLOP",
        "~ spec default: target_modules ['q_proj'] → ['q_proj', 'v_proj'], r 4 → 8, layers_to_transform None → [0]",
        "- site model.layers.{1–2}.self_attn.q_proj",
        "+ site model.layers.0.self_attn.v_proj",
        "- edit model.layers.{1–2}.self_attn.q_proj default lora",
        "+ edit model.layers.0.self_attn.v_proj default lora",
        "~ edit model.layers.0.self_attn.q_proj default lora: lora_A 4×32 → 8×32, lora_B 32×4 → 32×8, r 4 → 8,"
        " scaling 2 → 1, compute 512 FLOP → 1.024 kFLOP",
    ]
    assert one.diff(one) == ""


def test_diff_says_what_is_told_by_no_number() -> None:
    model, spec = tiny("llama"), peftc.LoraConfig(target_modules=["q_proj"], r=4)
    one = peftc.plan(model, spec)
    edit = one.edits[0]
    other_rule = replace(edit, rule=type("Other", (type(edit.rule),), {})())
    two = replace(one, edits=(other_rule, *one.edits[1:]), cautions=("look out",))
    assert one.diff(two).splitlines() == [
        f"~ edit {edit.site} default lora: differs",
        "+ caution look out",
    ]
    missed = peftc.plan(model, spec.model_copy(update={"target_modules": ("q_proj", "nope")}))
    worse = replace(missed, misses=tuple(replace(miss, fatal=True) for miss in missed.misses))
    assert missed.diff(worse).splitlines()[0].endswith(": fatal False → True")


def test_the_network_holds_sites_ties_and_conflicts() -> None:
    plan = peftc.plan(
        tiny("gpt2"),
        {
            "a": peftc.LoraConfig(target_modules=["lm_head", "c_attn"]),
            "b": peftc.LoraConfig(target_modules=["c_fc"], modules_to_save=["lm_head"]),
        },
    )
    graph = plan.to_networkx()
    relations = [data["relation"] for _, _, data in graph.edges(data=True)]
    assert relations.count("tie") == 1
    assert relations.count("conflict") == 1
    assert ("transformer.wte", "lm_head") in [(u, v) for u, v, d in graph.edges(data=True) if d["relation"] == "tie"]
    sites = [fqn for fqn, data in graph.nodes(data=True) if data.get("site")]
    assert sorted(sites) == sorted(plan.sites)
    assert graph.nodes["transformer.h.1.attn.c_attn"]["edits"] == ["a:lora"]
    assert list(graph.predecessors("transformer.h.1.attn.c_attn")) == ["transformer.h.1.attn"]


def test_roles_come_from_the_architecture() -> None:
    plan = peftc.plan(tiny("llama"), peftc.LoraConfig(target_modules=[*SEVEN, "embed_tokens", "lm_head"]))
    roles = {fqn.rpartition(".")[2]: site.role for fqn, site in plan.sites.items()}
    assert roles == {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "attention.output",
        "gate_proj": "mlp.gate",
        "up_proj": "mlp.up",
        "down_proj": "mlp.down",
        "embed_tokens": "embedding.input",
        "lm_head": "embedding.output",
    }


def test_spans() -> None:
    assert ranges([3, 1, 2, 7]) == "1–3,7"
    assert span(["a.0.b", "a.1.b", "a.2.b"]) == "a.{0–2}.b"
    assert span(["a.0.b.0", "a.1.b.1"]) == "a.{…}.b.{…}"
    assert span(["a"]) == "a"


if __name__ == "__main__":
    for name, plan in golden_plans().items():
        (GOLDEN / f"{name}.txt").write_text(render(plan, width=120))
    for capture in ("modules", "symbolic"):
        spec = peftc.LoraConfig(target_modules=["conv", "fc"], r=2, lora_dropout=0.1)
        code = peftc.compile(Net(), spec, capture=capture).site_code()
        text = "\n\n".join(f"# {where}\n{source}" for where, source in code.items())
        (GOLDEN / f"code_{capture}.txt").write_text(text + "\n")
    (GOLDEN / "code_prompts.txt").write_text(prompt_code())
