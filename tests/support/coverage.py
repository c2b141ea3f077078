"""What one method can, found out by doing it on a tiny llama, with peft beside it: a row of docs/coverage.md."""

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import peftc
from peftc.errors import PeftcError
from peftc.prompts.specs import PromptSpec
from tests.support.interchange import CONFIGS, quietly
from tests.support.methods import assert_near, gradients, in_peft
from tests.support.models import model_of, token_ids
from tests.support.prompts import in_peft as prompts_in_peft

# What the small model needs, or the method can't do without; all else is as peft has it by default.
FIELDS: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "ADALORA": {"total_step": 10, "init_r": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 50},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 5},
    "CPT": {"cpt_token_ids": [5, 6, 7, 8, 9], "cpt_tokens_type_mask": [1, 2, 2, 3, 4]},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 5, "num_tasks": 3},
    "POLY": {"n_tasks": 3},
    "PSOFT": {"r": 4},
    "SUPERTUNING": {"sparsity": 0.9},
    "WAVEFT": {"n_frequency": 50},
    "PREFIX_TUNING": {"num_virtual_tokens": 5},
    "PROMPT_TUNING": {"num_virtual_tokens": 5},
    "P_TUNING": {"num_virtual_tokens": 5},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5]},
    "VBLORA": {"num_vectors": 20, "vector_length": 8},
}
# Where peft's gradients of inputs are wrong (tests/oracle/test_c3a.py), those that follow from them are not compared.
LAST_LAYER = {"C3A": "model.layers.2."}
IDS = token_ids(3, 7, 64).clamp_min(3)
# What a call takes besides, where an adapter is.
TASKS = {"task_ids": torch.tensor([0, 2, 1])}
CALLS: dict[str, dict[str, Any]] = {"MULTITASK_PROMPT_TUNING": TASKS, "POLY": TASKS}
# Relative to the largest number: three layers add up their roundings.
NEAR = 1e-5


class Trial:
    """One method on the small model: trained in peft, written there, and read here."""

    def __init__(self, name: str, folder: Path, layers: int = 3) -> None:
        torch.manual_seed(0)
        self.name, self.folder, self.fields = name, folder, FIELDS.get(name, {})
        self.model = model_of("llama", attention_bias=True, num_hidden_layers=layers)  # Some methods change biases.
        self.config = quietly(CONFIGS[name], task_type="CAUSAL_LM", **self.fields)
        self.spec = peftc.load_spec(self.config)
        self.theirs = in_peft(self.model, self.config)
        quietly(self.theirs.save_pretrained, folder / "theirs")

    def ours(self, trainable: bool = False) -> Any:
        """What is read from peft's files."""
        loaded = peftc.load(copy.deepcopy(self.model), self.folder / "theirs", is_trainable=trainable)
        return loaded.eval()

    @property
    def call(self) -> dict[str, Any]:
        """What a call of an adapted model has."""
        return {"input_ids": IDS, **CALLS.get(self.name, {})}

    def logits(self, model: Any) -> Tensor:
        with torch.no_grad():
            return model(**({"input_ids": IDS} if model is self.model else self.call)).logits

    def expected(self) -> Tensor:
        """Of the adapter in peft; not the base's."""
        y = self.logits(self.theirs)
        assert not torch.allclose(y[:, -1], self.logits(self.model)[:, -1], atol=1e-3), "the adapter changes nothing"
        return y


def spec(trial: Trial) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = peftc.load_spec(trial.folder / "theirs").to_dict()
    written = trial.config.to_dict()
    wrong = {key for key, value in trial.fields.items() if own[key] != value}
    left = {key for key in written if key not in own and written[key]} - {
        "peft_version",
        "runtime_config",
        "loftq_config",
    }
    assert not wrong | (left - {"megatron_core", "qalora_group_size"}), sorted(wrong | left)


def files_in(trial: Trial) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trial.ours()


def files_out(trial: Trial) -> None:
    trial.ours().save_pretrained(trial.folder / "ours")
    again = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(trial.model), str(trial.folder / "ours")).eval()
    assert_near(trial.logits(again), trial.expected(), NEAR, "outputs of peft, from files written here")


