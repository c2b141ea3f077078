"""The structure of a checkpoint's model, without its weights: from its config, or from names and shapes."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftc.checkpoint.lazy import outline
from peftc.checkpoint.tensor_file import read_json
from peftc.errors import CheckpointError
from peftc.graph.copying import structural_copy
from peftc.stream.names import Names, names_of
from peftc.stream.sharded import Checkpoint


def skeleton(
    checkpoint: Checkpoint, model: nn.Module | None, adapters: Iterable[Mapping[str, Tensor]]
) -> tuple[nn.Module, Names]:
    """A model on the meta device with the shapes and dtypes of the checkpoint's tensors, and where these are its.

    `model`: one of the same structure (its own weights don't matter). Else the class that `config.json` names, if
    transformers has it; else modules as the tensors' names and those of `adapters` show. Raises CheckpointError.
    """
    stored = outline({name: checkpoint.entry(name) for name in checkpoint.where})
    config = read_json(checkpoint.configs / "config.json") if "config.json" in checkpoint.others else {}
    if config.get("quantization_config"):
        raise CheckpointError(f"{checkpoint.folder}: is quantised; merge into the model it was quantised from")
    if model is not None:
        base = _outlined(model)
    elif config.get("model_type") or config.get("architectures"):
        base = _from_config(checkpoint, config)
    else:
        base = _from_names(checkpoint, stored, {key: tensor for keys in adapters for key, tensor in keys.items()})
    names = names_of(base, stored)
    _take_dtypes(checkpoint, base, names, stored)
    return base.eval(), names


def _outlined(model: nn.Module) -> nn.Module:
    """A copy on the meta device, tied as `model` is."""
    copy, outlines = structural_copy(model), dict[int, Any]()
    for module in copy.modules():
        for slots in cast("tuple[dict[str, Any], ...]", (module._parameters, module._buffers)):
            for leaf, tensor in slots.items():
                if tensor is not None and id(tensor) not in outlines:
                    data = tensor.detach().to("meta")
                    outlines[id(tensor)] = nn.Parameter(data, False) if isinstance(tensor, nn.Parameter) else data
                slots[leaf] = outlines[id(tensor)] if tensor is not None else None
    return copy


def _from_config(checkpoint: Checkpoint, config: Mapping[str, Any]) -> nn.Module:
    """The transformers model that the config names, on the meta device. Code from the folder is never run."""
    import transformers

    architectures: Any = config.get("architectures")
    name = str(cast("list[Any]", architectures)[0]) if isinstance(architectures, list) and architectures else ""
    cls = getattr(transformers, name, None)
    base: type = transformers.PreTrainedModel
    if not (isinstance(cls, type) and issubclass(cls, base)) or cls is base:
        raise CheckpointError(
            f"{checkpoint.folder}: config.json names no class that transformers has (architectures: {architectures!r}), so"
            " which tensors are tied or stored turned is not known. Pass model=, on any device"
        )
    try:
        parsed = transformers.AutoConfig.from_pretrained(
            checkpoint.configs, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            return cast(nn.Module, cls(parsed))
    except Exception as error:  # Whatever the values of the config make the class raise.
        raise CheckpointError(f"{checkpoint.folder}: config.json does not make a {cls.__name__}: {error}") from None


def _take_dtypes(checkpoint: Checkpoint, base: nn.Module, names: Names, stored: Mapping[str, Tensor]) -> None:
    """Give parameters the dtypes that their tensors are stored in. Raises CheckpointError where shapes differ."""
    tensors = {name: stored[tensor] for name, tensor in names.direct.items()}
    for fusion in {id(fusion): fusion for fusion in names.fused.values()}.values():
        tensors |= fusion.fuse(stored, base)
    for name, parameter in base.named_parameters(remove_duplicate=False):
        found = tensors.get(name)
        if found is None:
            continue
        if found.shape != parameter.shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {names.direct.get(name, name)} is {list(found.shape)}, but config.json makes it"
                f" {list(parameter.shape)}"
            )
        parameter.requires_grad_(False)
        parameter.data = found


def _from_names(checkpoint: Checkpoint, stored: Mapping[str, Tensor], keys: Mapping[str, Tensor]) -> nn.Module:
    """Modules by the tensors' names; of the kinds that the adapters' keys and shapes show, where they adapt one."""
    try:
        return _modules(stored, _sites(stored, keys))
    except (IndexError, KeyError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}: names and shapes of its tensors and the adapter's don't tell what the modules are"
            f" ({error!r}). Pass model=, on any device"
        ) from None


def _modules(stored: Mapping[str, Tensor], sites: Mapping[str, nn.Module]) -> nn.Module:
    root = nn.Module()
    for name, tensor in stored.items():
        path, _, leaf = name.rpartition(".")
        if path not in sites or leaf not in ("weight", "bias"):
            _at(root, path).register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    for path, module in sites.items():
        parent, _, leaf = path.rpartition(".")
        _at(root, parent).add_module(leaf, module)
    return root


def _at(root: nn.Module, path: str) -> nn.Module:
    module = root
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module


def _sites(stored: Mapping[str, Tensor], keys: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    shapes = {key.removeprefix("base_model.model."): tuple(tensor.shape) for key, tensor in keys.items()}
    # A square weight does not show which way it lies; those beside it do.
    turned = any(_lies_turned(shapes, name.removesuffix(".weight"), tuple(t.shape)) for name, t in stored.items())
    found: dict[str, nn.Module] = {}
    for key, shape in shapes.items():
        for end in (".lora_A.weight", ".lora_embedding_A", ".ia3_l"):
            path = key.removesuffix(end)
            weight = stored.get(f"{path}.weight")
            if path != key and weight is not None:
                square = len(weight.shape) == 2 and weight.shape[0] == weight.shape[1]
                lies = turned if square else _lies_turned(shapes, path, tuple(weight.shape))
                found[path] = _module(end, tuple(weight.shape), shape, lies, f"{path}.bias" in stored)
    return found


def _lies_turned(shapes: Mapping[str, tuple[int, ...]], path: str, weight: tuple[int, ...]) -> bool:
    """Whether a weight of two dimensions is (in, out), as LoRA's factors show: not a square one."""
    a, b = shapes.get(f"{path}.lora_A.weight", (0, 0)), shapes.get(f"{path}.lora_B.weight", (0, 0))
    return len(weight) == 2 and weight[0] != weight[1] and (b[0], a[1]) == weight[::-1]


_CONVOLUTIONS: Mapping[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def _module(end: str, weight: tuple[int, ...], shape: tuple[int, ...], turned: bool, bias: bool) -> nn.Module:
    """The module with this weight that an adapter with a key ending in `end`, of `shape`, is for."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        if end == ".lora_embedding_A":
            return nn.Embedding(weight[0], weight[1])
        if len(weight) in _CONVOLUTIONS:
            groups = shape[1] // weight[1] if end == ".lora_A.weight" else 1
            convolution = _CONVOLUTIONS[len(weight)]
            return convolution(weight[1] * groups, weight[0], weight[2:], groups=groups, bias=bias)
        if turned:
            return Conv1D(weight[1], weight[0])
        return nn.Linear(weight[1], weight[0], bias=bias)
