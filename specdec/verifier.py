"""Tree -> score -> laws -> acceptance -> commit -> Verdict: the target's half of a step."""

from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec import backend
from specdec.acceptance import RULES, batched, fused
from specdec.acceptance.batched import Outcome, TreeBatch
from specdec.acceptance.followed import followed, have_peaks
from specdec.cache import CacheGroup
from specdec.errors import InvalidArgumentError, InvalidLawError, NumericalError, SpecDecError
from specdec.rng import Noise
from specdec.runner import Runner, SequenceRows
from specdec.sampling import Law, Paths, Prefix
from specdec.sequence import Sequence
from specdec.tree import TokenTree


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """What the target said of one tree."""

    tokens: tuple[int, ...]  # the accepted path, then exactly one extra token
    drafted: int  # nodes of the tree
    path: tuple[int, ...]  # accepted nodes, in order
    logits: Tensor  # (rows, V) the target's own, root row first; on the device

    @property
    def accepted(self) -> int:
        return len(self.path)


Answer = tuple[tuple[int, ...], tuple[int, ...]]  # emitted tokens, accepted nodes


@dataclass(frozen=True, slots=True)
class _Party:
    """Sequences that are judged in one call."""

    rule: str
    is_fused: bool
    members: list[int]


class Verifier:
    """Scores every tree of the batch in one target pass and applies one rule to each.

    rule: a name in acceptance.RULES, or "auto": greedy at temperature 0, plain sampling ("gumbel")
    where nothing is ever drafted, else walk for deterministic drafts, block for sampled chains and
    traversal for sampled trees.
    """

    def __init__(self, runner: Runner, group: CacheGroup, rule: str, *, drafts: bool) -> None:
        if rule != "auto" and rule not in RULES:
            raise InvalidArgumentError(
                f"verification={rule!r}: expected 'auto' or one of {', '.join(sorted(RULES))}"
            )
        self.runner, self.group, self.rule, self.drafts = runner, group, rule, drafts
        self.kernels = backend.choose(runner.device)  # fused rules, or torch's
        runner.join(group)

    def check_law(self, law: Law) -> None:
        """Raises InvalidArgumentError for a law that the rule cannot judge."""
        if self.rule == "greedy" and not law.greedy:
            raise InvalidArgumentError(
                "verification='greedy' needs temperature 0; use 'auto' or a rule that samples"
            )

    def rule_for(self, law: Law, trees: Items[TokenTree]) -> str:
        """The rule that judges these trees of sequences sampled by this law."""
        if law.greedy:
            return "greedy"
        if self.rule != "auto":
            return self.rule
        if not self.drafts:
            return "gumbel"
        if all(tree.laws is None for tree in trees):
            return "walk"
        # On the built-in pair no rule accepts more than traversal by 1.3 standard errors, at equal
        # draws (evals/results/rule_choice.json); recursive accepts less on narrow, deep trees.
        return "block" if all(map(_is_drawn_once, trees)) else "traversal"

    def verify(
        self, sequences: Items[Sequence], trees: Items[TokenTree], noise: Noise
    ) -> list[Verdict]:
        """One target pass; commits the accepted paths to the cache."""
        logits = self.runner.score(
            [self._rows(s, t) for s, t in zip(sequences, trees, strict=True)]
        )
        counts = [len(tree) + 1 for tree in trees]
        parts = logits.split(counts) if len(counts) > 1 else (logits,)
        verdicts: list[Verdict | None] = [None] * len(sequences)
        for party in self._parties(sequences, trees, noise, logits.dtype):
            members = party.members
            every = len(members) == len(sequences)
            rows = logits if every else torch.cat([parts[i] for i in members])
            chosen, its_trees = [sequences[i] for i in members], [trees[i] for i in members]
            judge = self._judge_fused if party.is_fused else self._judge
            answers = judge(party.rule, chosen, its_trees, rows, noise)
            for i, (tokens, path), part in zip(
                members, answers, (parts[i] for i in members), strict=True
            ):
                verdicts[i] = Verdict(tokens, len(trees[i]), path, part)
        done = [verdict for verdict in verdicts if verdict is not None]
        lengths = [len(sequence.tokens) for sequence in sequences]
        self.group.commit_all(
            (sequence.cache, length, [length + node for node in verdict.path])
            for sequence, length, verdict in zip(sequences, lengths, done, strict=True)
        )
        return done

    def _parties(
        self, sequences: Items[Sequence], trees: Items[TokenTree], noise: Noise, dtype: torch.dtype
    ) -> list[_Party]:
        """Who is judged together: sequences of one law, or on fused kernels of one rule."""
        parties: list[_Party] = []
        merged: dict[tuple[str, bool], _Party] = {}
        for members in _groups(sequences, trees):
            law, its = sequences[members[0]].law, [trees[i] for i in members]
            rule = self.rule_for(law, its)
            if self.kernels.name == "torch" or not fused.can_judge(rule, law, its, noise, dtype):
                parties.append(_Party(rule, False, members))
                continue
            drawn = any(tree.laws is not None for tree in its)
            party = merged.setdefault((rule, drawn), _Party(rule, True, []))
            party.members.extend(members)
            party.members.sort()
        return [*parties, *merged.values()]

    def _rows(self, sequence: Sequence, tree: TokenTree) -> SequenceRows:
        pending = sequence.tokens[sequence.cache.computed_len(self.runner) :]
        parents = None if tree.is_chain else tree.parents
        return SequenceRows(sequence.cache, pending, tree.tokens, parents, len(tree) + 1)

    def _judge_fused(
        self, rule: str, sequences: Items[Sequence], trees: Items[TokenTree], logits: Tensor,
        noise: Noise,
    ) -> list[Answer]:  # fmt: skip
        """_judge, of sequences whose laws may differ, by kernels that make the noise themselves."""
        del noise
        outcome = fused.judge(
            rule, trees, logits, [s.law.truncation for s in sequences],
            [s.seed for s in sequences], [len(s.tokens) for s in sequences],
        )  # fmt: skip

        def diagnose() -> None:
            parts = logits.split([len(tree) + 1 for tree in trees])
            p = [s.law.truncation.law(part) for s, part in zip(sequences, parts, strict=True)]
            laws = [tree.laws for tree in trees if tree.laws is not None]
            batched.diagnose(
                rule, TreeBatch.of(trees), torch.cat(p), torch.cat(laws) if laws else None
            )

        return _to_host(outcome, trees, sequences, None if rule == "greedy" else diagnose)

    def _judge(
        self, rule: str, sequences: Items[Sequence], trees: Items[TokenTree], logits: Tensor,
        noise: Noise,
    ) -> list[Answer]:  # fmt: skip
        """The rule's answers for sequences that share one law; logits (R, V), root rows first."""
        law = sequences[0].law
        paths = _paths(sequences, trees)
        # rules that follow one line do so on the host where the numbers are there
        on_host = logits.device.type == "cpu"
        if rule == "greedy":
            best = law.best(logits, paths)
            if on_host:
                return _followed(sequences, trees, best.tolist(), have_peaks(best, logits))
            batch = TreeBatch.of(trees)
            return _to_host(batched.greedy(batch, best, logits), trees, sequences)
        p = law.probabilities(logits, paths)
        batch = TreeBatch.of(trees)
        if rule == "gumbel":
            gumbel = _gumbel(sequences, trees, noise, p)
            if on_host:
                said, sound = batched.said_by_gumbel(batch, p, gumbel)
                return _followed(sequences, trees, said.tolist(), sound.tolist())
            return _to_host(batched.gumbel(batch, p, gumbel), trees, sequences)
        seeds, positions = [s.seed for s in sequences], [len(s.tokens) for s in sequences]
        rows = max(len(tree) for tree in trees) + 1
        coins = noise.step(seeds, positions, rows, logits.device, batch.copies)
        laws = [tree.laws for tree in trees if tree.laws is not None]
        q = None if not laws else laws[0] if len(laws) == 1 else torch.cat(laws)

        def diagnose() -> None:
            batched.diagnose(rule, batch, p, q)

        if rule == "walk" and on_host:
            said, sound = batched.said_by_walk(batch, p, q, coins)
            return _followed(sequences, trees, said.tolist(), sound.tolist(), diagnose)
        outcome = batched.BY_COINS[rule](batch, p, q, coins)
        return _to_host(outcome, trees, sequences, diagnose)


