"""Everything that can guess the next tokens: base.py is the protocol, one method per file, and here
is where a method is found by its name."""

from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from inspect import Parameter, signature
from typing import Any

from specdec.errors import InvalidArgumentError
from specdec.proposers.base import Proposer
from specdec.proposers.beam_tree import BeamTreeProposer
from specdec.proposers.draft import DraftModelProposer
from specdec.proposers.dynamic_tree import DynamicTreeProposer
from specdec.proposers.lookahead import LookaheadProposer
from specdec.proposers.ngram import NgramProposer
from specdec.proposers.retrieval import RetrievalProposer
from specdec.proposers.suffix import SuffixProposer
from specdec.proposers.tree import DraftTreeProposer
from specdec.runner import Runner

_BUILT_IN: tuple[type[Proposer], ...] = (
    DraftModelProposer,
    DraftTreeProposer,
    LookaheadProposer,
    DynamicTreeProposer,
    BeamTreeProposer,
    NgramProposer,
    RetrievalProposer,
    SuffixProposer,
)
REGISTRY: dict[str, type[Proposer]] = {proposer.name: proposer for proposer in _BUILT_IN}
# Other packages add theirs as entry points of this group; a built-in name stays what it is.
PLUG_INS = "specdec.proposers"

__all__ = [
    "REGISTRY",
    "BeamTreeProposer",
    "DraftModelProposer",
    "DraftTreeProposer",
    "DynamicTreeProposer",
    "LookaheadProposer",
    "NgramProposer",
    "Proposer",
    "RetrievalProposer",
    "SuffixProposer",
    "find",
    "make",
    "names",
]


def names() -> list[str]:
    """Every name that wrap(proposer=...) knows: built-in ones and those of plug-ins, sorted."""
    return sorted({*REGISTRY, *_plug_ins()})


def find(name: str) -> type[Proposer]:
    """The class of this name. Raises InvalidArgumentError for an unknown name, and for a plug-in
    that cannot be imported or is no Proposer."""
    if name in REGISTRY:
        return REGISTRY[name]
    if name not in _plug_ins():
        raise InvalidArgumentError(
            f"proposer={name!r}: expected one of {', '.join(names())}, or a Proposer"
        )
    return _load(_plug_ins()[name])


def make(name: str, draft: Runner | None, options: dict[str, Any]) -> Proposer:
    """A proposer by name: its class called with the draft, where it needs one, and the options.

    Raises InvalidArgumentError for an unknown name or option, an option that is missing, a draft
    that is missing or not needed; the class itself for values that are out of range.
    """
    kind = find(name)
    if kind.needs_draft and draft is None:
        raise InvalidArgumentError(f"proposer={name!r} needs draft=<a small model>")
    if not kind.needs_draft and draft is not None:
        raise InvalidArgumentError(f"proposer={name!r} has no use for a draft; leave draft out")
    known = option_names(kind)
    for option in options:
        if option not in known:
            raise InvalidArgumentError(
                f"proposer_options={options!r}: {option!r} is no option of proposer={name!r}: "
                f"expected {', '.join(known) or 'none'}"
            )
    for option, is_required in known.items():
        if is_required and option not in options:
            raise InvalidArgumentError(
                f"proposer={name!r} needs proposer_options={{{option!r}: ...}}"
            )
    build: Callable[..., Proposer] = kind
    return build(draft, **options) if kind.needs_draft else build(**options)


def option_names(kind: type[Proposer]) -> dict[str, bool]:
    """The options of a proposer, its constructor's keyword-only arguments: name -> required."""
    return {
        p.name: p.default is Parameter.empty
        for p in signature(kind).parameters.values()
        if p.kind is Parameter.KEYWORD_ONLY
    }


@lru_cache(maxsize=1)
def _plug_ins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=PLUG_INS)}


def _load(point: EntryPoint) -> type[Proposer]:
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise InvalidArgumentError(
            f"proposer={point.name!r}: the plug-in {point.value} cannot be imported: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Proposer)):
        raise InvalidArgumentError(
            f"proposer={point.name!r}: the plug-in {point.value} is no subclass of specdec.Proposer"
        )
    return found
