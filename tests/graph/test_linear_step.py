"""A linear op with its adapters' products as one op for autograd: equal to the algebra, and little is kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import peftc
from peftc.rewrite import products
from peftc.rewrite.products import FEW, LARGE, Term, linear_with_products
from tests.support.adapters import perturb

SHAPES = {"row": (8,), "rows": (4, 8), "batch": (2, 3, 8), "none": (0, 3, 8)}


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LARGE", 0)


def terms(count: int, dtype: torch.dtype, dropout: float = 0.0) -> tuple[Term, ...]:
    """Of so many adapters, each with a scale of its own."""
    made: list[Term] = []
    for i in range(count):
        down, up = torch.randn(3, 8, dtype=dtype), torch.randn(6, 3, dtype=dtype)
        drop = nn.Dropout(dropout) if dropout else None
        made.append(((down.requires_grad_(), drop), up.requires_grad_(), 0.7 + i))
    return tuple(made)


def algebra(x: Tensor, weight: Tensor, bias: Tensor | None, own: tuple[Term, ...]) -> Tensor:
    y = F.linear(x, weight, bias)
    for inner, up, scale in own:
        assert isinstance(inner, tuple)
        down, drop = inner
        y = y + F.linear(F.linear(x if drop is None else drop(x), down) * scale, up)
    return y


def leaves(own: tuple[Term, ...]) -> list[Tensor]:
    return [factor for inner, up, _ in own for factor in (inner[0], up)]


def is_one_op(y: Tensor) -> bool:
    return "LinearStep" in str(y.grad_fn)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_algebra(shape: str, count: int, bias: bool, dropout: float) -> None:
    torch.manual_seed(0)
    own = terms(count, torch.float64, dropout)
    weight, added = torch.randn(6, 8).double(), torch.randn(6).double() if bias else None
    x = torch.randn(*SHAPES[shape]).double().requires_grad_()
    found: list[Any] = []
    for run in (algebra, linear_with_products):
        torch.manual_seed(1)
        y = run(x, weight, added, own)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *leaves(own)])))
    assert is_one_op(found[1][0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_first_and_second_derivatives(dropout: float) -> None:
    torch.manual_seed(0)
    own, weight = terms(2, torch.float64, dropout), torch.randn(6, 8).double()

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        torch.manual_seed(1)
        given = tuple(
            ((factors[2 * i], inner[1]), factors[2 * i + 1], scale) for i, (inner, _, scale) in enumerate(own)
        )
        return linear_with_products(x, weight, None, given)

    inputs = (torch.randn(2, 8).double().requires_grad_(), *leaves(own))
    assert is_one_op(run(*inputs))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("needed", ["x", "down", "up"])
def test_gradients_of_those_that_need_one(needed: str) -> None:
    """As where an adapter's first factor is frozen, and in the first layer, whose input has no gradient."""
    torch.manual_seed(0)
    own, weight = terms(1, torch.float32), torch.randn(6, 8)
    x = torch.randn(3, 8)
    every = {"x": x, "down": own[0][0][0], "up": own[0][1]}
    for name, tensor in every.items():
        tensor.requires_grad_(name == needed)
    y = linear_with_products(x, weight, None, own)
    assert is_one_op(y)
    (wanted,) = torch.autograd.grad(algebra(x, weight, None, own).square().sum(), every[needed])
    y.square().sum().backward()
    assert {name: tensor.grad is not None for name, tensor in every.items()} == {n: n == needed for n in every}
    torch.testing.assert_close(every[needed].grad, wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept(dtype: torch.dtype, dropout: float) -> None:
    """x, the weight and the factors themselves, a rank-sized product, and where it drops a bit for each number of x."""
    torch.manual_seed(0)
    own, weight = terms(2, torch.float32, dropout), torch.randn(6, 8).to(dtype)
    x = torch.randn(2, FEW, 8).to(dtype).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear_with_products(x, weight, None, own)
    there = {t.data_ptr() for t in (x, weight, *leaves(own))}
    new = [t for t in kept if t.data_ptr() not in there]
    assert sum(t.nbytes for t in new) == 2 * (2 * FEW * 3 * dtype.itemsize + (2 * FEW * 8 // 8 if dropout else 0))
    y.float().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype is torch.float32 for leaf in leaves(own))


def test_half_precision_is_near_the_exact_gradients() -> None:
    torch.manual_seed(0)
    own, weight = terms(1, torch.float32), torch.randn(6, 8).bfloat16()
    x = torch.randn(2 * FEW, 8).bfloat16().requires_grad_()
    y = linear_with_products(x, weight, None, own)
    assert is_one_op(y)
    of_y = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *leaves(own)], of_y)
    exact_own = tuple(((i[0].double(), None), up.double(), s) for i, up, s in own)
    exact_x = x.double()
    exact = torch.autograd.grad(
        algebra(exact_x, weight.double(), None, exact_own), [exact_x, *leaves(exact_own)], of_y.double()
    )
    for own_gradient, wanted in zip(found, exact, strict=True):
        error = (own_gradient.double() - wanted).abs().max() / wanted.abs().max()
        assert float(error) < 8 * torch.finfo(torch.bfloat16).eps


