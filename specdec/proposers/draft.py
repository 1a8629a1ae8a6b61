"""A small draft model proposes a chain (Leviathan et al. 2023, 2211.17192; Chen et al. 2023,
2302.01318), over the same slots of the same pages as the target."""

from collections.abc import Callable, Sequence as Items
from typing import Any

import torch
from torch import Tensor

from specdec.acceptance.batched import sample
from specdec.cache import CacheGroup
from specdec.errors import InvalidArgumentError
from specdec.proposers.base import Proposer
from specdec.proposers.model import DraftModel
from specdec.rng import Noise, StepNoise
from specdec.runner import Runner, SequenceRows
from specdec.sampling import Law, Paths, Prefix
from specdec.sequence import Sequence
from specdec.tree import TokenTree
from specdec.verifier import Verdict


class DraftModelProposer(Proposer):
    """Drafts token by token with a model of the target's vocabulary.

    Options, all lossless, since q is the law that a token was drawn from: temperature, top_k,
    top_p and min_p replace the target's own (temperature 0 drafts its best token),
    processors=False leaves the processors before them to the target. kind="coupled" draws each
    token with the Gumbel noise of its position that the rule gumbel reads too (Daliri et al. 2024,
    2408.07978), instead of "sampled" (the default, "auto"; with the rule gumbel it is "coupled").
    tokenizer and draft_tokenizer, where they differ: those of target and draft; it drafts the
    tokens that both have.
    """

    name = "draft"
    needs_draft = True
    can_stop = True

    def __init__(
        self, runner: Runner, *, kind: str = "auto", temperature: float | None = None,
        top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        processors: bool = True, tokenizer: Any = None, draft_tokenizer: Any = None,
    ) -> None:  # fmt: skip
        kinds = ("auto", "sampled", "coupled")
        if kind not in kinds:
            raise InvalidArgumentError(f"kind={kind!r}: expected one of {', '.join(kinds)}")
        self.law = "coupled" if kind == "coupled" else "sampled"
        self.runner = runner
        self.model = DraftModel(
            runner, processors, temperature, top_k, top_p, min_p, tokenizer, draft_tokenizer
        )

    def join(self, group: CacheGroup, vocab_size: int) -> None:
        self.model.join(group, vocab_size)

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        return self.model.groups

    def start(self, sequence: Sequence) -> None:
        self.model.start(sequence)

    def observe(self, sequences: Items[Sequence], verdicts: Items[Verdict]) -> None:
        self.model.observe(sequences, verdicts)

    def finish(self, sequence: Sequence) -> None:
        self.model.finish(sequence)

    @property
    def max_positions(self) -> int | None:
        return self.model.max_positions

    def draft_rows(self, depth: int) -> tuple[int, ...]:
        return (1,) * depth

    def propose(
        self, sequences: Items[Sequence], budgets: Items[int], noise: Noise
    ) -> list[TokenTree]:
        device = self.runner.device
        budgets = self.model.within(sequences, budgets)
        depth = max(budgets, default=0)
        if depth == 0:
            return [TokenTree.empty(device) for _ in sequences]
        live = [i for i, budget in enumerate(budgets) if budget > 0]
        coins = self._coins([sequences[i] for i in live], depth, noise)
        tokens: list[list[Tensor]] = [[] for _ in sequences]
        laws: list[list[Tensor]] = [[] for _ in sequences]
        active, drafted = live, None
        for level in range(depth):
            if level:
                still = [row for row, i in enumerate(active) if budgets[i] > level]
                assert drafted is not None
                if len(still) < len(active):
                    drafted = drafted[torch.tensor(still, device=device)]
                    active = [active[row] for row in still]
            logits = self._next_logits(sequences, active, drafted)
            rows = [live.index(i) for i in active] if len(active) < len(live) else None
            gumbel = self._shared_noise([sequences[i] for i in active], level, logits, noise)
            drafted = self._pick(
                sequences, active, logits, rows, level, coins, gumbel, tokens, laws
            )
            if self.stop_below and level + 1 < depth:
                going_on = self._confident(active, logits, drafted, laws)
                drafted = drafted[going_on]
                active = [i for i, on in zip(active, going_on.tolist(), strict=True) if on]
                if not active:
                    break
        return [
            self._tree(t, q) if t else TokenTree.empty(device)
            for t, q in zip(tokens, laws, strict=True)
        ]

    def _confident(
        self, active: Items[int], logits: Tensor, drafted: Tensor, laws: list[list[Tensor]]
    ) -> Tensor:
        """Which drafts go on: those whose last token, (len(active),), was likely enough. It stays
        in the draft either way (contract C3). Read on the host once per level."""
        chances = logits.softmax(-1).gather(1, drafted[:, None])[:, 0]
        for row, i in enumerate(active):
            if laws[i]:
                chances[row] = laws[i][-1][0, drafted[row]]
        return chances >= self.stop_below

    def _coins(self, sequences: Items[Sequence], depth: int, noise: Noise) -> StepNoise | None:
        if self.law == "coupled" or all(self.model.law(s).greedy for s in sequences):
            return None
        device = self.model.runner.device
        seeds, positions = [s.seed for s in sequences], [len(s.tokens) for s in sequences]
        return noise.step(seeds, positions, depth + 1, device)

    def _shared_noise(
        self, sequences: Items[Sequence], level: int, logits: Tensor, noise: Noise
    ) -> Tensor | None:
        """(n, V) what the target's own tokens at these positions are drawn with."""
        if self.law != "coupled" or all(self.model.law(s).greedy for s in sequences):
            return None
        seeds, positions = [s.seed for s in sequences], [len(s.tokens) + level for s in sequences]
        return noise.gumbel(seeds, positions, logits.shape[1], logits.device)

    def _next_logits(
        self, sequences: Items[Sequence], active: Items[int], drafted: Tensor | None
    ) -> Tensor:
        """One pass: what the draft has not computed yet, then the token drafted last."""
        rows = []
        for row, i in enumerate(active):
            if drafted is None:
                rows.append(self.model.pending(sequences[i]))
            else:
                cache = self.model.cache(sequences[i])
                rows.append(SequenceRows(cache, (), drafted[row : row + 1], keep=1))
        return self.model.score(rows)

    def _pick(
        self, sequences: Items[Sequence], active: Items[int], logits: Tensor,
        rows: Items[int] | None, level: int, coins: StepNoise | None, gumbel: Tensor | None,
        tokens: list[list[Tensor]], laws: list[list[Tensor]],
    ) -> Tensor:  # fmt: skip
        """Chooses one token per active sequence, (len(active),), and records it with its law."""
        by_law: dict[Law, list[int]] = {}
        for row, i in enumerate(active):
            by_law.setdefault(self.model.law(sequences[i]), []).append(row)
        if len(by_law) == 1:
            [law] = by_law
            its_own = [sequences[i] for i in active]
            paths = _paths(its_own, [tokens[i] for i in active], logits.device)
            picked, q = self._pick_rows(law, logits, paths, rows, level, coins, gumbel)
            self._record(active, picked, q, tokens, laws)
            return picked
        picked = torch.empty(len(active), dtype=torch.long, device=logits.device)
        for law, members in by_law.items():
            chosen = [active[row] for row in members]
            its_own = [sequences[i] for i in chosen]
            paths = _paths(its_own, [tokens[i] for i in chosen], logits.device)
            where = [rows[row] if rows is not None else row for row in members]
            shared = gumbel[members] if gumbel is not None else None
            part, q = self._pick_rows(law, logits[members], paths, where, level, coins, shared)
            self._record(chosen, part, q, tokens, laws)
            picked[members] = part
        return picked

    @staticmethod
    def _record(
        chosen: Items[int], picked: Tensor, q: Tensor | None, tokens: list[list[Tensor]],
        laws: list[list[Tensor]],
    ) -> None:  # fmt: skip
        for row, i in enumerate(chosen):
            tokens[i].append(picked[row : row + 1])
            if q is not None:
                laws[i].append(q[row : row + 1])

    def _pick_rows(
        self, law: Law, logits: Tensor, paths: Callable[[], Paths], rows: Items[int] | None,
        level: int, coins: StepNoise | None, gumbel: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if law.greedy:
            return law.best(logits, paths), None
        q = law.probabilities(logits, paths)
        if gumbel is not None:
            return q.log().add_(gumbel)[:, : self.model.known_ids].argmax(-1), None
        assert coins is not None
        uniforms = coins.draft[:, level + 1]
        if rows is not None:
            uniforms = uniforms[list(rows)]
        return sample(q, uniforms), q

    @staticmethod
    def _tree(tokens: list[Tensor], laws: list[Tensor]) -> TokenTree:
        chain = torch.cat(tokens) if len(tokens) > 1 else tokens[0]
        if not laws:
            return TokenTree.chain(chain)
        return TokenTree.chain(chain, torch.cat(laws) if len(laws) > 1 else laws[0])


def _paths(
    sequences: Items[Sequence], drawn: Items[Items[Tensor]], device: torch.device
) -> Callable[[], Paths]:
    """Each sequence's tokens and what was drafted behind them, all to the same level."""

    def paths() -> Paths:
        prefixes = [Prefix(s.tokens, s.prompt_len, s.left_padding) for s in sequences]
        depth = len(drawn[0])
        flat = [token for line in drawn for token in line]
        drafted = torch.cat(flat) if flat else torch.empty(0, dtype=torch.long, device=device)
        lines = [(i, range(i * depth, (i + 1) * depth)) for i in range(len(sequences))]
        return Paths.of(prefixes, drafted, lines)

    return paths
