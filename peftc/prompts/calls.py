"""Call sites: where virtual tokens enter a model. Its own call; behind a head, or in two halves, that of a part of it."""

import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

from torch import nn

from peftc.graph.region import parameters_of
from peftc.graph.sites import Site, SiteIndex, dtype_name

# `memory`: where a decoder looks at the output of an encoder, which virtual tokens have made longer.
CallSlot = Literal["embeds", "past", "memory"]


@dataclass(frozen=True)
class Stack:
    """What a prompt method must know of the model around a call.

    `token_dim` is the width of a token embedded by module `embedding` (fqn relative to the site). `num_layers` have a
    cache, whose keys and values have `key_value_heads` heads of `head_dim`. `no_past` is the reason why no prefix can be
    cached.
    """

    token_dim: int
    embedding: str
    num_layers: int
    num_attention_heads: int
    key_value_heads: int
    head_dim: int
    is_encoder_decoder: bool
    no_past: str | None = None


@dataclass(frozen=True)
class CallSite(Site):
    """The call of a whole model or of its encoder or decoder, which `stack` describes."""

    stack: Stack | None = None


# Heads that answer for every token, and so must not see the virtual ones.
_TOKEN_TASKS = ("TOKEN_CLS", "QUESTION_ANS")
_HEADS = (*_TOKEN_TASKS, "SEQ_CLS")
_OTHER_CACHES = ("cache_params", "mems", "past_buckets_states")
_KEYS = (".k_proj", ".key", ".k", ".k_lin")
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})


class Call(NamedTuple):
    """A call to rewrite: the site, what happens there, and whether the virtual tokens are dropped from its output."""

    site: CallSite
    slot: CallSlot
    drop: bool = False


