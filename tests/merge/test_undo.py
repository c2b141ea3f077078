"""Undoing merges: bit for bit in every mode, from a log of a few percent, or refused with the reason."""

import copy
import dataclasses
import gc
import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peftc
from peftc.merge import fold, undo, undo_log
from tests.support.adapters import perturb
from tests.support.models import Everything, Net, tiny, token_ids
from tests.support.snapshots import assert_unchanged, snapshot
from tests.support.strategies import DTYPES, Case, cases, laws

merging = sys.modules["peftc.merge.merge"]  # The package has a function of that name.
ALL = ["embed", "linear", "transposed", "conv1d", "conv2d", "conv3d"]
LORA = peftc.LoraConfig(target_modules=ALL, r=2, lora_alpha=-3, modules_to_save=["head"])
MODES = ("keep", "residual")


def everything(dtype: torch.dtype = torch.float32, **options: Any) -> peftc.CompiledModel:
    """LoRA (with a negative scaling), then IA3 with a zero entry, on every kind of site."""
    specs = {
        "lora": LORA,
        "ia3": peftc.IA3Config(
            target_modules=[n for n in ALL if n != "embed"], feedforward_modules=["conv2d", "linear"]
        ),
    }
    compiled = perturb(peftc.compile(Everything().to(dtype).eval(), specs, **options))
    with torch.no_grad():
        for tensor in compiled.adapter_state_dict("ia3").values():
            tensor.flatten()[1] = 0
    compiled.set_adapter(["lora", "ia3"])
    return compiled


def interrupt(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, at: int) -> None:
    """Let call number `at` of a function of `module` be interrupted; later ones are not."""
    real, calls = getattr(module, name), 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, name, interrupted)


def log_bytes(compiled: peftc.CompiledModel) -> int:
    return sum(chunk.nbytes for item in compiled.program.merge.replaced for chunk in item.log)


@laws
@given(cases((*DTYPES, torch.float64)), st.sampled_from(MODES), st.integers(1, 3), st.booleans())
def test_law_4_in_every_mode(case: Case, mode: Any, cycles: int, tiny_tiles: bool) -> None:
    before = snapshot(case.model)
    compiled = case.compile(inplace=True)
    y = compiled(case.x)
    with pytest.MonkeyPatch.context() as patch:
        if tiny_tiles:
            patch.setattr(fold, "TILE", 7)
        for _ in range(cycles):
            compiled.merge_adapter(undo=mode)
            assert compiled.site_code() == {}
            compiled.unmerge_adapter()
    assert torch.equal(compiled(case.x), y)
    assert_unchanged(compiled.unload(), before)


