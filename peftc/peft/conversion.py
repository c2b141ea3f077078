"""How transformers' `load_adapter` renames the keys of adapter files to the parameters of a model with adapters."""

import re
from collections.abc import Sequence
from typing import Any

from peftc.registry import companions_of, rules_of

__all__ = ["build_peft_weight_mapping"]


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """The renamings from keys of files to parameters: no prefix, and the adapter's name after the first part of its own.

    `weight_conversions`: the model's; its renamings apply too, and what fuses weights of the base does not.
    """
    from transformers.core_model_loading import WeightRenaming

    from peftc.peft.configs import spec_of

    spec = spec_of(peft_config)
    firsts = sorted({key for rule in rules_of(spec) for key in rule.keys}, key=len, reverse=True)
    inside = {one.kept_in for one in companions_of(spec)} - {None}
    own = [item for item in weight_conversions or () if isinstance(item, WeightRenaming)]
    named = rf"\.({'|'.join(map(re.escape, firsts))})(?=\.|$)"
    return [
        WeightRenaming(r"^base_model\.model\.", ""),
        *(WeightRenaming(rf"\.{name}\.", ".") for name in inside),
        *([WeightRenaming(named, rf".\1.{adapter_name}")] if firsts else ()),
        *own,
    ]
