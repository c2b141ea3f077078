"""Models of one site of every op and layout, which `check_rule` holds rules to the laws on."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftc.rewrite.parts import begins
from peftc.rule import Rule


@dataclass(frozen=True)
class Case:
    """A model of one site, `inner.site` (and what is tied to it), and an input for it in float64; `layout` tells cases of
    one op apart.
    """

    op: str
    layout: str
    model: nn.Module
    x: Tensor

    def __str__(self) -> str:
        return f"{self.op} ({self.layout})"


class _Wrapped(nn.Module):
    """A model around one site."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"site": site})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["site"](x) * 1.5


class _Tied(nn.Module):
    """A model of an embedding and a linear of the same weight, for rules that are for other ends of a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"site": nn.Embedding(8, 6), "end": nn.Linear(6, 8, bias=False)})
        self._tie()

    def _tie(self) -> None:
        self.inner["end"].weight = self.inner["site"].weight

    def _apply(self, fn: Any, recurse: bool = True) -> "_Tied":
        super()._apply(fn, recurse)
        self._tie()  # To another device, parameters go one by one.
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.inner["site"]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["end"](self.inner["site"](x) * 1.5)


class _Spoken(nn.Module):
    """A model of tokens, for rules that ask where in the text they begin."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8)
        self.inner = nn.ModuleDict({"site": nn.Linear(8, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["site"](self.embedding(x)) * 1.5


class _ScaleNorm(nn.Module):
    """A norm of no op in the table, as models write their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class _Experts(nn.Module):
    """One matrix, or one for each of three experts, used in a way of its own."""

    def __init__(self, experts: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, 8) if experts else torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (
            torch.einsum("...i,eoi->...eo", x, self.w) if self.w.dim() == 3 else torch.einsum("bti,oi->bto", x, self.w)
        )


def cases_of(op: str, rule: Rule[Any], modules: Mapping[str, tuple[nn.Module, Tensor]]) -> Iterator[Case]:
    """The cases of one of the ops of `rule`; `modules`: more of them, by op."""
    if op in modules:
        module, x = modules[op]
        yield Case(op, "given", _of(copy.deepcopy(module)), x.double() if x.is_floating_point() else x)
    if rule.ends_only:
        if op == "linear":
            yield Case(op, "tied to an embedding", _Tied().double().eval(), torch.randint(0, 8, (3, 5)))
    elif begins(rule):
        if op == "linear":
            yield Case(op, "of tokens", _Spoken().double().eval(), torch.arange(15).view(3, 5) % 8)
    else:
        yield from _plain(op)


def _of(module: nn.Module) -> nn.Module:
    return _Wrapped(module).double().eval()


def _plain(op: str) -> Iterator[Case]:
    from transformers.pytorch_utils import Conv1D

    rows = torch.randn(3, 5, 8, dtype=torch.float64)
    made: dict[str, list[tuple[str, Callable[[], nn.Module], Tensor]]] = {
        "linear": [
            ("out × in", lambda: nn.Linear(8, 6), rows),
            ("no bias", lambda: nn.Linear(8, 6, bias=False), rows),
            ("in × out", lambda: Conv1D(6, 8), rows),
        ],
        "embedding": [("in × out", lambda: nn.Embedding(8, 6), torch.randint(0, 8, (3, 5)))],
        "conv1d": [("out × in", lambda: nn.Conv1d(8, 6, 3, padding=1), rows.mT)],
        "conv2d": [("strided", lambda: nn.Conv2d(8, 6, 3, stride=2), torch.randn(3, 8, 7, 7).double())],
        "conv3d": [("out × in", lambda: nn.Conv3d(8, 6, 2), torch.randn(3, 8, 4, 4, 4).double())],
        "norm": [
            ("an op", lambda: nn.LayerNorm(8), rows),
            ("no op", lambda: _ScaleNorm(8), rows),
        ],
        "parameter": [("matrix", lambda: _Experts(False), rows), ("experts", lambda: _Experts(True), rows)],
    }
    for layout, build, x in made.get(op, ()):
        yield Case(op, layout, _of(build()), x)
