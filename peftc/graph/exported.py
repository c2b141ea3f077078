"""Export capture: a whole model as one flat graph of aten ops, traced by torch.export.

The graph reads the model's own tensors under their names, runs under train() and eval(), on any device, and for any size
of the dimensions that the trace left open.
"""

import copy
import inspect
import linecache
import sys
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, autograd, nn
from torch.utils import _pytree as pytree

from peftc.errors import CaptureError
from peftc.graph.assumed import guards_of, leaves_of, merged, never_so
from peftc.graph.calling import CacheLeaf, Leaf, Signature, is_default, refuse_hooks
from peftc.graph.copying import structural_copy
from peftc.graph.lineage import split_ties
from peftc.graph.modes import both_modes
from peftc.graph.region import Source
from peftc.graph.sites import is_pretrained
from peftc.graph.unlifted import unlifted


def export_model(model: nn.Module, inputs: Any) -> Source:
    """Trace `model`, as it is called with `inputs` (by name), in train() and in eval(): its graph, without anchors yet.

    Traced on a structural copy, without values, so nothing of the model is touched. All sizes of the inputs but 1 are left
    open where the model leaves them so. Raises CaptureError, with the module and the line, if torch.export can't.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(model.forward).parameters.items()}
    given = {name: v for name, v in _checked(model, inputs).items() if not is_default(defaults, name, v)}
    given, doubles = _apart(given)
    shadow = _shadow(model)
    call = _call(shadow, doubles)
    with without_autocast(model):
        programs = [_exported(shadow.train(training), call, given) for training in (True, False)]
        never = never_so(programs[1], shadow, call, given, doubles)
    leaves = [merged(*pair) for pair in zip(*map(leaves_of, programs), strict=True)]
    caches = _cache_leaves(given, doubles, leaves)
    graphs = [unlifted(program, model, caches) for program in programs]
    outputs = [_outputs(program, caches) for program in programs]
    joined = both_modes(*graphs) if outputs[0] == outputs[1] else None
    names = tuple(name for name in given if name not in doubles)
    signature = Signature(
        names=names,
        defaults=defaults,
        leaves=tuple(leaves[: len(leaves) - sum(len(one.leaves) for one in caches)]),
        inputs=pytree.tree_flatten({name: given[name] for name in names})[1],
        outputs=outputs[0],
        guards=(*guards_of(programs, given), *never),
        modules=frozenset(fqn for fqn, _ in model.named_modules()),
        dtypes=tuple((name, p.dtype) for name, p in model.named_parameters())[:1],
        caches=caches,
    )
    flats = [
        Source(graph, (), signature=replace(signature, outputs=spec))
        for graph, spec in zip(graphs if joined is None else [joined], outputs, strict=False)
    ]
    for flat in flats:
        split_ties(flat.graph, shadow)
    return flats[0] if joined is not None else replace(flats[1], training=flats[0])


def _checked(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """The inputs. Raises CaptureError."""
    if not isinstance(inputs, Mapping) or not any(
        isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(dict(inputs))
    ):
        raise CaptureError(
            "capture='export': give inputs={name: tensor, …}, what the model is called with: the program takes exactly"
            " these names (labels, if it is to return a loss)"
        )
    refuse_hooks(model)
    return dict(cast("Mapping[str, Any]", inputs))


def _apart(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    """The inputs with the tensors of caches in their place, these last; and of each cache whether it is double."""
    if "transformers" not in sys.modules:
        return dict(given), {}
    from peftc.graph import caches  # Late, as transformers takes its time.

    found = {name: value for name, value in given.items() if caches.is_cache(value)}
    others = {name: value for name, value in given.items() if name not in found}
    doubles = {name: caches.is_double(value) for name, value in found.items()}
    return {**others, **{name: caches.taken_apart(name, value) for name, value in found.items()}}, doubles


def _call(model: nn.Module, doubles: Mapping[str, bool]) -> Callable[..., Any]:
    """What calls the model with inputs whose caches are taken apart."""
    forward = model.forward
    if not doubles:
        return forward
    from peftc.graph.caches import called  # Late, as in _apart.

    def call(**given: Any) -> Any:
        return called(forward, given, doubles)

    return call


def _cache_leaves(
    given: Mapping[str, Any], doubles: Mapping[str, bool], leaves: Sequence[Leaf]
) -> tuple[CacheLeaf, ...]:
    """The caches among the inputs, with the leaves of their tensors, which are the last ones."""
    found: list[CacheLeaf] = []
    left = len(leaves) - sum(len(given[name]) for name in doubles)
    for name, double in doubles.items():
        found.append(CacheLeaf(name, tuple(leaves[left : left + len(given[name])]), double))
        left += len(given[name])
    return tuple(found)


def _outputs(program: Any, caches: Sequence[CacheLeaf]) -> pytree.TreeSpec:
    """How the model's outputs are put together; of a program with caches, these are the first of what it gives."""
    spec = program.call_spec.out_spec
    return spec.child(0) if caches else spec


