"""The models users bring: tied weights, lent weights, hooks, patched forwards, quantised linears, shared modules."""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

import peftc
from tests.support.adapters import lora, perturb
from tests.support.models import Everything, Net, QuantisedLinear, tiny, token_ids
from tests.support.snapshots import assert_unchanged, snapshot


def _helper(module: nn.Linear, x: Tensor) -> Tensor:
    return x @ module.weight.T + module.bias


READS: dict[str, Callable[["Reads", Tensor], Tensor]] = {
    "directly": lambda model, x: nn.functional.linear(x, model.proj.weight, model.proj.bias),
    "by a helper": lambda model, x: _helper(model.proj, x),
    "by a computed name": lambda model, x: _helper(getattr(model, "pr" + "oj"), x),
    "also called": lambda model, x: model.proj(x) + torch.tanh(x) @ model.proj.weight,
    "the embedding as head": lambda model, x: model.proj(x) @ model.embed.weight.T,
    "by a child": lambda model, x: model.child(x, model.proj, model.embed),
}
METHODS: dict[str, peftc.AdapterSpec] = {
    "lora": peftc.LoraConfig(target_modules=["proj", "embed"]),
    "ia3": peftc.IA3Config(target_modules=["proj"], feedforward_modules=[]),
    "saved": peftc.LoraConfig(target_modules=["other"], modules_to_save=["proj", "embed"]),
}


class Child(nn.Module):
    """Gets modules, whose weights it reads."""

    def forward(self, x: Tensor, proj: nn.Linear, embed: nn.Embedding) -> Tensor:
        return (x @ proj.weight.mT + proj.bias) @ embed.weight.mT


