"""The rule contract: how one method rewrites one kind of site, declared once as pure algebra.

The plan takes its shapes from a rule, the rewriter its ops, the checkpoint its keys, the merge its fold. A rule never
sees weight layouts, adapter names, devices, checkpoint prefixes or model classes: the engine canonicalises.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from peftc.errors import RuleError
from peftc.graph.sites import Kind, Site
from peftc.specs import AdapterSpec

S = TypeVar("S", bound=AdapterSpec)
Slot = Literal["input", "output", "module"]
Constant = float | int | bool | str


@dataclass(frozen=True)
class Param:
    """A tensor that an adapter adds to a site.

    `init`: `zeros`, `ones`, `normal` or `normal:<std>`, `kaiming_uniform`, or `rule` (by `Rule.initialise`).
    `key`: its name in checkpoints, by default its name in the rule; the live name has the adapter's name after the
    first part (`lora_A.weight` is the parameter `lora_A.default.weight`). `trainable=False`: frozen; saved only if its
    `init` is `rule`, and a file without it leaves it as it was initialised.
    `lookup=True`: indexed, not multiplied (counts no FLOPs).
    """

    shape: tuple[int, ...]
    init: str = "zeros"
    key: str | None = None
    trainable: bool = True
    lookup: bool = False


class Bound:
    """What a rule's functions get as `p`: its parameters, constants and dropouts by name, and the site's own `op`.

    `p.op(x, weight)` is the site's operation (with its stride, padding, …) on another weight, without bias;
    for convolutions `groups=` replaces the site's, and `p.pointwise(x, weight, bias, groups=)` is a 1×1 one.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise RuleError(f"the rule uses p.{name}, but declares only {', '.join(sorted(self.__dict__))}")


class Rule(Generic[S]):
    """One method on some kinds of site. Subclass it, declare, and register under the entry point `peftc.rules`.

    `slot` tells which of `input` and `output` is spliced. Both, and the folds, are traced or called with plain tensors
    in canonical layout: weights are (out, in, *kernel). An `additive` rule adds a term that depends on the input alone,
    so any of several can be merged first.
    """

    name: ClassVar[str]
    spec: ClassVar[type[AdapterSpec]]
    kinds: ClassVar[tuple[Kind, ...]]
    additive: ClassVar[bool] = False

    def params(self, spec: S, site: Site) -> dict[str, Param]:
        """The tensors added to `site`."""
        raise NotImplementedError

    def constants(self, spec: S, site: Site) -> dict[str, Constant]:
        """Numbers the algebra uses, by name (`scaling`); shown in the plan."""
        return {}

    def dropouts(self, spec: S, site: Site) -> dict[str, float]:
        """Dropout modules by name, with their probability; `p.<name>(x)` is live under train() and eval()."""
        return {}

    def check(self, spec: S, site: Site) -> str | None:
        """The reason why `site` can't be adapted with `spec`, or None."""
        return None

    def cannot_fold(self, spec: S, site: Site) -> str | None:
        """The reason why the adapter at `site` can't be merged into the weight, or None."""
        return f"rule {self.name!r} declares no fold" if type(self).fold is Rule.fold else None

    def slot(self, spec: S, site: Site) -> Slot:
        """Which slot of `site` the adapter takes."""
        return "output"

    def input(self, x: Tensor, p: Any) -> Tensor:
        """Slot `input`: what the site's op gets instead of `x`."""
        raise NotImplementedError

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        """Slot `output`: what follows the site's op, whose input was `x` and output `y`."""
        raise NotImplementedError

    def fold(self, weight: Tensor, p: Any) -> Tensor:
        """The weight with which the bare site equals the adapted one."""
        raise NotImplementedError

    def fold_bias(self, bias: Tensor, p: Any) -> Tensor:
        """The bias, likewise."""
        return bias

    def initialise(self, weight: Tensor, shapes: Mapping[str, tuple[int, ...]], p: Any) -> dict[str, Tensor]:
        """Values of the parameters whose `init` is `rule`, from the canonical float32 `weight`."""
        raise NotImplementedError


def live_name(key: str, adapter: str) -> str:
    """`lora_A.default.weight` for key `lora_A.weight` of adapter `default`."""
    first, dot, rest = key.partition(".")
    return f"{first}.{adapter}{dot}{rest}"


def known_init(init: str) -> bool:
    """Whether `init` names an initialisation."""
    return init in ("zeros", "ones", "normal", "kaiming_uniform", "rule") or bool(
        re.fullmatch(r"normal:[\d.e-]+", init)
    )


def fill(tensor: Tensor, init: str) -> None:
    """Initialise `tensor` in place as `init` says (see Param). kaiming_uniform has a = √5, as nn.Linear's default."""
    name, _, argument = init.partition(":")
    fillers: Mapping[str, Callable[[Tensor], Any]] = {
        "zeros": nn.init.zeros_,
        "ones": nn.init.ones_,
        "normal": lambda t: nn.init.normal_(t, std=float(argument or 1)),
        "kaiming_uniform": lambda t: nn.init.kaiming_uniform_(t, a=sqrt(5)),
    }
    with torch.no_grad():
        fillers[name](tensor)


def flops_per_token(params: Mapping[str, Param]) -> int:
    """Multiply-adds (two each) that a rule's parameters add per token, or per output position of a convolution."""
    return sum(
        2 * prod(param.shape) if len(param.shape) > 1 and min(param.shape[:2]) > 1 else prod(param.shape)
        for param in params.values()
        if not param.lookup
    )
