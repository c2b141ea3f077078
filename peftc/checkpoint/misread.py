"""Files that peft reads as something else: what a person who saves them should know."""

from collections.abc import Mapping
from typing import Any

from peftc.graph.sites import transformers_config
from peftc.registry import rules_of
from peftc.rewrite.program import Program

# What peft (0.21, utils/transformers_weight_conversion.py) takes for linears of single experts wherever they are, by the
# model type whose checkpoints are laid out alike: the two that are fused, and the third.
EXPERTS: Mapping[str, tuple[str, str, str]] = {
    "mixtral": ("w1", "w3", "w2"),
    "qwen2_moe": ("gate_proj", "up_proj", "down_proj"),
}


def misread_by_peft(program: Program, adapter: str) -> str | None:
    """What peft makes of sites of `adapter` that it takes for experts (shared ones, dense layers); None if nothing."""
    config, spec = transformers_config(program.base), program.adapters[adapter].spec
    if config is None or not any(rule.offers("factors") for rule in rules_of(spec)):
        return None
    ends = EXPERTS.get(experts_alike(config.model_type), ())
    lost = [
        edit.site
        for edit in program.adapters[adapter].edits
        if edit.site.rpartition(".")[2] in ends and not edit.whole and program.plan.sites[edit.site].op == "linear"
    ]
    if not lost:
        return None
    return (
        f"{adapter!r} adapts {lost[0]}{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}. peft (0.21) takes"
        f" {', '.join(ends)} of a {config.model_type} for linears of its fused experts: there, and in load_adapter of"
        " transformers, the file loads without them, and with fresh factors on the experts. Load it with peftc, or merge it"
    )


def experts_alike(model_type: str) -> str:
    """The model type whose checkpoints those of `model_type` are laid out like."""
    from transformers import conversion_mapping

    found: Any = vars(conversion_mapping).get("_MODEL_TO_CONVERSION_PATTERN", {})
    return "mixtral" if model_type == "mixtral" else str(found.get(model_type, ""))
