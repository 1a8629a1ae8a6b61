"""The rejection-sampling core: reference.py is the definition, batched.py the fast form."""

from dataclasses import dataclass

from specdec.acceptance import reference


@dataclass(frozen=True, slots=True)
class Rule:
    """One acceptance rule."""

    name: str
    lossless: bool
    drafts: str  # what it accepts
    summary: str


RULES = {
    rule.name: rule
    for rule in (
        Rule("greedy", True, "any tree; temperature 0", "follow the target's argmax"),
        Rule("token", True, "chains, sampled or deterministic", "one coin per drafted token"),
        Rule("block", True, "chains, sampled or deterministic", "one decision for the whole block"),
        Rule("gumbel", True, "any tree", "the tokens of plain sampling with the same seed"),
    )
}

__all__ = ["RULES", "Rule", "reference"]
