"""Trained rows of tokens against peft: alone and beside LoRA, tied and not, files both ways, merging."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

import peftc
from tests.support.models import inputs_for, model_of

TOKENS = [5, 1, 40, 0]
KINDS = ("llama", "gpt2", "t5", "bert", "gemma2", "opt")
CONFIGS: dict[str, Any] = {
    "alone": lambda: peft.TrainableTokensConfig(token_indices=list(TOKENS)),
    "beside": lambda: peft.LoraConfig(r=2, trainable_token_indices=list(TOKENS)),
}


# In bfloat16 peft casts activations up and peftc the adapter down; these tiny models make much of that rounding.
AMPLIFIED = (("t5", "beside"), ("gpt2", "beside"))


def theirs_of(model: Any, config: Any, seed: int = 1) -> Any:
    """A model of peft, as if it had been trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = peft.get_peft_model(copy.deepcopy(model), config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape)
    return made


def outputs(model: Any, kind: str) -> Tensor:
    ids = inputs_for(kind)
    ids["input_ids"][0, :5] = torch.tensor([*TOKENS, 7])
    return model(**ids).logits


def lost_bias(model: Any, kind: str, tied: bool) -> Any:
    """What peft's wrapper of a head forgets: the bias, which BERT's has."""
    return model.cls.predictions.decoder.bias.detach() if kind == "bert" and tied else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_files_outputs_and_gradients(kind: str, how: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(kind, dtype, tie_word_embeddings=tied)
    if kind == "bert":
        with torch.no_grad():
            model.cls.predictions.decoder.bias += 1.0
    lost = lost_bias(model, kind, tied)
    wide = dtype == torch.float32
    near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5} if wide else {"rtol": 0.05, "atol": 0.05}
    theirs = theirs_of(model, CONFIGS[how]())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peftc.load(model, tmp_path / "theirs", is_trainable=True).eval()
    y, want = outputs(ours, kind), outputs(theirs, kind) + lost
    assert not torch.allclose(y, outputs(model, kind), atol=0.1)
    if not wide and (kind, how) in AMPLIFIED:
        assert (y - want).norm() <= 0.05 * want.norm()
    else:
        torch.testing.assert_close(y, want, **near)
    for one in (y, want):
        one.float().log_softmax(-1)[..., [1, 5, 9]].mean().backward()
    grads = {name.rpartition(".")[0]: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    own = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert len(own) == len(grads)
    rows = next(grad for name, grad in grads.items() if "trainable_tokens" in name)
    mine = next(grad for name, grad in own.items() if "trainable_tokens" in name)
    assert rows.abs().max() > 1e-4
    if wide or (kind, how) not in AMPLIFIED:
        assert (mine - rows).abs().max() <= (1e-4 if wide else 0.05) * rows.abs().max()
    else:  # As near to the exact gradients as peft's are, to a factor.
        exact = copy.deepcopy(ours).double()
        exact.zero_grad(set_to_none=True)
        outputs(exact, kind).log_softmax(-1)[..., [1, 5, 9]].mean().backward()
        true = next(p.grad for name, p in exact.named_parameters() if "trainable_tokens" in name and p.grad is not None)
        assert (mine - true).norm() <= 3 * (rows - true).norm() + 0.02 * true.norm()
    for name, grad in grads.items() if wide else ():
        if "lora" in name:
            same = own[f"{name.replace('base_model.model.', 'base.')}.weight"]
            assert (same - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-9
    ours.save_pretrained(tmp_path / "ours")
    mine_saved, their_saved = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs"))
    assert {key: value.shape for key, value in mine_saved.items()} == {k: v.shape for k, v in their_saved.items()}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours")).eval()
    assert not [str(one.message) for one in told if "keys" in str(one.message) or "keyword" in str(one.message)]
    assert torch.equal(outputs(again, kind), outputs(theirs, kind))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_merging_keeps_ties_and_is_undone(kind: str, how: str, tied: bool, tmp_path: Path) -> None:
    model = model_of(kind, tie_word_embeddings=tied)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight  # T5's always are.
    theirs_of(model, CONFIGS[how]()).save_pretrained(tmp_path)
    ours = peftc.load(model, tmp_path)
    y = outputs(ours, kind)
    before = dict(ours.base.named_parameters(remove_duplicate=False))
    bits = {name: value.detach().clone() for name, value in before.items()}
    for undo in ("keep", "residual"):
        own = peftc.load(copy.deepcopy(model), tmp_path, inplace=True) if undo == "residual" else ours
        own.merge_adapter(undo=undo)
        torch.testing.assert_close(outputs(own, kind), y, rtol=1e-4, atol=1e-4)
        embedding, head = own.base.get_input_embeddings().weight, own.base.get_output_embeddings().weight
        assert (embedding is head) is tied
        own.unmerge_adapter()
        after = dict(own.base.named_parameters(remove_duplicate=False))
        assert all(torch.equal(after[name], value) for name, value in bits.items())
        assert (own.base.get_input_embeddings().weight is own.base.get_output_embeddings().weight) is tied
    merged = ours.merge_and_unload()
    assert merged.config.tie_word_embeddings is model.config.tie_word_embeddings
    torch.testing.assert_close(outputs(merged, kind), y, rtol=1e-4, atol=1e-4)
    rows = merged.get_input_embeddings().weight
    others = [token for token in range(64) if token not in TOKENS]
    assert torch.equal(rows[others], model.get_input_embeddings().weight[others])
    assert not torch.equal(rows[TOKENS], model.get_input_embeddings().weight[TOKENS])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_merging_on_disk(kind: str, how: str, tied: bool, tmp_path: Path) -> None:
    model = model_of(kind, tie_word_embeddings=tied)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.save_pretrained(tmp_path / "base")
    theirs = theirs_of(model, CONFIGS[how]())
    theirs.save_pretrained(tmp_path / "adapter")
    peftc.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", undo=True, progress=False)
    again, info = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) is tied
    torch.testing.assert_close(outputs(again.eval(), kind), outputs(theirs, kind), rtol=1e-4, atol=1e-4)
    peftc.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back", progress=False)
    files = [tmp_path / name / "model.safetensors" for name in ("back", "base")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", CONFIGS)
def test_whole_embeddings_where_the_vocabulary_has_grown(how: str, tied: bool, tmp_path: Path) -> None:
    """By peft's `auto`, and into one another's models; of an untied head, peft alone forgets the new rows."""
    model_of("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "base")

    def grown(seed: int) -> Any:
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
        torch.manual_seed(seed)
        base.resize_token_embeddings(67)
        return base

    def logits(model: Any) -> Tensor:
        found = model(torch.tensor([[64, 5, 66, 7]])).logits
        return found if tied or how == "beside" else found[..., :64]

    config = CONFIGS[how]()
    tokens = "token_indices" if how == "alone" else "trainable_token_indices"
    setattr(config, tokens, [64, 66, 5])
    theirs = theirs_of(grown(0), config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peftc.load(grown(1), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    one, other = (set(load_file(tmp_path / name / "adapter_model.safetensors")) for name in ("theirs", "ours"))
    assert other - one == (set() if tied or how == "beside" else {"base_model.model.lm_head.weight"})
    repeated = {key for key in one - other if key.startswith("base_model.model.lm_head.token_adapter.trainable")}
    assert one - other == repeated  # The same rows once more.
    again = peft.PeftModel.from_pretrained(grown(2), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-4, atol=1e-5)
    peftc.merge_checkpoint(tmp_path / "base", tmp_path / "ours", tmp_path / "merged", progress=False)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == 67
    torch.testing.assert_close(logits(merged), logits(theirs), rtol=1e-4, atol=1e-5)
