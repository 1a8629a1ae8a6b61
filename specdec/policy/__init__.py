"""How many tokens to draft, or none: decided on the host before anything of the step is drawn, from
past steps and measured costs only (contract: nothing drawn in a step decides what it keeps)."""

from collections.abc import Callable

from specdec.errors import InvalidArgumentError
from specdec.policy.base import (
    DEFAULT_DRAFT_TOKENS,
    MAX_DRAFT_TOKENS,
    Measure,
    Policy,
    Steady,
    checked_number,
    planned,
)
from specdec.policy.cost import CostPolicy
from specdec.policy.simple import ConfidencePolicy, ConstantPolicy, HeuristicPolicy

__all__ = [
    "DEFAULT_DRAFT_TOKENS", "MAX_DRAFT_TOKENS", "POLICIES", "ConfidencePolicy", "ConstantPolicy",
    "CostPolicy", "HeuristicPolicy", "Measure", "Policy", "Steady", "make_policy",
    "planned",
]  # fmt: skip

POLICIES = ("auto", "constant", "heuristic", "confidence", "cost")


def make_policy(policy: str | Policy, num_draft_tokens: int | str) -> Policy:
    """The policy behind wrap's arguments of these names; a number alone means a constant one."""
    if isinstance(policy, Policy):
        if num_draft_tokens != "auto":
            raise InvalidArgumentError(
                f"num_draft_tokens={num_draft_tokens!r}: expected 'auto' beside a Policy object"
            )
        return policy
    if policy not in POLICIES:
        raise InvalidArgumentError(
            f"policy={policy!r}: expected one of {', '.join(POLICIES)}, or a Policy"
        )
    if num_draft_tokens == "auto":
        return _BY_NAME[policy]()
    number = checked_number(num_draft_tokens, least=0)
    if policy in ("auto", "constant") or number == 0:
        return ConstantPolicy(number)
    if policy == "cost":
        return CostPolicy(number)
    if policy == "heuristic":
        return HeuristicPolicy(number)
    return ConfidencePolicy(num_draft_tokens=number)


_BY_NAME: dict[str, Callable[[], Policy]] = {
    "auto": CostPolicy, "cost": CostPolicy, "heuristic": HeuristicPolicy,
    "confidence": ConfidencePolicy, "constant": lambda: ConstantPolicy(DEFAULT_DRAFT_TOKENS),
}  # fmt: skip
