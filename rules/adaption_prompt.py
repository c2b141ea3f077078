"""LLaMA-Adapter: y + g·softmax(q·K(P)ᵀ/√d)·V(P)·O, prompts in the upper layers.  Zhang et al. 2023, arXiv:2303.16199."""

from typing import Any, Literal

from torch import Tensor

from peftc.attention.sites import AttentionSite, AttentionSpec
from peftc.rule import Constant, Param, Rule
from peftc.specs.selection import Count


class AdaptionPromptConfig(AttentionSpec):
    """Adaption prompts that attention attends to beside its tokens. Zhang et al. 2023, arXiv:2303.16199, section 3.2.

    `adapter_len` trained vectors in each of the last `adapter_layers` layers; their keys and values are made by the layer's
    own projections, and what the queries get from them is added with a gate that starts at zero. `target_modules`: the
    name of the attention modules (`self_attn`), which is known for Llama, Mistral and GPT-2.

    Example: AdaptionPromptConfig(adapter_len=10, adapter_layers=30, task_type="CAUSAL_LM")
    """

    peft_type: Literal["ADAPTION_PROMPT"] = "ADAPTION_PROMPT"
    adapter_len: Count | None = None
    adapter_layers: Count | None = None

    @property
    def last(self) -> int | None:
        return self.adapter_layers if self.adapter_len else None


class AdaptionPrompt(Rule[AdaptionPromptConfig]):
    """On attention modules."""

    name, spec, ops = "adaption_prompt", AdaptionPromptConfig, ("attention_call",)
    keys = ("adaption_prompt", "adaption_gate")

    def params(self, spec: AdaptionPromptConfig, site: AttentionSite) -> dict[str, Param]:
        return {
            "adaption_prompt": Param((1, spec.adapter_len or 0, site.width), "normal"),
            "adaption_gate": Param((1,), "zeros", use="vector"),
        }

    def constants(self, spec: AdaptionPromptConfig, site: AttentionSite) -> dict[str, Constant]:
        return {"length": spec.adapter_len or 0}

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return y + p.project((p.adaption_gate * p.attend(p.adaption_prompt)).to(y.dtype))
