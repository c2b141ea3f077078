"""trl's trainers with configs and models of peft."""

import os
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from tests.clients.programs.common import TARGETS, base, losses, main, plain, randomise, total

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def tokenizer() -> Any:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(60))]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **names)


def text(start: int) -> str:
    return " ".join(f"w{(start + step) % 60}" for step in range(5))


def options(folder: str, **more: Any) -> dict[str, Any]:
    given = {
        "output_dir": folder, "max_steps": 3, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "seed": 3,
        "gradient_checkpointing": False,
    }  # fmt: skip
    return {**given, **more}


def config(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **more})


def saved(folder: str) -> list[Any]:
    """What the last checkpoint holds."""
    name = f"{folder}/checkpoint-3"
    return [
        sorted(file for file in os.listdir(name) if "adapter" in file or "model" in file),
        sorted(load_file(f"{name}/adapter_model.safetensors")),
    ]


def trained(trainer: Any, folder: str) -> list[Any]:
    randomise(trainer.model)
    trainer.train()
    return [type(trainer.model).__name__, [round(loss, 6) for loss in losses(trainer)], *saved(folder)]


def sft() -> Any:
    data = Dataset.from_list([{"text": text(start)} for start in range(12)])
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            base(), SFTConfig(**options(folder, max_length=16)), train_dataset=data, processing_class=tokenizer(),
            peft_config=config(),
        )  # fmt: skip
        found = trained(trainer, folder)
        loaded = PeftModel.from_pretrained(base(), f"{folder}/checkpoint-3")
    return [*found, total(trainer.model), total(loaded)]


def sft_of_a_model() -> Any:
    data = Dataset.from_list([{"text": text(start)} for start in range(12)])
    with tempfile.TemporaryDirectory() as folder:
        more = {"max_length": 16, "gradient_checkpointing": True}
        trainer = SFTTrainer(
            get_peft_model(base(), config()), SFTConfig(**options(folder, **more)), train_dataset=data,
            processing_class=tokenizer(),
        )  # fmt: skip
        return trained(trainer, folder)


def dpo() -> Any:
    rows = [{"prompt": text(n), "chosen": text(n + 5), "rejected": text(n + 9)} for n in range(12)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            base(), args=DPOConfig(**options(folder, max_length=24)), train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(), peft_config=config(),
        )  # fmt: skip
        return trained(trainer, folder)


def dpo_of_a_model() -> Any:
    """The model's adapter is copied as the reference."""
    rows = [{"prompt": text(n), "chosen": text(n + 5), "rejected": text(n + 9)} for n in range(12)]
    with tempfile.TemporaryDirectory() as folder:
        model = randomise(get_peft_model(base(), config()))
        trainer = DPOTrainer(
            model, args=DPOConfig(**options(folder, max_length=24)), train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
        )  # fmt: skip
        adapters = sorted(trainer.model.peft_config)
        trainer.train()
    learning = {plain(name).split(".lora_")[1] for name, p in trainer.model.named_parameters() if p.requires_grad}
    return [adapters, [round(loss, 6) for loss in losses(trainer)], sorted(learning)]


def grpo() -> Any:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(completion.split()))) for completion in completions]

    rows = Dataset.from_list([{"prompt": text(start)} for start in range(12)])
    more = {"max_completion_length": 6, "num_generations": 2, "beta": 0.1}
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            base(), reward, args=GRPOConfig(**options(folder, **more)), train_dataset=rows,
            processing_class=tokenizer(), peft_config=config(),
        )  # fmt: skip
        found = trained(trainer, folder)
        rewards = losses(trainer, "reward")
    return [*found, rewards]


def rewards() -> Any:
    rows = [{"chosen": text(n), "rejected": text(n + 9)} for n in range(12)]
    given = base().config
    given.num_labels, given.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(given)
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            model, args=RewardConfig(**options(folder, max_length=24)), train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(), peft_config=config(task_type=TaskType.SEQ_CLS, modules_to_save=["score"]),
        )  # fmt: skip
        return trained(trainer, folder)


def chat(folder: str) -> str:
    """Where a tokenizer is whose template the trainers take over, with tokens that the models don't have."""
    other = tokenizer()
    other.add_tokens(["<|im_start|>", "<|im_end|>"])
    other.save_pretrained(f"{folder}/chat")
    return f"{folder}/chat"


def messages(start: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"<|im_start|> {text(start)} <|im_end|>"},
        {"role": "assistant", "content": text(start + 5)},
    ]


def trained_rows(trainer: Any, folder: str) -> list[Any]:
    """As `trained`, and what the file has of rows of tokens, as they are whatever their start was drawn with."""
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad and "trainable_tokens" in name:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape))
    found = trained(trainer, folder)
    rows = [v for k, v in load_file(f"{folder}/checkpoint-3/adapter_model.safetensors").items() if "tokens_delta" in k]
    tokens = trainer.model.peft_config["default"].trainable_token_indices
    return [*found, tokens, [[list(row.shape), float(row.double().abs().sum())] for row in rows]]


def sft_with_new_tokens() -> Any:
    data = Dataset.from_list([{"messages": messages(start)} for start in range(12)])
    with tempfile.TemporaryDirectory() as folder:
        more = {"max_length": 32, "chat_template_path": chat(folder)}
        trainer = SFTTrainer(
            base(), SFTConfig(**options(folder, **more)), train_dataset=data, processing_class=tokenizer(),
            peft_config=config(),
        )  # fmt: skip
        return trained_rows(trainer, folder)


def rewards_with_new_tokens() -> Any:
    rows = [{"chosen": messages(n), "rejected": messages(n + 9)} for n in range(12)]
    given = base().config
    given.num_labels, given.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(given)
    with tempfile.TemporaryDirectory() as folder:
        more = {"max_length": 32, "chat_template_path": chat(folder)}
        trainer = RewardTrainer(
            model, args=RewardConfig(**options(folder, **more)), train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(), peft_config=config(task_type=TaskType.SEQ_CLS, modules_to_save=["score"]),
        )  # fmt: skip
        return trained_rows(trainer, folder)


NEW = (sft_with_new_tokens, rewards_with_new_tokens)
TOPICS = {function.__name__: function for function in (sft, sft_of_a_model, dpo, dpo_of_a_model, grpo, rewards, *NEW)}

if __name__ == "__main__":
    torch.manual_seed(0)
    main(TOPICS)