def _shadow(model: nn.Module) -> nn.Module:
    """A copy whose modules may be put in a mode, and whose parameters want gradients, so that no op is traced without."""
    shadow = structural_copy(model)
    for parameter in shadow.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return shadow


@contextmanager
def without_autocast(model: nn.Module) -> Generator[None]:
    """A context in which nothing is cast, so that a trace is the same wherever it is made; calls may autocast."""
    with ExitStack() as stack:
        for device in {"cpu", *(parameter.device.type for parameter in model.parameters())} - {"meta"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def exportable(model: nn.Module, *runtimes: str) -> Generator[None]:
    """A context in which `model` is traced: with transformers' own patches for their models (and for `runtimes`: "onnx"),
    without fused paths.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if is_pretrained(model):
                theirs = import_module("transformers.exporters.exporter_dynamo")
                patches = import_module("transformers.exporters.utils")
                theirs.register_cache_pytrees_for_model(model)
                for runtime in (*runtimes, "dynamo"):
                    stack.enter_context(patches.apply_patches(runtime))
                stack.enter_context(theirs.reset_model_state(model))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _exported(model: nn.Module, call: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    # Copied apart: torch.export takes one tensor given twice for one input.
    own = {name: copy.deepcopy(value) for name, value in given.items()}
    open_sizes = pytree.tree_map(_open, own)
    with exportable(model), _taking(model, call, own), _nothing_lost(), torch.enable_grad():
        try:
            return torch.export.export(model, (), own, dynamic_shapes=open_sizes, strict=False)
        except Exception as error:  # Whatever the model's own code raises where it is traced.
            raise CaptureError(_reason(model, error)) from error


@contextmanager
def _nothing_lost() -> Generator[None]:
    """A context in which what a trace would leave out is refused: gradients of one's own, hooks of tensors."""
    apply, hook = autograd.Function.__dict__["apply"], Tensor.register_hook

    @classmethod
    def refused(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        if cls.__module__.startswith("torch."):
            return apply.__get__(None, cls)(*args, **kwargs)
        raise CaptureError(f"{cls.__name__} has a backward of its own, which a traced graph would not have")

    def no_hook(self: Tensor, hook: Any) -> Any:
        raise CaptureError("a hook on a tensor (register_hook) would not be in a traced graph")

    cast(Any, autograd.Function).apply, cast(Any, Tensor).register_hook = refused, no_hook
    try:
        yield
    finally:
        cast(Any, autograd.Function).apply, cast(Any, Tensor).register_hook = apply, hook


@contextmanager
def _taking(model: nn.Module, call: Callable[..., Any], given: Mapping[str, Any]) -> Generator[None]:
    """A context in which the forward of `model` is `call` and says that it takes what is given; torch.export counts
    `**kwargs` as one.
    """

    def flat(**inputs: Any) -> Any:
        return call(**inputs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    flat.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in given])  # type: ignore[attr-defined]
    model.forward = flat
    try:
        yield
    finally:
        del model.forward


def _open(leaf: Any) -> Any:
    return dict.fromkeys(range(leaf.dim()), torch.export.Dim.AUTO) if isinstance(leaf, Tensor) else None


def _reason(model: nn.Module, error: BaseException) -> str:
    mode = "train()" if model.training else "eval()"
    lines = str(error).strip().splitlines() or [""]
    return (
        f"capture='export': {type(model).__name__} can't be exported in {mode}{_place(model, error)}:"
        f" {type(error).__name__}: {lines[0][:300]} Use capture='modules', which keeps the model's Python."
    )


def _place(model: nn.Module, error: BaseException) -> str:
    """The innermost module whose forward the error came out of, and the line of that."""
    named = {id(module): fqn for fqn, module in model.named_modules()}
    found, step = "", error.__traceback__
    while step is not None:
        own, code = step.tb_frame.f_locals.get("self"), step.tb_frame.f_code
        if id(own) in named and code.co_name == "forward":
            line = linecache.getline(code.co_filename, step.tb_lineno).strip()
            where = named[id(own)] or "the model"
            found = f", in {where} ({type(own).__name__}) at {code.co_filename}:{step.tb_lineno} `{line}`"
        step = step.tb_next
    return found
