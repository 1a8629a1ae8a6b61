"""A draft model grows the tree that it thinks most likely to be accepted (EAGLE-2, Li et al. 2024,
2406.16858, section 4; OPT-Tree, Wang et al. 2024, 2406.17276, section 3)."""

from collections.abc import Sequence as Items
from typing import Literal, get_args

import torch
from torch import Tensor

from specdec.cache import CacheGroup
from specdec.errors import InvalidArgumentError
from specdec.proposers.base import Proposer
from specdec.proposers.beams import Beams, by_law, chosen, paths_of
from specdec.proposers.model import DraftModel
from specdec.rng import Noise
from specdec.runner import Runner
from specdec.sampling import Law
from specdec.sequence import Sequence
from specdec.shapes import MAX_NODES
from specdec.tree import TokenTree

DynamicKind = Literal["top_k", "coupled"]
_GREEDY_SHARPNESS = 2.0  # of 1 to 3 it accepts most on the built-in pair, at 8 and at 16 nodes


class DynamicTreeProposer(Proposer):
    """Drafts the `nodes` nodes of highest path probability among those that it looked at.

    Level by level the top_k most probable paths are extended, each by its top_k tokens, down to
    `depth`; of all nodes seen on the way the most probable ones make the tree, ties going to the
    shallower. A budget below `nodes` is used up to the last node. For a deterministic tree the sum
    of its nodes' path probabilities under the target is the expected number of accepted tokens; the
    draft's own stand in for them. sharpness: the power that makes a token's probability its chance
    of being chosen. At temperature 0 the default is 2, because a draft that finds a token likely is
    surer still that it is the target's best; else it is 1.

    kind: "top_k" (the default, "auto"), or "coupled": tokens are ranked under the Gumbel noise of
    their position, which the rule gumbel reads too (2408.07978), and a path's confidence is that of
    the target's choice being off by as much noise again. Nothing is sampled: pruning by confidence
    is lossless for such nodes alone. One draft pass per level and one read from the device per
    step. The other options are those of the proposer draft.
    """

    name = "dynamic_tree"
    needs_draft = True
    by_level = False

    def __init__(
        self, runner: Runner, *, nodes: int = 24, depth: int = 6, top_k: int = 6,
        kind: str = "auto", sharpness: float | None = None, temperature: float | None = None,
        top_p: float | None = None, min_p: float | None = None, processors: bool = True,
    ) -> None:  # fmt: skip
        kinds = ("auto", *get_args(DynamicKind))
        if kind not in kinds:
            raise InvalidArgumentError(f"kind={kind!r}: expected one of {', '.join(kinds)}")
        for option, value, most in (
            ("nodes", nodes, MAX_NODES), ("depth", depth, MAX_NODES), ("top_k", top_k, MAX_NODES)
        ):  # fmt: skip
            if type(value) is not int or not 1 <= value <= most:
                raise InvalidArgumentError(f"{option}={value!r}: expected 1 to {most}")
        if (depth - 1) * top_k > MAX_NODES:
            raise InvalidArgumentError(
                f"depth={depth}, top_k={top_k}: the draft's last pass has {(depth - 1) * top_k} "
                f"rows, expected at most {MAX_NODES}; take fewer of either"
            )
        given: object = sharpness
        if given is not None and not (isinstance(given, int | float) and 0 < given <= 16):
            raise InvalidArgumentError(
                f"sharpness={sharpness!r}: expected a number up to 16, above 0"
            )
        self.nodes, self.depth, self.top_k = nodes, depth, top_k
        self.sharpness = sharpness
        self.kind = "top_k" if kind == "auto" else kind
        self.model = DraftModel(runner, processors, temperature, None, top_p, min_p)
        self.law = "coupled" if kind == "coupled" else "point"

    def join(self, group: CacheGroup, vocab_size: int) -> None:
        self.model.join(group, vocab_size)

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        return self.model.groups

    @property
    def max_positions(self) -> int | None:
        return self.model.runner.max_positions

    @property
    def preferred_nodes(self) -> int:
        return self.nodes

    @property
    def spare_slots(self) -> int:
        return max(self.nodes, (self.depth - 1) * self.top_k)

    def nodes_within(self, depth: int) -> int:
        """A tree is never deeper than it has nodes."""
        return self.nodes if depth >= self.depth else min(depth, self.nodes)

    def draft_rows(self, depth: int) -> tuple[int, ...]:
        return tuple(max(1, level * self.top_k) for level in range(min(depth, self.depth)))

    def start(self, sequence: Sequence) -> None:
        self.model.start(sequence)

    def finish(self, sequence: Sequence) -> None:
        self.model.finish(sequence)

    def propose(
        self, sequences: Items[Sequence], budgets: Items[int], noise: Noise
    ) -> list[TokenTree]:
        beams = [self._begin(s, b) for s, b in zip(sequences, budgets, strict=True)]
        while active := [its for its in beams if its.depth < its.levels]:
            rows = [its.next_pass(self.model) for its in active]
            for law, members, logits in by_law(active, self.model.score(rows)):
                self._extend(members, law, logits, noise)
        for its in beams:
            self.model.cut(its.sequence, 0)  # the lines are in other slots than the tree
        return [TokenTree(nodes.tokens, nodes.parents) for nodes in chosen(beams)]

    def _begin(self, sequence: Sequence, budget: int) -> Beams:
        width = min(self.top_k, budget, self.model.known_tokens)
        levels = min(self.depth, budget)
        law = self.model.law(sequence)
        return Beams(sequence, law, budget, width, levels, self.model.runner.device)

    def _extend(self, beams: list[Beams], law: Law, logits: Tensor, noise: Noise) -> None:
        """One more level for sequences of one law; logits (n, V)."""
        scores, confidence = self._ranked(beams, law, logits, noise)
        most = max(its.width for its in beams)
        tokens = self.model.largest(scores, most)
        gained = confidence.gather(1, tokens).double().clamp_max_(0)
        counts = [its.rows for its in beams]
        for its, its_tokens, its_gain in zip(
            beams, tokens.split(counts), gained.split(counts), strict=True
        ):
            k = its.width
            score = (its.score[:, None] + its_gain[:, :k]).flatten()
            flat = its_tokens[:, :k].flatten()
            numbers = its.record(flat, its.numbers.repeat_interleave(k), score)
            best = score.sort(descending=True, stable=True).indices[:k]
            its.go_on(best // k, flat[best], numbers[best], score[best], None)

    def _ranked(
        self, beams: list[Beams], law: Law, logits: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """What tokens are ranked by, and the logarithm of their chances; both (n, V)."""
        power = self.sharpness
        if law.greedy:
            scores = law.scores(logits, paths_of(beams))
            return scores, (scores * (power or _GREEDY_SHARPNESS)).log_softmax(-1)
        log_q = law.probabilities(logits, paths_of(beams)).log_()
        if self.kind == "top_k":
            return log_q, log_q if power is None else (log_q * power).log_softmax(-1)
        seeds = [its.sequence.seed for its in beams]
        where = [len(its.sequence.tokens) + its.depth for its in beams]
        shared = noise.gumbel(seeds, where, log_q.shape[1], log_q.device)
        each = [shared[i : i + 1].expand(its.rows, -1) for i, its in enumerate(beams)]
        scores = log_q.add_(torch.cat(each))
        return scores, (scores if power is None else scores * power).log_softmax(-1)
