"""What a forward does with parameters and flags, found by running it without values on the meta device."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from peftc.errors import CaptureError
from peftc.graph.copying import structural_copy
from peftc.graph.sites import is_pretrained, parameter_name, transformers_config

# By name and the numbers that they are given.
Ops = list[tuple[str, tuple[float, ...]]]


def unused(model: nn.Module, names: Collection[str]) -> frozenset[str]:
    """Those of the parameters `names` that no output of a transformers model depends on.

    A copy without values runs on the example that its class has for such ends. If it has none, or can't run without
    values, nothing is known to be unused. Tied parameters are told apart.
    """
    if not names or not is_pretrained(model):
        return frozenset()
    body = cast(Any, model).base_model
    prefix = next(fqn for fqn, module in model.named_modules() if module is body)
    for part, path in ((model, ""), (body, f"{prefix}." if prefix else "")):  # A head may want what no example has.
        try:
            reached = {path + name for name in _reached(structural_copy(part).eval().to("meta"))}
        except _FAILURES:
            continue  # Nothing is known then.
        return frozenset(name for name in names if name.startswith(path)) - reached
    return frozenset()


def head_scale(model: nn.Module) -> float | None:
    """By what the inputs of a transformers model's head are multiplied because its config says that it is tied.

    1 for most, d_model^-½ for some of T5's family; None if that can't be told. Without values, as `unused`.
    """
    runs = _tied_and_not(model, "meta") or _tied_and_not(model, next(model.parameters()).device)
    if runs is None:
        return None if "tie_word_embeddings" in inspect.getsource(type(model).forward) else 1.0
    tied, untied = runs
    if tied == untied:
        return 1.0
    at = next((at for at, (a, b) in enumerate(zip(tied, untied, strict=False)) if a != b), len(untied))
    name, numbers = next(iter(tied[at:]), ("", ()))
    alone = tied[at + 1 :] == untied[at:]
    return numbers[0] if alone and name.startswith("aten::mul") and len(numbers) == 1 else None


def _tied_and_not(model: nn.Module, device: Any) -> tuple[Ops, Ops] | None:
    """The ops of a run on the example where the config says that embeddings are tied, and where it does not."""
    try:
        return _ops(model, True, device), _ops(model, False, device)
    except _FAILURES:
        return None


def _ops(model: nn.Module, tied: bool, device: Any) -> Ops:
    new: Any = structural_copy(model).eval().to(device)
    new.config.tie_word_embeddings = tied
    with torch.no_grad(), _all_chosen(), _Guess() as seen:
        new(**_moved(_example(new), device))
    return seen.ops


def _moved(inputs: Mapping[str, Any], device: Any) -> Mapping[str, Any]:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), dict(inputs))


# Anything may go wrong in a model's own code.
_FAILURES = (CaptureError, NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError, LookupError)


def _reached(model: nn.Module) -> set[str]:
    named: dict[int, str] = {}
    for fqn, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                own = module._parameters[leaf] = nn.Parameter(parameter.detach(), parameter.is_floating_point())
                named[id(own)] = parameter_name(fqn, leaf)
    with torch.enable_grad(), _all_chosen(), _Guess():
        outputs = model(**_moved(_example(model), "meta"))
    todo = [leaf.grad_fn for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    seen: set[Any] = set()
    while todo:
        function = todo.pop()
        if function is not None and function not in seen:
            seen.add(function)
            todo += [following for following, _ in function.next_functions]
    variables = (getattr(function, "variable", None) for function in seen)
    return {named[id(variable)] for variable in variables if id(variable) in named}


def _all_chosen() -> Any:
    """Let a choice by values (nonzero, in a router of experts) be of everything, where there are none."""
    return cast(Any, _config).patch(meta_nonzero_assume_all_nonzero=True)


class _Guess(TorchDispatchMode):
    """Where a forward asks for a value of which there is none, it is told 1, or True: no padding, say. Notes all `ops`."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Ops = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The op, but what turns a tensor into a number."""
        self.ops.append((str(func.name()), tuple(arg for arg in args if isinstance(arg, float | int))))
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype is torch.bool or 1
        return func(*args, **(kwargs or {}))


def _example(model: Any) -> Mapping[str, Any]:
    inputs = dict(model.dummy_inputs)
    if getattr(transformers_config(model), "is_encoder_decoder", False):
        inputs.setdefault("decoder_input_ids", inputs["input_ids"])
    return inputs
