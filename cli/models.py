"""Names on the command line -> models and tokenizers: built-in, local folder or hub."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from specdec import zoo
from specdec.errors import InvalidArgumentError

DTYPES = {
    "auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip


def location(name: str) -> str:
    """The folder or hub name behind a model argument."""
    if name in zoo.NAMES:
        return str(zoo.path(name))
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InvalidArgumentError(f"{name!r} is a folder without a config.json")
    return name


def load_model(role: str, name: str, dtype: str, device: str) -> PreTrainedModel:
    """The model of this name, in evaluation mode. Raises InvalidArgumentError for a bad name."""
    where = location(name)
    with _announced(f"loading {role} {name}"), _named_errors(role, name):
        config = AutoConfig.from_pretrained(where)
        if config.is_encoder_decoder:
            raise InvalidArgumentError(
                f"--{role} {name}: {type(config).__name__} is an encoder-decoder; specdec needs a "
                "causal LM"
            )
        model = AutoModelForCausalLM.from_pretrained(where, dtype=DTYPES[dtype])
    try:
        return model.to(device).eval()  # type: ignore[no-any-return]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InvalidArgumentError(f"--device {device}: {reason}") from error


def load_tokenizer(role: str, name: str) -> Any:
    """The tokenizer beside the model of this name."""
    with _named_errors(role, name):
        return AutoTokenizer.from_pretrained(location(name))


def check_same_vocabulary(target: Any, draft: Any, names: tuple[str, str]) -> None:
    """Raises InvalidArgumentError unless both tokenizers give every token the same id."""
    first, second = target.get_vocab(), draft.get_vocab()
    if first == second:
        return
    different = [t for t in first.keys() | second.keys() if first.get(t) != second.get(t)]
    raise InvalidArgumentError(
        f"--draft {names[1]}: its tokenizer differs from that of --target {names[0]} in "
        f"{len(different)} tokens (for example {min(different)!r}); expected the same vocabulary"
    )


@contextlib.contextmanager
def _named_errors(role: str, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        if isinstance(error, OSError) and not Path(name).exists():
            raise InvalidArgumentError(
                f"--{role} {name!r}: no built-in model ({', '.join(zoo.NAMES)}), no folder, and no "
                "hub model that can be reached by that name"
            ) from error
        reason = str(error).strip().splitlines()[0]
        raise InvalidArgumentError(f"--{role} {name!r}: {reason}") from error


@contextlib.contextmanager
def _announced(what: str) -> Iterator[None]:
    """Says on a terminal what takes its time; transformers' own bars only get in the way."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    shown = sys.stderr.isatty()
    if shown:
        click.echo(click.style(f"{what} …", dim=True), err=True, nl=False)
    try:
        yield
    finally:
        if shown:
            click.echo("\r\x1b[K", err=True, nl=False)
