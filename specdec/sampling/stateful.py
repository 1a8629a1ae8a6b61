"""Processors of unknown kinds: called path by path, with a state per path where they offer one."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from specdec.errors import InvalidArgumentError
from specdec.sampling.paths import Path, Paths


@runtime_checkable
class ForkableProcessor(Protocol):
    """A logits processor with a state that follows the text: a grammar, a watermark, a model.

    A copy (copy.copy) of the one that the caller hands over stands at the end of each prompt. Every
    row of a tree gets a processor of its own, forked from that of the row above. Neither a call nor
    a fork may change what another processor gives, nor a call what its own next call gives: most of
    what is forked belongs to drafts that are rejected.
    """

    def fork(self, parent: Any, token: int) -> Any:
        """The processor for the path of parent and one more token; parent stays as it is.

        parent is a copy of self or something that fork returned; the caller's own one is called
        for nothing but this.
        """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(1, n) unpadded ids and (1, V) scores of the next token -> (1, V) processed scores."""


def _each_row(
    scores: Tensor, paths: Paths, ends: frozenset[int],
    process: Callable[[Tensor, list[int], int], Tensor],
) -> Tensor:  # fmt: skip
    """process(scores of the row, path, prompt length) of every row, on the host.

    A draft may go on behind an end token, where no text is and a grammar allows nothing: such rows
    are never emitted and stay as they are.
    """
    rows = zip(scores.split(1), paths.rows(), paths.prompt_lens, strict=True)
    return torch.cat(
        [
            row if ends.intersection(path[prompt_len:]) else process(row, path, prompt_len)
            for row, path, prompt_len in rows
        ]
    )


class PathByPath:
    """Calls a function of (ids, scores) on every path alone. ends: tokens that end a text."""

    def __init__(self, processor: Any, ends: frozenset[int]) -> None:
        self.processor, self.ends = processor, ends

    def __call__(self, scores: Tensor, paths: Paths) -> Tensor:
        return _each_row(
            scores, paths, self.ends, lambda row, path, _: call(self.processor, row, path)
        )

    def prove(self, path: Path, scores: Tensor) -> None:
        """Raises InvalidArgumentError if calls depend on earlier calls, as far as a few can show.

        A repeated call and a discarded branch must not change the result.
        """
        first = call(self.processor, scores, path)
        self._same(first, call(self.processor, scores, path), "a repeated call")
        call(self.processor, scores, [*path, int(first.argmax())])
        self._same(first, call(self.processor, scores, path), "a discarded branch")

    def _same(self, first: Tensor, again: Tensor, what: str) -> None:
        if not torch.equal(first, again):
            raise InvalidArgumentError(
                f"{type(self.processor).__name__}: {what} changes its result, so it keeps a state "
                "that rejected drafts would corrupt. Give it fork(parent, token) "
                "(specdec.sampling.ForkableProcessor), remove it, or use model.generate()"
            )


class ForkPerPath:
    """Gives every path a processor forked along its generated tokens.

    States are kept for what was asked last, so that the committed path goes on from its own; one
    that was forgotten is forked again from the prompt's.
    """

    def __init__(self, processor: ForkableProcessor, ends: frozenset[int]) -> None:
        self.processor, self.ends = processor, ends
        self._states: OrderedDict[tuple[int, tuple[int, ...]], Any] = OrderedDict()
        self._most_rows = 32

    def __call__(self, scores: Tensor, paths: Paths) -> Tensor:
        def process(row: Tensor, path: list[int], prompt_len: int) -> Tensor:
            return call(self._state(prompt_len, path), row, path)

        processed = _each_row(scores, paths, self.ends, process)
        self._most_rows = max(self._most_rows, len(paths.lengths))
        while len(self._states) > 4 * self._most_rows:  # a draft's rows and the target's, twice
            self._states.popitem(last=False)
        return processed

    def _state(self, prompt_len: int, path: list[int]) -> Any:
        known = len(path)
        while known > prompt_len and (prompt_len, tuple(path[:known])) not in self._states:
            known -= 1
        key = (prompt_len, tuple(path[:known]))
        if key not in self._states:
            self._states[key] = copy.copy(self.processor)
        self._states.move_to_end(key)
        state = self._states[key]
        for end in range(known, len(path)):
            state = self.processor.fork(state, path[end])
            self._states[prompt_len, tuple(path[: end + 1])] = state
        return state

    def prove(self, path: Path, scores: Tensor) -> None:
        """Raises InvalidArgumentError if a call or a fork changes what other rows get."""
        root = copy.copy(self.processor)
        first = call(root, scores, path)
        token = int(first.argmax())
        child = self.processor.fork(root, token)
        below = call(child, scores, [*path, token])
        grandchild = self.processor.fork(child, int(below.argmax()))
        call(grandchild, scores, [*path, token, int(below.argmax())])
        call(copy.copy(self.processor), scores, [*path, token])  # another prompt
        for what, state, line, wanted in (
            ("a call of a fork", root, path, first),
            ("a fork", child, [*path, token], below),
            ("a second fork", self.processor.fork(root, token), [*path, token], below),
            ("a call", copy.copy(self.processor), path, first),
        ):
            if not torch.equal(call(state, scores, line), wanted):
                raise InvalidArgumentError(
                    f"{type(self.processor).__name__}: {what} changes what other forks give; "
                    "fork(parent, token) must return a processor that shares no changing state "
                    "with parent"
                )


def call(processor: Any, scores: Tensor, path: Sequence[int]) -> Tensor:
    """transformers' call for one path: (1, V) scores."""
    ids = torch.tensor([list(path)], dtype=torch.long, device=scores.device)
    return cast(Tensor, processor(ids, scores))