def _is_drawn_once(tree: TokenTree) -> bool:
    """Whether it is a chain and nothing in it was drawn twice."""
    return tree.is_chain and (tree.draws is None or len(tree.draws) == len(tree))


def _groups(sequences: Items[Sequence], trees: Items[TokenTree]) -> list[list[int]]:
    """Indices that can be judged together: same law, same kind of draws.

    Point masses have no stored rows, so they do not share a call with sampled drafts.
    """
    if len(sequences) == 1:
        return [[0]]
    groups: dict[tuple[int, bool], list[int]] = {}
    for index, (sequence, tree) in enumerate(zip(sequences, trees, strict=True)):
        is_point = len(tree) > 0 and tree.laws is None
        groups.setdefault((id(sequence.law), is_point), []).append(index)
    return list(groups.values())


def _paths(sequences: Items[Sequence], trees: Items[TokenTree]) -> Callable[[], Paths]:
    """Each row's tokens from the start of its prompt: the root's, then every node's."""
    return lambda: Paths.of_trees(
        [Prefix(s.tokens, s.prompt_len, s.left_padding) for s in sequences],
        [tree.tokens for tree in trees],
        [tree.parents for tree in trees],
    )


def _gumbel(sequences: Items[Sequence], trees: Items[TokenTree], noise: Noise, p: Tensor) -> Tensor:
    """(R, V) the noise of each row's position."""
    where = [
        (s.seed, len(s.tokens) + depth)
        for s, tree in zip(sequences, trees, strict=True)
        for depth in (0, *tree.depths)
    ]
    seeds, positions = [seed for seed, _ in where], [at for _, at in where]
    return noise.gumbel(seeds, positions, p.shape[1], p.device)


