"""Measures what a step costs: real drafts and real verification of sequences made up for it."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence as Items
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from statistics import median

import torch

from specdec.cache import CachedSequence, CacheGroup
from specdec.costs import CostCache, StepCosts, machine
from specdec.errors import CacheFullError, InvalidArgumentError, NumericalError
from specdec.forward import one_thread
from specdec.proposers import Proposer
from specdec.proposers.checked import checked
from specdec.rng import Noise
from specdec.runner import ModelRunner, SequenceRows
from specdec.sampling import Law
from specdec.sequence import Sequence
from specdec.tree import TokenTree
from specdec.verifier import Verifier

CONTEXT, FAR_CONTEXT = 64, 512
_BEHIND = 32  # tokens that the draft has missed where catching up is measured
# Outer depths first, so that a slow model is known roughly before it is known well.
_DEPTHS = (0, 1, 4, 8, 2, 16, 3, 6, 12, 32, 24)
_ROUNDS, _FEW_ROUNDS = 40, 3
_RUN, _SETTLING = 2, 1  # steps of one depth on end, and those before them that do not count
_LINE = 3  # depths that a line is drawn through, at least
_DEEP, _SELDOM = 8, 4  # deeper ones, slow and rarely chosen, have their turn every few rounds
_PATTERN = 23  # the made-up text repeats itself, so that something can be looked up in it


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was told; of one thread's own work where there is
    only one, so that other jobs on its core do not count."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


Report = Callable[[float], None]  # what share of the measuring is done
_NEAR = 0.7  # of it, all that is measured at one context


def silent(share: float) -> None:
    """Reports to nobody."""
    del share


_Step = tuple[float, float, int]  # seconds of drafting and of verification, rows per sequence


@dataclass(slots=True)
class _Bench:
    """Sequences of one context, and steps over them that leave no trace."""

    verifier: Verifier
    proposer: Proposer
    noise: Noise
    sequences: list[Sequence]

    def draft(self, depth: int, behind: int = 1) -> tuple[float, list[TokenTree]]:
        """Seconds, and the drafts."""
        self._rewind(behind)
        nodes = self.proposer.nodes_within(depth)
        budgets = [nodes] * len(self.sequences)
        where = self.verifier.runner.vocab_size, self.verifier.runner.device
        began = self._now()
        trees = self.proposer.propose(self.sequences, budgets, self.noise)
        trees = checked(self.proposer, trees, self.sequences, budgets, *where)
        seconds = self._now() - began
        if not self.proposer.draft_rows(1):  # it may have found nothing in a made-up text
            trees = [tree if len(tree) else self._chain(nodes) for tree in trees]
        return seconds, trees

    def verify(self, trees: Items[TokenTree]) -> float:
        began = self._now()
        self.verifier.verify(self.sequences, trees, self.noise)
        seconds = self._now() - began
        self._rewind(1)
        return seconds

    def step(self, depth: int) -> _Step:
        if depth == 0:
            self._rewind(1)
            empty = TokenTree.empty(self.verifier.runner.device)
            return 0.0, self.verify([empty] * len(self.sequences)), 1
        seconds, trees = self.draft(depth)
        return seconds, self.verify(trees), max(len(tree) for tree in trees) + 1

    def _chain(self, nodes: int) -> TokenTree:
        tokens = torch.arange(nodes, device=self.verifier.runner.device)
        return TokenTree.chain(tokens % self.verifier.runner.vocab_size)

    def _rewind(self, behind: int) -> None:
        """Each model of the target's group has computed all but the last `behind` tokens."""
        group, target = self.verifier.group, self.verifier.runner
        for sequence in self.sequences:
            for model in group.memory:
                missing = 1 if model is target else behind
                sequence.cache.computed[model] = len(sequence.tokens) - missing

    def _now(self) -> float:
        return now(self.verifier.runner.device)


