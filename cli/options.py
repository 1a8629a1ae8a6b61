"""Options that several commands share, and the pair of models that they name."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from specdec import proposers
from specdec.acceptance import RULES
from specdec.cli.inputs import member_options
from specdec.cli.models import (
    DTYPES,
    check_device,
    load_model,
    load_tokenizer,
    tokenizer_options,
)
from specdec.engine import PAGE_SIZE, Engine
from specdec.errors import InvalidArgumentError
from specdec.evals import prompts as prompt_sets
from specdec.evals.contenders import Speculation
from specdec.policy import POLICIES
from specdec.proposers import RetrievalProposer
from specdec.shapes import expansion

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]

# rules of commands that look at lossless ones only
LOSSLESS = ["auto", *(name for name, rule in RULES.items() if rule.lossless)]


def draft_tokens(ctx: click.Context, param: click.Parameter, value: str) -> Any:
    """A number, or 'auto'."""
    if value == "auto":
        return value
    if not value.isdecimal():
        raise click.BadParameter(
            f"{value!r} is neither a whole number from 0 on nor 'auto'.", ctx, param
        )
    return int(value)


def tree_shape(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """K1,K2,... -> widths by level."""
    if value is None:
        return None
    parts = value.split(",")
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"{value!r}: expected numbers such as 3,2,1.", ctx, param)
    return expansion([int(part) for part in parts])


def named_values(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, Any]:
    """NAME=VALUE -> a number, true, false or a list where the value is one, else text."""
    options: dict[str, Any] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise click.BadParameter(f"{text!r}: expected NAME=VALUE.", ctx, param)
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def each_once(
    ctx: click.Context, param: click.Parameter, values: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Refuses a value that is there twice: its row would be measured twice, under one name."""
    for index, value in enumerate(values):
        if value in values[:index]:
            raise click.BadParameter(f"{value}: expected each once.", ctx, param)
    return values


def named_speculations(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[Speculation, ...]:
    """What each names, with a length or shape."""
    return tuple(map(Speculation.parse, each_once(ctx, param, values)))


def check_members(options: dict[str, dict[str, Any]], speculations: Sequence[Speculation]) -> None:
    """Raises InvalidArgumentError for options of a proposer that no row has."""
    members = list(dict.fromkeys(name for each in speculations for name in each.members))
    for name, its in options.items():
        if name not in members:
            raise InvalidArgumentError(
                f"--proposer-option {name}.{next(iter(its))}: expected a proposer of the rows, "
                f"{', '.join(members) or 'which have none'}"
            )


class ProposerName(click.Choice[str]):
    """A proposer by name, or several behind each other: an ensemble."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "," not in value:
            return super().convert(value, param, ctx)
        return [super(ProposerName, self).convert(name, param, ctx) for name in value.split(",")]


def _stacked(*options: Decorator) -> Decorator:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


pair_options = _stacked(
    click.option(
        "--target", default="big", show_default=True,
        help="Model whose law is kept: big, a folder or a hub name.",
    ),
    click.option(
        "--draft", default=None,
        help="Small model; its tokenizer may be another one.  [default: small with --target big]",
    ),
)  # fmt: skip

dtype_option = click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="auto", show_default=True,
    help="Of the weights; auto is as stored.",
)  # fmt: skip

model_options = _stacked(
    pair_options,
    dtype_option,
    click.option("--device", default=None, help="cpu, cuda, …  [default: cuda where there is one]"),
)

temperature_option = click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True,
    help="0 is greedy decoding.",
)  # fmt: skip

truncation_options = _stacked(
    click.option(
        "--top-k", type=click.IntRange(min=0), default=0, show_default=True,
        help="0 keeps all tokens.",
    ),
    click.option(
        "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
        help="Keep the likeliest tokens that have this mass.",
    ),
    click.option(
        "--min-p", type=click.FloatRange(0, 1), default=0.0, show_default=True,
        help="Drop tokens less likely than this share of the likeliest.",
    ),
)  # fmt: skip


def count_option(name: str, default: int, text: str, *, least: int = 1) -> Decorator:
    """A whole number; text: its help."""
    kind = click.IntRange(min=least)
    return click.option(name, type=kind, default=default, show_default=True, help=text)


def row_options(default: tuple[str, ...] = ()) -> Decorator:
    """--proposer, as `speculations`, one row each, and --proposer-option, as `options`.

    default: the rows unless some are given; none: those that make sense for the models.
    """
    others = "" if default else "  [default: what makes sense for the pair]"
    return _stacked(
        click.option(
            "--proposer", "speculations", multiple=True, callback=named_speculations,
            default=default, show_default=bool(default), metavar="NAME|NAME:N|tree:K1,K2,…",
            help="A row: what drafts, with a fixed length or shape where one is given; names with "
            f"commas between them share one tree; may be repeated.{others}",
        ),
        click.option(
            "--proposer-option", "options", multiple=True, callback=member_options,
            metavar="NAME.OPTION=VALUE",
            help="An option of a proposer, such as ngram.max_ngram=3; may be repeated.",
        ),
    )  # fmt: skip


def with_tokenizer(
    options: dict[str, dict[str, Any]], speculations: Sequence[Speculation], tokenizer: Any
) -> dict[str, dict[str, Any]]:
    """Options of proposers, by name: retrieval checks its index against the target's tokenizer."""
    name = RetrievalProposer.name
    if not any(name in each.members for each in speculations):
        return options
    return {**options, name: {"tokenizer": tokenizer, **options.get(name, {})}}


def prompt_options(limit: int, *, several: bool, more: str = "") -> Decorator:
    """--prompts, as `sources` where several may be named, else `source`; --column and --limit.

    limit: what it is unless given. more: a sentence on what is done with prompts.
    """
    sets = f"A set ({', '.join(prompt_sets.names())}), or a .jsonl or text file"
    known = "heldout_code"
    return _stacked(
        click.option(
            "--prompts", "sources" if several else "source", multiple=several,
            default=(known,) if several else known, show_default=True,
            callback=each_once if several else None,
            help=f"{sets}{'; may be repeated' if several else ''}. {more}".rstrip(),
        ),
        click.option(
            "--column", default=None, help="Where the objects of a .jsonl file have their text."
        ),
        click.option(
            "--limit", type=click.IntRange(min=1), default=limit, show_default=True,
            help="Prompts of each set at most." if several else "Prompts at most.",
        ),
    )  # fmt: skip


seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True
)

