"""sentence-transformers with adapters: added, trained, saved, loaded."""

import os
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses, modules
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.clients.programs.common import losses as logged
from tests.clients.programs.common import main, randomise

TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]
LORA = {"task_type": TaskType.FEATURE_EXTRACTION, "r": 4, "target_modules": ["query", "value"]}


def encoder(folder: str) -> Any:
    """A tiny BERT with mean pooling."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(40))]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names, model_max_length=32).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    BertModel(config).save_pretrained(folder)
    transformer = modules.Transformer(folder)
    pooling = modules.Pooling(transformer.get_embedding_dimension())
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def total(model: Any) -> float:
    return float(model.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False).double().sum())


def adapters() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model = encoder(folder)
        found: list[Any] = [total(model)]
        model.add_adapter(LoraConfig(**LORA), "mine")
        randomise(model)
        found += [total(model), model.active_adapters(), sorted(model.get_adapter_state_dict())]
        model.disable_adapters()
        found += [total(model)]
        model.enable_adapters()
        model.save_pretrained(f"{folder}/out", create_model_card=False)
        files = sorted(
            os.path.join(at, name).removeprefix(folder) for at, _, names in os.walk(f"{folder}/out") for name in names
        )
        keys = sorted(load_file(f"{folder}/out/adapter_model.safetensors"))
        again = encoder(f"{folder}/base")
        again.load_adapter(f"{folder}/out")
        return [*found, files, keys, total(again)]


def training() -> Any:
    data = Dataset.from_list([{"anchor": f"w{n} w{n + 1}", "positive": f"w{n + 2} w{n + 3}"} for n in range(16)])
    with tempfile.TemporaryDirectory() as folder:
        model = encoder(folder)
        model.add_adapter(LoraConfig(**LORA))
        randomise(model)
        options = SentenceTransformerTrainingArguments(
            f"{folder}/runs", max_steps=4, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-2,
            report_to=[], use_cpu=True, seed=3, save_steps=4, disable_tqdm=True,
        )  # fmt: skip
        loss = losses.MultipleNegativesRankingLoss(model)
        trainer = SentenceTransformerTrainer(model=model, args=options, train_dataset=data, loss=loss)
        trainer.train()
        files = sorted(os.listdir(f"{folder}/runs/checkpoint-4"))
        return [logged(trainer), total(model), [name for name in files if "adapter" in name or "model" in name]]


TOPICS = {function.__name__: function for function in (adapters, training)}

if __name__ == "__main__":
    main(TOPICS)
