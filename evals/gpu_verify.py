"""Fused verification on a GPU: what the benchmark runs it on, and the unfused pipeline beside it.

A case is (rule, law, shape). Its floor is the time of moving the bytes that the rule must read: the
target's logits once, twice where the law is truncated and they do not fit the cache, and the stored
laws of drafts for block and recursive.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specdec import backend
from specdec.acceptance import batched
from specdec.acceptance.batched import Outcome, TreeBatch
from specdec.evals.gpu_timing import Timer, WrongKernelError, spread
from specdec.rng import PhiloxNoise, StepNoise, split_seed
from specdec.sampling import Truncation
from specdec.tree import Kind, Law, Proposal, TokenTree

VOCABULARY = 151_936  # Qwen3's
SHAPES = ((1, 8), (8, 8), (32, 8), (64, 8), (8, 32))  # sequences, rows of each
LAWS = {
    "plain": Truncation(),
    "top-p": Truncation(temperature=0.8, top_p=0.95),
    "top-k, top-p": Truncation(temperature=0.8, top_k=50, top_p=0.95),
}
CHAINS = ("token", "block")
_MOST_SETS = 64
_ALIKE = 64  # one sequence in so many may differ: a coin within rounding of a boundary


@dataclass(frozen=True, slots=True)
class Case:
    """A rule on a batch of trees of `rows` rows: chains for the rules that judge them, else trees
    of two children a row."""

    rule: str
    law: str
    batch: int
    rows: int
    vocabulary: int = VOCABULARY

    @property
    def width(self) -> int:
        """Children of a row."""
        return 1 if self.rule in CHAINS else 2

    @property
    def parents(self) -> tuple[int, ...]:
        """Of each node, -1 for the root."""
        return tuple(node // self.width - 1 for node in range(self.rows - 1))

    @property
    def logits_bytes(self) -> int:
        """In 16 bits."""
        return 2 * self.batch * self.rows * self.vocabulary

    def must_read(self, stored_laws: int, cache_bytes: int) -> int:
        """Bytes; stored_laws: rows of drafts' laws in float32."""
        is_twice = self.law != "plain" and self.logits_bytes > cache_bytes
        held = 4 * stored_laws * self.vocabulary if self.rule in ("block", "recursive") else 0
        return self.logits_bytes * (1 + is_twice) + held


def cases() -> list[Case]:
    """Every case of the benchmark. Greedy has one law."""
    rules = backend.kernel_file("verify").RULES
    return [
        Case(rule, law, *shape)
        for rule in rules
        for law in (LAWS if rule != "greedy" else ["plain"])
        for shape in SHAPES
    ]


