"""Speed of several ways to continue the same texts, alternating in one process: `specdec bench`.

Every row continues every prompt in every round, in turn; round r begins with another row. The first
row is the baseline. A row whose texts are not the target's own (evals/gate.py) gets no speed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median, quantiles
from typing import Any

from specdec.evals.contenders import PLAIN, Contender, Ours, Turn
from specdec.evals.folder import RunFolder, Shape
from specdec.evals.gate import Gate, Verdict, uniform_p_value
from specdec.evals.progress import Progress, silent
from specdec.evals.prompts import Prompt
from specdec.rng import derive_seed

Record = dict[str, Any]


# Of the records of its folder.
RECORD_SHAPES: tuple[Shape, ...] = (
    {"row": str, "task": int, "set": str, "prompt": str, "round": int, "turns": list},
)


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt of one set."""

    set: str
    prompt: Prompt


class Dialogue:
    """Turns and answers -> tokens: by the tokenizer's chat template, or one behind the other."""

    def __init__(self, tokenizer: Any, *, chat: bool) -> None:
        self.tokenizer, self.chat = tokenizer, chat

    def tokens(self, turns: Sequence[str], answers: Sequence[Sequence[int]]) -> list[int]:
        """What the model reads before its answer to the last turn."""
        if not self.chat:
            ids = list(self.tokenizer(turns[0])["input_ids"])
            for answer, turn in zip(answers, turns[1:], strict=True):
                more = self.tokenizer("\n" + turn, add_special_tokens=False)["input_ids"]
                ids += [*answer, *more]
            return ids
        messages = [{"role": "user", "content": turns[0]}]
        for answer, turn in zip(answers, turns[1:], strict=True):
            messages.append({"role": "assistant", "content": self.text(answer)})
            messages.append({"role": "user", "content": turn})
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return list(ids)

    def length(self, turn: str) -> int:
        """Tokens that a turn adds, first or behind an answer, whichever is more."""
        first = len(self.tokens([turn], []))
        if self.chat:
            return first
        return max(first, len(self.tokens(["", turn], [[]])) - len(self.tokens([""], [])))

    def text(self, answer: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(answer), skip_special_tokens=True)).strip()


class TokenPrompts:
    """In place of a dialogue where there is no tokenizer: prompts are written as numbers."""

    def tokens(self, turns: Sequence[str], answers: Sequence[Sequence[int]]) -> list[int]:
        assert len(turns) == 1
        assert not answers
        return [int(number) for number in turns[0].split()]


