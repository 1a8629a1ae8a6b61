"""Times on a GPU: CUDA events around replayed graphs, medians and percentiles."""

from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any, Protocol

import torch


class WrongKernelError(Exception):
    """A kernel of specdec's that does not compute what its twin does; it is not timed."""


class Timer(Protocol):
    def __call__(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        """Microseconds of single calls, taken in turn."""


class CudaTimer:
    """Events around replays; the calls are queued behind a pause, so that no gap is timed."""

    def __init__(self, repeats: int = 60) -> None:
        self.repeats = repeats

    def __call__(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        replays = [_captured(call) for call in calls]
        rounds = max(3, -(-self.repeats // len(calls)))
        events = [
            [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            for _ in range(rounds * len(calls))
        ]
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)
        for index, (start, end) in enumerate(events):
            start.record()
            replays[index % len(calls)]()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in events[len(calls) :]]


def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph; the call itself where it cannot be captured."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):  # compiles, tunes, allocates
            call()
    torch.cuda.current_stream().wait_stream(beside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    replay: Callable[[], Any] = graph.replay
    return replay


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median and percentiles, microseconds."""
    fifths = quantiles(times, n=5) if len(times) > 1 else [times[0]] * 4
    return {
        "median_us": round(median(times), 3), "p20_us": round(fifths[0], 3),
        "p80_us": round(fifths[3], 3),
    }  # fmt: skip