out_option = click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path),
    help="Keep raw figures in this folder; a run that was interrupted is resumed there.",
)  # fmt: skip


def json_option(instead_of: str = "a table") -> Decorator:
    return click.option(
        "--json", "as_json", is_flag=True, help=f"Print JSON instead of {instead_of}."
    )


draft_options = _stacked(
    click.option(
        "--num-draft-tokens", callback=draft_tokens, metavar="N|auto", default="auto",
        show_default=True, help="Tokens drafted per step.",
    ),
    click.option(
        "--tree", callback=tree_shape, metavar="K1,K2,…", default=None,
        help="Draft a tree: children of each token, level by level.  [default: a chain]",
    ),
    click.option(
        "--draft-window", type=click.IntRange(min=PAGE_SIZE), metavar="N", default=None,
        help="The draft sees the last N tokens and the first few.  [default: all]",
    ),
    click.option(
        "--proposer", type=ProposerName(proposers.names()), default=None,
        help="What drafts; several with commas between them share one tree.  [default: draft, "
        "where there is one]",
    ),
    click.option(
        "--proposer-option", "proposer_options", multiple=True, callback=named_values,
        metavar="NAME=VALUE",
        help="An option of what drafts, such as max_ngram=3; may be repeated.",
    ),
    click.option(
        "--policy", type=click.Choice(POLICIES), default="auto", show_default=True,
        help="How much to draft; auto keeps to a number that is given, else to what measured costs "
        "make quickest, of a tree its first levels or none.",
    ),
    click.option(
        "--verification", type=click.Choice(["auto", *RULES]), default="auto", show_default=True,
        help="The rule that accepts or rejects.",
    ),
    click.option(
        "--lossy", is_flag=True, help="Allow a rule that changes what the target says."
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pair:
    """Loaded models, and what else makes an engine of them."""

    names: dict[str, str | None]
    tokenizer: Any
    target: Any
    draft: Any
    options: dict[str, Any]  # of Engine

    def engine(self) -> Engine:
        return Engine(self.target, draft=self.draft, grow=True, **self.options)

    def plain(self) -> Engine:
        """Of the target alone."""
        return Engine(self.target, grow=True)

    @property
    def context(self) -> int | None:
        """Tokens that the target has positions for."""
        found = getattr(self.target.config.get_text_config(), "max_position_embeddings", None)
        return None if found is None else int(found)


def load_pair(
    target: str, draft: str | None, dtype: str, device: str | None, *,
    no_speculation: bool = False, **options: Any,
) -> Pair:  # fmt: skip
    """options: of Engine; draft None: small with big, where anything needs it."""
    proposer, its_options = options.get("proposer"), dict(options.get("proposer_options") or {})
    if draft is None and target == "big" and not no_speculation and wants_draft(proposer):
        draft = "small"
    tokenizer = load_tokenizer("target", target)
    if proposer == RetrievalProposer.name:
        its_options["tokenizer"] = tokenizer
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(where)
    if draft is not None:
        its_own = tokenizer_options(tokenizer, load_tokenizer("draft", draft))
        if its_own and isinstance(proposer, list):
            raise InvalidArgumentError(
                f"--draft {draft!r}: its tokenizer differs from the target's; expected the same "
                "where several proposers share a tree"
            )
        its_options = {**its_own, **its_options}
    model = load_model("target", target, dtype, where)
    small = load_model("draft", draft, dtype, where) if draft is not None else None
    names = {"target": target, "draft": draft}
    return Pair(names, tokenizer, model, small, {**options, "proposer_options": its_options})


def wants_draft(proposer: str | list[str] | None) -> bool:
    """Whether some of these draft with a model."""
    if proposer is None:
        return True
    names = [proposer] if isinstance(proposer, str) else proposer
    return any(proposers.find(name).needs_draft for name in names)


def end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """End tokens: those of the model's generation config, else the tokenizer's."""
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, Sequence) else (int(eos),)
