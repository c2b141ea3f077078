"""Multitask prompt tuning against peft: outputs, gradients, generation, files both ways, starts; what is refused."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftc
import peftc.peft as served
from tests.support.against import near
from tests.support.interchange import perturbed, quietly
from tests.support.models import tiny
from tests.support.prompts import generated, ids, in_peft, padded

FAMILIES = {
    "llama": ("CAUSAL_LM", "AutoModelForCausalLM"),
    "gpt2": ("CAUSAL_LM", "AutoModelForCausalLM"),
    "t5": ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
    "bert": ("SEQ_CLS", "AutoModelForSequenceClassification"),
}
TASKS = torch.tensor([2, 0, 1])
IDS = ids(3)


def spec(family: str = "llama", **more: Any) -> Any:
    given = {"num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2, "task_type": FAMILIES[family][0]}
    return peftc.MultitaskPromptTuningConfig(**{**given, **more})


def both(family: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Any, Any, Any]:
    """A model, an adapter of it as if it had been trained, and the same in peft."""
    torch.manual_seed(0)
    kind = FAMILIES[family][1]
    net = (tiny(family) if kind.endswith("LM") else tiny(family, kind)).to(dtype).eval()
    ours = peftc.compile(net, spec(family, **more)).eval()
    perturbed(ours.prompt_encoder["default"], 1)
    return net, ours, in_peft(ours, net)


def inputs(family: str = "llama") -> dict[str, Any]:
    labels = {"SEQ_2_SEQ_LM": ids(3, 5, 4), "SEQ_CLS": torch.tensor([0, 1, 1])}.get(FAMILIES[family][0], IDS)
    mask = torch.cat([padded("right"), torch.ones(1, 7, dtype=torch.long)])
    return {"input_ids": IDS, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_peft(family: str) -> None:
    # With 2, peft's decoder has virtual tokens in a call, but none in generate: what is trained is not what is used.
    more = {"num_transformer_submodules": 1} if family == "t5" else {}
    net, ours, theirs = both(family, **more)
    found, expected = (model(**inputs(family), task_ids=TASKS) for model in (ours, theirs))
    near(found.loss, expected.loss, 1e-5, "loss")
    near(found.logits, expected.logits, 1e-5, "outputs")
    base = net(**inputs(family)).logits
    assert not torch.allclose(found.logits[:, -base.shape[1] :], base, atol=1e-3)
    for output in (found, expected):
        output.loss.backward()
    own, other = (dict(model.prompt_encoder["default"].named_parameters()) for model in (ours, theirs))
    assert own.keys() == other.keys()
    largest = max(float(p.grad.abs().max()) for p in other.values())
    for name, parameter in other.items():
        near(own[name].grad, parameter.grad, 1e-4, f"gradients of {name}", largest)


def test_half_precision() -> None:
    _, ours, theirs = both(dtype=torch.bfloat16)
    found, expected = (model(**inputs(), task_ids=TASKS) for model in (ours, theirs))
    near(found.logits.float(), expected.logits.float(), 2e-2, "bfloat16: outputs")
    for output in (found, expected):
        output.loss.backward()
    for name, parameter in theirs.prompt_encoder["default"].named_parameters():
        assert parameter.dtype == torch.float32
        near(
            ours.prompt_encoder["default"].get_parameter(name).grad,
            parameter.grad,
            4e-2,
            f"bfloat16: gradients of {name}",
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generated_tokens_are_those_of_peft_and_of_every_row_alone(family: str) -> None:
    net, ours, theirs = both(family)
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        found = generated(ours, IDS, task_ids=TASKS, **options)
        if family != "t5" or not options:
            assert torch.equal(found, generated(theirs, IDS, task_ids=TASKS, **options)), options
        several = found.unflatten(0, (3, -1))
        for row in range(3):
            alone = generated(ours, IDS[row : row + 1], task_ids=TASKS[row : row + 1], **options)
            assert torch.equal(several[row], alone), (row, options)
    assert not torch.equal(generated(ours, IDS, task_ids=TASKS), generated(net, IDS))


def test_a_task_changes_what_its_rows_give() -> None:
    _, ours, _ = both()
    by_task = [ours(IDS, task_ids=torch.full((3,), task)).logits for task in range(3)]
    mixed = ours(IDS, task_ids=TASKS).logits
    for row, task in enumerate(TASKS.tolist()):
        near(mixed[row], by_task[task][row], 1e-5, "outputs of a row")
        assert not torch.allclose(mixed[row], by_task[(task + 1) % 3][row], atol=1e-3)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_files_go_both_ways(family: str, trainable: bool, tmp_path: Path) -> None:
    net, ours, theirs = both(family)
    y = ours(**inputs(family), task_ids=TASKS).logits
    ours.save_pretrained(tmp_path / "ours")
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert one.keys() == other.keys() == {"prompt_embeddings", "prefix_task_cols", "prefix_task_rows"}
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert not (tmp_path / "ours" / "prompt_encoder.safetensors").exists()
    for name in ("ours", "theirs"):
        again = peftc.load(net, tmp_path / name, is_trainable=trainable).eval()
        assert torch.equal(again(**inputs(family), task_ids=TASKS).logits, y)
        trained = sum(p.numel() for p in again.parameters() if p.requires_grad)
        assert trained == (sum(value.numel() for value in one.values()) if trainable else 0)
    if family == "t5":
        return
    back = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(net), str(tmp_path / "ours")).eval()
    near(back(**inputs(family), task_ids=TASKS).logits, y, 1e-5, "outputs of peft, from files of peftc")


def source(folder: Path, **more: Any) -> tuple[Path, dict[str, Tensor]]:
    """The file of an adapter for three tasks, and its tensors."""
    _, ours, _ = both(**more)
    ours.save_pretrained(folder / "source")
    path = folder / "source" / "adapter_model.safetensors"
    return path, load_file(path)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("how", ["AVERAGE_SOURCE_TASKS", "exact_source_task", "ONLY_SOURCE_SHARED"])
def test_it_starts_from_the_file_of_another_as_in_peft(how: str, pickled: bool, tmp_path: Path) -> None:
    path, tensors = source(tmp_path)
    if pickled:
        path = tmp_path / "source.bin"
        torch.save(tensors, path)
    fields = {"prompt_tuning_init_state_dict_path": str(path), "prompt_tuning_init_task": 1, "num_tasks": 1}
    config = spec(prompt_tuning_init=how, **fields)
    ours = peftc.compile(tiny("llama"), config).prompt_encoder["default"]
    made = peft.MultitaskPromptTuningConfig(**{**config.to_dict(), "peft_type": None})
    theirs = quietly(peft.get_peft_model, tiny("llama"), made).prompt_encoder["default"]
    for name, value in theirs.named_parameters():
        if name == "embedding.weight" or how != "ONLY_SOURCE_SHARED":
            near(ours.get_parameter(name), value, 0, name)
    assert torch.equal(ours.get_parameter("embedding.weight"), tensors["prompt_embeddings"])


def test_a_random_one_begins_as_in_peft() -> None:
    torch.manual_seed(0)
    config = spec(num_virtual_tokens=64, num_ranks=8)
    ours = peftc.compile(tiny("llama"), config).prompt_encoder["default"]
    made = peft.MultitaskPromptTuningConfig(**{**config.to_dict(), "peft_type": None})
    theirs = quietly(peft.get_peft_model, tiny("llama"), made).prompt_encoder["default"]
    for name, value in theirs.named_parameters():
        near(ours.get_parameter(name).std(), value.std(), 0.15, f"spread of {name}")
    vocabulary = peftc.compile(net := tiny("llama"), spec(prompt_tuning_init="SAMPLE_VOCAB"))
    rows, table = (
        vocabulary.prompt_encoder["default"].get_parameter("embedding.weight"),
        net.get_input_embeddings().weight,
    )
    assert all(bool((table == row).all(1).any()) for row in rows)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK"}, "prompt_tuning_init_state_dict_path is missing"),
        ({"prompt_tuning_init": "AVERAGE_SOURCE_TASKS", "prompt_tuning_init_state_dict_path": "x"}, "num_tasks=3"),
        ({"prompt_tuning_init": "TEXT"}, "tokenizer_name_or_path is missing"),
        ({"num_tasks": 0}, "num_tasks"),
        ({"num_ranks": 0}, "num_ranks"),
        ({"prompt_tuning_init_task": -1}, "prompt_tuning_init_task"),
        ({"prompt_tuning_init": "MEAN"}, "prompt_tuning_init"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(peftc.SpecError, match=said):
        spec(**fields)


def test_files_that_are_no_source_are_refused(tmp_path: Path) -> None:
    _, tensors = source(tmp_path)
    save_file({"prompt_embeddings": tensors["prompt_embeddings"]}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    (tmp_path / "broken.bin").write_bytes(b"no")
    exact = {"prompt_tuning_init": "EXACT_SOURCE_TASK", "num_tasks": 1}
    for file, more, said in (
        ("other.safetensors", {}, "lacks 'prefix_task_cols'"),
        ("broken.safetensors", {}, "can't be read"),
        ("broken.bin", {}, "can't be read"),
        ("none.safetensors", {}, "can't be read"),
        ("source/adapter_model.safetensors", {"prompt_tuning_init_task": 3}, "the file has the tasks 0 to 2"),
        ("source/adapter_model.safetensors", {"num_ranks": 3}, r"is \(1, 4, 2\) there, and \(1, 4, 3\) here"),
        ("source/adapter_model.safetensors", {"num_virtual_tokens": 5}, r"is \(4, 32\) there, and \(5, 32\) here"),
    ):
        config = spec(**exact, prompt_tuning_init_state_dict_path=str(tmp_path / file), **more)
        with pytest.raises(peftc.AdapterError, match=said):
            peftc.compile(tiny("llama"), config)


def test_task_ids_are_looked_at() -> None:
    _, ours, _ = both()
    with pytest.raises(peftc.AdapterError, match="the call has no task_ids, which adapter 'default' asks for"):
        ours(IDS)
    with pytest.raises(peftc.AdapterError, match=r"an integer from 0 to 2 for every row of the batch; got \[0, 1, 3\]"):
        ours(IDS, task_ids=torch.tensor([0, 1, 3]))
    with pytest.raises(peftc.AdapterError, match="takes task_ids of the call, which only calls of the compiled model"):
        ours.base(IDS)


def test_it_is_switched_disabled_kept_from_merging_and_taken_off(tmp_path: Path) -> None:
    net, ours, _ = both()
    y, base = ours(IDS, task_ids=TASKS).logits, net(IDS).logits
    ours.add_adapter("b", peftc.PolyConfig(r=2, n_tasks=2, target_modules=["q_proj"], init_weights=False))
    ours.add_adapter("c", peftc.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    near(ours(IDS, task_ids=TASKS).logits, y, 0, "outputs beside others")
    with ours.disable_adapter():
        near(ours(IDS, task_ids=TASKS).logits, base, 0, "outputs, disabled")
    ours.set_adapter(["default", "b"])
    with pytest.raises(peftc.AdapterError, match=r"'b' asks for: an integer from 0 to 1 .* got \[2, 0, 1\]"):
        ours(IDS, task_ids=TASKS)
    ours.eval()(IDS, task_ids=torch.tensor([1, 0, 1]))
    ours.set_adapter(["default", "c"])
    assert ours(IDS, task_ids=TASKS).logits.shape[1] == IDS.shape[1] + 6
    ours.set_adapter("default")
    with pytest.raises(peftc.MergeError, match="virtual tokens are no part of a weight"):
        ours.merge_adapter()
    with pytest.raises(peftc.AdapterError, match="a prompt method changes the length of every row"):
        ours(IDS, task_ids=TASKS, adapter_names=["default", "__base__", "default"])
    with pytest.raises(peftc.ExportError, match="asks about the model's call"):
        ours.export(tmp_path / "program", to="pt2", adapters="inside")
    assert torch.equal(ours.unload()(IDS).logits, base)


def test_a_cache_goes_on_and_gradient_checkpointing_learns_the_same() -> None:
    _, ours, _ = both()
    whole = ours(torch.cat([IDS, ids(3, 2, 5)], 1), task_ids=TASKS).logits[:, -2:]
    first = ours(IDS, task_ids=TASKS, use_cache=True)
    later = ours(ids(3, 2, 5), task_ids=TASKS, past_key_values=first.past_key_values).logits
    near(later, whole, 1e-5, "outputs with a cache")
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable()
        ours.train().zero_grad()
        ours(IDS, labels=IDS, task_ids=TASKS).loss.backward()
        found.append({name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        near(found[1][name], gradient, 1e-6, f"gradients of {name}")


def test_prompts_are_shown_for_tasks() -> None:
    _, ours, theirs = both()
    near(ours.get_prompt(3, task_ids=TASKS), theirs.get_prompt(3, task_ids=TASKS), 1e-6, "prompts")
    near(ours.get_prompt_embedding_to_save(), theirs.get_prompt_embedding_to_save("default"), 0, "rows")
    with pytest.raises(peftc.AdapterError, match="get_prompt: 'default' takes task_ids"):
        ours.get_prompt(3)


def test_scripts_for_peft_run(tmp_path: Path) -> None:
    _, _, theirs = both()
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    model = served.PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "theirs"), is_trainable=True)
    assert isinstance(model.peft_config["default"], served.MultitaskPromptTuningConfig)
    config = served.MultitaskPromptTuningConfig(
        num_virtual_tokens=4,
        num_tasks=3,
        task_type="CAUSAL_LM",
        prompt_tuning_init=served.MultitaskPromptTuningInit.RANDOM,
    )
    net = tiny("llama")
    fresh = served.get_peft_model(copy.deepcopy(net), config)
    fresh(input_ids=IDS, labels=IDS, task_ids=TASKS).loss.backward()
    assert fresh.get_prompt(3, task_ids=TASKS).shape == (3, 4, 32)
    generated(fresh, IDS, task_ids=TASKS)
    fresh.save_pretrained(tmp_path / "fresh")
    again = quietly(peft.PeftModel.from_pretrained, net, str(tmp_path / "fresh")).eval()
    near(again(IDS, task_ids=TASKS).logits, fresh.eval()(IDS, task_ids=TASKS).logits, 1e-5, "outputs")
