"""How many tokens to draft: decided on the host before anything of the step is drawn."""

from abc import ABC, abstractmethod

from specdec.errors import InvalidArgumentError
from specdec.sequence import Sequence


class Policy(ABC):
    """Chooses each sequence's draft length for the coming step from past steps only."""

    @abstractmethod
    def budget(self, sequence: Sequence) -> int:
        """Nodes that may be drafted; 0 means plain decoding. The engine cuts it to what fits."""


class ConstantPolicy(Policy):
    """The same number of drafted tokens in every step."""

    def __init__(self, num_draft_tokens: int) -> None:
        if num_draft_tokens < 0:
            raise InvalidArgumentError(
                f"num_draft_tokens={num_draft_tokens}: expected 0 or more, or 'auto'"
            )
        self.num_draft_tokens = num_draft_tokens

    def budget(self, sequence: Sequence) -> int:
        del sequence
        return self.num_draft_tokens


DEFAULT_DRAFT_TOKENS = 4


def make_policy(policy: str, num_draft_tokens: int | str) -> Policy:
    """The policy behind wrap's arguments of these names."""
    if policy not in ("auto", "constant"):
        raise InvalidArgumentError(f"policy={policy!r}: expected 'auto' or 'constant'")
    if num_draft_tokens == "auto":
        return ConstantPolicy(DEFAULT_DRAFT_TOKENS)
    if not isinstance(num_draft_tokens, int) or isinstance(num_draft_tokens, bool):
        raise InvalidArgumentError(
            f"num_draft_tokens={num_draft_tokens!r}: expected a whole number or 'auto'"
        )
    return ConstantPolicy(num_draft_tokens)
