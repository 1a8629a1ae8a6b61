"""Running rates of acceptance by depth, which adaptive policies plan with."""

from collections.abc import Sequence as Items

# How quickly a sequence's old tries lose weight, and how many count of all sequences together.
_KEEP, _MOST_TRIES = 0.975, 300
_HIGHEST, _LEAST_REACH = 0.999, 0.03  # a node below that one is not worth a thought


class Rates:
    """How often a drafted token of each depth was accepted, where the one above it was, beside a
    guess at that."""

    __slots__ = ("expected", "hits", "total", "tries")

    def __init__(self, depth: int) -> None:
        self.tries, self.hits = [0.0] * (depth + 1), [0.0] * (depth + 1)
        self.total, self.expected = 0.0, 0.0  # hits, seen and guessed

    def ratio(self, weight: float, usual: float = 1.0) -> float:
        """How much better than guessed; `usual` counts for `weight` expected hits."""
        return (self.total + weight * usual) / (self.expected + weight)

    def reach(self, guess: Items[float], ratio: float, most: int, weight: float) -> list[float]:
        """The probability that the text follows the draft to depth 1, 2, ... most, as far as that
        is worth a thought. What was seen at a depth counts beside what is usual, for `weight`
        tries: one bad step at some depth must not keep deeper ones from being tried."""
        hits, tries, found, alive = self.hits, self.tries, [], 1.0
        for depth in range(1, most + 1):
            usual = min(1.0, guess[depth - 1] * ratio)
            alive *= (hits[depth] + weight * usual) / (tries[depth] + weight)
            found.append(alive)
            if alive < _LEAST_REACH:
                break
        return found

    def add(self, drafted: int, accepted: int, guess: Items[float]) -> None:
        """One draft's outcome."""
        tries, hits = self.tries, self.hits
        total, expected = self.total, self.expected
        for depth in range(1, min(accepted + 1, drafted, len(tries) - 1) + 1):
            hit = depth <= accepted
            tries[depth] = tries[depth] * _KEEP + 1
            hits[depth] = hits[depth] * _KEEP + hit
            total = total * _KEEP + hit
            expected = expected * _KEEP + guess[depth - 1]
        self.total, self.expected = total, expected

    def merge(self, other: "Rates") -> None:
        """Takes in another sequence's; of many, older ones lose weight. The guess is told()'s."""
        tries = [a + b for a, b in zip(self.tries, other.tries, strict=True)]
        hits = [a + b for a, b in zip(self.hits, other.hits, strict=True)]
        scale = min(1.0, _MOST_TRIES / max(1.0, *tries))
        self.tries, self.hits = [scale * n for n in tries], [scale * n for n in hits]

    def told(self, guess: Items[float], weight: float, at_depth: float) -> list[float]:
        """The chance by depth, from 1 on, for a sequence of which nothing is known yet; weights as
        in ratio() and reach()."""
        tries, hits = self.tries[1:], self.hits[1:]
        expected = sum(n * chance for n, chance in zip(tries, guess, strict=True))
        ratio = (sum(hits) + weight) / (expected + weight)
        return [
            min(
                _HIGHEST,
                (hit + at_depth * min(1.0, chance * ratio)) / (tried + at_depth),
            )
            for hit, tried, chance in zip(hits, tries, guess, strict=True)
        ]
