"""Plans as one HTML page that needs no network, and as a table for notebooks."""

import base64
import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import networkx as nx
from torch import nn

from peftc.edits import Edit, Planned
from peftc.specs import AdapterSpec
from peftc.view import words
from peftc.view.charts import SLOT, TALL, layer_charts
from peftc.view.dataflow import Flow, dataflow
from peftc.view.diff import heads_apart
from peftc.view.groups import groups
from peftc.view.layout import HEIGHT, Layout, layout
from peftc.view.tree import Branch, tree, what

# How many rows of the tree are unfolded to begin with.
_UNFOLDED = 48
# What a reader must see, may want to see, or is told for completeness.
_WEIGHT = {"missed": "bad", "conflict": "bad", "caution": "warn"}


@dataclass(frozen=True)
class Drawing:
    """A dataflow graph with places, and the same in words."""

    id: str
    layout: Layout
    told: str


@dataclass(frozen=True)
class Note:
    """A line that the tree can't say, and which plans say it."""

    label: str
    weight: str
    text: str
    plans: tuple[int, ...]


def plan_page(plans: Sequence[Planned], model: nn.Module | None = None) -> str:
    """A page of one plan, or of two of one model side by side; with the `model`, its other modules too.

    Raises PlanError if the plan is of another model.
    """
    root = tree(plans, model)
    drawings = _drawings(plans)
    return rendered(
        "plan.html",
        plans=plans,
        root=root,
        unfolded=_unfolded(root),
        drawings=drawings.values(),
        drawing=partial(_drawing, drawings),
        notes=[*_notes(plans)],
        charts=layer_charts(plans),
        apart=[f"{name.replace('_', ' ')}: {told}" for name, told in heads_apart(plans)],
        sites=_sites(plans) if len(plans) > 1 else "",
        fields=[*_fields(plans)],
        most=[max(1, *(here.amounts[at] for here in root.here)) for at in range(3)],
    )


def plan_table(plan: Planned) -> str:
    """A plan as HTML for notebooks: no styles or scripts of its own."""
    rows = [(pattern, edits) for pattern, edits in groups(plan)]
    return rendered("notebook.html", plan=plan, rows=rows, columns=words.columns(plan), notes=[*_notes([plan])])


def rendered(template: str, **values: Any) -> str:
    """One of the templates beside this file, with everything escaped that is put into it."""
    source, script = _templates()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    terms: Mapping[str, Any] = {"script": script, "digest": digest, "words": words}
    geometry = {"slot": SLOT, "tall": TALL, "box": HEIGHT}
    return source.get_template(template).render(**terms, **geometry, **values)


@functools.cache
def _templates() -> tuple[Any, str]:
    # Late, since most plans are never shown as HTML.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("peftc.view", "assets"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    loader: Any = made.loader
    return made, loader.get_source(made, "page.js")[0]


def _key(plan: Planned, edit: Edit) -> object:
    """What edits that are drawn alike have in common: not the shapes."""
    site = plan.sites[edit.site]
    names = tuple((param.name, param.trainable) for param in edit.params)
    bias = getattr(site, "bias", None) is not None
    return site.op, bias, edit.rule, edit.slots, names, *edit.constants.items(), *edit.dropouts.items()


def _drawing(drawings: Mapping[object, Drawing], plan: Planned, edit: Edit) -> Drawing | None:
    return drawings.get(_key(plan, edit))


def _drawings(plans: Sequence[Planned]) -> dict[object, Drawing]:
    """What edits do at their sites, each kind once."""
    found: dict[object, Drawing] = {}
    edits: dict[object, tuple[Planned, Edit]] = {}
    for plan in plans:
        for edit in plan.edits:
            edits.setdefault(_key(plan, edit), (plan, edit))
    for key, (plan, edit) in edits.items():
        flow = dataflow(edit, plan.sites[edit.site])
        if flow is not None:
            found[key] = Drawing(f"g{len(found)}", layout(flow), _told(flow))
    return found


def _told(flow: Flow) -> str:
    """The graph in words, a step after the other."""
    label: Mapping[str, str] = {node: data["label"] for node, data in flow.nodes(data=True)}
    steps = [(node, [label[read] for read in flow.predecessors(node)]) for node in nx.topological_sort(flow)]
    return "; ".join(f"{label[node]} of {', '.join(read)}" for node, read in steps if read)


def _notes(plans: Sequence[Planned]) -> Iterator[Note]:
    found: dict[tuple[str, str], list[int]] = {}
    for number, plan in enumerate(plans):
        for label, lines in words.notes(plan):
            for line in lines:
                found.setdefault((label, line), []).append(number)
    order = list(_WEIGHT)
    for (label, line), own in sorted(
        found.items(), key=lambda item: order.index(item[0][0]) if item[0][0] in order else 9
    ):
        yield Note(label, _WEIGHT.get(label, "info"), line, tuple(own))


def _sites(plans: Sequence[Planned]) -> str:
    """How many sites are alike in two plans, and how many are not."""
    done: dict[str, list[list[object]]] = {}
    for number, plan in enumerate(plans):
        for edit in plan.edits:
            done.setdefault(edit.site, [[] for _ in plans])[number].append(what(edit))
    told = ("alike", "adapted otherwise in B", "in A only", "in B only")
    found = Counter(told[0 if own[0] == own[-1] else 1 if all(own) else 2 if own[0] else 3] for own in done.values())
    return ", ".join(f"{found[name]:,} {name}" for name in told if found[name])


def _fields(plans: Sequence[Planned]) -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
    """By adapter, the fields of its spec that say something in a plan, with their value in every plan."""
    for name in dict.fromkeys(name for plan in plans for name in plan.adapters):
        specs = [plan.adapters[name] for plan in plans if name in plan.adapters]
        told = dict.fromkeys(field for spec in specs for field in _said(spec))
        values = [plan.adapters[name].to_dict() if name in plan.adapters else {} for plan in plans]
        yield name, [(field, [str(own.get(field, "–")) for own in values]) for field in told]


def _said(spec: AdapterSpec) -> list[str]:
    """The fields that are not as they are by default."""
    known = type(spec).model_fields
    given = {field: getattr(spec, field) for field in spec.to_dict() if field in known}
    usual = {field: known[field].get_default(call_default_factory=True, validated_data={}) for field in given}
    always = ("peft_type", "target_modules")
    return [field for field in spec.to_dict() if field in always or field not in known or given[field] != usual[field]]


def _unfolded(root: Branch) -> set[str]:
    """The paths of the branches to unfold: from the outside in, as long as there are not too many rows."""
    found: set[str] = set()
    waiting, rows = [root], 1
    while waiting and rows <= _UNFOLDED:
        branch = waiting.pop(0)
        rows += len(branch.children)
        if branch.children and rows <= _UNFOLDED:
            found.add(branch.path)
            waiting += [child for child in branch.children if child.adapted]
    return found
