"""How much of what is drafted is accepted, and what follows from it: what `specdec eval` reports.

Every setting (what drafts, shape, rule, temperature) continues every prompt. Counts are kept per
prompt, which is the cluster of every standard error (evals/estimates.py). Beside counts of accepted
tokens stands the overlap sum_x min(p(x), q(x)) of target and draft at every place that was reached:
what token-wise verification accepts on average, without the noise of its coins (Leviathan et al.
2023, 2211.17192, section 3.2).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from specdec.costs import StepCosts
from specdec.engine import Engine
from specdec.errors import InvalidArgumentError
from specdec.evals.draft_laws import drafting_models
from specdec.evals.estimates import Estimate, ratio
from specdec.evals.folder import RunFolder, Shape
from specdec.evals.progress import Progress, by_share, silent
from specdec.evals.recorder import BINS, Recorder, Tally, added
from specdec.optimal import fastest_shape
from specdec.profiling import now
from specdec.rng import derive_seed
from specdec.sampling import SamplingParams

TREE_NODES, TREE_DEPTH = 48, 8
_TOGETHER = 8  # prompts

# Of the records of its folder: counts of a prompt, and its seconds per token.
RECORD_SHAPES: tuple[Shape, ...] = (
    {"kind": str, "setting": str, "set": str, "prompt": str, "tally": dict},
    {"kind": str, "setting": str, "set": str, "prompt": str, "plain": float, "speculative": float},
)

# What the draft's entropy and calibration are of.
DRAWN = "the laws that drafted tokens were drawn from"
UNDRAWN = (
    "the draft's own laws, whose best tokens were drafted (of a greedy draft: its softmax at "
    "temperature 1)"
)


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt of one set, or a later turn of it."""

    set: str
    id: str
    tokens: list[int]
    dialogue: str = ""  # which the turns of one share; they are one cluster of standard errors


@dataclass(frozen=True, slots=True)
class Setting:
    """One row: arguments of Engine beside the target, and how is sampled."""

    name: str
    arguments: dict[str, Any]
    sampling: SamplingParams


# --- what is reported of tallies


def summary(tallies: Sequence[Tally]) -> dict[str, Any]:
    """Estimates of everything that is counted; None where nothing was."""

    def rate(
        over: Callable[[Tally], float], under: Callable[[Tally], float],
        bounds: tuple[float, float] | None = (0, 1),
    ) -> Estimate | None:  # fmt: skip
        return ratio([over(t) for t in tallies], [under(t) for t in tallies], bounds)

    depth = max((len(t.offered) for t in tallies), default=0)
    ranks = max((len(t.reached) for t in tallies), default=0)
    # What these drafts could reach: all of one path, whose length the end of a text cuts.
    drafted, steps = sum(t.drafted for t in tallies), sum(t.steps for t in tallies)
    path = sum(sum(t.offered) for t in tallies)
    rates = {
        "acceptance_rate": rate(
            lambda t: t.accepted, lambda t: t.drafted, (0, path / drafted) if drafted else None
        ),
        "tokens_per_target_pass": rate(
            lambda t: t.tokens, lambda t: t.steps, (1, 1 + path / steps) if path else None
        ),
        "overlap": rate(lambda t: t.overlap, lambda t: t.overlaps),
        "draft_entropy": rate(lambda t: t.entropy, lambda t: t.laws, None),
    }
    by_position = [
        rate(lambda t, i=i: _at(t.kept, i), lambda t, i=i: _at(t.offered, i))  # type: ignore[misc]
        for i in range(depth)
    ]
    by_rank = [
        rate(lambda t, i=i: _at(t.taken, i), lambda t, i=i: _at(t.reached, i))  # type: ignore[misc]
        for i in range(ranks)
    ]
    return {
        **{name: _plain(found) for name, found in rates.items()},
        "acceptance_by_position": [_plain(found) for found in by_position],
        "acceptance_by_rank": [_plain(found) for found in by_rank],
        "calibration": _calibration(tallies),
        "draft_law": _draft_law(tallies),
        "tokens": sum(t.tokens for t in tallies),
        "steps": sum(t.steps for t in tallies),
        "drafted": sum(t.drafted for t in tallies),
        "accepted": sum(t.accepted for t in tallies),
        "prompts": len(tallies),
    }


