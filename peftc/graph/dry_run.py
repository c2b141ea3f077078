"""Which parameters a forward uses at all, found by running it once on the meta device."""

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from peftc.errors import CaptureError
from peftc.graph.copying import structural_copy
from peftc.graph.sites import is_pretrained, parameter_name, transformers_config


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
        except (CaptureError, NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError, LookupError):
            continue  # Anything may go wrong in a model's own code; then nothing is known.
        return frozenset(name for name in names if name.startswith(path)) - reached
    return frozenset()


def _reached(model: nn.Module) -> set[str]:
    named: dict[int, str] = {}
    for fqn, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                own = module._parameters[leaf] = nn.Parameter(parameter.detach(), parameter.is_floating_point())
                named[id(own)] = parameter_name(fqn, leaf)
    with torch.enable_grad(), _Guess():
        outputs = model(**tree_map_only(Tensor, lambda tensor: tensor.to("meta"), _example(model)))
    todo = [leaf.grad_fn for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    seen: set[Any] = set()
    while todo:
        function = todo.pop()
        if function is not None and function not in seen:
            seen.add(function)
            todo += [following for following, _ in function.next_functions]
    variables = (getattr(function, "variable", None) for function in seen)
    return {named[id(variable)] for variable in variables if id(variable) in named}


class _Guess(TorchDispatchMode):
    """Where a forward asks for a value of which there is none, it is told 1, or True: no padding, say."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The op, but what turns a tensor into a number."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype is torch.bool or 1
        return func(*args, **(kwargs or {}))


def _example(model: Any) -> Mapping[str, Any]:
    inputs = dict(model.dummy_inputs)
    if getattr(transformers_config(model), "is_encoder_decoder", False):
        inputs.setdefault("decoder_input_ids", inputs["input_ids"])
    return inputs