@laws
@given(cases(DTYPES), st.booleans())
def test_tiles_and_modes_give_the_same_weights(case: Case, tiny_tiles: bool) -> None:
    merged: list[dict[str, torch.Tensor]] = []
    compiled = case.compile()
    for mode in ("keep", "residual", "none"):
        other = copy.deepcopy(compiled)
        with pytest.MonkeyPatch.context() as patch:
            if tiny_tiles and mode != "keep":
                patch.setattr(fold, "TILE", 5)
            other.merge_adapter(undo=mode)
        merged.append({name: p.detach().clone() for name, p in other.base.named_parameters()})
    for name, value in merged[0].items():
        # Another order of summation in a matrix product may round the last bit in another way.
        near = 2 * torch.finfo(value.dtype).eps
        torch.testing.assert_close(merged[1][name], value, rtol=near, atol=1e-6)
        torch.testing.assert_close(merged[2][name], value, rtol=near, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "cycles"),
    [
        (torch.float32, 50),
        pytest.param(torch.bfloat16, 1000, marks=pytest.mark.slow),
        (torch.float16, 50),
        (torch.float64, 50),
    ],
    ids=str,
)
def test_a_thousand_cycles_from_the_log(dtype: torch.dtype, cycles: int) -> None:
    compiled = everything(dtype, inplace=True)
    before, y = snapshot(compiled), compiled(token_ids()).detach()
    for _ in range(cycles):
        compiled.merge_adapter(undo="residual")
        compiled.unmerge_adapter()
    assert torch.equal(compiled(token_ids()), y)
    assert_unchanged(compiled, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_log_is_a_few_percent_of_gaussian_weights(dtype: torch.dtype) -> None:
    """Rank-16 deltas a tenth as large as the weights; the bar is 10 %."""
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    with torch.no_grad():
        model[0].weight.normal_(std=0.02)
    compiled = peftc.compile(model.to(dtype), peftc.LoraConfig(target_modules=["0"], r=16, lora_alpha=16), inplace=True)
    with torch.no_grad():
        a, b = compiled.adapter_state_dict().values()
        a.normal_()
        b.normal_(std=0.002 / 4)
    before = model[0].weight.clone()
    compiled.merge_adapter(undo="residual")
    assert not torch.equal(model[0].weight, before)
    share = log_bytes(compiled) / before.nbytes
    assert 0.01 < share < 0.08, share
    compiled.unmerge_adapter()
    assert torch.equal(model[0].weight, before)


def test_in_place_only_where_the_weights_are_the_models_own() -> None:
    model = Everything().eval()
    compiled = perturb(peftc.compile(model, LORA))
    before = snapshot(compiled)
    with pytest.raises(peftc.MergeError, match="not this model's own: the original") as caught:
        compiled.merge_adapter(undo="residual")
    assert "undo='keep'" in str(caught.value)
    assert_unchanged(compiled, before)
    sibling = peftc.compile(model, LORA)
    del model, caught
    gc.collect()
    with pytest.raises(peftc.MergeError, match="another one compiled from it"):
        compiled.merge_adapter(undo="residual")
    del sibling
    gc.collect()
    weight = compiled.base.linear.weight
    compiled.merge_adapter(undo="residual")
    assert compiled.base.linear.weight is weight
    compiled.unmerge_adapter()
    assert_unchanged(compiled, before)


def test_tensors_that_others_hold_are_not_changed() -> None:
    def fresh() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4))

    spec = peftc.LoraConfig(target_modules=["0"], r=2)
    # An array.
    array, model = np.ones((4, 4), dtype=np.float32), fresh()
    model[0].weight = nn.Parameter(torch.from_numpy(array))
    compiled = perturb(peftc.compile(model, spec))
    del model
    with pytest.raises(peftc.MergeError, match="not torch's own"):
        compiled.merge_adapter(undo="residual")
    # A state dict of the original.
    model = fresh()
    state, compiled = model.state_dict(), perturb(peftc.compile(model, spec))
    del model
    with pytest.raises(peftc.MergeError, match="a state dict holds it too"):
        compiled.merge_adapter(undo="residual")
    before = state["0.weight"].clone()
    del compiled
    assert torch.equal(state["0.weight"], before)
    # A model compiled from it before it was given away.
    model = fresh()
    first, second = peftc.compile(model, spec), perturb(peftc.compile(model, spec, inplace=True))
    with pytest.raises(peftc.MergeError, match="another one compiled from it"):
        second.merge_adapter(undo="residual")
    del first
    # What waits for a backward pass is no other holder.
    y = second(torch.randn(2, 4))
    second.merge_adapter(undo="residual")
    second.unmerge_adapter()
    assert y.requires_grad


@pytest.mark.parametrize("change", ["loaded", "resized"])
def test_what_happens_to_merged_weights_is_not_lost(change: str) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(target_modules=["embed_tokens", "q_proj"], r=2)))
    compiled.merge_adapter()
    if change == "loaded":
        compiled.base.load_state_dict({n: t + 1 for n, t in model.state_dict().items()}, strict=False)
    else:
        compiled.base.resize_token_embeddings(70)
    before = snapshot(compiled)
    with pytest.raises(peftc.MergeError, match=r"the merged tensor was changed|was resized from"):
        compiled.unmerge_adapter()
    assert_unchanged(compiled, before)
    assert compiled.merge_and_unload().get_input_embeddings().weight.shape[0] == (70 if change == "resized" else 64)


