"""Pages: valid, whole, small, safe with any name, in need of nothing outside, and what they draw is what is spliced."""

import base64
import hashlib
import operator
import re
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import pytest
import torch
from torch import fx, nn

import peftc
from peftc.rewrite.splice import ORIGIN
from peftc.view.dataflow import dataflow
from peftc.view.layout import HEIGHT, ROW, layout
from tests.support.adapters import EVERY_METHOD
from tests.support.models import Everything, Net, tiny
from tests.support.pages import having, names, parsed, text_of
from tests.support.plans import SEVEN, golden_plans, meta_llama

ROOT = Path(__file__).parent.parent.parent
PLANS = golden_plans()
# LLaMA-Adapter changes what a call of attention gives, which is no formula of a weight.
WEIGHTS = [
    name
    for name, cls in peftc.registry.spec_classes().items()
    if not issubclass(cls, peftc.PromptSpec) and name not in ("ADAPTION_PROMPT", "POLY")
]


def pair() -> tuple[nn.Module, peftc.Plan, peftc.Plan]:
    """A model and two plans of it."""
    model = meta_llama(4, 256, 512, vocab_size=99)
    one = peftc.plan(model, peftc.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_dropout=0.1))
    two = peftc.plan(model, peftc.LoraConfig(target_modules=r"lm_head|.*\b[01]\..*q_proj", r=8))
    return model, one, two


def pages() -> dict[str, str]:
    model, one, two = pair()
    found = {name: plan.to_html() for name, plan in PLANS.items()}
    found["with the model"] = one.to_html(model=model)
    found["two"] = one.to_html(two)
    found["two with the model"] = one.to_html(two, model=model)
    return found


PAGES = pages()


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_valid_and_all_is_labelled(name: str) -> None:
    root = parsed(PAGES[name])
    assert root.get("lang") == "en"
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for element in root.iter():
        if element.get("role") == "img":
            assert element.get("aria-label")
        for reference in ("aria-labelledby", "aria-describedby"):
            assert element.get(reference) in {None, *ids}
        if element.tag == "use":
            assert element.get("href", "").removeprefix("#") in ids
        if element.tag == "th":
            assert element.get("scope") in ("col", "row")
    fields = list(root.iter("input"))
    labelled = [field for label in root.iter("label") for field in label.iter("input")]
    assert fields == labelled
    assert [text_of(heading) for heading in root.iter("h1")] == [title_of(name)]


def title_of(name: str) -> str:
    return PLANS[name].model if name in PLANS else "LlamaForCausalLM"


