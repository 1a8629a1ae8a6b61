"""Counts of every short substring of texts that grow: a suffix automaton (Blumer et al. 1985)."""

from dataclasses import dataclass

ROOT = 0


@dataclass(slots=True)
class Match:
    """Where the end of a text stands in an automaton: its longest suffix that occurs there."""

    state: int = ROOT
    length: int = 0  # tokens matched


class SuffixAutomaton:
    """How often every string of at most `depth` tokens occurs, and what followed it.

    States are classes of strings with the same occurrences: at most two per token, with at most
    three transitions. A token costs amortised constant time for the structure, and the counts one
    addition per class of suffixes of at most `depth` tokens.

    A string's class is (state, length): state holds it when length[link[state]] < length <=
    length[state]. Counts are exact for strings of at most depth tokens; best and followers, at most
    `width` of them, for one token less.
    """

    __slots__ = (
        "_last", "best", "count", "depth", "length", "link", "moves", "num_tokens", "open",
        "ranked", "width",
    )  # fmt: skip

    def __init__(self, depth: int, width: int = 1) -> None:
        self.depth, self.width = depth, width
        self.num_tokens = 0
        self.length = [0]  # of the longest string
        self.link = [-1]  # the class of the longest suffix that occurs elsewhere, too
        self.moves: list[dict[int, int]] = [{}]  # token -> state
        self.count = [0]  # occurrences
        # The token that followed most often, of equals the one that did so last; -1: none.
        self.best = [-1]
        # The best `width` in that order, where width is above 1 and more than one followed.
        self.ranked: dict[int, list[int]] = {}
        self.open = Match()  # the end of the text, at most depth - 1 tokens of it
        self._last = ROOT

    def begin(self) -> None:
        """A new text: nothing spans the border."""
        self.open, self._last = Match(), ROOT

    def append(self, token: int) -> None:
        """The text grows by one token."""
        self._last = self._extend(self._last, token)
        self.num_tokens += 1
        # Where its class was just split this is the longer part, a suffix of the text all the same.
        self._count_up(self.open.state, token)
        self._step(self.open, token)

    def advance(self, match: Match, token: int) -> None:
        """The matched text, any text, grows by one token."""
        moves, link = self.moves, self.link
        while token not in moves[match.state]:
            if match.state == ROOT:
                return
            match.state = link[match.state]
            match.length = self.length[match.state]
        self._step(match, token)

    def _step(self, match: Match, token: int) -> None:
        match.state = self.moves[match.state][token]
        match.length += 1
        if match.length == self.depth:
            self.narrow(match, self.depth - 1)

    def narrow(self, match: Match, longest: int) -> None:
        """Cuts a match to its last `longest` tokens, and finds its class again."""
        if match.length > longest:
            match.length = longest
        size, state, length, link = match.length, match.state, self.length, self.link
        while state != ROOT and length[link[state]] >= size:
            state = link[state]
        match.state = state

    def followers(self, state: int) -> list[int]:
        """The tokens that followed most often, of equals the later ones first; width at most."""
        if state in self.ranked:
            return self.ranked[state]
        return [self.best[state]] if self.best[state] >= 0 else []

    def _extend(self, last: int, token: int) -> int:
        """The automaton of one more token; returns the state of the whole text."""
        length, link, moves = self.length, self.link, self.moves
        known = moves[last].get(token)
        if known is not None:  # seen in an earlier text
            return self._whole(last, known, token)
        new = self._add(length[last] + 1, {}, 0, -1)
        state = last
        while state != -1 and token not in moves[state]:
            moves[state][token] = new
            state = link[state]
        link[new] = ROOT if state == -1 else self._whole(state, moves[state][token], token)
        return new

    def _whole(self, state: int, child: int, token: int) -> int:
        """The class whose longest string is that of `state` and the token; split off `child` if it
        has longer ones."""
        length, link, moves = self.length, self.link, self.moves
        size = length[state] + 1
        if length[child] == size:
            return child
        part = self._add(size, dict(moves[child]), self.count[child], self.best[child])
        link[part], link[child] = link[child], part
        if child in self.ranked:
            self.ranked[part] = list(self.ranked[child])
        while state != -1 and moves[state].get(token) == child:
            moves[state][token] = part
            state = link[state]
        return part

    def _add(self, length: int, moves: dict[int, int], count: int, best: int) -> int:
        self.length.append(length)
        self.link.append(ROOT)
        self.moves.append(moves)
        self.count.append(count)
        self.best.append(best)
        return len(self.length) - 1

    def _count_up(self, state: int, token: int) -> None:
        """Token followed `state` and all its suffixes."""
        link, moves, count, best = self.link, self.moves, self.count, self.best
        counted, wide = -1, self.width > 1
        while state != -1:
            its_moves = moves[state]
            child = its_moves[token]
            if child != counted:
                count[child] += 1
                counted = child
            if wide and len(its_moves) > 1:
                self._rank(state, token)
            if best[state] != token and (
                best[state] < 0 or count[child] >= count[its_moves[best[state]]]
            ):
                best[state] = token
            state = link[state]

    def _rank(self, state: int, token: int) -> None:
        """Token, which has just been counted, takes its place among the best of its state."""
        ranked = self.ranked.setdefault(state, self.followers(state))
        count, its_moves = self.count, self.moves[state]
        if token in ranked:
            at = ranked.index(token)
            del ranked[at]
        else:
            at = len(ranked)
        while at > 0 and count[its_moves[ranked[at - 1]]] <= count[its_moves[token]]:
            at -= 1
        ranked.insert(at, token)
        del ranked[self.width :]
