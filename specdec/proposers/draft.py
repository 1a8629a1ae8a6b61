"""A small draft model proposes a chain (Leviathan et al. 2023, 2211.17192; Chen et al. 2023,
2302.01318), over the same slots of the same pages as the target."""

from collections.abc import Callable, Sequence as Items

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.acceptance.batched import sample
from specdec.cache import CacheGroup
from specdec.proposers.base import Proposer
from specdec.rng import Noise, StepNoise
from specdec.runner import Runner, SequenceRows
from specdec.sampling import Law, Path
from specdec.sequence import Sequence
from specdec.tree import TokenTree


class DraftModelProposer(Proposer):
    """Drafts token by token with a model of the target's vocabulary.

    Where the two vocabularies differ by padding rows, the draft's law is cut or padded with zeros:
    a token that the target does not have is never drafted.
    """

    name = "draft"
    law = "sampled"

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._vocab_size = runner.vocab_size

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

    @staticmethod
    def _coins(sequences: Items[Sequence], depth: int, noise: Noise) -> StepNoise | None:
        if all(s.law.greedy for s in sequences):
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
        first = sequences[active[0]].law
        if all(sequences[i].law is first for i in active) and not first.by_path:
            picked, q = self._pick_rows(first, logits, list, 0, rows, level, coins)
        else:
            parts = []
            for row, i in enumerate(active):
                sequence = sequences[i]
                where = [rows[row] if rows is not None else row]

                def path(s: Sequence = sequence, drawn: list[Tensor] = tokens[i]) -> list[Path]:
                    return [[*s.tokens, *(int(t) for t in drawn)]]

                parts.append(
                    self._pick_rows(
                        sequence.law, logits[row : row + 1], path, sequence.left_padding, where,
                        level, coins,
                    )
                )  # fmt: skip
            picked = torch.cat([p for p, _ in parts])
            q = None
            for i, (_, law) in zip(active, parts, strict=True):
                if law is not None:
                    laws[i].append(law)
        for row, i in enumerate(active):
            tokens[i].append(picked[row : row + 1])
            if q is not None:
                laws[i].append(q[row : row + 1])
        return picked

    @staticmethod
    def _pick_rows(
        law: Law, logits: Tensor, paths: Callable[[], list[Path]], padding: int,
        rows: Items[int] | None, level: int, coins: StepNoise | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if law.greedy:
            return law.best(logits, paths, padding), None
        q = law.probabilities(logits, paths, padding)
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
