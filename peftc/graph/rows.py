"""peftc's own rows of the table of ops: linear, embedding, convolutions, norms, and weights that no op is known of."""

import functools
import importlib
import inspect
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from peftc.errors import RuleError
from peftc.graph.ops import MATMULS, Form, Op, Shape, is_packed

aten = torch.ops.aten


def _linear(module: nn.Module) -> Shape | None:
    if isinstance(module, nn.Linear):
        return Shape(module.in_features, module.out_features)
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    if pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D):
        rows, columns = cast("tuple[int, int]", module.get_parameter("weight").shape)
        return Shape(rows, columns, "in_out")
    return _quantised(module)


def _quantised(module: nn.Module) -> Shape | None:
    """A linear of another library: a leaf that names its in_features and out_features (GPTQ, AWQ, HQQ, torch.ao …).

    Its forward takes the input alone; I-BERT's, which takes and returns scaling factors too, is no linear.
    """
    features = (module.__dict__.get("in_features"), module.__dict__.get("out_features"))
    if module._modules or not all(type(size) is int for size in features):
        return None
    if not _takes_one(type(module)):
        return None
    if all(tensor is None for tensor in [*module._parameters.values(), *module._buffers.values()]):
        return None
    return Shape(*cast("tuple[int, int]", features))


@functools.cache
def _takes_one(cls: type[nn.Module]) -> bool:
    named = [p for p in inspect.signature(cls.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return len(named) <= 2  # self, and the input


def is_quantised(module: nn.Module) -> bool:
    """Whether `module` is a linear of another library, whose integer buffers are its weight."""
    return not isinstance(module, nn.Linear) and _quantised(module) is not None


def is_known_linear(module: nn.Module) -> bool:
    """Whether a call of `module` is a linear map though it can't be traced: its class is torch's own, or quantised."""
    weight = module._parameters.get("weight")
    return type(module).forward is nn.Linear.forward or is_quantised(module) or weight is None or not is_plain(weight)


def is_plain(weight: torch.Tensor) -> bool:
    """Whether arithmetic can be done with `weight`: floating-point numbers of two bytes or more, not packed in a class of
    another library (torchao's have the dtype that they stand for).
    """
    return not is_packed(weight) and weight.is_floating_point() and weight.itemsize > 1


def dequantised(module: Any) -> torch.Tensor:
    """The weight of a quantised linear (out, in) in floating point. Raises RuleError if it can't be told."""
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:  # bitsandbytes, 4 bits
        functional = importlib.import_module("bitsandbytes.functional")
        return functional.dequantize_4bit(weight.data, state)
    if getattr(weight, "SCB", None) is not None:  # bitsandbytes, 8 bits: rows scaled to their largest entry
        return weight.data * weight.SCB[:, None] / 127
    if type(weight.data) is not torch.Tensor and callable(getattr(weight, "dequantize", None)):
        return weight.dequantize()
    raise RuleError(
        f"this method needs the weight of {type(module).__name__}, which is quantised in a way that can't be read"
    )


def _embedding(module: nn.Module) -> Shape | None:
    if not isinstance(module, nn.Embedding):
        return None
    return Shape(module.num_embeddings, module.embedding_dim, "in_out")


def _lookup(node: fx.Node) -> Any:
    # max_norm would renormalise the adapter's weight in place.
    options = {name: value for name, value in node.kwargs.items() if name != "max_norm"}
    if node.target is aten.embedding.default:
        options |= zip(("padding_idx", "scale_grad_by_freq", "sparse"), node.args[2:], strict=False)
        if options.get("padding_idx") == -1:  # None, as aten has it.
            del options["padding_idx"]
    return partial(F.embedding, **cast("dict[str, Any]", options))


def _convolution(dims: int) -> Op:
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    function = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    aten_form = (aten.conv1d, aten.conv2d, aten.conv3d)[dims - 1]

    def shape_of(module: nn.Module) -> Shape | None:
        if not isinstance(module, cls):
            return None
        return Shape(module.in_channels, module.out_channels, "out_in", module.kernel_size, module.groups)

    def apply(node: fx.Node) -> Any:
        names = ("stride", "padding", "dilation", "groups")
        geometry = dict(zip(names, node.args[3:], strict=False))
        geometry.update({name: node.kwargs[name] for name in names if name in node.kwargs})
        return partial(function, **geometry)

    forms = {function: Form(), aten_form.default: Form(), aten_form.padding: Form()}
    return Op(f"conv{dims}d", forms, shape_of, apply)


# By op: the same one without geometry, 1×1.
POINTWISE: Mapping[str, Any] = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}


def _norm(module: nn.Module) -> Shape | None:
    weight = module._parameters.get("weight")
    named = "norm" in type(module).__name__.lower()
    if (
        weight is None
        or weight.dim() != 1
        or module._modules
        or not named
        or type(weight).__name__ == "UninitializedParameter"
    ):
        return None
    return Shape(1, weight.shape[0])


def _attention(module: nn.Module) -> Shape | None:
    return Shape(module.embed_dim, module.embed_dim) if isinstance(module, nn.MultiheadAttention) else None


_PRODUCT = Form(weight=(1, "other"), bias=None, turned=True)

OPS = (
    Op(
        "linear",
        {
            F.linear: Form(),
            aten.linear.default: Form(),
            torch.addmm: Form(x=(1, "mat1"), weight=(2, "mat2"), bias=(0, "input"), turned=True),
            aten.addmm.default: Form(x=(1, "mat1"), weight=(2, "mat2"), bias=(0, "self"), turned=True),
            **dict.fromkeys(MATMULS, _PRODUCT),
        },
        _linear,
        lambda node: F.linear,
    ),
    Op("attention", shape_of=_attention),
    Op(
        "embedding",
        {
            F.embedding: Form(bias=None, turned=True),
            aten.embedding.default: Form((1, "indices"), (0, "weight"), None, True),
        },
        _embedding,
        _lookup,
        indices=True,
    ),
    *(_convolution(dims) for dims in (1, 2, 3)),
    Op(
        "norm",
        {
            F.layer_norm: Form(weight=(2, "weight"), bias=(3, "bias")),
            aten.layer_norm.default: Form(weight=(2, "weight"), bias=(3, "bias")),
            F.rms_norm: Form(weight=(2, "weight"), bias=None),
            F.group_norm: Form(weight=(2, "weight"), bias=(3, "bias")),
        },
        _norm,
    ),
    # A weight that a module uses in ways of its own: matrices of experts, a parameter that is read.
    Op("parameter", unmixable="{} is adapted as a weight, which all rows share"),
)
