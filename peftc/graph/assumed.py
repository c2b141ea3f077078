"""What the traces of a model took for true of its inputs: sizes, dtypes, and that what is not 1 never is."""

import copy
import warnings
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftc.graph.calling import Leaf, holds


def sizes_of(value: Tensor) -> tuple[int | str, ...]:
    """The sizes of a traced tensor, names where they are open."""
    return tuple(int(text) if (text := str(size)).isdigit() else text for size in value.shape)


def guards_of(programs: Sequence[Any], given: Mapping[str, Any]) -> tuple[str, ...]:
    """What the traces have taken for true of the sizes of inputs, as torch writes it."""
    found = dict.fromkeys(code for program in programs for code in program._guards_code or ())
    unknown = [code for code in found if not holds(code, given)]
    if unknown:
        warnings.warn(f"capture='export': can't check, and so does not, that {'; '.join(unknown)}", stacklevel=2)
    return tuple(code for code in found if code not in unknown)


def never_so(
    program: Any, model: nn.Module, call: Callable[..., Any], given: Mapping[str, Any], caches: Collection[str]
) -> tuple[str, ...]:
    """Guards against a size of 1 of open dimensions (of `caches`, and of 0) for which the program, traced with another one,
    is not the model, which `call` calls.

    torch.export takes a size that is not 1 for one that never is, and notes no guard. So both are run in eval() on one row,
    and with every other open size as 1; not on meta, where there are no values to compare.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return ()
    flat, spec = pytree.tree_flatten_with_path(dict(given))
    leaves = leaves_of(program)
    cached = [getattr(path[0], "key", None) in caches for path, _ in flat]
    found: list[str] = []
    for new in _smaller([value for _, value in flat], leaves, cached):
        less = [_narrowed(value, leaf, new) for (_, value), leaf in zip(flat, leaves, strict=True)]
        if not _same(program, model, call, pytree.tree_unflatten(less, spec)):
            found += [
                f"L{pytree.keystr(path)}.size()[{axis}] != {new[size]}"
                for (path, _), leaf in zip(flat, leaves, strict=True)
                for axis, size in enumerate(leaf.sizes)
                if isinstance(size, str) and new.get(size, 2) < 2
            ]
    return tuple(found)


def _smaller(values: Sequence[Any], leaves: Sequence[Leaf], cached: Sequence[bool]) -> Generator[dict[str, int]]:
    """By their names, open sizes as they are tried: those of rows as 1, all others as 1; of caches, then, as 1 and as 0.

    What is as long as a cache and the tokens together, a mask, goes with either.
    """
    names = {size for leaf in leaves for size in leaf.sizes[:1] if isinstance(size, str)}
    if names:
        yield dict.fromkeys(names, 1)
    sizes: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for value, leaf, held in zip(values, leaves, cached, strict=True):
        for axis, size in enumerate(leaf.sizes):
            if isinstance(size, str) and size not in names:
                sizes[held].setdefault(size, value.shape[axis])
    tokens, past = sizes
    kept = next(iter(past.values()), 0)
    both = {name: size - kept for name, size in tokens.items() if kept and size - kept in tokens.values()}
    if tokens:
        yield {**dict.fromkeys(tokens, 1), **dict.fromkeys(both, kept + 1)}
    for length in (1, 0) if past else ():
        yield {**dict.fromkeys(past, length), **{name: size + length for name, size in both.items()}}


def _narrowed(value: Any, leaf: Leaf, new: Mapping[str, int]) -> Any:
    for axis, size in enumerate(leaf.sizes):
        value = value.narrow(axis, 0, new[size]) if isinstance(size, str) and size in new else value
    return value


def _same(program: Any, model: nn.Module, call: Callable[..., Any], given: Mapping[str, Any]) -> bool:
    """Whether a program gives what the model in eval() does, or refuses these inputs, or the model does."""
    model.eval()
    with torch.no_grad(), torch.random.fork_rng():
        try:
            expected = pytree.tree_leaves(call(**copy.deepcopy(dict(given))))
            outputs = pytree.tree_leaves(program.module()(**copy.deepcopy(dict(given))))
        except Exception:  # Of the model's own code, or a guard.
            return True
    pairs = zip(outputs, expected, strict=False)
    return len(outputs) == len(expected) and all(_close(*pair) for pair in pairs)


def _close(one: Any, other: Any) -> bool:
    """Whether tensors are the same but for roundings."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return True
    if one.shape != other.shape or not other.is_floating_point():
        return one.shape == other.shape and torch.equal(one, other)
    largest = float(torch.nan_to_num(other.double()).abs().max()) if other.numel() else 0.0
    return torch.allclose(one.double(), other.double(), 0, max(1e-3, 64 * torch.finfo(other.dtype).eps) * largest, True)


def leaves_of(program: Any) -> list[Leaf]:
    users = [spec for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    found: list[Leaf] = []
    for spec in users:
        value = values[spec.arg.name]
        if isinstance(value, Tensor):
            found.append(Leaf(spec.arg.name, sizes_of(value), value.dtype))
        else:
            found.append(Leaf(spec.arg.name, value=getattr(spec.arg, "value", None)))
    return found


def merged(one: Leaf, other: Leaf) -> Leaf:
    """What either trace fixed is fixed."""
    sizes = tuple(theirs if isinstance(own, str) else own for own, theirs in zip(one.sizes, other.sizes, strict=True))
    return replace(one, sizes=sizes)
