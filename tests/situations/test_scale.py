"""A scale for each adapter at run time."""

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peftc
from tests.support.adapters import lora, perturb
from tests.support.models import Everything, tiny, token_ids

IDS = token_ids(2, 5, 64)


def llama() -> Any:
    torch.manual_seed(0)
    return tiny("llama")


SPEC = lora("q_proj", "down_proj", "embed_tokens", lora_alpha=6, alpha_pattern={"down_proj": 3}, lora_dropout=0.1)


def adapted(spec: Any = SPEC) -> Any:
    torch.manual_seed(1)
    return perturb(peftc.compile(llama(), spec)).eval()


@pytest.mark.parametrize("scale", [0.5, 0, -1.5, 2])
def test_forward_merge_copies_and_baked_files_agree_with_another_alpha(scale: float, tmp_path: Path) -> None:
    compiled = adapted()
    state = peftc.get_peft_model_state_dict(compiled)
    other = peftc.compile(llama(), SPEC.scaled(scale)).eval()
    peftc.set_peft_model_state_dict(other, state)
    want = other(IDS).logits
    compiled.set_scale("default", scale)
    y = compiled(IDS).logits
    torch.testing.assert_close(y, want)
    assert compiled.get_model_status().scales == {"default": scale}
    for new in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert torch.equal(new(IDS).logits, y)
        assert new.get_model_status().scales == {"default": scale}
    with compiled.merged():
        torch.testing.assert_close(compiled(IDS).logits, want)
    torch.testing.assert_close(compiled(IDS, adapter_names=["default", "__base__"]).logits[:1], want[:1])
    compiled.save_pretrained(tmp_path / "baked", bake=True)
    assert torch.equal(peftc.load(llama(), tmp_path / "baked")(IDS).logits, want)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "baked").eval()
    torch.testing.assert_close(theirs(IDS).logits, want, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match=r"is set to scale .* loads at 1. bake=True"):
        compiled.save_pretrained(tmp_path / "plain")
    compiled.set_scale("default", 1)
    assert torch.equal(peftc.load(llama(), tmp_path / "plain")(IDS).logits, compiled(IDS).logits)


def test_other_adapters_and_later_changes_do_not_touch_it() -> None:
    compiled = adapted({"a": SPEC, "b": lora("q_proj")})
    compiled.set_adapter(["a", "b"])
    compiled.set_scale("a", 0.25)
    y = compiled(IDS).logits
    compiled.add_adapter("c", lora("v_proj"))
    compiled.delete_adapter("c")
    compiled.set_adapter("b")
    compiled.set_adapter(["a", "b"])
    assert torch.equal(compiled(IDS).logits, y)
    assert compiled.get_model_status().scales == {"a": 0.25, "b": 1.0}


def test_every_kind_of_site_scales() -> None:
    torch.manual_seed(0)
    model = Everything()
    compiled = perturb(peftc.compile(model, lora("linear", "conv2d", "embed", "conv1d", "transposed")))
    inputs = (token_ids(),)
    base, whole = model(*inputs), compiled(*inputs)
    compiled.set_scale("default", 0)
    torch.testing.assert_close(compiled(*inputs), base)
    compiled.set_scale("default", 1)
    assert torch.equal(compiled(*inputs), whole)


def test_torch_compile_compiles_nothing_anew() -> None:
    compiled = adapted(lora("q_proj"))
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(compiled.base, backend=backend, fullgraph=True)
    with torch.no_grad():
        run(IDS)
        before = len(graphs)
        for scale in (0.5, 2, 0.1):
            compiled.set_scale("default", scale)
            torch.testing.assert_close(run(IDS).logits, compiled(IDS).logits)
    assert len(graphs) == before


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None, True])
def test_what_is_no_scale(scale: Any) -> None:
    compiled = adapted()
    with pytest.raises(peftc.AdapterError, match="expected a finite number"):
        compiled.set_scale("default", scale)


def test_where_there_is_none() -> None:
    compiled = peftc.compile(llama(), peftc.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(peftc.AdapterError, match=r"IA3 \('default'\) has no factor"):
        compiled.set_scale("default", 0.5)
    with pytest.raises(peftc.AdapterError, match="no adapter 'x'"):
        compiled.set_scale("x", 0.5)
    merged = adapted()
    merged.merge_adapter()
    with pytest.raises(peftc.MergeError, match="set_scale"):
        merged.set_scale("default", 0.5)