def test_flags_set_while_merged_stay() -> None:
    specs = {n: peftc.LoraConfig(target_modules=["linear"], r=2) for n in "abc"}
    compiled = peftc.compile(Everything(), specs)
    compiled.merge_adapter()
    with pytest.raises(peftc.MergeError, match=r"unmerge_adapter\(\) first"):
        compiled.set_requires_grad("a", False)
    compiled.set_requires_grad(["b", "c"])
    compiled.set_requires_grad("c", False)
    compiled.unmerge_adapter()
    assert compiled.get_model_status().requires_grad == {"a": True, "b": True, "c": False}


def test_embeddings_that_renormalise_are_not_merged() -> None:
    model = nn.Sequential(nn.Embedding(6, 4, max_norm=1.0))
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(target_modules=["0"], r=2)))
    assert "can't be merged: max_norm" in str(compiled.plan)
    with pytest.raises(peftc.MergeError, match="max_norm would scale what is merged"):
        compiled.merge_adapter()


def test_flags_of_untied_weights_come_back() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(target_modules=["lm_head"], r=2)))
    with pytest.warns(UserWarning, match="no longer tied"):
        plain = compiled.merge_and_unload(untie=True)
    assert all(parameter.requires_grad for parameter in plain.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_what_fails_half_way_is_undone(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = everything(inplace=True)
    before, y = snapshot(compiled), compiled(token_ids())
    monkeypatch.setattr(fold, "TILE", 16)
    interrupt(monkeypatch, undo if mode == "residual" else merging, "checksum", 9)
    with pytest.raises(KeyboardInterrupt):
        compiled.merge_adapter(undo=mode)
    assert_unchanged(compiled, before)
    assert torch.equal(compiled(token_ids()), y)
    assert compiled.merged_adapters == []


def test_an_interrupt_between_tiles_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = everything(inplace=True)
    before = snapshot(compiled)
    monkeypatch.setattr(fold, "TILE", 16)
    interrupt(monkeypatch, undo, "encode", 20)
    with pytest.raises(KeyboardInterrupt):
        compiled.merge_adapter(undo="residual")
    assert_unchanged(compiled, before)


def test_a_broken_adapter_found_late_is_taken_out_again() -> None:
    compiled = perturb(peftc.compile(Everything().eval(), LORA, inplace=True))
    with torch.no_grad():
        compiled.base.conv3d.lora_A.default.weight[0] = float("inf")
    before = snapshot(compiled)
    with pytest.raises(peftc.MergeError, match=r"conv3d\.weight: .* NaN or Inf"):
        compiled.merge_adapter(undo="residual")
    assert_unchanged(compiled, before)


def test_an_interrupted_undo_can_be_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = everything(inplace=True)
    before = snapshot(compiled)
    compiled.merge_adapter(undo="residual")
    interrupt(monkeypatch, undo, "decode", 3)
    with pytest.raises(KeyboardInterrupt):
        compiled.unmerge_adapter()
    assert compiled.merged_adapters == ["lora", "ia3"]
    compiled.unmerge_adapter()
    assert_unchanged(compiled, before)


def test_adapters_may_change_while_merged() -> None:
    """The log goes by the factors that were merged."""
    compiled = everything(inplace=True)
    before = snapshot(compiled)
    compiled.merge_adapter(undo="residual")
    state = {n: {k: v.clone() for k, v in compiled.adapter_state_dict(n).items()} for n in ("lora", "ia3")}
    perturb(compiled)
    compiled.unmerge_adapter()
    with torch.no_grad():
        for name, tensors in state.items():
            for key, tensor in compiled.adapter_state_dict(name).items():
                tensor.copy_(tensors[key])
    assert_unchanged(compiled, before)


def test_the_number_of_threads_does_not_matter() -> None:
    model = nn.Sequential(nn.Linear(700, 900), nn.Linear(900, 300))
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(target_modules=["0", "1"], r=33), inplace=True))
    before, threads = snapshot(compiled), torch.get_num_threads()
    try:
        for merging, undoing in ((1, 2), (2, 1)):
            torch.set_num_threads(merging)
            compiled.merge_adapter(undo="residual")
            torch.set_num_threads(undoing)
            compiled.unmerge_adapter()
            assert_unchanged(compiled, before)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", MODES)