def _at(counts: Sequence[int], index: int) -> int:
    return counts[index] if index < len(counts) else 0


def _plain(found: Estimate | None) -> dict[str, Any] | None:
    return None if found is None else found.as_dict()


def _calibration(tallies: Sequence[Tally]) -> dict[str, Any] | None:
    """By the draft's confidence in its best token: what the target gives that token; of a greedy
    target, how often that is its own. error: their mean distance over all bins (expected
    calibration error, Guo et al. 2017, 1706.04599)."""
    rows, distance, total = [], 0.0, sum(sum(t.binned) for t in tallies)
    if not total:
        return None
    for place in range(BINS):
        count = sum(t.binned[place] for t in tallies)
        if not count:
            continue
        confidence = sum(t.confidence[place] for t in tallies) / count
        target = sum(t.right[place] for t in tallies) / count
        distance += count / total * abs(confidence - target)
        rows.append(
            {"confidence": round(confidence, 4), "target": round(target, 4), "places": count}
        )
    return {"error": round(distance, 4), "bins": rows}


def _draft_law(tallies: Sequence[Tally]) -> str | None:
    laws, undrawn = sum(t.laws for t in tallies), sum(t.undrawn for t in tallies)
    if not laws:
        return None
    if 0 < undrawn < laws:
        return f"at {undrawn} of {laws} places {UNDRAWN}; at the others {DRAWN}"
    return UNDRAWN if undrawn else DRAWN


def undefined(row: dict[str, Any], engine: Engine) -> dict[str, str]:
    """Why figures of a row are None, by their names."""
    proposer = engine.proposer
    if not row["drafted"]:
        rates = law = costs = "nothing was drafted"
    else:
        models = len(drafting_models(proposer))
        rates = "a draft that is drawn with the target's noise is judged by that, not by its law"
        law = (
            "several models draft" if models > 1
            else "its model's law is not of the target's tokens"
            if proposer is not None and proposer.needs_draft
            else "a lookup has no law"
        )  # fmt: skip
        costs = "its steps could not be measured: there is no room for them in the cache"
    reasons = {
        **dict.fromkeys(("acceptance_rate", "overlap"), rates),
        **dict.fromkeys(("draft_entropy", "calibration"), law),
        **dict.fromkeys(("cost_ratio", "predicted_speed"), costs),
        "measured_speed": "it was not timed",
    }
    return {name: why for name, why in reasons.items() if row[name] is None}


# --- what follows from measured costs


def forecast(tallies: Sequence[Tally], costs: StepCosts | None, *, drafts: bool) -> dict[str, Any]:
    """Predicted speed against plain decoding, and the length and tree that would be quickest.

    drafts: whether a model drafts; else drafting is taken to cost nothing. Nothing is predicted
    where costs are not known.
    """
    steps = sum(t.steps for t in tallies)
    if costs is None or not steps:
        return {"cost_ratio": None, "predicted_speed": None, "best_length": None, "best_tree": None}
    context = sum(t.context for t in tallies) / steps
    plain = costs.verify_seconds(1, context)

    def drafting(depth: int) -> float:
        return costs.draft_seconds(depth, context) if drafts else 0.0

    seconds = 0.0
    for size, count in sum((Counter(t.sizes) for t in tallies), Counter[str]()).items():
        depth, nodes = map(int, size.split())
        seconds += count * (drafting(depth) + costs.verify_seconds(nodes + 1, context))
    tokens = sum(t.tokens for t in tallies)
    found: dict[str, Any] = {
        "cost_ratio": round(drafting(1) / plain, 4),
        "predicted_speed": round(tokens / steps * plain / (seconds / steps), 4),
        "best_length": None, "best_tree": None, "context": round(context, 1),
    }  # fmt: skip
    counted = summary(tallies)
    if max(len(t.reached) for t in tallies) == 1:  # chains
        found["best_length"] = _best_length(counted, costs, context, plain, drafting)
    ranks = [row["value"] for row in counted["acceptance_by_rank"]]
    if drafts and any(ranks):
        choice = fastest_shape(
            ranks,
            lambda rows: drafting(1) + (rows - 1) * costs.catch_up,
            lambda rows: costs.verify_seconds(rows, context),
            nodes=TREE_NODES,
            depth=TREE_DEPTH,
        )
        found["best_tree"] = {
            "shape": list(choice.shape), "tokens_per_target_pass": round(choice.tokens, 4),
            "predicted_speed": round(choice.tokens_per_second * plain, 4),
        }  # fmt: skip
    return found


