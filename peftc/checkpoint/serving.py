"""The serving normal form of a LoRA adapter: what vLLM and llama.cpp's converter take, with equal outputs.

Every site has the same rank (smaller ones padded with zeros) and a scaling of 1 (baked into A), and the config has no
patterns. vLLM reads `r` and `lora_alpha` only (vllm/lora/peft_helper.py); llama.cpp's convert_lora_to_gguf.py only
`lora_alpha` and the tensors.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from peftc.checkpoint.spelling import key_prefix
from peftc.checkpoint.state import key_of
from peftc.errors import CheckpointError
from peftc.graph.sites import Site
from peftc.merge.combine import target_names
from peftc.plan import Edit
from peftc.registry import find_rule
from peftc.rewrite.program import Program
from peftc.rule import Bound, Combination, Part
from peftc.specs import LoraConfig

_EXACT = Combination("cat")


def serving_form(program: Program, adapter: str, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors (by PEFT's keys) of `adapter` in normal form.

    Raises CheckpointError, naming the sites, for what servers do not take: another method than LoRA, saved modules,
    trained biases, B with a bias, sites that are neither linear nor embeddings.
    """
    spec, edits = program.plan.adapters[adapter], program.edits[adapter]
    if not isinstance(spec, LoraConfig):
        raise CheckpointError(f"form='serving': {adapter!r} is {spec.peft_type}; servers take LoRA. Merge it instead.")
    reasons = [reason for edit in edits if (reason := _refusal(program.plan.sites[edit.site], edit))]
    if any(tensor.adapter == adapter for tensor in program.plan.trained):
        reasons.append(f"bias={spec.bias!r} trains biases of the base model")
    if reasons:
        more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
        raise CheckpointError(
            f"form='serving': {'; '.join(reasons[:3])}{more}: servers don't take that. Merge it instead."
        )
    factors = {edit.site: _factors(program, edit) for edit in edits}
    r = max(a.shape[0] for a, _ in factors.values())
    prefix = key_prefix(spec)
    tensors: dict[str, Tensor] = {}
    for edit in edits:
        a, b = factors[edit.site]
        keys = [prefix + key_of(edit, param) for param in edit.params if param.trainable]
        tensors[keys[0]] = F.pad(a, (0, 0, 0, r - a.shape[0]))
        tensors[keys[1]] = F.pad(b, (0, r - b.shape[1]))
    targets = target_names(program.base, list(factors))
    plain = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True, "bias": "none"}
    selectors = {"target_modules": list(targets), "exclude_modules": None, "modules_to_save": None}
    layers = {"layers_to_transform": None, "layers_pattern": None}
    return {**config, **plain, **selectors, **layers, "r": r, "lora_alpha": r, "lora_dropout": 0.0}, tensors


def _refusal(site: Site, edit: Edit) -> str | None:
    if edit.slot == "module":
        return f"{edit.site} is saved whole (modules_to_save)"
    if site.kind not in ("linear", "embedding"):
        return f"{edit.site} is a {site.kind}"
    return f"{edit.site}: lora_bias" if edit.constants["biased"] else None


def _factors(program: Program, edit: Edit) -> tuple[Tensor, Tensor]:
    """A and B with the scaling in A, and what an adapter started from, which is taken off, beside its own."""
    site = program.plan.sites[edit.site]
    rule = find_rule(program.plan.adapters[edit.adapter], site)
    assert rule is not None, "the plan was made with it"
    values = {param.name: program.tensor(edit, param.key).detach() for param in edit.params}
    made = rule.combine(site, [Part(1.0, Bound({**values, **edit.constants}))], _EXACT)
    a, b = (made[param.name].to(values[param.name].dtype) for param in edit.params if param.trainable)
    return a, b
