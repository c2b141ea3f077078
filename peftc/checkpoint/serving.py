"""The serving normal form of an adapter that adds products to weights, as LoRA does: what vLLM and llama.cpp's converter
take, with equal outputs.

Every site has the same rank (smaller ones padded with zeros) and a scaling of 1 (baked into A), and the config has no
patterns. vLLM reads `r` and `lora_alpha` only (vllm/lora/peft_helper.py); llama.cpp's convert_lora_to_gguf.py only
`lora_alpha` and the tensors.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from peftc.checkpoint.state import key_of
from peftc.errors import CheckpointError
from peftc.merge.combine import target_names
from peftc.registry import rules_of
from peftc.rewrite.parts import Part
from peftc.rewrite.program import Program
from peftc.rule import Factors
from peftc.specs import AdapterSpec

# What servers read: the method that adapters are of, and the keys of its factors by op.
_METHOD = "LORA"
# Other forms of its factors, which are plain ones here, and what says that they are.
_FORMS: dict[str, Any] = {"use_bdlora": None, "kasa_config": None, "use_qalora": False, "ensure_weight_tying": False}
_KEYS = {"linear": ("lora_A.weight", "lora_B.weight"), "embedding": ("lora_embedding_A", "lora_embedding_B")}


def serving_form(
    program: Program, adapter: str, config: dict[str, Any], least_rank: int = 1
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors (by PEFT's keys) of `adapter` in normal form, of rank `least_rank` at least.

    Raises CheckpointError, naming the sites, for what servers do not take: another method than one that adds products,
    saved modules, trained biases, B with a bias, sites that are neither linear nor embeddings.
    """
    own = program.adapters[adapter]
    spec, edits = own.spec, own.edits
    if not any(rule.offers("factors") for rule in rules_of(spec)):
        raise CheckpointError(f"form='serving': {adapter!r} is {spec.peft_type}; servers take LoRA. Merge it instead.")
    reasons = [reason for part in own.parts.values() if (reason := _refusal(part))]
    if any(tensor.adapter == adapter for tensor in program.plan.trained):
        reasons.append(f"bias={config['bias']!r} trains biases of the base model")
    if reasons:
        more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
        raise CheckpointError(
            f"form='serving': {'; '.join(reasons[:3])}{more}: servers don't take that. Merge it instead."
        )
    factors = {part.edit.site: _factors(part) for part in own.parts.values()}
    r = max(least_rank, *(a.shape[0] for a, _ in factors.values()))
    tensors: dict[str, Tensor] = {}
    for edit in edits:
        a, b = factors[edit.site]
        first = edit.params[0]
        # Ends of a tie have factors each.
        stem = key_of(spec, replace(edit, saved_as=None), first).removesuffix(first.key)
        one, other = _KEYS[program.plan.sites[edit.site].op]
        tensors[stem + one] = F.pad(a, (0, 0, 0, r - a.shape[0]))
        tensors[stem + other] = F.pad(b, (0, r - b.shape[1]))
    targets = target_names(program.base, list(factors))
    plain: dict[str, Any] = {
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "init_lora_weights": True,
        "bias": "none",
    }
    plain |= {key: off for key, off in _FORMS.items() if key in config}
    selectors = {"target_modules": list(targets), "exclude_modules": None, "modules_to_save": None}
    layers = {"layers_to_transform": None, "layers_pattern": None}
    if config["peft_type"] != _METHOD:
        config = {key: config[key] for key in AdapterSpec.model_fields if key in config} | {"peft_type": _METHOD}
    return {**config, **plain, **selectors, **layers, "r": r, "lora_alpha": r, "lora_dropout": 0.0}, tensors


def _refusal(part: Part) -> str | None:
    edit, site = part.edit, part.site
    if edit.whole:
        return f"{edit.site} is saved whole (modules_to_save)"
    if site.op not in ("linear", "embedding"):
        return f"{edit.site} is a {site.op}"
    if not edit.rule.additive:
        return f"{edit.site}: {type(edit.rule).__name__} is no sum of products"
    return f"{edit.site}: lora_bias" if part.changes_bias else None


def _factors(part: Part) -> tuple[Tensor, Tensor]:
    """A and B with the scaling in A, and what an adapter started from, which is taken off, beside its own."""
    values = {name: tensor.detach() for name, tensor in part.tensors().items()}
    made = part.edit.rule.factors(part.bound(**values))
    assert isinstance(made, Factors), "the sites are those of a method that has them"
    return (made.down.double() * made.scale).to(made.down.dtype), made.up
