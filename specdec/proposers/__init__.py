"""Everything that can guess the next tokens: base.py is the protocol, one method per file, and here
is where a method is found by its name."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from inspect import Parameter, signature
from typing import Any

from specdec.errors import InvalidArgumentError, SpecDecError
from specdec.proposers.base import Proposer
from specdec.proposers.beam_tree import BeamTreeProposer
from specdec.proposers.checked import class_fault, constructor_fault
from specdec.proposers.draft import DraftModelProposer
from specdec.proposers.dynamic_tree import DynamicTreeProposer
from specdec.proposers.ensemble import EnsembleProposer, labels_of
from specdec.proposers.lookahead import LookaheadProposer
from specdec.proposers.ngram import NgramProposer
from specdec.proposers.retrieval import RetrievalProposer
from specdec.proposers.suffix import SuffixProposer
from specdec.proposers.text import TextDraftProposer
from specdec.proposers.tree import DraftTreeProposer
from specdec.runner import Runner

_BUILT_IN: tuple[type[Proposer], ...] = (
    DraftModelProposer,
    DraftTreeProposer,
    EnsembleProposer,
    LookaheadProposer,
    DynamicTreeProposer,
    BeamTreeProposer,
    NgramProposer,
    RetrievalProposer,
    SuffixProposer,
    TextDraftProposer,
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
    "EnsembleProposer",
    "LookaheadProposer",
    "NgramProposer",
    "Proposer",
    "RetrievalProposer",
    "SuffixProposer",
    "TextDraftProposer",
    "find",
    "make",
    "make_several",
    "names",
]


def names() -> list[str]:
    """Every name that wrap(proposer=...) knows: built-in ones and those of plug-ins, sorted."""
    return sorted({*REGISTRY, *_plug_ins()})


def find(name: str) -> type[Proposer]:
    """The class of this name. Raises InvalidArgumentError for an unknown name, and for a plug-in
    that cannot be imported, is no Proposer, or lacks what one must have."""
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
    if kind is EnsembleProposer:
        return make_several(name, [] if draft is None else [draft], options)
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
    try:
        return build(draft, **options) if kind.needs_draft else build(**options)
    except Exception as error:
        if isinstance(error, SpecDecError) or name in REGISTRY:
            raise
        raise InvalidArgumentError(
            f"proposer={name!r}: its constructor failed with proposer_options={options!r}: "
            f"{_said(error)}"
        ) from error


def make_several(
    proposer: str | Sequence[str | Proposer], drafts: Sequence[Runner], options: dict[str, Any],
    kinds: Mapping[str, str] | None = None,
) -> EnsembleProposer:  # fmt: skip
    """An ensemble of proposers, given by name or as objects.

    proposer: a list; members that need a draft take the drafts in order. Its options are those of
    the ensemble, and per label a mapping with those of the member. A name alone means one member
    per draft, with the same options; "ensemble" the list in options["members"], by default one
    "draft" per draft and an "ngram". kinds: by name, the option kind where none is given. Raises
    InvalidArgumentError.
    """
    options = dict(options)

    def made(name: str, draft: Runner | None, its: dict[str, Any]) -> Proposer:
        kind = (kinds or {}).get(name)
        return make(name, draft, {"kind": kind, **its} if kind else its)

    if proposer == EnsembleProposer.name:
        usual = [*[DraftModelProposer.name] * len(drafts), "ngram"]
        proposer = options.pop("members", usual)
    own = {name: options.pop(name) for name in option_names(EnsembleProposer) if name in options}
    if isinstance(proposer, str):
        return EnsembleProposer([made(proposer, draft, options) for draft in drafts], **own)
    members = _members(proposer)
    names = [member if isinstance(member, str) else member.name for member in members]
    labels = labels_of(names)
    its_options = _by_label(options, members, labels, names)
    needing = [i for i, m in enumerate(members) if isinstance(m, str) and find(m).needs_draft]
    if len(needing) != len(drafts):
        raise InvalidArgumentError(
            f"proposer={names}: {len(needing)} of them need a draft, {len(drafts)} came; expected "
            "draft=[...] with one for each, in this order"
        )
    its_draft = dict(zip(needing, drafts, strict=True))
    return EnsembleProposer(
        [
            made(m, its_draft.get(i), its_options.get(labels[i], {})) if isinstance(m, str) else m
            for i, m in enumerate(members)
        ],
        **own,
    )


def _members(proposer: object) -> list[str | Proposer]:
    """A checked list of members."""
    members = list(proposer) if isinstance(proposer, list | tuple) else []
    if not members or not all(isinstance(m, str | Proposer) for m in members):
        raise InvalidArgumentError(
            f"proposer={proposer!r}: expected a list of names and Proposers, one or more"
        )
    if any(m == EnsembleProposer.name for m in members):
        raise InvalidArgumentError(f"proposer={proposer!r}: an ensemble cannot be in an ensemble")
    return members


def _by_label(
    options: dict[str, Any], members: list[str | Proposer], labels: list[str], names: list[str]
) -> dict[str, dict[str, Any]]:
    """Each member's options, from those of a list."""
    made = [label for label, m in zip(labels, members, strict=True) if isinstance(m, str)]
    for key, value in options.items():
        if key not in made:
            several = key in names and key not in labels
            reason = f"{key!r} is there several times" if several else f"{key!r} is no member"
            own = ", ".join(option_names(EnsembleProposer))
            raise InvalidArgumentError(
                f"proposer_options={options!r}: {reason}: expected options by member, for "
                f"{', '.join(made) or 'none'}, or {own}"
            )
        if not isinstance(value, Mapping):
            raise InvalidArgumentError(
                f"proposer_options[{key!r}]={value!r}: expected a mapping, the member's options"
            )
    return {key: dict(value) for key, value in options.items()}


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
    plug_in = f"proposer={point.name!r}: the plug-in {point.value}"
    try:
        found = point.load()
    except Exception as error:  # whatever its module runs into
        raise InvalidArgumentError(f"{plug_in} cannot be imported: {_said(error)}") from error
    if not (isinstance(found, type) and issubclass(found, Proposer)):
        raise InvalidArgumentError(f"{plug_in} is no subclass of specdec.Proposer")
    fault = class_fault(found) or constructor_fault(found)
    if fault:
        raise InvalidArgumentError(f"{plug_in} breaks the protocol: {fault}")
    return found


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
