"""States and models that break careless tools: each of these once did, here or elsewhere."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

import peftc
from tests.support.adapters import lora, perturb
from tests.support.models import Everything, QuantisedLinear, tiny, token_ids
from tests.support.snapshots import assert_unchanged, snapshot


class MLP(nn.Module):
    def __init__(self, first: nn.Module | None = None) -> None:
        super().__init__()
        self.a = first if first is not None else nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class TestStates:
    def test_merging_while_disabled_is_refused(self) -> None:
        compiled = perturb(peftc.compile(MLP(), lora("a")))
        y = compiled(X)
        with compiled.disable_adapter(), pytest.raises(peftc.MergeError, match="disabled"):
            compiled.merge_adapter()
        assert torch.equal(compiled(X), y)

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize("state", ["merged", "disabled", "biases", "inactive biases"])
    def test_copies_taken_in_any_state_live_on_their_own(self, state: str, how: Any) -> None:
        model = MLP()
        compiled = perturb(peftc.compile(model, lora("a", bias="all")))
        y = compiled(X)
        if state == "merged":
            compiled.merge_adapter()
        if state == "inactive biases":
            compiled.set_adapter([])
        if state == "disabled":
            with compiled.disable_adapter():
                other = how(compiled)
        else:
            other = how(compiled)
        with torch.no_grad():
            for key, tensor in compiled.adapter_state_dict().items():
                if not (state == "merged" and key.endswith("bias")):
                    tensor.mul_(3)
        if state == "merged":
            other.unmerge_adapter()
        if state == "disabled":
            assert torch.equal(other(X), model(X))
            other.enable_adapters()
        other.set_adapter("default")
        assert torch.equal(other(X), y)
        other.delete_adapter("default")
        assert torch.equal(other.unload()(X), model(X))

    def test_hooks_and_attributes_of_the_compiled_model_are_copied(self) -> None:
        compiled = peftc.compile(MLP(), lora("a"))
        compiled.note = "mine"
        calls: list[int] = []
        compiled.register_forward_hook(lambda *_: calls.append(1))
        other = copy.deepcopy(compiled)
        other(X)
        assert other.note == "mine"
        assert pickle.loads(pickle.dumps(peftc.compile(MLP(), lora("a")))).training

    def test_trained_biases_belong_to_their_adapter(self, tmp_path: Path) -> None:
        model = MLP()
        specs = {"p": lora("a", bias="all"), "q": lora("a")}
        compiled = peftc.compile(model, specs)
        with torch.no_grad():
            compiled.base.b.bias.add_(1)
        y = compiled(X)
        with compiled.disable_adapter():
            assert torch.equal(compiled(X), model(X))
        compiled.set_adapter("q")
        assert torch.equal(compiled(X), model(X))
        compiled.save_pretrained(tmp_path)
        compiled.set_adapter("p")
        assert torch.equal(compiled(X), y)
        loaded = peftc.compile(model, lora("a"), "q")
        loaded.load_adapter(tmp_path / "p", "p")
        assert torch.equal(loaded(X), model(X))
        loaded.set_adapter("p")
        assert torch.equal(loaded(X), y)
        loaded.set_adapter("q")
        assert torch.equal(loaded.merge_and_unload()(X), model(X))
        assert torch.equal(compiled.merge_and_unload()(X), y)

    def test_saving_while_merged_saves_the_adapter_as_it_is(self, tmp_path: Path) -> None:
        model = Everything().eval()
        compiled = perturb(peftc.compile(model, lora("linear", "conv1d", bias="lora_only", lora_bias=True)))
        y = compiled(token_ids())
        compiled.merge_adapter()
        compiled.save_pretrained(tmp_path)
        assert torch.equal(peftc.load(model, tmp_path)(token_ids()), y)

    def test_a_loaded_adapter_trains_once_it_is_set(self, tmp_path: Path) -> None:
        model = MLP()
        peftc.compile(model, lora("a")).save_pretrained(tmp_path)
        compiled = peftc.load(model, tmp_path)
        assert compiled.get_nb_trainable_parameters()[0] == 0
        compiled.set_adapter("default")
        assert compiled.get_nb_trainable_parameters()[0] == 32

    def test_an_unloaded_model_takes_no_more_adapters(self) -> None:
        compiled = peftc.compile(MLP(), lora("a"))
        compiled.unload()
        assert compiled.plan.costs.trainable == 0
        assert not compiled.plan.edits
        with pytest.raises(peftc.AdapterError, match="compile it again"):
            compiled.add_adapter("b", lora("a"))

    def test_a_forward_wrapped_after_compiling_follows_every_switch(self) -> None:
        model = MLP()
        compiled = perturb(peftc.compile(model, lora("a")))
        y = compiled(X)
        add_hook_to_module(compiled.base.a, AlignDevicesHook("cpu"))
        assert torch.equal(compiled(X), y)
        with compiled.disable_adapter():
            assert torch.equal(compiled(X), model(X))
        with compiled.merged():
            torch.testing.assert_close(compiled(X), y)
        compiled.set_adapter([])
        assert torch.equal(compiled(X), model(X))
        compiled.set_adapter("default")
        assert torch.equal(compiled(X), y)
        base = compiled.unload()
        assert torch.equal(base(X), model(X))
        remove_hook_from_module(base.a)
        assert torch.equal(base(X), model(X))

    def test_offloading_an_adapter_is_refused_and_dispatching_works(self) -> None:
        """Past the hook, the generated code would read a meta tensor, and torch computes garbage with one."""
        compiled = perturb(peftc.compile(MLP(), lora("a")))
        y = compiled(X)
        dispatch_model(compiled.base, {"": "cpu"}, force_hooks=True)
        assert torch.equal(compiled(X), y)
        with pytest.raises(peftc.AdapterError, match="can't offload"):
            cpu_offload(peftc.compile(MLP(), lora("a")).base, torch.device("cpu"))

    def test_merging_ignores_the_callers_autocast_and_inference_mode(self) -> None:
        model = MLP().to(torch.bfloat16)
        one = perturb(peftc.compile(model, lora("a")))
        two = copy.deepcopy(one)
        one.merge_adapter()
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            two.merge_adapter()
        assert torch.equal(one.base.a.weight, two.base.a.weight)
        assert not two.base.a.weight.is_inference()

    def test_merging_a_shared_module_needs_no_untying(self) -> None:
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.p = nn.Linear(4, 4)
                self.q = self.p

            def forward(self, x: Tensor) -> Tensor:
                return self.q(torch.relu(self.p(x)))

        model = Shared()
        compiled = perturb(peftc.compile(model, lora("p")))
        y = compiled(X)
        compiled.merge_adapter()
        torch.testing.assert_close(compiled(X), y)
        compiled.unmerge_adapter()
        assert torch.equal(compiled.unload()(X), model(X))

    def test_a_tied_bias_is_not_untied_unasked(self) -> None:
        model = MLP()
        model.b.bias = model.a.bias
        spec = peftc.IA3Config(target_modules=["a"], feedforward_modules=[])
        compiled = perturb(peftc.compile(model, spec))
        with pytest.raises(peftc.MergeError, match=r"a: its bias is tied to b\.bias"):
            compiled.merge_adapter()
        trained = peftc.compile(model, lora("b", bias="lora_only"))
        assert [tensor.name for tensor in trained.plan.trained] == ["a.bias"]
        assert trained.base.b.bias is trained.base.a.bias


class TestModels:
    def test_a_forward_that_counts_is_called_as_it_is_and_planning_does_not_count(self) -> None:
        class Counts(nn.Linear):
            def __init__(self) -> None:
                super().__init__(4, 4)
                self.calls, self.log = 0, {"n": 0}
                self.register_buffer("seen", torch.zeros(()))

            def forward(self, input: Tensor) -> Tensor:
                self.calls += 1
                self.log["n"] += 1
                self.seen.add_(1)
                return super().forward(input)

        model = MLP(Counts())
        peftc.plan(model, lora("a"))
        compiled = peftc.compile(model, lora("a"))
        assert (model.a.calls, model.a.log, float(model.a.seen)) == (0, {"n": 0}, 0.0)
        compiled(X)
        compiled(X)
        assert (compiled.base.a.calls, compiled.base.a.log, float(compiled.base.a.seen)) == (2, {"n": 2}, 2.0)
        assert (model.a.calls, float(model.a.seen)) == (0, 0.0)

    def test_a_buffer_updated_in_forward_stays_live_in_the_traced_code(self) -> None:
        class Tracks(nn.Linear):
            def __init__(self) -> None:
                super().__init__(4, 4)
                self.register_buffer("seen", torch.zeros(()))

            def forward(self, input: Tensor) -> Tensor:
                self.seen.add_(1)
                return super().forward(input)

        model = MLP(Tracks())
        compiled = peftc.compile(model, lora("a"))
        compiled(X)
        compiled(X)
        assert float(compiled.base.a.seen) == 2
        assert float(model.a.seen) == 0

    def test_a_class_that_copies_to_itself_is_refused(self) -> None:
        class Itself(nn.Linear):
            def __deepcopy__(self, memo: Any) -> "Itself":
                return self

        model = MLP(Itself(4, 4))
        before = snapshot(model)
        with pytest.raises(peftc.CaptureError, match="inplace=True"):
            peftc.compile(model, lora("b"))
        assert_unchanged(model, before)

    def test_a_forward_that_is_a_closure_over_the_original_is_refused(self) -> None:
        model = MLP()
        old = model.forward
        model.forward = lambda x: old(x)
        with pytest.raises(peftc.CaptureError, match="a copy would share with the original"):
            peftc.compile(model, lora("a"))
        compiled = perturb(peftc.compile(model, lora("a"), inplace=True))
        with torch.no_grad():
            assert not torch.allclose(compiled(X), compiled.unload()(X), atol=1e-4)

    def test_weights_read_outside_of_forward_do_not_count_as_lent(self) -> None:
        class Penalised(nn.Sequential):
            def penalty(self) -> Tensor:
                return self.fc.weight.norm()

        model = Penalised()
        model.add_module("fc", nn.Linear(4, 4))
        assert len(peftc.compile(model, lora("fc")).plan.edits) == 1

    def test_matrix_products_with_a_turned_weight_are_linear_sites(self) -> None:
        model = tiny_falcon()
        compiled = perturb(peftc.compile(model, peftc.LoraConfig(r=2)))
        assert not any(edit.opaque for edit in compiled.plan.edits)
        ids = token_ids(2, 5, 64)
        y = compiled(ids).logits
        compiled.merge_adapter()
        torch.testing.assert_close(compiled(ids).logits, y)

    def test_float8_weights_get_float32_adapters(self) -> None:
        class Float8(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return nn.functional.linear(input, self.weight.to(input.dtype), self.bias)

        layer = Float8(4, 4)
        layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        compiled = perturb(peftc.compile(MLP(layer), lora("a"), autocast_adapter_dtype=False))
        assert compiled.base.a.lora_A.default.weight.dtype == torch.float32
        compiled(X).sum().backward()
        with pytest.raises(peftc.MergeError):
            compiled.merge_adapter()

    def test_lazy_modules(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2))
        assert peftc.compile(model, lora("0"))(X).shape == (3, 2)
        with pytest.raises(peftc.NoMatchError, match="run the model once"):
            peftc.compile(nn.Sequential(nn.LazyLinear(2)), lora("0"))

    def test_complex_weights_are_refused(self) -> None:
        with pytest.raises(peftc.NoMatchError, match="adapters are real"):
            peftc.compile(MLP(nn.Linear(4, 4, dtype=torch.complex64)), lora("a"))

    def test_parametrised_sites_are_copied(self) -> None:
        model = MLP(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
        compiled = perturb(peftc.compile(model, lora("a")))
        assert torch.equal(copy.deepcopy(compiled)(X), compiled(X))

    @pytest.mark.parametrize("signature", ["spread", "keyword"])
    def test_opaque_calls_by_keyword(self, signature: str) -> None:
        class Spread(QuantisedLinear):
            def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
                return super().forward(*args, *kwargs.values())

        class Keyword(QuantisedLinear):
            def forward(self, *, x: Tensor) -> Tensor:
                return super().forward(x)

        class Calls(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = (Spread if signature == "spread" else Keyword)(nn.Linear(4, 4))

            def forward(self, x: Tensor) -> Tensor:
                return self.a(x=x)

        model = Calls()
        compiled = peftc.compile(model, lora("a"))
        assert torch.equal(compiled(X), model(X))
        assert not torch.allclose(perturb(compiled)(X), model(X), atol=1e-4)

    def test_a_leaf_that_only_names_its_features_is_no_site(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.in_features = self.out_features = 4

            def forward(self, x: Tensor) -> Tensor:
                return x

        plan = peftc.plan(MLP(Named()), peftc.LoraConfig(target_modules="all-linear"))
        assert [edit.site for edit in plan.edits] == ["b"]

    def test_odd_module_names_print(self) -> None:
        model = nn.ModuleDict({"[red]b": nn.Linear(2, 2), "²": nn.Linear(2, 2), "{x}": nn.Linear(2, 2)})
        text = str(peftc.plan(model, peftc.LoraConfig(target_modules="all-linear")))
        assert all(name in text for name in ("[red]b", "²", "{x}"))


class TestPlans:
    def test_a_plan_made_on_meta_holds_for_the_weights(self) -> None:
        with torch.device("meta"):
            plan = peftc.plan(tiny("llama"), peftc.LoraConfig(target_modules="all-linear"))
        compiled = peftc.compile(tiny("llama"), plan)
        assert compiled.base.model.layers[0].mlp.up_proj.lora_A.default.weight.device.type == "cpu"

    @pytest.mark.parametrize("change", ["stride", "dropout", "buffer"])
    def test_the_fingerprint_sees_options_and_buffers(self, change: str) -> None:
        def model(changed: bool) -> nn.Module:
            other = changed and change
            first = nn.Conv2d(3, 3, 3, stride=2 if other == "stride" else 1)
            last = nn.Linear(3, 3)
            last.register_buffer("table", torch.zeros(3 if other == "buffer" else 2))
            return nn.Sequential(first, nn.Dropout(0.5 if other == "dropout" else 0.1), last)

        plan = peftc.plan(model(False), lora("2"))
        with pytest.raises(peftc.PlanError, match="fingerprint"):
            peftc.compile(model(True), plan)

    @pytest.mark.parametrize(("r", "sizes", "flops"), [(1, (100, 50), 300), (8, (100, 1), 1616)])
    def test_flops_of_thin_factors(self, r: int, sizes: tuple[int, int], flops: int) -> None:
        plan = peftc.plan(nn.Sequential(nn.Linear(*sizes)), peftc.LoraConfig(target_modules=["0"], r=r))
        assert plan.costs.flops_per_token == flops

    def test_going_on_without_a_selector_is_a_warning(self) -> None:
        with pytest.warns(UserWarning, match="'zzz' matches none"):
            compiled = peftc.compile(MLP(), lora("a", "zzz"), on_unmatched="warn")
        assert [edit.site for edit in compiled.plan.edits] == ["a"]


WRONG: dict[str, Any] = {
    "nan alpha": lambda: peftc.LoraConfig(lora_alpha=float("nan")),
    "nan in a pattern": lambda: peftc.LoraConfig(alpha_pattern={"a": float("inf")}),
    "layers pattern": lambda: peftc.LoraConfig(layers_pattern="(", layers_to_transform=1),
    "flag in a pattern": lambda: peftc.LoraConfig(rank_pattern={"(?i)A": 4}),
    "empty name": lambda: peftc.LoraConfig(modules_to_save=[""]),
    "no model": lambda: peftc.compile(None, lora("a")),  # pyright: ignore
    "a class": lambda: peftc.compile(MLP, lora("a")),  # pyright: ignore
    "name no string": lambda: peftc.compile(MLP(), lora("a"), 3),  # pyright: ignore
    "name of an attribute": lambda: peftc.compile(MLP(), lora("a"), "training"),
    "long path": lambda: peftc.load_spec("x" * 5000),
    "nul path": lambda: peftc.load_spec("a\0b"),
    "type is a list": lambda: peftc.load_spec({"peft_type": ["LORA"]}),
    "capture": lambda: peftc.plan(MLP(), lora("a"), capture="symbolc"),  # pyright: ignore
    "on_unmatched": lambda: peftc.compile(MLP(), lora("a"), on_unmatched="ignore"),  # pyright: ignore
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_wrong_input_is_a_clear_error(call: Any) -> None:
    with pytest.raises(peftc.PeftcError):
        call()


def test_config_files_with_a_mark_or_a_number_too_long(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"peft_type": "LORA", "r": 3}).encode())
    assert peftc.load_spec(file) == peftc.LoraConfig(r=3)
    file.write_text('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}")
    with pytest.raises(peftc.SpecError):
        peftc.load_spec(file)


def test_infinite_masks_of_modules_saved_whole_pass(tmp_path: Path) -> None:
    model = MLP()
    model.b.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    compiled = perturb(peftc.compile(model, lora("a", modules_to_save=["b"])))
    compiled.base.b.modules_to_save.default.mask.copy_(model.b.mask)
    compiled.save_pretrained(tmp_path)
    again = peftc.load(model, tmp_path)
    assert torch.equal(again(X), compiled(X))
    again.merge_adapter()
    again.unmerge_adapter()


DECLARATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "slot": ({"slots": lambda *_: ("ouput",)}, "slot 'ouput'"),
    "nothing": ({"params": lambda *_: {}}, "declares no parameter"),
    "init": ({"params": lambda *_: {"u": peftc.Param((4, 4), "xavier")}}, "unknown init 'xavier'"),
    "two keys": ({"params": lambda *_: {n: peftc.Param((4, 4), key="k") for n in "uv"}}, "key 'k' is used twice"),
    "taken": ({"params": lambda *_: {"u": peftc.Param((4, 4), key="forward")}}, "a name that modules have"),
    "constant": ({"constants": lambda *_: {"c": [1]}}, "constant 'c' is a list"),
    "twice": ({"dropouts": lambda *_: {"gated_u": 0.5}}, "'gated_u' is declared twice"),
    "initialise": ({"params": lambda *_: {"gated_u": peftc.Param((4, 4), "rule")}}, "initialise"),
}


@pytest.mark.parametrize(("changes", "message"), DECLARATIONS.values(), ids=DECLARATIONS)
def test_rules_that_declare_nonsense(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.made_up_method import Gated, GatedConfig

    rule = Gated()
    peftc.register(rule)
    try:
        for name, value in changes.items():
            monkeypatch.setattr(rule, name, value)
        with pytest.raises(peftc.RuleError, match=message):
            peftc.compile(MLP(), GatedConfig(target_modules=["a"]))
    finally:
        peftc.unregister(rule)


@pytest.mark.parametrize("fault", ["shape", "in place"])
def test_folds_that_misbehave(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.made_up_method import Gated, GatedConfig

    rule = Gated()
    monkeypatch.setattr(rule, "weight", lambda weight, p: weight[:1] if fault == "shape" else weight.mul_(2))
    peftc.register(rule)
    try:
        model = MLP().double()
        before = snapshot(model)
        compiled = peftc.compile(model, GatedConfig(target_modules=["a"]))
        if fault == "shape":
            with pytest.raises(peftc.RuleError, match=r"gives shape \(1, 4\), not \(4, 4\)"):
                compiled.merge_adapter()
        else:
            compiled.merge_adapter()
        assert_unchanged(model, before)
    finally:
        peftc.unregister(rule)


def tiny_falcon() -> Any:
    from transformers import AutoModelForCausalLM, FalconConfig

    config = FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    return AutoModelForCausalLM.from_config(config).eval()
