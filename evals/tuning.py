"""What drafts best on this machine: predicted from measured costs and acceptance, then measured.

Costs are measured by batch, rows and context. Acceptance is measured on half of the prompts: long
chains tell of every shorter one, wide trees of the best tree (evals/tree_rates.py), and everything
else is tried as it is. The settings that promise most are then timed on the other half, one text at
a time, beside plain decoding, all in turn. For other batches and contexts there are predictions
only.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specdec.costs import StepCosts
from specdec.engine import Engine
from specdec.errors import InvalidArgumentError
from specdec.evals.candidates import (
    Candidate,
    Place,
    Setting,
    by_lengths,
    depth_of,
    level_seconds,
    of_tree,
    shortened,
)
from specdec.evals.progress import Progress, by_share, silent
from specdec.evals.provenance import provenance
from specdec.evals.tree_rates import LEVELS, PROBE, by_depth_and_rank, refined
from specdec.optimal import Acceptance, TreeChoice, fastest_shape
from specdec.profiling import CONTEXT, now
from specdec.sampling import SamplingParams
from specdec.stats import RunStats

MODEL_LENGTH, LOOKUP_LENGTH = 12, 32
TREE_NODES = 48
TIMED, TIMED_OF_A_KIND = 9, 2  # beside plain decoding and the default
PICTURES = (".png", ".svg", ".pdf")
# Rounds repeat prompts: remembering their answers would be no draft.
_FORGETFUL = {"suffix": {"proposer_options": {"cache_tokens": 0}}}


@dataclass(slots=True)
class Finding:
    """Speeds are ratios to plain decoding, one text at a time; None: not predicted, or not timed.
    The reading of the prompt, with the first step, is left out of them."""

    setting: Setting
    tokens_per_pass: float | None = None  # predicted
    predicted: float | None = None
    measured: float | None = None
    measured_tokens_per_pass: float | None = None


@dataclass(frozen=True, slots=True)
class Advice:
    """What promises most at a place, predicted."""

    place: Place
    setting: Setting
    predicted: float


@dataclass(slots=True)
class Tuning:
    """Findings, the quickest first; what was timed comes before what was only predicted."""

    findings: list[Finding]
    costs: dict[str, list[StepCosts]]  # by kind of proposer, of every place
    acceptance: dict[str, Any]
    advice: list[Advice] = field(default_factory=list)

    @property
    def best(self) -> Finding:
        return self.findings[0]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "best": asdict(self.best.setting),
            "findings": [asdict(finding) for finding in self.findings],
            "costs": {name: [asdict(its) for its in every] for name, every in self.costs.items()},
            "acceptance": self.acceptance,
            "predicted_best": [
                {**each.place._asdict(), "setting": asdict(each.setting),
                 "predicted": each.predicted}
                for each in self.advice
            ],
        }  # fmt: skip


class Tuner:
    """Measures settings of one pair on prompts, sampled one way."""

    def __init__(
        self, target: Any, draft: Any, prompts: Sequence[list[int]], sampling: SamplingParams, *,
        rounds: int = 3, progress: Progress = silent,
        tokenizers: dict[str, Any] | None = None, batches: Sequence[int] = (1,),
        contexts: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """draft: a model or None. tokenizers: the proposer options of a draft whose tokenizer is
        not the target's; it drafts chains only. batches, contexts: where else costs are measured;
        by default at the usual length of these texts. Raises InvalidArgumentError for fewer than
        two prompts, a batch that is no power of two and a context out of range."""
        if len(prompts) < 2:
            raise InvalidArgumentError(
                f"{len(prompts)} prompts: expected at least 2, half to learn from and half to time"
            )
        self.target, self.draft, self.sampling = target, draft, sampling
        half = len(prompts) // 2
        self.learnt_from, self.timed_on = prompts[:half], prompts[half:]
        self.rounds, self.progress = rounds, progress
        self.tokenizers = tokenizers or {}
        most = min(longest_context(model) for model in (target, draft) if model is not None)
        self.home = Place(1, min(max(CONTEXT, self._usual_length()), most))
        _check_places(batches, contexts, most)
        places = [Place(b, c) for b in batches for c in contexts or [self.home.context]]
        self.places = list(dict.fromkeys([self.home, *sorted(places)]))
        self.costs: dict[str, dict[Place, StepCosts]] = {}
        self.acceptance: dict[str, Any] = {}

    def run(self) -> Tuning:
        """Everything, in turn."""
        candidates = [*self._lookups(), *(self._model() if self.draft is not None else [])]
        candidates.sort(key=lambda each: -each.gains.get(self.home, 0.0))
        default = "draft, auto" if self.draft is not None else "ngram, auto"
        counts: dict[str, int] = {}
        timed = [Finding(Setting("plain", {}), 1.0, 1.0)]
        rest: list[Finding] = []
        for each in candidates:
            finding = Finding(each.setting, each.tokens, each.gains.get(self.home))
            counts[each.kind] = counts.get(each.kind, 0) + 1
            few = counts[each.kind] <= TIMED_OF_A_KIND and len(timed) <= TIMED
            (timed if few or each.setting.name == default else rest).append(finding)
        self._time(timed)
        timed.sort(key=lambda finding: -(finding.measured or 0))
        costs = {name: list(its.values()) for name, its in self.costs.items()}
        return Tuning([*timed, *rest], costs, self.acceptance, self._advice(candidates))

    def _advice(self, candidates: Sequence[Candidate]) -> list[Advice]:
        """Beyond the timed place of settings alone that do there what they were seen to do."""
        found: list[Advice] = []
        for place in self.places:
            known = [
                each for each in candidates
                if place in each.gains and (each.everywhere or place == self.home)
            ]  # fmt: skip
            best = max(known, key=lambda each: each.gains[place], default=None)
            if best is not None and best.gains[place] > 1:
                found.append(Advice(place, best.setting, best.gains[place]))
            elif best is not None:
                found.append(Advice(place, Setting("plain", {}), 1.0))
        return found

    # --- what there is to choose from

    def _lookups(self) -> list[Candidate]:
        found: list[Candidate] = []
        for name in ("ngram", "suffix"):
            found += self._chains(name, LOOKUP_LENGTH, "lookups")
            found.append(self._tried(f"{name}, auto", name, {"proposer": name}, "lookups"))
        for window in (3, 7):
            options = {"window": window, "ngram": min(window, 5), "guesses": window}
            arguments = {"proposer": "lookahead", "policy": "constant", "proposer_options": options}
            name = f"lookahead of window {window}"
            found.append(self._tried(name, "lookahead", arguments, "lookups"))
        return found

    def _model(self) -> list[Candidate]:
        found = self._chains("draft", MODEL_LENGTH, "draft")
        proposer = self._engine(self._setting("draft", {"proposer": "draft"})).proposer
        stops = ["confidence"] if proposer is not None and proposer.can_stop else []
        for policy in ("auto", "heuristic", *stops):
            named = {} if policy == "auto" else {"policy": policy}
            arguments: dict[str, Any] = {"proposer": "draft", **named}
            found.append(self._tried(f"draft, {policy}", "draft, adaptive", arguments, "draft"))
        if self.tokenizers:
            return found
        found += self._trees()
        for nodes, depth, top_k in ((6, 3, 3), (16, 6, 4)):
            name, options = "dynamic_tree", {"nodes": nodes, "depth": depth, "top_k": top_k}
            arguments = {"proposer": name, "policy": "constant", "proposer_options": options}
            found.append(
                self._tried(f"dynamic tree of {nodes} nodes", name, arguments, f"{name} {nodes}")
            )
        if self.sampling.temperature > 0:
            options = {"width": 2, "depth": 3}
            arguments = {
                "proposer": "beam_tree", "policy": "constant", "proposer_options": options,
            }  # fmt: skip
            found.append(self._tried("beam tree of width 2", "beam_tree", arguments, "beam_tree"))
        for number in (4, 8, None):
            arguments = {"proposer": ["draft", "ngram"]}
            if number is not None:
                arguments["num_draft_tokens"] = number
            name = f"draft and ngram{', auto' if number is None else f' {number}'}"
            found.append(self._tried(name, "ensemble", arguments, "draft and ngram"))
        return found

    def _chains(self, name: str, longest: int, costs: str) -> list[Candidate]:
        """Every length of one proposer's chains, from its longest."""
        setting = self._setting(name, {"proposer": name, "num_draft_tokens": longest})
        engine = self._engine(setting)
        stats = self._continue(engine, f"acceptance of {name}")
        self.acceptance[name] = stats.as_dict()
        known = self._costs(costs, engine, longest)
        found = []
        for length in range(1, longest + 1):
            tokens, drafted = shortened(stats, length)
            seconds = by_lengths(drafted, lambda nodes: nodes, drafts=setting.uses_draft)
            arguments = {**setting.arguments, "num_draft_tokens": length}
            its = self._setting(f"{name} {length}", arguments)
            found.append(Candidate(its, name, tokens, seconds, known))
        return found

    def _tried(self, name: str, kind: str, arguments: dict[str, Any], costs: str) -> Candidate:
        """A setting that is what it is, from a run of it. costs: whose they are; where those are
        not measured yet, its own."""
        setting = self._setting(name, arguments)
        engine = self._engine(setting)
        assert engine.proposer is not None
        stats = self._continue(engine, f"acceptance of {name}")
        self.acceptance[name] = stats.as_dict()
        longest = LOOKUP_LENGTH if not setting.uses_draft else MODEL_LENGTH
        known = self._costs(costs, engine, longest)
        depth = depth_of(engine.proposer, longest)
        number = arguments.get("num_draft_tokens")
        if number is not None:  # all its members draft, whatever is left of it where they agree
            whole = depth(number)
            seconds = by_lengths(stats.drafted_lengths, lambda _: whole, drafts=True)
        else:
            seconds = by_lengths(stats.drafted_lengths, depth, drafts=setting.uses_draft)
        tokens = 1 + stats.accepted / max(1, stats.steps)
        fixed = not name.endswith(", auto")
        return Candidate(setting, kind, tokens, seconds, known, everywhere=fixed)

    def _trees(self) -> list[Candidate]:
        """The fastest tree of every place (Sequoia, 2402.12374)."""
        known = self.costs["draft"]
        rough = by_depth_and_rank(self._tree_stats(PROBE, "of a wide tree"))
        if not known or not any(rough[0]):
            return []
        first = self._fastest(rough, self.home).shape or (-1,)
        stats = self._tree_stats(first, "of trees")
        self.acceptance["tree"] = stats.as_dict()
        rates = refined(rough, stats)
        self.acceptance["tree"]["by_depth_and_rank"] = rates
        choices = [self._fastest(rates, place) for place in known]
        shapes = {choice.shape: choice.tokens for choice in choices if choice.shape}
        return [
            Candidate(self._tree_setting(shape), "tree", tokens, of_tree(shape), known)
            for shape, tokens in shapes.items()
        ]

    def _fastest(self, acceptance: Acceptance, place: Place) -> TreeChoice:
        costs = self.costs["draft"][place]
        return fastest_shape(
            acceptance,
            lambda rows: level_seconds(costs, place.context, rows),
            lambda rows: costs.verify_seconds(rows, place.context),
            nodes=TREE_NODES,
            depth=LEVELS,
        )

    def _tree_setting(self, shape: tuple[int, ...]) -> Setting:
        plural = "s" if len(shape) > 1 else ""
        return self._setting(
            f"tree of {len(shape)} node{plural}",
            {"proposer": "tree", "policy": "constant", "proposer_options": {"shape": list(shape)}},
        )

    def _tree_stats(self, shape: tuple[int, ...], label: str) -> RunStats:
        return self._continue(self._engine(self._tree_setting(shape)), f"acceptance {label}")

    # --- running

    def _setting(self, name: str, arguments: dict[str, Any]) -> Setting:
        proposer = arguments["proposer"]
        arguments = {**arguments, **_FORGETFUL.get(str(proposer), {})}
        is_model = proposer not in ("ngram", "suffix", "lookahead")
        return Setting(name, arguments, is_model)

    def _engine(self, setting: Setting) -> Engine:
        return Engine(
            self.target, grow=True,
            **wrap_arguments(setting, self.draft, self.tokenizers),
        )  # fmt: skip

    def _costs(self, name: str, engine: Engine, longest: int) -> dict[Place, StepCosts]:
        """Of every place where there is room to measure them."""
        if name not in self.costs:
            self.costs[name] = known = {}
            with by_share(self.progress, f"costs of {name}") as report:
                for done, place in enumerate(self.places):

                    def part(share: float, done: int = done) -> None:
                        report((done + share) / len(self.places))

                    costs = engine.step_costs(
                        self.sampling, batch=place.batch, max_depth=longest, context=place.context,
                        report=part,
                    )  # fmt: skip
                    if costs is not None:
                        known[place] = costs
        return self.costs[name]

    def _usual_length(self) -> int:
        """Of a text while it is generated."""
        lengths = [len(prompt) for prompt in self.learnt_from]
        return round(sum(lengths) / len(lengths) + self.sampling.max_new_tokens / 2)

    def _continue(self, engine: Engine, label: str) -> RunStats:
        for index, prompt in enumerate(self.progress(self.learnt_from, label)):
            engine.add_request(prompt, self.sampling, seed=index)
            list(engine)
        return engine.stats

    def _time(self, findings: Sequence[Finding]) -> None:
        """Fills in what was measured: each prompt's least time of several rounds, summed."""
        engines = [self._engine(finding.setting) for finding in findings]
        device = engines[0].target.device
        total, tokens = [0.0] * len(engines), [0] * len(engines)
        for index, prompt in enumerate(self.progress(self.timed_on, "timing")):
            least = [float("inf")] * len(engines)
            for round_ in range(self.rounds + (index == 0)):
                for i, engine in enumerate(engines):
                    engine.add_request(prompt, self.sampling, seed=1000 + index)
                    engine.step()  # reads the prompt
                    before, began = engine.stats.tokens, now(device)
                    list(engine)
                    seconds = now(device) - began
                    if index or round_:  # the very first round warms up
                        least[i] = min(least[i], seconds)
                        # sampled texts may end at different lengths
                        tokens[i] += engine.stats.tokens - before
            total = [a + b for a, b in zip(total, least, strict=True)]
        if not tokens[0]:
            raise InvalidArgumentError("every text ends with its first token: nothing to time")
        plain = tokens[0] / total[0]
        for finding, engine, seconds, its in zip(findings, engines, total, tokens, strict=True):
            # nothing to time either where a single draft was all of every text
            finding.measured = its / seconds / plain if its else None
            finding.measured_tokens_per_pass = engine.stats.tokens_per_target_pass


