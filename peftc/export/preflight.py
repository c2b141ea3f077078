"""Which runtimes take an adapter as its files are, why not, and the equal form that they do.

As read in their sources in autumn 2026 (vllm/lora/peft_helper.py, llama.cpp's convert_lora_to_gguf.py, mlx-lm's tuner).
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open

from peftc.checkpoint.hub import locate
from peftc.errors import CheckpointError, ExportError
from peftc.registry import rules
from peftc.rule import Rule

_MERGED = "merge it: compiled.export(folder), or peftc.merge_checkpoint(base, adapter, folder)"
_NO_PART = ", and it is no part of a weight that could be merged"
_TRANSFORMERS = "serve the model with transformers: peftc.load(model, adapter)"
_SERVING = 'compiled.save_pretrained(folder, form="serving")'


@dataclass(frozen=True)
class Verdict:
    """What a runtime makes of an adapter's files: whether it `takes` them, why not, and what to do `instead`."""

    runtime: str
    takes: bool
    because: tuple[str, ...] = ()
    instead: str = ""

    def __str__(self) -> str:
        if self.takes:
            return f"{self.runtime}: takes it"
        return f"{self.runtime}: does not take it, because of {'; '.join(self.because)}. Instead: {self.instead}"


def preflight(adapter: str | os.PathLike[str], runtime: str | None = None) -> tuple[Verdict, ...]:
    """What vLLM, SGLang, TensorRT-LLM, llama.cpp, MLX and onnxruntime make of the adapter in a folder (or one of them).

    Nothing is loaded but the folder's config and the names of its tensors. Raises CheckpointError (no adapter there),
    ExportError (no such runtime).

    Example: print(*peftc.preflight("adapter"), sep="\\n")
    """
    if runtime is not None and runtime not in _RUNTIMES:
        raise ExportError(f"runtime={runtime!r}: known are {', '.join(_RUNTIMES)}")
    folder = locate(adapter)
    config, keys = _read(folder)
    names = [runtime] if runtime is not None else list(_RUNTIMES)
    return tuple(_RUNTIMES[name](name, config, keys) for name in names)


def _read(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The config as it is written, and the names of the tensors."""
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
        if not isinstance(cast(Any, config), dict):
            raise ValueError("adapter_config.json holds no object")
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
            return config, list(file.keys())
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: no adapter that can be read: {error}") from None


def _common(config: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """What no runtime takes beside a base."""
    kind = config.get("peft_type")
    if kind != "LORA":
        merges = any(rule.offers("weight") for rule in rules() if _method(rule) == kind)
        return [f"its method, {kind}: servers take LoRA" + ("" if merges else _NO_PART)]
    found = [f"{name}={config[name]!r}" for name in ("use_dora", "lora_bias", "layer_replication") if config.get(name)]
    found += ["alora_invocation_tokens"] if config.get("alora_invocation_tokens") else []
    found += [f"bias={config['bias']!r}"] if config.get("bias", "none") != "none" else []
    found += ["rows of tokens that it trains"] if any("trainable_tokens" in key for key in keys) else []
    return found


def _method(rule: Rule[Any]) -> Any:
    return rule.spec.model_fields["peft_type"].default


_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _saved(config: Mapping[str, Any], but: Sequence[str] = ()) -> list[str]:
    names = [name for name in config.get("modules_to_save") or () if name not in but]
    return [f"modules_to_save={names}"] if names else []


def _vllm(runtime: str, config: Mapping[str, Any], keys: Sequence[str]) -> Verdict:
    whole = [*_common(config, keys), *_saved(config, ("classifier", "score"))]
    start = config.get("init_lora_weights")
    residual = isinstance(start, str) and start.lower().startswith(_RESIDUAL)
    soft = [f"init_lora_weights={start!r}, whose base is changed"] if residual else []
    return _verdict(runtime, whole, soft, _SERVING)


def _folder(runtime: str, config: Mapping[str, Any], keys: Sequence[str]) -> Verdict:
    whole = [*_common(config, keys), *_saved(config)]
    whole += ["target_parameters: it has other names for experts"] if config.get("target_parameters") else []
    soft = [f"{name}" for name in ("rank_pattern", "alpha_pattern", "use_rslora") if config.get(name)]
    return _verdict(runtime, whole, soft, _SERVING)


def _llama_cpp(runtime: str, config: Mapping[str, Any], keys: Sequence[str]) -> Verdict:
    whole = [*_common(config, keys), *_saved(config)]
    whole += ["target_parameters"] if config.get("target_parameters") else []
    return _verdict(runtime, whole, ["its format, which is GGUF"], 'compiled.export(folder, to="gguf")')


def _mlx(runtime: str, config: Mapping[str, Any], keys: Sequence[str]) -> Verdict:
    whole = [*_common(config, keys), *_saved(config)]
    whole += ["target_parameters"] if config.get("target_parameters") else []
    return _verdict(runtime, whole, ["its format, which is mlx-lm's own"], 'compiled.export(folder, to="mlx")')


def _onnxruntime(runtime: str, config: Mapping[str, Any], keys: Sequence[str]) -> Verdict:
    return _verdict(runtime, [], ["its format"], 'compiled.export(folder, to="onnx"), merged or adapters="inside"')


def _verdict(runtime: str, whole: Sequence[str], soft: Sequence[str], instead: str) -> Verdict:
    """`whole`: reasons after which only a merged model is left; `soft`: those that another form of the files mends."""
    if whole:
        return Verdict(runtime, False, (*whole, *soft), _TRANSFORMERS if whole[0].endswith(_NO_PART) else _MERGED)
    return Verdict(runtime, not soft, tuple(soft), instead if soft else "")


_RUNTIMES: Mapping[str, Callable[[str, Mapping[str, Any], Sequence[str]], Verdict]] = {
    "vllm": _vllm,
    "sglang": _folder,
    "tensorrt-llm": _folder,
    "llama.cpp": _llama_cpp,
    "mlx": _mlx,
    "onnxruntime": _onnxruntime,
}