def test_a_tensor_that_was_changed_is_noticed(mode: Any) -> None:
    compiled = everything(inplace=True)
    before = snapshot(compiled)
    compiled.merge_adapter(undo=mode)
    kept = next(item for item in compiled.program.merge.replaced if item.leaf == "weight" and item.owner == "linear")
    tensor = compiled.base.linear.weight if mode == "residual" else kept.original
    with torch.no_grad():
        tensor[0, 0] += 1
    merged = snapshot(compiled)
    with pytest.raises(peftc.MergeError, match=r"linear\.weight: the (merged|original) tensor was changed"):
        compiled.unmerge_adapter()
    assert_unchanged(compiled, merged)
    assert compiled.merged_adapters == ["lora", "ia3"]
    compiled.unmerge_adapter(check=False)
    assert compiled.merged_adapters == []
    difference = compiled.base.linear.weight - before["tensors"]["base.linear.weight"]
    assert difference[0, 0].abs() > 0.5
    assert difference.flatten()[1:].count_nonzero() == 0


def test_a_model_cast_while_merged_is_cast_back_first() -> None:
    compiled = everything(torch.bfloat16, inplace=True)
    before = snapshot(compiled)
    compiled.merge_adapter(undo="residual")
    compiled.base.linear.float()
    with pytest.raises(peftc.MergeError, match="was bfloat16 when merged and is float32 now"):
        compiled.unmerge_adapter()
    compiled.base.linear.bfloat16()  # float32 holds all of bfloat16, so nothing was lost
    compiled.unmerge_adapter()
    assert torch.equal(compiled.base.linear.weight, before["tensors"]["base.linear.weight"])


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_carry_the_log(how: Any) -> None:
    compiled = everything(inplace=True)
    y = compiled(token_ids())
    before = {name: tensor.clone() for name, tensor in compiled.state_dict().items()}
    compiled.merge_adapter(undo="residual")
    other = how(compiled)
    compiled.unmerge_adapter()
    other.unmerge_adapter()
    assert torch.equal(other(token_ids()), y)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_with_undo_none_there_is_no_way_back() -> None:
    compiled = everything()
    y = compiled(token_ids())
    compiled.merge_adapter(undo="none")
    assert all(item.original is None for item in compiled.program.merge.replaced)
    for call in (compiled.unmerge_adapter, compiled.unload):
        with pytest.raises(peftc.MergeError, match="undo='none': the original"):
            call()
    plain = compiled.merge_and_unload()
    torch.testing.assert_close(plain(token_ids()), y, rtol=1e-4, atol=1e-5)


def test_a_merge_for_a_while() -> None:
    compiled = everything(inplace=True)
    before, y = snapshot(compiled), compiled(token_ids())
    for mode in MODES:
        with compiled.merged(undo=mode) as inside:
            assert inside is compiled
            assert compiled.merged_adapters == ["lora", "ia3"]
            torch.testing.assert_close(compiled(token_ids()), y, rtol=1e-4, atol=1e-5)
        assert_unchanged(compiled, before)
        with pytest.raises(RuntimeError, match="inside"), compiled.merged("lora", undo=mode):
            raise RuntimeError("inside")
        assert_unchanged(compiled, before)


def test_a_context_without_a_way_back_is_not_entered() -> None:
    compiled = everything()
    with pytest.raises(peftc.MergeError, match="could not be left again"), compiled.merged(undo="none"):
        pass
    assert compiled.merged_adapters == []


