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


_LISTS = "any tree; proposals iid, without replacement, deterministic, of several drafts or mixed"

RULES = {
    rule.name: rule
    for rule in (
        Rule("greedy", True, "any tree; temperature 0", "follow the target's argmax"),
        Rule("walk", True, "any tree", "sample from the target, follow the child that agrees"),
        Rule("token", True, "chains, sampled or deterministic", "one coin per drafted token"),
        Rule("block", True, "chains, sampled or deterministic", "one decision for the whole block"),
        Rule("recursive", True, _LISTS, "one coin per sibling, the rest of p after a rejection"),
        Rule("kseq", True, "trees whose siblings are iid from one law", "one threshold for all k"),
        Rule("traversal", True, _LISTS, "leaves first: one coin per node, for its whole path"),
        Rule("gumbel", True, "any tree", "the tokens of plain sampling with the same seed"),
        Rule("typical", False, "any tree", "the longest path of tokens that p finds likely enough"),
    )
}

__all__ = ["RULES", "Rule", "reference"]
