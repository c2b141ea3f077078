"""Passes on whole programs: the same function, fewer nodes, and nothing removed that does something."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftc
from tests.support.adapters import perturb
from tests.support.programs import gradients, loss_of, program_inputs, program_model, tensors

SPEC: dict[str, Any] = {"r": 4, "target_modules": "all-linear"}


def programs(kind: str, **fields: Any) -> tuple[Any, Any, Any]:
    """The model, and its program without and with the passes."""
    model, spec = program_model(kind), peftc.LoraConfig(**{**SPEC, **fields})
    inputs = program_inputs(kind, model)
    plain = perturb(peftc.compile(model, spec, capture="export", inputs=inputs))
    fused = peftc.compile(model, spec, capture="export", inputs=inputs, passes=peftc.program_passes())
    fused.load_state_dict(plain.state_dict())
    return model, plain, fused


def ops(compiled: Any) -> Counter[str]:
    return Counter(str(getattr(node.target, "__name__", node.target)) for node in compiled.graph_of("").nodes)


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bert", "mixtral", "t5"))]
)
def test_the_function_is_the_same(kind: str) -> None:
    torch.manual_seed(0)
    model, plain, fused = programs(kind)
    inputs = program_inputs(kind, model, 3, 9)
    for training in (False, True):
        results: list[Any] = []
        for compiled in (plain.train(training), fused.train(training)):
            compiled.zero_grad()
            torch.manual_seed(1)
            results.append(compiled(**inputs))
            loss_of(results[-1]).backward()
        for name, value in tensors(results[0]).items():
            torch.testing.assert_close(tensors(results[1])[name], value, rtol=1e-5, atol=1e-5)
        expected = gradients(plain)
        for name, value in gradients(fused).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_ran_and_what_it_changed() -> None:
    """q/k/v and gate/up read one input each: five first products become two."""
    _, plain, fused = programs("llama")
    ran = {one.name: (one.before, one.after) for one in fused.passes[""]}
    assert list(ran) == ["splice", "no-ops-removed", "casts-removed", "siblings-fused", "products-fused"]
    assert ran == {
        "splice": (153, 230), "no-ops-removed": (230, 216), "casts-removed": (216, 179), "siblings-fused": (179, 190),
        "products-fused": (190, 167),
    }  # fmt: skip
    assert [ops(plain)[f] for f in ("linear_with_products", "linear.default", "linear", "to")] == [7, 1, 0, 0]
    assert [ops(fused)[f] for f in ("linear_with_products", "linear.default", "linear", "split")] == [7, 1, 2, 2]
    with fused.merged():
        assert "split" not in ops(fused)


@pytest.mark.slow
def test_masks_of_their_own_keep_siblings_apart() -> None:
    _, _, fused = programs("llama", lora_dropout=0.1)
    assert ops(fused)["split"] == 0


@pytest.mark.slow
def test_casts_that_do_something_stay() -> None:
    """A base in bfloat16 under adapters in float32."""
    model = program_model("llama").to(torch.bfloat16)
    inputs = program_inputs("llama", model)
    spec = peftc.LoraConfig(**SPEC)
    torch.manual_seed(0)
    plain = perturb(peftc.compile(model, spec, capture="export", inputs=inputs))
    fused = peftc.compile(model, spec, capture="export", inputs=inputs, passes=peftc.program_passes())
    fused.load_state_dict(plain.state_dict())
    counts = {one.name: (one.before, one.after) for one in fused.passes[""]}
    assert counts["casts-removed"] == (216, 216)  # Those of the edits do something here.
    assert fused(**inputs).logits.dtype == torch.bfloat16
    assert torch.equal(fused(**inputs).logits, plain(**inputs).logits)


@pytest.mark.slow
def test_other_ranks_run_the_same_code() -> None:
    model, plain, fused = programs("llama")
    inputs = program_inputs("llama", model)
    for compiled in (plain, fused):
        torch.manual_seed(3)
        compiled.add_adapter("wide", peftc.LoraConfig(**{**SPEC, "r": 7, "rank_pattern": {"k_proj": 2}}))
        perturb(compiled)
        compiled.set_adapter("wide")
    codes = len(fused.program.made.codes)
    torch.testing.assert_close(fused(**inputs).logits, plain(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert codes == len(plain.program.made.codes)


class Changes(nn.Module):
    """What is changed in place is no alias of what it came from, and siblings around the change read other values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + 1
        y = x * 1
        y += 1
        one = self.first(x.detach().clone())
        with torch.no_grad():
            z = x + 0
        z += 3
        return one + self.second(x) + z, y


def test_what_is_changed_in_place_stays() -> None:
    torch.manual_seed(0)
    x, spec = torch.randn(3, 4), peftc.LoraConfig(r=2, target_modules=["first", "second"])
    model = Changes()
    one = perturb(peftc.compile(model, spec))
    other = peftc.compile(model, spec, capture="export", inputs={"x": x}, passes=peftc.program_passes())
    other.load_state_dict(one.state_dict())
    for ours, theirs in zip(other(x), one(x), strict=True):
        torch.testing.assert_close(ours, theirs)
