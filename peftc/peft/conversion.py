"""How transformers' `load_adapter` renames the keys of adapter files to the parameters of a model with adapters."""

import re
from collections.abc import Sequence
from typing import Any

from peftc.registry import rules_of

__all__ = ["build_peft_weight_mapping"]


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """The renamings from keys of files to parameters: no prefix, and the adapter's name after the first part of its own.

    `weight_conversions`: the model's; its renamings apply too, and what fuses weights of the base does not.
    """
    from transformers.core_model_loading import WeightRenaming

    from peftc.peft.configs import spec_of

    firsts = sorted({key for rule in rules_of(spec_of(peft_config)) for key in rule.keys}, key=len, reverse=True)
    own = [item for item in weight_conversions or () if isinstance(item, WeightRenaming)]
    named = rf"\.({'|'.join(map(re.escape, firsts))})(?=\.|$)"
    return [
        WeightRenaming(r"^base_model\.model\.", ""),
        *([WeightRenaming(named, rf".\1.{adapter_name}")] if firsts else ()),
        *own,
    ]
