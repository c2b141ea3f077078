"""A pass over data before adapters start: what the ops of their sites get, or the gradients of the loss by their weights.

The model is run as it is. Sites that read one tensor share what is kept of it, and nothing is kept of a batch itself.
"""

import itertools
from collections.abc import Callable, Generator, Iterable, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc.errors import AdapterError
from peftc.graph.finding import module_at
from peftc.graph.region import first_argument
from peftc.graph.sites import WeightSite
from peftc.plan import Edit, Plan
from peftc.progress import bar
from peftc.rewrite.course import Course, require_batches
from peftc.rule import Rule
from peftc.specs import AdapterSpec

# How often batches are gone through again until every site is settled.
ROUNDS = 100

_END = object()
Call = Callable[[Any, Any], Any]
Rows = Callable[[Tensor, Any, str], Tensor]


@dataclass(frozen=True)
class Calibration:
    """What data say of how an adapter starts: `given` is its spec, `spec` the one that follows, perhaps with other ranks;
    `data` is what it starts from, by site. Made by `peftc.calibrate`; it can be pickled.

    Example: model = peftc.compile(model, spec, calibration=peftc.calibrate(model, spec, batches))
    """

    given: AdapterSpec
    spec: AdapterSpec
    data: Mapping[str, Any]


def needs_data(spec: AdapterSpec, edits: Iterable[Edit]) -> list[Edit]:
    """Those of the `edits` of an adapter whose rules start from data."""
    return [edit for edit in edits if edit.rule.calibration(spec) is not None]


