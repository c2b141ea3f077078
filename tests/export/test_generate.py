"""`generate.py` beside an export: what it says against the live model's own `generate`, run where nothing else is."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import peftc
from peftc.export import generate as standalone
from tests.support.adapters import perturb
from tests.support.programs import program_inputs, program_model
from tests.support.words import word_tokenizer

PROMPT = [5, 6, 7, 9, 11]


def compiled_of(kind: str, **options: Any) -> Any:
    model = program_model(kind)
    torch.manual_seed(0)
    return perturb(peftc.compile(model, peftc.LoraConfig(r=3, target_modules="all-linear"), **options))


def live(compiled: Any, ids: list[int], count: int) -> list[int]:
    """What transformers generates with the live model."""
    given = torch.tensor([ids])
    more = {"decoder_start_token_id": start_of(compiled)} if compiled.config.is_encoder_decoder else {}
    how = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "forced_eos_token_id": None, **more}
    lengths = {"max_new_tokens": count, "min_new_tokens": count}
    made = compiled.eval().generate(input_ids=given, attention_mask=torch.ones_like(given), **lengths, **how)[0]
    return made[-count:].tolist()


def start_of(compiled: Any) -> int | None:
    own = compiled.base.generation_config.decoder_start_token_id
    return compiled.config.decoder_start_token_id if own is None else own


def written(folder: Path, ids: list[int], count: int, **how: Any) -> list[int]:
    return list(standalone.generate(standalone.load(folder / "generation"), ids, tokens=count, stop=(), **how))


def alone(folder: Path, *arguments: str) -> str:
    """What `generate.py` prints where peftc and transformers can't be imported."""
    command = [sys.executable, "-c", ALONE, str(folder / "generation" / "generate.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.removesuffix("\n")


ALONE = """
import runpy, sys
for name in ("peftc", "transformers"):
    sys.modules[name] = None  # Importing it fails.
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_text_where_there_is_neither_peftc_nor_transformers(to: Any, tmp_path: Path) -> None:
    compiled, words = compiled_of("llama"), word_tokenizer(chat=True)
    certificate = compiled.export(tmp_path / "out", to, generation=True, tokenizer=words)
    assert (certificate.tokens, certificate.tokens_equal) == (8, 8)
    assert certificate.generation == "with caches"
    raw = " ".join(f"w{token}" for token in PROMPT)
    said = alone(tmp_path / "out", raw, "--raw", "--tokens", "12")
    assert said == words.decode(live(compiled, PROMPT, 12))
    said = alone(tmp_path / "out", raw, "--tokens", "5")
    assert said == words.decode(live(compiled, [8, *PROMPT, 9], 5))
    said = alone(tmp_path / "out", "5,6 7", "--ids", "--tokens", "4")
    assert said.split() == [str(token) for token in live(compiled, [5, 6, 7], 4)]
    assert peftc.verify(tmp_path / "out").files == certificate.files
    assert {"generation/generate.py", "generation/tokenizer.json", "generation/generation.json"} <= set(
        certificate.files
    )


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pt2", "onnx"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_one_of_several_adapters_beside_the_program(kind: str, to: Any, tmp_path: Path) -> None:
    compiled = compiled_of(kind)
    compiled.add_adapter("b", peftc.LoraConfig(r=1, target_modules="all-linear"))
    perturb(compiled)
    given = program_inputs(kind, compiled.base, labels=False)
    certificate = compiled.export(tmp_path, to, adapters="inputs", generation=True, inputs=given)
    assert (certificate.tokens, certificate.tokens_equal) == (16, 16)
    model, found = standalone.load(tmp_path / "generation"), {}
    for name in ("b", None, "default", "b"):  # One program, whichever is asked for.
        compiled.set_adapter(name or [])
        expected = live(compiled, PROMPT, 8)
        assert list(standalone.generate(model, PROMPT, tokens=8, stop=(), adapter=name)) == expected
        found[name] = expected
    assert kind == "t5" or len({tuple(tokens) for tokens in found.values()}) == 3
    with pytest.raises(ValueError, match="adapter='c': there is default, b beside this program"):
        next(standalone.generate(model, PROMPT, adapter="c"))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pt2", "onnx"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gpt2", "opt", "mixtral", "t5", "bart"])
def test_families_and_short_prompts(kind: str, to: Any, tmp_path: Path) -> None:
    compiled = compiled_of(kind)
    if kind == "gemma3_text":
        compiled.config.sliding_window = 4  # Shorter than what is generated.
    certificate = compiled.export(
        tmp_path, to, generation=True, inputs=program_inputs(kind, compiled.base, labels=False)
    )
    assert certificate.tokens_equal == certificate.tokens == 8
    assert certificate.generation == ("whole sequences" if kind in ("t5", "bart") else "with caches")
    for length in (1, 2, 3, 5):
        assert written(tmp_path, PROMPT[:length], 9) == live(compiled, PROMPT[:length], 9), length


@pytest.mark.slow
def test_what_no_cache_can_serve_takes_the_whole_sequence(tmp_path: Path) -> None:
    compiled = perturb(
        peftc.compile(program_model("llama"), peftc.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    )
    certificate = compiled.export(tmp_path, "pt2", adapters="inside", generation=True)
    assert certificate.generation == "whole sequences"
    assert certificate.tokens_equal == 8
    assert written(tmp_path, PROMPT, 5) == live(compiled, PROMPT, 5)


@pytest.mark.slow
def test_a_captured_program_generates_too(tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    compiled = compiled_of("llama", capture="export", inputs=inputs)
    certificate = compiled.export(tmp_path, "pt2", adapters="inside", generation=True, inputs=inputs)
    assert certificate.generation == "whole sequences"
    assert written(tmp_path, PROMPT, 5) == live(compiled_of("llama"), PROMPT, 5)


@pytest.mark.slow
def test_a_compiled_program_and_adapters_beside_it(tmp_path: Path) -> None:
    compiled = compiled_of("llama")
    compiled.add_adapter("other", peftc.LoraConfig(r=5, target_modules=["v_proj"]))
    perturb(compiled)
    certificate = compiled.export(tmp_path, "aoti", adapters="inputs", generation=True)
    assert (certificate.tokens_equal, certificate.generation) == (16, "with caches")
    for name in ("default", "other"):
        compiled.set_adapter(name)
        assert written(tmp_path, PROMPT, 5, adapter=name) == live(compiled, PROMPT, 5)
    with compiled.disable_adapter():
        assert written(tmp_path, PROMPT, 5) == live(compiled, PROMPT, 5)


@pytest.mark.slow
def test_a_compiled_program(tmp_path: Path) -> None:
    compiled = compiled_of("llama")
    certificate = compiled.export(tmp_path, "aoti", generation=True)
    assert certificate.difference <= 1e-5
    assert certificate.tokens_equal == 8
    assert written(tmp_path, [5], 9) == live(compiled, [5], 9)
    assert peftc.verify(tmp_path).difference <= 1e-5


def test_without_a_compiler_compiling_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(peftc.ExportError, match=r"to='aoti' needs a C\+\+ compiler \(g\+\+, or what CXX names\)"):
        compiled_of("llama").export(tmp_path / "out", "aoti")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.6), (0.9, 12, 0.8), (1.0, 1, 0.5)]
)
def test_tokens_are_drawn_as_transformers_draws_them(temperature: float, top_k: int, top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 64) * 3
    warped = transformers.TemperatureLogitsWarper(temperature)(None, logits.clone())  # type: ignore[arg-type]
    if top_k:
        warped = transformers.TopKLogitsWarper(top_k)(None, warped)  # type: ignore[arg-type]
    warped = transformers.TopPLogitsWarper(top_p)(None, warped)  # type: ignore[arg-type]
    made = standalone.probabilities(logits[0].numpy(), temperature, top_k, top_p)
    np.testing.assert_allclose(made, warped.softmax(-1)[0].numpy(), atol=1e-6)
    random = np.random.default_rng(0)
    drawn = [standalone.choose(logits[0].numpy(), temperature, top_k, top_p, random) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=64) / 4000, made, atol=0.04)


class Counting:
    """A tokenizer of bytes, as far as `generate.py` asks."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def counting(**said: Any) -> standalone.Model:
    """A model whose next token is the last one plus one; its cache is how many tokens it was fed."""

    def run(inputs: Any, fed: Any, adapter: str | None) -> tuple[Any, Any]:
        given = inputs["input_ids"][0]
        assert list(inputs["position_ids"][0]) == [(fed or 0) + at for at in range(len(given))]
        logits = np.zeros(256)
        logits[(given[-1] + 1) % 256] = 5
        return logits, (fed or 0) + len(given)

    plain = {
        "inputs": ["input_ids", "position_ids"],
        "caches": {"past": []},
        "start": None,
        "stop": [13],
        "adapters": [],
    }
    return standalone.Model(run, {**plain, "shortest": 1, "longest": None, "chat": None, **said}, Counting())


def test_where_it_ends() -> None:
    assert list(standalone.generate(counting(), [10])) == [11, 12]
    assert list(standalone.generate(counting(), [10], stop=[])) == list(range(11, 75))
    assert list(standalone.generate(counting(), [10], tokens=1)) == [11]
    assert list(standalone.generate(counting(longest=4), [1, 2], stop=())) == [3, 4, 5]
    drawn = [list(standalone.generate(counting(), [20], temperature=2.0, seed=seed, tokens=9)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_text_is_said_as_soon_as_its_characters_are_whole() -> None:
    tokens = list("a€b".encode())
    assert [piece for piece in standalone.texts(counting(), iter(tokens)) if piece] == ["a", "€", "b"]
    assert "".join(standalone.texts(counting(), iter(tokens[:3]))) == "a\ufffd"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"top_p": 0}, "top_p=0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"adapter": "a"}, "there is none beside"),
    ],
)
def test_what_cannot_be_is_said(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(standalone.generate(counting(), [1], **how))
    with pytest.raises(ValueError, match="no token to start with"):
        next(standalone.generate(counting(), []))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bert", {"to": "pt2", "generation": True}, "BertForSequenceClassification does not generate"),
        ("llama", {"to": "hf", "generation": True}, r"is for programs \(pt2, onnx, aoti\)"),
        ("llama", {"to": "pt2", "tokenizer": object()}, "give generation=True, too"),
        ("whisper", {"to": "pt2", "generation": True}, "is called with input_features"),
    ],
)
def test_what_is_refused(kind: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    compiled = compiled_of(kind)
    inputs = program_inputs(kind, compiled.base, labels=False) if kind == "whisper" else None
    with pytest.raises(peftc.ExportError, match=message):
        compiled.export(tmp_path / "out", inputs=inputs, **options)
    assert not (tmp_path / "out").exists()


def test_a_slow_tokenizer_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    class Slow:
        def save_pretrained(self, folder: Path) -> None: ...

    with pytest.raises(peftc.ExportError, match=r"Slow saves no tokenizer.json"):
        compiled_of("llama").export(tmp_path / "out", "pt2", generation=True, tokenizer=Slow())
    assert not list((tmp_path / "out").iterdir())
