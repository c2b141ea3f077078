"""Each pass on a small graph, before and after, as text with counts, next to what it should be.

python -m tests.graph.test_golden_passes    # writes the files anew
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

import peftc
from peftc.graph.unlifted import VALUE
from peftc.rewrite.program_passes import CastsRemoved, NoOpsRemoved, SiblingsFused
from peftc.rewrite.splice import ORIGIN, Origin

GOLDEN = Path(__file__).parent.parent / "golden"
aten = torch.ops.aten


def no_ops() -> fx.Graph:
    """A slice of all, integers plus zero, products with one; and one of each that does something."""
    graph = fx.Graph()
    x, ids = graph.placeholder("x"), graph.placeholder("ids")
    x.meta[VALUE], ids.meta[VALUE] = (torch.float32, (4, 4)), (torch.int64, (4,))
    whole = graph.call_function(aten.slice.Tensor, (x, 0, 0, 2**63 - 1))
    part = graph.call_function(aten.slice.Tensor, (whole, 0, 0, 2))
    same = graph.call_function(aten.add.Tensor, (ids, 0))
    other = graph.call_function(aten.add.Tensor, (same, 1))
    one = graph.call_function(aten.mul.Tensor, (part, 1.0))
    for node, own in ((whole, x), (part, x), (same, ids), (other, ids), (one, x)):
        node.meta[VALUE] = own.meta[VALUE]
    graph.output((graph.call_function(aten.relu.default, (one,)), other))
    return graph


def casts() -> fx.Graph:
    """To the dtype that is there, and to another."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta[VALUE] = (torch.float32, (4, 4))
    same = graph.call_function(aten.to.dtype, (x, torch.float32))
    half = graph.call_function(aten.to.dtype, (same, torch.bfloat16))
    back = graph.call_function(aten.to.dtype, (half, torch.float32))
    for node, dtype in ((same, torch.float32), (half, torch.bfloat16), (back, torch.float32)):
        node.meta[VALUE] = (dtype, (4, 4))
    graph.output(graph.call_function(aten.relu.default, (back,)))
    return graph


def siblings() -> fx.Graph:
    """Three edits: two read one input, the third reads another."""
    graph = fx.Graph()
    x, z = graph.placeholder("x"), graph.placeholder("z")
    products: list[fx.Node] = []
    for part, given in (("a0", x), ("a1", x), ("a2", z)):
        origin = Origin(part, "lora", "made up")
        for name in ("A", "B"):
            read = graph.get_attr(f"{part}.{name}")
            read.meta[VALUE] = (torch.float32, (2, 4) if name == "A" else (4, 2))
            given = graph.call_function(F.linear, (given, read))
            for node in (read, given):
                node.meta[ORIGIN] = origin
        products.append(given)
    graph.output(tuple(products))
    return graph


CASES: dict[str, tuple[Callable[[], fx.Graph], Any]] = {
    "no-ops-removed": (no_ops, NoOpsRemoved()),
    "casts-removed": (casts, CastsRemoved()),
    "siblings-fused": (siblings, SiblingsFused()),
}


def described(graph: fx.Graph) -> str:
    counts = Counter(str(getattr(node.target, "__name__", node.target)) for node in graph.nodes if "call" in node.op)
    told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    lines = [str(line) for line in str(graph).strip().splitlines()[1:]]
    return "\n".join([f"{len(graph.nodes)} nodes: {told}", *(line.rstrip() for line in lines)])


def told(name: str) -> str:
    make, change = CASES[name]
    before = described(make())
    after = described(change(make()))
    return f"{name}\n\nbefore\n{before}\n\nafter\n{after}\n"


@pytest.mark.parametrize("name", CASES)
def test_a_pass_does_what_its_file_shows(name: str) -> None:
    assert told(name) == (GOLDEN / f"pass_{name}.txt").read_text()


def test_every_pass_has_a_file() -> None:
    assert [one.name for one in peftc.program_passes()] == list(CASES)


if __name__ == "__main__":
    for case in CASES:
        (GOLDEN / f"pass_{case}.txt").write_text(told(case))