def test_merged_adapters_do_not_train_and_others_do() -> None:
    specs = {"a": peftc.LoraConfig(target_modules=["linear"], r=2), "b": peftc.LoraConfig(target_modules=["head"], r=2)}
    compiled = perturb(peftc.compile(Everything(), specs))
    compiled.set_adapter(["a", "b"])
    y = compiled.eval()(token_ids())
    compiled.merge_adapter("a")
    assert {n.split(".")[-2] for n, p in compiled.named_parameters() if p.requires_grad} == {"b"}
    torch.testing.assert_close(compiled(token_ids()), y, rtol=1e-4, atol=1e-5)
    compiled(token_ids()).square().sum().backward()
    assert compiled.base.head.lora_B.b.weight.grad is not None
    compiled.unmerge_adapter()
    assert {n.split(".")[-2] for n, p in compiled.named_parameters() if p.requires_grad} == {"a", "b"}


def test_the_tied_end_keeps_the_original_in_place_too() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(target_modules=["lm_head", "q_proj"], r=2), inplace=True))
    before, ids = snapshot(compiled), token_ids(2, 5, 64)
    y = compiled(ids).logits
    with pytest.warns(UserWarning, match="no longer tied"):
        compiled.merge_adapter(untie=True, undo="residual")
    torch.testing.assert_close(compiled(ids).logits, y, rtol=1e-4, atol=1e-5)
    compiled.unmerge_adapter()
    assert compiled.base.lm_head.weight is compiled.base.model.embed_tokens.weight
    assert_unchanged(compiled, before)


def test_a_flat_graph_has_the_nodes_of_the_bare_one() -> None:
    model = Net().eval()
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(target_modules=["fc", "conv"], r=2), capture="symbolic"))
    spliced = len(compiled.graph_of("").nodes)
    assert spliced > len(torch.fx.symbolic_trace(model).graph.nodes)
    compiled.merge_adapter()
    assert compiled.site_code() == {}
    assert len(torch.fx.symbolic_trace(compiled.base).graph.nodes) == len(torch.fx.symbolic_trace(model).graph.nodes)


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = everything(inplace=True)
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(peftc.MergeError, match=r"pip install 'peftc\[undo\]'"):
        compiled.merge_adapter(undo="residual")
    with pytest.raises(peftc.MergeError, match="valid are 'keep', 'residual' and 'none'"):
        compiled.merge_adapter(undo="all")  # pyright: ignore


