"""SYNTHETIC: transformers' side of toy.SyntheticDraft: an assistant right at a known rate."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

_CERTAIN = 1e4  # a logit beside which others are nothing


class SyntheticAssistant(LlamaForCausalLM):
    """An assistant_model that knows the texts that its target will say, greedily.

    Each token it drafts is the right one with probability `acceptance`, by one coin per text and
    position, and otherwise a wrong one. What follows a wrong one does not matter: it is dropped. A
    pass takes pass_seconds at least; underneath runs a model as small as transformers allows, so
    that its cache is filled as ever.
    """

    def __init__(
        self, texts: Sequence[Sequence[int]], vocab_size: int, acceptance: float, *, seed: int = 0,
        pass_seconds: float = 0.0,
    ) -> None:  # fmt: skip
        longest = max(len(text) for text in texts)
        config = LlamaConfig(
            vocab_size=vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=longest + 64,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        super().__init__(config)
        self.texts = [tuple(text) for text in texts]
        self.pass_seconds = pass_seconds
        self.right = [
            np.random.default_rng([seed, index]).random(len(text)) < acceptance
            for index, text in enumerate(self.texts)
        ]
        self.text = 0  # which of them is being continued
        self.train(False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None, **more: Any,
    ) -> Any:  # fmt: skip
        began = time.perf_counter()
        begin = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        out = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, **more,
        )  # fmt: skip
        if begin == 0:
            self.text = self._find(input_ids[0].tolist())
        end = begin + input_ids.shape[1]
        rows = out.logits.shape[1]
        out.logits = torch.zeros_like(out.logits)
        for row, place in enumerate(range(end - rows, end)):
            out.logits[0, row, self._said(place + 1)] = _CERTAIN
        while time.perf_counter() - began < self.pass_seconds:
            pass
        return out

    def _find(self, prompt: list[int]) -> int:
        """The text that begins with these committed tokens."""
        known = tuple(prompt)
        return next(i for i, text in enumerate(self.texts) if text[: len(known)] == known)

    def _said(self, place: int) -> int:
        text = self.texts[self.text]
        if place >= len(text):
            return 0
        wrong = not self.right[self.text][place]
        return (text[place] + wrong) % int(self.config.vocab_size)
