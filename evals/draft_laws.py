"""The laws of a draft model where it stores none, because it took its best tokens: what it found
likely, though nothing was drawn of it."""

from collections.abc import Callable, Iterator, Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec.proposers import EnsembleProposer, Proposer, TextDraftProposer
from specdec.proposers.model import DraftModel
from specdec.runner import SequenceRows
from specdec.sampling import Paths
from specdec.sequence import Sequence

Path = tuple[int, ...]  # drafted tokens behind the committed ones
After = Callable[[Path], Tensor | None]  # (V,) the law behind a path, None: not known


@dataclass(slots=True)
class _Draft:
    """What was scored for one sequence since its committed tokens were."""

    begin: int  # positions of the committed tokens
    standing: list[int] = field(default_factory=list)  # drafted tokens in the cache, by slot
    logits: dict[Path, Tensor] = field(default_factory=dict)  # (V,) behind each


class DraftLaws:
    """Listens to the passes of a draft model, which drafts what it would have drafted."""

    def __init__(self, model: DraftModel) -> None:
        self._model = model
        self._score = model.score
        self._drafts: dict[int, _Draft] = {}  # by the identity of a sequence's cache

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this is open; nothing is known before and after."""
        try:
            with replaced(self._model, "score", self._heard):
                yield
        finally:
            self._drafts.clear()

    def take(self, sequence: Sequence) -> After:
        """The laws of the tokens drafted for a sequence since this was last asked: as its own
        settings have them, and where it drafts greedily the softmax of the logits."""
        draft = self._drafts.pop(id(self._model.cache(sequence)), None)
        law = self._model.law(sequence)

        def after(path: Path) -> Tensor | None:
            logits = None if draft is None else draft.logits.get(path)
            if logits is None or law.greedy:
                return None if logits is None else logits.softmax(-1)
            return law.probabilities(logits[None], no_paths)[0]

        return after

    def _heard(self, rows: list[SequenceRows]) -> Tensor:
        before = [row.cache.computed_len(self._model.runner) for row in rows]
        logits = self._score(rows)
        parts = logits.to(torch.float32, copy=True).split([row.keep for row in rows])
        for row, computed, its in zip(rows, before, parts, strict=True):
            if row.nodes is None:  # committed tokens: a draft begins
                draft = self._drafts[id(row.cache)] = _Draft(computed + len(row.tokens))
                paths: list[Path] = [()]
            else:
                draft = self._drafts[id(row.cache)]
                del draft.standing[computed - draft.begin :]
                nodes = row.nodes.tolist()
                paths = _paths(tuple(draft.standing), nodes, row.parents)
                draft.standing += nodes
            draft.logits.update(zip(paths[len(paths) - row.keep :], its, strict=True))
        return logits


def _paths(trunk: Path, nodes: Items[int], parents: Items[int] | None) -> list[Path]:
    """To every node of a pass; parents -1: the end of the trunk, None: a chain."""
    above = range(-1, len(nodes) - 1) if parents is None else parents
    found: list[Path] = []
    for token, parent in zip(nodes, above, strict=True):
        found.append((*(found[parent] if parent >= 0 else trunk), token))
    return found


def nowhere(path: Path) -> None:
    """The laws of what has none."""
    del path


def drafting_models(proposer: Proposer | None) -> list[DraftModel]:
    """Those that choose the target's tokens; one that drafts text has laws of other tokens."""
    members = proposer.members if isinstance(proposer, EnsembleProposer) else (proposer,)
    found = [getattr(m, "model", None) for m in members if not isinstance(m, TextDraftProposer)]
    return [model for model in found if isinstance(model, DraftModel)]


@contextmanager
def replaced(owner: object, method: str, by: Any) -> Iterator[None]:
    """An object's method is another one for as long as this is open."""
    assert method not in vars(owner), f"{method} is replaced already"
    setattr(owner, method, by)
    try:
        yield
    finally:
        delattr(owner, method)


def no_paths() -> Paths:
    raise AssertionError("nothing here looks at a path")
