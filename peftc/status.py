"""What is active, merged and learning, layer by layer and as a whole; fields as in PEFT."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from peftc.graph.hooked import given_class
from peftc.graph.sites import WeightSite
from peftc.plan import Edit
from peftc.rewrite.hosts import original_class
from peftc.rewrite.learning import without_gradient
from peftc.rewrite.parts import Part
from peftc.rewrite.program import Program

Learns = bool | Literal["irregular"]


@dataclass(frozen=True)
class LayerStatus:
    """One adapted module. `module_type`: rules and class, `lora.Linear`. The adapters are those attached here.

    `requires_grad`, by adapter: "irregular" if only part of its parameters trains. `devices`: their types, by adapter.
    `quantization_backend`: the class of a linear of another library whose weight is no floating-point tensor.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Learns]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass(frozen=True)
class ModelStatus:
    """The model with all its adapters; `peft_types` by adapter, the rest as in LayerStatus.

    `without_gradient`: after a backward pass, the parameters that train but got none, because no forward used them.
    `scales`: by adapter, how much of its change is applied (`set_scale`).
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Learns]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None
    without_gradient: list[str]
    scales: dict[str, float]


def layer_status(program: Program) -> list[LayerStatus]:
    """The status of every adapted module, in module order."""
    groups: dict[str, list[Edit]] = {}
    for edit in program.plan.edits:
        groups.setdefault(edit.site, []).append(edit)
    return [_layer(program, site, edits) for site, edits in groups.items()]


def model_status(program: Program) -> ModelStatus:
    """The status of the whole model."""
    layers = layer_status(program)
    parameters = [(parameter.numel(), parameter.requires_grad) for parameter in program.base.parameters()]
    backends = {layer.quantization_backend for layer in layers} - {None}
    tensors = {
        name: [t for part in own.parts.values() for t in _tensors(part)] for name, own in program.adapters.items()
    }
    return ModelStatus(
        base_model_type=given_class(original_class(program.base)).__name__,
        adapter_model_type="CompiledModel",
        peft_types={name: str(spec.peft_type) for name, spec in program.plan.adapters.items()},
        trainable_params=sum(count for count, trains in parameters if trains),
        total_params=sum(count for count, _ in parameters),
        num_adapter_layers=len(layers),
        enabled=program.enabled,
        active_adapters=list(program.active),
        merged_adapters=list(program.merged),
        requires_grad={name: _learns(own) for name, own in tensors.items()},
        available_adapters=list(program.plan.adapters),
        devices={name: _devices(own) for name, own in tensors.items()},
        quantization_backend=", ".join(sorted(map(str, backends))) or None,
        without_gradient=without_gradient(program),
        scales={name: own.scale for name, own in program.adapters.items()},
    )


def _layer(program: Program, fqn: str, edits: list[Edit]) -> LayerStatus:
    site = program.plan.sites[fqn]
    here = [edit.adapter for edit in edits]
    tensors = {edit.adapter: _tensors(program.adapters[edit.adapter].part(edit)) for edit in edits}
    quantised = site.op == "linear" and not (isinstance(site, WeightSite) and site.has_plain_weight)
    return LayerStatus(
        name=fqn,
        module_type=f"{'+'.join(dict.fromkeys(edit.rule.name for edit in edits))}.{site.module}",
        enabled=program.enabled,
        active_adapters=[name for name in program.active if name in here],
        merged_adapters=[name for name in program.merged if name in here],
        requires_grad={name: _learns(own) for name, own in tensors.items()},
        available_adapters=here,
        devices={name: _devices(own) for name, own in tensors.items()},
        quantization_backend=site.module if quantised else None,
    )


def _tensors(part: Part) -> list[Tensor]:
    return [part.tensor(param.key) for param in part.edit.params if param.trainable]


def _learns(tensors: Iterable[Tensor]) -> Learns:
    flags = {tensor.requires_grad for tensor in tensors}
    return "irregular" if len(flags) > 1 else flags == {True}


def _devices(tensors: Iterable[Tensor]) -> list[str]:
    return sorted({tensor.device.type for tensor in tensors})