def _best_length(
    counted: dict[str, Any], costs: StepCosts, context: float, plain: float,
    drafting: Callable[[int], float],
) -> dict[str, Any]:  # fmt: skip
    """Of chains: among the lengths that were drafted, and none."""
    best, best_speed, tokens = 0, 1.0, 1.0
    for length, row in enumerate(counted["acceptance_by_position"], 1):
        tokens += row["value"]
        speed = tokens * plain / (drafting(length) + costs.verify_seconds(length + 1, context))
        if speed > best_speed:
            best, best_speed = length, speed
    longest = len(counted["acceptance_by_position"])
    return {
        "length": best, "predicted_speed": round(best_speed, 4), "longest_drafted": longest,
    }  # fmt: skip


# --- the run


class Evaluation:
    """Measures settings of one target on prompts."""

    def __init__(
        self, target: Any, settings: Sequence[Setting], tasks: Sequence[Task], *,
        folder: RunFolder | None = None, samples: int = 1, rounds: int = 3, timed: int = 4,
        seed: int = 0, progress: Progress = silent,
    ) -> None:  # fmt: skip
        """samples: continuations of each prompt; timed: prompts of each set whose speed is
        measured, in so many rounds, beside plain decoding. Raises InvalidArgumentError without
        settings or tasks."""
        if not settings or not tasks:
            raise InvalidArgumentError("nothing to evaluate: expected settings and prompts")
        self.target, self.settings, self.tasks = target, settings, tasks
        self.folder = folder or RunFolder(None, "eval", {})
        self.samples, self.rounds, self.timed, self.seed = samples, rounds, timed, seed
        self.progress = progress

    def run(self) -> dict[str, Any]:
        """Every setting in turn; a setting that the engine refuses is left out, with the reason."""
        rows, left_out = [], {}
        for setting in self.settings:
            try:
                engine = self._engine(setting)
                engine.verifier.check_law(setting.sampling.law())
                rows.append(self._row(setting, engine))
            except InvalidArgumentError as error:
                left_out[setting.name] = str(error)
        if not rows:
            name, why = next(iter(left_out.items()))
            raise InvalidArgumentError(f"{name}: {why}")
        found = {
            "settings": self.folder.settings, "sessions": self.folder.sessions, "rows": rows,
            "left_out": left_out,
        }  # fmt: skip
        self.folder.finish(found)
        return found

    def _engine(self, setting: Setting) -> Engine:
        return Engine(self.target, grow=True, **setting.arguments)

    def _row(self, setting: Setting, engine: Engine) -> dict[str, Any]:
        tallies = self._by_dialogue(self._tallies(setting, engine))
        drafts = engine.proposer is not None and bool(engine.proposer.draft_rows(1))
        depth = max((len(t.offered) for t in tallies.values()), default=0)
        costs = self._costs(setting, engine, depth) if depth else None
        sets = list(dict.fromkeys(task.set for task in self.tasks))
        row = {
            "name": setting.name,
            **summary(list(tallies.values())),
            "by_set": {
                name: summary([t for (its, _), t in tallies.items() if its == name])
                for name in sets
            },
            **forecast(list(tallies.values()), costs, drafts=drafts),
            "costs": None if costs is None else asdict(costs),
            "measured_speed": self._speed(setting) if self.timed else None,
        }
        return {**row, "undefined": undefined(row, engine)}

    def _costs(self, setting: Setting, engine: Engine, depth: int) -> StepCosts | None:
        with by_share(self.progress, f"{setting.name}: costs") as report:
            return engine.step_costs(setting.sampling, max_depth=depth, report=report)

    def _tallies(self, setting: Setting, engine: Engine) -> dict[tuple[str, str], Tally]:
        """By set and prompt; samples of a prompt are added up."""
        found: dict[tuple[str, str], Tally] = {}
        for record in self.folder.records:
            if record["kind"] == "tally" and record["setting"] == setting.name:
                found[record["set"], record["prompt"]] = Tally(**record["tally"])
        jobs = [
            (number, task)
            for number, task in enumerate(self.tasks)
            if (task.set, task.id) not in found
        ]
        bar = self.progress(jobs, setting.name)
        for _, (task, its) in zip(bar, self._counted(setting, engine, jobs), strict=True):
            found[task.set, task.id] = its
            self.folder.append(
                {
                    "kind": "tally", "setting": setting.name, "set": task.set, "prompt": task.id,
                    "tally": asdict(its),
                }
            )  # fmt: skip
        return {(task.set, task.id): found[task.set, task.id] for task in self.tasks}

    def _counted(
        self, setting: Setting, engine: Engine, jobs: Sequence[tuple[int, Task]]
    ) -> Iterator[tuple[Task, Tally]]:
        """Each when all its samples have ended."""
        recorder = Recorder(engine)
        for first in range(0, len(jobs), _TOGETHER):
            some = jobs[first : first + _TOGETHER]
            prompts = [task.tokens for _, task in some for _ in range(self.samples)]
            seeds = [
                derive_seed(self.seed, number, sample)
                for number, _ in some
                for sample in range(self.samples)
            ]
            parts: list[dict[int, Tally]] = [{} for _ in some]
            for index, tally in recorder.each(prompts, setting.sampling, seeds):
                place, sample = divmod(index, self.samples)
                its = parts[place]
                its[sample] = tally
                if len(its) == self.samples:
                    yield some[place][1], added([its[i] for i in range(self.samples)])

    def _by_dialogue(self, tallies: dict[tuple[str, str], Tally]) -> dict[tuple[str, str], Tally]:
        """Turns of a dialogue added up."""
        found: dict[tuple[str, str], list[Tally]] = {}
        for task in self.tasks:
            its = found.setdefault((task.set, task.dialogue or task.id), [])
            its.append(tallies[task.set, task.id])
        return {name: added(its) for name, its in found.items()}

    def _speed(self, setting: Setting) -> dict[str, Any] | None:
        """Against plain decoding, in turn; each prompt's least seconds per token of each, for texts
        that go on behind end tokens."""
        sampling = replace(setting.sampling, eos_token_ids=())
        taken: Counter[str] = Counter()
        timed = []
        for number, task in enumerate(self.tasks):
            taken[task.set] += 1
            if taken[task.set] <= self.timed:
                timed.append((number, task))
        known = {
            (r["set"], r["prompt"]): r
            for r in self.folder.records
            if r["kind"] == "speed" and r["setting"] == setting.name
        }
        jobs = [job for job in timed if (job[1].set, job[1].id) not in known]
        engines = (Engine(self.target, grow=True), self._engine(setting)) if jobs else ()
        for first, (number, task) in enumerate(self.progress(jobs, f"{setting.name}: speed")):
            least = [float("inf")] * 2
            for round_ in range(self.rounds + (first == 0)):
                for i, engine in enumerate(engines):
                    seconds = seconds_per_token(engine, task.tokens, sampling, self._seed(number))
                    if first or round_:  # the very first round warms up
                        least[i] = min(least[i], seconds)
            record = {
                "kind": "speed", "setting": setting.name, "set": task.set, "prompt": task.id,
                "plain": least[0], "speculative": least[1],
            }  # fmt: skip
            known[task.set, task.id] = record
            self.folder.append(record)
        rows = [known[task.set, task.id] for _, task in timed]
        found = ratio([r["plain"] for r in rows], [r["speculative"] for r in rows])
        return None if found is None else found.as_dict()

    def _seed(self, number: int) -> int:
        return derive_seed(self.seed, number, 0)


def seconds_per_token(
    engine: Engine, prompt: list[int], sampling: SamplingParams, seed: int
) -> float:
    """Behind the first step, which reads the prompt; of all steps where there is no other. By the
    clock that costs are measured with."""
    device = engine.target.device
    engine.add_request(prompt, sampling, seed=seed)
    began = now(device)
    first = len(engine.step()[0].tokens)
    read = now(device)
    while engine.scheduler.running:
        engine.step()
    ended = now(device)
    [out] = engine.take_finished()
    rest = len(out.token_ids) - first
    return (ended - read) / rest if rest else (ended - began) / first
