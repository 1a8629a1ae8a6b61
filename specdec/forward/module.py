"""The model's own forward pass on packed rows, through the attention interface."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.attention import STEP, Recorder, Step, implementation_over
from specdec.forward.packing import PackedLinears


class ModuleForward:
    """Runs the model itself: any class, nothing assumed beyond the attention interface."""

    name = "module"
    uses_threads = True

    def __init__(self, model: PreTrainedModel, packed: PackedLinears | None = None) -> None:
        self.model, self.packed = model, packed
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")} | {
            id(model.config): model.config
        }
        self._configs: list[Any] = list(configs.values())
        # Resolved here, not per call: the signature of a large model's forward is slow to read.
        parameters = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._takes_positions = "position_ids" in parameters

    def __call__(
        self, input_ids: Tensor, positions: Tensor, keep: Tensor, step: Step | Recorder
    ) -> Tensor:
        """Logits (n, V) of the rows named by keep; input_ids and positions are (1, R)."""
        with self.inside(step), torch.inference_mode():
            return self.logits(input_ids, positions, keep)

    def logits(self, input_ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        """The call itself, for whoever has already entered a step."""
        extra: dict[str, Any] = {"logits_to_keep": keep} if self._keeps_logits else {}
        if self._takes_positions:
            extra["position_ids"] = positions
        # An explicit mask of ones: without one, transformers looks for packed sequences itself.
        out = self.model(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False, **extra
        )
        logits: Tensor = out.logits[0]
        return logits if self._keeps_logits else logits.index_select(0, keep)

    @contextmanager
    def inside(self, step: Step | Recorder) -> Iterator[None]:
        """Sets the step and the attention implementation, and takes both back."""
        originals = [config._attn_implementation for config in self._configs]
        token = STEP.set(step)
        try:
            for config, original in zip(self._configs, originals, strict=True):
                config._attn_implementation = implementation_over(original or "eager")
            if self.packed is None:
                yield
            else:
                with self.packed.active():
                    yield
        finally:
            STEP.reset(token)
            for config, original in zip(self._configs, originals, strict=True):
                config._attn_implementation = original
