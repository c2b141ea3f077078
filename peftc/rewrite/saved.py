"""The row of the table of ops for modules saved whole: the trained copy is called in the module's place."""

from collections.abc import Sequence

from torch import fx

from peftc.graph.ops import Op
from peftc.graph.region import HOST, invoke
from peftc.graph.sites import ModuleSite
from peftc.rewrite.splice import ORIGIN, Active, Origin


def splice_saved(graph: fx.Graph, node: fx.Node | None, active: Sequence[Active]) -> None:
    """Let the call `node` of the module be one of the copy that was loaded last; or without one, as in a flat graph, what
    is read of the module be read of the copy.
    """
    last = active[-1]
    target, origin = f"{last.name}.own", Origin(last.name, last.edit.rule.name, type(last.edit.rule).__name__)
    if node is None:
        own = f"{HOST}.{last.site.fqn}."
        for read in graph.nodes:
            if read.op == "get_attr" and str(read.target).startswith(own):
                read.target = f"{target}.{str(read.target).removeprefix(own)}"
                read.meta[ORIGIN] = origin
        return
    node.meta[ORIGIN] = origin
    if node.target is invoke:
        with graph.inserting_before(node):
            node.update_arg(0, graph.get_attr(target))
    else:
        node.target = target


OPS = (Op("module", splice=splice_saved, site=ModuleSite),)
