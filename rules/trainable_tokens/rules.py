"""Trainable tokens: the rows of an embedding, and of what is tied to it."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule, Shapes

from .config import TrainableTokensConfig

ROWS = "trainable_tokens_delta"


class _TokenRows(Rule[TrainableTokensConfig]):
    """The weight by tokens, (tokens, dim), with `rows` for the `tokens`; `places` has by token which row is its own."""

    name, spec, local, replaces_rows = "trainable_tokens", TrainableTokensConfig, "oi", True
    keys = (ROWS,)
    columns: ClassVar[Mapping[str, str]] = {"tokens": "count"}
    # The axes of the canonical weight along which tokens lie, and their dimensions.
    axes: ClassVar[tuple[str, str]]
    use: ClassVar[Literal["matrix", "lookup"]]

    def params(self, spec: TrainableTokensConfig, site: WeightSite) -> dict[str, Param]:
        (size, dim), count, (by_token, by_dim) = self.sizes(site), len(spec.token_indices), self.axes
        start = "rule" if spec.init_weights else "normal"
        return {
            "rows": Param((count, dim), start, ROWS, use=self.use, axes=f".{by_dim}"),
            "tokens": self._table(count, "token_index", "."),
            "places": self._table(size, "token_place", by_token),
        }

    def _table(self, size: int, key: str, axes: str) -> Param:
        return Param((size,), "drawn", key, use="lookup", axes=axes, dtype="int64", kept=False)

    def constants(self, spec: TrainableTokensConfig, site: WeightSite) -> dict[str, Constant]:
        return {"count": len(spec.token_indices), "token_indices": spec.token_indices}

    def check(self, spec: TrainableTokensConfig, site: WeightSite) -> str | None:
        size = self.sizes(site)[0]
        beyond = next((token for token in spec.token_indices if token >= size), None)
        if not spec.token_indices:
            return "no token is named whose row would be trained"
        if beyond is not None:
            grown = "if the vocabulary has grown, call resize_token_embeddings first, as where the adapter was trained"
            return f"token {beyond} is none of its {size}; {grown}"
        return "rows start from its weight, which is no plain parameter" if site.weight is None else None

    def sizes(self, site: WeightSite) -> tuple[int, int]:
        """How many tokens, and how long a row is."""
        both = {"o": site.out_features, "i": site.in_features}
        return both[self.axes[0]], both[self.axes[1]]

    def turned(self, weight: Tensor) -> Tensor:
        """The canonical weight by tokens, or back."""
        return weight.mT if self.axes[0] == "i" else weight

    def draw(self, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        tokens = torch.tensor(p.token_indices, device="cpu")  # Whatever the caller's default is.
        every = torch.full(shapes["places"], p.count, device="cpu")
        return {"tokens": tokens, "places": every.index_copy(0, tokens, torch.arange(p.count, device="cpu"))}

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        return {"rows": self.turned(weight)[list(p.token_indices)]}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        own = _one_more(p.rows).to(weight.dtype)[p.places]
        return self.turned(torch.where((p.places < p.count).unsqueeze(-1), own, self.turned(weight)))


class TokenRowsEmbedding(_TokenRows):
    """y, or a token's own row. As in torch's embedding, the row of the padding token gets no gradient here."""

    ops, axes, use = ("embedding",), ("i", "o"), "lookup"

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        places = p.places[x]
        padding = p.token_indices.index(p.padding_idx) if p.padding_idx in p.token_indices else p.count
        own = p.op(places, _one_more(p.rows), padding_idx=padding)
        return torch.where((places < p.count).unsqueeze(-1), own, y)


class TokenRowsLinear(_TokenRows):
    """y with what the tokens' outputs change by: nothing, bit for bit, before training."""

    ops, axes, use = ("linear",), ("o", "i"), "matrix"

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        change = F.linear(x, p.rows - p.weight[p.tokens])
        return y.index_add(-1, p.tokens, change.to(y.dtype))


def _one_more(rows: Tensor) -> Tensor:
    """`rows`, and one for all tokens that have none of their own."""
    return torch.cat([rows, torch.zeros_like(rows[:1])])
