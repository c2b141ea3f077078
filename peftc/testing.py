"""What authors of rules test with: `check_rule` holds a rule to the laws, on every op and layout that it serves."""

import copy
import pickle
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

import peftc
from peftc.errors import PeftcError, RuleError
from peftc.graph.sites import WeightSite, canonical
from peftc.merge.fold import fold_of, value_in
from peftc.registry import rules
from peftc.rewrite.parts import Part, weight_of
from peftc.rule import Bound, Rule
from peftc.specs import AdapterSpec, ParameterSelection
from peftc.testing_cases import Case, cases_of

# Units in the last place of half precision that a faster form may be off from the weight's form, relative to the largest
# output: sums of a few products, each rounded.
_ULPS = 16


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

    `spec`: for methods whose spec has required fields, and for rules that serve some flags of it; its targets are
    replaced. `modules`: by op, a module that is one and an input for it (batch first), for ops that peftc does not bring.
    The rule need not be registered.

    Raises RuleError, naming the law and the op, at the first that does not hold.

    Example: peftc.testing.check_rule(Gain())
    """
    if not rule.offers("weight"):
        raise RuleError(f"check_rule: {type(rule).__name__} declares no weight, which is what the laws are about")
    done: list[str] = []
    others: dict[Rule[Any], None] = {}
    with _registered(rule), torch.random.fork_rng(devices=[]):
        for op in rule.ops:
            torch.manual_seed(seed)
            for case in cases_of(op, rule, modules or {}):
                own = _spec(rule, spec, case)
                chosen = _chosen(case, own) if own is not None else []
                others |= {other: None for other in chosen if other != rule}
                if own is None or rule not in chosen:
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
        told = ", ".join(type(other).__name__ for other in others)
        raise RuleError(
            f"check_rule: {type(rule).__name__} accepts no case of its ops ({', '.join(rule.ops)})"
            + (f"; there it is {told}, by the flags of the spec: give a spec= that this rule serves" if told else "")
        )
    return done


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


def _spec(rule: Rule[Any], spec: AdapterSpec | None, case: Case) -> AdapterSpec | None:
    by_name = case.op == "parameter"
    if by_name and not issubclass(rule.spec, ParameterSelection):
        return None
    targets: dict[str, Any] = {"target_modules": () if by_name else ("site",)}
    if by_name:
        targets["target_parameters"] = ("site.w",)
    others = [name for name in rule.spec.defaulted if name not in targets]
    filled: dict[str, Any] = {name: () for name in others if spec is None or getattr(spec, name) is None}
    return rule.spec(**{**filled, **targets}) if spec is None else spec.model_copy(update={**filled, **targets})


def _chosen(case: Case, spec: AdapterSpec) -> list[Rule[Any]]:
    """The rules that the spec comes to there: none, if they refuse the site."""
    return [edit.rule for edit in peftc.plan(case.model, spec).edits]


def _folds(case: Case, spec: AdapterSpec) -> bool:
    """Whether the rule itself says that the adapter at this site can be merged."""
    return all(edit.unmergeable is None for edit in peftc.plan(case.model, spec).edits)


def _compiled(case: Case, spec: AdapterSpec, dtype: torch.dtype = torch.float64, trained: bool = True) -> Any:
    compiled = peftc.compile(copy.deepcopy(case.model).to(dtype), spec)
    return _trained(compiled) if trained else compiled


def _trained(compiled: Any) -> Any:
    """The adapters as if they had been trained; what follows from their tensors follows from the new ones."""
    for name in compiled.peft_config:
        held = peftc.get_peft_model_state_dict(compiled, adapter_name=name)  # What files lack is what it was.
        moved = {
            key: tensor + 0.3 * torch.randn(tensor.shape, dtype=torch.float64).to(tensor.dtype)
            if tensor.is_floating_point() and (tensor.requires_grad or key in held)
            else tensor.clone()
            for key, tensor in compiled.adapter_state_dict(name).items()
        }
        peftc.set_peft_model_state_dict(compiled, moved, name)
    return compiled


def _input(case: Case, dtype: torch.dtype) -> Tensor:
    return case.x.to(dtype) if case.x.is_floating_point() else case.x


def _close(found: Tensor, expected: Tensor, within: float, what: str) -> None:
    error = float((found.double() - expected.double()).abs().max().detach())
    scale = max(1.0, float(expected.double().abs().max().detach()))
    assert error <= within * scale, f"{what} differ by {error:.3g}, of {scale:.3g}"


def _fresh(rule: Rule[Any], case: Case, spec: AdapterSpec) -> None:
    if rule.identity:
        compiled = _compiled(case, spec, trained=False)
        assert torch.equal(compiled(case.x), case.model(case.x)), "the output is another"


def _forward_is_fold(rule: Rule[Any], case: Case, spec: AdapterSpec) -> None:
    compiled = _compiled(case, spec)
    y = compiled(case.x)
    assert not torch.equal(y, case.model(case.x)), "moved parameters change nothing"
    with compiled.merged():
        _close(compiled(case.x), y, 1e-12, "outputs before and after merging")


def _half(rule: Rule[Any], case: Case, spec: AdapterSpec) -> None:
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


def _gradients(rule: Rule[Any], case: Case, spec: AdapterSpec) -> None:
    compiled = _compiled(case, spec)
    parts = _parts(compiled)
    cotangent = torch.randn_like(compiled(case.x))
    (compiled(case.x) * cotangent).sum().backward()
    trained = {param.name: part.tensor(param.key) for part in parts for param in part.edit.params if param.trainable}
    # By identity, as ends of a tie have the same tensors.
    values = {
        id(tensor): tensor.detach().clone().requires_grad_(tensor.is_floating_point())
        for part in parts
        for tensor in part.tensors().values()
    }
    y = _by_weight(compiled, parts, values, case.x)
    expected = torch.autograd.grad((y * cotangent).sum(), [values[id(tensor)] for tensor in trained.values()])
    for (name, own), gradient in zip(trained.items(), expected, strict=True):
        assert own.grad is not None, f"{name} gets no gradient"
        _close(own.grad, gradient, 1e-9, f"gradients of {name}")


def _parts(compiled: Any) -> list[Part]:
    return list(compiled.program.adapters["default"].parts.values())


def _by_weight(compiled: Any, parts: Sequence[Part], values: Mapping[int, Tensor], x: Tensor) -> Tensor:
    """The model's output with the weights and biases that the rules' own algebra gives."""
    new: dict[str, Tensor] = {}
    for part in parts:
        site, rule = cast(WeightSite, part.site), part.edit.rule
        parameter = weight_of(compiled.base.get_submodule(site.owner), site)
        assert parameter is not None
        own = {name: values[id(tensor)] for name, tensor in part.tensors().items()}
        p = {**own, **part.edit.constants}
        stored = canonical(parameter.detach(), site)
        new[str(site.weight)] = canonical(rule.weight(stored, Bound(p, {"weight": lambda stored=stored: stored})), site)
        if site.bias is not None:
            bias = compiled.base.get_parameter(site.bias).detach()
            both = {"bias": lambda bias=bias: bias, "weight": lambda stored=stored: stored}
            new[site.bias] = rule.bias(bias, Bound(p, both))
    return torch.func.functional_call(compiled.unload(), new, (x,), tie_weights=False)


def _tiles(rule: Rule[Any], case: Case, spec: AdapterSpec) -> None:
    compiled = _compiled(case, spec)
    part = next(part for part in _parts(compiled) if part.edit.rule == rule)
    site = cast(WeightSite, part.site)
    weight = weight_of(compiled.base.get_submodule(site.owner), site)
    assert weight is not None
    weight = weight.detach()
    fold = fold_of(site, [part.edit], weight, value_in(compiled.program.adapters), size=max(1, weight.numel() // 3))
    whole = fold.new(slice(0, len(weight)), "", weight)
    for piece, axis in fold.parts:
        _close(fold.new(piece, axis, weight[piece]), whole[piece], 1e-10, "a piece and the whole fold")


def _undone(rule: Rule[Any], case: Case, spec: AdapterSpec) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for mode in ("keep", "residual"):
            compiled = _compiled(case, spec, dtype)
            before = {name: tensor.clone() for name, tensor in compiled.state_dict().items()}
            compiled.merge_adapter(undo=mode)
            compiled.unmerge_adapter()
            for name, tensor in compiled.state_dict().items():
                assert torch.equal(tensor, before[name]), f"{name} in {dtype} after undo={mode!r}"


def _files(rule: Rule[Any], case: Case, spec: AdapterSpec) -> None:
    compiled = _compiled(case, spec)
    with tempfile.TemporaryDirectory() as folder:
        compiled.save_pretrained(folder)
        again = peftc.load(copy.deepcopy(case.model), folder)
    assert torch.equal(again(case.x), compiled(case.x)), "the output is another"


def _copies(rule: Rule[Any], case: Case, spec: AdapterSpec) -> None:
    compiled = _compiled(case, spec)
    for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert torch.equal(other(case.x), compiled(case.x)), "the output is another"
        other.set_adapter([])
        assert torch.equal(other(case.x), case.model(case.x)), "the base's output is another"


def _meta(rule: Rule[Any], case: Case, spec: AdapterSpec) -> None:
    planned = peftc.plan(copy.deepcopy(case.model).to("meta"), spec)
    assert planned.edits == peftc.plan(case.model, spec).edits, "the plan is another"
    peftc.compile(copy.deepcopy(case.model).to("meta"), spec)


def _mixed(rule: Rule[Any], case: Case, spec: AdapterSpec) -> None:
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


def _symbolic(rule: Rule[Any], case: Case, spec: AdapterSpec) -> None:
    if case.op == "parameter" or case.layout == "no op":
        return
    compiled = _compiled(case, spec)
    flat = peftc.compile(copy.deepcopy(case.model), spec, capture="symbolic")
    flat.load_state_dict(compiled.state_dict())
    _close(flat(case.x), compiled(case.x), 1e-12, "the flat graph's output and the host's")


_LAWS: Mapping[str, Callable[[Rule[Any], Case, AdapterSpec], None]] = {
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