def profile(
    verifier: Verifier, proposer: Proposer, noise: Noise, law: Law, batch: int, *,
    max_depth: int, context: int = CONTEXT, far_context: int = FAR_CONTEXT, seconds: float = 1.5,
    report: Report = silent,
) -> StepCosts:  # fmt: skip
    """The costs of a step of `batch` sequences of `context` tokens sampled by `law`, up to
    max_depth; what further tokens cost is found at far_context, and 0 where that is not far.

    Takes about `seconds` where single steps are quick, and a few steps where they are not. A figure
    is the median of many short rounds, for a slow spell of the machine must not meet one depth
    alone; in a round each depth takes a few steps, of which the first does not count, so that a
    step finds the processor's caches as one of its own kind left them. Raises CacheFullError where
    no room is left for the sequences.
    """
    grid = _grid(proposer, max_depth)
    draft: dict[int, list[float]] = {}
    verify: dict[int, list[float]] = {}
    rows: dict[int, int] = {}
    with _Opened(verifier, proposer, noise, law, batch, context, _room(proposer, grid)) as bench:
        began = time.perf_counter()
        report(0.0)

        def spent() -> float:
            return (time.perf_counter() - began) / seconds

        def measure(depth: int, steps: int = _RUN) -> None:
            for _ in range(_SETTLING):
                bench.step(depth)
            for _ in range(steps):
                drafting, verifying, rows[depth] = bench.step(depth)
                draft.setdefault(depth, []).append(drafting)
                verify.setdefault(depth, []).append(verifying)

        for count, depth in enumerate(grid):
            if count < 3 or spent() < 1:
                measure(depth, 1)
        for round_ in range(_ROUNDS):
            report(_NEAR * min(1.0, max(spent(), round_ / _ROUNDS)))
            for depth in list(draft):
                late = spent() >= 1
                if not late and (depth <= _DEEP or round_ % _SELDOM == 0):
                    measure(depth)
        catch_up = _catch_up(bench) if proposer.draft_rows(1) else 0.0
    few = [d for d in (0, 4, 1) if d in draft][:2]
    draft_slope, verify_slope, row_slope = _slopes(
        verifier, proposer, noise, law, batch, few, (context, far_context), seconds / 3,
        lambda share: report(_NEAR + (1 - _NEAR) * share),
    )  # fmt: skip
    depths = sorted(draft)
    return StepCosts(
        batch, context, tuple(depths), tuple(rows[d] for d in depths),
        _drafting(proposer, {d: median(draft[d]) for d in depths}),
        _rising([median(verify[d]) for d in depths]),
        draft_slope, verify_slope, row_slope, catch_up,
    )  # fmt: skip


def _grid(proposer: Proposer, max_depth: int) -> list[int]:
    """Depths to measure: none that drafts no more than a smaller one."""
    depths = [d for d in _DEPTHS if d <= max_depth]
    if max_depth not in depths:
        depths.append(max_depth)
    sizes = {d: proposer.nodes_within(d) for d in depths}
    useless = {b for a, b in pairwise(sorted(depths)) if sizes[a] >= sizes[b]}
    return [d for d in depths if d not in useless]


def _room(proposer: Proposer, grid: Items[int]) -> int:
    return max(proposer.spare_slots, *(proposer.nodes_within(depth) for depth in grid)) + 1


class _Opened:
    """The bench of one context, open while it is used."""

    def __init__(
        self, verifier: Verifier, proposer: Proposer, noise: Noise, law: Law, batch: int,
        context: int, room: int,
    ) -> None:  # fmt: skip
        self._parts = verifier, proposer, noise
        self._law, self._batch, self._context, self._room = law, batch, context, room
        self._bench = _Bench(verifier, proposer, noise, [])

    def __enter__(self) -> _Bench:
        verifier, proposer, _ = self._parts
        known = min(verifier.runner.vocab_size, 1 << 15)
        text = [(7 * (i % _PATTERN) + 3) % known for i in range(self._context)]
        try:
            for index in range(self._batch):
                cache: CachedSequence = verifier.group.open(self._context + self._room)
                sequence = Sequence(
                    f"profile-{index}", index, list(text), len(text), self._law, index,
                    self._room, frozenset(), None, cache,
                )  # fmt: skip
                self._bench.sequences.append(sequence)
                for model in reversed(list(verifier.group.memory)):
                    # A model's slots may hold whatever was there, no time depends on it; another
                    # runner may look at them, and one inside another has joined before it.
                    computed = cache.computed_len(model)
                    if not isinstance(model, ModelRunner) and computed < len(text):
                        assert hasattr(model, "score")
                        model.score([SequenceRows(cache, text)])
                proposer.start(sequence)
        except BaseException:
            self.__exit__()
            raise
        return self._bench

    def __exit__(self, *_: object) -> None:
        verifier, proposer, _noise = self._parts
        for sequence in self._bench.sequences:
            sequence.finish_reason = "abort"
            proposer.finish(sequence)
            verifier.group.close(sequence.cache)


