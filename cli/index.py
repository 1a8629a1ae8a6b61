"""specdec index: make and look at the files that the proposer `retrieval` drafts from."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from specdec.cli.console import is_terminal, to_stdout
from specdec.cli.models import load_tokenizer
from specdec.proposers.retrieval_build import (
    MAX_SHARD_TOKENS,
    SHARD_TOKENS,
    Progress,
    build_index,
)
from specdec.proposers.retrieval_index import RetrievalIndex


@click.group()
def index() -> None:
    """Make and check the files that --proposer retrieval drafts from."""


@index.command()
@click.argument("corpus", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--tokenizer",
    default="big",
    show_default=True,
    help="That of the target: big, a folder or a hub name.",
)
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="The file to write.")
@click.option(
    "--field", default="text", show_default=True, help="Where the lines of *.jsonl have their text."
)
@click.option(
    "--shard-tokens",
    type=click.IntRange(1, MAX_SHARD_TOKENS),
    default=SHARD_TOKENS,
    show_default=True,
    help="Sorted together, at some 48 bytes of memory each; more shards mean longer searches.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object as output.")
def build(
    corpus: tuple[str, ...], tokenizer: str, out: str, field: str, shard_tokens: int, as_json: bool
) -> None:
    """Index the text of CORPUS, one or more files of text or JSON lines (*.jsonl)."""
    loaded = load_tokenizer("tokenizer", tokenizer)
    with _bar() as progress:
        build_index(corpus, loaded, out, field=field, shard_tokens=shard_tokens, progress=progress)
    _report(RetrievalIndex(out), as_json)


@index.command()
@click.argument("path", metavar="INDEX", type=click.Path(exists=True, dir_okay=False))
@click.option("--check", is_flag=True, help="Read all of it and compare its checksums.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object as output.")
def info(path: str, check: bool, as_json: bool) -> None:
    """Say what INDEX holds, and whether it is whole."""
    opened = RetrievalIndex(path)
    if check:
        opened.check_contents()
    _report(opened, as_json)


def _report(opened: RetrievalIndex, as_json: bool) -> None:
    header = opened.header
    if as_json:
        facts = {
            "path": opened.path, "tokens": header.num_tokens, "vocab_size": header.vocab_size,
            "tokenizer": header.tokenizer, "shards": header.num_shards,
            "shard_tokens": header.shard_tokens, "depth": header.depth,
            "bytes": header.file_bytes, "version": header.version,
        }  # fmt: skip
        to_stdout(json.dumps(facts) + "\n")
        return
    shards = "1 shard" if header.num_shards == 1 else f"{header.num_shards} shards"
    to_stdout(
        f"{Path(opened.path).name}: {header.num_tokens} tokens in {shards}, vocabulary of "
        f"{header.vocab_size}, {header.file_bytes / 1e6:.1f} MB\n"
    )


@contextmanager
def _bar() -> Iterator[Progress]:
    """A bar per kind of work, where someone looks on."""
    bars: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in bars:
            unit = "B" if what == "reading" else "token"
            bars[what] = tqdm(
                total=total, desc=what, unit=unit, unit_scale=True,
                disable=not is_terminal(sys.stderr), leave=False,
            )  # fmt: skip
        bars[what].update(done - bars[what].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()
