"""Rules whose change of the weight is a product of two matrices: what follows from that alone."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from peftc.rule import Factors, Rule, S


class Product(Rule[S]):
    """W + s·(up @ down), as `factors` says: the weight and the call of a linear site follow. Its `drops` are of the input.

    Example::

        class Pair(Product[PairConfig]):
            name, spec, ops, drops = "pair", PairConfig, ("linear",), ("pair_dropout",)

            def params(self, spec, site):
                return {"a": Param((4, site.in_features), "normal"), "b": Param((site.out_features, 4))}

            def factors(self, p):
                return Factors(p.b, p.a, 1.0)
    """

    additive = True

    def factors(self, p: Any) -> Factors:
        raise NotImplementedError

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        up, down, scale = self.factors(p)
        return weight + scale * (up @ down)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        up, down, scale = self.factors(p)
        for name in self.drops:
            x = getattr(p, name)(x)
        return y + F.linear(F.linear(x, down) * scale, up)
