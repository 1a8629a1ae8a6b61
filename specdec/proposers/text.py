"""A draft model with a tokenizer of its own drafts text, which the target's tokenizer encodes
(universal assisted generation; Timor et al. 2025, 2502.05202, section 4)."""

from collections.abc import Sequence as Items
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from specdec.cache import CacheGroup
from specdec.errors import InvalidArgumentError
from specdec.proposers.base import Proposer
from specdec.proposers.model import DraftModel
from specdec.proposers.vocabulary import Translation, Vocabulary
from specdec.rng import Noise
from specdec.runner import Runner, SequenceRows
from specdec.sequence import Sequence
from specdec.tree import TokenTree

_BEFORE = 8  # committed tokens that the drafted text is encoded behind


class TextDraftProposer(Proposer):
    """Drafts its best tokens, whatever the temperature, and proposes what their text is in the
    target's tokens, as a chain of point masses. For tokenizers that share too little to draft token
    by token. tokenizer and draft_tokenizer are those of target and draft.

    Reads the drafted tokens on the host once per step.
    """

    name = "text"
    needs_draft = True
    law = "point"

    def __init__(self, runner: Runner, *, tokenizer: Any, draft_tokenizer: Any) -> None:
        if tokenizer is None or draft_tokenizer is None:
            raise InvalidArgumentError(
                "proposer='text' needs both tokenizer and draft_tokenizer, got None"
            )
        self.model = DraftModel(
            runner, True, None, None, None, None, tokenizer, draft_tokenizer, as_text=True
        )

    def join(self, group: CacheGroup, vocab_size: int) -> None:
        self.model.join(group, vocab_size)

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        return self.model.groups

    def draft_rows(self, depth: int) -> tuple[int, ...]:
        return (1,) * depth

    def start(self, sequence: Sequence) -> None:
        self.model.start(sequence)

    def finish(self, sequence: Sequence) -> None:
        self.model.finish(sequence)

    def propose(
        self, sequences: Items[Sequence], budgets: Items[int], noise: Noise
    ) -> list[TokenTree]:
        del noise
        budgets = self.model.within(sequences, budgets)
        drafted = self._draft(sequences, budgets)
        device = self.model.runner.device
        return [
            self._tree(sequence, tokens, budget, device)
            for sequence, tokens, budget in zip(sequences, drafted, budgets, strict=True)
        ]

    def _draft(self, sequences: Items[Sequence], budgets: Items[int]) -> list[list[int]]:
        """The draft's best continuations in its own tokens, at most budgets[i] of them."""
        active = [i for i, budget in enumerate(budgets) if budget > 0]
        drafted: list[list[int]] = [[] for _ in sequences]
        if not active:
            return drafted
        best: list[list[Tensor]] = [[] for _ in sequences]
        rows = [self.model.pending(sequences[i]) for i in active]
        for level in range(1, max(budgets) + 1):
            for i, token in zip(
                active, self.model.score_own(rows).argmax(-1).split(1), strict=True
            ):
                best[i].append(token)
            active = [i for i in active if budgets[i] > level]
            rows = [
                SequenceRows(self.model.cache(sequences[i]), (), best[i][-1], keep=1)
                for i in active
            ]
        flat = iter(torch.cat([token for tokens in best for token in tokens]).tolist())
        for sequence, its_tokens, tokens in zip(sequences, drafted, best, strict=True):
            its_tokens += islice(flat, len(tokens))
            if its_tokens:
                self.model.leave(sequence, its_tokens)
        return drafted

    def _tree(
        self, sequence: Sequence, drafted: list[int], budget: int, device: torch.device
    ) -> TokenTree:
        translation = self.model.translation
        assert translation is not None
        ends = translation.draft.special
        plain = next((i for i, token in enumerate(drafted) if token in ends), len(drafted))
        text = translation.draft.text(drafted[:plain])
        before = translation.target.text(sequence.tokens[-_BEFORE:])
        tokens = translation.target.tokens(text, before)
        if plain < len(drafted) and drafted[plain] == translation.draft.eos:
            end = translation.target.eos
            tokens += [] if end is None else [end]
        if not tokens:
            return TokenTree.empty(device)
        return TokenTree.chain(torch.tensor(tokens[:budget], device=device))


def by_vocabulary(name: str, options: dict[str, Any], size: int, draft_size: int) -> str:
    """What drafts in the place of the proposer `name` between the tokenizers in its options, by the
    option `vocabulary`, which it takes out: "shared" tokens, "text", or what "auto" finds better.

    Raises InvalidArgumentError for another value of it.
    """
    how = options.pop("vocabulary", "auto")
    if how not in ("auto", "shared", "text"):
        raise InvalidArgumentError(f"vocabulary={how!r}: expected 'auto', 'shared' or 'text'")
    if how == "text" and name not in ("draft", TextDraftProposer.name):
        raise InvalidArgumentError(
            f"vocabulary='text' drafts a chain: expected proposer='draft' and no tree, got {name!r}"
        )
    both = [options.get(key) for key in ("tokenizer", "draft_tokenizer")]
    if how == "auto" and name == "draft" and None not in both and len(options) == len(both):
        mine = Vocabulary(both[0], size, "tokenizer")
        its = Vocabulary(both[1], draft_size, "draft_tokenizer")
        how = "text" if Translation(mine, its, torch.device("cpu")).is_narrow else how
    return TextDraftProposer.name if how == "text" else name