def test_the_estimate_is_the_same_in_any_order_of_summation() -> None:
    """So neither threads nor devices matter: products of exact factors, and their sums, round nothing."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(33, 50, generator=generator), torch.randn(40, 33, generator=generator)
    order = torch.randperm(33, generator=generator)
    params = peftc.Param((33, 50), axes="ri"), peftc.Param((40, 33), axes="or")
    assert not torch.equal(b.double() @ a.double(), b[:, order].double() @ a[order].double())
    exact_a, exact_b = fold.exact(a, params[0]), fold.exact(b, params[1])
    assert torch.equal(exact_b @ exact_a, exact_b[:, order] @ exact_a[order])
    torch.testing.assert_close(exact_b @ exact_a, b.double() @ a.double(), rtol=0, atol=2e-5)
    vector = peftc.Param((33, 50), use="vector")
    assert torch.equal(fold.exact(a, vector), a.double())


def test_a_tile_is_written_and_logged_or_neither() -> None:
    class Full(list[Any]):
        def append(self, item: Any) -> None:
            super().append(item)
            raise KeyboardInterrupt

    tile, log = torch.zeros(3), Full()
    with pytest.raises(KeyboardInterrupt):
        undo._write_tile(tile, torch.zeros(3), torch.ones(3), log, undo.encode(tile, tile))
    assert torch.equal(tile, torch.zeros(3))
    assert log == []


def test_a_log_that_does_not_give_the_original_is_noticed() -> None:
    compiled = everything(inplace=True)
    compiled.merge_adapter(undo="residual")
    merged = snapshot(compiled)
    replaced = compiled.program.merge.replaced
    place = next(i for i, item in enumerate(replaced) if item.log and item.owner == "linear")
    zeros = torch.zeros_like(compiled.base.linear.weight)
    replaced[place] = dataclasses.replace(replaced[place], log=(undo.encode(zeros, zeros),))
    with pytest.raises(peftc.MergeError, match=r"linear\.weight: undoing the merge did not give the original"):
        compiled.unmerge_adapter()
    assert torch.equal(compiled.base.linear.weight, merged["tensors"]["base.linear.weight"])
    assert compiled.merged_adapters == ["lora", "ia3"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksums_taken_while_folding_are_those_of_the_tensors(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold, "TILE", 2**9)
    compiled = everything(dtype)
    compiled.merge_adapter()
    taken = compiled.program.merge.replaced
    assert len(taken) >= len(ALL)
    for item in taken:
        assert item.crc == undo_log.checksum(item.original), item
        assert item.merged == undo_log.checksum(undo.tensor_of(compiled.base, item.owner, item.leaf)), item
    assert undo_log.checksum(torch.zeros(4)) != undo_log.checksum(torch.ones(4))


@pytest.mark.parametrize("alpha", [7, -3])
def test_the_estimate_by_a_product_has_the_bits_of_the_rules_own(alpha: int) -> None:
    """Logs that were written by the one are read by the other; zeros with a sign are bits as well."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(50, 40))
    program = perturb(peftc.compile(base, peftc.LoraConfig(r=5, lora_alpha=alpha, target_modules=["0"]))).program
    with torch.no_grad():
        for name, parameter in program.base.named_parameters():
            if "lora_B" in name:
                parameter[:9] = 0
    (step,) = fold.steps_back(program.adapters["default"].edits, fold.value_in(program.adapters))
    assert step.product is not None
    weight = torch.randn(40, 50, dtype=torch.float64)
    weight[3:12, :25], weight[:, 40:] = -0.0, 0.0
    by_rule = dataclasses.replace(step, product=None)
    for axis, start, stop in (("", 0, 40), ("o", 5, 23)):
        part = weight[start:stop]
        own, other = (one.off(part.clone(), axis, start, stop) for one in (step, by_rule))
        assert not torch.equal(own, part)
        assert torch.equal(own.view(torch.int64), other.view(torch.int64))


def test_a_log_holds_any_bits_of_any_length() -> None:
    """Steps of every size, also between signs and to values that are no numbers."""
    generator = torch.Generator().manual_seed(0)
    for integer, dtype in ((torch.int16, torch.bfloat16), (torch.int32, torch.float32), (torch.int64, torch.float64)):
        limits = torch.iinfo(integer)
        for length in (0, 1, 3, 4, 9, 1000):
            bits = torch.randint(limits.min, limits.max, (length,), generator=generator, dtype=integer)
            near = bits + torch.randint(-150, 150, (length,), generator=generator, dtype=integer)
            close = bits + torch.randint(-1, 2, (length,), generator=generator, dtype=integer)
            for guess in (bits, near, close, bits.flip(0), bits ^ limits.min, torch.full_like(bits, limits.max)):
                chunk = undo_log.encode(bits.view(dtype), guess.view(dtype))
                assert torch.equal(undo_log.decode(chunk, guess.view(dtype)).view(integer), bits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_weight_of_any_dtype_is_folded_in_place_as_beside(dtype: torch.dtype) -> None:
    """Tiles are worked on in memory that is used again, which no result may lie in."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(700, 900, bias=False)).to(dtype)  # Several tiles.
    spec = peftc.LoraConfig(r=3, target_modules=["0"])
    beside, inside = (perturb(peftc.compile(copy.deepcopy(base), spec, inplace=True)) for _ in range(2))
    inside.load_state_dict(beside.state_dict())
    beside.merge_adapter(undo="keep")
    inside.merge_adapter(undo="residual")
    assert not torch.equal(beside.base[0].weight, base[0].weight)
    assert torch.equal(inside.base[0].weight, beside.base[0].weight)
    inside.unmerge_adapter()
    assert torch.equal(inside.base[0].weight, base[0].weight)
