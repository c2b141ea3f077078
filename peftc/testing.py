"""What authors of rules test with: `check_rule` holds a rule to the laws, on every op and layout that it serves."""

import copy
import pickle
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import peftc
from peftc.errors import PeftcError, RuleError
from peftc.graph.sites import WeightSite, canonical
from peftc.merge.fold import fold_of, value_in
from peftc.registry import rules
from peftc.rewrite.parts import weight_of
from peftc.rule import Bound, Rule
from peftc.specs import AdapterSpec, ParameterSelection

# Units in the last place of half precision that a faster form may be off from the weight's form, relative to the largest
# output: sums of a few products, each rounded.
_ULPS = 16


@dataclass(frozen=True)
class _Case:
    """A model of one site, `inner.site`, and an input for it in float64; `layout` tells cases of one op apart."""

    op: str
    layout: str
    model: nn.Module
    x: Tensor

    def __str__(self) -> str:
        return f"{self.op} ({self.layout})"


class _Wrapped(nn.Module):
    """A model around one site."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"site": site})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["site"](x) * 1.5


class _ScaleNorm(nn.Module):
    """A norm of no op in the table, as models write their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class _Experts(nn.Module):
    """One matrix, or one for each of three experts, used in a way of its own."""

    def __init__(self, experts: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, 8) if experts else torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (
            torch.einsum("...i,eoi->...eo", x, self.w) if self.w.dim() == 3 else torch.einsum("bti,oi->bto", x, self.w)
        )


def _cases(op: str) -> Iterator[_Case]:
    from transformers.pytorch_utils import Conv1D

    rows = torch.randn(3, 5, 8, dtype=torch.float64)
    made: dict[str, list[tuple[str, Callable[[], nn.Module], Tensor]]] = {
        "linear": [
            ("out × in", lambda: nn.Linear(8, 6), rows),
            ("no bias", lambda: nn.Linear(8, 6, bias=False), rows),
            ("in × out", lambda: Conv1D(6, 8), rows),
        ],
        "embedding": [("in × out", lambda: nn.Embedding(8, 6), torch.randint(0, 8, (3, 5)))],
        "conv1d": [("out × in", lambda: nn.Conv1d(8, 6, 3, padding=1), rows.mT)],
        "conv2d": [("strided", lambda: nn.Conv2d(8, 6, 3, stride=2), torch.randn(3, 8, 7, 7).double())],
        "conv3d": [("out × in", lambda: nn.Conv3d(8, 6, 2), torch.randn(3, 8, 4, 4, 4).double())],
        "norm": [
            ("an op", lambda: nn.LayerNorm(8), rows),
            ("no op", lambda: _ScaleNorm(8), rows),
        ],
        "parameter": [("matrix", lambda: _Experts(False), rows), ("experts", lambda: _Experts(True), rows)],
    }
    for layout, build, x in made.get(op, ()):
        yield _Case(op, layout, _Wrapped(build()).double().eval(), x)


def check_rule(
    rule: Rule[Any],
    spec: AdapterSpec | None = None,
    seed: int = 0,
    modules: Mapping[str, tuple[nn.Module, Tensor]] | None = None,
) -> list[str]:
    """Hold `rule` to the laws on every op and layout that it serves, and return what was looked at.

    A fresh adapter is the identity (if `rule.identity`); the call equals the merged weight's, in float64 to 1e-12 and in
    half precision within 16 units in the last place; gradients equal those through `rule.weight`; tiles equal the whole;
    merging is undone bit for bit; saved and loaded, copied, pickled and planned on the meta device it is the same; rows
    of a mixed batch equal those alone.

    `spec`: for methods whose spec has required fields; its targets are replaced. `modules`: by op, a module that is one
    and an input for it (batch first), for ops that peftc does not bring. The rule need not be registered.

    Raises RuleError, naming the law and the op, at the first that does not hold.

    Example: peftc.testing.check_rule(Gain())
    """
    if not rule.offers("weight"):
        raise RuleError(f"check_rule: {type(rule).__name__} declares no weight, which is what the laws are about")
    done: list[str] = []
    with _registered(rule), torch.random.fork_rng(devices=[]):
        for op in rule.ops:
            torch.manual_seed(seed)
            for case in (*_cases(op), *_given(op, modules or {})):
                own = _spec(rule, spec, case)
                if own is None or _refused(case, own):
                    continue
                laws = {law: check for law, check in _LAWS.items() if check not in _OF_FOLDS or _folds(case, own)}
                for law, check in laws.items():
                    torch.manual_seed(seed + 1)
                    try:
                        check(rule, case, own)
                    except AssertionError as error:
                        raise RuleError(f"check_rule: {type(rule).__name__} on {case}: {law}: {error}") from error
                    done.append(f"{case}: {law}")
    if not done:
        raise RuleError(f"check_rule: {type(rule).__name__} accepts no case of its ops ({', '.join(rule.ops)})")
    return done


