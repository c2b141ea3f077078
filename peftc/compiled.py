"""CompiledModel: a model with adapters."""

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, Unpack

from torch import Tensor, nn

from peftc import lifecycle
from peftc.checkpoint import Download, Verify, locate, read_adapter, respelled_spec
from peftc.choices import Adapters, Sizes, Target
from peftc.compiled_files import CompiledFiles
from peftc.errors import MergeError
from peftc.export import Certificate, export
from peftc.graph.region import Capture
from peftc.merge import Undo, forget, merge, unmerge
from peftc.plan import require_applicable
from peftc.registry import spec_classes
from peftc.rewrite.build import build, undo
from peftc.rewrite.learning import penalty
from peftc.rewrite.program import require_idle
from peftc.rewrite.scale import set_scale
from peftc.rewrite.switch import activate, emit, train
from peftc.rule import Combination
from peftc.specs import load_spec
from peftc.status import LayerStatus, ModelStatus, layer_status, model_status

OnUnmatched = Literal["error", "warn"]


class CompiledModel(CompiledFiles):
    """A model with adapters. Its own graph is the model's call; `base` is the rewritten model, of the class it had.

    Attributes that are not found here are those of `base` (`config`, `device`, …). Made by `compile`.

    Example::

        model = peftc.compile(model, peftc.LoraConfig(r=16, target_modules="all-linear"))
        model.save_pretrained("adapter")
        deployed = model.merge_and_unload()
    """

    def get_layer_status(self) -> list[LayerStatus]:
        """What is active, merged and learning at every adapted module, in module order."""
        return layer_status(self.program)

    def get_model_status(self) -> ModelStatus:
        """What is active, merged and learning in the whole model."""
        return model_status(self.program)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Activate exactly these adapters, and train them; the others are frozen. They apply in load order.

        Raises AdapterError on an unknown name, MergeError while merged.
        """
        names = lifecycle.named(adapter_name)
        lifecycle.require_known(self.program.plan, names)
        lifecycle.require_unmerged(self.program, "set_adapter")
        activate(self.program, names, names)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let these adapters train, active or not, or freeze them. Raises AdapterError on an unknown name."""
        names = lifecycle.named(adapter_names)
        lifecycle.require_known(self.program.plan, names)
        if set(names) & set(self.program.merged):
            lifecycle.require_unmerged(self.program, "set_requires_grad")
        others = [name for name in self.program.learning if name not in names]
        train(self.program, [*others, *names] if requires_grad else others)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Let an adapter change the base by `scale` times what it was trained to: 0 is none of it, 1 all.

        Live: graphs stay, torch.compile compiles nothing anew, merging takes it, copies and pickles keep it. Files don't,
        unless they are saved with `bake=True`. Raises AdapterError (an unknown name, no finite number, a method without
        such a factor), MergeError while merged.

        Example: model.set_scale("default", 0.5)
        """
        lifecycle.require_known(self.program.plan, [adapter_name])
        lifecycle.require_unmerged(self.program, "set_scale")
        require_idle(self.program)
        set_scale(self.program, adapter_name, scale)

    def enable_adapters(self, enabled: bool = True) -> None:
        """Turn all adapters off, as `disable_adapter` does for a while, or on again. Raises MergeError while merged."""
        lifecycle.require_unmerged(self.program, "enable_adapters")
        before, self.program.enabled = self.program.enabled, enabled
        try:
            emit(self.program)
        except BaseException:
            self.program.enabled = before
            raise

    @contextmanager
    def disable_adapter(self) -> Generator[None]:
        """A context in which the graphs are those of the base model: no adapter op, no cost.

        Unlike PEFT's, it takes trained biases (`bias="all"`) out as well, so the outputs are the base model's.
        Raises MergeError while merged.
        """
        before = self.program.enabled
        self.enable_adapters(False)
        try:
            yield
        finally:
            self.enable_adapters(before)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any,
        *,
        on_unmatched: OnUnmatched = "error",
        autocast_adapter_dtype: bool | None = None,
        calibration: lifecycle.Batches = None,
    ) -> None:
        """Attach a new, untrained adapter, inactive and frozen. `peft_config`: whatever `compile` takes as one spec.

        `autocast_adapter_dtype` as in `compile`; by default as it was there. `calibration` as in `compile`.

        Raises AdapterError if the name is taken, SpecError, NoMatchError, ConflictError; nothing is changed then.
        """
        spec = load_spec(peft_config, spec_classes())
        lifecycle.add(
            self.program, adapter_name, spec, on_unmatched, autocast=autocast_adapter_dtype, calibration=calibration
        )

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "",
        *,
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Attach a new adapter, inactive and frozen, that combines `adapters` of one method with `weights` w of any sign.

        LoRA, with Δᵢ = sᵢ·Bᵢ·Aᵢ at every site, the result with scaling 1:

        - `svd` (default): the leading `svd_rank` (default: the largest rank) singular triplets of Σ wᵢ·Δᵢ; exact if that
          is its rank. `svd_clamp`: clamp both factors to that quantile of all their entries.
        - `cat`: A = [wᵢ·sᵢ·Aᵢ …], B = [Bᵢ …]; exact, its rank is the sum.
        - `linear`: A = Σ aᵢ·Aᵢ, B = Σ |aᵢ|·Bᵢ with aᵢ = sign(wᵢ)·√|wᵢ·sᵢ|: has cross terms Bᵢ·Aⱼ; equal ranks only.
        - `magnitude_prune`: as linear, on the share `density` of largest entries of each factor.
        - `dare_linear`: as linear, on random entries kept with probability `density` and divided by it.
        - `ties`, `dare_ties`: as these two, but each entry is the mean of those of the elected sign: that of the sum
          (`majority_sign_method="total"`) or of most entries (`"frequency"`).
        - `…_svd` of these: on the Δᵢ themselves, then `svd` (`svd_full_matrices`, `svd_driver` as in torch.linalg.svd).

        (IA)³: `linear`, l = Σ wᵢ·lᵢ. A single adapter is taken as it is, scaled, unless there is an `svd_rank`.
        Modules saved by one of the adapters are copied. Sources: arXiv:2306.01708 (ties), arXiv:2311.03099 (dare).

        Raises AdapterError, with nothing changed: a name taken or unknown, several methods, ranks that differ where they
        must not, modules that two adapters save, trained biases. MergeError while merged.
        """
        how = Combination(
            combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method
        )
        lifecycle.combine(self.program, adapter_name, adapters, weights, how)

    def penalty(self) -> Tensor | None:
        """What the methods of active adapters that learn add to the loss (0-dim, differentiable), or None if they add
        nothing. In train(), it is in the `loss` that a transformers model returns.

        Example: loss = loss if (penalty := model.penalty()) is None else loss + penalty
        """
        return penalty(self.program)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Take an adapter off, or several. If no other was active, the one loaded first becomes so.

        Raises AdapterError on an unknown name, MergeError while merged; nothing is changed then.
        """
        names = lifecycle.named(adapter_name)
        lifecycle.require_known(self.program.plan, names)
        for name in dict.fromkeys(names):
            lifecycle.delete(self.program, name)

    def merge_adapter(
        self,
        adapter_names: str | Sequence[str] | None = None,
        *,
        untie: bool = False,
        undo: Undo = "keep",
        safe_merge: bool = True,
        progressbar: bool = False,
    ) -> None:
        """Fold adapters (default: the active ones) into the base weights; their ops leave the graphs.

        Each weight is computed in float64 (float32 for half precision) and rounded once, and `unmerge_adapter` gives the
        bits from before. `undo` says how: `keep` keeps the original tensors (those of the original model, if that is
        alive); `residual` merges in place, tile by tile, and keeps a compressed log of the bits that arithmetic would get
        wrong, a few percent of the weights (needs zstandard: `peftc[undo]`); `none` keeps nothing. `safe_merge`, which PEFT
        has, is so in any case: NaN and Inf are refused. `progressbar`: show one, if somebody looks on.

        Raises MergeError, with nothing changed: NaN or Inf, a site without a fold, a tied weight (unless `untie`),
        something merged already, or `residual` where tensors are not this model's own. AdapterError if an adapter is
        unknown or not active.
        """
        names = self.active_adapters if adapter_names is None else lifecycle.named(adapter_names)
        lifecycle.require_known(self.program.plan, names)
        merge(self.program, names, untie, undo, progressbar)

    def unmerge_adapter(self, *, check: bool = True, progressbar: bool = False) -> None:
        """Put the original tensors back and the adapters' ops in again.

        Raises MergeError, with nothing changed, if nothing is merged, if it was with `undo="none"`, or if a tensor that
        undoing goes by is not what its checksum says; `check=False` does without checksums.
        """
        unmerge(self.program, check, progressbar)

    @contextmanager
    def merged(
        self, adapter_names: str | Sequence[str] | None = None, *, untie: bool = False, undo: Undo = "keep"
    ) -> Generator[Self]:
        """A context in which adapters are merged, as `merge_adapter` does. Raises as the two calls do."""
        if undo == "none":
            raise MergeError("merged(undo='none') could not be left again; use 'keep' or 'residual'")
        self.merge_adapter(adapter_names, untie=untie, undo=undo)
        try:
            yield self
        finally:
            if self.program.merged:
                self.unmerge_adapter()

    def merge_and_unload(
        self,
        adapter_names: str | Sequence[str] | None = None,
        *,
        untie: bool = False,
        safe_merge: bool = True,
        progressbar: bool = False,
    ) -> nn.Module:
        """Fold adapters (default: the active ones, or those merged already) and return the plain model.

        The returned model has the original's classes and no trace of peftc; biases that an adapter trained stay.
        This CompiledModel has no adapters afterwards. Raises as `merge_adapter` does. `safe_merge` and
        `progressbar` as there.
        """
        if not self.program.merged or adapter_names is not None:
            self.merge_adapter(adapter_names, untie=untie, undo="none", progressbar=progressbar)
        forget(self.program)
        self.program.overlay.keep()  # What active adapters trained in place, or brought, stays.
        return self._undo()

    def export(
        self,
        folder: str | os.PathLike[str],
        to: Target = "hf",
        *,
        adapters: Adapters | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        generation: bool = False,
        tokenizer: Any = None,
        gguf: str | os.PathLike[str] | None = None,
        quantized: bool = False,
        sizes: Sizes = "open",
        progress: bool = True,
    ) -> Certificate:
        """Write the model for a runtime, and compare what was written with it.

        `to`: `hf`, a plain transformers checkpoint; `pt2`, a torch.export program; `onnx`, a model for onnxruntime (needs
        `peftc[export]`); `aoti`, a program compiled for machines like this one (needs a C++ compiler). Programs take any
        batch and length, and run without peftc: those of transformers' models by
        `transformers.exporters.ExportedModel.from_pretrained(folder)`, others by `torch.export.load(folder / "model.pt2")`
        or onnxruntime, compiled ones by `torch._inductor.aoti_load_package(folder / "compiled.pt2")`. `generation`: in
        `folder/generation` a program for one token after another, with caches where the model has plain ones, and
        `generate.py`, which needs neither peftc nor transformers; with `tokenizer` (transformers') it takes and gives
        text. `gguf`, `mlx`: every active LoRA adapter as a file of its own, for the base that llama.cpp or mlx-lm has.
        `adapters`: `merged` into the weights (by default); `inside`, as the ops that they are; `inputs` (of programs), all
        that are loaded, as files in `folder/adapters` whose factors the program takes, of any rank or none; `beside` for
        gguf and mlx. `merged` for gguf needs `gguf`, the base's own file, whose changed tensors are written anew: in
        float16 where they were quantised, or `quantized` again. `inputs`: what the model is called with, tensors by name,
        two rows at least; ids are made for models that take them. A program is also run on inputs of other sizes, and with
        padding, and refused where it differs from the model: a trace takes one side of every branch in Python. `sizes`:
        `fixed` writes it for the sizes of `inputs` alone, which every runtime but aoti's checks. `progress`: show it.

        All of it is written or, if anything fails or is killed, nothing; this model is as it was, bit for bit. The result
        is in `certificate.json`, too, for `peftc.verify(folder)`. Raises ExportError: what can't be traced, or merged.

        Example: print(compiled.export("deployed", to="onnx"))
        """
        return export(
            self.program,
            Path(folder),
            to,
            adapters,
            inputs=inputs,
            generation=generation,
            tokenizer=tokenizer,
            gguf=None if gguf is None else Path(gguf),
            quantized=quantized,
            progress=progress,
            sizes=sizes,
        )

    def unload(self) -> nn.Module:
        """Remove every adapter and return the base: same classes, tensors, flags and outputs as the original.

        With `inplace=True` it is the very model that was compiled; else it shares its tensors with that one, so copy
        it before training either. This CompiledModel has no adapters afterwards.
        """
        if self.program.merged:
            self.unmerge_adapter()
        return self._undo()

    def _undo(self) -> nn.Module:
        require_idle(self.program)
        return undo(self.program)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        *,
        capture: Capture = "modules",
        inputs: Mapping[str, Any] | None = None,
        inplace: bool = False,
        autocast_adapter_dtype: bool = True,
        subfolder: str | None = None,
        allow_pickle: bool = False,
        strict: bool = True,
        verify: Verify = "all",
        low_cpu_mem_usage: bool = True,
        key_mapping: Mapping[str, str] | None = None,
        **download: Unpack[Download],
    ) -> "CompiledModel":
        """Compile `model` with an adapter from a folder or a Hub repository: for inference, unless `is_trainable`.

        `config` takes the place of the folder's `adapter_config.json`. The rest is as in `compile` and `load_adapter`.

        Example: model = peftc.load(model, "adapter")

        Raises CheckpointError, SpecError; the model is not changed then, even with `inplace`.
        """
        folder = locate(model_id, subfolder, **download)
        read = partial(read_adapter, folder, is_trainable=is_trainable, allow_pickle=allow_pickle, verify=verify)
        files = read(config=None if config is None else load_spec(config, spec_classes()), key_mapping=key_mapping)
        model = lifecycle.looked_through(model)
        with lifecycle.reshaped(model, {adapter_name: files.spec}, inplace) as base:
            files = files.on(base)
            spec = respelled_spec(base, files.spec, files.tensors)
            made, regions = lifecycle.planned(
                base, {adapter_name: spec}, capture, autocast_adapter_dtype, fresh=False, inputs=inputs
            )
            require_applicable(made, "warn")
            compiled = cls(build(base, made, regions, inplace, fresh=False))
            try:
                lifecycle.fill_from(compiled.program, adapter_name, files, strict)
            except BaseException:
                compiled.unload()
                raise
        return compiled if is_trainable else compiled.eval()
