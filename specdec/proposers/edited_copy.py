"""A copy of the prompt with edits, followed across them: a rewritten file with one name changed."""

from collections.abc import Sequence as Items

# A copy that differs from its source for longer than so many tokens, that leaves out more of it
# than so many, or that breaks off more often on end after fewer copied tokens than that, is over.
# Chosen by replaying texts: 6 tokens left out at once find more wrong places to go on than right
# ones.
_LONGEST_EDIT, _MOST_SKIPPED = 8, 2
_MOST_BREAKS, _SHORT_RUN = 3, 4


class EditedCopy:
    """Keeps a growing text in line with the part of its prompt that it copies, and guesses how the
    copy goes on: with the next tokens of its source, what was edited before edited alike.

    A text leaves its source with its first token that is not the source's next one, and is back
    with the first that is one of the next few. What was said meanwhile, in place of what, is an
    edit; it is made again wherever the source has the token that it began at, until that token is
    copied as it is. A function of the text; a token costs a few comparisons.
    """

    __slots__ = ("_breaks", "_edits", "_prompt_len", "_run", "_source", "_written")

    def __init__(self, prompt_len: int) -> None:
        self._prompt_len = prompt_len
        self._source = -1  # of the next token, where it is a copy; -1: nothing is copied
        self._written: list[int] = []  # since the text left its source
        self._run = 0  # tokens copied since it came back
        self._breaks = 0  # edits on end with few copied tokens between them
        # by the source's token: what was written instead of how many tokens from it on
        self._edits: dict[int, tuple[tuple[int, ...], int]] = {}

    @property
    def follows(self) -> bool:
        """Whether a copy is under way."""
        return self._source >= 0

    @property
    def run(self) -> int:
        """Tokens copied since the last edit; 0 within one."""
        return 0 if self._written else self._run

    def begin(self, source: int, run: int) -> None:
        """The text has copied `run` tokens that end before this position. Ignored unless the source
        is in the prompt: what a text repeats of its own is no copy of something else."""
        if source < self._prompt_len:
            self._source, self._run, self._breaks = source, run, 0

    def read(self, tokens: list[int], place: int) -> None:
        """The token at this place, the next one, while a copy is under way."""
        token, source = tokens[place], self._source
        if not self._written and tokens[source] == token:
            self._edits.pop(token, None)
            self._go_on(source + 1, self._run + 1)
            return
        if not self._written:
            self._breaks = 1 if self._run >= _SHORT_RUN else self._breaks + 1
        self._written.append(token)
        ahead = tokens[source : min(source + _MOST_SKIPPED + 1, self._prompt_len)]
        if self._breaks > _MOST_BREAKS:
            self._stop()
        elif token in ahead:
            skipped = ahead.index(token)
            self._edits[tokens[source]] = tuple(self._written[:-1]), skipped
            self._written.clear()
            self._go_on(source + skipped + 1, 1)
        elif len(self._written) > _LONGEST_EDIT:
            self._stop()

    def _go_on(self, source: int, run: int) -> None:
        self._source, self._run = source, run
        if source >= self._prompt_len:
            self._stop()

    def _stop(self) -> None:
        self._source, self._run = -1, 0
        self._written.clear()

    def continuation(self, tokens: list[int], count: int, otherwise: Items[int]) -> list[int]:
        """At most `count` tokens; otherwise: a guess of how an edit that was not seen before ends.
        Empty where it does not end within that guess."""
        found: list[int] = []
        source: int | None = self._source
        if self._written:
            found, source = self._rest_of_edit(tokens, otherwise)
        if source is None:
            return []
        while len(found) < count and source < self._prompt_len:
            token = tokens[source]
            written, skipped = self._edits.get(token, ((), 0))
            found += written
            if not skipped:
                found.append(token)
            source += skipped or 1
        return found[:count]

    def _rest_of_edit(
        self, tokens: list[int], otherwise: Items[int]
    ) -> tuple[list[int], int | None]:
        """The tokens that are left of the edit under way, and where the source goes on then."""
        source, begun = self._source, len(self._written)
        alike = self._edits.get(tokens[source])
        for written, skipped in (*((alike,) if alike else ()), *reversed(self._edits.values())):
            if list(written[:begun]) == self._written:
                return list(written[begun:]), source + skipped
        ahead = tokens[source : min(source + _MOST_SKIPPED + 1, self._prompt_len)]
        for end, token in enumerate(otherwise, 1):
            if token in ahead:
                return list(otherwise[:end]), source + ahead.index(token) + 1
        return [], None if otherwise else source + 1
