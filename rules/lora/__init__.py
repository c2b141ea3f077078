"""LoRA: y + s·B(A(x)).  Hu et al. 2021, arXiv:2106.09685."""

from .alora import AloraLinear
from .bdlora import BdLoraLinear
from .config import LoraConfig
from .dora import DoraConv, DoraEmbedding, DoraLinear
from .kasa import KasaLinear
from .linear import LoraConv, LoraEmbedding, LoraLinear
from .loftq import LoftqLinear
from .parameter import LoraParameter
from .qalora import QaloraLinear
from .tied import LoraTied

__all__ = ["RULES", "LoraConfig"]

RULES = (
    *(LoraLinear(), LoraEmbedding(), LoraConv(), LoraParameter(), LoraTied()),
    *(DoraLinear(), DoraEmbedding(), DoraConv()),
    *(LoftqLinear(), AloraLinear(), QaloraLinear(), BdLoraLinear(), KasaLinear()),
)
