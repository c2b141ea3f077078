"""Skinny products, fused: the same function as the rules' plain algebra, with less kept and fewer casts."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import peftc
from peftc.rewrite import masks, products
from peftc.rewrite.fusion import ProductsFused
from peftc.rewrite.products import add_product, linear_with_products, product
from peftc.rewrite.splice import ORIGIN, Origin
from tests.support.adapters import perturb

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Root(nn.Module):
    """What a graph of these tests reads: a part `a0`, and a weight of the base."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = (nn.Parameter(torch.randn(*shape).double()) for shape in ((6, 8), (6,)))
        self.a0 = nn.Module()
        for name, shape in {"A": (3, 8), "B": (6, 3), "A0": (3, 8), "B0": (6, 3), "v": (6,)}.items():
            holder = nn.Module()
            holder.register_parameter("w", nn.Parameter(torch.randn(*shape).double()))
            self.a0.add_module(name, holder)
        self.a0.scaling = torch.tensor(0.7, dtype=torch.float64)
        self.a0.drop = nn.Dropout(dropout)


Read = Callable[[str], fx.Proxy]
# By name: what a rule may say, with what reads a part's tensors, and which ops come of it.
FORMS: dict[str, tuple[Callable[[fx.Proxy, fx.Proxy, Read], Any], list[Any]]] = {
    "lora": (lambda x, y, r: y + F.linear(F.linear(x, r("A.w")) * r("scaling"), r("B.w")), [linear_with_products]),
    "scale outside": (
        lambda x, y, r: y + F.linear(F.linear(x, r("A.w")), r("B.w")) * r("scaling"),
        [linear_with_products],
    ),
    "no scale": (lambda x, y, r: y + F.linear(F.linear(x, r("A.w")), r("B.w")), [linear_with_products]),
    "two terms": (
        lambda x, y, r: y + (F.linear(F.linear(x, r("A.w")), r("B.w")) + F.linear(F.linear(x, r("A0.w")), r("B0.w"))),
        [linear_with_products],
    ),
    "a difference": (
        lambda x, y, r: y + (F.linear(F.linear(x, r("A.w")), r("B.w")) - F.linear(F.linear(x, r("A0.w")), r("B0.w"))),
        [F.linear, operator.add],
    ),
    "a term that is no product": (
        lambda x, y, r: y + (F.linear(F.linear(x, r("A.w")) * r("scaling"), r("B.w")) + r("v.w") * r("scaling")),
        [linear_with_products, operator.add],
    ),
    "an input of its own": (
        lambda x, y, r: y + F.linear(F.linear(x.relu(), r("A.w")), r("B.w")),
        [linear_with_products],
    ),
    "an inner that is no product": (lambda x, y, r: y + F.linear(x[..., :3], r("B.w")), [linear_with_products]),
    "y read twice": (
        lambda x, y, r: y * 2 + (y + F.linear(F.linear(x, r("A.w")), r("B.w"))),
        [F.linear, add_product, operator.add],
    ),
    "scaled by a vector": (
        lambda x, y, r: y + r("v.w") * F.linear(F.linear(x, r("A.w")), r("B.w")),
        [F.linear, operator.add],
    ),
}


def traced(form: Callable[[fx.Proxy, fx.Proxy, Read], Any]) -> fx.Graph:
    """The graph of a linear op with `form` after it, as the splicer marks it."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    x = fx.Proxy(graph.placeholder("x"), tracer)
    y = F.linear(x, *(fx.Proxy(graph.get_attr(name), tracer) for name in ("weight", "bias")))  # pyright: ignore
    bare = set(graph.nodes)
    result = form(x, y, lambda name: fx.Proxy(graph.get_attr(f"a0.{name}"), tracer))
    for node in graph.nodes:
        if node not in bare:
            node.meta[ORIGIN] = Origin("a0", "rule", "output")
    graph.output(result.node)
    return graph


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 3, 8), (0, 3, 8)], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, shape: tuple[int, ...], frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form gives what it says, gradients too, and comes to the ops that it should."""
    monkeypatch.setattr(products, "LARGE", 0)
    form, expected = FORMS[name]
    root = Root()
    root.weight.requires_grad_(not frozen)
    root.bias.requires_grad_(not frozen)
    plain = fx.GraphModule(root, traced(form))
    fused = fx.GraphModule(root, ProductsFused()(traced(form)))
    fused.graph.lint()
    targets = [node.target for node in fused.graph.nodes]
    for target in (F.linear, linear_with_products, add_product, operator.add):
        assert (target in targets) == (target in expected), target
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (plain, fused):
        y = module(x)
        y.square().sum().backward()
        results.append((y, x.grad, [p.grad for p in root.parameters()]))
        x.grad = None
        root.zero_grad(set_to_none=True)
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_a_weight_that_trains_and_an_input_that_lies_otherwise() -> None:
    graph = ProductsFused()(traced(FORMS["lora"][0]))
    module = fx.GraphModule(Root(), graph)
    for x in (torch.randn(8, 5, 2).double().permute(2, 1, 0), torch.randn(3, 16).double()[:, ::2]):
        assert not x.is_contiguous()
        y = F.linear(x, module.weight, module.bias)
        torch.testing.assert_close(module(x), y + 0.7 * x @ module.a0.A.w.T @ module.a0.B.w.T)
    assert torch.autograd.gradcheck(module, torch.randn(2, 8).double().requires_grad_())
    assert torch.autograd.gradgradcheck(module, torch.randn(2, 8).double().requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """A half-precision base under adapters in float32: near the exact value, and gradients in float32."""
    torch.manual_seed(0)
    y, x = torch.randn(5, 6).to(dtype), torch.randn(5, 8).to(dtype)
    a, b = torch.randn(3, 8, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    exact = y.double() + 0.5 * x.double() @ a.double().T @ b.double().T
    found = add_product(y.clone(), product(x, a), b, 0.5, True)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), exact, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    found.float().sum().backward()
    for leaf in (a, b):
        assert leaf.grad is not None
        assert leaf.grad.dtype is torch.float32
    # What float16 has no range for is computed in float32: 60,000² overflows it.
    large = torch.full((1, 8), 6e4).to(dtype)
    tiny = add_product(
        torch.zeros(1, 6, dtype=dtype), product(large, torch.ones(3, 8)), torch.full((6, 3), 1e-6), 1.0, True
    )
    assert tiny.isfinite().all()


def test_a_dropout_is_that_of_torch_and_keeps_bits() -> None:
    """For the same seed the same mask, gradients likewise; what is kept is x itself and a bit for each of its numbers."""
    x = torch.randn(4, 37, 24, requires_grad=True)
    a = torch.randn(3, 24, requires_grad=True)
    drop = nn.Dropout(0.3)
    results = []
    for run in (lambda: F.linear(drop(x), a), lambda: product(x, a, drop)):
        torch.manual_seed(1)
        y = run()
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, a))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-4)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        product(x, a, drop)
    own = {t.untyped_storage().data_ptr() for t in (x, a)}
    assert sum(t.nbytes for t in kept if t.untyped_storage().data_ptr() not in own) == x.numel() // 8
    drop.eval()
    assert torch.equal(product(x, a, drop), F.linear(x, a))


