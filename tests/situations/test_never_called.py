"""Modules that nobody calls: they only lend their weight by a tie, or the forward leaves them out."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import peftc
from tests.support.models import tiny

T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "pad_token_id": 0}
BART = {"vocab_size": 64, "d_model": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
BART |= {f"{side}_{what}": number for side in ("encoder", "decoder") for what, number in LAYERS.items()}
IDS = torch.tensor([[5, 6, 7, 2]])
MODELS: dict[str, Any] = {
    "T5ForConditionalGeneration": transformers.T5Config(**T5, decoder_start_token_id=0),
    "UMT5ForConditionalGeneration": transformers.UMT5Config(**T5, decoder_start_token_id=0),
    "T5EncoderModel": transformers.T5Config(**T5),
    "BartForConditionalGeneration": transformers.BartConfig(**BART, decoder_start_token_id=2),
    "BartForSequenceClassification": transformers.BartConfig(**BART),
    "M2M100ForConditionalGeneration": transformers.M2M100Config(**BART, decoder_start_token_id=2),
    "PegasusForConditionalGeneration": transformers.PegasusConfig(**BART, decoder_start_token_id=0),
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(MODELS[name]).eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_an_embedding_that_only_shares_its_weight_is_refused_and_the_advice_holds(name: str, field: str) -> None:
    model = model_of(name)
    shared = next(fqn for fqn, _ in model.named_modules() if fqn.endswith("shared"))
    spec = {"target_modules": ["q_proj", "q"], "modules_to_save": None}
    spec["target_modules"] = ["q"] if name.startswith(("T5", "UMT5")) else ["q_proj"]
    spec[field] = [*(spec[field] or []), "shared"]
    with pytest.raises(peftc.NoMatchError, match=rf"{shared}.*called nowhere.*name (\S+embed_tokens)") as error:
        peftc.compile(model, peftc.LoraConfig(**spec))
    advised = [word for word in str(error.value).split() if word.endswith("embed_tokens")]
    spec[field] = [*spec[field][:-1], *advised]
    compiled = peftc.compile(model, peftc.LoraConfig(**spec))
    more = {} if name == "T5EncoderModel" else {"decoder_input_ids": IDS}
    compiled(input_ids=IDS, **more)[0].sum().backward()
    assert compiled.get_model_status().without_gradient == []


def test_a_tie_of_embedding_and_head_is_none_of_these() -> None:
    compiled = peftc.compile(tiny("gpt2"), peftc.LoraConfig(target_modules=["wte", "lm_head"]))
    compiled(IDS, labels=IDS).loss.backward()
    assert compiled.get_model_status().without_gradient == []


class Skips(nn.Module):
    """Has a module that it never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.left_out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_parameters_that_train_without_a_gradient_are_named_at_the_first_step() -> None:
    compiled = peftc.compile(Skips(), peftc.LoraConfig(target_modules=["used", "left_out"]))
    assert compiled.get_model_status().without_gradient == []  # No backward pass yet.
    optimiser = torch.optim.SGD([p for p in compiled.parameters() if p.requires_grad], lr=0.1)
    compiled(torch.randn(2, 4)).sum().backward()
    names = [f"left_out.lora_{x}.weight of 'default'" for x in "AB"]
    assert compiled.get_model_status().without_gradient == names
    with pytest.warns(UserWarning, match=r"left_out.lora_A.weight of 'default', .* no gradient"):
        optimiser.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimiser.step()  # Said once.


def test_another_models_optimiser_is_not_looked_at() -> None:
    peftc_model = peftc.compile(Skips(), peftc.LoraConfig(target_modules=["used", "left_out"]))
    peftc_model(torch.randn(2, 4)).sum().backward()
    other = nn.Linear(2, 2)
    other(torch.randn(1, 2)).sum().backward()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert said == []


def test_a_file_of_peft_that_adapts_such_an_end_loads_and_does_what_it_did(tmp_path: Path) -> None:
    kind, decoder = "T5ForConditionalGeneration", {"decoder_input_ids": IDS}
    config = peft.LoraConfig(target_modules=["shared", "q"], init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
    theirs = peft.get_peft_model(model_of(kind), config).eval()
    theirs.save_pretrained(tmp_path)
    loaded = peftc.load(model_of(kind), tmp_path)
    torch.testing.assert_close(loaded(input_ids=IDS, **decoder).logits, theirs(input_ids=IDS, **decoder).logits)
    assert "shared" in {edit.site for edit in loaded.plan.edits}