def _catch_up(bench: _Bench) -> float:
    """Seconds per token that the draft has missed."""
    near = _usual(lambda: bench.draft(1)[0])
    far = _usual(lambda: bench.draft(1, _BEHIND + 1)[0])
    return max(0.0, far - near) / _BEHIND


def _usual(measure: Callable[[], float]) -> float:
    measure()
    return median(measure() for _ in range(3))


def _slopes(
    verifier: Verifier, proposer: Proposer, noise: Noise, law: Law, batch: int,
    depths: Items[int], contexts: tuple[int, int], seconds: float, report: Report,
) -> tuple[float, float, float]:  # fmt: skip
    """Seconds per further token of context: of a drafted level, of a pass, of each of its rows.

    Steps of both contexts take turns: the difference is small beside what a slow spell adds to all
    steps of one of them.
    """
    limits = [m for m in (verifier.runner.max_positions, proposer.max_positions) if m is not None]
    room = _room(proposer, depths)
    context, far_context = contexts
    distance = min([far_context, *(limit - room for limit in limits)]) - context
    if distance < CONTEXT or not isinstance(verifier.runner, ModelRunner):
        return 0.0, 0.0, 0.0
    opened = verifier, proposer, noise, law, batch
    with (
        _Opened(*opened, context, room) as near,
        _Opened(*opened, context + distance, room) as far,
    ):
        pairs: dict[int, list[tuple[_Step, _Step]]] = {}
        began = time.perf_counter()
        for count in range(_ROUNDS):
            spent = (time.perf_counter() - began) / seconds
            report(min(1.0, max(spent, count / _ROUNDS)))
            if count > _FEW_ROUNDS and spent > 1:
                break
            for depth in depths:
                pair = near.step(depth), far.step(depth)
                if count:  # the first one warms up
                    pairs.setdefault(depth, []).append(pair)
    more = [
        tuple(median(b[part] - a[part] for a, b in pairs[depth]) / distance for part in (0, 1))
        for depth in depths
    ]
    (_, plain), (drafted, verified) = more[0], more[-1]
    per_row = max(0.0, verified - plain) / max(1, pairs[depths[-1]][0][0][2] - 1)
    return max(0.0, drafted) / max(1, depths[-1]), max(0.0, plain - per_row), per_row


def _drafting(proposer: Proposer, seconds: Mapping[int, float]) -> tuple[float, ...]:
    """What drafts take, by depth: where a model's levels are of one size, the line through all
    depths that the median of slopes gives (Theil and Sen), which one disturbed figure does not
    move."""
    some = sorted(depth for depth in seconds if depth)
    if len(some) < _LINE or len(set(proposer.draft_rows(some[-1]))) != 1:
        return _rising([seconds[depth] for depth in sorted(seconds)])
    slope = median((seconds[b] - seconds[a]) / (b - a) for a, b in combinations(some, 2))
    first = median(seconds[depth] - slope * depth for depth in some)
    line = [max(0.0, first + slope * depth) for depth in some]
    return _rising([0.0] * (0 in seconds) + line)


def _rising(values: Items[float]) -> tuple[float, ...]:
    """More work is never quicker: a figure above a later one was disturbed more."""
    highest: list[float] = []
    for value in reversed(values):
        highest.append(min(value, highest[-1]) if highest else value)
    return tuple(reversed(highest))


# Engines over the same models in one process measure once. By the file that keeps the costs: where
# the folder is another one, another process is to find them there.
_MEASURED: dict[Path, StepCosts] = {}


