"""Targets that were linears in transformers 4 and are fused experts now, as PEFT takes them: as parameters.

Modules that are linears still (shared experts, dense layers) stay targets beside them, which PEFT (0.21) drops.
"""

from typing import Any

from torch import nn

from peftc.checkpoint.misread import EXPERTS, experts_alike
from peftc.errors import NoMatchError
from peftc.graph.sites import transformers_config
from peftc.specs import AdapterSpec, ParameterSelection

_ROUTER = "gate"


def with_experts(model: nn.Module, spec: AdapterSpec) -> AdapterSpec:
    """`spec` with the fused experts of `model` that its targets mean. Raises NoMatchError for one of two that are fused."""
    config: Any = transformers_config(model)
    linears = EXPERTS.get(experts_alike(config.model_type), ()) if config is not None else ()
    targets: Any = spec.target_modules
    fused = [name for name, p in model.named_parameters() if p.dim() == 3 and name.endswith(".experts.gate_up_proj")]
    if not linears or not fused or not isinstance(spec, ParameterSelection) or not targets:
        return spec
    everything = targets == "all-linear"
    if isinstance(targets, str) and not everything:
        return spec
    ends = {*linears, _ROUTER} if everything else {str(name).rpartition(".")[2] for name in targets}
    gate, up, down = linears[0], linears[1], linears[2]
    if len({gate, up} & ends) == 1:
        raise NoMatchError(f"target_modules: {gate} and {up} are fused into one parameter here; name both, or neither")
    return _with(model, spec, gate in ends, down in ends, _ROUTER in ends, everything)


def _with(model: nn.Module, spec: Any, gate_up: bool, down: bool, router: bool, everything: bool) -> AdapterSpec:
    own = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    routers = [name for name, p in model.named_parameters() if name.endswith(".gate.weight") and p.dim() == 2]
    found = (
        *(("experts.gate_up_proj",) if gate_up else ()),
        *(("experts.down_proj",) if down else ()),
        *(("gate.weight",) if router and routers and _ROUTER not in own else ()),
    )
    if not found:
        return spec
    fused = {*EXPERTS["mixtral"], *EXPERTS["qwen2_moe"], _ROUTER}
    targets = spec.target_modules
    if not everything:
        targets = tuple(name for name in targets if (end := name.rpartition(".")[2]) not in fused or end in own)
    # Two linears of the rank that is asked for, one above the other.
    double = r".*\.gate_up_proj"
    patterns = {"rank_pattern": spec.r * 2, "alpha_pattern": spec.lora_alpha * 2} if gate_up else {}
    update = {key: {double: value, **getattr(spec, key)} for key, value in patterns.items()}
    parameters = (*(spec.target_parameters or ()), *found)
    return spec.model_copy(update={**update, "target_modules": targets, "target_parameters": parameters})