def wrap_arguments(setting: Setting, draft: Any, tokenizers: dict[str, Any]) -> dict[str, Any]:
    """All arguments of specdec.wrap behind the target."""
    if not setting.uses_draft:
        return dict(setting.arguments)
    found = {"draft": draft, **setting.arguments}
    if tokenizers:
        found["proposer_options"] = {**tokenizers, **found.get("proposer_options", {})}
    return found


def longest_context(model: Any) -> int:
    """That its costs can be measured at: a long draft has to fit behind it."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
    return int(most) - 2 * LOOKUP_LENGTH


def _check_places(batches: Sequence[int], contexts: Sequence[int], most: int) -> None:
    """The names are those of the command's options."""
    if most < CONTEXT:
        raise InvalidArgumentError(
            f"the models' context holds {most + 2 * LOOKUP_LENGTH} tokens: expected "
            f"{CONTEXT + 2 * LOOKUP_LENGTH} or more, which measuring costs takes"
        )
    for batch in batches:
        if batch < 1 or batch & (batch - 1):
            raise InvalidArgumentError(
                f"--batch {batch}: expected a power of two, as costs are measured for those"
            )
    for context in contexts:
        if not CONTEXT <= context <= most:
            raise InvalidArgumentError(f"--context {context}: expected {CONTEXT} to {most} tokens")


def save(tuning: Tuning, path: Path, settings: dict[str, Any], recipes: dict[str, str]) -> None:
    """Writes everything as JSON; `best` holds the arguments for specdec.wrap. settings: what was
    tuned, on what. recipes: lines to run the best with."""
    content = {
        **tuning.as_dict(), "recipes": recipes, "settings": settings, "sessions": [provenance()],
    }  # fmt: skip
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_plot(path: Path) -> None:
    """Raises InvalidArgumentError for a kind of picture that plot() does not make, and without
    matplotlib."""
    if path.suffix not in PICTURES:
        raise InvalidArgumentError(
            f"--plot {str(path)!r}: expected a name that ends in {', '.join(PICTURES)}"
        )
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InvalidArgumentError(
            "--plot needs matplotlib: pip install 'specdec[report]'"
        ) from error


def plot(tuning: Tuning, path: Path) -> None:
    """Predicted against measured gain. Raises InvalidArgumentError as check_plot."""
    check_plot(path)
    from matplotlib.figure import Figure

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