class Reads(nn.Module):
    """Reads the weights of its children, one way or another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.child = way, Child()
        self.embed, self.proj, self.other = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return READS[self.way](self, torch.tanh(self.other(self.embed(ids))))


class TestLentWeights:
    @pytest.mark.parametrize("targets", [["out_proj", "linear1"], "all-linear"])
    def test_projections_that_attention_only_reads(self, targets: Any) -> None:
        """nn.MultiheadAttention never calls out_proj."""
        model = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).eval()
        x, memory = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
        compiled = peftc.compile(model, peftc.LoraConfig(target_modules=targets))
        assert {"self_attn.out_proj", "multihead_attn.out_proj", "linear1"} <= {e.site for e in compiled.plan.edits}
        # Not to the bit: with frozen weights, attention takes another kernel.
        torch.testing.assert_close(compiled(x, memory), model(x, memory))
        y = perturb(compiled)(x, memory)
        y.sum().backward()
        assert not [n for n, p in compiled.named_parameters() if p.requires_grad and p.grad is None]
        with compiled.merged():
            torch.testing.assert_close(compiled(x, memory), y)

    def test_an_attention_and_its_projection_are_one_site_not_two(self) -> None:
        model = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).eval()
        x, memory = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
        compiled = perturb(peftc.compile(model, lora("self_attn", "out_proj")))
        assert [edit.site for edit in compiled.plan.edits].count("self_attn.out_proj") == 0
        y = compiled(x, memory)
        with compiled.merged():
            torch.testing.assert_close(compiled(x, memory), y)

    @pytest.mark.parametrize("layers", [1, 3])
    def test_encoder_layers_keep_their_adapter_in_fused_inference(self, layers: int) -> None:
        """In eval without gradients TransformerEncoderLayer has a path that reads linear1.weight."""
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), layers).eval()
        x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        before = encoder(x, src_key_padding_mask=mask)
        compiled = perturb(peftc.compile(encoder, lora(rf"layers.{layers - 1}.linear1", "linear2")))
        slow = compiled(x, src_key_padding_mask=mask)
        with torch.no_grad():
            fast = compiled(x, src_key_padding_mask=mask)
        real = ~mask
        torch.testing.assert_close(fast[real], slow[real])
        assert not torch.allclose(fast[real], before[real], atol=1e-3)
        base = compiled.unload()
        assert all(m.activation_relu_or_gelu == 1 for m in base.modules() if isinstance(m, nn.TransformerEncoderLayer))

    @pytest.mark.parametrize("way", [*READS])
    @pytest.mark.parametrize("method", [*METHODS])
    def test_a_weight_read_past_its_call_is_the_adapted_one(self, method: str, way: str) -> None:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, ids = Reads(way), torch.arange(6).view(2, 3)
        compiled = peftc.compile(model, METHODS[method])
        assert torch.equal(compiled(ids), model(ids))
        y = perturb(compiled)(ids)
        y.sum().backward()
        assert not torch.allclose(y, model(ids), atol=1e-3)
        assert not [n for n, p in compiled.named_parameters() if p.requires_grad and p.grad is None]
        torch.testing.assert_close(torch.compile(compiled, backend="eager", fullgraph=True)(ids), y)
        with compiled.disable_adapter():
            assert torch.equal(compiled(ids), model(ids))
        with compiled.merged():
            torch.testing.assert_close(compiled(ids), y)
        # To a tool that looks at the model, it is the parameter.
        assert compiled.base.proj.weight is compiled.base.proj._parameters["weight"]
        torch.testing.assert_close(compiled.merge_and_unload()(ids), y)

    def test_asking_a_weight_for_its_dtype_folds_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Asks(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                weight = self[0].weight
                assert (weight.dtype, weight.device, weight.shape) == (x.dtype, x.device, (3, 3))
                assert weight.size(0) == len(weight) == 3
                assert isinstance(weight, Tensor)
                return self[0](x.to(weight.dtype))

        compiled = peftc.compile(Asks(nn.Linear(3, 3)), lora("0"))
        monkeypatch.setattr(type(compiled.plan.edits[0].rule), "weight", None)
        assert compiled(torch.randn(2, 3)).shape == (2, 3)

    def test_rows_of_a_mixed_batch_can_not_share_a_weight_that_is_read(self) -> None:
        compiled = peftc.compile(Reads("directly"), {name: lora("proj") for name in "ab"})
        with pytest.raises(peftc.AdapterError, match="reads 'weight' of Linear itself, for all rows at once"):
            compiled(torch.arange(6).view(2, 3), adapter_names=["a", "b"])

    def test_a_weight_that_no_fold_can_change_is_refused_when_it_is_read(self) -> None:
        class Convolves(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv1d(4, 4, 3, groups=2)

            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.conv1d(x, self.conv.weight, groups=2)

        compiled, x = peftc.compile(Convolves(), lora("conv")), torch.randn(1, 4, 8)
        with pytest.raises(
            peftc.AdapterError, match=r"conv: the model reads its weight past its call.*exclude_modules"
        ):
            compiled(x)
        with compiled.disable_adapter():
            compiled(x)


class TestTiedWeights:
    def test_adapting_one_end_leaves_the_other(self) -> None:
        model = tiny("gpt2")
        compiled = perturb(peftc.compile(model, lora("lm_head")))
        assert compiled.plan.ties == (("transformer.wte.weight", "lm_head.weight"),)
        assert any("lm_head is tied to transformer.wte.weight" in text for text in compiled.plan.cautions)
        assert compiled.base.lm_head.weight is compiled.base.transformer.wte.weight
        ids = token_ids(2, 5, 64)
        hidden = model.transformer(ids).last_hidden_state
        assert torch.equal(compiled.base.transformer(ids).last_hidden_state, hidden)
        assert not torch.allclose(compiled(ids).logits, model(ids).logits, atol=1e-3)

    def test_merging_is_refused_unless_asked_for(self) -> None:
        model = tiny("gpt2")
        compiled = perturb(peftc.compile(model, lora("lm_head", "c_attn")))
        ids = token_ids(2, 5, 64)
        y = compiled(ids).logits
        before = snapshot(compiled.base)
        with pytest.raises(peftc.MergeError, match=r"tied to transformer\.wte\.weight.*untie=True"):
            compiled.merge_adapter()
        assert_unchanged(compiled.base, before)
        with pytest.warns(UserWarning, match="no longer tied"):
            compiled.merge_adapter(untie=True)
        torch.testing.assert_close(compiled(ids).logits, y, rtol=1e-4, atol=1e-5)
        assert compiled.config.tie_word_embeddings is False
        assert model.config.tie_word_embeddings is True
        assert torch.equal(compiled.base.transformer.wte.weight, model.transformer.wte.weight)
        compiled.unmerge_adapter()
        assert compiled.base.lm_head.weight is compiled.base.transformer.wte.weight
        assert compiled.config.tie_word_embeddings is True
        assert_unchanged(compiled.base, before)
        assert torch.equal(compiled(ids).logits, y)

    @pytest.mark.parametrize("targets", [["wte", "lm_head"], ["wte"]])
    def test_both_ends(self, targets: list[str]) -> None:
        model = tiny("gpt2")
        compiled = perturb(peftc.compile(model, lora(*targets)))
        before = snapshot(compiled.base)
        ids = token_ids(2, 5, 64)
        y = compiled(ids).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled.merge_adapter(untie=True)
        torch.testing.assert_close(compiled(ids).logits, y, rtol=1e-4, atol=1e-5)
        compiled.unmerge_adapter()
        assert_unchanged(compiled.base, before)

    def test_a_merged_untied_model_reloads(self, tmp_path: Any) -> None:
        from transformers import AutoModelForCausalLM

        compiled = perturb(peftc.compile(tiny("gpt2"), lora("lm_head", "c_attn")))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = compiled.merge_and_unload(untie=True)
        merged.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        ids = token_ids(2, 5, 64)
        torch.testing.assert_close(again(ids).logits, merged(ids).logits)

    def test_tied_linears_under_symbolic_capture(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
                self.b.weight = self.a.weight

            def forward(self, x: Tensor) -> Tensor:
                return self.b(torch.relu(self.a(x)))

        model, x = Tied(), torch.randn(2, 4)
        # Two adapters: with one merged, the other still runs in the traced graph, which must use b's own new weight.
        specs = {"default": lora("b"), "stays": lora("b")}
        compiled = perturb(peftc.compile(model, specs, capture="symbolic"))
        compiled.set_adapter(["default", "stays"])
        y = compiled(x)
        with pytest.warns(UserWarning, match="no longer tied"):
            compiled.merge_adapter(["default"], untie=True)
        torch.testing.assert_close(compiled(x), y)
        compiled.unmerge_adapter()
        with pytest.warns(UserWarning, match="no longer tied"):
            compiled.merge_adapter(untie=True)
        torch.testing.assert_close(compiled(x), y)
        assert torch.equal(compiled.base.a.weight, model.a.weight)
        compiled.unmerge_adapter()
        assert torch.equal(compiled(x), y)


class TestOpaque:
    def test_a_quantised_linear_is_adapted_and_never_merged(self) -> None:
        model = Everything().eval()
        model.linear = QuantisedLinear(model.linear)
        compiled = peftc.compile(model, lora("linear"))
        ids = token_ids()
        assert torch.equal(compiled(ids), model(ids))
        perturb(compiled)
        module, x = compiled.base.linear, torch.randn(2, 16)
        a, b = module.lora_A.default.weight, module.lora_B.default.weight
        assert a.dtype == torch.float32
        scaling = compiled.plan.edits[0].constants["scaling"]
        torch.testing.assert_close(module(x), model.linear(x) + scaling * x @ a.T @ b.T)
        assert "call_module" in {node.op for node in compiled.graph_of("linear").nodes}
        assert [name for name, _ in module.named_buffers()] == ["scale", "qweight"]
        with pytest.raises(peftc.MergeError, match="its weight is no plain parameter"):
            compiled.merge_adapter()
        assert compiled.base.linear.qweight.data_ptr() == model.linear.qweight.data_ptr()
        assert type(compiled.unload().linear) is QuantisedLinear

    @pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
    def test_starts_that_need_the_weight_are_refused_without_one(self, init: str) -> None:
        model = Everything()
        model.linear = QuantisedLinear(model.linear)
        with pytest.raises(peftc.NoMatchError, match=f"{init} initialisation needs the weight"):
            peftc.compile(model, lora("linear", init_lora_weights=init))

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_opaque_sites_survive_copies(self, how: str) -> None:
        model = Everything().eval()
        model.linear = QuantisedLinear(model.linear)
        compiled = perturb(peftc.compile(model, lora("linear")))
        y = compiled(token_ids())
        if how == "deepcopy":
            other = copy.deepcopy(compiled)
        else:
            file = io.BytesIO()
            torch.save(compiled, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert torch.equal(other(token_ids()), y)
        with torch.no_grad():
            other.base.linear.scale.mul_(2)
        assert not torch.allclose(other(token_ids()), y)
        assert torch.equal(compiled(token_ids()), y)

    def test_symbolic_capture_keeps_them_as_calls(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), QuantisedLinear(nn.Linear(4, 4))

            def forward(self, x: Tensor) -> Tensor:
                return self.b(torch.relu(self.a(x)))

        model, x = Model(), torch.randn(2, 4)
        compiled = peftc.compile(model, lora("a", "b"), capture="symbolic")
        assert torch.equal(compiled(x), model(x))
        one, other = perturb(compiled), peftc.compile(model, lora("a", "b"))
        other.load_state_dict(one.state_dict())
        assert torch.equal(one(x), other(x))

    def test_a_forward_patched_on_the_instance_is_kept(self) -> None:
        """accelerate patches forward on the instance (offloading, device maps)."""

        class Double(ModelHook):
            def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return tuple(arg * 2 for arg in args), kwargs

        model = Everything().eval()
        add_hook_to_module(model.linear, Double())
        compiled = peftc.compile(model, lora("linear"))
        ids = token_ids()
        assert torch.equal(compiled(ids), model(ids))
        perturb(compiled)
        assert not torch.allclose(compiled(ids), model(ids), atol=1e-4)
        with compiled.disable_adapter():
            assert torch.equal(compiled(ids), model(ids))
        assert torch.equal(compiled.unload()(ids), model(ids))

    def test_a_subclass_that_traces_is_anchored_at_its_op(self) -> None:
        class Scaled(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input.to(self.weight.dtype)) * 3

        model = nn.Sequential(Scaled(4, 4))
        compiled = perturb(peftc.compile(model, lora("0")))
        x = torch.randn(2, 4)
        y = compiled(x)
        compiled.merge_adapter()
        torch.testing.assert_close(compiled(x), y)

    def test_subclasses_that_are_not_what_they_seem_are_opaque(self) -> None:
        class Twice(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return nn.functional.linear(input, self.weight) + nn.functional.linear(input, self.weight, self.bias)

        class Trains(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input) * (2 if self.training else 1)

        class Extra(nn.Linear):
            def forward(self, input: Tensor, *, gain: float = 1.0, **kwargs: Any) -> Tensor:
                return super().forward(input) * gain

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = Twice(4, 4), Trains(4, 4), Extra(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.c(self.b(self.a(x)), gain=0.5, unused=1)

        model, x = Model(), torch.randn(2, 4)
        compiled = peftc.compile(model, lora("a", "b", "c"))
        assert [edit.opaque for edit in compiled.plan.edits] == [False, True, True]
        assert all(edit.slots == ("weight",) for edit in compiled.plan.edits)
        for mode in (True, False):
            assert torch.equal(compiled.train(mode)(x), model.train(mode)(x))
        y = perturb(compiled)(x)
        with compiled.merged():
            torch.testing.assert_close(compiled(x), y)

    def test_parametrised_and_weight_normed_linears(self) -> None:
        model = nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
        )
        x = torch.randn(2, 4)
        compiled = peftc.compile(model, lora("0", "1"))
        assert torch.equal(compiled(x), model(x))
        y = perturb(compiled)(x)
        assert not torch.allclose(y, model(x), atol=1e-4)
        with pytest.raises(peftc.MergeError):
            compiled.merge_adapter()
        assert torch.equal(compiled.unload()(x), model(x))


class TestStructure:
    def test_hooks_run_once_around_the_adapted_module(self) -> None:
        seen: list[Any] = []
        model = Everything().eval()
        model.linear.register_forward_hook(lambda module, args, output: seen.append(output))
        model.linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        compiled = perturb(peftc.compile(model, lora("linear")))
        compiled(token_ids())
        assert len(seen) == 2
        x, y = seen
        with compiled.disable_adapter():
            assert not torch.equal(compiled.base.linear(x), y)

    def test_classes_names_and_isinstance_stay(self) -> None:
        model = tiny("llama")
        compiled = peftc.compile(model, lora("q_proj"))
        assert type(compiled.base) is type(model)
        q = compiled.base.model.layers[0].self_attn.q_proj
        assert isinstance(q, nn.Linear)
        assert not isinstance(q, torch.fx.GraphModule)
        assert isinstance(compiled, torch.fx.GraphModule)
        assert set(dict(model.named_parameters())) <= set(dict(compiled.base.named_parameters()))
        assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in dict(compiled.base.named_parameters())
        assert {n for n, p in compiled.base.named_parameters() if p.requires_grad} == {
            f"model.layers.{i}.self_attn.q_proj.lora_{ab}.default.weight" for i in range(3) for ab in "AB"
        }

    def test_frozen_tensors_are_shared_and_trained_ones_copied(self) -> None:
        model = Everything()
        compiled = peftc.compile(model, lora("linear", bias="all", modules_to_save=["head"]))
        for name, parameter in model.named_parameters():
            shared = compiled.base.get_parameter(name).data_ptr() == parameter.data_ptr()
            trained = name.endswith("bias") and not name.startswith("head")
            assert shared != trained, name

    def test_batch_norm_statistics_of_the_original_do_not_move(self) -> None:
        model = Net().train()
        before = snapshot(model)
        compiled = peftc.compile(model, lora("conv", "fc"))
        compiled(torch.randn(4, 3, 8, 8)).sum().backward()
        assert not torch.equal(compiled.base.norm.running_mean, model.norm.running_mean)
        assert_unchanged(model, before)

    def test_an_embedding_that_renormalises_itself_does_not_touch_the_original(self) -> None:
        model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.1))
        before = snapshot(model)
        compiled = perturb(peftc.compile(model, lora("0")))
        compiled(torch.tensor([0, 1, 2]))
        assert_unchanged(model, before)

    def test_a_shared_module_is_one_site(self) -> None:
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(4, 4)
                self.second = self.first

            def forward(self, x: Tensor) -> Tensor:
                return self.second(torch.relu(self.first(x)))

        for capture in ("modules", "symbolic"):
            model, x = Shared(), torch.randn(2, 4)
            compiled = perturb(peftc.compile(model, lora("first"), capture=capture))
            assert compiled.base.second is compiled.base.first
            inner = compiled.base.first
            delta = inner.lora_A.default.weight.T @ inner.lora_B.default.weight.T * 2
            hidden = torch.relu(model.first(x) + x @ delta)
            torch.testing.assert_close(compiled(x), model.first(hidden) + hidden @ delta)
            with pytest.raises(peftc.NoMatchError, match="is another name of 'first'"):
                peftc.compile(model, lora("second"), capture=capture)

    def test_the_root_itself_can_be_a_site(self) -> None:
        model, x = nn.Linear(4, 3), torch.randn(2, 4)
        compiled = peftc.compile(model, peftc.LoraConfig(target_modules=".*", r=2))
        assert torch.equal(compiled(x), model(x))
        assert [edit.site for edit in compiled.plan.edits] == [""]

    def test_inplace_rewrites_the_model_given(self) -> None:
        model = tiny("llama")
        before, ids = snapshot(model), token_ids(2, 5, 64)
        y = model(ids).logits
        compiled = perturb(peftc.compile(model, lora("q_proj", bias="all"), inplace=True))
        assert compiled.base is model
        assert not torch.allclose(model(ids).logits, y, atol=1e-4)
        compiled.merge_adapter()
        assert compiled.unload() is model
        assert_unchanged(model, before)

    def test_a_model_that_cannot_be_copied_says_what_to_do(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2))
        model.lock = open(__file__)  # noqa: SIM115
        with pytest.raises(peftc.CaptureError, match="inplace=True"):
            peftc.compile(model, lora("0"))
        assert peftc.compile(model, lora("0"), inplace=True).unload() is model
        model.lock.close()

    def test_a_compile_that_fails_half_way_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from peftc.rewrite import build

        model = Everything()
        before = snapshot(model)
        real, calls = build.install, []

        def failing(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 3:
                raise RuntimeError("half way")
            real(*args)

        monkeypatch.setattr(build, "install", failing)
        for inplace in (False, True):
            calls.clear()
            with pytest.raises(RuntimeError, match="half way"):
                peftc.compile(model, lora("embed", "linear", "transposed", "conv1d", bias="all"), inplace=inplace)
            assert len(calls) == 3
            assert_unchanged(model, before)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_to_moves_everything_and_unload_follows(self, dtype: torch.dtype) -> None:
        model = Everything().eval()
        compiled = perturb(peftc.compile(model, lora("linear", "conv2d", bias="lora_only")))
        compiled.merge_adapter()
        compiled.to(dtype)
        compiled.unmerge_adapter()
        assert {p.dtype for p in compiled.parameters()} == {dtype}
        assert compiled(token_ids()).dtype == dtype
        expected = copy.deepcopy(model).to(dtype)
        base = compiled.unload()
        for name, parameter in expected.named_parameters():
            assert torch.equal(base.get_parameter(name), parameter), name

    def test_training_flags_follow(self) -> None:
        compiled = peftc.compile(Everything().eval(), lora("linear", lora_dropout=0.3))
        assert not compiled.training
        compiled.train()
        assert compiled.base.linear.lora_dropout.default.training
        compiled.eval()
        assert not any(module.training for module in compiled.modules())

    def test_adapting_an_adapted_model_is_refused(self) -> None:
        compiled = peftc.compile(Everything(), lora("linear"))
        with pytest.raises(peftc.AdapterError, match="add_adapter"):
            peftc.compile(compiled, lora("conv1d"))
        with pytest.raises(peftc.AdapterError, match="has a child 'lora_A' already"):
            peftc.compile(compiled.base, lora("linear"))

    @pytest.mark.parametrize("name", ["a.b", "", "keys", " a", "a ", "a  b", "/a", "a//b", "a\\b", "../b"])
    def test_adapter_names_that_cannot_be_part_of_a_name(self, name: str) -> None:
        with pytest.raises(peftc.AdapterError, match="adapter name"):
            peftc.compile(Everything(), lora("linear"), name)