def _followed(
    sequences: Items[Sequence], trees: Items[TokenTree], said: list[int], sound: list[bool],
    diagnose: Callable[[], None] | None = None,
) -> list[Answer]:  # fmt: skip
    """One answer per sequence, on the host; diagnose as for _to_host."""
    answers: list[Answer] = []
    for line, sequence in zip(followed(trees, said, sound), sequences, strict=True):
        if line is None:
            raise _numerical_error(sequence, diagnose)
        answers.append(line)
    return answers


def _to_host(
    outcome: Outcome,
    trees: Items[TokenTree],
    sequences: Items[Sequence],
    diagnose: Callable[[], None] | None = None,
) -> list[Answer]:
    """One answer per sequence: the step's one synchronisation.

    diagnose raises InvalidLawError for the law that made an outcome invalid.
    """
    valid = outcome.valid.long()
    packed = torch.cat(
        (valid[:, None], outcome.accepted[:, None], outcome.path, outcome.tokens), dim=1
    ).tolist()
    depth = outcome.path.shape[1]
    answers: list[Answer] = []
    first_row = 0
    for row, tree, sequence in zip(packed, trees, sequences, strict=True):
        sound, accepted = row[0], row[1]
        if not sound:
            raise _numerical_error(sequence, diagnose)
        path = tuple(r - first_row - 1 for r in row[2 : 2 + accepted])
        answers.append((tuple(row[2 + depth : 3 + depth + accepted]), path))
        first_row += len(tree) + 1
    return answers


def _numerical_error(sequence: Sequence, diagnose: Callable[[], None] | None) -> SpecDecError:
    """Names whose numbers were no law, at which step of which request."""
    whose, detail = "target", ""
    try:
        if diagnose is not None:
            diagnose()
    except InvalidLawError as error:
        detail = f" ({error})"
        if "draft" in error.reason:
            whose = "draft"
    return NumericalError(
        f"the {whose}'s logits hold NaN or infinity at step {sequence.stats.steps} of "
        f"{sequence.request_id}{detail}; check its weights and dtype"
    )
