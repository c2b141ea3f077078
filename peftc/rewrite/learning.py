"""What rules do around training: a term of the loss, something after every step."""

import functools
import itertools
import warnings
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from peftc.registry import rules_of
from peftc.rewrite.parts import Adapter, Part
from peftc.rewrite.processes import require_common_gradients
from peftc.rewrite.program import Program
from peftc.rewrite.sharding import is_sharded, put, whole
from peftc.rule import Rule
from peftc.specs import AdapterSpec


def penalty(program: Program) -> Tensor | None:
    """The sum of what the rules of active adapters that learn add to the loss, or None if they add nothing."""
    terms: list[Tensor | None] = []
    for name in program.spliced:
        for rule, parts in _by_rule(program.adapters[name], "penalty").items() if name in program.learning else ():
            terms += [rule.penalty(part.bound(sites=len(parts))) for part in parts]
    # Sites may be on several devices.
    given = [term.reshape(()) for term in terms if term is not None]
    return torch.stack([term.to(given[0].device) for term in given]).sum() if given else None


def with_penalty(program: Program, output: Any) -> Any:
    """`output` of a call, with the penalty in its loss, if it has one by that name."""
    if isinstance(output, MutableMapping) and isinstance(cast(Any, output).get("loss"), Tensor):
        added = penalty(program)
        if added is not None:
            found = cast("MutableMapping[str, Any]", output)
            found["loss"] = found["loss"] + added.to(found["loss"].device)
    return output


def _by_rule(adapter: Adapter, function: str) -> dict[Rule[Any], list[Part]]:
    """The parts of an adapter whose rules have this function, by rule."""
    found: dict[Rule[Any], list[Part]] = {}
    for part in adapter.parts.values() if any(rule.offers(function) for rule in rules_of(adapter.spec)) else ():
        if part.edit.rule.offers(function):
            found.setdefault(part.edit.rule, []).append(part)
    return found


# What is told of the steps of optimisers, before and after them. torch knows one hook of each kind, which stays: a model
# that goes while hooks run can't take its own off then.
FOLLOWERS: dict[str, dict[int, Callable[[Optimizer], None]]] = {"before": {}, "after": {}}
_numbers = itertools.count()


@functools.cache
def _hook(kind: str) -> None:
    """Let torch tell the followers of a kind; once."""
    register = {"before": register_optimizer_step_pre_hook, "after": register_optimizer_step_post_hook}[kind]

    def tell(optimiser: Optimizer, args: Any, kwargs: Any) -> None:
        for follower in list(FOLLOWERS[kind].values()):
            follower(optimiser)

    register(tell)


def _follow(kind: str, program: Program, follower: Callable[[Optimizer], None]) -> None:
    """Tell `follower` of steps for as long as there is `program`."""
    _hook(kind)
    number = next(_numbers)
    FOLLOWERS[kind][number] = follower
    weakref.finalize(program, FOLLOWERS[kind].pop, number, None)


def watch_steps(program: Program) -> None:
    """Let the rules that want it act after every step of an optimiser that holds their parameters."""
    rules = {rule for own in program.adapters.values() for rule in rules_of(own.spec)}
    if program.watching or not any(rule.offers("after_step") for rule in rules):
        return
    reference, steps = weakref.ref(program), weakref.WeakKeyDictionary[Optimizer, int]()

    def stepped(optimiser: Optimizer) -> None:
        alive = reference()
        if alive is None:
            return
        held = {id(p) for group in optimiser.param_groups for p in group["params"]}
        mine = [own for own in alive.adapters.values() if not own.by_hand and _is_held(own, held)]
        if mine:
            steps[optimiser] = _count(optimiser, steps.get(optimiser, 0) + 1)
            for own in mine:
                after_step(own, own.spec, steps[optimiser])

    _follow("after", program, stepped)
    program.watching = True


def _is_held(adapter: Adapter, held: set[int]) -> bool:
    parts = (part for parts in _by_rule(adapter, "after_step").values() for part in parts)
    return any(id(tensor) in held for part in parts for tensor in part.tensors().values())


def _count(optimiser: Optimizer, seen: int) -> int:
    """The number of steps that an optimiser has taken: its own, if it counts, which goes on when a run is resumed."""
    return int(next((state["step"] for state in optimiser.state.values() if "step" in state), seen))


def after_step(adapter: Adapter, spec: AdapterSpec, step: int) -> None:
    """Let the rules of an adapter act after step number `step`, by `spec`."""
    with torch.no_grad():
        for rule, parts in _by_rule(adapter, "after_step").items():
            live = {part.edit.site: part.tensors() for part in parts}
            if rule.container is None:
                rule.after_step(spec, live, step, adapter.states.setdefault(rule.name, {}))
                continue
            # Those of an encoder are few: the rule gets whole ones, also where they are sharded.
            tensors = {site: {name: whole(tensor) for name, tensor in own.items()} for site, own in live.items()}
            rule.after_step(spec, tensors, step, adapter.states.setdefault(rule.name, {}))
            for site, own in live.items():
                for name in own:
                    if is_sharded(own[name]):
                        put(own[name], tensors[site][name])


def without_gradient(program: Program) -> list[str]:
    """The parameters that train and got no gradient in a backward pass that others got one in."""
    trained = {
        f"{part.edit.site}.{param.key} of {name!r}": part.tensor(param.key)
        for name in program.learning
        for part in program.adapters[name].parts.values()
        for param in part.edit.params
        if param.trainable
    }
    # FSDP1 leaves of many tensors nothing to a process.
    missing = [name for name, t in trained.items() if t.requires_grad and t.grad is None and t.numel()]
    return missing if len(missing) < len(trained) else []


def watch_first_step(program: Program) -> None:
    """Look at the first step of an optimiser that holds parameters of those that learn, once for every choice of them.

    Warn if some got no gradient; raise AdapterError if each of several processes would take a step of its own.
    """
    reference, looked_at = weakref.ref(program), set[tuple[str, ...]]()

    def stepping(optimiser: Optimizer) -> None:
        alive = reference()
        if alive is None or alive.learning in looked_at:
            return
        held = {id(p) for group in optimiser.param_groups for p in group["params"]}
        places = [place for name in alive.learning if name in alive.adapters for place in alive.adapters[name].trained]
        mine = [holder[leaf] for holder, leaf in places if id(holder[leaf]) in held]
        if not mine:
            return
        require_common_gradients(alive, mine)
        missing = without_gradient(alive) if not looked_at else []
        looked_at.add(alive.learning)
        if missing:
            more = f" (and {len(missing) - 3} more)" if len(missing) > 3 else ""
            warnings.warn(
                f"{', '.join(missing[:3])}{more} train, but this step's backward pass gave them no gradient: the forward"
                " did not use their modules. get_model_status().without_gradient lists them.",
                stacklevel=2,
            )

    _follow("before", program, stepping)
