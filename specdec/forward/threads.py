"""How many threads torch uses inside a step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch's operators run on one thread; outside, on as many as before.

    Operators of a few microseconds lose by a second one, and where another process has the second
    core each waits for its turn there: measured, two hundred times slower.
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
