"""The rule contract: how one method rewrites one kind of site, declared once as pure algebra.

The plan takes its shapes from a rule, the rewriter its ops, the checkpoint its keys, the merge its fold. A rule never
sees weight layouts, adapter names, devices, checkpoint prefixes or model classes: the engine canonicalises.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from peftc.errors import RuleError
from peftc.graph.calls import CallSlot
from peftc.graph.sites import Kind, Site, Stack
from peftc.specs import AdapterSpec, PromptSpec

S = TypeVar("S", bound=AdapterSpec)
P = TypeVar("P", bound=PromptSpec)
Slot = Literal["input", "output", "weight", "module"] | CallSlot
Constant = float | int | bool | str


@dataclass(frozen=True)
class Param:
    """A tensor that an adapter adds to a site.

    `init`: `zeros`, `ones`, `normal` or `normal:<std>`, `kaiming_uniform`, or `rule` (by `Rule.initialise`).
    `key`: its name in checkpoints, by default its name in the rule; the live name has the adapter's name after the
    first part (`lora_A.weight` is the parameter `lora_A.default.weight`). `trainable=False`: frozen; saved only if its
    `init` is `rule`, and a file without it leaves it as it was initialised.
    `use` is for the FLOPs of the plan: a `matrix` is multiplied with (two per element and token), a `vector` scales or
    is added (one), a `lookup` table is only indexed.
    `axes`: one letter per dimension, `o` if it runs along the rows of the canonical weight, `i` along its columns, any
    other if along neither (`ri` for lora_A). If all parameters of a rule say so, a large weight is folded in pieces.
    """

    shape: tuple[int, ...]
    init: str = "zeros"
    key: str | None = None
    trainable: bool = True
    use: Literal["matrix", "vector", "lookup"] = "matrix"
    axes: str | None = None


class Bound:
    """What a rule's functions get as `p`: its parameters, constants and dropouts by name, and the site's own `op`.

    `p.op(x, weight)` is the site's operation (with its stride, padding, …) on another weight, without bias;
    for convolutions `groups=` replaces the site's, and `p.pointwise(x, weight, bias, groups=)` is a 1×1 one.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise RuleError(f"the rule uses p.{name}, but declares only {', '.join(sorted(self.__dict__))}")


@dataclass(frozen=True)
class Combination:
    """How `add_weighted_adapter` combines adapters; see there for what the fields mean."""

    combination_type: str
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"


@dataclass(frozen=True)
class Part:
    """What one adapter brings to a combination at a site: its weight, its parameters and constants."""

    weight: float
    p: Any


