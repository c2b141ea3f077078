"""The structure of a checkpoint's model, without its weights: from its config, or from names and shapes."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from peftc.checkpoint.lazy import outline
from peftc.checkpoint.spelling import base_name
from peftc.checkpoint.tensor_file import read_json
from peftc.errors import CheckpointError
from peftc.graph.copying import structural_copy
from peftc.graph.finding import parameter_at
from peftc.graph.sites import is_pretrained
from peftc.registry import rules
from peftc.specs import AdapterSpec
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


def resize_vocabulary(base: nn.Module, adapters: Iterable[tuple[str, AdapterSpec, Mapping[str, Tensor]]]) -> None:
    """Give a transformers model on the meta device the vocabulary of the embeddings that adapters bring.

    `adapters`: where each is, its spec, its tensors by key. Raises CheckpointError if they differ in it.
    """
    sizes: dict[int, str] = {}
    names = _embedding_weights(base)
    for where, spec, tensors in adapters:
        for key, tensor in tensors.items():
            name = base_name(spec, key)
            if name in names and tensor.dim() == 2:
                sizes.setdefault(tensor.shape[0], where)
    now = {parameter_at(base, name).shape[0] for name in names}
    if len(sizes) > 1:
        raise CheckpointError(
            f"{' and '.join(sizes.values())} have vocabularies of {' and '.join(map(str, sizes))} tokens"
        )
    if sizes and now != set(sizes):
        cast(Any, base).resize_token_embeddings(next(iter(sizes)), mean_resizing=False)


def _embedding_weights(base: nn.Module) -> set[str]:
    """The names of the weights of a transformers model's input and output embeddings."""
    if not is_pretrained(base):
        return set()
    ends = list[Any]()
    for get in (cast(Any, base).get_input_embeddings, cast(Any, base).get_output_embeddings):
        with suppress(NotImplementedError):
            ends.append(get())
    named = base.named_modules()
    return {
        f"{fqn}.weight"
        for fqn, module in named
        if any(module is end for end in ends) and "weight" in module._parameters
    }


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
            " which tensors are tied or stored turned is not known. Pass model=, on any device (peftc merge: --class)"
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
    """The modules that adapters' keys show, by path: what their rules make of the tensors that lie at each."""
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in keys.items():
        name = key.removeprefix(AdapterSpec.key_prefix)
        path = next((path for path in _paths(name) if f"{path}.weight" in stored), None)
        if path is not None:
            groups.setdefault(path, {})[name.removeprefix(f"{path}.")] = tuple(tensor.shape)
    known = {path: _read(tensors, tuple(stored[f"{path}.weight"].shape)) for path, tensors in groups.items()}
    # What does not show by itself lies as those beside it do.
    turned = any(layout == "in_out" and op == "linear" for op, layout, _ in filter(None, known.values()))
    return {
        path: _module(
            op,
            tuple(stored[f"{path}.weight"].shape),
            layout or ("in_out" if turned else "out_in"),
            groups_,
            f"{path}.bias" in stored,
        )
        for path, (op, layout, groups_) in ((path, found) for path, found in known.items() if found is not None)
    }


def _paths(name: str) -> Iterator[str]:
    """What a key may have for its module, the longest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _read(
    tensors: Mapping[str, tuple[int, ...]], weight: tuple[int, ...]
) -> tuple[str, Literal["out_in", "in_out"] | None, int] | None:
    return next((found for rule in rules() if (found := rule.read_shape(tensors, weight)) is not None), None)


_CONVOLUTIONS: Mapping[str, Any] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


def _module(op: str, weight: tuple[int, ...], layout: str, groups: int, bias: bool) -> nn.Module:
    """The module that is `op` with a weight of this shape."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        if op == "embedding":
            return nn.Embedding(weight[0], weight[1])
        if op in _CONVOLUTIONS:
            return _CONVOLUTIONS[op](weight[1] * groups, weight[0], weight[2:], groups=groups, bias=bias)
        if layout == "in_out":
            return Conv1D(weight[1], weight[0])
        return nn.Linear(weight[1], weight[0], bias=bias)
