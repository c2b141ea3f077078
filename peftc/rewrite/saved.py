"""The row of the table of ops for modules saved whole: the trained copy is called in the module's place."""

from collections.abc import Sequence

from torch import fx

from peftc.graph.ops import Op
from peftc.graph.region import invoke
from peftc.graph.sites import ModuleSite
from peftc.rewrite.splice import Active


def splice_saved(graph: fx.Graph, node: fx.Node, active: Sequence[Active]) -> None:
    """Let the call `node` of the module be one of the copy that was loaded last."""
    target = f"{active[-1].name}.own"
    if node.target is invoke:
        with graph.inserting_before(node):
            node.update_arg(0, graph.get_attr(target))
    else:
        node.target = target


OPS = (Op("module", splice=splice_saved, site=ModuleSite),)