class Rule(Generic[S]):
    """One method on some kinds of site. Subclass it, declare, and register under the entry point `peftc.rules`.

    `slot` tells what is spliced: `input` or `output`, or at slot `weight` the fold, whose result the site computes with.
    All are traced or called with plain tensors in canonical layout: weights are (out, in, *kernel), with the experts
    before that in kind `parameter`. An `additive` rule adds a term that depends on the input alone,
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

    def unfold(self, weight: Tensor, p: Any) -> Tensor:
        """An estimate of the weight that `fold` made `weight` from, by elementwise float64 arithmetic and matrix products.

        An undo log corrects it, so it need not be right, but the better it is the smaller is the log.
        """
        return weight - self.fold(torch.zeros_like(weight), p) if self.additive else weight

    def fold_bias(self, bias: Tensor, p: Any) -> Tensor:
        """The bias, likewise."""
        return bias

    # The values of `combination_type` that `combined` and `combine` know; the first is the default.
    combinations: ClassVar[tuple[str, ...]] = ()

    def combined(self, specs: Mapping[str, S], where: Mapping[str, Sequence[str]], how: Combination) -> S:
        """The spec of a combination: `specs` by adapter, with the targets of the new one; `where`, the adapters at every
        site. Raises AdapterError if they can't be combined so.
        """
        raise NotImplementedError

    def combine(self, site: Site, parts: Sequence[Part], how: Combination) -> dict[str, Tensor]:
        """The parameters at `site` of the adapter that `combined` describes."""
        raise NotImplementedError

    def initialise(self, weight: Tensor, shapes: Mapping[str, tuple[int, ...]], p: Any) -> dict[str, Tensor]:
        """Values of the parameters whose `init` is `rule`, from the canonical float32 `weight`."""
        raise NotImplementedError


class PromptRule(Rule[P]):
    """A method that puts trained virtual tokens into a model's call; register it as any rule.

    `at` says where: `embeds`, before the embedded tokens, or `past`, as cached keys and values. The tensors come from
    an encoder, a plain module: called with the row numbers (1, rows) it returns the rows (1, rows, width). The engine
    does the rest: masks, labels, positions, caches. Saved is what the encoder returns, as `prompt_embeddings`.
    """

    kinds = ("call",)
    at: ClassVar[Literal["embeds", "past"]]

    def resolve(self, spec: P, stack: Stack) -> P:
        """`spec` with what it leaves open read off the model."""
        halves = 2 if stack.is_encoder_decoder and spec.task_type == "SEQ_2_SEQ_LM" else 1
        facts = {
            "token_dim": stack.token_dim,
            "num_transformer_submodules": halves,
            "num_attention_heads": stack.num_attention_heads,
            "num_layers": stack.num_layers,
        }
        return spec.model_copy(update={name: value for name, value in facts.items() if getattr(spec, name) is None})

    def disagreement(self, spec: P, stack: Stack) -> str | None:
        """Why a resolved `spec` does not fit the model, or None."""
        if spec.num_transformer_submodules == 2 and not stack.is_encoder_decoder:
            return "num_transformer_submodules=2 is for encoder-decoder models; leave it out"
        if self.at == "embeds" and spec.token_dim != stack.token_dim:
            return f"token_dim={spec.token_dim} contradicts the model, which embeds in {stack.token_dim}; leave it out"
        if self.at == "embeds" and not stack.embedding:
            return "its get_input_embeddings() gives no embedding with a weight (vocabulary, width)"
        return None

    def width(self, spec: P) -> int:
        """The width of a row: `token_dim` at `embeds`; at `past` a key and a value of that width for every layer."""
        return spec.fact("token_dim") * (1 if self.at == "embeds" else 2 * spec.fact("num_layers"))

    def encoder(self, spec: P) -> nn.Module:
        """The encoder of a resolved `spec`; with `inference_mode`, one `embedding` that holds the rows themselves."""
        raise NotImplementedError

    def start(self, encoder: nn.Module, spec: P, embed: Callable[[Tensor], Tensor], vocab_size: int) -> None:
        """Initialise a fresh `encoder` further. `embed` gives the model's embeddings (n, token_dim) of n token ids."""

    def folded(self, spec: P) -> PromptSpec:
        """The spec of the same rows without reparameterisation: what can be trained on without the encoder."""
        return spec

    def cannot_fold(self, spec: P, site: Site) -> str | None:
        return "virtual tokens are no part of a weight, so there is nothing to fold"


def live_name(key: str, adapter: str) -> str:
    """`lora_A.default.weight` for key `lora_A.weight` of adapter `default`."""
    first, dot, rest = key.partition(".")
    return f"{first}.{adapter}{dot}{rest}"


_INITS = r"zeros|ones|kaiming_uniform|rule|normal(:[\d.e-]+)?"


def validate(
    rule: Rule[Any],
    slot: str,
    params: Mapping[str, Param],
    constants: Mapping[str, Constant],
    dropouts: Mapping[str, float],
) -> None:
    """Raise RuleError, naming the rule, if a declaration breaks the contract."""
    keys = [param.key or name for name, param in params.items()]
    names = [*params, *constants, *dropouts]
    wrong = [
        *([f"slot {slot!r} is none of {', '.join(_SLOTS)}"] if slot not in _SLOTS else []),
        *([] if params else ["it declares no parameter"]),
        *(f"{name!r} is declared twice" for name in dict.fromkeys(names) if names.count(name) > 1),
        *(f"key {key!r} is used twice" for key in dict.fromkeys(keys) if keys.count(key) > 1),
        *(f"key {key!r} has more than two parts" for key in keys if key.count(".") > 1),
        *(f"{name!r} is a name that modules have" for name in [*keys, *dropouts] if name.partition(".")[0] in _TAKEN),
        *(f"{n}: unknown init {p.init!r}" for n, p in params.items() if not re.fullmatch(_INITS, p.init)),
        *(
            f"{n}: axes {p.axes!r} for shape {p.shape}"
            for n, p in params.items()
            if len(p.axes or p.shape) != len(p.shape)
        ),
        *(f"constant {n!r} is a {type(v).__name__}" for n, v in constants.items() if type(v) not in _PLAIN),
    ]
    if wrong:
        raise RuleError(f"rule {rule.name!r} ({type(rule).__name__}): {'; '.join(wrong)}")


_SLOTS = ("input", "output", "weight")
_PLAIN = (float, int, bool, str)
_TAKEN = frozenset({*dir(nn.Module()), "weight", "bias"})


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
    """The FLOPs that a rule's parameters add per token, or per output position of a convolution."""
    each = {"matrix": 2, "vector": 1, "lookup": 0}
    return sum(each[param.use] * prod(param.shape) for param in params.values())
