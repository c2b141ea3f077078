"""transformers' Trainer: what it saves, resumes and reloads, with nothing asked of the user."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import peftc
from tests.support.adapters import lora
from tests.support.models import tiny, token_ids

IDS = token_ids(1, 8, 60)
DATA = [{"input_ids": row, "labels": row} for row in token_ids(16, 8, 60)]


def llama(**config: Any) -> Any:
    torch.manual_seed(0)
    return tiny("llama", **config)


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.05}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(str(folder), **{**options, **quiet, **more})


def compiled_with(spec: peftc.AdapterSpec, **config: Any) -> Any:
    model = llama(**config)
    torch.manual_seed(1)
    return peftc.compile(model, spec)


SPECS: dict[str, peftc.AdapterSpec] = {
    "lora": lora("q_proj", task_type="CAUSAL_LM"),
    "saved": lora("q_proj", modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "dropout": lora("q_proj", lora_dropout=0.5, task_type="CAUSAL_LM"),
    "ia3": peftc.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": peftc.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": peftc.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize(
    ("method", "tied"),
    [*((method, False) for method in SPECS), *((method, True) for method in SPECS if method != "saved")],
)
def test_checkpoints_hold_adapters_and_resume_bit_for_bit(method: str, tied: bool, tmp_path: Path) -> None:
    straight = compiled_with(SPECS[method], tie_word_embeddings=tied)
    set_seed(0)
    Trainer(straight, arguments(tmp_path / "one"), train_dataset=DATA).train()
    folder = Path(str(get_last_checkpoint(str(tmp_path / "one"))))
    names = {file.name for file in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    assert "model.safetensors" not in names
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(peftc.get_peft_model_state_dict(straight))
    assert torch.equal(peftc.load(llama(tie_word_embeddings=tied), folder)(IDS).logits, straight.eval()(IDS).logits)
    resumed = compiled_with(SPECS[method], tie_word_embeddings=tied)
    set_seed(0)
    trainer = Trainer(resumed, arguments(tmp_path / "one"), train_dataset=DATA)
    trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    mine, theirs = (peftc.get_peft_model_state_dict(model) for model in (resumed, straight))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    class Worsens(TrainerCallback):
        """Makes the adapter useless after the first evaluation."""

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2:
                kept.update({key: value.clone() for key, value in peftc.get_peft_model_state_dict(model).items()})
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter.add_(3 * torch.randn_like(parameter))

    kept: dict[str, torch.Tensor] = {}
    compiled = compiled_with(SPECS["lora"])
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1e-5}
    trainer = Trainer(
        compiled, arguments(tmp_path, **options), train_dataset=DATA, eval_dataset=DATA[:4], callbacks=[Worsens()]
    )
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-2")
    now = peftc.get_peft_model_state_dict(compiled)
    assert kept
    assert all(torch.equal(now[key], value) for key, value in kept.items())


@pytest.mark.parametrize("option", [{"label_smoothing_factor": 0.1}, {"neftune_noise_alpha": 5.0}])
def test_paths_of_the_trainer_that_reach_into_the_model(option: dict[str, Any], tmp_path: Path) -> None:
    compiled = compiled_with(SPECS["lora"])
    before = {key: value.clone() for key, value in peftc.get_peft_model_state_dict(compiled).items()}
    Trainer(compiled, arguments(tmp_path, **option), train_dataset=DATA).train()
    after = peftc.get_peft_model_state_dict(compiled)
    assert any(not torch.equal(after[key], value) for key, value in before.items())


def test_several_adapters_are_saved_and_resumed_each_in_its_folder(tmp_path: Path) -> None:
    compiled = peftc.compile(llama(), {"default": SPECS["lora"], "b": SPECS["ia3"]})
    compiled.set_adapter("b")
    Trainer(compiled, arguments(tmp_path), train_dataset=DATA).train()
    assert (tmp_path / "checkpoint-4" / "b" / "adapter_model.safetensors").exists()
    again = peftc.compile(llama(), {"default": SPECS["lora"], "b": SPECS["ia3"]})
    again.set_adapter("b")
    trainer = Trainer(again, arguments(tmp_path), train_dataset=DATA)
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
    for name in ("default", "b"):
        mine, theirs = (peftc.get_peft_model_state_dict(m, adapter_name=name) for m in (again, compiled))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert again.active_adapters == ["b"]


def test_a_plain_model_and_one_of_peft_are_saved_as_ever(tmp_path: Path) -> None:
    Trainer(llama(), arguments(tmp_path / "plain"), train_dataset=DATA).train()
    assert (tmp_path / "plain" / "checkpoint-4" / "model.safetensors").exists()
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    Trainer(theirs, arguments(tmp_path / "peft"), train_dataset=DATA).train()
    assert (tmp_path / "peft" / "checkpoint-4" / "adapter_model.safetensors").exists()


WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None
{first}
import torch, peftc
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
ids = torch.arange(8)
data = [dict(input_ids=ids, labels=ids)] * 4
def run(**more):
    torch.manual_seed(0)
    model = peftc.compile(LlamaForCausalLM(config), peftc.LoraConfig(target_modules=["q_proj"]))
    args = TrainingArguments({folder!r}, max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    Trainer(model, args, train_dataset=data).train(**more)
    return peftc.get_peft_model_state_dict(model)
one = run()
two = run(resume_from_checkpoint={folder!r} + "/checkpoint-1")
assert all(torch.equal(one[key], two[key]) for key in one)
print("fine")
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import transformers.trainer", "import peftc"])
def test_peft_need_not_be_installed_and_imports_may_come_in_any_order(first: str, tmp_path: Path) -> None:
    code = WITHOUT_PEFT.format(first=first, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("fine"), done.stderr[-2000:]
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def test_loading_onto_an_adapter_of_another_spec_is_refused(tmp_path: Path) -> None:
    compiled = compiled_with(SPECS["lora"])
    compiled.save_pretrained(tmp_path)
    other = compiled_with(peftc.LoraConfig(target_modules=["q_proj"], r=2, lora_alpha=3))
    with pytest.raises(peftc.AdapterError, match=r"exists already, with another (task_type, )?r, lora_alpha"):
        other.load_adapter(tmp_path, "default")
    with torch.no_grad():
        for parameter in compiled.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    compiled.load_adapter(tmp_path, "default")
    assert any(bool(value.any()) for value in peftc.get_peft_model_state_dict(compiled).values())
    assert compiled.active_adapters == ["default"]
