"""Poly: every task has its own mixture of the LoRAs of some skills.  Ponti et al. 2022, arXiv:2202.13914, section 3."""

from collections.abc import Mapping
from math import sqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.rule import Argument, Constant, Param, Rule
from peftc.specs import AdapterSpec
from peftc.specs.selection import Count, Rank


class PolyConfig(AdapterSpec):
    """Skills that tasks share. Ponti et al. 2022, arXiv:2202.13914; `n_splits` > 1: Caccia et al. 2022, arXiv:2211.03831.

    A call takes `task_ids`, the number of each row's task (below `n_tasks`), which says how the row's LoRA of rank `r` is
    mixed from those of `n_skills` skills: by learned parts, which are drawn around what was learned while training.
    `n_splits` of the inputs, and of the outputs, have mixtures of their own.

    Example: PolyConfig(r=8, n_tasks=3, n_skills=4, target_modules=["q_proj", "v_proj"])
    """

    defaults_of = "LORA"

    peft_type: Literal["POLY"] = "POLY"
    r: Rank = 8
    init_weights: bool = True
    poly_type: Literal["poly"] = "poly"
    n_tasks: Count = 1
    n_skills: Count = 4
    n_splits: Count = 1


class Poly(Rule[PolyConfig]):
    """y + x·A(task)·B(task)/r on linear sites."""

    name, spec, ops = "poly", PolyConfig, ("linear",)
    keys = ("poly_lora_A", "poly_lora_B", "poly_router")
    arguments: ClassVar[Mapping[str, Argument]] = {"task_ids": Argument("n_tasks")}
    columns: ClassVar[Mapping[str, str]] = {"r": "r", "skills": "n_skills"}

    def params(self, spec: PolyConfig, site: WeightSite) -> dict[str, Param]:
        r, splits, skills = spec.r, spec.n_splits, spec.n_skills
        d_in, d_out = site.in_features // splits, site.out_features // splits
        return {
            "poly_lora_A": Param((splits, skills, d_in, r), f"uniform:{1 / sqrt(d_in)}"),
            "poly_lora_B": Param(
                (splits, skills, r, d_out), "zeros" if spec.init_weights else f"uniform:{1 / sqrt(r)}"
            ),
            "logits": Param(
                (spec.n_tasks, splits * skills), "uniform:0.001", "poly_router.module_logits", use="lookup"
            ),
        }

    def constants(self, spec: PolyConfig, site: WeightSite) -> dict[str, Constant]:
        return {"r": spec.r, "n_tasks": spec.n_tasks, "n_skills": spec.n_skills, "n_splits": spec.n_splits}

    def dropouts(self, spec: PolyConfig, site: WeightSite) -> dict[str, float]:
        return {"poly_training": 0.5}  # It is not applied: it tells training from evaluation.

    def check(self, spec: PolyConfig, site: WeightSite) -> str | None:
        if site.in_features % spec.n_splits or site.out_features % spec.n_splits:
            return f"n_splits={spec.n_splits} does not divide its {site.in_features} inputs and {site.out_features} outputs"
        return None

    def cannot_fold(self, spec: PolyConfig, site: WeightSite) -> str | None:
        return "every task has a weight of its own, and the rows of a batch may be of several"

    def cautions(self, constants: Mapping[str, Constant], slots: Any) -> list[str]:
        return [f"a call has to have task_ids, below {constants['n_tasks']}"]

    def parts(self, tasks: Tensor, p: Any) -> Tensor:
        """How much of every skill the `tasks` (rows,) take: (rows, splits, skills). While training they are drawn, as
        relaxed Bernoulli variables of temperature 1.
        """
        logits = p.logits[tasks].unflatten(-1, (p.n_splits, p.n_skills))
        tiny = torch.finfo(torch.float32).eps
        drawn = torch.logit(torch.rand_like(logits).clamp(tiny, 1 - tiny))
        live = p.poly_training(torch.ones_like(logits)) != 1
        parts = torch.sigmoid(logits + torch.where(live, drawn, torch.zeros_like(drawn)))
        return parts / (parts.sum(-1, keepdim=True) + 1e-12)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        parts = self.parts(p.task_ids(x), p)
        a = torch.einsum("bqs,qsdr->bqdr", parts, p.poly_lora_A).flatten(1, 2)
        b = torch.einsum("bqs,qsrd->brqd", parts, p.poly_lora_B).flatten(2, 3)
        hidden = torch.einsum("b...i,bir->b...r", x, a)
        return y + torch.einsum("b...r,bro->b...o", hidden, b) / p.r
