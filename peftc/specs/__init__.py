"""Specs: what to adapt, as validated data with the field names of PEFT's `adapter_config.json`."""

from peftc.specs.base import AdapterSpec
from peftc.specs.io import load_spec, load_specs
from peftc.specs.pattern import Pattern
from peftc.specs.selection import LayerSelection, OtherPatterns, ParameterSelection, PatternedAlpha, PatternedRank

__all__ = [
    "AdapterSpec",
    "LayerSelection",
    "OtherPatterns",
    "ParameterSelection",
    "Pattern",
    "PatternedAlpha",
    "PatternedRank",
    "load_spec",
    "load_specs",
]
