"""What speculation did: one record per sequence and step, and their sums."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of one sequence."""

    request_id: str
    index: int  # which of the request's n samples
    tokens: tuple[int, ...]  # emitted, already cut at the first stop
    drafted: int  # tokens proposed
    accepted: int  # of those, kept by the target; the cut may have dropped some from tokens
    finish_reason: str | None = None  # "stop", "length", "abort"; None while running
    # of the root and every accepted node with children, in order: how many draws it had, and which
    # of them was accepted, from 1; 0: none
    ranks: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class RunStats:
    """Sums over steps. Rates are nan where nothing was counted."""

    tokens: int = 0  # emitted
    steps: int = 0  # target passes that a sequence took part in
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    total_seconds: float = 0.0
    lossless: bool = True
    accepted_lengths: Counter[int] = field(default_factory=Counter)  # accepted per step -> steps
    drafted_lengths: Counter[int] = field(default_factory=Counter)
    # (depth of the children, how many draws, which was accepted or 0) -> times
    ranks: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    slow_processors: tuple[str, ...] = ()  # logits processors called path by path

    def add(self, record: StepRecord) -> None:
        self.steps += 1
        self.tokens += len(record.tokens)
        self.drafted += record.drafted
        self.accepted += record.accepted
        self.accepted_lengths[record.accepted] += 1
        self.drafted_lengths[record.drafted] += 1
        for depth, (offered, taken) in enumerate(record.ranks, 1):
            self.ranks[depth, offered, taken] += 1

    @property
    def acceptance_rate(self) -> float:
        """Accepted drafted tokens over drafted tokens."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def tokens_per_target_pass(self) -> float:
        return self.tokens / self.steps if self.steps else float("nan")

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total_seconds if self.total_seconds else float("nan")

    @property
    def other_seconds(self) -> float:
        """Time outside drafting and verifying: scheduling, stopping, streaming."""
        return max(0.0, self.total_seconds - self.draft_seconds - self.verify_seconds)

    def acceptance_by_position(self) -> list[float]:
        """Share of drafted tokens accepted at depth 1, 2, ... of a chain."""
        rates = []
        for depth in range(1, max(self.drafted_lengths, default=0) + 1):
            offered = sum(n for length, n in self.drafted_lengths.items() if length >= depth)
            kept = sum(n for length, n in self.accepted_lengths.items() if length >= depth)
            rates.append(kept / offered)
        return rates

    def acceptance_by_rank(self, depth: int | None = None) -> list[float]:
        """How often the k-th draw below a node was the accepted one, k = 1, 2, ..., of all nodes
        that were reached and had so many: what optimal_shape takes. depth: of the draws, 1 below
        the root; None: anywhere."""
        counted = {key: n for key, n in self.ranks.items() if depth in (None, key[0])}
        rates = []
        for rank in range(1, max((offered for _, offered, _ in counted), default=0) + 1):
            reached = sum(n for (_, offered, _), n in counted.items() if offered >= rank)
            accepted = sum(n for (_, _, taken), n in counted.items() if taken == rank)
            rates.append(accepted / reached)
        return rates

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; nan becomes None."""

        def plain(value: float) -> float | None:
            return None if value != value else round(value, 6)

        return {
            "tokens": self.tokens,
            "steps": self.steps,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_rate": plain(self.acceptance_rate),
            "tokens_per_target_pass": plain(self.tokens_per_target_pass),
            "tokens_per_second": plain(self.tokens_per_second),
            "acceptance_by_position": [plain(r) for r in self.acceptance_by_position()],
            "acceptance_by_rank": [plain(r) for r in self.acceptance_by_rank()],
            "seconds": {
                "total": plain(self.total_seconds),
                "draft": plain(self.draft_seconds),
                "verify": plain(self.verify_seconds),
                "other": plain(self.other_seconds),
            },
            "lossless": self.lossless,
            "slow_processors": list(self.slow_processors),
        }