@pytest.mark.parametrize("name", PAGES)
def test_pages_need_nothing_from_outside(name: str) -> None:
    page = PAGES[name]
    root = parsed(page)
    for element in root.iter():
        for attribute in ("src", "href", "srcset", "action", "data"):
            assert element.get(attribute, "#").startswith("#"), (element.tag, element.attrib)
        assert not [name for name in element.attrib if name.startswith("on")]
    assert set(re.findall(r"url\((.*?)\)", page)) <= {"#arrow"}
    assert "@import" not in page
    # A namespace is a name and no address.
    assert set(re.findall(r"https?://[^\s\"']+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xhtml",
    }
    (policy,) = (meta.get("content", "") for meta in root.iter("meta") if meta.get("http-equiv"))
    (script,) = (element.text or "" for element in root.iter("script"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


@pytest.mark.parametrize("name", PLANS)
def test_every_site_is_there_with_what_is_done_at_it(name: str) -> None:
    plan = PLANS[name]
    root = parsed(PAGES[name])
    found: Counter[str] = Counter()
    for place in root.iter("li"):
        for _ in having_own_edits(place):
            found.update(names(place.get("data-p", "")))
    assert found == Counter(edit.site for edit in plan.edits)
    text = text_of(root)
    for line in [*map(str, plan.misses), *plan.cautions, *(conflict.reason for conflict in plan.conflicts)]:
        assert " ".join(line.split()) in text
    for edit in plan.edits:
        for param in edit.params:
            assert f"{param.name} {'×'.join(map(str, param.shape))} {param.dtype}".replace(" ", "") in text.replace(
                " ", ""
            )
    assert f"{plan.costs.trainable:,}" in text
    assert plan.fingerprint in text


def having_own_edits(place: Element) -> list[Element]:
    """What a branch of the tree says of its own edits, not of those inside of it."""
    details = place.find("details")
    inside = details.findall("div") if details is not None else []
    return [edit for box in inside if "detail" in box.get("class", "") for edit in having(box, "edit")]


def odd_places() -> dict[str, tuple[nn.Module, peftc.Plan]]:
    """Sites that are no modules, or the model itself, or of which there are none."""
    net, attention, experts, alone, llama = (
        Net(),
        nn.MultiheadAttention(8, 2),
        tiny("mixtral"),
        nn.Linear(4, 4),
        tiny("llama"),
    )
    stacked = peftc.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"], r=2)
    traced = peftc.LoraConfig(target_modules=["conv", "fc"], r=2)
    return {
        "symbolic": (net, peftc.plan(net, traced, capture="symbolic")),
        "attention": (attention, peftc.plan(attention, peftc.LoraConfig(target_modules=".*", r=2))),
        "experts": (experts, peftc.plan(experts, stacked)),
        "the model": (alone, peftc.plan(alone, peftc.LoraConfig(target_modules=".*", r=2))),
        "none": (llama, peftc.plan(llama, peftc.LoraConfig(target_modules=["q_prj"]))),
    }


@pytest.mark.parametrize("name", odd_places())
def test_sites_are_where_they_are_in_the_model(name: str) -> None:
    model, plan = odd_places()[name]
    root = parsed(plan.to_html(model=model))
    modules = {fqn for fqn, _ in model.named_modules()}
    places = {
        fqn for place in root.iter("li") if place.get("data-p") is not None for fqn in names(place.get("data-p", ""))
    }
    assert places == modules | {edit.site for edit in plan.edits}


def test_misses_and_cautions_come_before_the_tree_and_are_no_mere_colour() -> None:
    root = parsed(PAGES["misses"])
    notes = [text_of(note) for note in having(root, "bad")]
    assert len(notes) == len(PLANS["misses"].misses)
    assert all(note.startswith("missed ") for note in notes)
    page = PAGES["misses"]
    assert page.index('class="bad"') < page.index('id="places"')
    assert not list(having(root, "fine"))
    (caution,) = having(parsed(PAGES["tied"]), "warn")
    assert text_of(caution) == f"caution {PLANS['tied'].cautions[0]}"
    (fine,) = having(parsed(PAGES["kinds"]), "fine")
    assert text_of(fine).startswith("Everything that was asked for has matched.")


def test_what_is_left_alone_is_there_with_the_model() -> None:
    model, *_ = pair()
    root = parsed(PAGES["with the model"])
    told = {
        fqn for place in root.iter("li") if place.get("data-p") is not None for fqn in names(place.get("data-p", ""))
    }
    assert told == {name for name, _ in model.named_modules()}
    idle = {place.get("data-p") for place in having(root, "idle")}
    assert "lm_head" in idle
    assert "model.layers.{0–3}.self_attn.k_proj" in idle
    assert not idle & {"", "model.layers.{0–3}.self_attn.q_proj"}


def test_two_plans_side_by_side() -> None:
    _, one, two = pair()
    root = parsed(one.to_html(two))
    places = {place.get("data-p", ""): place for place in root.iter("li")}
    differing = {path for path, place in places.items() if "differs" in place.get("class", "").split() and path}
    assert "model.layers.{0–1}.self_attn.q_proj" in differing
    assert "lm_head" in differing
    text = text_of(root)
    assert "2 adapted otherwise in B, 6 in A only, 1 in B only" in text, text
    assert text.count(f"{one.costs.trainable:,}") >= 1
    assert text.count(f"{two.costs.trainable:,}") >= 1
    rows = {text_of(row) for row in having(root, "differs") if row.tag == "tr"}
    assert {"r48", "lora_dropout0.10.0"} <= rows
    same = parsed(one.to_html(one))
    assert "8 alike" in text_of(same)
    assert not list(having(same, "differs"))
    other = peftc.plan(tiny("gpt2"), peftc.LoraConfig(target_modules=["c_attn"]))
    assert "model: LlamaForCausalLM → GPT2LMHeadModel" in text_of(parsed(one.to_html(other)))


NASTY = "</script><script>alert('<&\">')</script>"


def test_names_are_text_whatever_they_hold() -> None:
    model = nn.ModuleDict({NASTY: nn.ModuleDict({"<b>x</b>": nn.Linear(4, 4)})})
    spec = peftc.LoraConfig(target_modules=["<b>x</b>"], task_type="CAUSAL_LM", base_model_name_or_path="<i>")
    plan = peftc.plan(model, spec)
    for page in (plan.to_html(), plan.to_html(model=model), plan.to_html(plan)):
        root = parsed(page)
        assert len(list(root.iter("script"))) == 1
        assert not [element for element in root.iter("b") if element.text == "x"]
        assert NASTY in "".join(root.itertext())
        assert f"{NASTY}.<b>x</b>" in {place.get("data-p") for place in root.iter("li")}
    small = plan._repr_html_()
    assert "<script" not in small
    assert "<b>x" not in small


@pytest.mark.parametrize("name", [*PLANS, "two"])
def test_notebooks_get_a_table(name: str) -> None:
    plan = PLANS[name] if name in PLANS else pair()[1]
    fragment = plan._repr_html_()
    root = parsed(f"<!DOCTYPE html><title>x</title>{fragment}")
    assert not {"script", "style", "link", "svg"} & {element.tag for element in root.iter()}
    assert not [element for element in root.iter() if element.get("style") or element.get("class") or element.get("id")]
    head, *rows = root.iter("tr")
    assert len({len(list(row)) for row in (head, *rows)}) == 1
    printed = str(plan)
    assert sum(int(text_of(row[1])) for row in rows) == len(plan.edits)
    for miss in plan.misses:
        assert " ".join(str(miss).split()) in text_of(root)
    assert all(text_of(row[5]) in printed for row in rows)
    assert len(fragment) < 10_000


def test_seventy_billion_are_a_small_page() -> None:
    """benchmarks/page.py has the figures."""
    model = meta_llama(80, 8192, 28672)
    plan = peftc.plan(model, peftc.LoraConfig(target_modules=SEVEN))
    assert len(plan.to_html(model=model).encode()) < 100_000
    # Also if no two layers are equal: 560 sites with a row each.
    ranks = {rf"layers\.{layer}\..*": 4 + layer for layer in range(80)}
    worst = peftc.plan(model, peftc.LoraConfig(target_modules=SEVEN, rank_pattern=ranks))
    page = worst.to_html(model=model)
    assert len(page.encode()) < 2e6
    assert len({place.get("data-p") for place in parsed(page).iter("li")}) > 560


@dataclass
class Seen:
    """A pass that keeps the graphs that rules made, as they are before products are fused."""

    name: str = "seen"
    graphs: list[fx.Graph] = field(default_factory=list[fx.Graph])

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        kept = fx.Graph()
        kept.output(kept.graph_copy(graph, {}))
        self.graphs.append(kept)
        return graph


class TestDrawings:
    """What is drawn at a site is what rules splice there."""

    @staticmethod
    def spliced(graph: fx.Graph) -> int:
        """How many nodes adapters put into a graph, but for casts, sizes and reading of their tensors."""

        def is_fact(node: fx.Node) -> bool:
            if node.target is getattr:
                return node.args[1] in ("shape", "dtype", "device")
            if node.target is torch.promote_types:
                return True
            # What is computed of sizes alone is a number where it is drawn.
            counts = getattr(node.target, "__module__", "") == operator.add.__module__
            return counts and bool(node.all_input_nodes) and all(map(is_fact, node.all_input_nodes))

        added = [node for node in graph.nodes if ORIGIN in node.meta and node.op != "get_attr" and node.target != "to"]
        return sum(not is_fact(node) for node in added)

    @pytest.mark.parametrize("name", WEIGHTS)
    def test_as_many_ops_as_are_spliced(self, name: str) -> None:
        fields = {"target_modules": ["q_proj"], **EVERY_METHOD[name]}
        seen = Seen()
        compiled = peftc.compile(tiny("llama"), peftc.registry.spec_classes()[name](**fields), passes=[seen])
        edit = compiled.plan.edits[0]
        flow = dataflow(edit, compiled.plan.sites[edit.site])
        assert flow is not None
        drawn = [data["label"] for _, data in flow.nodes(data=True) if data["kind"] == "inserted"]
        graph, *_ = seen.graphs
        assert len(drawn) == self.spliced(graph)
        given = {data["label"] for _, data in flow.nodes(data=True) if data["kind"] in ("trained", "frozen")}
        assert given <= {param.name for param in edit.params}
        assert {param.name for param in edit.params if param.trainable} <= given

    def test_lora_is_what_its_formula_says(self) -> None:
        plan = peftc.plan(tiny("llama"), peftc.LoraConfig(target_modules=["q_proj"], r=4, lora_dropout=0.1))
        edit = plan.edits[0]
        flow = dataflow(edit, plan.sites[edit.site])
        assert flow is not None
        label = {node: data["label"] for node, data in flow.nodes(data=True)}
        read = {(label[a], label[b]) for a, b in flow.edges}
        assert read == {
            ("x", "linear"), ("x", "dropout 0.1"), ("dropout 0.1", "linear"), ("lora_A", "linear"), ("linear", "×"),
            ("scaling = 2", "×"), ("×", "linear"), ("lora_B", "linear"), ("linear", "+"), ("+", "output"),
        }  # fmt: skip

    @pytest.mark.parametrize("kind", ["embed", "linear", "transposed", "conv1d", "conv2d", "conv3d"])
    def test_every_op_is_drawn(self, kind: str) -> None:
        plan = peftc.plan(Everything(), peftc.LoraConfig(target_modules=[kind], r=2))
        (edit,) = plan.edits
        flow = dataflow(edit, plan.sites[edit.site])
        assert flow is not None
        assert [d["label"] for _, d in flow.nodes(data=True) if d["kind"] == "base"] == [
            "output", plan.sites[kind].op, "x"
        ]  # fmt: skip

    def test_what_has_no_formula_is_not_drawn(self) -> None:
        for name in ("prompts", "prompts_t5"):
            plan = PLANS[name]
            told = {edit.rule.name: dataflow(edit, plan.sites[edit.site]) is None for edit in plan.edits}
            assert all(told[rule] == (rule != "lora") for rule in told)

    @pytest.mark.parametrize("name", WEIGHTS)
    def test_boxes_do_not_overlap_and_lines_go_down(self, name: str) -> None:
        fields = {"target_modules": ["q_proj"], **EVERY_METHOD[name]}
        plan = peftc.plan(tiny("llama"), peftc.registry.spec_classes()[name](**fields))
        edit = plan.edits[0]
        flow: Any = dataflow(edit, plan.sites[edit.site])
        placed = layout(flow)
        boxes = placed.boxes
        assert len(boxes) == len(flow)
        for at, one in enumerate(boxes):
            assert one.width / 2 <= one.x <= placed.width - one.width / 2
            assert HEIGHT / 2 <= one.y <= placed.height - HEIGHT / 2
            for other in boxes[:at]:
                apart = abs(one.x - other.x) >= (one.width + other.width) / 2
                assert apart or abs(one.y - other.y) >= ROW
        assert len(placed.lines) == len(flow.edges)
        for line in placed.lines:
            heights = [float(y) for y in re.findall(r"[MC ,][\d.-]+ ([\d.-]+)(?=C|$)", line)]
            assert heights == sorted(heights)


def test_the_package_has_the_assets() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["peftc.view"]
    folder = ROOT / "peftc/view"
    packed = {file for pattern in patterns for file in folder.glob(pattern)}
    assert packed == {file for file in (folder / "assets").iterdir() if file.is_file()}
    assert {file.suffix for file in packed} == {".css", ".html", ".js"}
