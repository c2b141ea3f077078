"""Trained rows of tokens in all that adapters are used for: grown vocabularies, training, switching, batches, refusals."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftc
from tests.support.adapters import perturb
from tests.support.models import model_of

TOKENS = [5, 1, 40]
IDS = torch.tensor([[5, 7, 40, 2], [9, 1, 5, 3]])
ALONE = peftc.TrainableTokensConfig(token_indices=TOKENS)


def beside(tokens: Any = TOKENS, **fields: Any) -> peftc.LoraConfig:
    return peftc.LoraConfig(r=2, trainable_token_indices=tokens, **fields)


def model(tied: bool = False, kind: str = "llama", **fields: Any) -> Any:
    return model_of(kind, tie_word_embeddings=tied, **fields)


def trained(compiled: Any, lr: float = 0.1) -> Any:
    optimiser = torch.optim.SGD([p for p in compiled.parameters() if p.requires_grad], lr=lr)
    for _ in range(2):
        optimiser.zero_grad()
        compiled(IDS, labels=IDS).loss.backward()
        optimiser.step()
    return compiled


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spec", [ALONE, beside()], ids=["alone", "beside"])
def test_training_changes_the_rows_of_the_tokens_alone(spec: Any, tied: bool) -> None:
    base = model(tied)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    compiled = trained(peftc.compile(base, spec))
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    merged = compiled.merge_and_unload()
    ends = [merged.get_input_embeddings().weight, merged.get_output_embeddings().weight]
    old = before["model.embed_tokens.weight"]
    changed = (ends[0] != old).any(1).nonzero().flatten().tolist()
    assert changed == sorted(TOKENS)
    assert (ends[0] is ends[1]) is tied
    assert tied or torch.equal(ends[1], before["lm_head.weight"])


@pytest.mark.parametrize("how", ["alone", "beside"])
def test_a_token_that_pads_gets_no_gradient_in_the_embedding(how: str) -> None:
    base = model(kind="opt", tied=False)
    assert base.get_input_embeddings().padding_idx == 1
    compiled = peftc.compile(base, ALONE if how == "alone" else beside())
    compiled(IDS, labels=IDS).loss.backward()
    rows = next(p for name, p in compiled.named_parameters() if "trainable_tokens_delta" in name)
    assert rows.grad is not None
    assert rows.grad.any(1).tolist() == [True, False, True]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "make", [lambda t: peftc.TrainableTokensConfig(token_indices=t), beside], ids=["alone", "beside"]
)
def test_only_rows_of_a_grown_vocabulary_are_saved(make: Any, tied: bool, tmp_path: Path) -> None:
    model(tied).save_pretrained(tmp_path / "base")

    def grown(seed: int) -> Any:
        base = type(model()).from_pretrained(tmp_path / "base").eval()
        torch.manual_seed(seed)
        base.resize_token_embeddings(67, mean_resizing=False)
        return base

    tokens = [64, 65, 66]
    compiled = trained(peftc.compile(grown(0), make(tokens)))
    ids = torch.tensor([[64, 3, 66, 65]])
    y = compiled(ids).logits
    compiled.save_pretrained(tmp_path / "few", save_embedding_layers=False)
    assert (tmp_path / "few" / "adapter_model.safetensors").stat().st_size < 9_000
    # Where nothing else of the base is new (rows of an untied head are), its own random rows do not count.
    with warnings.catch_warnings():
        warnings.simplefilter("error" if tied else "ignore")
        loaded = peftc.load(grown(1), tmp_path / "few")
    same = slice(None) if tied else slice(0, 64)
    torch.testing.assert_close(loaded(ids).logits[..., same], y[..., same])
    theirs = peft.PeftModel.from_pretrained(grown(2), str(tmp_path / "few")).eval()
    torch.testing.assert_close(theirs(ids).logits[..., same], y[..., same], rtol=1e-4, atol=1e-5)
    with pytest.raises(peftc.NoMatchError, match=r"token 64 is none of its 64; .*call resize_token_embeddings first"):
        peftc.load(model(tied), tmp_path / "few", verify="files")
    # As peft does where the base's own config says another size, the whole embedding otherwise.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled.save_pretrained(tmp_path / "all")
        again = peftc.load(grown(3), tmp_path / "all", verify="files")
    assert torch.equal(again(ids).logits, y)


def test_rows_are_taken_without_a_copy_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    base = model().bfloat16()
    weight, started = base.get_input_embeddings().weight, []
    rule: Any = type(peftc.plan(base, ALONE).edits[0].rule)
    initialise = rule.initialise

    def noting(self: Any, given: torch.Tensor, *args: Any) -> Any:
        started.append(given.data_ptr())
        return initialise(self, given, *args)

    monkeypatch.setattr(rule, "initialise", noting)
    (rows,) = [p for p in peftc.compile(base, ALONE).parameters() if p.requires_grad]
    assert started == [weight.data_ptr()]
    assert rows.dtype == torch.float32
    assert torch.equal(rows, weight[list(ALONE.token_indices)].float())


def test_modules_by_name_and_ends_of_a_tie() -> None:
    base, both = model(True), {"embed_tokens": [5, 1], "lm_head": [5, 1]}
    plan = peftc.plan(base, beside(both))
    assert peftc.plan(base, ALONE).costs.trainable == 3 * 32
    ends = {edit.site: edit.follows for edit in plan.edits if edit.rule.name == "trainable_tokens"}
    assert ends == {"model.embed_tokens": None, "lm_head": "model.embed_tokens"}
    other = {"embed_tokens": [5, 1], "lm_head": [2]}
    apart = peftc.plan(base, beside(other))
    assert {edit.follows for edit in apart.edits} == {None}
    assert any("lm_head, which has tensors of its own and keeps them" in str(miss) for miss in apart.misses)
    with pytest.raises(peftc.NoMatchError, match=r"trainable_token_indices: 'model.embed_tokens' is tied to lm_head"):
        peftc.compile(base, beside(other, ensure_weight_tying=True))
    assert {edit.follows for edit in peftc.plan(base, beside({"lm_head": [2]})).edits} == {None}
    untied = peftc.plan(model(False), beside(both))
    assert {edit.follows for edit in untied.edits} == {None}
    for spec in (beside(both), beside(other), ALONE):
        made = peftc.plan(base, spec)
        assert peftc.Plan.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "'model.embed_tokens' is adapted already, by LORA"),
        ({"target_modules": ["lm_head"]}, "tied to lm_head, which has tensors of its own: leave that out"),
        ({"modules_to_save": ["embed_tokens"]}, "'model.embed_tokens' is in modules_to_save"),
        ({"trainable_token_indices": {"embeddings": [1]}}, "trainable_token_indices: 'embeddings' matches none"),
        ({"trainable_token_indices": [64]}, "token 64 is none of its 64"),
        ({"trainable_token_indices": []}, "no token is named"),
    ],
)
def test_what_can_not_be_is_refused(fields: dict[str, Any], told: str) -> None:
    spec = peftc.LoraConfig(**{"trainable_token_indices": TOKENS, **fields})
    for unmatched in ("error", "warn"):
        with pytest.raises(peftc.NoMatchError, match=told):
            peftc.compile(model(True), spec, on_unmatched=unmatched)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"trainable_token_indices": [1, 1]}, "token 1 is named twice"),
        ({"trainable_token_indices": [-1]}, "greater than or equal to 0"),
    ],
)
def test_specs_that_make_no_sense(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(peftc.SpecError, match=told):
        peftc.LoraConfig(**fields)


def test_a_head_that_is_saved_whole_goes_its_own_way(tmp_path: Path) -> None:
    base = model(True)
    compiled = trained(peftc.compile(base, beside(modules_to_save=["lm_head"])))
    y = compiled(IDS).logits
    compiled.save_pretrained(tmp_path)
    assert torch.equal(peftc.load(base, tmp_path)(IDS).logits, y)
    with compiled.merged(untie=True):
        torch.testing.assert_close(compiled(IDS).logits, y, rtol=1e-4, atol=1e-5)
    assert torch.equal(compiled(IDS).logits, y)


@pytest.mark.parametrize("tied", [True, False])
def test_one_spec_file_has_lora_rows_of_tokens_and_norms_as_in_peft(tied: bool, tmp_path: Path) -> None:
    base, norms = model(tied), ["input_layernorm", "norm"]
    spec = beside(target_modules=["q_proj", "down_proj"], modules_to_save=norms)
    ours = trained(peftc.compile(base, spec))
    kinds = {"lora_": 0, "trainable_tokens_delta": 0, "modules_to_save": 0}
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad == any(kind in name for kind in kinds)
        kinds = {kind: count + (kind in name and bool(parameter.grad.any())) for kind, count in kinds.items()}
    assert all(kinds.values())
    ours.save_pretrained(tmp_path / "ours")
    assert peftc.load_spec(tmp_path / "ours").to_dict()["modules_to_save"] == norms
    theirs: Any = peft.PeftModel.from_pretrained(model(tied), str(tmp_path / "ours"), is_trainable=True).eval()
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-5)
    for one in (ours, theirs):
        trained(one)
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = peftc.load(model(tied), tmp_path / "theirs")
    y = again(IDS).logits
    torch.testing.assert_close(y, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    with again.merged():
        torch.testing.assert_close(again(IDS).logits, y, rtol=1e-4, atol=1e-5)
    assert torch.equal(again(IDS).logits, y)


@pytest.mark.parametrize("tied", [True, False])
def test_switching_several_at_once_and_rows_of_a_batch(tied: bool) -> None:
    base = model(tied)
    specs = {"a": beside([5, 1]), "b": beside([40]), "c": peftc.TrainableTokensConfig(token_indices=[5, 9])}
    compiled = perturb(peftc.compile(base, specs))
    alone: dict[str, torch.Tensor] = {}
    for name in specs:
        compiled.set_adapter(name)
        alone[name] = compiled(IDS).logits
    for one in ("b", "c"):
        assert not torch.allclose(alone["a"], alone[one], atol=1e-3)
    compiled.set_adapter([])
    assert torch.equal(compiled(IDS).logits, base(IDS).logits)
    for names in (["a", "b"], ["c", "a"], ["__base__", "c"]):
        mixed = compiled(IDS, adapter_names=names).logits
        for row, name in enumerate(names):
            want = base(IDS).logits if name == "__base__" else alone[name]
            torch.testing.assert_close(mixed[row], want[row], rtol=1e-4, atol=1e-5)
    compiled.set_adapter(["a", "b", "c"])
    y, last = compiled(IDS).logits, compiled.adapter_state_dict("c")
    with compiled.merged():
        torch.testing.assert_close(compiled(IDS).logits, y, rtol=1e-4, atol=1e-5)
        rows = compiled.base.get_input_embeddings().weight
        assert torch.equal(rows[5], last["base_model.model.model.embed_tokens.trainable_tokens_delta"][0])
        assert (rows is compiled.base.get_output_embeddings().weight) is tied
    assert torch.equal(compiled(IDS).logits, y)
    compiled.delete_adapter("c")
    compiled.set_adapter("a")
    assert torch.equal(compiled(IDS).logits, alone["a"])


def test_a_merge_of_one_end_cuts_the_tie() -> None:
    base = model(True)
    compiled = perturb(peftc.compile(base, {"rows": ALONE, "head": peftc.LoraConfig(r=2, target_modules=["lm_head"])}))
    compiled.set_adapter(["rows", "head"])
    y = compiled(IDS).logits
    with pytest.raises(peftc.MergeError, match="tied to"):
        compiled.merge_adapter()
    with compiled.merged(untie=True):
        torch.testing.assert_close(compiled(IDS).logits, y, rtol=1e-4, atol=1e-5)
    assert torch.equal(compiled(IDS).logits, y)


@pytest.mark.parametrize("tied", [True, False])
def test_copies_pickles_and_plain_models(tied: bool) -> None:
    compiled = perturb(peftc.compile(model(tied), beside()))
    y = compiled(IDS).logits
    for again in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert torch.equal(again(IDS).logits, y)
        rows = [p for name, p in again.named_parameters() if "trainable_tokens_delta" in name]
        assert len(rows) == 1
        with torch.no_grad():
            rows[0].add_(1)
        assert not torch.allclose(again(IDS).logits, y)
    with torch.device("meta"):
        fresh = peftc.compile(model(tied).to_empty(device="cpu"), ALONE)
    assert fresh.base.model.embed_tokens.token_index.default.value.tolist() == TOKENS
    meta = peftc.compile(model(tied).to("meta"), ALONE)
    assert meta(IDS.to("meta")).logits.shape == y.shape
    assert torch.equal(peftc.compile(model(tied), beside()).unload()(IDS).logits, model(tied)(IDS).logits)


def test_plain_modules_say_which() -> None:
    base = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    with pytest.raises(peftc.NoMatchError, match="'embed_tokens' matches none of 2 sites"):
        peftc.compile(base, ALONE)
    spec = peftc.TrainableTokensConfig(token_indices=[1, 3], target_modules=["0", "1"])
    compiled = perturb(peftc.compile(base, spec))
    x = torch.tensor([[1, 2, 3]])
    y = compiled(x)
    with compiled.merged():
        torch.testing.assert_close(compiled(x), y)
    changed = peftc.compile(
        base, peftc.TrainableTokensConfig(token_indices=[1], target_modules=["0"], init_weights=False)
    )
    assert not torch.allclose(changed(x)[0, 0], base(x)[0, 0])
    assert torch.equal(changed(x)[0, 1:], base(x)[0, 1:])


def test_rows_have_no_scale_and_what_they_are_beside_of_has() -> None:
    compiled = perturb(peftc.compile(model(), beside()))
    compiled.set_scale("default", 0.0)
    merged = compiled.merge_and_unload()
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, model().model.layers[0].self_attn.q_proj.weight)
    assert not torch.equal(merged.model.embed_tokens.weight, model().model.embed_tokens.weight)
    with pytest.raises(peftc.AdapterError, match="TRAINABLE_TOKENS"):
        peftc.compile(model(), ALONE).set_scale("default", 0.5)


def test_combinations_and_forms_of_servers_are_refused(tmp_path: Path) -> None:
    compiled = peftc.compile(model(), {"a": beside(), "b": beside()})
    with pytest.raises(peftc.AdapterError, match=r"'a' has trainable_tokens at model.embed_tokens beside LORA"):
        compiled.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c")
    with pytest.raises(peftc.CheckpointError, match=r"model.embed_tokens: TokenRowsEmbedding is no sum of products"):
        compiled.save_pretrained(tmp_path, form="serving", selected_adapters=["a"])


def test_the_state_has_what_peft_has() -> None:
    compiled = peftc.compile(model(True), beside())
    theirs = peft.get_peft_model(model(True), peft.LoraConfig(r=2, trainable_token_indices=TOKENS))
    assert set(peftc.get_peft_model_state_dict(compiled)) == set(peft.get_peft_model_state_dict(theirs))


class _Head(torch.autograd.Function):
    """What chunked losses do: the weight is an input of their own, and they give its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        return gradients[0] @ weight, gradients[0].flatten(0, 1).T @ x.flatten(0, 1)


