"""Adapters that bring embeddings of a vocabulary of another size, merged into the base on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import peftc
from tests.support.adapters import lora, perturb
from tests.support.models import tiny


def llama(**config: Any) -> Any:
    torch.manual_seed(0)
    return tiny("llama", **config)


SIZE = llama().config.vocab_size
SPECS = {
    "saved": lora("q_proj", modules_to_save=["embed_tokens", "lm_head"]),
    "adapted": lora("q_proj", "embed_tokens", "lm_head"),
    "kept": lora("q_proj"),
}


@pytest.mark.parametrize("more", [6, -5])
@pytest.mark.parametrize("shards", [None, "40KB"])
@pytest.mark.parametrize(("kind", "tied"), [("saved", False), ("adapted", False), ("kept", False), ("kept", True)])
def test_the_merged_checkpoint_has_the_adapters_vocabulary(
    kind: str, tied: bool, shards: str | None, more: int, tmp_path: Path
) -> None:
    model = llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "base", **({"max_shard_size": shards} if shards else {}))
    model.resize_token_embeddings(SIZE + more, mean_resizing=False)
    compiled = perturb(peftc.compile(model, SPECS[kind]))
    compiled.save_pretrained(tmp_path / "a", save_embedding_layers="auto" if kind == "saved" else True)
    ids = torch.tensor([[5, 6, SIZE + more - 1]])
    want = compiled(ids).logits
    peftc.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "merged", verify="files")
    merged, info = LlamaForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert merged.config.vocab_size == SIZE + more
    torch.testing.assert_close(merged.eval()(ids).logits, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(peftc.CheckpointError, match="undo=True can't give a vocabulary of another size back"):
        peftc.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "no", verify="files", undo=True)


def test_embeddings_that_do_not_come_whole_are_refused_and_the_advice_holds(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(SIZE + 6, mean_resizing=False)
    compiled = perturb(peftc.compile(model, lora("q_proj", modules_to_save=["lm_head"])))
    compiled.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    paths = (tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    with pytest.raises(peftc.CheckpointError, match=r"embed_tokens.weight has .*save_embedding_layers=True"):
        peftc.merge_checkpoint(*paths, verify="files")
    compiled.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    peftc.merge_checkpoint(*paths, verify="files")
    ids = torch.tensor([[5, SIZE + 2]])
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(paths[2])(ids).logits, compiled(ids).logits)
