"""Which laws, trees and parameters a rule is defined for; everything else is refused by name.

What was drawn from which law is the caller's word: a law that is wrong but possible cannot be told
from a right one. Refused is what no right draft of the rule's kind would say.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction

from specdec.acceptance.node import Node, Probability
from specdec.errors import InvalidArgumentError, InvalidLawError

_TOLERANCE = 1e-6  # of a sum
_SAME = 1e-9  # of two laws' entries: laws computed twice in float64

_CHAIN_RULES = ("block", "token")
_SIBLING_RULES = ("recursive", "traversal")  # they read each sibling's own conditional law
_Q_RULES = (*_CHAIN_RULES, *_SIBLING_RULES, "kseq")
_RULES = sorted((*_Q_RULES, "greedy", "gumbel", "typical", "walk"))

Law = Sequence[Probability]


def check(rule: str, root: Node, *, lossy: bool, params: Mapping[str, float]) -> None:
    """Raises InvalidArgumentError for an unknown rule, a parameter it does not take or a lossy rule
    without lossy=True, InvalidLawError for laws and trees that it is not defined for."""
    if rule not in _RULES:
        raise InvalidArgumentError(f"rule={rule!r}: expected one of {', '.join(_RULES)}")
    _check_params(rule, params)
    if rule == "typical" and not lossy:
        raise InvalidArgumentError(
            "rule 'typical' is lossy: it changes the text's law; pass lossy=True if that is fine"
        )
    for name, node in _named(root):
        _check_node(rule, name, node, len(root.p))


def _check_params(rule: str, params: Mapping[str, float]) -> None:
    known = ("eps", "delta") if rule == "typical" else ()
    for name, value in params.items():
        if name not in known:
            raise InvalidArgumentError(f"rule {rule!r} takes no parameter {name!r}")
        if not 0 < value <= 1:  # NaN too
            raise InvalidArgumentError(f"{name}={value}: expected a number in (0, 1]")


def _named(root: Node) -> list[tuple[str, Node]]:
    """Every node once, with its path; duplicate siblings share their child."""
    found, seen = [("root", root)], {id(root)}
    for name, node in found:  # grows while it is read
        for token, _, child in node.proposals:
            if id(child) not in seen:
                seen.add(id(child))
                found.append((f"{name}/{token}", child))
    return found


def _check_node(rule: str, name: str, node: Node, size: int) -> None:
    """greedy, gumbel, walk and typical never read q, so there it may be None; a q that is given
    must be a law that the drafted token has mass in."""
    _check_law(rule, name, "the target's law", node.p, size)
    if rule in _CHAIN_RULES and len(node.proposals) > 1:
        raise InvalidLawError(rule, name, f"{len(node.proposals)} children; it judges chains")
    for token, q, _ in node.proposals:
        below = f"{name}/{token}"
        if not 0 <= token < size:
            raise InvalidLawError(rule, below, f"token {token} is not in 0..{size - 1}")
        if q is None and rule in _Q_RULES:
            raise InvalidLawError(rule, below, "the draft's law q is missing")
        if q is not None:
            _check_law(rule, below, "the draft's law", q, size)
            if not q[token] > 0:
                raise InvalidLawError(rule, below, "the drafted token has no mass in its law q")
    if rule == "kseq":
        _check_iid(name, node)
    if rule in _SIBLING_RULES:
        _check_without_replacement(rule, name, node)


def _check_law(rule: str, node: str, what: str, law: Law, size: int) -> None:
    if len(law) != size:
        raise InvalidLawError(rule, node, f"{what} has length {len(law)}, the root's has {size}")
    if any(not x >= 0 for x in law):  # NaN fails every comparison
        raise InvalidLawError(rule, node, f"{what} has a negative or NaN entry")
    if not abs(sum(law) - 1) <= _TOLERANCE:
        raise InvalidLawError(rule, node, f"{what} sums to {float(sum(law)):.6g}, not 1")


def _check_iid(name: str, node: Node) -> None:
    """k-SEQ counts on siblings that are iid: without replacement its bias is large (0.35)."""
    for token, q, _ in node.proposals[1:]:
        if not _equal(q, node.proposals[0][1]):
            raise InvalidLawError(
                "kseq", f"{name}/{token}",
                "its law differs from the first sibling's; siblings must be iid from one law",
            )  # fmt: skip


def _check_without_replacement(rule: str, name: str, node: Node) -> None:
    """Refuses a draw without replacement whose law still has mass at an earlier one of its draft.

    A law counts as such a draw when it is an earlier sibling's law with drawn tokens taken out and
    the rest scaled up. The tokens taken out must then be exactly those that one draft drew before,
    starting from that law, besides tokens proposed deterministically; or all that came earlier.
    Laws of unrelated drafts are not restrictions of one another, and several drafts that share a
    law are kept apart, so lists of several or mixed drafts pass. A list that is refused without
    need: iid draws from the rest of a law after a draw from the whole of it.
    """
    drafts: list[tuple[Law, set[int]]] = []  # per draft its first law and what it drew so far
    fixed, earlier = set[int](), set[int]()
    for token, q, _ in node.proposals:
        if sum(x > 0 for x in q) == 1:
            fixed.add(token)  # deterministic, or the last token left: right in either case
        else:
            taken = _taken_out(q, [law for law, _ in drafts], earlier)
            owners = [drawn for law, drawn in drafts if taken and _follows(q, law, drawn, fixed)]
            if owners:
                owners[0].add(token)
            elif taken and any(q[t] > 0 for t in earlier):
                raise InvalidLawError(
                    rule, f"{name}/{token}",
                    "its law is drawn without replacement but has mass at an earlier sibling; "
                    "set that token to zero and scale the rest to sum to one",
                )  # fmt: skip
            else:
                drafts.append((q, {token}))
        earlier.add(token)


def _taken_out(q: Law, laws: list[Law], earlier: set[int]) -> set[int]:
    """The earlier tokens that q lacks of the first of the laws it is a restriction of."""
    for law in laws:
        missing = {t for t, x in enumerate(q) if x == 0 and law[t] > 0}
        if missing <= earlier and _equal(q, _without(law, missing)):
            return missing
    return set()


def _follows(q: Law, law: Law, drawn: set[int], fixed: set[int]) -> bool:
    """Whether q is what a draft that started at `law` and drew `drawn` draws from next."""
    missing = {t for t, x in enumerate(q) if x == 0 and law[t] > 0}
    return drawn <= missing <= drawn | fixed and _equal(q, _without(law, missing))


def _without(law: Law, tokens: set[int]) -> list[Probability]:
    rest = [0 if t in tokens else x for t, x in enumerate(law)]
    total = sum(rest)
    return [x / total for x in rest] if total > 0 else rest


def _equal(a: Law, b: Law) -> bool:
    if all(isinstance(x, (Fraction, int)) for x in (*a, *b)):
        return list(a) == list(b)
    return all(abs(x - y) <= _SAME for x, y in zip(a, b, strict=True))