@pytest.mark.parametrize(
    "spec",
    [ALONE, beside(modules_to_save=["lm_head"]), peftc.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])],
    ids=["rows", "saved", "lora"],
)
def test_a_head_whose_weight_is_read_past_its_call_is_trained(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = model(True)
    compiled = perturb(peftc.compile(base, spec))
    hidden: dict[str, Any] = {}
    for read in (False, True):
        if read:

            def forward(self: Any, ids: Any, **_: Any) -> Any:
                x = self.model(ids).last_hidden_state
                assert self.lm_head.weight.dtype == torch.float32
                return _Head.apply(x, self.lm_head.weight)

            monkeypatch.setattr(compiled.base, "forward", forward.__get__(compiled.base))
        compiled.zero_grad()
        y = compiled(IDS) if read else compiled(IDS).logits
        y.square().mean().backward()
        hidden[str(read)] = y, {name: p.grad.clone() for name, p in compiled.named_parameters() if p.requires_grad}
    torch.testing.assert_close(hidden["True"], hidden["False"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["embed_tokens", "model.embed_tokens"])
def test_a_file_loads_where_modules_are_called_otherwise(name: str, tmp_path: Path) -> None:
    base = model()
    compiled = perturb(peftc.compile(base, beside({name: TOKENS}, target_modules=["q_proj"])))
    compiled.save_pretrained(tmp_path)
    loaded = peftc.load(base.model, tmp_path, verify="files")
    torch.testing.assert_close(loaded(IDS).last_hidden_state, compiled.base.model(IDS).last_hidden_state)
    loaded.save_pretrained(tmp_path / "again")
    again = peftc.load(base, tmp_path / "again", verify="files")
    torch.testing.assert_close(again(IDS).logits, compiled(IDS).logits)
