"""What drafts best on this machine: predicted from measured costs and acceptance, then measured.

Acceptance is measured on half of the prompts, with long drafts; it and the measured costs predict
every shorter draft. The most promising of each kind are then timed on the other half, beside plain
decoding and the adaptive policy, all in turn.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specdec.engine import Engine
from specdec.errors import InvalidArgumentError
from specdec.evals.provenance import provenance
from specdec.optimal import fastest_shape
from specdec.proposers import SuffixProposer
from specdec.sampling import SamplingParams
from specdec.stats import RunStats

MODEL_LENGTH, LOOKUP_LENGTH = 12, 32
TREE_NODES, TREE_DEPTH = 48, 8
# Ranks of children are measured on this one: many at the root, some below.
PROBE = (6, 3, 2, 1)
TIMED = 3  # of each kind

Progress = Callable[[Sequence[Any], str], Iterator[Any]]


@dataclass(frozen=True, slots=True)
class Setting:
    """Arguments of specdec.wrap beside target and draft."""

    name: str
    arguments: dict[str, Any]
    uses_draft: bool = False


@dataclass(slots=True)
class Finding:
    """Speeds are ratios to plain decoding; None: not predicted, or not timed."""

    setting: Setting
    tokens_per_pass: float | None = None  # predicted
    predicted: float | None = None
    measured: float | None = None
    measured_tokens_per_pass: float | None = None


@dataclass(slots=True)
class Tuning:
    """Findings, the quickest first; what was timed comes before what was only predicted."""

    findings: list[Finding]
    costs: dict[str, Any]  # seconds of steps, by kind of proposer
    acceptance: dict[str, Any]

    @property
    def best(self) -> Finding:
        return self.findings[0]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "best": asdict(self.best.setting),
            "findings": [asdict(finding) for finding in self.findings],
            "costs": self.costs,
            "acceptance": self.acceptance,
        }


class Tuner:
    """Measures settings of one pair on prompts, sampled one way."""

    def __init__(
        self, target: Any, draft: Any, prompts: Sequence[list[int]], sampling: SamplingParams, *,
        rounds: int = 3, progress: Progress = lambda items, _: iter(items),
        tokenizers: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """draft: a model or None. tokenizers: the proposer options of a draft whose tokenizer is
        not the target's; it drafts chains only. Raises InvalidArgumentError for fewer than two
        prompts."""
        if len(prompts) < 2:
            raise InvalidArgumentError(
                f"{len(prompts)} prompts: expected at least 2, half to learn from and half to time"
            )
        self.target, self.draft, self.sampling = target, draft, sampling
        half = len(prompts) // 2
        self.learnt_from, self.timed_on = prompts[:half], prompts[half:]
        self.rounds, self.progress = rounds, progress
        self.tokenizers = tokenizers or {}
        self.costs: dict[str, Any] = {}
        self.acceptance: dict[str, Any] = {}

    def run(self) -> Tuning:
        """Everything, in turn."""
        predicted = [self._chains(name) for name in ("ngram", "suffix")]
        if self.draft is not None:
            predicted.append(self._chains("draft"))
            if not self.tokenizers:
                predicted.append(self._trees())
        chosen = [Finding(Setting("plain", {}), 1.0, 1.0)]
        chosen += [self._adaptive(name) for name in ("ngram", "suffix")]
        if self.draft is not None:
            chosen.append(self._adaptive("draft"))
        rest: list[Finding] = []
        for kind in predicted:
            kind.sort(key=lambda finding: -(finding.predicted or 0))
            chosen += kind[:TIMED]
            rest += kind[TIMED:]
        self._time(chosen)
        chosen.sort(key=lambda finding: -(finding.measured or 0))
        rest.sort(key=lambda finding: -(finding.predicted or 0))
        return Tuning([*chosen, *rest], self.costs, self.acceptance)

    def _engine(self, setting: Setting) -> Engine:
        if not setting.uses_draft:
            arguments = dict(setting.arguments)
            if arguments.get("proposer") == SuffixProposer.name:
                # rounds repeat prompts: remembering their answers would be no draft
                arguments["proposer_options"] = {"cache_tokens": 0}
            return Engine(self.target, grow=True, **arguments)
        arguments = {"draft": self.draft, **setting.arguments}
        if self.tokenizers:
            arguments["proposer_options"] = self.tokenizers
        return Engine(self.target, grow=True, **arguments)

    def _adaptive(self, name: str) -> Finding:
        return Finding(Setting(f"{name}, auto", {"proposer": name}, name == "draft"))

    def _chains(self, name: str) -> list[Finding]:
        """Every length of one proposer's chains, from its longest."""
        is_model = name == "draft"
        longest = MODEL_LENGTH if is_model else LOOKUP_LENGTH
        long = {"proposer": name, "num_draft_tokens": longest}
        engine = self._engine(Setting(name, long, is_model))
        stats = self._generate(engine, f"acceptance of {name}")
        costs = engine.step_costs(self.sampling, max_depth=longest)
        self.acceptance[name] = stats.as_dict()
        if costs is None:
            return []
        self.costs[name] = asdict(costs)
        context = self._context()
        plain = costs.verify_seconds(1, context)
        found = []
        for length in range(1, longest + 1):
            tokens = 1 + _mean(stats.accepted_lengths, length)
            rows = 1 + _mean(stats.drafted_lengths, length)
            drafting = costs.draft_seconds(length, context) if is_model else 0.0
            seconds = drafting + costs.verify_seconds(rows, context)
            setting = Setting(
                f"{name} {length}", {"proposer": name, "num_draft_tokens": length}, is_model
            )
            found.append(Finding(setting, tokens, tokens * plain / seconds))
        return found

    def _trees(self) -> list[Finding]:
        """The fastest tree for the acceptance of children by rank (Sequoia, 2402.12374)."""
        engine = self._engine(Setting("probe", {"tree": PROBE}, uses_draft=True))
        stats = self._generate(engine, "acceptance of trees")
        ranks = stats.acceptance_by_rank()
        self.acceptance["tree"] = stats.as_dict()
        chain = self._engine(Setting("draft", {"proposer": "draft"}, uses_draft=True))
        costs = chain.step_costs(self.sampling, max_depth=MODEL_LENGTH)
        if costs is None or not any(ranks):
            return []
        context = self._context()
        level = costs.draft_seconds(1, context)
        choice = fastest_shape(
            ranks,
            lambda rows: level + (rows - 1) * costs.catch_up,
            lambda rows: costs.verify_seconds(rows, context),
            nodes=TREE_NODES,
            depth=TREE_DEPTH,
        )
        if not choice.shape:
            return []
        options = {"shape": list(choice.shape)}
        setting = Setting(
            f"tree of {len(choice.shape)} nodes",
            {"proposer": "tree", "proposer_options": options},
            uses_draft=True,
        )
        gain = choice.tokens_per_second * costs.verify_seconds(1, context)
        return [Finding(setting, choice.tokens, gain)]

    def _context(self) -> float:
        """Mean length of a text while it is generated."""
        lengths = [len(prompt) for prompt in self.learnt_from]
        return sum(lengths) / len(lengths) + self.sampling.max_new_tokens / 2

    def _generate(self, engine: Engine, label: str) -> RunStats:
        for index, prompt in enumerate(self.progress(self.learnt_from, label)):
            engine.add_request(prompt, self.sampling, seed=index)
            list(engine)
        return engine.stats

    def _time(self, findings: Sequence[Finding]) -> None:
        """Fills in what was measured: each prompt's least time of several rounds, summed."""
        engines = [self._engine(finding.setting) for finding in findings]
        total = [0.0] * len(engines)
        for index, prompt in enumerate(self.progress(self.timed_on, "timing")):
            least = [float("inf")] * len(engines)
            for round_ in range(self.rounds + (index == 0)):
                for i, engine in enumerate(engines):
                    engine.add_request(prompt, self.sampling, seed=1000 + index)
                    began = time.perf_counter()
                    list(engine)
                    seconds = time.perf_counter() - began
                    if index or round_:  # the very first round warms up
                        least[i] = min(least[i], seconds)
            total = [a + b for a, b in zip(total, least, strict=True)]
        tokens = [engine.stats.tokens for engine in engines]
        for finding, engine, seconds, its in zip(findings, engines, total, tokens, strict=True):
            # sampled texts may end at different lengths
            finding.measured = (its / seconds) / (tokens[0] / total[0])
            finding.measured_tokens_per_pass = engine.stats.tokens_per_target_pass


