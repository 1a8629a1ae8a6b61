"""Is this pair, with this proposer and rule, lossless on this machine? What `specdec verify` asks.

Four parts. Exact: the same settings in production code on small tables, every outcome taken
(evals/exact.py). Greedy: texts of the real pair against plain decoding and against transformers'
own logits. Sampled: short texts of the real pair against plain sampling, a two-sample G-test of the
size that the asked power needs (evals/two_sample.py); under the rule gumbel every text must be
plain sampling's with the same seed instead, which needs no statistics. Planted: mistakes that the
other parts must see, or the audit proves nothing.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from specdec.engine import Engine
from specdec.errors import InvalidArgumentError
from specdec.evals import exact
from specdec.evals.exact import Finding
from specdec.evals.folder import RunFolder, Shape
from specdec.evals.gate import Gate, Near
from specdec.evals.progress import Progress, silent
from specdec.evals.two_sample import Answer, Text, g_test, sample_size
from specdec.rng import derive_seed
from specdec.sampling import SamplingParams
from specdec.sequence import Sequence as Sample

LANES = 64  # texts that are sampled together
ROUNDS = 8  # of them per record
PLANTED_DISTANCE = 0.1  # what the run with a planted mistake is sized for: the mistake is larger
PATHS = 4  # seeds per prompt of a path-by-path comparison
_PROBED = 2  # records of each side after which the time that is left is known
_WORTH_SAYING = 60  # seconds

# Of the records of its folder: findings of a part, and texts that were sampled.
RECORD_SHAPES: tuple[Shape, ...] = (
    {"part": str, "findings": list},
    {"part": str, "side": str, "row": int, "begin": int, "drafted": int, "texts": list},
)

Remark = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is sampled; level: of false alarms; cells: of each prompt at most; context: sampled
    texts follow so many tokens of each prompt (None: all), which is quicker than long prompts."""

    total_variation: float = 0.05
    power: float = 0.9
    level: float = 0.01
    tokens: int = 4
    cells: int = 8
    prompts: int = 4
    greedy_tokens: int = 64
    context: int | None = None

    def texts(self, prompts: int, total_variation: float | None = None) -> int:
        """Of each prompt and side."""
        wanted = self.total_variation if total_variation is None else total_variation
        degrees = prompts * (self.cells - 1)
        return ceil(sample_size(wanted, self.power, self.level, degrees) / prompts)


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)


@dataclass(frozen=True, slots=True)
class Audit:
    """What every part came to."""

    parts: list[Part]

    @property
    def passed(self) -> bool:
        return all(part.passed for part in self.parts)

    @property
    def verdict(self) -> str:
        """One line."""
        failed = [p for p in self.parts if not p.passed]
        if not failed:
            notes = [f"{part.name}: {_summed(part)}" for part in self.parts]
            return "LOSSLESS | " + " | ".join(notes)
        wrong = [p for p in failed if p.name != "planted"]
        head = "NOT LOSSLESS" if wrong else "NOT SHOWN: a planted mistake was not seen"
        shown = [
            f"{part.name}: {finding.name}: {finding.note}"
            for part in (wrong or failed)
            for finding in part.findings
            if not finding.passed
        ]
        return f"{head} | " + " | ".join(shown)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        parts = {
            part.name: {"passed": part.passed, "findings": [asdict(f) for f in part.findings]}
            for part in self.parts
        }
        return {"passed": self.passed, "verdict": self.verdict, "parts": parts}


def _summed(part: Part) -> str:
    if part.name == "planted":
        return f"{len(part.findings)} of {len(part.findings)} mistakes seen"
    if len(part.findings) == 1:
        return part.findings[0].note
    return f"{part.findings[0].note} ({part.findings[0].name})"


