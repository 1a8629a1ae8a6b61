"""One sequence in flight: its tokens, where it stands in the cache, how it is sampled."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from specdec.cache import CachedSequence
from specdec.sampling import Law
from specdec.stats import RunStats

StopCheck = Callable[[list[int]], bool]  # all tokens so far -> stop after the last one?


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable state of one sample of one request; the engine owns it."""

    request_id: str
    index: int
    tokens: list[int]  # prompt and committed tokens; the last one is not in the cache yet
    prompt_len: int
    law: Law
    seed: int  # 64 bit
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    stop: StopCheck | None
    cache: CachedSequence
    keep_cache: bool = False  # leave the pages open when it is over, for a next turn
    left_padding: int = 0  # as transformers counted it; only length-based processors look
    finish_reason: str | None = None
    logits: list[Tensor] | None = None  # the target's rows of emitted tokens; None: not kept
    stats: RunStats = field(default_factory=RunStats)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def remaining(self) -> int:
        """Tokens that may still be emitted."""
        return self.max_new_tokens - self.generated

    def append(self, emitted: list[int]) -> list[int]:
        """Commits emitted tokens up to the first stop, sets finish_reason, returns those kept."""
        for count, token in enumerate(emitted, 1):
            self.tokens.append(token)
            if token in self.eos_token_ids or (self.stop is not None and self.stop(self.tokens)):
                self.finish_reason = "stop"
            elif self.remaining == 0:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                return emitted[:count]
        return emitted
