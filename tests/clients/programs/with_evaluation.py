"""How lm-eval and mergekit load adapters."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from mergekit.common import ModelReference
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.clients.programs.common import TARGETS, base, main, randomise, total

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(60))]


def folders(root: str) -> tuple[str, str]:
    """A base with its tokenizer, and an adapter."""
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(f"{root}/base")
    base().save_pretrained(f"{root}/base")
    model = AutoModelForCausalLM.from_pretrained(f"{root}/base")
    adapted = randomise(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS)))
    adapted.save_pretrained(f"{root}/adapter")
    return f"{root}/base", f"{root}/adapter"


def lm_eval() -> Any:
    with tempfile.TemporaryDirectory() as root:
        model, adapter = folders(root)
        found: list[Any] = []
        for peft in (None, adapter):
            lm = HFLM(pretrained=model, peft=peft, device="cpu", dtype="float32", batch_size=2, max_length=32)
            asked = [("w1 w2 w3", " w4"), ("w5 w6", " w7 w8"), ("w9", " w1")]
            requests = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(asked)]
            found.append([[score, greedy] for score, greedy in lm.loglikelihood(requests, disable_tqdm=True)])
        return found


def mergekit() -> Any:
    with tempfile.TemporaryDirectory() as root:
        model, adapter = folders(root)
        reference = ModelReference.parse(f"{model}+{adapter}")
        merged = reference.merged(cache_dir=f"{root}/cache")
        loaded = AutoModelForCausalLM.from_pretrained(str(Path(merged.model.path)), dtype=torch.float32)
        return [type(loaded).__name__, round(total(loaded), 2)]


TOPICS = {function.__name__: function for function in (lm_eval, mergekit)}

if __name__ == "__main__":
    main(TOPICS)