def _given(op: str, modules: Mapping[str, tuple[nn.Module, Tensor]]) -> Iterator[_Case]:
    if op in modules:
        module, x = modules[op]
        wide = x.double() if x.is_floating_point() else x
        yield _Case(op, "given", _Wrapped(copy.deepcopy(module)).double().eval(), wide)


@contextmanager
def _registered(rule: Rule[Any]) -> Generator[None]:
    known = rule in rules()
    if not known:
        peftc.register(rule)
    try:
        yield
    finally:
        if not known:
            peftc.unregister(rule)


def _spec(rule: Rule[Any], spec: AdapterSpec | None, case: _Case) -> AdapterSpec | None:
    by_name = case.op == "parameter"
    if by_name and not issubclass(rule.spec, ParameterSelection):
        return None
    targets: dict[str, Any] = {"target_modules": () if by_name else ("site",)}
    if by_name:
        targets["target_parameters"] = ("site.w",)
    filled: dict[str, Any] = {name: () for name in rule.spec.defaulted if name not in targets}
    return rule.spec(**{**filled, **targets}) if spec is None else spec.model_copy(update={**filled, **targets})


def _refused(case: _Case, spec: AdapterSpec) -> bool:
    """Whether the rule itself says that it does not serve this site."""
    return not peftc.plan(case.model, spec).edits


def _folds(case: _Case, spec: AdapterSpec) -> bool:
    """Whether the rule itself says that the adapter at this site can be merged."""
    return all(edit.unmergeable is None for edit in peftc.plan(case.model, spec).edits)


def _compiled(case: _Case, spec: AdapterSpec, dtype: torch.dtype = torch.float64, trained: bool = True) -> Any:
    compiled = peftc.compile(copy.deepcopy(case.model).to(dtype), spec)
    return _trained(compiled) if trained else compiled


def _trained(compiled: Any) -> Any:
    """The adapters as if they had been trained; what follows from their tensors follows from the new ones."""
    for name in compiled.peft_config:
        moved = {
            key: tensor + 0.3 * torch.randn(tensor.shape, dtype=torch.float64).to(tensor.dtype)
            if tensor.is_floating_point()
            else tensor.clone()
            for key, tensor in compiled.adapter_state_dict(name).items()
        }
        peftc.set_peft_model_state_dict(compiled, moved, name)
    return compiled


def _input(case: _Case, dtype: torch.dtype) -> Tensor:
    return case.x.to(dtype) if case.x.is_floating_point() else case.x


def _close(found: Tensor, expected: Tensor, within: float, what: str) -> None:
    error = float((found.double() - expected.double()).abs().max().detach())
    scale = max(1.0, float(expected.double().abs().max().detach()))
    assert error <= within * scale, f"{what} differ by {error:.3g}, of {scale:.3g}"


def _fresh(rule: Rule[Any], case: _Case, spec: AdapterSpec) -> None:
    if rule.identity:
        compiled = _compiled(case, spec, trained=False)
        assert torch.equal(compiled(case.x), case.model(case.x)), "the output is another"


def _forward_is_fold(rule: Rule[Any], case: _Case, spec: AdapterSpec) -> None:
    compiled = _compiled(case, spec)
    y = compiled(case.x)
    assert not torch.equal(y, case.model(case.x)), "moved parameters change nothing"
    with compiled.merged():
        _close(compiled(case.x), y, 1e-12, "outputs before and after merging")


def _half(rule: Rule[Any], case: _Case, spec: AdapterSpec) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        compiled, exact = _compiled(case, spec, dtype), _compiled(case, spec, torch.float64, trained=False)
        exact.load_state_dict({name: tensor.double() for name, tensor in compiled.state_dict().items()})
        x = _input(case, dtype)
        y = compiled(x)
        assert y.dtype == dtype, f"{dtype} comes out as {y.dtype}"
        _close(
            y,
            exact(_input(case, torch.float64) if not x.is_floating_point() else x.double()),
            _ULPS * torch.finfo(dtype).eps,
            f"{dtype} and float64",
        )


def _gradients(rule: Rule[Any], case: _Case, spec: AdapterSpec) -> None:
    compiled = _compiled(case, spec)
    part = next(iter(compiled.program.adapters["default"].parts.values()))
    cotangent = torch.randn_like(compiled(case.x))
    (compiled(case.x) * cotangent).sum().backward()
    found = {param.name: part.tensor(param.key).grad for param in part.edit.params if param.trainable}
    values = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in part.tensors().items()}
    y = _by_weight(compiled, part, values, case.x)
    expected = torch.autograd.grad((y * cotangent).sum(), [values[name] for name in found])
    for (name, own), gradient in zip(found.items(), expected, strict=True):
        assert own is not None, f"{name} gets no gradient"
        _close(own, gradient, 1e-9, f"gradients of {name}")


