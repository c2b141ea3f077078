"""Which modules lend their weight: the parent reads `self.child.weight` and may never call `self.child(...)`.

`nn.MultiheadAttention` does so with `out_proj`. An op spliced into such a child's forward would silently do nothing.
"""

import ast
import enum
import functools
import inspect
import textwrap

from torch import nn

# Methods that set a module up read weights too, but compute nothing.
_SETUP = ("__init__", "reset_parameters", "post_init", "extra_repr", "state_dict")
_SETUP_PREFIXES = ("_init", "init_", "tie_", "_tie", "get_", "set_", "_load", "load_", "_save", "resize")
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
        setup = name in _SETUP or name.startswith(_SETUP_PREFIXES) or name in nn.Module.__dict__
        if setup and name != "forward":
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError, IndentationError):
            continue
        _collect(tree, uses)
    return uses


def _collect(tree: ast.AST, uses: dict[str, tuple[bool, bool]]) -> None:
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"):
            continue
        outer = parents.get(node)
        read, other = uses.get(node.attr, (False, False))
        if not isinstance(outer, ast.Attribute):
            other = True
        elif outer.attr in ("weight", "bias"):
            read = read or not _is_fact(outer, parents)
        uses[node.attr] = (read, other)


def _is_fact(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether `self.child.weight` is only asked for its dtype, device, shape, presence or type."""
    outer = parents.get(node)
    if isinstance(outer, ast.Attribute):
        return outer.attr in _FACTS
    if isinstance(outer, ast.Compare):
        return True
    return isinstance(outer, ast.Call) and isinstance(outer.func, ast.Name) and outer.func.id == "isinstance"
