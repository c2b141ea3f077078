"""check_rule finds what is wrong: each law is broken once."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import peftc
from peftc.testing import check_rule


class PlusConfig(peftc.AdapterSpec):
    peft_type: Any = "PLUS"


class Plus(peftc.Rule[PlusConfig]):
    """W + g·u vᵀ, in both forms."""

    name, spec, ops, local, additive = "plus", PlusConfig, ("linear",), "oi", True

    def params(self, spec: PlusConfig, site: Any) -> dict[str, peftc.Param]:
        return {
            "u": peftc.Param((site.out_features, 1), "zeros", axes="o."),
            "v": peftc.Param((1, site.in_features), "normal", axes=".i"),
        }

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight + p.u @ p.v

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return y + F.linear(F.linear(x, p.v), p.u)


def test_a_rule_that_keeps_the_laws_passes_all_of_them() -> None:
    done = check_rule(Plus())
    assert len(done) == 3 * 11
    assert "linear (in × out): tiles equal the whole" in done


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "identity": (
        {
            "params": lambda self, spec, site: {
                **Plus.params(self, spec, site),
                "u": peftc.Param((site.out_features, 1), "ones"),
            }
        },
        "a fresh adapter is the identity",
    ),
    "form": (
        {"output": lambda self, x, y, p: y + 1.01 * F.linear(F.linear(x, p.v), p.u)},
        "the call equals the merged",
    ),
    "gradient": (
        {"output": lambda self, x, y, p: y + F.linear(F.linear(x, p.v.detach()), p.u)},
        "gradients are those of the weight: v gets no gradient",
    ),
    "tiles": (
        {
            "weight": lambda self, weight, p: weight + p.u @ p.v + p.u.sum() * 0.1,
            "output": peftc.Rule.output,
            "slots": lambda *_: ("weight",),
        },
        "tiles equal the whole",
    ),
    "half": (
        {"output": lambda self, x, y, p: y + F.linear(F.linear(x, p.v), p.u).to(torch.float16).to(y.dtype) * 1.0},
        "half precision|merged weight's",
    ),
    "no weight": ({"weight": peftc.Rule.weight}, "declares no weight"),
    "constant": (
        {"weight": lambda self, weight, p: weight, "output": lambda self, x, y, p: y},
        "moved parameters change nothing",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_rule_is_found(fault: str) -> None:
    changes, message = BROKEN[fault]
    rule = type("Broken", (Plus,), changes)()
    with pytest.raises(peftc.RuleError, match=message):
        check_rule(rule)


def test_prompt_methods_and_rules_that_accept_nothing_are_told_so() -> None:
    from peftc.registry import rules

    prompt = next(rule for rule in rules() if isinstance(rule, peftc.PromptRule))
    with pytest.raises(peftc.RuleError, match="declares no weight"):
        check_rule(prompt)
    picky = type("Picky", (Plus,), {"check": lambda self, spec, site: "not today"})()
    with pytest.raises(peftc.RuleError, match="accepts no case of its ops"):
        check_rule(picky)
