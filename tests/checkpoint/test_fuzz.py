"""Bytes and values that nobody meant: a typed error, or the very adapter that was saved. Never anything else."""

import json
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import peftc
from peftc.checkpoint.tensor_file import read_tensors
from tests.support.adapters import perturb
from tests.support.checkpoints import hashes
from tests.support.models import llama

T = TypeVar("T")
FILES = ("adapter_model.safetensors", "adapter_config.json", "prompt_encoder.safetensors")
# What may differ without changing what an adapter computes.
FREE = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}
METHODS: dict[str, dict[str, Any]] = {
    "LORA": {"target_modules": ["q_proj", "embed_tokens"], "r": 2, "task_type": "CAUSAL_LM"},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"], "task_type": "CAUSAL_LM"},
    "PREFIX_TUNING": {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"},
    "P_TUNING": {"num_virtual_tokens": 2, "encoder_hidden_size": 4, "task_type": "CAUSAL_LM"},
}


model = cache(llama)


@cache
def place() -> tempfile.TemporaryDirectory[str]:
    """Where what was saved lies, for the length of the tests."""
    return tempfile.TemporaryDirectory(prefix="peftc-fuzz-")


@cache
def folder_of(method: str) -> Path:
    """An adapter that was saved."""
    folder = Path(place().name) / method
    compiled = perturb(peftc.compile(model(), {"peft_type": method, **METHODS[method]}))
    compiled.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _clean() -> Iterator[None]:
    yield
    place().cleanup()
    for made in (place, folder_of, base_on_disk):
        made.cache_clear()


@contextmanager
def copy_of(method: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Path(shutil.copytree(folder_of(method), name, dirs_exist_ok=True))


def contents(folder: Path) -> tuple[Any, ...]:
    """What an adapter computes with. Raises whatever loading does."""
    loaded = peftc.load(model(), folder, is_trainable=True)
    fields = loaded.peft_config["default"].to_dict()
    spec = {key: value for key, value in fields.items() if key not in FREE and value is not None}
    return spec, {key: tensor.tolist() for key, tensor in loaded.adapter_state_dict().items()}


def outcome(action: Callable[[], T]) -> T | peftc.PeftcError:
    """What `action` returns, or the typed error that it raises; any other is a failure."""
    try:
        return action()
    except peftc.PeftcError as error:
        return error


@cache
def expected(method: str) -> tuple[Any, ...]:
    return contents(folder_of(method))


@st.composite
def damages(draw: Any) -> Any:
    """A function that damages bytes: one of the accidents that happen to files."""
    at, length = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["flip", "overwrite", "cut out", "put in", "end", "append", "swap"]))
    noise, bit = draw(st.binary(min_size=length, max_size=length)), draw(st.integers(0, 7))

    def damage(content: bytes) -> bytes:
        start = int(at * len(content))
        before, part, after = content[:start], content[start : start + length], content[start + length :]
        made = {
            "flip": before + bytes([content[start] ^ 1 << bit]) + content[start + 1 :],
            "overwrite": before + noise + after,
            "cut out": before + after,
            "put in": before + noise + content[start:],
            "end": before,
            "append": content + noise,
            "swap": before + part[::-1] + after,
        }
        return made[kind]

    return damage


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=120, deadline=None)
@given(file=st.sampled_from(FILES), damage=damages())
def test_damaged_files_are_noticed(method: str, file: str, damage: Any) -> None:
    with copy_of(method) as folder:
        if not (folder / file).exists():
            return
        (folder / file).write_bytes(damage((folder / file).read_bytes()))
        before = hashes(folder)
        found = outcome(lambda: contents(folder))
        assert isinstance(found, peftc.PeftcError) or found == expected(method)
        assert hashes(folder) == before


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
likely = st.sampled_from(
    [0, -1, 1, 2**31, 0.5, "", "q_proj", ["q_proj"], ["v_proj", ""], "all-linear", "(", {"q": 1}, {}, []]
)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_configs_of_any_values(method: str, data: st.DataObject) -> None:
    """From a file without a manifest, as PEFT writes it, and in the place of a spec."""
    config = json.loads((folder_of(method) / FILES[1]).read_text())
    names = st.sampled_from([name for name in config if name != "num_virtual_tokens"])
    changes = data.draw(st.dictionaries(names | st.text(max_size=5), plain | likely, min_size=1, max_size=3))
    with copy_of(method) as folder:
        (folder / FILES[1]).write_text(json.dumps({**config, **changes}))
        for use in (
            lambda: peftc.plan(model(), {**config, **changes}),
            lambda: peftc.load(model(), folder, verify="nothing"),
        ):
            outcome(use)


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "BOOL", "F99"]) | plain,
        "shape": st.lists(st.integers(-1, 5) | plain, max_size=3) | plain,
        "data_offsets": st.lists(st.integers(-1, 64) | plain, max_size=3) | plain,
    },
)
headers = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), entries | plain, max_size=4)


@settings(max_examples=400, deadline=None)
@given(header=headers | plain, data=st.binary(max_size=64), length=st.none() | st.integers(0, 2**64 - 1))
def test_headers_of_any_values(header: Any, data: bytes, length: int | None) -> None:
    text = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "file.safetensors"
        file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
        found = outcome(lambda: read_tensors(file))
        if not isinstance(found, peftc.PeftcError):
            tensors, read, _ = found
            assert sum(tensor.nbytes for tensor in tensors.values()) == read.size - len(read.raw) <= len(data)


@settings(max_examples=150, deadline=None)
@given(damage=damages())
def test_damaged_pickles(damage: Any) -> None:
    with copy_of("LORA") as folder:
        tensors = read_tensors(folder / FILES[0])[0]
        (folder / FILES[0]).unlink()
        torch.save(dict(tensors), folder / "adapter_model.bin")
        (folder / "adapter_model.bin").write_bytes(damage((folder / "adapter_model.bin").read_bytes()))
        found = outcome(lambda: peftc.load(model(), folder, allow_pickle=True))
        assert isinstance(found, peftc.PeftcError) or found.active_adapters == ["default"]


@cache
def base_on_disk() -> Path:
    folder = Path(place().name) / "base"
    model().save_pretrained(folder, max_shard_size="30KB")
    return folder


@settings(max_examples=120, deadline=None)
@given(damage=damages(), data=st.data())
def test_damaged_bases(damage: Any, data: st.DataObject) -> None:
    """Weights apart: those of a base nobody has hashed."""
    names = sorted(file.name for file in base_on_disk().iterdir())
    name = data.draw(st.sampled_from(names))
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = Path(shutil.copytree(base_on_disk(), Path(root) / "base"))
        (base / name).write_bytes(damage((base / name).read_bytes()))
        out = Path(root) / "out"
        found = outcome(lambda: peftc.merge_checkpoint(base, folder_of("IA3"), out, progress=False))
        if isinstance(found, peftc.PeftcError):
            assert not [file for file in out.glob("*") if not file.name.startswith(".")]