class Auditor:
    """Audits one pair with one way of drafting; prompts are token ids."""

    def __init__(
        self, target: Any, draft: Any, options: dict[str, Any], prompts: Sequence[list[int]],
        sampling: SamplingParams, plan: Plan, *, folder: RunFolder | None = None, seed: int = 0,
        progress: Progress = silent, remark: Remark = lambda _: None,
    ) -> None:  # fmt: skip
        """options: of Engine beside the models. With the real pair policy="constant" stands
        for `auto`: where plain decoding is quicker `auto` drafts nothing, and there would be
        nothing to audit; on tables it plans, with costs that are made up.
        remark: is told that, and how long the sampling will take. Raises InvalidArgumentError where
        no prompt is left."""
        if not prompts:
            raise InvalidArgumentError("prompts: none is left to audit with")
        self.target, self.draft, self.sampling = target, draft, sampling
        self.options, self._asked = dict(options), dict(options)
        if self.options.get("policy", "auto") in ("auto", "cost"):
            self.options["policy"] = "constant"
        self.prompts, self.plan, self.seed = prompts, plan, seed
        self.folder = folder or RunFolder(None, "verify", {})
        self.progress, self.remark = progress, remark

    def run(self) -> Audit:
        """Every part in turn; those that the folder holds are not repeated."""
        greedy = replace(self.sampling, temperature=0.0)
        rule = self._engine().verifier.rule  # what an engine refuses is refused before all else
        if exact.plans_by_cost(self._asked):
            self.remark(
                "on tables drafts are planned by costs that are made up; with the real pair a "
                "constant number or shape stands for the policy of costs, which might draft nothing"
            )
        parts = [
            self._kept("exact", self._exact),
            self._kept("greedy", lambda: [self._followed(greedy, [None])]),
        ]
        law = self.sampling.law()
        if not law.greedy:
            if rule == "gumbel":
                seeds = [derive_seed(self.seed, 0, j) for j in range(PATHS)]
                parts.append(self._kept("coupled", lambda: [self._followed(self.sampling, seeds)]))
            else:
                parts.append(Part("sampled", [self._sampled()]))
        parts.append(self._kept("planted", self._planted))
        audit = Audit(parts)
        self.folder.finish(audit.as_dict())
        return audit

    def _engine(self) -> Engine:
        return Engine(self.target, draft=self.draft, grow=True, **self.options)

    def _plain(self) -> Engine:
        return Engine(self.target, grow=True)

    def _kept(self, name: str, find: Callable[[], list[Finding]]) -> Part:
        for record in self.folder.records:
            if record["part"] == name:
                return Part(name, [Finding(**finding) for finding in record["findings"]])
        findings = find()
        self.folder.append({"part": name, "findings": [asdict(f) for f in findings]})
        return Part(name, findings)

    # on tables

    def _exact(self) -> list[Finding]:
        return exact.exact(
            self._asked, drafts=self.draft is not None, sampling=self.sampling,
            progress=self.progress,
        )  # fmt: skip

    # text by text

    def _followed(self, sampling: SamplingParams, seeds: Sequence[int | None]) -> Finding:
        """Every text must be plain decoding's; where it is not, a near-tie must explain it."""
        gate = Gate(self.target, sampling)
        engine, plain = self._engine(), self._plain()
        params = replace(sampling, max_new_tokens=self.plan.greedy_tokens)
        texts, equal = 0, 0
        differences: list[dict[str, Any]] = []
        jobs = [(row, seed) for row in range(len(self.prompts)) for seed in seeds]
        for row, seed in self.progress(jobs, "greedy" if seeds == [None] else "coupled"):
            prompt = self.prompts[row]
            ours, wanted = (_one(each, prompt, params, seed or 0) for each in (engine, plain))
            near, its = (gate.not_best(prompt, text, seed) for text in (ours, wanted))
            texts, equal = texts + 1, equal + (ours == wanted)
            if ours != wanted or not all(n.is_explained for n in (*near, *its)):
                differences.append(_difference(row, seed, ours, wanted, (near, its)))
        wrong = [d for d in differences if not d["explained"]]
        details = {
            "texts": texts, "equal": equal, "differences": differences,
            "drafted": engine.stats.drafted, "accepted": engine.stats.accepted,
        }  # fmt: skip
        name = "texts of plain decoding" if seeds == [None] else "texts of the same seeds"
        if not engine.stats.drafted:
            return Finding(name, False, "nothing was drafted", details)
        note = f"{equal} of {texts} texts equal"
        if wrong:
            first = wrong[0]
            note += (
                f"; prompt {first['prompt']} has a wrong token at {first['position']}: its logit "
                f"is {first['gap']:.2g} below the best, rounding is {first['rounding']:.1g}"
            )
        elif differences:
            gap = max(d["gap"] for d in differences)
            note += f", the others part at near-ties (gaps up to {gap:.1g})"
        return Finding(name, not wrong, note, details)

    # by statistics

    def _sampled(self) -> Finding:
        rows = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        rows = sorted(rows[: self.plan.prompts])
        size = self.plan.texts(len(rows))
        samples = self._draw(rows, size, "sampled", {"speculative": self._engine})
        strata = [(samples["speculative", row], samples["plain", row]) for row in rows]
        answer = g_test(strata, cells=self.plan.cells)
        drafted = sum(r.get("drafted", 0) for r in self.folder.records if r["part"] == "sampled")
        details = {
            **asdict(answer), "prompts": rows, "texts": size * len(rows), "drafted": drafted,
            "tokens": self.plan.tokens, "context": self.plan.context, "level": self.plan.level,
            "power": self.plan.power, "detect_total_variation": self.plan.total_variation,
        }  # fmt: skip
        if not drafted:
            return Finding("two samples", False, "nothing was drafted", details)
        return Finding(
            "two samples", answer.p_value >= self.plan.level, self._note(answer), details
        )

    def _note(self, answer: Answer) -> str:
        plan = self.plan
        return (
            f"p = {answer.p_value:.2g} of 2 x {answer.sizes[0]} texts, level {plan.level:g} "
            f"(total variation {plan.total_variation:g} is seen with power {plan.power:g})"
        )

    def _draw(
        self, rows: Sequence[int], size: int, part: str, sides: dict[str, Callable[[], Engine]],
    ) -> dict[tuple[str, int], Counter[Text]]:  # fmt: skip
        """Texts by side and prompt: plain ones beside those of `sides`."""
        engines = {"plain": self._plain(), **{name: make() for name, make in sides.items()}}
        found = {(side, row): Counter[Text]() for side in engines for row in rows}
        done = set[tuple[str, int, int]]()
        for record in self.folder.records:
            if record["part"] == part or (record["part"], record.get("side")) == (
                "sampled", "plain"
            ):  # fmt: skip
                key = record["side"], record["row"], record["begin"]
                if key[:2] in found and key[2] < size:
                    done.add(key)
                    found[key[:2]].update({tuple(text): n for text, n in record["texts"]})
        begins = range(0, size, LANES * ROUNDS)
        jobs = [
            (row, begin, side)
            for row in rows
            for begin in begins
            for side in engines
            if (side, row, begin) not in done
        ]
        lanes: dict[str, _Lanes] = {}
        began = time.perf_counter()
        for number, (row, begin, side) in enumerate(self.progress(jobs, part)):
            if number == _PROBED * len(engines):
                self._say_how_long(part, size * len(rows), number, len(jobs), began)
            if side not in lanes or lanes[side].row != row:
                if side in lanes:
                    lanes[side].close()
                prompt = self.prompts[row][: self.plan.context]
                lanes[side] = _Lanes(engines[side], row, prompt, self._short())
            engine = engines[side]
            drafted = engine.stats.drafted
            # other words than those of the other sides, also where a rule shares noise with plain
            base = derive_seed(self.seed, row, 1 + list(engines).index(side))
            numbers = range(begin, min(begin + LANES * ROUNDS, size))
            texts = lanes[side].draw([derive_seed(base, 0, 1 + n) for n in numbers])
            found[side, row].update(texts)
            self.folder.append(
                {
                    "part": "sampled" if side == "plain" else part, "side": side, "row": row,
                    "begin": begin, "drafted": engine.stats.drafted - drafted,
                    "texts": [[list(text), n] for text, n in texts.items()],
                }
            )  # fmt: skip
        for lane in lanes.values():
            lane.close()
        return found

    def _say_how_long(self, part: str, texts: int, done: int, jobs: int, began: float) -> None:
        left = (time.perf_counter() - began) / done * (jobs - done)
        if left > _WORTH_SAYING:
            self.remark(f"{part}: 2 x {texts} texts; about {left / 60:.0f} minutes are left")

    def _short(self) -> SamplingParams:
        return replace(self.sampling, max_new_tokens=self.plan.tokens)

    # mistakes

    def _planted(self) -> list[Finding]:
        found = exact.planted(
            self._asked, drafts=self.draft is not None, sampling=self.sampling,
            progress=self.progress,
        )  # fmt: skip
        return [*found, *([] if self.sampling.temperature == 0 else self._planted_samples())]

    def _planted_samples(self) -> list[Finding]:
        """The real pair with a target twice as hot, and the samples with a bias of known size."""
        row = min(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        size = ceil(
            sample_size(PLANTED_DISTANCE, self.plan.power, self.plan.level, self.plan.cells - 1)
        )
        samples = self._draw([row], size, "planted sample", {"hot": lambda: _hot(self._engine())})
        answer = g_test([(samples["hot", row], samples["plain", row])], cells=self.plan.cells)
        seen = answer.p_value < self.plan.level
        note = f"p = {answer.p_value:.2g} of 2 x {size} texts"
        return [Finding("the real target, twice as hot", seen, note, asdict(answer))]


def _hot(engine: Engine) -> Engine:
    score = engine.target.score
    engine.target.score = lambda rows: score(rows) * 0.5  # type: ignore[method-assign]
    return engine


def _one(engine: Engine, prompt: list[int], params: SamplingParams, seed: int) -> list[int]:
    engine.add_request(prompt, params, seed=seed)
    [out] = list(engine)
    return list(out.token_ids)


def _difference(
    row: int, seed: int | None, ours: list[int], wanted: list[int],
    near: tuple[list[Near], list[Near]],
) -> dict[str, Any]:  # fmt: skip
    """Where a text first takes a wrong token, else where it parts from plain decoding's; near: the
    tokens of either that are not the best by transformers' logits."""
    pairs = enumerate(zip(ours, wanted, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(wanted)))
    both = [n for some in near for n in some]
    wrong = sorted((n for n in both if not n.is_explained), key=lambda n: n.position)
    tie = next((n for n in both if n.position == at), None)
    first = wrong[0] if wrong else tie
    if first is not None:
        at = first.position
    return {
        "prompt": row, "seed": seed, "position": at, "token": ours[at : at + 1],
        "plain": wanted[at : at + 1], "gap": first.gap if first else 0.0,
        "rounding": first.rounding if first else 0.0, "explained": not wrong,
    }  # fmt: skip


def sample_texts(
    engine: Engine, prompt: list[int], params: SamplingParams, seeds: Sequence[int]
) -> Counter[Text]:
    """How often each text follows the prompt, one text per seed."""
    lanes = _Lanes(engine, 0, prompt, params)
    texts = lanes.draw(seeds)
    lanes.close()
    return texts


class _Lanes:
    """Samples many texts behind one prompt, whose cache each lane keeps."""

    def __init__(self, engine: Engine, row: int, prompt: list[int], params: SamplingParams) -> None:
        self.engine, self.row, self.prompt, self.params = engine, row, prompt, params
        self.law = params.law()
        self._last: list[Sample | None] = [None] * LANES

    def draw(self, seeds: Sequence[int]) -> Counter[Text]:
        """One text per seed."""
        texts = Counter[Text]()
        for begin in range(0, len(seeds), LANES):
            some = seeds[begin : begin + LANES]
            for lane, seed in enumerate(some):
                self._last[lane] = self.engine.admit(
                    f"{self.row}-{lane}", 0, self.prompt, self.law, seed,
                    self.params.max_new_tokens, self.params.eos_token_ids, None,
                    keep_cache=True, resume=self._last[lane],
                )  # fmt: skip
            while self.engine.scheduler.running:
                self.engine.step()
            texts.update(out.token_ids for out in self.engine.take_finished())
        return texts

    def close(self) -> None:
        for sample in self._last:
            if sample is not None:
                self.engine.release(sample)
