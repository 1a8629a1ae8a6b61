"""How long work tells how far it is: to whoever shows bars, or to nobody."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Items and a label -> the items; asked for the next when the one before is done.
Progress = Callable[[Sequence[Any], str], Iterator[Any]]
_PARTS = 100


def silent(items: Sequence[Any], label: str) -> Iterator[Any]:
    """Shows nothing."""
    del label
    return iter(items)


@contextmanager
def by_share(progress: Progress, label: str) -> Iterator[Callable[[float], None]]:
    """For work that knows what share of it is done, 0 to 1: what to call with it. Work that never
    calls has no bar."""
    parts: Iterator[Any] | None = None
    done = 0

    def report(share: float) -> None:
        nonlocal parts, done
        if parts is None:
            parts = progress(range(_PARTS), label)
            next(parts)
        while done < min(_PARTS - 1, int(share * _PARTS)):
            next(parts)
            done += 1

    yield report
    for _ in parts or ():
        pass
