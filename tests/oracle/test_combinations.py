"""add_weighted_adapter against peft: every combination type, on every kind of layer that its own combines."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from tests.support.compare import randomise, to_peft
from tests.support.models import Everything, tiny

TARGETS = ["linear", "transposed", "conv2d", "embed"]
PRUNED = {"density": 0.4}
CASES: dict[str, dict[str, Any]] = {
    "svd": {},
    "svd of rank 3": {"svd_rank": 3},
    "svd clamped": {"svd_clamp": 0.8, "svd_full_matrices": False},
    "linear": {},
    "cat": {},
    "ties": PRUNED,
    "ties by count": {**PRUNED, "majority_sign_method": "frequency"},
    "ties_svd": PRUNED,
    "dare_linear": PRUNED,
    "dare_ties": PRUNED,
    "dare_linear_svd": {**PRUNED, "svd_rank": 2},
    "dare_ties_svd": PRUNED,
    "magnitude_prune": PRUNED,
    "magnitude_prune whole": {"density": 1.0},
    "magnitude_prune_svd": PRUNED,
}


def product(state: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """B·A of the site whose A has this key."""
    return state[key.replace("_A", "_B")].flatten(1) @ state[key].flatten(1)


def combine(model: Any, weights: list[float], options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["default", "b", "c"][: len(weights)], weights, "sum", **options)


@pytest.mark.parametrize("weights", [[0.7, 1.3, 0.2], [1.0, -0.5, 2.0]], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_lora_combinations_equal_peft(
    case: str, weights: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same entries are dropped, whatever else has drawn random numbers before, and whichever way a delta lies.
    real = torch.bernoulli

    def same(p: torch.Tensor) -> torch.Tensor:
        flat = p.flatten(1)
        lying = flat.shape[0] < flat.shape[1]
        kept = real((flat.T if lying else flat).contiguous(), generator=torch.Generator().manual_seed(p.numel()))
        return (kept.T if lying else kept).reshape(p.shape)

    monkeypatch.setattr(torch, "bernoulli", same)
    model = Everything().eval()
    specs = {
        "default": peftc.LoraConfig(r=3, target_modules=TARGETS),
        "b": peftc.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS),
        "c": peftc.LoraConfig(r=3, lora_alpha=-2, target_modules=TARGETS[:2]),
    }
    compiled = peftc.compile(model, specs)
    randomise(compiled)
    theirs: Any = to_peft(compiled, model, tmp_path)
    options = {"combination_type": case.split(" ")[0], **CASES[case]}
    combine(compiled, weights, options)
    combine(theirs.base_model, weights, options)
    expected = {key.replace(".sum", ""): value.detach() for key, value in theirs.state_dict().items() if ".sum" in key}
    state = compiled.adapter_state_dict("sum")
    keys = [key for key in state if "_A" in key]
    assert len(keys) == 4
    for key in keys:
        ours, other = product(state, key).detach(), product(expected, key)
        assert other.abs().max() > 0.01
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()), msg=key)


@pytest.mark.parametrize("kind", ["svd", "magnitude_prune_svd"])
def test_the_rank_of_a_decomposition_is_the_largest_of_any_site(kind: str, tmp_path: Path) -> None:
    """So it is in peft: a site of a smaller rank has room for the sum of both."""
    model = Everything().eval()
    specs = {
        "default": peftc.LoraConfig(r=4, rank_pattern={"linear": 2}, target_modules=TARGETS),
        "b": peftc.LoraConfig(r=2, rank_pattern={"conv2d": 3}, target_modules=TARGETS),
    }
    compiled = peftc.compile(model, specs)
    randomise(compiled)
    theirs: Any = to_peft(compiled, model, tmp_path)
    options = {"combination_type": kind, **(PRUNED if kind != "svd" else {})}
    combine(compiled, [0.7, -1.3], options)
    combine(theirs.base_model, [0.7, -1.3], options)
    expected = {key.replace(".sum", ""): value.detach() for key, value in theirs.state_dict().items() if ".sum" in key}
    state = compiled.adapter_state_dict("sum")
    keys = [key for key in state if "_A" in key]
    assert len(keys) == 4
    for key in keys:
        assert state[key].shape == expected[key].shape, key
        ours, other = product(state, key).detach(), product(expected, key)
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()), msg=key)


def test_ia3_combinations_equal_peft(tmp_path: Path) -> None:
    model = tiny("llama")
    modules, feedforward = ["k_proj", "v_proj", "down_proj"], ["down_proj"]
    specs = {
        "default": peftc.IA3Config(target_modules=modules, feedforward_modules=feedforward),
        "b": peftc.IA3Config(target_modules=modules[1:], feedforward_modules=feedforward),
        "c": peftc.IA3Config(target_modules=modules[:1], feedforward_modules=[]),
    }
    compiled = peftc.compile(model, specs)
    randomise(compiled)
    theirs: Any = to_peft(compiled, model, tmp_path)
    combine(compiled, [0.5, -1.5, 2.0], {})
    combine(theirs.base_model, [0.5, -1.5, 2.0], {})
    expected = {key: value for key, value in theirs.state_dict().items() if key.endswith(".sum")}
    state = compiled.adapter_state_dict("sum")
    assert len(state) == len(expected) == 9
    for key, value in state.items():
        torch.testing.assert_close(value.detach(), expected[f"{key}.sum"])
