"""Which modules lend their weight: the parent reads `self.child.weight` and may never call `self.child(...)`.

`nn.MultiheadAttention` does so with `out_proj`. An op spliced into such a child's forward would silently do nothing.
"""

import ast
import enum
import functools
import inspect
import textwrap

from torch import nn

# Reading these off a weight is not reading the weight.
_FACTS = frozenset({"dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda", "data_ptr"})


class Lending(enum.Enum):
    """How a parent uses the weight of a child it names."""

    NO = "calls the child, or can't be told"
    SOMETIMES = "calls the child, and reads its weight"
    ALWAYS = "only reads the weight"


@functools.lru_cache(maxsize=4096)
def lending(parent: type[nn.Module], child: str) -> Lending:
    """How methods of class `parent` use `self.<child>`, from their source; NO when there is no source."""
    read, other = _uses(parent).get(child, (False, False))
    if not read:
        return Lending.NO
    return Lending.SOMETIMES if other else Lending.ALWAYS


@functools.lru_cache(maxsize=1024)
def _uses(parent: type[nn.Module]) -> dict[str, tuple[bool, bool]]:
    """Child name → (its weight or bias is read, it is used in any other way)."""
    uses: dict[str, tuple[bool, bool]] = {}
    if parent in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
        return uses
    for name, method in inspect.getmembers(parent, inspect.isfunction):
        if name != "forward" and (name in nn.Module.__dict__ or name in nn.Sequential.__dict__):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError, IndentationError):
            continue
        _collect(tree, "forward" in name, uses)
    if issubclass(parent, nn.Sequential | nn.ModuleList) or _is_dynamic(parent):
        # Children may be called without being named.
        return {child: (read, True) for child, (read, _) in uses.items()}
    return uses


def _is_dynamic(parent: type[nn.Module]) -> bool:
    """Whether the class reaches attributes by computed names."""
    try:
        source = inspect.getsource(parent)
    except (OSError, TypeError):
        return False
    return any(way in source for way in ("getattr(self", "self._modules", "self.children(", "self.named_children("))


def _collect(tree: ast.AST, runs: bool, uses: dict[str, tuple[bool, bool]]) -> None:
    """Add the uses in one method; a weight that a method reads counts only if the method runs in a forward pass."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"):
            continue
        outer = parents.get(node)
        read, other = uses.get(node.attr, (False, False))
        if not isinstance(outer, ast.Attribute):
            other = True
        elif outer.attr in ("weight", "bias"):
            read = read or (runs and not _is_fact(outer, parents))
        uses[node.attr] = (read, other)


def _is_fact(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether `self.child.weight` is only asked for its dtype, device, shape, presence or type."""
    outer = parents.get(node)
    if isinstance(outer, ast.Attribute):
        return outer.attr in _FACTS
    if isinstance(outer, ast.Compare):
        return True
    return isinstance(outer, ast.Call) and isinstance(outer.func, ast.Name) and outer.func.id == "isinstance"