def _by_weight(compiled: Any, part: Any, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The model's output with the weight and bias that the rule's own algebra gives."""
    site, base = cast(WeightSite, part.site), compiled.base
    parameter = weight_of(base.get_submodule(site.owner), site)
    assert parameter is not None
    p = {**values, **part.edit.constants}
    stored = canonical(parameter.detach(), site)
    weight = canonical(part.edit.rule.weight(stored, Bound(p, {"weight": lambda: stored})), site)
    new = {str(site.weight): weight}
    if site.bias is not None:
        bias = base.get_parameter(site.bias).detach()
        new[site.bias] = part.edit.rule.bias(bias, Bound(p, {"bias": lambda: bias, "weight": lambda: stored}))
    plain = compiled.unload()
    return torch.func.functional_call(plain, new, (x,))


def _tiles(rule: Rule[Any], case: _Case, spec: AdapterSpec) -> None:
    compiled = _compiled(case, spec)
    part = next(iter(compiled.program.adapters["default"].parts.values()))
    site = cast(WeightSite, part.site)
    weight = weight_of(compiled.base.get_submodule(site.owner), site)
    assert weight is not None
    weight = weight.detach()
    fold = fold_of(site, [part.edit], weight, value_in(compiled.program), size=max(1, weight.numel() // 3))
    whole = fold.new(slice(0, len(weight)), "", weight)
    for piece, axis in fold.parts:
        _close(fold.new(piece, axis, weight[piece]), whole[piece], 1e-10, "a piece and the whole fold")


def _undone(rule: Rule[Any], case: _Case, spec: AdapterSpec) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for mode in ("keep", "residual"):
            compiled = _compiled(case, spec, dtype)
            before = {name: tensor.clone() for name, tensor in compiled.state_dict().items()}
            compiled.merge_adapter(undo=mode)
            compiled.unmerge_adapter()
            for name, tensor in compiled.state_dict().items():
                assert torch.equal(tensor, before[name]), f"{name} in {dtype} after undo={mode!r}"


def _files(rule: Rule[Any], case: _Case, spec: AdapterSpec) -> None:
    compiled = _compiled(case, spec)
    with tempfile.TemporaryDirectory() as folder:
        compiled.save_pretrained(folder)
        again = peftc.load(copy.deepcopy(case.model), folder)
    assert torch.equal(again(case.x), compiled(case.x)), "the output is another"


def _copies(rule: Rule[Any], case: _Case, spec: AdapterSpec) -> None:
    compiled = _compiled(case, spec)
    for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert torch.equal(other(case.x), compiled(case.x)), "the output is another"
        other.set_adapter([])
        assert torch.equal(other(case.x), case.model(case.x)), "the base's output is another"


def _meta(rule: Rule[Any], case: _Case, spec: AdapterSpec) -> None:
    planned = peftc.plan(copy.deepcopy(case.model).to("meta"), spec)
    assert planned.edits == peftc.plan(case.model, spec).edits, "the plan is another"
    peftc.compile(copy.deepcopy(case.model).to("meta"), spec)


def _mixed(rule: Rule[Any], case: _Case, spec: AdapterSpec) -> None:
    compiled = _trained(peftc.compile(copy.deepcopy(case.model), {"a": spec, "b": spec}))
    names = ["a", "__base__", "b"]
    try:
        with torch.no_grad():
            together = compiled(case.x, adapter_names=names)
    except PeftcError:
        assert case.op == "parameter", "rows can't have adapters of their own"
        return
    for row, name in enumerate(names):
        compiled.set_adapter([] if name == "__base__" else name)
        _close(together[row], compiled(case.x)[row], 1e-10, f"row {row} in a batch and alone")


def _symbolic(rule: Rule[Any], case: _Case, spec: AdapterSpec) -> None:
    if case.op == "parameter" or case.layout == "no op":
        return
    compiled = _compiled(case, spec)
    flat = peftc.compile(copy.deepcopy(case.model), spec, capture="symbolic")
    flat.load_state_dict(compiled.state_dict())
    _close(flat(case.x), compiled(case.x), 1e-12, "the flat graph's output and the host's")


_LAWS: Mapping[str, Callable[[Rule[Any], _Case, AdapterSpec], None]] = {
    "a fresh adapter is the identity": _fresh,
    "the call equals the merged weight's": _forward_is_fold,
    "half precision is near float64": _half,
    "gradients are those of the weight": _gradients,
    "tiles equal the whole": _tiles,
    "merging is undone bit for bit": _undone,
    "saved and loaded it is the same": _files,
    "copied and pickled it is the same": _copies,
    "it plans and compiles on the meta device": _meta,
    "rows of a mixed batch are what they are alone": _mixed,
    "one flat graph gives the same": _symbolic,
}
# What only a rule can hold to that folds.
_OF_FOLDS = (_forward_is_fold, _gradients, _tiles, _undone)
