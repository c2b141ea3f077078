"""Small things: names by meaning, arguments that PEFT takes, copies, two heads, reentrant checkpointing, positions."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import peftc
from tests.support.adapters import lora, perturb
from tests.support.models import tiny
from tests.support.small import small_model

IDS = torch.tensor([[5, 6, 7, 8]])


def llama() -> Any:
    torch.manual_seed(0)
    return tiny("llama")


class TestNames:
    def test_a_name_of_another_architecture_points_to_the_one_of_that_meaning(self) -> None:
        model = small_model("vit", "ViTForImageClassification", image_size=32, patch_size=8)
        with pytest.raises(
            peftc.NoMatchError, match=r"'query' matches none.*'q_proj'.*'value' matches none.*'v_proj'"
        ) as error:
            peftc.compile(model, lora("query", "value"))
        assert "Nearest: 'q_proj' (1 site)" in str(error.value)
        peftc.compile(model, lora("q_proj", "v_proj"))

    def test_a_linear_of_each_expert_points_to_the_weight_that_stacks_them(self) -> None:
        model = tiny("mixtral")
        with pytest.raises(peftc.NoMatchError, match=r"target_parameters=\['experts.gate_up_proj'\]"):
            peftc.compile(model, lora("w1", "q_proj"))
        compiled = peftc.compile(model, lora("q_proj", target_parameters=["experts.gate_up_proj"]))
        assert any(edit.site.endswith("experts.gate_up_proj") for edit in compiled.plan.edits)


class TestArguments:
    def test_those_of_peft_that_ask_for_what_is_so_anyway(self, tmp_path: Path) -> None:
        compiled = perturb(peftc.compile(llama(), lora("q_proj")))
        compiled.save_pretrained(tmp_path, safe_serialization=True)
        loaded = peftc.load(llama(), tmp_path, low_cpu_mem_usage=True)
        loaded.load_adapter(tmp_path, "b", low_cpu_mem_usage=False)
        loaded.merge_adapter(safe_merge=False)
        loaded.unmerge_adapter()
        y = loaded(IDS).logits
        torch.testing.assert_close(loaded.merge_and_unload(progressbar=True, safe_merge=True)(IDS).logits, y)
        with pytest.raises(peftc.AdapterError, match=r"got a LlamaForCausalLM; peftc\.compile"):
            peftc.get_peft_model_state_dict(llama())  # type: ignore[arg-type]
        for wrong, told in ((None, "NoneType"), ({"a": 3}, "int"), ({3: torch.zeros(1)}, "Tensor")):
            with pytest.raises(peftc.CheckpointError, match=f"expected tensors by name, got a {told}"):
                peftc.set_peft_model_state_dict(compiled, wrong)  # type: ignore[arg-type]

    def test_several_adapters_are_deleted_at_once_or_none(self) -> None:
        compiled = peftc.compile(llama(), {name: lora("q_proj") for name in "abc"})
        with pytest.raises(peftc.AdapterError, match="no adapter 'x'"):
            compiled.delete_adapter(["a", "x"])
        assert list(compiled.peft_config) == ["a", "b", "c"]
        compiled.delete_adapter(["a", "b"])
        assert list(compiled.peft_config) == compiled.active_adapters == ["c"]


class TestCopies:
    def test_a_copy_has_bound_methods_of_its_own(self) -> None:
        compiled = perturb(peftc.compile(llama(), lora("q_proj")))
        compiled.mine, compiled.base.theirs = compiled.generate, compiled.merge_adapter
        new = copy.deepcopy(compiled)
        assert torch.equal(new(IDS).logits, compiled(IDS).logits)
        assert new.mine.__self__ is new.base.theirs.__self__ is new
        new.base.theirs()
        assert (new.merged_adapters, compiled.merged_adapters) == (["default"], [])


class TestTwoHeads:
    def test_two_that_save_one_module_are_not_active_together(self) -> None:
        spec = lora("query", task_type="SEQ_CLS")
        compiled = peftc.compile(tiny("bert", "AutoModelForSequenceClassification"), dict.fromkeys("ab", spec))
        with pytest.raises(peftc.AdapterError, match=r"classifier: 'a' and 'b' both save it.*adapter_names"):
            compiled.set_adapter(["a", "b"])
        assert compiled.active_adapters == ["a"]
        perturb(compiled)
        rows = compiled(IDS.repeat(2, 1), adapter_names=["a", "b"]).logits  # The advice.
        compiled.set_adapter("b")
        torch.testing.assert_close(rows[1:], compiled(IDS).logits)
        compiled.add_adapter("c", lora("query"))
        compiled.set_adapter(["b", "c"])

    def test_heads_of_different_sizes_live_on_one_base(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        two, five = (tiny("bert", "AutoModelForSequenceClassification", num_labels=size) for size in (2, 5))
        five.bert.load_state_dict(two.bert.state_dict())
        y: dict[str, Tensor] = {}
        for name, model in (("two", two), ("five", five)):
            compiled = perturb(peftc.compile(model, lora("query", task_type="SEQ_CLS")))
            compiled.save_pretrained(tmp_path / name)
            y[name] = compiled(IDS).logits
        both = peftc.load(two, tmp_path / "two", "two", verify="files")
        both.load_adapter(tmp_path / "five", "five", verify="files")
        for name in ("two", "five", "two"):
            both.set_adapter(name)
            assert torch.equal(both(IDS).logits, y[name])
            with both.merged():
                torch.testing.assert_close(both(IDS).logits, y[name])
        both.save_pretrained(tmp_path / "again")
        again = peftc.load(five, tmp_path / "again" / "two", "two", verify="files")  # On a base with the other head.
        assert torch.equal(again(IDS).logits, y["two"])
        both.set_adapter("five")
        both.train()(IDS).logits.sum().backward()
        assert both.base.classifier.modules_to_save["five"].weight.grad.shape[0] == 5

    def test_a_head_of_another_width_is_refused_still(self, tmp_path: Path) -> None:
        wide = tiny("bert", "AutoModelForSequenceClassification", hidden_size=64, intermediate_size=64)
        peftc.compile(wide, lora("query", task_type="SEQ_CLS")).save_pretrained(tmp_path)
        with pytest.raises(peftc.CheckpointError, match="classifier"):
            peftc.load(tiny("bert", "AutoModelForSequenceClassification"), tmp_path, verify="files")


class TestReentrant:
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("layers", [None, [1]])
    def test_gradients_flow_whatever_the_input_is(self, when: str, layers: Any) -> None:
        spec = lora("q_proj", layers_to_transform=layers)
        want = perturb(peftc.compile(llama(), spec)).train()
        want(IDS, labels=IDS).loss.backward()
        model = llama()
        if when == "before":
            model.gradient_checkpointing_enable({"use_reentrant": True})
        compiled = peftc.compile(model, spec)
        peftc.set_peft_model_state_dict(compiled, peftc.get_peft_model_state_dict(want))
        if when == "after":
            compiled.gradient_checkpointing_enable({"use_reentrant": True})
        compiled.train()(IDS, labels=IDS).loss.backward()
        pairs = zip(compiled.named_parameters(), want.named_parameters(), strict=True)
        for (name, mine), (_, theirs) in pairs:
            if mine.requires_grad:
                torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
        plain = compiled.unload()
        functions = [module.__dict__.get("_gradient_checkpointing_func") for module in plain.modules()]
        assert {type(function).__name__ for function in functions if function is not None} == {"partial"}


def test_reversible_layers_learn() -> None:
    """Reformer's, which run in an autograd function of their own."""
    torch.manual_seed(0)
    config = transformers.ReformerConfig(
        vocab_size=64, hidden_size=32, attention_head_size=8, num_attention_heads=4, num_buckets=4, hash_seed=0,
        attn_layers=["local", "lsh"], axial_pos_embds=False, feed_forward_size=48, lsh_attn_chunk_length=4,
        local_attn_chunk_length=4, num_hashes=1, max_position_embeddings=64, is_decoder=True,
    )  # fmt: skip
    compiled = peftc.compile(
        transformers.ReformerModelWithLMHead(config), peftc.LoraConfig(target_modules="all-linear")
    )
    ids = torch.arange(3, 11)[None]
    compiled.train()(input_ids=ids, labels=ids).loss.backward()
    assert compiled.get_model_status().without_gradient == []
    assert any(bool(p.grad.any()) for p in compiled.parameters() if p.requires_grad)
    assert not compiled.unload().eval()(input_ids=ids).logits.isnan().any()