class Bench:
    """One benchmark; run() does what its folder does not hold yet."""

    def __init__(
        self, rows: Sequence[Contender], tasks: Sequence[Task], dialogue: Dialogue | TokenPrompts,
        gate: Gate, folder: RunFolder, *, rounds: int, seed: int,
        progress: Progress = silent,
    ) -> None:  # fmt: skip
        """The first row is the baseline that others are compared with."""
        self.rows, self.tasks, self.dialogue = list(rows), tasks, dialogue
        self.left_out: dict[str, str] = {}  # rows of transformers that failed, and why
        self.gate, self.folder = gate, folder
        self.rounds, self.seed, self.progress = rounds, seed, progress

    def run(self) -> dict[str, Any]:
        """Generates, judges, and sums up; the summary is written to the folder too."""
        done = {(r["row"], r["task"], r["round"]) for r in self.folder.records}
        turns = [
            (round_, task)
            for task in range(len(self.tasks))
            for round_ in range(self.rounds)
            if any((row.name, task, round_) not in done for row in self.rows)
        ]
        if turns:
            for row in self.progress(list(self.rows), "warming up"):
                self._warm_up(row, *turns[0])
        for round_, task in self.progress(turns, "timing"):
            first = (round_ + task) % len(self.rows)
            for row in (*self.rows[first:], *self.rows[:first]):
                if (row.name, task, round_) not in done:
                    self._record(row, task, round_)
        summary = {
            "kind": self.folder.kind, "settings": self.folder.settings,
            "sessions": self.folder.sessions, "rows": self._summaries(), "left_out": self.left_out,
        }  # fmt: skip
        self.folder.finish(summary)
        return summary

    def _warm_up(self, row: Contender, round_: int, task: int) -> None:
        try:
            self._converse(row, task, round_)
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            if row.is_ours or row is self.rows[0]:
                raise
            # transformers refuses some models and pairs of tokenizers
            self.left_out[row.name] = f"{type(error).__name__}: {error}"
            self.rows = [other for other in self.rows if other is not row]

    def _record(self, row: Contender, task: int, round_: int) -> None:
        turns = self._converse(row, task, round_)
        its = self.tasks[task]
        self.folder.append(
            {"row": row.name, "task": task, "set": its.set, "prompt": its.prompt.id,
             "round": round_, "turns": [turn.as_dict() for turn in turns]}
        )  # fmt: skip

    def _converse(self, row: Contender, task: int, round_: int) -> list[Turn]:
        found: list[Turn] = []
        texts = self.tasks[task].prompt.turns
        for count in range(1, len(texts) + 1):
            ids = self.dialogue.tokens(texts[:count], [turn.tokens for turn in found])
            found.append(row.run(ids, self._seed(task, round_)))
        return found

    def _seed(self, task: int, round_: int) -> int:
        return derive_seed(self.seed, task, round_)

    def _summaries(self) -> list[Record]:
        by_row: dict[str, list[Record]] = {row.name: [] for row in self.rows}
        for record in self.folder.records:
            by_row[record["row"]].append(record)
        verdicts = {
            row.name: self._judge(row, by_row[row.name], by_row)
            for row in self.progress(self.rows, "checking the texts")
        }
        baselines = [name for name in (self.rows[0].name, PLAIN) if name in by_row]
        found = []
        for row in self.progress(self.rows, "predicting"):
            against = {b: by_row[b] for b in baselines if b != row.name and verdicts[b].passed}
            summary = summarise(by_row[row.name], verdicts[row.name], against)
            label = _label(row, verdicts[row.name])
            summary["predicted_speed"] = self._predicted(row, by_row[row.name])
            found.append({"name": row.name, "ours": row.is_ours, "label": label, **summary})
        return found

    def _predicted(self, row: Contender, its: list[Record]) -> float | None:
        """Against plain decoding; None where the cost model says nothing."""
        if not isinstance(row, Ours) or not its:
            return None
        contexts = [
            len(prompt) + len(tokens) / 2
            for record in its
            for prompt, tokens in self._with_prompts(record["task"], _tokens(record))
        ]
        turns = [Turn.of(turn) for record in its for turn in record["turns"]]
        return row.predicted_speed(turns, mean(contexts))

    # --- is it the target's own text?

    def _judge(self, row: Contender, its: list[Record], by_row: dict[str, list[Record]]) -> Verdict:
        verdict = Verdict()
        is_greedy = self.gate.law.greedy
        # a synthetic draft knows the text of plain specdec decoding
        first = self.rows[0].name if is_greedy and not row.label else PLAIN
        comparable = is_greedy or (row.is_pathwise and self.gate.knows_paths)
        reference = {_key(r): _tokens(r) for r in by_row.get(first, ()) if comparable}
        transforms: list[float] = []
        for record in its:
            key = _key(record)
            texts = _tokens(record)
            verdict.texts += 1
            verdict.equal += texts == reference.get(key)
            for prompt, tokens in self._with_prompts(record["task"], texts):
                if comparable:
                    seed = None if is_greedy else self._seed(*key)
                    self._judge_path(verdict, record, prompt, tokens, seed)
                else:
                    transforms += self.gate.transforms(prompt, tokens)
        if transforms:
            verdict.tested_tokens = len(transforms)
            verdict.p_value = uniform_p_value(transforms)
        return verdict

    def _judge_path(
        self, verdict: Verdict, record: Record, prompt: list[int], tokens: list[int],
        seed: int | None,
    ) -> None:  # fmt: skip
        near = self.gate.not_best(prompt, tokens, seed)
        if not near:
            return
        worst = max(near, key=lambda each: each.gap)
        verdict.largest_gap = max(verdict.largest_gap, worst.gap)
        bad = next((each for each in near if not each.is_explained), None)
        if bad is None:
            verdict.near_ties += 1
            return
        verdict.wrong.append(
            f"prompt {record['prompt']}, new token {bad.position}: not the target's own (its logit "
            f"is {bad.gap:.3g} below the best, rounding there is {bad.rounding:.1g})"
        )

    def _with_prompts(
        self, task: int, texts: list[list[int]]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """What the model read before each answer."""
        turns = self.tasks[task].prompt.turns
        for count, tokens in enumerate(texts, 1):
            yield self.dialogue.tokens(turns[:count], texts[: count - 1]), tokens


def _label(row: Contender, verdict: Verdict) -> str:
    """A synthetic draft is right at its rate as long as the text is the one that it knows."""
    lost = verdict.texts - verdict.equal
    if not row.label or not lost:
        return row.label
    return f"{row.label}; lost in {lost} of {verdict.texts} texts, behind near-ties: try float32"


def _tokens(record: Record) -> list[list[int]]:
    return [list(turn["tokens"]) for turn in record["turns"]]


# --- sums


def summarise(its: list[Record], verdict: Verdict, against: dict[str, list[Record]]) -> Record:
    """One row's figures; speeds only where the verdict allows them. against: baselines' records."""
    turns = [Turn.of(turn) for record in its for turn in record["turns"]]
    tokens, passes = sum(len(t.tokens) for t in turns), sum(len(t.emitted) for t in turns)
    drafted = sum(sum(t.drafted) for t in turns)
    accepted = sum(accepted_lengths(t) for t in turns)
    seconds = sum(t.seconds for t in turns)
    stages = {
        "draft": sum(t.draft_seconds for t in turns), "verify": sum(t.verify_seconds for t in turns)
    }  # fmt: skip
    found: Record = {
        "lossless": verdict.as_dict(),
        "tokens": tokens,
        "passes": passes,
        "drafted": drafted,
        "tokens_per_pass": tokens / passes if passes else None,
        "acceptance_rate": accepted / drafted if drafted else None,
        "passes_by_depth": passes_by_depth(turns),
        "tokens_per_pass_by_set": _by_set(its),
        "tokens_per_second": None,
        "speed_against": {},
        "seconds": None,
    }
    if verdict.passed and turns:
        rates = {_key(record): _rate(record) for record in its}
        found["tokens_per_second"] = spread(list(rates.values()))
        for name, theirs in against.items():
            base = {_key(record): _rate(record) for record in theirs}
            ratios = [rates[key] / base[key] for key in rates if key in base]
            found["speed_against"][name] = spread(ratios)
        found["seconds"] = {**stages, "other": max(0.0, seconds - sum(stages.values()))}
    return found


def accepted_lengths(turn: Turn) -> int:
    """Drafted tokens that were kept. The last pass may have been cut at a stop."""
    return sum(count - 1 for count in turn.emitted)


def passes_by_depth(turns: Sequence[Turn]) -> list[float]:
    """Share of passes that kept at least k drafted tokens, k = 1, 2, ..., of those that drafted."""
    kept = [
        count - 1
        for turn in turns
        for count, drafted in zip(turn.emitted, turn.drafted, strict=True)
        if drafted
    ]
    depths = range(1, max(kept, default=0) + 1)
    return [sum(count >= depth for count in kept) / len(kept) for depth in depths]


def spread(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        return {"median": values[0], "p20": values[0], "p80": values[0]}
    fifths = quantiles(values, n=5, method="inclusive")
    return {"median": median(values), "p20": fifths[0], "p80": fifths[3]}


def _key(record: Record) -> tuple[int, int]:
    return record["task"], record["round"]


def _rate(record: Record) -> float:
    """Tokens per second of one conversation."""
    tokens = sum(len(turn["tokens"]) for turn in record["turns"])
    seconds: float = sum(turn["seconds"] for turn in record["turns"])
    return tokens / seconds


def _by_set(its: list[Record]) -> dict[str, float]:
    sums: dict[str, list[int]] = {}
    for record in its:
        both = sums.setdefault(record["set"], [0, 0])
        both[0] += sum(len(turn["tokens"]) for turn in record["turns"])
        both[1] += sum(len(turn["emitted"]) for turn in record["turns"])
    return {name: tokens / passes for name, (tokens, passes) in sums.items() if passes}