def forward(trial: Trial) -> None:
    assert_near(trial.logits(trial.ours()), trial.expected(), NEAR, "outputs")


def gradient(trial: Trial) -> None:
    if isinstance(trial.spec, PromptSpec):
        ours: Any = peftc.compile(copy.deepcopy(trial.model), trial.spec).eval()
        theirs = prompts_in_peft(ours, trial.model)
    else:
        ours, theirs = trial.ours(trainable=True), trial.theirs
    found: list[dict[str, Tensor]] = []
    for model in (ours, theirs):
        model.zero_grad()
        # Not of the loss: AdaLoRA's penalty is a part of it in peft's eval() too.
        model(**trial.call).logits.square().mean().backward()
        named = {_plain(name): value for name, value in gradients(model).items()}
        found.append({name: value for name, value in named.items() if name.startswith(LAST_LAYER.get(trial.name, ""))})
    own, other = found
    assert own.keys() == other.keys(), f"{own.keys() ^ other.keys()}"
    largest = max(float(value.abs().max()) for value in other.values())
    for name, value in other.items():
        error = float((own[name] - value).abs().max()) / largest
        assert error <= 10 * NEAR, f"gradient of {name}: off by {error:.1e}"


def _plain(name: str) -> str:
    return name.replace("base_model.", "").replace(".default", "")


def merge(trial: Trial) -> None:
    ours = trial.ours()
    y = trial.logits(ours)
    with ours.merged():
        assert_near(trial.logits(ours), y, NEAR, "outputs, merged")


def undo(trial: Trial) -> None:
    ours = trial.ours()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    ours.merge_adapter()
    ours.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def disk(trial: Trial) -> None:
    trial.model.save_pretrained(trial.folder / "base")
    where = (trial.folder / "base", trial.folder / "theirs", trial.folder / "merged")
    peftc.merge_checkpoint(*where, progress=False)
    again = type(trial.model).from_pretrained(trial.folder / "merged").eval()
    assert_near(trial.logits(again), trial.logits(trial.ours()), NEAR, "outputs, merged on disk")


def mixed(trial: Trial) -> None:
    ours = trial.ours()
    ours.load_adapter(trial.folder / "theirs", "b")
    with torch.no_grad():
        for tensor in ours.adapter_state_dict("b").values():
            tensor.mul_(0.5) if tensor.is_floating_point() else None
        names = ["default", "__base__", "b"]
        together = ours(**trial.call, adapter_names=names).logits
    for row, name in enumerate(names):
        ours.set_adapter([] if name == "__base__" else name)
        assert_near(together[row], trial.logits(ours)[row], NEAR, f"row {row} in a batch and alone")


def export(trial: Trial) -> None:
    ours = trial.ours()
    ours.export(trial.folder / "exported", to="pt2", adapters="inside")  # It compares what it wrote with the model.
    assert (trial.folder / "exported" / "certificate.json").exists()


CELLS: dict[str, Callable[[Trial], None]] = {
    "spec": spec,
    "files in": files_in,
    "files out": files_out,
    "forward": forward,
    "gradient": gradient,
    "merge": merge,
    "undo": undo,
    "disk": disk,
    "mixed": mixed,
    "export": export,
}


def run(name: str, cells: tuple[str, ...] = tuple(CELLS)) -> dict[str, str]:
    """By cell, nothing if what it is about was done and held, or why it is refused (the end of the message).

    Raises AssertionError if it fails.
    """
    found: dict[str, str] = {}
    for cell in cells:
        with tempfile.TemporaryDirectory() as folder:
            # A trace takes some seconds for each layer.
            trial = Trial(name, Path(folder), layers=2 if cell == "export" else 3)
            try:
                CELLS[cell](trial)
                found[cell] = ""
            except PeftcError as error:
                found[cell] = str(error).rpartition(": ")[2]
            except AssertionError as error:
                raise AssertionError(f"{name}: {cell}: {error}") from error
    return found
