"""What was written, on inputs of other sizes and values than it was traced with.

A trace takes one side of every branch of the model's Python. A torch.export program refuses inputs of which its trace would
have gone the other way, if that shows in sizes; ONNX and compiled programs check nothing of the sort. So an artefact is
run beside the live model on fewer and more rows, other lengths, those at the bounds that the trace noted, and padding.
"""

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftc.errors import ExportError
from peftc.export.certificate import difference, tensors_of
from peftc.export.exporters import Written
from peftc.graph.calling import holds

# What may differ, over the largest output, where nothing branches: roundings in another order.
_TOLERANCE, _ROUNDINGS = 1e-3, 64
# The most elements of made inputs, as a multiple of those given, and in any case.
_MOST, _LEAST = 16, 2**16
_NUMBERS = re.compile(r"(?<![\w\[])\d+")


@dataclass(frozen=True)
class Probed:
    """The inputs that were `compared`, and those that the live model takes and the artefact `refused`."""

    compared: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def probe(
    to: str, written: Written, live: Callable[[Mapping[str, Tensor]], Any], given: Mapping[str, Tensor], fixed: bool
) -> Probed:
    """Compare what was `written` with the `live` model on other inputs than the `given` ones.

    `fixed`: sizes are to be those given. Raises ExportError, naming the inputs and the way out, if outputs differ.
    """
    guards = [code for code in written.guards if holds(code, given)]
    compared: list[str] = []
    refused: list[str] = []
    for inputs, mask in _others(given, guards, fixed):
        try:
            expected = tensors_of(live(inputs))
        except Exception:  # Of any model: inputs that it does not take say nothing.
            continue
        broken = [code for code in guards if not holds(code, inputs)]
        if broken and to == "aoti":  # It would read what is not there.
            raise ExportError(_said(to, inputs, given, broken, "would not notice that it is not made for them"))
        try:
            outputs = tensors_of(written.run(inputs))
        except Exception:  # Of any runtime: it says so to whoever calls it.
            refused.append(_named(inputs))
            continue
        found = _different(outputs, expected, mask)
        if found is not None:
            found = f"gives other outputs than the live model ({found})"
            raise ExportError(_said(to, inputs, given, broken, found))
        compared.append(_named(inputs))
    return Probed(tuple(dict.fromkeys(compared)), tuple(dict.fromkeys(refused)))


def _others(
    given: Mapping[str, Tensor], guards: Sequence[str], fixed: bool
) -> Generator[tuple[dict[str, Tensor], Tensor | None]]:
    """Inputs as those given, of other values and sizes, each with its mask of tokens, if there is one."""
    yield _made(given, {}, padded=True)
    if fixed:
        return
    most = max(_LEAST, _MOST * sum(value.numel() for value in given.values()))
    tried: set[tuple[tuple[int, int], ...]] = set()
    for new in _sizes(given, guards):
        key = tuple(sorted(new.items()))
        if key not in tried and min(new.values()) > 0 and _elements(given, new) <= most:
            tried.add(key)
            yield _made(given, new, padded=len(tried) % 2 == 0)


def _sizes(given: Mapping[str, Tensor], guards: Sequence[str]) -> Generator[dict[int, int]]:
    """Other sizes by what they are, those of the rows by 0; equal ones are changed together, each and all."""
    rows = next((value.shape[0] for value in given.values() if value.dim()), 1)
    own = list(dict.fromkeys(size for value in given.values() for size in value.shape[1:] if size > 1))
    numbers = sorted({near for code in guards for text in _NUMBERS.findall(code) for near in _around(int(text))})
    by_size = {size: [size, 1, 2, 3, size - 1, size + 1, 2 * size + 1, *numbers] for size in own}
    together = [dict(zip(own, news, strict=True)) for news in zip(*by_size.values(), strict=True)] or [{}]
    alone = [{size: new} for size, news in by_size.items() for new in news] if len(own) > 1 else []
    counts = [1, rows + 1, rows]
    for at, changed in enumerate([*together, *alone]):
        yield {**changed, 0: counts[at % 3]}
    yield {**dict.fromkeys(own, rows), 0: rows}
    yield from ({0: number} for number in numbers)