def test_a_trace_of_torchscript_has_plain_ops(tmp_path: Path) -> None:
    """It could not be saved with a function of Python's in it, and is to be the same with gradients and without."""
    torch.manual_seed(0)
    compiled = peftc.compile(nn.Sequential(nn.Linear(8, 6)), peftc.LoraConfig(target_modules=["0"], r=3))
    compiled = perturb(compiled).eval()
    x = torch.randn(2, 3, 8)
    traced = torch.jit.trace(compiled.base, (x,))
    assert "PythonOp" not in str(traced.inlined_graph)
    torch.jit.save(traced, tmp_path / "traced.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(x), compiled(x))


def test_who_gets_the_result_may_write_to_it() -> None:
    """As models do, and the next adapter's term."""
    torch.manual_seed(0)
    own, weight, x = terms(1, torch.float64), torch.randn(6, 8).double(), torch.randn(2, 3, 8).double()
    y = linear_with_products(x, weight, None, own)
    y.mul_(3.0)
    y[0, 0] = 1.0
    y.sum().backward()
    found = [leaf.grad for leaf in leaves(own)]
    wanted = algebra(x, weight, None, own) * 3.0
    mask = torch.ones_like(wanted)
    mask[0, 0] = 0
    torch.testing.assert_close(found, list(torch.autograd.grad((wanted * mask).sum(), leaves(own))))


def test_small_ones_are_plain_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LARGE", LARGE)
    own, weight = terms(1, torch.float32), torch.randn(6, 8)
    assert not is_one_op(linear_with_products(torch.randn(LARGE // 8 - 1, 8), weight, None, own))
    assert is_one_op(linear_with_products(torch.randn(LARGE // 8, 8), weight, None, own))


@pytest.mark.parametrize(
    "form", ["trained weight", "trained bias", "few rows", "another dropout", "all dropped", "dual numbers"]
)
def test_what_it_is_not_for_stays_plain_ops(form: str) -> None:
    """With the values of the algebra; gradients to the base are there, and derivatives of forward mode."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if form == "few rows" else torch.float32
    own, weight, bias = terms(1, torch.float32), torch.randn(6, 8).to(dtype), torch.randn(6).to(dtype)
    x = torch.randn(3, 8).to(dtype)
    if form.startswith("trained"):
        (weight if form.endswith("weight") else bias).requires_grad_()
    if form in ("another dropout", "all dropped"):
        drop = nn.AlphaDropout(0.5) if form == "another dropout" else nn.Dropout(1.0)
        own = (((own[0][0][0], drop), *own[0][1:]),)
    if form == "dual numbers":
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            found, wanted = (
                forward_ad.unpack_dual(f(dual, weight, bias, own)) for f in (linear_with_products, algebra)
            )
            torch.testing.assert_close(found, wanted)
        return
    torch.manual_seed(1)
    y = linear_with_products(x, weight, bias, own)
    assert not is_one_op(y)
    torch.manual_seed(1)
    wanted = (
        algebra(x, weight, bias, own) if form != "few rows" else algebra(x.float(), weight.float(), bias.float(), own)
    )
    torch.testing.assert_close(y.float(), wanted, rtol=2e-2 if form == "few rows" else 1e-5, atol=1e-2)
    y.float().sum().backward()
    assert (weight.grad is not None) == (form == "trained weight")
    assert (bias.grad is not None) == (form == "trained bias")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_gradients(shape: str, dtype: torch.dtype, mode: Any) -> None:
    """The same, of few rows and many, with adapters in float32; nothing but the result is written to."""
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 8).to(dtype), torch.randn(6).to(dtype)
    own = terms(2, torch.float64 if dtype is torch.float64 else torch.float32, 0.4)
    for inner, _, _ in own:
        inner[1].eval()
    for repeats in (1, 2 * FEW):
        x = torch.randn(*SHAPES[shape]).to(dtype)
        x = x.repeat(repeats, *[1] * (x.dim() - 1)) if x.dim() > 1 else x
        before = x.clone()
        with mode():
            found = linear_with_products(x, weight, bias, own)
        exact = tuple(((i[0].double(), None), up.double(), s) for i, up, s in own)
        wanted = algebra(x.double(), weight.double(), bias.double(), exact).detach()
        assert found.dtype is dtype
        assert found.shape == wanted.shape
        assert torch.equal(x, before)
        bound = 8 * torch.finfo(dtype).eps * float(wanted.abs().max()) if wanted.numel() else 0
        assert not wanted.numel() or float((found.double() - wanted).abs().max()) <= bound
