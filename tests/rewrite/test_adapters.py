"""Several adapters: adding, switching, deleting, and that a refused call changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftc
from tests.support.adapters import perturb
from tests.support.models import Everything, Net, tiny, token_ids
from tests.support.snapshots import assert_unchanged, snapshot


def two() -> peftc.CompiledModel:
    specs = {
        "a": peftc.LoraConfig(target_modules=["linear", "conv2d"], r=2),
        "b": peftc.IA3Config(target_modules=["linear", "transposed"], feedforward_modules=[], modules_to_save=["head"]),
    }
    return perturb(peftc.compile(Everything().eval(), specs))


def test_the_first_is_active_and_trains() -> None:
    compiled = two()
    assert compiled.active_adapters == ["a"]
    assert {n.split(".")[-2] for n, p in compiled.named_parameters() if p.requires_grad} == {"a"}
    compiled.set_adapter(["b", "a"])
    assert compiled.active_adapters == ["a", "b"]
    with pytest.raises(peftc.AdapterError, match=r"no adapter 'aa'; there are a, b\. Nearest: 'a'"):
        compiled.set_adapter("aa")


def test_without_an_active_adapter_the_graph_is_the_base_graph() -> None:
    compiled = two()
    with compiled.disable_adapter():
        assert compiled.site_code() == {}
    compiled.set_adapter([])
    assert compiled.site_code() == {}


def test_added_adapters_are_inactive_until_set() -> None:
    model, ids = Everything().eval(), token_ids()
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(target_modules=["linear"], r=2), "a"))
    y = compiled(ids)
    compiled.add_adapter("b", peftc.IA3Config(target_modules=["linear", "conv2d"], feedforward_modules=["linear"]))
    assert compiled.active_adapters == ["a"]
    assert torch.equal(compiled(ids), y)
    compiled.set_adapter("b")
    assert torch.equal(compiled(ids), model(ids))
    both = peftc.compile(model, compiled.peft_config)
    assert both.plan == compiled.plan


@pytest.mark.parametrize("fault", ["taken", "misspelt", "conflict", "name"])
def test_a_refused_addition_changes_nothing(fault: str) -> None:
    compiled = two()
    before, y = snapshot(compiled), compiled(token_ids())
    name = {"taken": "a", "name": "x.y"}.get(fault, "c")
    target = {"misspelt": "linaer", "conflict": "head"}.get(fault, "linear")
    with pytest.raises(peftc.PeftcError):
        compiled.add_adapter(name, peftc.LoraConfig(target_modules=[target]))
    assert_unchanged(compiled, before)
    assert torch.equal(compiled(token_ids()), y)


def test_deleting_activates_the_first_that_is_left() -> None:
    compiled = two()
    compiled.set_adapter("b")
    expected = compiled(token_ids())
    compiled.set_adapter("a")
    compiled.delete_adapter("a")
    assert compiled.active_adapters == ["b"]
    assert torch.equal(compiled(token_ids()), expected)
    assert not [name for name, _ in compiled.named_parameters() if ".a." in name or name.endswith(".a")]
    compiled.delete_adapter("b")
    assert compiled.active_adapters == []
    assert compiled.get_nb_trainable_parameters()[0] == 0


def test_loading_beside_another(tmp_path: Path) -> None:
    model, ids = tiny("llama"), token_ids(2, 5, 64)
    one = perturb(peftc.compile(model, peftc.LoraConfig(target_modules=["q_proj"], r=2)))
    one.save_pretrained(tmp_path)
    compiled = peftc.compile(model, peftc.LoraConfig(target_modules=["v_proj"], r=4), "mine")
    before = snapshot(compiled)
    compiled.load_adapter(tmp_path, "theirs")
    assert compiled.active_adapters == ["mine"]
    assert not any(p.requires_grad for n, p in compiled.named_parameters() if "theirs" in n)
    compiled.set_adapter("theirs")
    assert torch.equal(compiled(ids).logits, one(ids).logits)
    assert all(p.requires_grad == ("theirs" in n) for n, p in compiled.named_parameters())
    compiled.set_adapter("mine")
    compiled.delete_adapter("theirs")
    assert_unchanged(compiled, before)


def test_symbolic_models_take_more_adapters() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(target_modules=["fc"], r=2), capture="symbolic"))
    y = compiled(x)
    compiled.add_adapter("b", peftc.LoraConfig(target_modules=["fc", "conv"], r=2, modules_to_save=["out"]))
    assert torch.equal(compiled(x), y)
    compiled.set_adapter(["default", "b"])
    perturb(compiled)
    other = peftc.compile(model, compiled.peft_config)
    other.load_state_dict(compiled.state_dict())
    other.set_adapter(["default", "b"])
    assert torch.equal(other(x), compiled(x))


def test_a_bias_trained_by_one_is_given_back() -> None:
    model = Everything()
    compiled = peftc.compile(model, peftc.LoraConfig(target_modules=["linear"], bias="all"))
    with torch.no_grad():
        compiled.base.conv1d.bias.add_(1)
    compiled.delete_adapter("default")
    assert torch.equal(compiled.base.conv1d.bias, model.conv1d.bias)


def test_disabling_nests_and_survives_errors_and_switching() -> None:
    compiled = two()
    ids = token_ids()
    y = {name: (compiled.set_adapter(name), compiled(ids))[1] for name in ("b", "a")}
    base = Everything()
    base.load_state_dict({k: v for k, v in compiled.base.state_dict().items() if k in base.state_dict()})
    plain = base.eval()(ids)
    with compiled.disable_adapter():
        with pytest.raises(RuntimeError, match="inside"), compiled.disable_adapter():
            raise RuntimeError("inside")
        assert torch.equal(compiled(ids), plain)
        compiled.set_adapter("b")
        assert torch.equal(compiled(ids), plain)
    assert torch.equal(compiled(ids), y["b"])


def test_an_addition_that_fails_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftc.rewrite import build

    compiled = two()
    before, y = snapshot(compiled), compiled(token_ids())
    real, calls = build.attach, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("half way")
        return real(*args)

    monkeypatch.setattr(build, "attach", failing)
    with pytest.raises(MemoryError):
        compiled.add_adapter("c", peftc.LoraConfig(target_modules=["linear", "conv1d", "conv3d"]))
    assert_unchanged(compiled, before)
    assert list(compiled.peft_config) == ["a", "b"]
    assert torch.equal(compiled(token_ids()), y)


def test_deleting_an_inactive_adapter_activates_none() -> None:
    compiled = two()
    compiled.set_adapter([])
    compiled.delete_adapter("b")
    assert compiled.active_adapters == []
    assert compiled.get_model_status().requires_grad == {"a": False}


def test_the_successor_of_a_frozen_adapter_is_frozen() -> None:
    compiled = two()
    compiled.set_requires_grad("a", False)
    compiled.delete_adapter("a")
    assert compiled.active_adapters == ["b"]
    assert compiled.get_model_status().requires_grad == {"b": False}


def test_a_name_used_again_does_not_learn_by_itself() -> None:
    compiled = two()
    compiled.set_adapter(["a", "b"])
    compiled.delete_adapter("b")
    compiled.add_adapter("b", peftc.LoraConfig(target_modules=["linear"], r=2))
    compiled.set_requires_grad("a")
    compiled.merge_adapter("a")
    compiled.unmerge_adapter()
    assert compiled.get_model_status().requires_grad == {"a": True, "b": False}


def test_a_shallow_copy_of_an_unloaded_model_says_so() -> None:
    import copy

    compiled = two()
    other = copy.copy(compiled)
    compiled.unload()
    assert other.peft_config == {}
    with pytest.raises(peftc.AdapterError, match="was unloaded; compile it again"):
        other.add_adapter("c", peftc.LoraConfig(target_modules=["linear"]))


def test_switching_is_in_any_order_what_compiling_anew_is() -> None:
    """Against models that never switched, with flags and code."""
    compiled, ids = two(), token_ids()
    compiled.add_adapter("c", peftc.LoraConfig(target_modules=["linear", "conv1d"], r=3))
    perturb(compiled)
    state = compiled.state_dict()
    for names in (["b"], ["a", "c"], [], ["c", "b", "a"], ["a"], ["b", "c"]):
        compiled.set_adapter(names)
        fresh = peftc.compile(Everything().eval(), compiled.peft_config)
        fresh.load_state_dict(state)
        fresh.set_adapter(names)
        assert compiled.site_code() == fresh.site_code()
        assert torch.equal(compiled(ids), fresh(ids))
        flags = {name: parameter.requires_grad for name, parameter in compiled.named_parameters()}
        assert flags == {name: parameter.requires_grad for name, parameter in fresh.named_parameters()}


@pytest.mark.parametrize("names", [None, 3, [None], ["a", 3]])
def test_what_is_no_name_is_refused(names: Any) -> None:
    compiled = peftc.compile(nn.Sequential(nn.Linear(4, 4)), peftc.LoraConfig(target_modules=["0"]), "a")
    calls = [compiled.set_adapter, compiled.set_requires_grad] + ([compiled.merge_adapter] if names is not None else [])
    for call in calls:
        with pytest.raises(peftc.AdapterError, match="expected an adapter's name, or a list of names"):
            call(names)
    assert compiled.active_adapters == ["a"]
