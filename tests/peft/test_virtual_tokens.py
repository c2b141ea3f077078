"""Virtual tokens as scripts of peft use them, each with peft and with peftc.peft on the same values."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peftc
import peftc.peft
from tests.support.models import model_of
from tests.support.scripts import base, filled

IDS = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]])


def seq2seq() -> Any:
    return model_of("t5")


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_encoder_decoders_are_trained_saved_and_loaded(config: str, tmp_path: Path) -> None:
    outputs: list[list[Any]] = []
    for lib in (peft, peftc.peft):
        more = {"encoder_hidden_size": 8} if config == "PromptEncoderConfig" else {}
        made = getattr(lib, config)(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, **more)
        model = filled(lib.get_peft_model(seq2seq(), made)).eval()
        loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss
        loss.backward()
        gradients = [parameter.grad for _, parameter in sorted(model.named_parameters()) if parameter.requires_grad]
        model.save_pretrained(tmp_path / lib.__name__)
        tokens = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
        again = lib.PeftModel.from_pretrained(seq2seq(), tmp_path / lib.__name__)
        outputs.append([loss, gradients, tokens, again(input_ids=IDS, decoder_input_ids=IDS).logits])
    for theirs, ours in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_rows_without_the_encoder_that_makes_them(tmp_path: Path) -> None:
    def config(lib: Any, **more: Any) -> Any:
        return lib.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8, **more)

    theirs = peft.get_peft_model(base(), config(peft)).eval()
    theirs.save_pretrained(tmp_path)
    state, expected = peft.get_peft_model_state_dict(theirs), theirs(IDS).logits
    model = peftc.peft.get_peft_model(base(), config(peftc.peft))
    with pytest.raises(peftc.CheckpointError, match=r"inference_mode=True.*under another name"):
        peftc.peft.set_peft_model_state_dict(model, state)
    with pytest.raises(peftc.CheckpointError, match=r"inference_mode=True.*under another name"):
        model.load_adapter(tmp_path, "default")
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    torch.testing.assert_close(model.eval()(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    rows = peftc.peft.get_peft_model(base(), config(peftc.peft, inference_mode=True)).eval()
    peftc.peft.set_peft_model_state_dict(rows, state)
    torch.testing.assert_close(rows(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", ["PromptTuningConfig", "MultitaskPromptTuningConfig"])
def test_rows_that_start_from_words_are_as_wide_as_they(config: str) -> None:
    sizes = {"num_virtual_tokens": 3, "num_transformer_submodules": 1, "prompt_tuning_init": "SAMPLE_VOCAB"}
    encoder = "PromptEmbedding" if config == "PromptTuningConfig" else "MultitaskPromptEmbedding"
    words = torch.nn.Embedding(9, 8)
    make = getattr(peftc.peft.tuners, encoder)
    rows = make(getattr(peftc.peft, config)(token_dim=8, **sizes), words).embedding.weight
    assert all((words.weight == row).all(1).any() for row in rows)
    with pytest.raises(peftc.AdapterError, match=r"token_dim=6: the word embeddings are 8 wide"):
        make(getattr(peftc.peft, config)(token_dim=6, **sizes), words)
