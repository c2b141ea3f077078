"""AdaLoRA: adaptive budget allocation.  Zhang et al. 2023, arXiv:2303.10512."""

from .config import AdaLoraConfig
from .rules import AdaLora

__all__ = ["RULES", "AdaLoraConfig"]

RULES = (AdaLora(),)