def _mean(lengths: Any, limit: int) -> float:
    """Mean of a counter's keys, each cut to the limit."""
    total = sum(lengths.values())
    return sum(min(length, limit) * n for length, n in lengths.items()) / total if total else 0.0


def save(tuning: Tuning, path: Path, settings: dict[str, Any]) -> None:
    """Writes everything as JSON; `best` holds the arguments for specdec.wrap. settings: what was
    tuned, on what."""
    content = {**tuning.as_dict(), "settings": settings, "sessions": [provenance()]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def plot(tuning: Tuning, path: Path) -> None:
    """Predicted against measured gain. Raises InvalidArgumentError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidArgumentError(
            "--plot needs matplotlib: pip install 'specdec[report]'"
        ) from error
    both = [
        (f.setting.name, f.predicted, f.measured)
        for f in tuning.findings
        if f.predicted is not None and f.measured is not None
    ]
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    highest = max(max(predicted, measured) for _, predicted, measured in both) * 1.1
    axes.plot([0, highest], [0, highest], color="grey", linewidth=0.8)
    for name, predicted, measured in both:
        axes.plot(predicted, measured, "o", color="tab:blue")
        axes.annotate(
            name, (predicted, measured), fontsize=8, xytext=(4, 4), textcoords="offset points"
        )
    axes.set(
        xlabel="predicted speed against plain decoding",
        ylabel="measured speed against plain decoding",
        xlim=(0, highest), ylim=(0, highest),
    )  # fmt: skip
    figure.savefig(path)