@pytest.mark.parametrize(("kind", "name"), [("bart", "BartForConditionalGeneration"), ("opt", "OPTForCausalLM")])
def test_position_embeddings_with_a_forward_of_their_own_are_adapted(kind: str, name: str) -> None:
    model = small_model(kind, name)
    compiled = peftc.compile(model, lora("embed_positions"))
    assert torch.equal(compiled(input_ids=IDS)[0], model(input_ids=IDS)[0])
    y = perturb(compiled)(input_ids=IDS)[0]
    assert not torch.allclose(y, model(input_ids=IDS)[0], atol=1e-4)
    with compiled.merged():
        torch.testing.assert_close(compiled(input_ids=IDS)[0], y)


def test_a_weight_read_in_a_forward_of_another_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    compiled, x = perturb(peftc.compile(model, lora("0", "1"))), torch.randn(2, 4)
    y = compiled(x)

    def otherwise(inputs: Tensor) -> Tensor:
        first, second = compiled.base[0], compiled.base[1]
        return nn.functional.linear(nn.functional.linear(inputs, first.weight, first.bias), second.weight, second.bias)

    compiled.base.forward = otherwise
    torch.testing.assert_close(compiled(x), y)
    seen: list[Any] = []
    compiled.base.register_forward_pre_hook(lambda module, args: seen.append(module[0].weight))
    compiled(x)
    assert seen[0] is compiled.base[0]._parameters["weight"]  # A hook looks at the model, and gets the parameter.
