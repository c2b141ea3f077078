"""transformers' Trainer and pipelines with models of peft."""

import os
import tempfile
from typing import Any

import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from tests.clients.programs.common import TARGETS, base, losses, main, plain, randomise, total


class Numbers(Dataset[Any]):
    """Sixteen short sequences."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.arange(8) * (index + 1) % 90 + 3
        return {"input_ids": ids, "labels": ids}


def arguments(folder: str, **more: Any) -> TrainingArguments:
    given = {
        "output_dir": folder, "max_steps": 6, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps",
        "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [],
        "seed": 3, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(**{**given, **more})


def adapted(**more: Any) -> Any:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS, **more)
    return randomise(get_peft_model(base(), config))


def run(model: Any, folder: str, resume: Any = None, **more: Any) -> Trainer:
    trainer = Trainer(model=model, args=arguments(folder, **more), train_dataset=Numbers(), eval_dataset=Numbers())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def training() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        trainer = run(adapted(), folder)
        files = {name: sorted(os.listdir(f"{folder}/{name}")) for name in sorted(os.listdir(folder))}
        keys = sorted(load_file(f"{folder}/checkpoint-4/adapter_model.safetensors"))
        evaluated = trainer.evaluate()["eval_loss"]
    return [losses(trainer), losses(trainer, "eval_loss"), files, keys, evaluated, total(trainer.model)]


def resuming() -> Any:
    """Whether a run that goes on ends with the bits of one that never stopped."""
    with tempfile.TemporaryDirectory() as folder:
        whole = run(adapted(), folder)
        again = run(randomise(adapted(), 9), folder, resume=f"{folder}/checkpoint-4")
    pairs = zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True)
    return [losses(again), all(torch.equal(one, other) for (_, one), (_, other) in pairs)]


def best() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        more = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
        trainer = run(adapted(), folder, **more)
        step = str(trainer.state.best_model_checkpoint).rpartition("-")[2]
    return [step, total(trainer.model)]


def variants() -> Any:
    found: list[Any] = []
    for more in ({"label_smoothing_factor": 0.1}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}):
        with tempfile.TemporaryDirectory() as folder:
            found.append(losses(run(adapted(), folder, **more)))
    return found


def prompts() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model = randomise(get_peft_model(base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)))
        trainer = run(model, folder)
        keys = sorted(load_file(f"{folder}/checkpoint-4/adapter_model.safetensors"))
    return [losses(trainer), keys]


def own_adapters() -> Any:
    """Adapters that are added to a model of transformers itself."""
    model = base()
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS), "mine")
    randomise(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = run(model, folder)
        trainer.save_model(f"{folder}/out")
        files = sorted(os.listdir(f"{folder}/out"))
        keys = sorted(load_file(f"{folder}/out/adapter_model.safetensors"))
        loaded = base()
        loaded.load_adapter(f"{folder}/out", adapter_name="again")
    return [losses(trainer), files, keys, total(model), total(loaded)]


def pipelines() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<pad>": 0, **{f"w{n}": n for n in range(1, 90)}}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    model = adapted().eval()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    made = pipe("w5 w6 w7", max_new_tokens=4, do_sample=False)
    return [made[0]["generated_text"], [plain(name) for name, p in model.named_parameters() if p.requires_grad][:2]]


TOPICS = {
    function.__name__: function for function in (training, resuming, best, variants, prompts, own_adapters, pipelines)
}

if __name__ == "__main__":
    main(TOPICS)
