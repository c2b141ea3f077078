"""Token rows: some rows of an embedding are trained, and those of a head too, which has the same."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from peftc import AdapterSpec, Param, Rule
from peftc.specs.base import LayerIndices


class TokenRowsConfig(AdapterSpec):
    """`token_indices`: the rows."""

    peft_type: Literal["TEST_TOKEN_ROWS"] = "TEST_TOKEN_ROWS"
    token_indices: LayerIndices = (1, 3)


class TokenRows(Rule[TokenRowsConfig]):
    """The rows stand for the base's; sites that are adapted together have the same ones."""

    name, spec, ops = "test_token_rows", TokenRowsConfig, ("embedding", "linear")

    def params(self, spec: TokenRowsConfig, site: Any) -> dict[str, Param]:
        return {"token_index": Param((len(spec.token_indices),), "rule", trainable=False, dtype="int64")}

    def shared(self, spec: TokenRowsConfig, sites: Sequence[Any]) -> dict[str, Param]:
        dim = sites[0].out_features if sites[0].op == "embedding" else sites[0].in_features
        return {"token_rows": Param((len(spec.token_indices), dim), "rule", use="lookup")}

    def constants(self, spec: TokenRowsConfig, site: Any) -> dict[str, Any]:
        return {"token_indices": spec.token_indices, "axis": 1 if site.op == "embedding" else 0}

    def initialise(self, weight: Tensor, shapes: Mapping[str, tuple[int, ...]], p: Any) -> dict[str, Tensor]:
        index = torch.tensor(p.token_indices, device=weight.device)
        return {"token_index": index, "token_rows": (weight.mT if p.axis else weight)[index]}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight.index_copy(p.axis, p.token_index, (p.token_rows.mT if p.axis else p.token_rows).to(weight.dtype))