def sets_for(case: Case, cache_bytes: int) -> int:
    """So many input sets that each is gone from the cache when its turn comes again."""
    return min(max(2, -(-4 * cache_bytes // case.logits_bytes)), _MOST_SETS)


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The arguments of one call, ours and the twin's. noise: (R, V), the gumbel rule's alone."""

    case: Case
    batch: TreeBatch
    logits: Tensor  # (R, V)
    q: Tensor | None  # (L, V)
    seeds: tuple[int, ...]
    positions: tuple[int, ...]
    coins: StepNoise
    noise: Tensor | None


def inputs(case: Case, *, seed: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Drafts really drawn, without replacement, from laws that are near the target's."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    width, parents = case.width, case.parents
    inner = len(set(parents))  # rows that have children: the first of each tree
    logits = (normal(case.batch * case.rows, case.vocabulary) * 3).to(dtype)
    above = logits.view(case.batch, case.rows, -1)[:, :inner].flatten(0, 1)
    laws = torch.softmax(above.float() + normal(case.batch * inner, case.vocabulary), -1)
    race = laws.log() - torch.empty_like(laws).exponential_(generator=generator).log()
    drawn = race.topk(width).indices.view(case.batch, -1)[:, : case.rows - 1].cpu()
    kind: Kind = "iid" if width == 1 else "without_replacement"
    trees = []
    for tokens, held in zip(drawn, laws.view(case.batch, inner, -1), strict=True):
        proposals = [
            Proposal(parent, token, Law(kind, parent + 1), node)
            for node, (parent, token) in enumerate(zip(parents, tokens.tolist(), strict=True))
        ]
        tree = TokenTree.build(tokens, parents, proposals, held)
        trees.append(replace(tree, tokens=tokens.to(device)))
    batch = TreeBatch.of(trees)
    seeds = tuple(seed * case.batch + i for i in range(case.batch))
    positions = tuple(100 + 7 * i for i in range(case.batch))
    made = PhiloxNoise()
    noise = None
    if case.rule == "gumbel":
        where = [
            (seeds[b], positions[b] + depth)
            for b, tree in enumerate(trees)
            for depth in (0, *tree.depths)
        ]
        noise = made.gumbel([s for s, _ in where], [p for _, p in where], case.vocabulary, device)
    coins = made.step(seeds, positions, case.rows, device, batch.copies)
    return Inputs(case, batch, logits, laws, seeds, positions, coins, noise)


def fused(problem: Inputs) -> Callable[[], Any]:
    """kernels.verify, a few launches; the trees' index tensors are made outside the timing."""
    kernels = backend.kernel_file("verify")
    case, layout, device = problem.case, problem.batch.layout, problem.logits.device
    parents = [case.parents] * case.batch
    draws = [(d.parent, d.row, d.law, bool(d.taken)) for d in layout.draws]
    trees = kernels.Trees.of(problem.batch.tokens, parents, draws, layout.laws)
    keys = torch.tensor([split_seed(seed) for seed in problem.seeds], device=device)
    positions = torch.tensor(problem.positions, device=device)
    law, limits = LAWS[case.law], {}
    for name, dtype in _LIMITS.items():
        value = getattr(law, name)
        if value != getattr(LAWS["plain"], name):
            limits[name] = torch.full((case.batch,), value, dtype=dtype, device=device)
    return lambda: kernels.verify(
        case.rule, problem.logits, trees, keys, positions, **limits, q=problem.q
    )


_LIMITS = {
    "temperature": torch.float64, "top_k": torch.int64, "top_p": torch.float64,
    "min_p": torch.float64,
}  # fmt: skip


def unfused(problem: Inputs) -> Callable[[], Outcome]:
    """The twin: probabilities of all rows in float32, then the batched rule. Its noise is given."""
    case, batch, logits = problem.case, problem.batch, problem.logits

    def call() -> Outcome:
        if case.rule == "greedy":
            return batched.greedy(batch, logits.argmax(-1), logits)
        p = LAWS[case.law].law(logits)
        if problem.noise is not None:
            return batched.gumbel(batch, p, problem.noise)
        return batched.BY_COINS[case.rule](batch, p, problem.q, problem.coins)

    return call


def check(problems: Sequence[Inputs], calls: Sequence[Callable[[], Any]]) -> None:
    """Raises WrongKernelError unless every set's tokens are the twin's, one sequence in 64 aside,
    and what was read was sound."""
    differ = 0
    for problem, call in zip(problems, calls, strict=True):
        found, wanted = call(), unfused(problem)()
        off = found.accepted != wanted.accepted
        for ours, theirs in ((found.tokens, wanted.tokens), (found.path, wanted.path)):
            off |= (ours != theirs).any(1)
        differ += int((off | ~found.valid).sum())
    case = problems[0].case
    most = len(problems) * case.batch // _ALIKE
    if differ > most:
        raise WrongKernelError(
            f"verification by {case.rule!r} ({case.law}) is wrong at batch {case.batch}, "
            f"{case.rows} rows: {differ} of {len(problems) * case.batch} sequences differ from "
            f"the twin's (allowed: {most})"
        )


def launched(call: Callable[[], Any]) -> int:
    """Kernels that a call launches, as the profiler sees them."""
    call()
    torch.cuda.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as seen:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in seen.events() if event.device_type.name == "CUDA"]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


def verification(
    case: Case, timer: Timer, device: torch.device, dtype: torch.dtype, *, cache_bytes: int,
    bandwidth: float, count: Callable[[Callable[[], Any]], int] = launched,
) -> dict[str, Any]:  # fmt: skip
    """One case: ours compared with the twin, then both timed. bandwidth: bytes per second."""
    sets = sets_for(case, cache_bytes)
    problems = [inputs(case, seed=i, device=device, dtype=dtype) for i in range(sets)]
    calls = [fused(problem) for problem in problems]
    check(problems, calls)
    ours = {**spread(timer(calls)), "launches": count(calls[0])}
    beside = [unfused(problem) for problem in problems]
    theirs = {**spread(timer(beside)), "launches": count(beside[0])}
    theirs["of_ours"] = round(theirs["median_us"] / ours["median_us"], 3)
    must = case.must_read(problems[0].batch.layout.laws, cache_bytes)
    floor = must / bandwidth * 1e6
    return {
        **asdict(case), "sets": sets, "must_bytes": must, "floor_us": round(floor, 3),
        "over_floor": round(ours["median_us"] / floor, 3),
        "contenders": {"specdec": ours, "unfused, float32 probabilities": theirs},
    }  # fmt: skip
