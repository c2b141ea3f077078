"""`ensure_weight_tying`: adapters and saved copies at all ends of the input embedding's tie are one, in files too."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peftc
from tests.support.adapters import perturb
from tests.support.models import model_of

IDS = torch.tensor([[5, 7, 40, 2], [9, 1, 5, 3]])
HEAD = {"target_modules": ["q_proj", "lm_head"]}
EMBEDDING = {"target_modules": ["q_proj", "embed_tokens"]}
SAVED = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
FIELDS = pytest.mark.parametrize("fields", [HEAD, EMBEDDING, SAVED], ids=["head", "embedding", "saved"])


def model(kind: str = "llama", tied: bool = True) -> Any:
    return model_of(kind, tie_word_embeddings=tied)


def tied(fields: dict[str, Any], kind: str = "llama", **more: Any) -> Any:
    spec = peftc.LoraConfig(r=4, ensure_weight_tying=True, **{**fields, **more})
    return perturb(peftc.compile(model(kind), spec))


def theirs(fields: dict[str, Any]) -> Any:
    return peft.get_peft_model(model(), peft.LoraConfig(r=4, ensure_weight_tying=True, **copy.deepcopy(fields))).eval()


@FIELDS
def test_files_are_those_of_peft_both_ways(fields: dict[str, Any], tmp_path: Path) -> None:
    ours, other = tied(fields), theirs(fields)
    keys = set(peftc.get_peft_model_state_dict(ours, save_embedding_layers=False))
    assert keys == set(peft.get_peft_model_state_dict(other, save_embedding_layers=False))
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        read = peft.PeftModel.from_pretrained(model(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(read(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-5)
    read.save_pretrained(str(tmp_path / "theirs"))
    again = peftc.load(model(), tmp_path / "theirs")
    torch.testing.assert_close(again(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-5)
    assert len(dict(again.named_parameters())) == len(dict(ours.named_parameters()))


@FIELDS
def test_one_step_is_that_of_peft(fields: dict[str, Any], tmp_path: Path) -> None:
    ours = tied(fields)
    ours.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(model(), str(tmp_path), is_trainable=True).eval()
    for one in (ours, other):
        trained = [p for p in one.parameters() if p.requires_grad]
        optimiser = torch.optim.SGD(trained, lr=0.1)
        one(IDS, labels=IDS).loss.backward()
        optimiser.step()
    torch.testing.assert_close(ours(IDS).logits, other(IDS).logits, rtol=1e-4, atol=1e-5)


@FIELDS
def test_merging_keeps_the_tie_and_is_undone(fields: dict[str, Any]) -> None:
    spec = peftc.LoraConfig(r=4, ensure_weight_tying=True, **fields)
    compiled: Any = perturb(peftc.compile(model(), spec, inplace=True))
    before, y = compiled.base.lm_head.weight.clone(), compiled(IDS).logits
    for undo in ("keep", "residual"):
        with compiled.merged(undo=undo):
            torch.testing.assert_close(compiled(IDS).logits, y, rtol=1e-4, atol=1e-5)
            assert compiled.base.lm_head.weight is compiled.base.model.embed_tokens.weight
        assert torch.equal(compiled(IDS).logits, y)
        assert torch.equal(compiled.base.lm_head.weight, before)
    plain = compiled.merge_and_unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.config.tie_word_embeddings
    torch.testing.assert_close(plain(IDS).logits, y, rtol=1e-4, atol=1e-5)


@FIELDS
def test_copies_pickles_plans_and_merges_on_disk(fields: dict[str, Any], tmp_path: Path) -> None:
    compiled = tied(fields)
    y = compiled(IDS).logits
    assert peftc.Plan.from_json(compiled.plan.to_json()) == compiled.plan
    for again in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert torch.equal(again(IDS).logits, y)
        own = [p for p in again.parameters() if p.requires_grad]
        assert len(own) == len([p for p in compiled.parameters() if p.requires_grad])
    compiled.save_pretrained(tmp_path / "adapter")
    model().save_pretrained(tmp_path / "base")
    peftc.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(model()).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, y, rtol=1e-4, atol=1e-5)


def test_forms_for_servers_and_combinations_have_factors_at_every_end(tmp_path: Path) -> None:
    compiled = tied(HEAD)
    compiled.save_pretrained(tmp_path / "serving", form="serving")
    for read in (
        peftc.load(model(), tmp_path / "serving"),
        peft.PeftModel.from_pretrained(model(), tmp_path / "serving"),
    ):
        torch.testing.assert_close(read(IDS).logits, compiled(IDS).logits, rtol=1e-4, atol=1e-5)
    compiled.add_adapter("b", peftc.LoraConfig(r=2, ensure_weight_tying=True, **HEAD))
    perturb(compiled)
    compiled.add_weighted_adapter(["default", "b"], [0.5, -0.25], "sum", "cat")
    compiled.set_adapter("sum")
    y = compiled(IDS).logits
    compiled.set_adapter(["default", "b"])
    compiled.set_scale("default", 0.5)
    compiled.set_scale("b", -0.25)
    torch.testing.assert_close(compiled(IDS).logits, y, rtol=1e-4, atol=1e-5)


def test_rows_of_a_batch_and_switching() -> None:
    compiled = tied(HEAD)
    compiled.add_adapter("b", peftc.LoraConfig(r=2, ensure_weight_tying=True, **HEAD))
    perturb(compiled)
    alone = compiled(IDS).logits
    compiled.set_adapter("b")
    other = compiled(IDS).logits
    mixed = compiled(IDS, adapter_names=["default", "b"]).logits
    torch.testing.assert_close(mixed[0], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], other[1], rtol=1e-4, atol=1e-5)


def test_patterns_of_the_embedding_count_at_all_ends() -> None:
    compiled = tied(EMBEDDING, rank_pattern={"embed_tokens": 2}, alpha_pattern={"embed_tokens": 3})
    ends = {edit.site: edit for edit in compiled.plan.edits if edit.site in ("lm_head", "model.embed_tokens")}
    assert {edit.constants["scaling"] for edit in ends.values()} == {1.5}
    assert ends["lm_head"].follows == "model.embed_tokens"


def test_without_a_tie_nothing_follows_and_other_forms_are_refused() -> None:
    untied = peftc.plan(model(tied=False), peftc.LoraConfig(r=4, ensure_weight_tying=True, **HEAD))
    assert "model.embed_tokens" not in untied.sites
    apart = peftc.plan(model(), peftc.LoraConfig(r=4, **HEAD))
    assert "model.embed_tokens" not in apart.sites
    with pytest.raises(peftc.NoMatchError, match=r"lm_head\.weight, which can't have its tensors"):
        peftc.compile(model(), peftc.LoraConfig(r=4, ensure_weight_tying=True, use_dora=True, **HEAD))


def test_a_head_with_a_bias_keeps_it(tmp_path: Path) -> None:
    base = model("bert")
    spec = peftc.LoraConfig(r=4, ensure_weight_tying=True, target_modules=["query"], modules_to_save=["decoder"])
    compiled: Any = perturb(peftc.compile(base, spec))
    y = compiled(IDS).logits
    compiled.save_pretrained(tmp_path)
    assert torch.equal(peftc.load(base, tmp_path)(IDS).logits, y)
    with compiled.merged(untie=True):  # The bias has a second name in the model.
        torch.testing.assert_close(compiled(IDS).logits, y, rtol=1e-4, atol=1e-5)
        assert compiled.base.get_output_embeddings().weight is compiled.base.get_input_embeddings().weight