class Profiler:
    """Costs of the steps of one engine, measured when first asked for and kept on disk."""

    def __init__(
        self, verifier: Verifier, proposer: Proposer, groups: Items[CacheGroup], noise: Noise,
        options: str,
    ) -> None:  # fmt: skip
        """groups: of all models. options: the proposer's; empty keeps costs in this engine only."""
        self._parts = verifier, proposer, noise
        self._groups, self._options = groups, options
        self._known: dict[tuple[object, ...], StepCosts] = {}

    def __call__(self, sequences: Items[Sequence], max_depth: int) -> StepCosts | None:
        """Costs of a step of this many sequences, sampled like these; as costs()."""
        law = sequences[0].law
        if law.greedy and len(sequences) > 1:
            law = next((s.law for s in sequences if not s.law.greedy), law)
        return self.costs(law, len(sequences), max_depth)

    def costs(
        self, law: Law, batch: int, max_depth: int, *, context: int | None = None,
        fresh: bool = False, report: Report = silent,
    ) -> StepCosts | None:  # fmt: skip
        """Costs of a step of a batch, rounded up to a power of two, sampled by this law, down to a
        depth; None where they cannot be measured. context: measured there, and there only. fresh:
        measured now and kept nowhere. Raises InvalidArgumentError for a context that is too short
        or too long to be measured."""
        batch = 1 << (batch - 1).bit_length()
        mode = _mode(law)
        contexts = (CONTEXT, FAR_CONTEXT)
        if context is not None:
            contexts = (self._checked(context, max_depth),) * 2
        where = (batch, mode, max_depth, contexts)
        if not fresh and where in self._known:
            return self._known[where]
        with nullcontext() if self._uses_threads() else one_thread():
            if fresh:
                return self._measure(batch, law, max_depth, contexts, report)
            found = self._find(batch, law, mode, max_depth, contexts, report)
        if found is not None:
            self._known[where] = found
        return found

    def _checked(self, context: int, max_depth: int) -> int:
        verifier, proposer, _ = self._parts
        limits = [m for m in (verifier.runner.max_positions, proposer.max_positions) if m]
        most = min(limits) - _room(proposer, _grid(proposer, max_depth)) if limits else None
        if context < CONTEXT or (most is not None and context > most):
            end = "on" if most is None else f"to {most}"
            raise InvalidArgumentError(f"context={context}: expected {CONTEXT} {end}")
        return context

    def _uses_threads(self) -> bool:
        """Whether some runner has work for a second thread in every pass, as in a real step."""
        runners = (runner for group in self._groups for runner in group.memory)
        return any(getattr(runner, "uses_threads", True) for runner in runners)

    def _find(
        self, batch: int, law: Law, mode: str, max_depth: int, contexts: tuple[int, int],
        report: Report,
    ) -> StepCosts | None:  # fmt: skip
        key = self._key(batch, mode, max_depth, contexts)
        kept = None if key is None else CostCache(key)
        if kept is not None:
            if kept.path not in _MEASURED and (loaded := kept.load()) is not None:
                _MEASURED[kept.path] = loaded
            if kept.path in _MEASURED:
                return _MEASURED[kept.path]
        costs = self._measure(batch, law, max_depth, contexts, report)
        if kept is not None and costs is not None:
            _MEASURED[kept.path] = costs
            kept.save(costs)
        return costs

    def _measure(
        self, batch: int, law: Law, max_depth: int, contexts: tuple[int, int], report: Report
    ) -> StepCosts | None:
        verifier, proposer, noise = self._parts
        plain = law.truncated(law.truncation, greedy=law.greedy, processors=False)
        try:
            return profile(
                verifier, proposer, noise, plain, batch, max_depth=max_depth,
                context=contexts[0], far_context=contexts[1], report=report,
            )  # fmt: skip
        except (CacheFullError, NumericalError):  # a model gone wrong is named by the real step
            return None

    def _key(
        self, batch: int, mode: str, max_depth: int, contexts: tuple[int, int]
    ) -> dict[str, str] | None:
        verifier, proposer, _ = self._parts
        models = [_fingerprint(runner) for group in self._groups for runner in group.memory]
        if not self._options or not all(models):
            return None
        return {
            **machine(), "models": " ".join(models), "mode": mode,
            "proposer": f"{proposer.name} {self._options}",
            "rule": verifier.rule, "batch": str(batch), "max_depth": str(max_depth),
            "contexts": f"{contexts[0]} {contexts[1]}",
        }  # fmt: skip


def _mode(law: Law) -> str:
    """What of a law its cost depends on."""
    if law.greedy:
        return "greedy"
    cut = law.truncation
    parts = ("top_k", cut.top_k), ("top_p", cut.top_p < 1), ("min_p", cut.min_p)
    return " ".join(["sampled", *(name for name, value in parts if value)])


def _fingerprint(runner: object) -> str:
    """Changes with a model's shape, type and way of running; empty for what is no model."""
    if not isinstance(runner, ModelRunner):
        return ""
    model = runner.model
    text = f"{model.config.to_json_string()} {model.dtype} {model.device} {runner.forward_name}"
    if runner.kernels.name == "triton":  # in place of torch's
        text += " triton"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
