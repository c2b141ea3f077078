"""Mixed batches: several adapters in one batch, one per row.

For the time of a call every host asks which call it is in. Where the adapters' term is a product (`Rule.factors`), the
products of all of them become two batched ones; elsewhere the code of every adapter runs on its own rows (see
peftc.rewrite.route). Calls in several threads, each with its own names, do not meet.
"""

import re
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from peftc.errors import AdapterError, MergeError
from peftc.graph.ops import op_named, operand, use_of
from peftc.graph.region import Region, Source
from peftc.graph.sites import parameter_name, transformers_config
from peftc.rewrite import route as ops
from peftc.rewrite.checkpointing import CHECKPOINT
from peftc.rewrite.fusion import FRESH
from peftc.rewrite.hosts import BOUND, Binding, Code, install, is_host, uninstall
from peftc.rewrite.mixed_program import program_run
from peftc.rewrite.parts import Part
from peftc.rewrite.passes import piped
from peftc.rewrite.processes import require_same_gradients, require_whole_rows
from peftc.rewrite.program import Opened, Program
from peftc.rewrite.route import BASE, Route, Routed, batched, current, host_by_row
from peftc.rewrite.splice import copied, follow
from peftc.rewrite.switch import at, binding_of, install_layout, layout
from peftc.rewrite.verify import verify

_KEPT = 64  # Sets of names whose runs are remembered.
_LOCK = threading.RLock()
# Parts of models with several inputs, of which the batch is that of the text.
_SEEN = re.compile(r"(^|[._])(vision|visual|image|audio|video|multi_modal)")
# Architectures that turn (rows, positions) around inside.
_TURNING = ("longformer", "led", "xlnet", "fsmt")


@contextmanager
def mixed(program: Program, names: Any, several: bool = False) -> Generator[None]:
    """Let the model's calls use adapter `names[i]` for row i, or with `several`, as `generate`, which keeps no gradients,
    calls it, for as many rows as each then has (beams).

    Raises AdapterError or MergeError before anything runs.
    """
    rows = _checked(program, names)
    learns = torch.is_grad_enabled() and not several
    route = Route(rows, _runs(program, frozenset(rows) - {BASE}), learns, _rows_first(program.base), several)
    with _entered(program, route):
        yield


def _checked(program: Program, names: Any) -> tuple[str, ...]:
    given = cast("list[Any]", names) if isinstance(names, list | tuple) else []
    if not given or not all(isinstance(name, str) for name in given):
        raise AdapterError(f"adapter_names: expected a list with one adapter name per row, got {names!r}")
    rows = tuple(cast("list[str]", names))
    for name in dict.fromkeys(rows):
        if name != BASE and name not in program.adapters:
            known = ", ".join([*program.adapters, BASE])
            raise AdapterError(f"adapter_names: no adapter {name!r}; there are {known}")
        reason = _unmixable(program, name) if name != BASE else None
        if reason is not None:
            raise AdapterError(f"adapter_names: {name!r} can't share a batch: {reason}")
    if program.made.sequence_first is None:
        program.made.sequence_first = _sequence_first(program.base)
    if program.made.sequence_first:
        raise AdapterError("adapter_names: this model has modules that take positions before rows (batch_first=False)")
    if program.merged:
        raise MergeError(f"adapter_names: {', '.join(program.merged)} merged; call unmerge_adapter() first")
    if not program.enabled:
        raise AdapterError("adapter_names: adapters are disabled; call enable_adapters(), or leave disable_adapter()")
    if any(program.overlay.present.values()):
        raise AdapterError(
            "adapter_names: an active adapter has put biases or embeddings of its own into the base; set_adapter([]) first"
        )
    require_whole_rows(program.base)
    if torch.is_grad_enabled():
        require_same_gradients(program, rows)
    return rows


def _unmixable(program: Program, name: str) -> str | None:
    """Why adapter `name` can't be one of several in a batch."""
    config = transformers_config(program.base)
    several = config is not None and config.get_text_config() is not config
    if any(tensor.adapter == name for tensor in program.plan.trained):
        return "it trains biases of the base model, which all rows share"
    if any(program.overlay.brings(tensor, name) for tensor in program.overlay.present):
        return "it brings embeddings of its own, in the place of those that all rows share"
    for edit in program.adapters[name].edits:
        row = op_named(program.plan.sites[edit.site].op)
        if row.unmixable is not None:
            return row.unmixable.format(edit.site)
        if ".experts." in edit.site:
            return f"{edit.site} gets the tokens that were routed to it, whichever sequence they are of"
        if several and _SEEN.search(edit.site):
            return f"{edit.site} gets images or sounds, and each may belong to any row"
    return None


def _sequence_first(base: nn.Module) -> bool:
    config = transformers_config(base)
    if config is not None and config.model_type in _TURNING:
        return True
    ordered = (m for m in base.modules() if isinstance(m, nn.MultiheadAttention | nn.RNNBase))
    return any(not module.batch_first for module in ordered)