def _around(number: int) -> tuple[int, ...]:
    return (number - 1, number, number + 1)


def _sizes_of(value: Tensor, new: Mapping[int, int]) -> list[int]:
    """`new`: sizes by what they were, those of the rows by 0."""
    return [new.get(size if axis else 0, size) for axis, size in enumerate(value.shape)]


def _elements(given: Mapping[str, Tensor], new: Mapping[int, int]) -> int:
    return sum(int(torch.tensor(_sizes_of(value, new)).prod()) for value in given.values())


def _made(given: Mapping[str, Tensor], new: Mapping[int, int], padded: bool) -> tuple[dict[str, Tensor], Tensor | None]:
    """Inputs of other sizes, the values over and over, and shifted; floats negated and masks with padding in `padded`."""
    made: dict[str, Tensor] = {}
    mask: Tensor | None = None
    for name, value in given.items():
        for axis, size in enumerate(_sizes_of(value, new)):
            if size != value.shape[axis]:
                value = value.index_select(axis, torch.arange(size, device=value.device) % value.shape[axis])
        if "mask" in name and not value.is_floating_point() and value.dim() == 2:
            value = _with_padding(value) if padded else value
            mask = value if mask is None else mask
        elif value.is_floating_point() and padded:
            value = -value
        made[name] = value.contiguous()
    return made, mask


def _with_padding(mask: Tensor) -> Tensor:
    """Half of the first row left out on the left, and the end of the last one, if that is another, on the right."""
    padded = mask.clone()
    padded[0, : mask.shape[1] // 2] = 0
    if len(mask) > 1 and mask.shape[1] > 2:
        padded[-1, -1] = 0
    return padded


def _different(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], mask: Tensor | None) -> str | None:
    """In words, how far outputs are from what is expected, of tokens that are no padding; None if they are the same."""
    pairs = {name: (outputs[name], value) for name, value in expected.items() if name in outputs}
    for name, (own, value) in pairs.items():
        if own.shape != value.shape:
            return f"{name} is {tuple(own.shape)}, not {tuple(value.shape)}"
        if mask is not None and value.dim() > 2 and value.shape[:2] == mask.shape:
            chosen = mask.bool().to(value.device)
            pairs[name] = (own.to(value.device)[chosen], value[chosen])
    for name, (own, value) in pairs.items():
        largest, scale = difference({name: own}, {name: value})
        limit = max(_TOLERANCE, _ROUNDINGS * torch.finfo(value.dtype).eps) * scale
        if not largest <= limit:
            return f"{name} by {largest:.2g}, of {scale:.3g}"
    return None


def _named(inputs: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {'×'.join(map(str, value.shape))}" for name, value in inputs.items())


def _said(to: str, inputs: Mapping[str, Tensor], given: Mapping[str, Tensor], broken: Sequence[str], what: str) -> str:
    """What is wrong with an artefact on these inputs, why, and the ways out."""
    others = any(value.shape != given[name].shape for name, value in inputs.items())
    why = "; ".join(map(_readable, broken)) or ("of sizes that are 1 or not" if others else "of values")
    ways = ["write it with tensors (torch.where, torch.cond)"]
    if broken and to != "pt2":
        ways.append("export to='pt2', which refuses such inputs")
    if others:
        ways.append("give sizes='fixed', for inputs of the sizes given alone")
    return (
        f"to={to!r}: for {_named(inputs)} what was written {what}. Its trace took one side of a branch in the model's"
        f" Python ({why}): {', or '.join(ways)}"
    )


def _readable(code: str) -> str:
    """A guard as torch writes it, in fewer words: `x.size(1) > 4`."""
    return re.sub(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]", r"\1.size(\2)", code)
