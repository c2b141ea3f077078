"""Weighted combinations: exact where they have an exact meaning, and refused whole where they have none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import peftc
from tests.support.adapters import perturb
from tests.support.models import Everything, token_ids
from tests.support.snapshots import assert_unchanged, snapshot
from tests.support.strategies import laws

LINEARS = ["linear", "transposed", "embed", "conv1d", "conv2d", "conv3d"]


def deltas(compiled: peftc.CompiledModel, name: str) -> dict[str, Tensor]:
    """What adapter `name` adds to every weight, in float64, from its own parameters."""
    found: dict[str, Tensor] = {}
    for edit in compiled.program.adapters[name].edits:
        values = {p.name: compiled.program.adapters[name].tensor(edit, p.key).detach().double() for p in edit.params}
        a = values.get("lora_A", values.get("lora_embedding_A"))
        b = values.get("lora_B", values.get("lora_embedding_B"))
        assert a is not None
        assert b is not None
        delta = torch.einsum("or,ri...->oi...", b.flatten(1), a)
        if "lora_A0" in values:
            delta = delta - values["lora_B0"] @ values["lora_A0"]
        found[edit.site] = delta * edit.constants["scaling"]
    return found


def assert_exact_sum(compiled: peftc.CompiledModel, weights: dict[str, float], tolerance: float = 1e-6) -> None:
    parts = {name: deltas(compiled, name) for name in weights}
    result = deltas(compiled, "sum")
    assert set(result) == {site for part in parts.values() for site in part}
    for site, delta in result.items():
        exact = sum(weights[name] * part[site] for name, part in parts.items() if site in part)
        assert isinstance(exact, Tensor)
        error = (delta - exact).abs().max() / exact.abs().max()
        assert error <= tolerance, (site, float(error))


@laws
@given(
    st.lists(st.tuples(st.integers(1, 4), st.floats(0.5, 8), st.booleans()), min_size=1, max_size=3),
    st.lists(st.floats(-2, 2).filter(lambda w: abs(w) > 0.01), min_size=3, max_size=3),
    st.sampled_from(["cat", "svd"]),
    st.sampled_from(["pissa", "olora", True]),
)
def test_cat_and_svd_of_full_rank_are_the_exact_sum(
    adapters: list[tuple[int, float, bool]], weights: list[float], kind: str, init: Any
) -> None:
    """Other ranks, scalings, rsLoRA, targets and starts in each."""
    torch.manual_seed(0)
    targets = [LINEARS, LINEARS[:3], LINEARS[2:]] if init is True else [["linear", "transposed"]] * 3
    specs = {
        f"n{i}": peftc.LoraConfig(
            r=r, lora_alpha=alpha, use_rslora=rs, target_modules=targets[i], init_lora_weights=init if i == 0 else True
        )
        for i, (r, alpha, rs) in enumerate(adapters)
    }
    compiled = perturb(peftc.compile(Everything(), specs))
    chosen = dict(zip(specs, weights, strict=False))
    options = {"svd_rank": 40} if kind == "svd" else {}
    compiled.add_weighted_adapter(list(chosen), list(chosen.values()), "sum", kind, **options)
    assert_exact_sum(compiled, chosen)


@pytest.mark.parametrize("kind", ["", "svd", "cat", "linear", "ties", "dare_linear", "magnitude_prune_svd"])
@pytest.mark.parametrize("rslora", [True, False])
def test_one_adapter_is_taken_as_it_is(kind: str, rslora: bool) -> None:
    compiled = perturb(peftc.compile(Everything(), peftc.LoraConfig(target_modules=LINEARS, r=3, use_rslora=rslora)))
    for name, weight in (("sum", 1.0), ("less", -0.5)):
        compiled.add_weighted_adapter(["default"], [weight], name, kind, density=0.5)
    assert_exact_sum(compiled, {"default": 1.0})
    for site, delta in deltas(compiled, "less").items():
        torch.testing.assert_close(delta, -0.5 * deltas(compiled, "default")[site], rtol=1e-5, atol=1e-7)


def test_a_rank_for_every_site() -> None:
    """cat adds up what is there; patterns of the parts do not leak."""
    specs = {
        "a": peftc.LoraConfig(target_modules=["linear", "conv2d"], r=2, rank_pattern={"linear": 5}),
        "b": peftc.LoraConfig(target_modules=["linear", "conv1d"], r=3, alpha_pattern={"linear": 7}),
    }
    compiled = perturb(peftc.compile(Everything(), specs))
    compiled.add_weighted_adapter(["a", "b"], [1, 2], "sum", "cat")
    ranks = {edit.site: edit.constants["r"] for edit in compiled.program.adapters["sum"].edits}
    assert ranks == {"linear": 8, "conv1d": 3, "conv2d": 2}
    assert {edit.constants["scaling"] for edit in compiled.program.adapters["sum"].edits} == {1.0}
    assert_exact_sum(compiled, {"a": 1, "b": 2})


def test_ranks_of_sites_with_names_inside_each_other() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.block = nn.Linear(8, 10), nn.ModuleDict({"fc": nn.Linear(8, 8), "other": nn.Linear(8, 8)})

    ranks = {"fc": 3, "block.fc": 8}
    spec = peftc.LoraConfig(target_modules=["fc", "other"], r=8, rank_pattern={"block.fc": 8, "fc": 3})
    compiled = perturb(peftc.compile(Nested(), {"a": spec, "b": peftc.LoraConfig(target_modules=["other"], r=8)}))
    compiled.add_weighted_adapter(["a"], [1], "sum")
    assert {e.site: e.constants["r"] for e in compiled.program.adapters["sum"].edits} == {**ranks, "block.other": 8}
    assert_exact_sum(compiled, {"a": 1})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_precisions(dtype: torch.dtype) -> None:
    specs = {n: peftc.LoraConfig(target_modules=["linear", "conv2d"], r=2) for n in "ab"}
    compiled = perturb(peftc.compile(Everything().to(dtype), specs, autocast_adapter_dtype=False))
    for kind in ("cat", "svd"):
        compiled.add_weighted_adapter(["a", "b"], [0.5, -1], "sum", kind, svd_rank=4 if kind == "svd" else None)
        assert_exact_sum(compiled, {"a": 0.5, "b": -1}, tolerance=16 * torch.finfo(dtype).eps)
        compiled.delete_adapter("sum")


def test_convolutions_in_groups_are_put_together_group_by_group() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    compiled = perturb(peftc.compile(model, {n: peftc.LoraConfig(target_modules=["0"], r=4) for n in "ab"}).double())
    x, outputs = torch.randn(2, 4, 5, 5).double(), {}
    for kind in ("cat", "linear"):
        compiled.add_weighted_adapter(["a", "b"], [2, -0.5], kind, kind)
    for name in ("a", "b", "cat"):
        compiled.set_adapter(name)
        outputs[name] = compiled(x) - model.double()(x)
    torch.testing.assert_close(outputs["cat"], 2 * outputs["a"] - 0.5 * outputs["b"])
    with pytest.raises(peftc.AdapterError, match="convolution in groups"):
        compiled.add_weighted_adapter(["a", "b"], [1, 1], "svd")


def test_the_combination_is_an_adapter_like_any(tmp_path: Path) -> None:
    specs = {
        "a": peftc.LoraConfig(target_modules=["linear"], r=2, lora_bias=True, modules_to_save=["head"]),
        "b": peftc.LoraConfig(target_modules=["linear"], r=3, lora_bias=True),
    }
    model = Everything().eval()
    compiled = perturb(peftc.compile(model, specs))
    before = compiled.active_adapters
    compiled.add_weighted_adapter(["a", "b"], [0.5, 2], "sum", "cat")
    assert compiled.active_adapters == before
    assert not any(p.requires_grad for n, p in compiled.named_parameters() if ".sum." in n)
    state = compiled.adapter_state_dict("sum")
    head = compiled.adapter_state_dict("a")["base_model.model.head.weight"]
    assert torch.equal(state["base_model.model.head.weight"], head)
    compiled.set_adapter("sum")
    y = compiled(token_ids())
    compiled.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(peftc.load(model, tmp_path / "sum")(token_ids()), y)
    biases = {n: compiled.adapter_state_dict(n)["base_model.model.linear.lora_B.bias"] for n in ("a", "b", "sum")}
    scale = {n: compiled.program.adapters[n].edits[0].constants["scaling"] for n in ("a", "b")}
    expected = 0.5 * scale["a"] * biases["a"] + 2 * scale["b"] * biases["b"]
    torch.testing.assert_close(biases["sum"], expected)


def test_ia3_files_of_combinations_load(tmp_path: Path) -> None:
    specs = {n: peftc.IA3Config(target_modules=["linear", "conv2d"], feedforward_modules=["linear"]) for n in "ab"}
    model = Everything().eval()
    compiled = perturb(peftc.compile(model, specs))
    compiled.add_weighted_adapter(["a", "b"], [0.25, 0.75], "sum")
    compiled.set_adapter("sum")
    compiled.save_pretrained(tmp_path)
    assert torch.equal(peftc.load(model, tmp_path / "sum")(token_ids()), compiled(token_ids()))


REFUSED: dict[str, tuple[list[str], Any, dict[str, Any], str]] = {
    "no adapter": ([], [], {}, "no adapter given"),
    "unknown": (["a", "x"], [1, 1], {}, "no adapter 'x'"),
    "twice": (["a", "a"], [1, 1], {}, "each once"),
    "weights": (["a", "b"], [1], {}, "a list of as many numbers"),
    "nan": (["a", "b"], [1, float("nan")], {}, "the weight of 'b' is nan"),
    "type": (["a", "b"], [1, 1], {"combination_type": "mean"}, "'mean': lora has svd, cat, linear"),
    "methods": (["a", "ia3"], [1, 1], {}, "adapters of one method"),
    "prompt": (
        ["p"],
        [1],
        {},
        "add_weighted_adapter: adapters of few methods have a weighted sum; prompt_tuning has none",
    ),
    "density": (["a", "b"], [1, 1], {"combination_type": "ties"}, "needs a density in [0, 1]"),
    "no density": (["a", "b"], [1, 1], {"combination_type": "dare_ties", "density": 0}, "above 0"),
    "sign": (["a", "b"], [1, 1], {"majority_sign_method": "most"}, "valid are 'total' and 'frequency'"),
    "rank": (["a", "b"], [1, 1], {"svd_rank": 0}, "svd_rank=0 is no positive integer"),
    "clamp": (["a", "b"], [1, 1], {"svd_clamp": 3}, "is a quantile"),
    "driver": (["a", "b"], [1, 1], {"svd_driver": "gesvd"}, "no CUDA device"),
    "ranks": (["a", "c"], [1, 1], {"combination_type": "linear"}, "needs equal ranks, there are 'a' r=2, 'c' r=3"),
    "saved": (["a", "b"], [1, 1], {}, "both save head whole"),
    "biases": (["a", "biased"], [1, 1], {}, "'biased' trains biases"),
    "too large": (["a", "c"], [1e39, 1e39], {"combination_type": "cat"}, "gives NaN or Inf"),
    "one number": (["a"], 1.0, {}, "a list of as many numbers"),
    "words": (["a"], ["1"], {}, "a list of as many numbers"),
    "half a rank": (["a", "c"], [1, 1], {"svd_rank": 2.5}, "svd_rank=2.5 is no positive integer"),
    "a word": (["a", "b"], [1, 1], {"combination_type": "ties", "density": "x"}, "got 'x'"),
    "loftq": (["loftq"], [0.5], {}, "stand on a quantised weight each"),
    "kasa": (["kasa"], [0.5], {"combination_type": "linear"}, "take triplets off the weight each"),
    "forms": (["a", "dora"], [1, 1], {"combination_type": "linear"}, "('a' plain LoRA, 'dora' use_dora)"),
    "forms of one": (["a", "loftq"], [1, 1], {}, "('a' plain LoRA, 'loftq' init_lora_weights='loftq')"),
    "taken": (["a", "c"], [1, 1], {"adapter_name": "b"}, "exists already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_and_changes_nothing(case: str) -> None:
    adapters, weights, options, message = REFUSED[case]
    saved = ["head"] if case == "saved" else None
    specs = {
        "a": peftc.LoraConfig(target_modules=["linear"], r=2, modules_to_save=saved),
        "b": peftc.LoraConfig(target_modules=["linear"], r=2, modules_to_save=saved),
        "c": peftc.LoraConfig(target_modules=["linear"], r=3),
        "ia3": peftc.IA3Config(target_modules=["linear"], feedforward_modules=[]),
        "biased": peftc.LoraConfig(target_modules=["linear"], r=2, bias="lora_only"),
        "dora": peftc.LoraConfig(target_modules=["linear"], r=2, use_dora=True),
        "kasa": peftc.LoraConfig(target_modules=["linear"], r=2, kasa_config={}),
        "loftq": peftc.LoraConfig(
            target_modules=["linear"], r=2, init_lora_weights="loftq", loftq_config={"loftq_bits": 4}
        ),
    }
    if case == "prompt":
        from tests.support.models import tiny

        compiled = peftc.compile(
            tiny("llama"), {"p": peftc.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")}
        )
    else:
        compiled = perturb(peftc.compile(Everything(), specs))
    before, plan = snapshot(compiled), compiled.plan
    with pytest.raises(peftc.AdapterError) as caught:
        compiled.add_weighted_adapter(adapters, weights, options.pop("adapter_name", "sum"), **options)
    assert message in str(caught.value)
    assert_unchanged(compiled, before)
    assert compiled.plan == plan