def _rows_first(base: nn.Module) -> bool:
    """Whether all modules are known to take rows first: those of transformers do, but for a few."""
    return transformers_config(base) is not None


@contextmanager
def _entered(program: Program, route: Route) -> Generator[None]:
    """Let this thread's calls of the model run under `route`. The hosts ask for it as long as there is any such call."""
    with _LOCK:
        if program.calls == 0:
            _open(program)
        program.calls += 1
    token = current.set(route)
    try:
        yield
    finally:
        current.reset(token)
        with _LOCK:
            program.calls -= 1
            if program.calls == 0:
                _close(program)


def _open(program: Program) -> None:
    """Let every host, and the model's own call, ask which call it is in; others go on as they did."""
    root = program.base
    layers = [layer for layer in root.modules() if layer.__dict__.get(CHECKPOINT)]
    program.opened = Opened(not is_host(root), layers)
    install(root)
    for region in program.regions:
        module = program.modules[region.host]
        module.__dict__[BOUND] = Routed(module, program.installed.get(region.host), module is root)
    if not isinstance(root.__dict__[BOUND], Routed):
        root.__dict__[BOUND] = Routed(root, None, True)
    again = partial(_again, program)
    for layer in layers:
        layer.__dict__[CHECKPOINT] = _Carried(layer.__dict__[CHECKPOINT], again)


def _close(program: Program) -> None:
    opened, program.opened = program.opened, None
    assert opened is not None, "the first of the calls has opened it"
    for layer in opened.carried:
        function = layer.__dict__.get(CHECKPOINT)
        if isinstance(function, _Carried):
            layer.__dict__[CHECKPOINT] = function.function
    for region in program.regions:
        program.modules[region.host].__dict__[BOUND] = None
    if opened.root:
        uninstall(program.base)
    install_layout(program, layout(program, program.spliced))


class _Carried:
    """A checkpointing function that takes the route along to the backward pass, where layers run again."""

    def __init__(self, function: Callable[..., Any], again: Callable[..., Any]) -> None:
        self.function, self.again = function, again

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        route = current.get(None)
        return self.function(run if route is None else partial(self.again, route, run), *args, **kwargs)


def _again(program: Program, route: Route, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    before, route.bound = route.bound, True
    try:
        if current.get(None) is route:
            return run(*args, **kwargs)
        with _entered(program, route):
            return run(*args, **kwargs)
    finally:
        route.bound = before


def _runs(program: Program, names: frozenset[str]) -> Mapping[int, Any]:
    """What every host runs, by its id, that one of the adapters `names` changes, for batches of any of them."""
    kept = program.made.runs
    if names not in kept:
        if len(kept) >= _KEPT:
            kept.clear()
        parts: dict[str, dict[str, list[Part]]] = {}
        for name in sorted(names, key=list(program.adapters).index):
            for part in program.adapters[name].parts.values():
                parts.setdefault(part.edit.site, {}).setdefault(name, []).append(part)
        pairs = ((region, _parts_in(region, parts)) for region in program.regions)
        kept[names] = {id(program.modules[region.host]): _run(program, region, own) for region, own in pairs if own}
    return kept[names]


def _parts_in(region: Region, parts: Mapping[str, Mapping[str, list[Part]]]) -> dict[str, dict[str, list[Part]]]:
    """By adapter, its parts at the sites of `region`."""
    found: dict[str, dict[str, list[Part]]] = {}
    sites = {parameter_name(region.host, a.site) if a.site else region.host for a in region.source.anchors}
    for site in parts.keys() & sites:
        for name, own in parts[site].items():
            found.setdefault(name, {})[site] = own
    return found


def _run(program: Program, region: Region, own: Mapping[str, Mapping[str, list[Part]]]) -> Any:
    """Batched products, if all adapters here are of one family, else each adapter's code on its rows."""
    if program.plan.capture != "modules":
        return program_run(program, region, own)
    flat = {name: [part for group in sites.values() for part in group] for name, sites in own.items()}
    host = program.modules[region.host]
    if batched(flat):
        binding = Binding(_grouped(program, region.source), host, ())
        binding.__dict__["parts_by_name"] = {name: parts[0] for name, parts in flat.items()}
        return binding
    return host_by_row(
        host, {name: binding_of(program, region, at(region, dict(sites))) for name, sites in own.items()}
    )


def _grouped(program: Program, source: Source) -> Code:
    """The source's graph with the term of all adapters, on grouped rows, on its output."""
    key = ("grouped", source)
    if key not in program.made.codes:
        graph, nodes = copied(source)
        node = nodes[str(source.anchors[0].node)]
        use = use_of(node)
        assert use is not None, "a site that is not opaque has an op"
        with graph.inserting_before(node):
            parts = graph.get_attr("parts_by_name")
        follow(graph, node, ops.add_products, operand(node, use.form.x), parts, node.target in FRESH)
        graph, ran = piped(graph, program.passes, lambda new, name: verify(new, None, None, None, name))
        program.made.codes[key] = Code(graph, ran)
    return program.made.codes[key]
