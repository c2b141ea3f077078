"""Where the nodes of a rewritten graph are from, told beside its code."""

from peftc.rewrite.hosts import Binding
from peftc.rewrite.splice import ORIGIN, Origin


def annotated(code: str, binding: Binding) -> str:
    """Generated code with a comment before each run of lines that one function of a rule inserted."""
    origins = {node.name: node.meta.get(ORIGIN) for node in binding.code.graph.nodes}
    lines: list[str] = []
    before: Origin | None = None
    for line in code.split("\n"):
        name = line.strip().partition(" = ")[0]
        origin = origins.get(name) if name in origins else before
        if origin is not None and origin != before:
            lines.append(f"    # {_told(origin, binding)}")
        before = origin
        lines.append(line)
    return "\n".join(lines)


def inserted_lines(binding: Binding, site: str | None) -> list[str]:
    """`  from lora of 'default', LoraLinear.output (lora/linear.py:46): to, linear_1` for every function of a rule.

    `site`: of the edits there alone, if it is one.
    """
    groups: dict[Origin, list[str]] = {}
    bare = 0
    for node in binding.code.graph.nodes:
        origin = node.meta.get(ORIGIN)
        if origin is None:
            bare += 1
        elif site is None or binding.parts[origin.part].edit.site == site:
            groups.setdefault(origin, []).append(node.name)
    own = [f"  from {_told(origin, binding)}: {', '.join(names)}" for origin, names in groups.items()]
    return [f"  its graph has {bare} nodes of the module itself", *own]


def _told(origin: Origin, binding: Binding) -> str:
    adapter = binding.parts[origin.part].edit.adapter
    return f"{origin.rule} of {adapter!r} ({origin.part}), {origin.function}"
