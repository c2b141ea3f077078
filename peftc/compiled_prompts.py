"""What of a CompiledModel is about virtual tokens."""

from typing import cast

from torch import Tensor, nn

from peftc.compiled_graph import CompiledGraph
from peftc.errors import AdapterError
from peftc.lifecycle import require_known
from peftc.prompts.files import prompt_embeddings, prompt_part
from peftc.prompts.virtual import rows_for


class CompiledPrompts(CompiledGraph):
    """The prompts of a model's adapters."""

    @property
    def prompt_encoder(self) -> dict[str, nn.Module]:
        """The prompt encoders by adapter name: what a prompt method trains."""
        parts = {name: prompt_part(adapter) for name, adapter in self.program.adapters.items()}
        return {name: part.module for name, part in parts.items() if part is not None}

    def get_prompt_embedding_to_save(self, adapter_name: str = "default") -> Tensor:
        """The rows of a prompt adapter as saved: (rows, token_dim), or (rows, num_layers·2·token_dim) of a prefix.

        Raises AdapterError if `adapter_name` is unknown or no prompt method.
        """
        require_known(self.plan, [adapter_name])
        part = prompt_part(self.program.adapters[adapter_name])
        if part is None:
            raise AdapterError(f"{adapter_name!r} is {self.peft_config[adapter_name].peft_type}, which has no prompt")
        return prompt_embeddings(part).detach().cpu()

    def get_prompt(self, batch_size: int, **given: Tensor) -> Tensor:
        """The rows of the first active prompt adapter, for every sequence: (batch_size, rows, width), differentiable.

        `given`: the arguments of a call that it takes, (batch_size,) each. A prefix comes flat, as it is saved. Raises
        AdapterError if no prompt adapter is active, or if it lacks one of these.
        """
        own = (prompt_part(self.program.adapters[name]) for name in self.active_adapters)
        part = next((part for part in own if part is not None), None)
        if part is None:
            raise AdapterError(
                f"no active adapter has a prompt; active are {', '.join(self.active_adapters) or 'none'}"
            )
        wanted = [name for name, one in part.edit.rule.arguments.items() if one.each == "row"]
        if set(wanted) != given.keys():
            raise AdapterError(f"get_prompt: {part.edit.adapter!r} takes {', '.join(wanted) or 'nothing of a call'}")
        made = rows_for(part.module, cast(int, part.edit.constants["rows"]), given)
        return made.expand(batch_size, -1, -1)
