"""Fused: what stands in for weights, convolutions, few rows in half precision; equal to the rules' algebra in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftc
from peftc.rewrite.products import FEW, add_pointwise, convolved, linear_with_products, weight_with_product
from tests.support.adapters import perturb

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    scale = float(wanted.abs().max())
    assert float((found.double() - wanted.double()).abs().max()) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
def test_a_weight_with_a_product(lead: tuple[int, ...], dtype: torch.dtype, back: bool) -> None:
    """W + s·(left @ right), gradients of all three too; W itself stays, also where it is cast to the dtype that it has."""
    torch.manual_seed(0)
    own = torch.float64 if dtype is torch.float64 else torch.float32
    weight, left, right = (
        leaf(*lead, 6, 5, dtype=dtype),
        leaf(*lead, 6, 2, dtype=own),
        leaf(*lead, 2, 5, dtype=own),
    )
    before = weight.detach().clone()
    found = weight_with_product(weight, left, right, torch.tensor(0.7), own, back)
    assert found.dtype is (dtype if back else own)
    assert torch.equal(weight, before)
    found.double().square().sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (weight, left, right)]
    wanted = exact[0] + float(torch.tensor(0.7)) * exact[1] @ exact[2]
    wanted.square().sum().backward()
    near(found, wanted, dtype if back else own)
    for tensor, other in zip((weight, left, right), exact, strict=True):
        assert tensor.grad is not None
        assert other.grad is not None
        near(tensor.grad, other.grad, dtype)


def test_a_weight_that_broadcasts_stays_algebra() -> None:
    weight, left, right = torch.randn(4, 6, 5), torch.randn(6, 2), torch.randn(2, 5)
    found = weight_with_product(weight, left, right, 0.5, None, False)
    torch.testing.assert_close(found, weight + 0.5 * left @ right)


def test_a_weight_with_a_product_lies_as_the_weight() -> None:
    """Else a norm of it has other bits than that of the algebra, and a fresh DoRA is not the base."""
    weight, left, right = torch.randn(5, 6).mT, torch.randn(6, 2), torch.randn(2, 5)
    assert weight_with_product(weight, left, right, 0.5, None, False).stride() == (weight + 0.5 * left @ right).stride()


def test_experts_are_one_op_and_equal_the_fold() -> None:
    """An adapter on a stack of experts: as generated code and as merged."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    base = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
    names = ["experts.gate_up_proj", "experts.down_proj"]
    spec = peftc.LoraConfig(r=2, target_modules=[], target_parameters=names)
    compiled = perturb(peftc.compile(base, spec)).eval()
    codes = [m.__dict__["peftc"].code for m in compiled.base.modules() if m.__dict__.get("peftc") is not None]
    targets = [node.target for code in codes for node in code.graph.nodes]
    assert targets.count(weight_with_product) == 2
    assert torch.matmul not in targets
    ids = torch.randint(0, 64, (2, 7))
    with torch.no_grad():
        live = compiled(input_ids=ids).logits
        compiled.merge_adapter()
        torch.testing.assert_close(live, compiled(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims: int, dtype: torch.dtype, grad: bool) -> None:
    """y + s · (one-point convolution of a convolution), of y that nobody else has; gradients too."""
    torch.manual_seed(0)
    conv: Any = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    own = torch.float64 if dtype is torch.float64 else torch.float32
    x, down = leaf(2, 4, *(5,) * dims, dtype=dtype), leaf(3, 4, *(3,) * dims, dtype=own)
    base, up = leaf(6, 4, *(3,) * dims, dtype=dtype), leaf(6, 3, *(1,) * dims, dtype=own)
    options = {"stride": (1,) * dims, "padding": (1,) * dims}
    with torch.set_grad_enabled(grad):
        inner = convolved(x, down, None, options)
        found = add_pointwise(conv(x, base, **options), inner, up, 0.7, True)
    assert found.dtype is dtype
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, down, base, up)]
    wanted = conv(exact[0], exact[2], **options) + 0.7 * conv(conv(exact[0], exact[1], **options), exact[3])
    near(found, wanted, dtype)
    if grad:
        found.double().square().sum().backward()
        wanted.square().sum().backward()
        for tensor, other in zip((x, down, base, up), exact, strict=True):
            assert tensor.grad is not None
            assert other.grad is not None
            near(tensor.grad, other.grad, dtype)


@pytest.mark.parametrize("form", ["channels last", "one without a batch", "dropout", "two adapters", "groups"])
def test_convolution_sites(form: str) -> None:
    """A compiled convolution gives what the rule says, however its input lies."""
    torch.manual_seed(0)
    groups = 2 if form == "groups" else 1
    base = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=groups))
    options: dict[str, Any] = {"r": 2, "target_modules": ["0"], "lora_dropout": 0.5 if form == "dropout" else 0.0}
    names = ["a", "b"] if form == "two adapters" else ["a"]
    compiled = perturb(peftc.compile(base, {name: peftc.LoraConfig(**options) for name in names}))
    compiled.set_adapter(names)
    compiled.eval()
    x = torch.randn(4, 5, 5) if form == "one without a batch" else torch.randn(2, 4, 5, 5)
    if form == "channels last":
        x = x.to(memory_format=torch.channels_last)
    wanted = base(x)
    state = compiled.state_dict()
    for name in names:
        a, b = (next(v for k, v in state.items() if f"lora_{f}.{name}" in k) for f in "AB")
        wanted = wanted + 4.0 * F.conv2d(F.conv2d(x, a, padding=1), b, groups=groups)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 200])
def test_few_rows_of_bfloat16_are_cast_up(rows: int) -> None:
    """Then the product is that of the adapter's own numbers, which 1 + 2⁻⁹ shows; many rows have it rounded to bfloat16."""
    x = torch.ones(rows, 8, dtype=torch.bfloat16)
    down, up = torch.full((2, 8), (1 + 2**-9) / 8), torch.full((3, 2), 0.5)
    weight = torch.zeros(3, 8, dtype=torch.bfloat16)
    found = linear_with_products(x, weight, None, (((down, None), up, 1.0),))
    assert found.dtype is torch.bfloat16
    # Two halves of 1 + 2⁻⁹, less 1 in the base's weight, leave what rounding to bfloat16 would have taken.
    minus = torch.full((3, 8), -1 / 8, dtype=torch.bfloat16)
    rest = linear_with_products(x, minus, None, (((down, None), up, 1.0),))
    assert torch.equal(rest, torch.full_like(rest, 2**-9 if rows <= FEW else 0.0))
