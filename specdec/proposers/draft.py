"""A small draft model proposes a chain (Leviathan et al. 2023, 2211.17192; Chen et al. 2023,
2302.01318), over the same slots of the same pages as the target."""

from collections.abc import Callable, Sequence as Items
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.acceptance.batched import sample
from specdec.cache import CacheGroup
from specdec.proposers.base import Proposer
from specdec.rng import Noise, StepNoise
from specdec.runner import Runner, SequenceRows
from specdec.sampling import Law, Paths, Prefix, SamplingParams
from specdec.sequence import Sequence
from specdec.tree import TokenTree


class DraftModelProposer(Proposer):
    """Drafts token by token with a model of the target's vocabulary.

    Where the two vocabularies differ by padding rows, the draft's law is cut or padded with zeros:
    a token that the target does not have is never drafted.

    The draft samples by the target's law unless it is told otherwise: temperature, top_k, top_p and
    min_p replace the target's own (temperature 0 drafts its best token), processors=False leaves
    the processors before them to the target. Any setting is lossless: q is the law that a token was
    drawn from. Greedy targets are drafted for greedily.
    """

    name = "draft"
    needs_draft = True
    law = "sampled"

    def __init__(
        self, runner: Runner, *, temperature: float | None = None, top_k: int | None = None,
        top_p: float | None = None, min_p: float | None = None, processors: bool = True,
    ) -> None:  # fmt: skip
        self.runner = runner
        self._vocab_size = runner.vocab_size
        own = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        self._own = {name: value for name, value in own.items() if value is not None}
        SamplingParams(**self._own)  # type: ignore[arg-type]  # raises for values out of range
        self._processors = processors
        self._laws: WeakKeyDictionary[Law, Law] = WeakKeyDictionary()

    def join(self, group: CacheGroup, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.runner.join(group)

    @property
    def max_positions(self) -> int | None:
        return self.runner.max_positions

    def propose(
        self, sequences: Items[Sequence], budgets: Items[int], noise: Noise
    ) -> list[TokenTree]:
        device = self.runner.device
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
            drafted = self._pick(sequences, active, logits, rows, level, coins, tokens, laws)
        return [
            self._tree(t, q) if t else TokenTree.empty(device)
            for t, q in zip(tokens, laws, strict=True)
        ]

    def _law(self, sequence: Sequence) -> Law:
        """What a sequence's tokens are drafted from: the target's law under the draft's options."""
        law = sequence.law
        own = {} if law.greedy else dict(self._own)
        if not own and self._processors:
            return law
        if law not in self._laws:
            greedy = law.greedy or own.get("temperature") == 0
            if greedy:
                own["temperature"] = 1.0
            self._laws[law] = law.truncated(
                replace(law.truncation, **own),  # type: ignore[arg-type]
                greedy=greedy,
                processors=self._processors,
            )
        return self._laws[law]

    def _coins(self, sequences: Items[Sequence], depth: int, noise: Noise) -> StepNoise | None:
        if all(self._law(s).greedy for s in sequences):
            return None
        device = torch.device("cpu")
        seeds, positions = [s.seed for s in sequences], [len(s.tokens) for s in sequences]
        return noise.step(seeds, positions, depth + 1, device)

    def _next_logits(
        self, sequences: Items[Sequence], active: Items[int], drafted: Tensor | None
    ) -> Tensor:
        """One pass: what the draft has not computed yet, then the token drafted last."""
        rows = []
        for row, i in enumerate(active):
            cache = sequences[i].cache
            if drafted is None:
                pending = sequences[i].tokens[cache.computed_len(self.runner) :]
                # A padding row that only the target has: any token will do, what is drafted behind
                # it is judged like everything else.
                known = [t if t < self.runner.vocab_size else 0 for t in pending]
                rows.append(SequenceRows(cache, known, keep=1))
            else:
                rows.append(SequenceRows(cache, (), drafted[row : row + 1], keep=1))
        logits = self.runner.score(rows)
        extra = self._vocab_size - logits.shape[1]
        if extra < 0:
            return logits[:, : self._vocab_size]
        return F.pad(logits, (0, extra), value=float("-inf")) if extra else logits

    def _pick(
        self, sequences: Items[Sequence], active: Items[int], logits: Tensor,
        rows: Items[int] | None, level: int, coins: StepNoise | None,
        tokens: list[list[Tensor]], laws: list[list[Tensor]],
    ) -> Tensor:  # fmt: skip
        """Chooses one token per active sequence, (len(active),), and records it with its law."""
        by_law: dict[Law, list[int]] = {}
        for row, i in enumerate(active):
            by_law.setdefault(self._law(sequences[i]), []).append(row)
        if len(by_law) == 1:
            [law] = by_law
            its_own = [sequences[i] for i in active]
            paths = _paths(its_own, [tokens[i] for i in active], logits.device)
            picked, q = self._pick_rows(law, logits, paths, rows, level, coins)
            self._record(active, picked, q, tokens, laws)
            return picked
        picked = torch.empty(len(active), dtype=torch.long, device=logits.device)
        for law, members in by_law.items():
            chosen = [active[row] for row in members]
            its_own = [sequences[i] for i in chosen]
            paths = _paths(its_own, [tokens[i] for i in chosen], logits.device)
            where = [rows[row] if rows is not None else row for row in members]
            part, q = self._pick_rows(law, logits[members], paths, where, level, coins)
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

    @staticmethod
    def _pick_rows(
        law: Law, logits: Tensor, paths: Callable[[], Paths], rows: Items[int] | None,
        level: int, coins: StepNoise | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if law.greedy:
            return law.best(logits, paths), None
        q = law.probabilities(logits, paths)
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
