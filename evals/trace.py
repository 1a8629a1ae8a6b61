"""One generation, token by token: what was drafted, by whom, how likely it was, what was kept."""

import json
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from specdec.engine import Engine
from specdec.evals.bench import Dialogue, Task, TokenPrompts
from specdec.evals.contenders import Contender, Ours
from specdec.evals.progress import Progress, silent
from specdec.proposers import EnsembleProposer
from specdec.rng import Noise
from specdec.sampling import Paths, SamplingParams
from specdec.sequence import Sequence
from specdec.tree import TokenTree
from specdec.verifier import Verdict, Verifier

TARGET = "target"
TRACES = "traces.json"


@dataclass(frozen=True, slots=True)
class Node:
    """A drafted token."""

    token: int
    parent: int  # -1: the last committed token
    by: tuple[str, ...]  # who proposed it
    draft: float | None  # its probability in the law it was drawn from; None: it was looked up
    target: float  # its probability in the target's law, given the path to it
    accepted: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of the target."""

    nodes: tuple[Node, ...]
    emitted: tuple[int, ...]  # tokens; the last is the target's own unless the text was cut before
    by: tuple[tuple[str, ...], ...]  # of each of them, who proposed it


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened to one prompt."""

    prompt: tuple[int, ...]
    steps: tuple[Step, ...]

    def as_dict(self, tokenizer: Any) -> dict[str, Any]:
        """Plain values for JSON, with the text of every token."""
        tokens = {*self.prompt, *(t for s in self.steps for t in s.emitted)}
        tokens |= {node.token for step in self.steps for node in step.nodes}
        texts = {t: str(tokenizer.decode([t])) if tokenizer else str(t) for t in sorted(tokens)}
        return {**asdict(self), "texts": {str(token): text for token, text in texts.items()}}


class _Watcher(Verifier):
    """The engine's verifier, which also notes what it sees."""

    def __init__(self, inner: Verifier, engine: Engine) -> None:
        vars(self).update(vars(inner))  # its runner has joined, so it cannot be made anew
        self._engine = engine
        self.steps: list[tuple[tuple[Node, ...], Verdict]] = []

    def verify(
        self, sequences: Items[Sequence], trees: Items[TokenTree], noise: Noise
    ) -> list[Verdict]:
        verdicts = super().verify(sequences, trees, noise)
        for sequence, tree, verdict in zip(sequences, trees, verdicts, strict=True):
            who = proposed_by(self._engine, sequence, tree)
            laws = sequence.law.probabilities(verdict.logits, _no_paths)
            self.steps.append((_nodes(tree, verdict, laws, who), verdict))
        return verdicts


def trace(engine: Engine, prompt: Items[int], sampling: SamplingParams, seed: int) -> Trace:
    """Continues one prompt on an idle engine and notes every step; sampling without processors that
    look at paths. The engine is left as it was; the text is that of any other run."""
    inner = engine.verifier
    watcher = _Watcher(inner, engine)
    engine.verifier = watcher
    try:
        engine.add_request(list(prompt), sampling, seed=seed)
        [out] = list(engine)
    finally:
        engine.verifier = inner
    steps, left = [], list(out.token_ids)
    for nodes, verdict in watcher.steps:
        emitted, left = left[: len(verdict.tokens)], left[len(verdict.tokens) :]
        by = [nodes[node].by for node in verdict.path]
        by += [(TARGET,)] * (len(emitted) - len(by))
        steps.append(Step(nodes, tuple(emitted), tuple(by[: len(emitted)])))
    return Trace(tuple(prompt), tuple(steps))


def write_traces(
    path: Path, rows: Items[Contender], tasks: Items[Task], dialogue: Dialogue | TokenPrompts,
    tokenizer: Any, sampling: SamplingParams, seed: int, progress: Progress = silent,
) -> None:  # fmt: skip
    """The first turn of the first prompt, by every row of ours that drafts."""
    task = tasks[0]
    prompt = dialogue.tokens(task.prompt.turns[:1], [])
    ours = [r for r in rows if isinstance(r, Ours) and r.engine.proposer is not None]
    found = [
        {
            "row": row.name, "set": task.set, "prompt": task.prompt.id,
            "trace": trace(row.engine, prompt, sampling, seed).as_dict(tokenizer),
        }
        for row in progress(ours, "traces")
    ]  # fmt: skip
    path.write_text(json.dumps({"traces": found}) + "\n", encoding="utf-8")


def proposed_by(engine: Engine, sequence: Sequence, tree: TokenTree) -> list[tuple[str, ...]]:
    """Per node, the names of its proposers."""
    proposer = engine.proposer
    if isinstance(proposer, EnsembleProposer):
        return proposer.proposed_by(sequence, len(tree))
    return [("" if proposer is None else proposer.name,)] * len(tree)


def _nodes(
    tree: TokenTree, verdict: Verdict, laws: torch.Tensor, who: list[tuple[str, ...]]
) -> tuple[Node, ...]:
    drawn = {p.node: p.law for p in reversed(tree.proposals)}  # the first draw of each
    found = []
    for node, (token, parent) in enumerate(zip(tree.tokens.tolist(), tree.parents, strict=True)):
        row = drawn[node].row
        draft = None if row is None or tree.laws is None else float(tree.laws[row, token])
        target = float(laws[parent + 1, token])
        found.append(Node(token, parent, who[node], draft, target, node in verdict.path))
    return tuple(found)


def _no_paths() -> Paths:
    raise AssertionError("a trace is of a law without processors that look at paths")