def require_data(plan: Plan, adapters: Iterable[str], starts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise AdapterError if one of these fresh adapters starts from data that is not there."""
    for name in adapters:
        edits = needs_data(plan.adapters[name], plan.edits_of(name))
        lost = [edit.site for edit in edits if edit.site not in starts.get(name, {})]
        if lost:
            kind = edits[0].rule.calibration(plan.adapters[name])
            raise AdapterError(
                f"adapter {name!r} starts from data, the {kind} of its sites, and has none at {lost[0]} ({len(lost)} of"
                f" {len(edits)} sites): pass calibration=, an iterable of batches that the model is called with"
                f"{', labels included' if kind == 'gradients' else ''}, or what peftc.calibrate(model, spec, batches) gives"
            )


def observe(
    base: nn.Module,
    plan: Plan,
    adapter: str,
    given: AdapterSpec,
    batches: Iterable[Any],
    call: Call | None = None,
    rows: Rows | None = None,
    share: bool = True,
    resume: Path | None = None,
    progress: bool = True,
) -> Calibration:
    """Run `base` over `batches` and let the rules of `adapter` see what they start from.

    `call` runs the model on a batch (for gradients: and returns the loss, or None if it went backward itself); `rows` takes
    from what a site got in a batch, by its fqn, the rows to look at. `share=False`: without a call to see which sites read
    the same. `resume`: the file in which is what an earlier pass has learned, and is kept what this one does. Raises
    AdapterError; the model is as it was.
    """
    require_batches(batches)
    spec = plan.adapters[adapter]
    edits = needs_data(spec, plan.edits_of(adapter))
    if not edits:
        raise AdapterError(f"calibrate: no rule of {adapter!r} ({spec.peft_type}) learns from data with this spec")
    watched = {edit.site: _module_of(base, plan, edit) for edit in edits}
    kinds = {edit.rule.calibration(spec) for edit in edits}
    classes = {cls for edit in edits for cls in edit.rule.states}
    with (
        _still(base),
        bar("calibrate", len(batches) if isinstance(batches, Sized) else None, "batches", progress) as tick,
    ):
        course = Course({"spec": given.to_dict(), "sites": list(watched)}, resume, tuple(classes), tick)
        course.go_on()
        if kinds == {"gradients"}:
            states = _gradients(base, watched, batches, call or _loss, course)
        else:
            states = _inputs(_Pass(base, plan, spec, edits, watched, call or run, rows, share, course), batches)
        course.keep()
    unseen = [site for site in watched if states.get(site) is None]
    if unseen:
        raise AdapterError(
            f"calibrate: nothing was learned of {unseen[0]} (and {len(unseen) - 1} more): no batch reached it, or none had"
            " rows enough. Give more batches, or larger ones, or leave it out (exclude_modules)."
        )
    data: dict[str, Any] = {}
    new = given
    for rule, own in _by_rule(edits).items():
        new, values = rule.calibrated(new, {edit.site: states[edit.site] for edit in own})
        data |= values
    return Calibration(given, new, data)


def run(base: Any, batch: Any) -> Any:
    """Call a model with a batch: a mapping of keyword arguments, a tuple of positional ones, or the one argument."""
    if isinstance(batch, Mapping):
        return base(**batch)
    return base(*batch) if isinstance(batch, tuple) else base(batch)


def _loss(base: Any, batch: Any) -> Tensor:
    output = run(base, batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise AdapterError(
            "calibrate: the output has no loss to take gradients of: put labels into the batches, or pass"
            " call=lambda model, batch: …, which returns the loss, to peftc.calibrate"
        )
    return loss


def _backward(call: Call, base: Any, batch: Any) -> None:
    loss = call(base, batch)
    if isinstance(loss, Tensor):
        loss.backward()
    elif loss is not None:
        raise AdapterError(
            f"calibrate: call= gave {type(loss).__name__}: it is to return the loss, a tensor, or None if it went backward"
        )


def _by_rule(edits: Iterable[Edit]) -> dict[Rule[Any], list[Edit]]:
    found: dict[Rule[Any], list[Edit]] = {}
    for edit in edits:
        found.setdefault(edit.rule, []).append(edit)
    return found


def _module_of(base: nn.Module, plan: Plan, edit: Edit) -> nn.Module:
    site = plan.sites[edit.site]
    assert isinstance(site, WeightSite), "rules that start from data adapt weights"
    if site.host is not None:
        raise AdapterError(f"calibrate: {site.fqn} is a parameter, and what its op gets can't be seen; leave it out")
    return module_at(base, site.owner)


@contextmanager
def _still(base: nn.Module) -> Generator[None]:
    """`base` in eval() and frozen, for a while."""
    training = [module for module in base.modules() if module.training]
    learning = [parameter for parameter in base.parameters() if parameter.requires_grad]
    for module in training:
        module.training = False
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def _seen(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Generator[None]:
    """Tell `see` of everything these modules get, for a while."""

    def hook(fqn: str) -> Callable[..., None]:
        def pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(fqn, first_argument(args, kwargs))

        return pre

    handles = [module.register_forward_pre_hook(hook(fqn), with_kwargs=True) for fqn, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Pass:
    """A pass over inputs: as `observe` is asked for it; `watched` are the modules by site."""

    base: nn.Module
    plan: Plan
    spec: AdapterSpec
    edits: list[Edit]
    watched: Mapping[str, nn.Module]
    call: Call
    rows: Rows | None
    share: bool
    course: Course

    def groups(self, batch: Any) -> list[list[str]]:
        """The sites by what they read, as one batch shows it."""
        if not self.share:
            return [[fqn] for fqn in self.watched]
        read: dict[str, list[Tensor]] = {fqn: [] for fqn in self.watched}
        keys: dict[str, list[Any]] = {fqn: [] for fqn in self.watched}

        def note(fqn: str, x: Tensor) -> None:
            read[fqn].append(x)  # As long as it lives, nothing else has its place in memory.
            keys[fqn].append((x.data_ptr(), x.shape, x.stride(), x.dtype, x._version))

        with _seen(self.watched, note):
            self.course.run(self.call, self.base, batch)
        found: dict[Any, list[str]] = {}
        for fqn, key in keys.items():
            found.setdefault(tuple(key) or fqn, []).append(fqn)
        return list(found.values())

    def settled(self, states: Mapping[str, Any]) -> set[str] | None:
        """The sites of which enough is known; None if every batch is looked at once."""
        names: set[str] = set()
        for rule, own in _by_rule(self.edits).items():
            done = rule.settled(self.spec, {edit.site: states.get(edit.site) for edit in own})
            if done is None:
                return None
            names.update(done)
        return names

    def look(self, batch: Any, groups: list[list[str]], states: dict[str, Any]) -> None:
        """Let the rules see what the first of each group gets in a batch."""
        rules = {edit.site: edit.rule for edit in self.edits}
        members = {own[0]: own for own in groups}
        counted = {rule: rule.counted(self.spec, batch) for rule in set(rules.values())} if self.rows is None else {}

        def see(fqn: str, x: Tensor) -> None:
            rows = _rows(x, counted[rules[fqn]]) if self.rows is None else self.rows(x, batch, fqn)
            sites = [self.plan.sites[name] for name in members[fqn]]
            state = rules[fqn].calibrate(self.spec, sites, rows.detach(), states.get(fqn))
            states.update(dict.fromkeys(members[fqn], state))

        with _seen({fqn: self.watched[fqn] for fqn in members}, see):
            self.course.run(self.call, self.base, batch)
        self.course.done()


def _rows(x: Tensor, counted: Tensor | None) -> Tensor:
    """The rows of `x` at the positions that count, if it has these positions."""
    if counted is not None and counted.shape == x.shape[:-1]:
        return x[counted.to(x.device)]
    return x.reshape(-1, x.shape[-1])


def _inputs(own: _Pass, batches: Iterable[Any]) -> dict[str, Any]:
    """What the rules know of every site's inputs after the batches, which are gone through again if they ask for it."""
    states: dict[str, Any] = own.course.known.setdefault("states", {})
    rest = iter(batches)
    first = next(rest, _END)
    if first is _END:
        return states
    again = ROUNDS if own.settled(states) is not None and rest is not batches else 0
    with torch.no_grad():
        groups: list[list[str]] = own.course.known.get("groups") or own.groups(first)
        own.course.known["groups"] = groups
        for one in (itertools.chain([first], rest), *itertools.repeat(batches, again)):
            for batch in own.course.new(one):
                settled = own.settled(states) or set()
                left = [group for group in groups if not settled.issuperset(group)]
                if not left:
                    return states
                own.look(batch, left, states)
            if any(states.get(site) is None for site in own.watched):
                return states
    settled = own.settled(states)
    waiting = [] if settled is None else [site for site in own.watched if site not in settled]
    if waiting:
        raise AdapterError(
            f"calibrate: {waiting[0]} (and {len(waiting) - 1} more) did not settle. Give more batches, as a list or a"
            " DataLoader, which can be gone through again."
        )
    return states


def _gradients(
    base: nn.Module, watched: Mapping[str, nn.Module], batches: Iterable[Any], call: Call, course: Course
) -> dict[str, Tensor]:
    """The mean of the gradients by each weight, canonical, over all calls of its module."""
    sums: dict[str, Tensor] = course.known.setdefault("sums", {})
    counts: dict[str, int] = course.known.setdefault("counts", dict.fromkeys(watched, 0))

    def hook(fqn: str) -> Callable[..., Tensor]:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            x = first_argument(args, kwargs).detach()

            def add(gradient: Tensor) -> None:
                wide = torch.promote_types(gradient.dtype, torch.float32)
                value = gradient.flatten(0, -2).to(wide).mT @ x.flatten(0, -2).to(wide)
                sums[fqn] = sums[fqn] + value if fqn in sums else value
                counts[fqn] += 1

            if y.requires_grad:
                y.register_hook(add)
                return y
            # The first to need a gradient. What follows may write into its output, which a leaf can't have.
            leaf = y.detach().requires_grad_()
            leaf.register_hook(add)
            return leaf.clone()

        return watch

    handles = [module.register_forward_hook(hook(fqn), with_kwargs=True) for fqn, module in watched.items()]
    try:
        with torch.enable_grad():
            for batch in course.new(batches):
                course.run(partial(_backward, call), base, batch)
                course.done()
    finally:
        for handle in handles:
            handle.remove()
    return {fqn: value / counts[fqn] for fqn, value in sums.items()}
