"""AdaMSS: W + Σₖ Bₖ·Aₖ·V, for the rows of W in clusters.  Zheng et al. 2025, NeurIPS."""

from .config import AdamssConfig
from .rules import Adamss

__all__ = ["RULES", "AdamssConfig"]

RULES = (Adamss(),)
