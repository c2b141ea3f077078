"""The rule contract: how one method rewrites one kind of site, declared once as pure algebra.

The plan takes its shapes from a rule, the rewriter its ops, the checkpoint its keys, the merge its fold. A rule never
sees weight layouts, adapter names, devices, checkpoint prefixes or model classes: the engine canonicalises.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from peftc.errors import RuleError
from peftc.specs.base import AdapterSpec

S = TypeVar("S", bound=AdapterSpec)
Constant = float | int | bool | str | tuple[Any, ...]
# By name; an adapter's tensors, by site and name; adapters by site; and what `read_shape` tells.
Shapes = Mapping[str, tuple[int, ...]]
BySite = Mapping[str, Mapping[str, Tensor]]
Adapted = Mapping[str, Sequence[str]]
Read = tuple[str, Literal["out_in", "in_out"] | None, int]
# The operands of a site that an edit may replace. Ops of other kinds (a call) have slots of their own.
SLOTS = ("input", "weight", "output")


@dataclass(frozen=True)
class Param:
    """A tensor that an adapter adds to a site.

    `init`: `zeros`, `ones`, `constant:<value>`, `normal` or `normal:<std>`, `uniform:<bound>`, `kaiming_uniform`, `rule`
    (by `Rule.initialise`), `gathered` (by `Rule.gather`) or `drawn` (by `Rule.draw`).
    `seed`: it is drawn with this seed, the same everywhere; such a tensor need not be saved.
    `key`: its name in checkpoints, by default its name in the rule; the live name has the adapter's name after the
    first part (`lora_A.weight` is the parameter `lora_A.default.weight`). `dtype`: its own, if not the adapter's; an
    integer one is never trained. `trainable=False`: frozen; saved only if its `init` is `rule` or `gathered`, or `drawn`
    without a `seed`, and a file without it leaves it as it was initialised. `kept=False`: files never have it, as it
    follows from the weight (`init` is `rule`) or from constants (`drawn`). `stored`: files hold this many times the tensor.
    `use` is for the FLOPs of the plan: a `matrix` is multiplied with (two per element and token), a `vector` scales or
    is added (one), a `lookup` table is only indexed.
    `axes`: one letter per dimension, `o` if it runs along the rows of the canonical weight, `i` along its columns, any
    other if along neither (`ri` for lora_A). With `Rule.local`, it says in which pieces a large weight is folded.

    Example: Param((8, site.in_features), "kaiming_uniform", "lora_A.weight", axes="ri")
    """

    shape: tuple[int, ...]
    init: str = "zeros"
    key: str | None = None
    trainable: bool = True
    use: Literal["matrix", "vector", "lookup"] = "matrix"
    axes: str | None = None
    dtype: str | None = None
    seed: int | None = None
    stored: float = 1.0
    kept: bool = True


class Bound:
    """What a rule's functions get as `p`: its parameters, constants and dropouts by name, and the site's own `op`.

    `p.op(x, weight)` is the site's operation (with its stride, padding, …) on another weight, without bias;
    for convolutions `groups=` replaces the site's, and `p.pointwise(x, weight, bias, groups=)` is a 1×1 one; for
    embeddings `padding_idx=` does, which is `p.padding_idx`.
    `p.weight` and `p.bias` are the base's own, canonical, as they are before this adapter; read only if asked for.
    """

    def __init__(self, values: Mapping[str, Any], lazy: Mapping[str, Callable[[], Any]] | None = None) -> None:
        self.__dict__.update(values)
        self.__dict__["_lazy"] = lazy or {}

    def __getattr__(self, name: str) -> Any:
        lazy = self.__dict__["_lazy"]
        if name in lazy:
            value = self.__dict__[name] = lazy[name]()
            return value
        known = ", ".join(sorted(key for key in self.__dict__ if key != "_lazy"))
        raise RuleError(f"the rule uses p.{name}, but declares only {known}")


@dataclass(frozen=True)
class Argument:
    """An argument of the model's call that a rule takes: an integer, from 0 on, for every row of the batch, or every token.

    `below`: the constant that they are less than, if there is one. The model itself does not get it, unless it has one of
    that name. A call in which the adapter is active has to have it, if it is `needed`.

    Example: arguments = {"task_ids": Argument("n_tasks")}
    """

    below: str | None = None
    each: Literal["row", "token"] = "row"
    needed: bool = True


class Factors(NamedTuple):
    """A term `scale · up @ down` that a rule adds to the weight: up (out, r), down (r, in), with a kernel after them;
    experts come before them, where the weight stacks some.
    """

    up: Any
    down: Any
    scale: Any


class Placed(NamedTuple):
    """What a site has because of the others that are matched: tensors that it shares with some of them, by name (equal keys
    are one tensor), and constants.
    """

    shared: Mapping[str, Param] = {}
    constants: Mapping[str, Constant] = {}


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
    """One method on some ops. Subclass it, declare, and register under the entry point `peftc.rules`.

    `weight` is the method: the weight with which the bare site does in eval() what the adapted one does. The merge, sites
    that can't be traced and every other use of the weight follow from it, and so does a call, unless the rule offers a
    faster form of the same function, `input` or `output`. All are traced or called with plain tensors in canonical
    layout: weights are (out, in, *kernel), with the experts before that where a weight stacks them.

    `ops`: the rows of the table that it serves. An `additive` rule adds a term that depends on the input alone, so any of
    several can be merged first. `scale`: the floating-point constant that its change is proportional to, if there is one.
    `local`: the axes of the canonical weight (`o` rows, `i` columns) along which a piece of the fold needs that piece only;
    "" if it takes the whole, a norm of rows is local in `o`.
    `identity`: a fresh adapter changes nothing. `version`: raise it when the same parameters come to mean something else.
    `replaces_rows`: its tensors stand for rows of an embedding, which may be new in every process. So the other ends of the
    input embedding's tie are adapted with it, with the same tensors; files have the rows alone; the base is not compared.
    `ends_only`: it is for other ends of the tie of an adapted site, with the tensors of that; `again`: by their keys, those
    under which files have their transposes too.
    `arguments`: what it takes of the model's call; `output` then has `p.task_ids(x)`, say, as many as `x` has rows.
    `spellings`: (pattern, replacement) of keys that older files have. `columns`: constants that the plan's table shows.

    Example::

        class Gain(Rule[GainConfig]):
            name, spec, ops, local = "gain", GainConfig, ("linear",), "oi"

            def params(self, spec, site):
                return {"gain": Param((site.out_features, 1), "ones", axes="o.")}

            def weight(self, weight, p):
                return weight * p.gain
    """

    name: ClassVar[str]
    spec: ClassVar[type[AdapterSpec]]
    ops: ClassVar[tuple[str, ...]]
    version: ClassVar[int] = 1
    additive: ClassVar[bool] = False
    scale: ClassVar[str | None] = None
    local: ClassVar[str] = ""
    identity: ClassVar[bool] = True
    replaces_rows: ClassVar[bool] = False
    ends_only: ClassVar[bool] = False
    again: ClassVar[Mapping[str, str]] = {}
    arguments: ClassVar[Mapping[str, Argument]] = {}
    spellings: ClassVar[tuple[tuple[str, str], ...]] = ()
    columns: ClassVar[Mapping[str, str]] = {}
    # Fields of the spec that are probabilities of dropouts, which have their names.
    drops: ClassVar[tuple[str, ...]] = ()
    # Whether `weight` has the same bits in float64 on every device: no sum of products of three numbers has.
    repeats: ClassVar[bool] = True
    # What it takes from the weight (`singular values`), if it can't do without: a site that has no plain one is refused.
    takes: ClassVar[str] = ""
    # Classes of its own of which `calibrate` makes states, beside tensors, numbers and text in dicts, lists and tuples.
    states: ClassVar[tuple[type[Any], ...]] = ()
    # The first parts of the keys that its tensors have in files (`lora_A`).
    keys: ClassVar[tuple[str, ...]] = ()
    # For rules whose adapters are modules: the child of the site that holds them, by adapter name.
    container: ClassVar[str | None] = None
    # Whether that module is a trained copy of the site's own.
    whole: ClassVar[bool] = False

    def __eq__(self, other: object) -> bool:
        # Rules are declarations: a copy, or one that comes out of a pickle, is the same.
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rule[S]":
        return self

    def offers(self, function: str) -> bool:
        """Whether it has this function of the contract (`weight`, `factors`) of its own."""
        return getattr(type(self), function) is not getattr(Rule, function)

    def complete(self) -> None:
        """Raise RuleError if the class lacks what its kind of rule needs; asked when it is registered."""

    def serves(self, spec: S) -> bool:
        """Whether this rule, of several for one method and op, is the one for the flags of `spec`."""
        return True

    def params(self, spec: S, site: Any) -> dict[str, Param]:
        """The tensors added to `site`."""
        raise NotImplementedError

    def shared(self, spec: S, sites: Sequence[Any]) -> dict[str, Param]:
        """Tensors that all matched `sites` of the model share; every site's `p` has them too."""
        return {}

    def placed(self, spec: S, sites: Sequence[Any]) -> Sequence[Placed]:
        """For each of the matched `sites`, in the model's order, what depends on the others; nothing, if none does."""
        return ()

    def constants(self, spec: S, site: Any) -> dict[str, Constant]:
        """Numbers the algebra uses, by name (`scaling`); shown in the plan. Traced code may not branch on a float."""
        return {}

    def dropouts(self, spec: S, site: Any) -> dict[str, float]:
        """Dropout modules by name, with their probability; `p.<name>(x)` is live under train() and eval()."""
        return {name: getattr(spec, name) for name in self.drops}

    def check(self, spec: S, site: Any) -> str | None:
        """The reason why `site` can't be adapted with `spec`, or None."""
        return None

    def refusal(self, spec: S, site: Any) -> str | None:
        """As `check`, with what every rule of its kind refuses."""
        if self.takes and site.weight is None:
            return f"it takes {self.takes} from the weight, which is not a plain parameter here"
        return self.check(spec, site)

    def cannot_fold(self, spec: S, site: Any) -> str | None:
        """The reason why the adapter at `site` can't be merged into the weight, or None."""
        return None if self.offers("weight") else f"rule {self.name!r} declares no fold"

    def cautions(self, constants: Mapping[str, Constant], slots: Sequence[str]) -> list[str]:
        """What a reviewer of an edit with these constants and slots should know."""
        return []

    def summary(self, adapter: str, constants: Mapping[str, Constant], slots: Sequence[str]) -> list[str]:
        """Lines under the plan's table that say what such an edit does, where the table can't."""
        return []

    def slots(self, spec: S, site: Any) -> tuple[str, ...]:
        """The operands of `site` that the adapter replaces where they can be reached: the faster forms it has."""
        return tuple(slot for slot in ("input", "output") if self.offers(slot)) or ("weight",)

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        """The weight with which the bare site equals the adapted one. Computed in float32 at least."""
        raise NotImplementedError

    def bias(self, bias: Tensor, p: Any) -> Tensor:
        """The bias, likewise."""
        return bias

    def input(self, x: Tensor, p: Any) -> Tensor:
        """Slot `input`: what the site's op gets instead of `x`."""
        raise NotImplementedError

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        """Slot `output`: what follows the site's op, whose input was `x` and output `y`."""
        raise NotImplementedError

    def factors(self, p: Any) -> Factors | None:
        """The term that an `additive` rule adds to the weight, where that is a product: for files and batches of many."""
        return None

    def penalty(self, p: Any) -> Tensor | None:
        """A term of the loss, of one site's tensors: `compiled.penalty()` adds them up. `p.sites`: how many sites the rule
        has in the adapter.
        """
        return None

    def after_step(self, spec: S, tensors: BySite, step: int, state: dict[str, Any]) -> None:
        """What happens to an adapter's tensors, by site and name, after the step number `step` (from 1) of an optimiser
        that holds some; in place, without gradient. `state`: what the rule keeps from step to step, empty at first.
        """

    def filed(self, spec: S, tensors: BySite, state: Mapping[str, Any]) -> tuple[S, BySite]:
        """The spec and the tensors, by site and name, of an adapter as files hold them; `state` as `after_step` left it.

        A name that no parameter has is a key of files, which the spec's `on_model` turns back.
        """
        return spec, tensors

    def calibration(self, spec: S) -> Literal["inputs", "gradients"] | None:
        """What a fresh adapter has to be shown of data before it starts: what its sites get, or the gradients of the loss
        by their weights; None: nothing.
        """
        return None

    def counted(self, spec: S, batch: Any) -> Tensor | None:
        """Which of the positions of a `batch`, as the model is called with it, count; None: all."""
        return None

    def calibrate(self, spec: S, sites: Sequence[Any], x: Tensor, state: Any) -> Any:
        """What is known of the inputs of `sites`, who all read the same, after the rows `x` (n, in); None at first."""
        raise NotImplementedError

    def settled(self, spec: S, states: Mapping[str, Any]) -> Collection[str] | None:
        """The sites of which enough is known, where batches are gone through until all are; None: each batch once.

        `states`: by site in the model's order, the very same object for sites that read the same.
        """
        return None

    def calibrated(self, spec: S, states: Mapping[str, Any]) -> tuple[S, Mapping[str, Any]]:
        """The spec as data decides it, and by site what `initialise` gets as `p.data`.

        `states` as in `settled`; of gradients, their means over all calls, canonical and in float32 at least.
        """
        return spec, states

    def begins(self, ids: Tensor, p: Any) -> Tensor:
        """For methods that act from some place in the text on: where in the token `ids` (rows, tokens) of a call that is,
        (rows,); as many as there are tokens: nowhere. `output` then has `p.acts(x)`, the positions of `x` that it acts on.
        """
        raise NotImplementedError

    def unfold(self, weight: Tensor, p: Any) -> Tensor:
        """An estimate of the weight that `weight` made this one from, by elementwise float64 arithmetic and products.

        An undo log corrects it, so it need not be right, but the better it is the smaller is the log.
        """
        return weight - self.weight(torch.zeros_like(weight), p) if self.additive and self.repeats else weight

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        """Values of the parameters whose `init` is `rule`, from the canonical `weight`, `p.bias` and the parameters that
        have theirs already, in float32 at least (a weight whose rows it replaces is as stored); and from `p.data`, which
        is None without calibration. `weight` is empty where the site has no plain one: `check` refuses that where it is
        needed. `p.loaded`: of these parameters, by name, those that a file has brought, whose values here are not used.
        """
        raise NotImplementedError

    def gather(self, name: str, weights: Mapping[str, Tensor], p: Any) -> Tensor:
        """The frozen parameter `name`, whose `init` is `gathered`, from the canonical weights of all sites that share it,
        in the model's order and in float32 at least.
        """
        raise NotImplementedError

    def draw(self, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        """Values of the parameters whose `init` is `drawn`, on the CPU, from the constants alone: the same everywhere."""
        raise NotImplementedError

    def module(self, spec: S, site: Any) -> nn.Module:
        """For ops whose adapters hold a module instead of parameters (virtual tokens): that module."""
        raise NotImplementedError

    def start_module(
        self,
        module: nn.Module,
        spec: S,
        constants: Mapping[str, Constant],
        host: nn.Module,
        part_of: Callable[[str], nn.Module],
    ) -> None:
        """Initialise a fresh one further; `host` is the site's module, `part_of` gives one inside of it that can be called,
        also where its tensors are sharded.
        """

    def read_shape(self, tensors: Shapes, weight: tuple[int, ...]) -> Read | None:
        """Op, layout (None: can't be told) and groups of the stored `weight` of this shape that `tensors`, an adapter's at
        one site by key, are for; None if they are none of this method.
        """
        return None

    # The values of `combination_type` that `combined` and `combine` know, the default first; `exact`: the sum itself.
    combinations: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[str] = ""

    def combination(self, how: Combination, specs: Sequence[S]) -> Combination:
        """`how` as `combine` is given it, for adapters of these `specs`. Raises AdapterError on what makes no sense."""
        return how

    def combined(self, specs: Mapping[str, S], where: Adapted, how: Combination) -> S:
        """The spec of a combination: `specs` by adapter, with the targets of the new one; `where`, the adapters at every
        site. Raises AdapterError if they can't be combined so.
        """
        raise NotImplementedError

    def combine(self, site: Any, parts: Sequence[Part], how: Combination) -> dict[str, Tensor]:
        """The parameters at `site` of the adapter that `combined` describes."""
        raise NotImplementedError