def test_gradients_of_a_dropped_product_and_theirs() -> None:
    def dropped(x: Tensor, down: Tensor) -> Tensor:
        torch.manual_seed(0)
        return product(x, down, nn.Dropout(0.5))

    inputs = [torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (2, 3)]
    assert torch.autograd.gradcheck(dropped, inputs)
    assert torch.autograd.gradgradcheck(dropped, inputs)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1000])
def test_bits(count: int) -> None:
    mask = torch.rand(count) < 0.5
    bits = masks.packed(mask.float())
    assert bits.numel() == -(-count // 8)
    assert torch.equal(masks.unpacked(bits, mask.float()).bool(), mask)


def net(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> peftc.CompiledModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8, bias=False)).to(dtype)
    spec = peftc.LoraConfig(target_modules=["0", "2"], r=3, lora_dropout=dropout, init_lora_weights=False)
    return perturb(peftc.compile(model, spec))


def gradients(model: peftc.CompiledModel, run: Callable[[], Tensor]) -> list[Tensor]:
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    run().float().square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_draw_the_same_mask_again(reentrant: bool) -> None:
    model, x = net(0.4), torch.randn(5, 8, requires_grad=True)
    plain = gradients(model, lambda: model(x))
    again = gradients(model, lambda: checkpoint(model, x, use_reentrant=reentrant))
    assert len(plain) == 4
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_x_once_and_keeps_gradients_in_float32(dtype: torch.dtype) -> None:
    model, x = net(0.4), torch.randn(2, 5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = model(x)
        assert y.dtype is dtype
    kept = gradients(model, lambda: model(x))

    def run() -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(x)

    for found, expected in zip(gradients(model, run), kept, strict=True):
        assert found.dtype is torch.float32
        assert (found - expected).norm() < 0.05 * expected.norm()
    wide = torch.randn(5, 8, dtype=torch.float64)
    with torch.autocast("cpu", dtype):
        assert net(dtype=torch.float64).eval()(wide).dtype is torch.float64


def test_functorch_runs_the_plain_algebra() -> None:
    """Per-sample gradients, and one call for several values of an adapter, whose outputs no base output has room for."""
    model, x = net(), torch.randn(4, 8)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(own: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, own, (row[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    whole = torch.func.grad(lambda own: sum(loss(own, row) for row in x))(params)
    torch.testing.assert_close({name: g.sum(0) for name, g in each.items()}, whole)
    several = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    both = torch.func.vmap(lambda own: torch.func.functional_call(model, own, (x,)))(several)
    torch.testing.assert_close(both[0], model(x))


def test_a_compiler_sees_plain_ops_and_other_scales_compile_nothing() -> None:
    model, x = net(), torch.randn(4, 8)
    counted: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        counted.append(graph)
        return graph.forward

    compiled = torch.compile(model.base, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), model(x))
    model.add_adapter("b", peftc.LoraConfig(target_modules=["0", "2"], r=3, lora_alpha=40, init_lora_weights=False))
    model.set_adapter("b")
    torch.testing.assert_close(compiled(x), model(x))
    assert len(counted) == 1
    assert "addmm_" not in str(counted[0].graph)


def test_an_opaque_linear_is_added_to_out_of_place() -> None:
    """What a module of another kind returns may be its own; it is not written over."""

    class Keeps(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = super().forward(x) if x.sum() > -1e9 else x
            return self.seen

    model = nn.Sequential(Keeps(8, 8))
    compiled = peftc.compile(model, peftc.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    x = torch.randn(3, 8)
    y = compiled(x)
    bare = F.linear(x, model[0].weight, model[0].bias)
    assert not torch.allclose(y, bare)
    if compiled.plan.edits[0].slots == ("output",):
        assert torch.equal(compiled.base[0].seen, bare)
