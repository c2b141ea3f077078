"""The basis that the weights of one kind share, and of which kind a weight is."""

from collections.abc import Sequence

import torch
from torch import Tensor


def basis(weights: Sequence[Tensor], ridge: float) -> Tensor:
    """V (in, in), so that each of `weights` is U·diag(l)·Vᵀ: the one of a higher-order generalised SVD."""
    stacked = torch.cat(list(weights))
    if stacked.shape[0] < stacked.shape[1]:
        return torch.linalg.svd(stacked)[2].mT
    q, r = torch.linalg.qr(stacked)
    eye = torch.eye(len(r))
    inverses = sum(torch.linalg.inv(own.mT @ own + ridge * eye) for own in q.split([len(w) for w in weights]))
    return r.mT @ torch.linalg.eigh(inverses / len(weights))[1]


def kind_of(name: str) -> str:
    """What a module is, by the end of its name."""
    parts = name.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    # The output of BERT's attention is no other layer's.
    return "attention_output" if parts[-3:] == ["attention", "output", "dense"] else "_".join(parts[-2:])


def layer_of(name: str, number: int) -> int:
    """The layer a module is in: after `layers`, else the first number in its name, else its own."""
    parts = name.split(".")
    after = parts[parts.index("layers") + 1 : parts.index("layers") + 2] if "layers" in parts else []
    return next((int(part) for part in (*after, *parts) if part.isdigit()), number)
