"""Specs: what to adapt, as validated data with the field names of PEFT's `adapter_config.json`."""

from peftc.specs.base import AdapterSpec
from peftc.specs.io import load_spec, load_specs
from peftc.specs.pattern import Pattern
from peftc.specs.selection import LayerSelection, ParameterSelection, Patterned, PatternedAlpha, PatternedRank

__all__ = [
    "AdapterSpec",
    "LayerSelection",
    "ParameterSelection",
    "Pattern",
    "Patterned",
    "PatternedAlpha",
    "PatternedRank",
    "load_spec",
    "load_specs",
]
