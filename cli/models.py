"""Names on the command line -> models and tokenizers: built-in, local folder or hub."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from specdec import zoo
from specdec.cli.console import is_terminal, remark
from specdec.errors import InvalidArgumentError, UnsupportedModelError
from specdec.runner import check_supported

DTYPES = {
    "auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip


def location(role: str, name: str) -> str:
    """The folder or hub name behind a model argument."""
    if name in zoo.NAMES:
        return str(zoo.path(name))
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise InvalidArgumentError(f"--{role} {name!r}: the folder has no config.json")
    return name


def check_device(device: str) -> None:
    """Raises InvalidArgumentError for a device that torch cannot use here."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # a CPU build of torch asserts
        raise InvalidArgumentError(f"--device {device!r}: {_first_line(error)}") from error


def load_model(role: str, name: str, dtype: str, device: str) -> PreTrainedModel:
    """The model of this name, in evaluation mode. Raises InvalidArgumentError for a bad name."""
    where = location(role, name)
    with announced(f"loading the {role}, {name} …"), _named_errors(role, name):
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        if config.is_encoder_decoder:
            raise InvalidArgumentError(
                f"--{role} {name!r}: {type(config).__name__} is an encoder-decoder; specdec needs "
                "a causal LM"
            )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, dtype=DTYPES[dtype], trust_remote_code=False, output_loading_info=True
        )
        model, found = loaded
        if found["missing_keys"]:
            raise InvalidArgumentError(
                f"--{role} {name!r}: {len(found['missing_keys'])} weights are not in its files, "
                f"for example {min(found['missing_keys'])}"
            )
        check_supported(model)
        placed: PreTrainedModel = model.to(device).eval()
        return placed


def load_tokenizer(role: str, name: str) -> Any:
    """The tokenizer beside the model of this name."""
    with announced(f"loading the {role}'s tokenizer …"), _named_errors(role, name):
        return AutoTokenizer.from_pretrained(location(role, name), trust_remote_code=False)


def tokenizer_options(target: Any, draft: Any) -> dict[str, Any]:
    """What a proposer must know of the two tokenizers: nothing where every token has one id."""
    if target.get_vocab() == draft.get_vocab():
        return {}
    return {"tokenizer": target, "draft_tokenizer": draft}


@contextlib.contextmanager
def _named_errors(role: str, name: str) -> Iterator[None]:
    """What loading raises -> an error that names the argument."""
    try:
        yield
    except InvalidArgumentError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and not Path(name).exists():
            raise InvalidArgumentError(
                f"--{role} {name!r}: no built-in model ({', '.join(zoo.NAMES)}), no folder, and no "
                "hub model that can be reached by that name"
            ) from error
        raise InvalidArgumentError(f"--{role} {name!r}: {_first_line(error)}") from error
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"--{role} {name!r}: {error}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Says on a terminal what takes its time; the libraries' own bars and lines get in the way."""
    hub_logging.set_verbosity(logging.ERROR)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    shown = is_terminal(sys.stderr)
    if shown:
        remark(what, newline=False)
    try:
        yield
    finally:
        if shown:
            click.echo("\r\x1b[K", err=True, nl=False)
