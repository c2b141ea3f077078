"""AdaMSS: W + Σₖ Bₖ·Aₖ·V, for the rows of W in cluster k; the bias is one more column.  Zheng et al. 2025, section 3."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from peftc.errors import CheckpointError
from peftc.graph.sites import WeightSite
from peftc.rule import BySite, Constant, Param, Rule, Shapes

from .budget import act
from .config import AdamssConfig
from .subspaces import clusters, decomposed, directions, padded

_INTEGERS = ("adamss_rows", "adamss_sizes")


class Adamss(Rule[AdamssConfig]):
    """On linear sites, with the factors of all subspaces in one tensor each.

    `adamss_rows` are the rows of the weight in the order of those of B, cluster by cluster; `adamss_sizes` says of each
    subspace how many rows it has, its rank, and whether it learns.
    """

    name, spec, ops, additive = "adamss", AdamssConfig, ("linear",), True
    keys = ("adamss_A", "adamss_B", "adamss_newB", *_INTEGERS)
    columns: ClassVar[Mapping[str, str]] = {"r": "r", "subspaces": "subspaces"}
    takes = "subspaces"
    repeats = False

    def params(self, spec: AdamssConfig, site: WeightSite) -> dict[str, Param]:
        (r, count, columns), rank = _sizes(spec, site), spec.subspace_rank
        return {
            "adamss_A": Param((count, rank, r), "rule"),
            "adamss_B": Param((site.out_features, rank), "rule"),
            "adamss_newB": Param((r, columns), "rule", trainable=False),
            "adamss_rows": Param((site.out_features,), "rule", trainable=False, dtype="int32", use="lookup"),
            "adamss_sizes": Param((count, 3), "rule", trainable=False, dtype="int32", use="lookup"),
        }

    def constants(self, spec: AdamssConfig, site: WeightSite) -> dict[str, Constant]:
        r, count, _ = _sizes(spec, site)
        return {
            "r": r,
            "subspaces": count,
            "rank": spec.subspace_rank,
            "inputs": site.in_features,
            "outputs": site.out_features,
            "biased": site.bias is not None,
            "threshold": float(spec.svd_threshold) if spec.use_dynamic_rank else -1.0,
            "noise": 0.0 if spec.init_weights else 0.01,
            "random_seed": spec.random_seed,
            "adaptive": spec.use_asa,
        }

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        weight = weight.float() if p.bias is None else torch.cat([weight, p.bias[:, None]], dim=1).float()
        left, right = decomposed(weight, p.r, p.random_seed)
        places = clusters(left, p.subspaces)
        sizes = torch.tensor([len(rows) for rows in places])
        given = p.loaded.get("adamss_sizes")
        if given is not None and given[:, 0].tolist() != sizes.tolist():
            raise CheckpointError(
                f"adamss_B: the file's subspaces have {given[:, 0].tolist()} rows, those of this weight {sizes.tolist()}."
                " It is of another base, or was made by another version of scikit-learn; save it with peftc where it loads,"
                " and the file says which rows they are"
            )
        threshold = None if p.threshold < 0 else float(p.threshold)
        found = [directions(left[rows], p.rank, threshold) for rows in places]
        ranks = torch.tensor([len(one) for one in found])
        b = p.noise * torch.randn(shapes["adamss_B"])
        return {
            "adamss_A": torch.stack([padded(one, p.rank) for one in found]),
            "adamss_B": b * (torch.arange(p.rank) < ranks.repeat_interleave(sizes)[:, None]),
            "adamss_newB": right,
            "adamss_rows": torch.cat(places),
            "adamss_sizes": torch.stack([sizes, ranks, torch.ones_like(sizes)], dim=1),
        }

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        up, down = _factors(p)
        return weight + up @ (down @ p.adamss_newB[:, : p.inputs])

    def bias(self, bias: Tensor, p: Any) -> Tensor:
        up, down = _factors(p)
        return bias + up @ (down @ p.adamss_newB[:, p.inputs])

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        up, down = _factors(p)
        x = F.linear(x, p.adamss_newB[:, : p.inputs])
        return y + F.linear(F.linear(x + p.adamss_newB[:, p.inputs] if p.biased else x, down), up)

    def after_step(self, spec: AdamssConfig, tensors: BySite, step: int, state: dict[str, Any]) -> None:
        if spec.use_asa:
            act(spec, tensors, step, state)

    def filed(self, spec: AdamssConfig, tensors: BySite, state: Mapping[str, Any]) -> tuple[AdamssConfig, BySite]:
        return spec, {site: _apart(own) for site, own in tensors.items()}


def _sizes(spec: AdamssConfig, site: WeightSite) -> tuple[int, int, int]:
    """The rank of the decomposition, the number of subspaces, and that of columns, of which the bias is one."""
    columns = site.in_features + (site.bias is not None)
    return min(spec.r, site.out_features, columns), min(spec.num_subspaces, site.out_features), columns


def _factors(p: Any) -> tuple[Tensor, Tensor]:
    """B (out, K·rank), a block for each subspace, and A (K·rank, r); of a subspace that has stopped without gradient."""
    sizes = p.adamss_sizes.long()
    # By ops that take tensors laid out over processes: numbers out of a tensor that is laid out so.
    number = torch.ones_like(p.adamss_rows).cumsum(0)
    of = (number[:, None] > sizes[:, 0].cumsum(0)).sum(1)
    a, b = p.adamss_A, p.adamss_B
    if p.rank > 1:  # Of a lower rank, the others are there to make it one tensor.
        b = b * (torch.ones_like(b).cumsum(1) <= sizes[of, 1][:, None])
    if p.adaptive:
        learns = sizes[:, 2] == 1
        a = torch.where(learns[:, None, None], a, a.detach())
        b = torch.where(learns[of][:, None], b, b.detach())
    blank = b.new_zeros(p.outputs, p.subspaces, p.rank)
    return blank.index_put((p.adamss_rows.long(), of), b).flatten(1), a.flatten(0, 1)


def _apart(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What files hold of a site: the factors of each subspace by themselves."""
    made = {"adamss_newB": own["adamss_newB"], "adamss_rows": own["adamss_rows"]}
    sizes: list[list[int]] = own["adamss_sizes"].tolist()
    rows = own["adamss_B"].split([size for size, _, _ in sizes])
    for number, (_, rank, _) in enumerate(sizes):
        made[f"adamss_A.{number}"] = own["adamss_A"][number, :rank].contiguous()
        made[f"adamss_B.{number}"] = rows[number][:, :rank].contiguous()
    return made
