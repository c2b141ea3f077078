"""(IA)³: infused adapters by inhibiting and amplifying inner activations.  Liu et al. 2022, arXiv:2205.05638."""

from .config import IA3Config
from .rules import IA3Conv, IA3Linear

__all__ = ["RULES", "IA3Config"]

RULES = (IA3Linear(), IA3Conv())