def find_calls(model: nn.Module, slot: str, task: str, index: SiteIndex) -> list[Call] | str:
    """The calls at which a method with `slot` (`embeds` or `past`) enters `model` for `task`, or why there are none.

    `embeds`: the call of the model; of its backbone, with the virtual tokens dropped again, where a head answers per
    token or looks for the last one; of the encoder (and `memory`, that of the decoder) in encoder-decoder models.
    `past`: the outermost call that takes `past_key_values`.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return (
            f"needs a transformers model, whose call, embeddings and cache are known; this is a {type(model).__name__}"
        )
    known = cast(Any, model)
    double = bool(known.config.is_encoder_decoder)
    wanted = "SEQ_2_SEQ_LM" if double else "CAUSAL_LM"
    if task in ("SEQ_2_SEQ_LM", "CAUSAL_LM") and task != wanted:
        return f"task_type={task} is for {'decoder' if double else 'encoder-decoder'} models; {_name(model)} needs {wanted}"
    if task in _HEADS and not double and known.get_output_embeddings() is not None:
        return f"task_type={task} is for models with a head for it; {_name(model)} predicts tokens: give CAUSAL_LM"
    names = {id(module): fqn for fqn, module in reversed([*model.named_modules()])}
    backbone = cast(nn.Module, known.base_model)
    # Virtual tokens are dropped again where a head answers per token, or looks for the last one that is no padding.
    drop = not double and (task in _TOKEN_TASKS or (task == "SEQ_CLS" and "score" in model._modules))
    outer = backbone if drop else model
    if slot == "past":
        host = next((m for m in (outer, backbone) if "past_key_values" in _arguments(m)), None)
        if host is None:
            hint = " Prompt tuning or p-tuning would do." if "inputs_embeds" in _arguments(model) else ""
            return f"{_name(model)} takes no past_key_values: there is no cache to put a prefix into.{hint}"
        return [Call(_site(host, names[id(host)], known, index), "past")]
    host = cast(nn.Module, known.get_encoder()) if double else outer
    arguments = _arguments(host)
    if "inputs_embeds" not in arguments or not isinstance(host, transformers.PreTrainedModel):
        return f"{_name(host)} takes no inputs_embeds, so nothing can be put before its embedded tokens"
    if getattr(known.config.get_text_config(), "hidden_size_per_layer_input", None):
        return f"{_name(host)} looks up embeddings for every layer by token id, and virtual tokens have none"
    other = next((name for name in _OTHER_CACHES if name in arguments), None)
    if task == "CAUSAL_LM" and other is not None and "past_key_values" not in arguments:
        return f"{_name(host)} keeps its past in {other}, which does not tell that virtual tokens have entered"
    calls = [Call(_site(host, names[id(host)], known, index), "embeds", drop)]
    if double:
        decoder = cast(nn.Module, known.get_decoder())
        if "encoder_attention_mask" not in _arguments(decoder):
            return f"{_name(decoder)} takes no encoder_attention_mask, which would have to cover the virtual tokens"
        calls.append(Call(_site(decoder, names[id(decoder)], known, index), "memory"))
    return calls


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _arguments(module: nn.Module) -> Collection[str]:
    return [parameter.name for parameter in parameters_of(module.forward)]


def _site(host: nn.Module, fqn: str, model: Any, index: SiteIndex) -> CallSite:
    first = next(host.parameters())
    stack = _stack(host, model, index)
    return CallSite(fqn, "call", _name(host), dtype_name(first.dtype), str(first.device), stack=stack)


def _stack(host: Any, model: Any, index: SiteIndex) -> Stack:
    """Read off the config, which is that of the text decoder where there are several."""
    double = bool(model.config.is_encoder_decoder)
    # Of a config with both halves, decoder=True gives a copy that has lost the names used here.
    config = model.config.get_text_config(**({} if double else {"decoder": True}))
    varied = bool(getattr(config, "is_heterogeneous", False))  # layers differ, and have no common heads to read
    heads = _first(config, "decoder_attention_heads", "num_attention_heads") or 1
    fqn, weight = _embedding(host) or _embedding(model) or ("", None)
    stack = Stack(
        token_dim=config.hidden_size if weight is None else weight.shape[1],
        embedding=fqn,
        num_layers=_first(config, "decoder_layers", "num_decoder_layers", "num_hidden_layers"),
        num_attention_heads=heads,
        key_value_heads=heads if varied else _key_value_heads(config, heads),
        head_dim=config.hidden_size // heads if varied else _first(config, "head_dim") or config.hidden_size // heads,
        is_encoder_decoder=double,
    )
    return replace(stack, no_past=_no_past(config, stack, model, index))


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _embedding(host: Any) -> tuple[str, nn.Parameter] | None:
    """The embedding of token ids in `host`: its fqn, relative to the host, and its weight."""
    try:
        module = host.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # What transformers raises for models without one.
        return None
    fqn = next((fqn for fqn, other in host.named_modules() if other is module), None)
    weight = getattr(module, "weight", None)
    return (fqn, weight) if fqn is not None and isinstance(weight, nn.Parameter) and weight.dim() == 2 else None


def _key_value_heads(config: Any, heads: int) -> int:
    if config.model_type == "falcon":
        several = config.num_attention_heads if config.new_decoder_architecture else config.num_kv_heads
        return 1 if config.multi_query and not config.new_decoder_architecture else several
    return _first(config, "num_key_value_heads") or heads


def _no_past(config: Any, stack: Stack, model: Any, index: SiteIndex) -> str | None:
    """Why one shape of keys and values for every layer would be wrong."""
    kinds = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if kinds:
        return f"it has {', '.join(sorted(kinds))} layers, which keep no keys and values"
    if _first(config, "kv_lora_rank"):
        return "its keys and values are compressed, and differ in width"
    if any(getattr(config, name, None) for name in ("num_kv_shared_layers", "is_heterogeneous")):
        return "its layers share keys and values, or differ in their heads"
    decoder = model.get_decoder()
    prefix = next((f"{fqn}." for fqn, module in model.named_modules() if fqn and module is decoder), "")
    width = stack.key_value_heads * stack.head_dim
    for fqn, site in index.sites.items():
        if fqn.startswith(prefix) and fqn.endswith(_KEYS) and site.layer is not None and site.out_features != width:
            return (
                f"{fqn} makes keys {site.out_features} wide; the config says {stack.key_value_heads} × {stack.head_dim}"
            )
    return None
