"""Builds index files for retrieval from text or JSON lines, in bounded memory."""

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence as Items
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from specdec.errors import InvalidArgumentError
from specdec.proposers.retrieval_index import (
    HEADER_BYTES,
    SUFFIX_DTYPE,
    VERSION,
    Header,
    tokenizer_fingerprint,
)

SHARD_TOKENS = 1 << 24
MAX_SHARD_TOKENS = 1 << 30
DEPTH = 32
_CHUNK = 1 << 18  # characters that are tokenized together
_MOST_SHORT = 0xFFFF  # the separator of two-byte tokens

Progress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much
AnyPath = str | os.PathLike[str]


def build_index(
    corpus: Items[AnyPath], tokenizer: Any, out: AnyPath, *, field: str = "text",
    shard_tokens: int = SHARD_TOKENS, progress: Progress | None = None,
) -> Header:  # fmt: skip
    """Tokenizes files of UTF-8 text and writes their index, whole or not at all.

    A file is one document; of a file *.jsonl every line is one, an object whose `field` is its
    text. No draft goes past the end of a document. Memory: some 48 bytes per token of a shard, and
    the longest line of JSON; more shards mean longer searches. Raises InvalidArgumentError for
    files that cannot be read, are binary or malformed, and where all of them hold no text, or none
    but white space.
    """
    if not corpus:
        raise InvalidArgumentError("corpus: expected at least one file")
    for path in corpus:
        if Path(out).exists() and Path(path).exists() and Path(out).samefile(path):
            raise InvalidArgumentError(f"out={os.fspath(out)!r}: it is the corpus")
    pieces = _tokenized(_not_blank(_pieces(corpus, field, progress)), tokenizer)
    # ids may have gaps, so that their number says too little
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    return write_index(
        out, pieces, vocab_size=vocab_size, tokenizer=tokenizer_fingerprint(tokenizer),
        shard_tokens=shard_tokens, progress=progress,
    )  # fmt: skip


def write_index(
    out: AnyPath, pieces: Iterable[tuple[list[int], bool]], *, vocab_size: int, tokenizer: str = "",
    shard_tokens: int = SHARD_TOKENS, progress: Progress | None = None,
) -> Header:  # fmt: skip
    """Writes the index of token sequences, given as (tokens, whether a document ends there).

    Raises InvalidArgumentError where there is no token, or one that is not below vocab_size.
    """
    if type(shard_tokens) is not int or not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        raise InvalidArgumentError(f"shard_tokens={shard_tokens!r}: expected 1 to 2**30")
    dtype = np.dtype("<u2" if vocab_size < _MOST_SHORT else "<u4")
    part = Path(f"{os.fspath(out)}.part")
    try:
        file = part.open("w+b")
    except OSError as error:
        raise InvalidArgumentError(f"out={os.fspath(out)!r}: {error.strerror}") from error
    try:
        with file:
            file.seek(HEADER_BYTES)
            count, tokens_sha256 = _write_tokens(file, pieces, dtype, vocab_size)
            suffixes_sha256 = _write_suffixes(file, part, dtype, count, shard_tokens, progress)
            header = Header(
                VERSION, dtype.str, vocab_size, tokenizer, count, shard_tokens, DEPTH,
                tokens_sha256, suffixes_sha256,
            )  # fmt: skip
            file.seek(0)
            file.write(header.pack())
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return header


def suffix_array(tokens: NDArray[Any], depth: int) -> NDArray[np.int64]:
    """Suffixes sorted by their first `depth` tokens or more, one that ends before another first, of
    equals the earlier first: prefix doubling (Manber and Myers, 1993)."""
    order = np.argsort(tokens, kind="stable")
    rank, known = _ranks(tokens[order], order), 1
    while known < depth and rank.max() < len(rank):
        key = rank.astype(np.int64)
        key *= len(rank) + 1
        key[:-known] += rank[known:]
        order = np.argsort(key, kind="stable")
        key = key[order]
        rank, known = _ranks(key, order), 2 * known
    return order


def _ranks(ordered: NDArray[Any], order: NDArray[np.int64]) -> NDArray[np.int32]:
    """1 for the smallest, the same for equals; 0 is left for what is past the end."""
    steps = np.ones(len(ordered), np.int32)
    steps[1:] = ordered[1:] != ordered[:-1]
    rank = np.empty(len(ordered), np.int32)
    rank[order] = np.cumsum(steps, out=steps)
    return rank


def _write_tokens(
    file: BinaryIO,
    pieces: Iterable[tuple[list[int], bool]],
    dtype: np.dtype[Any],
    vocab_size: int,
) -> tuple[int, str]:
    """How many tokens, separators included, and their checksum with the padding behind them."""
    digest, count, is_open = hashlib.sha256(), 0, False
    separator = [np.iinfo(dtype).max]
    for tokens, ends in pieces:
        if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
            bad = next(token for token in tokens if not 0 <= token < vocab_size)
            raise InvalidArgumentError(
                f"token {bad}: expected 0 to {vocab_size - 1}, the vocabulary's"
            )
        is_open = is_open or bool(tokens)
        if is_open:
            data = np.array([*tokens, *(separator if ends else ())], dtype)
            count += len(data)
            digest.update(data.tobytes())
            file.write(data.tobytes())
        is_open = is_open and not ends
    if count == 0:
        raise InvalidArgumentError("corpus: it holds no text; expected at least one token")
    padding = bytes(-file.tell() % 8)
    digest.update(padding)
    file.write(padding)
    return count, digest.hexdigest()


def _write_suffixes(
    file: BinaryIO, path: Path, dtype: np.dtype[Any], count: int, shard_tokens: int,
    progress: Progress | None,
) -> str:  # fmt: skip
    """Sorts one shard after the other; the checksum."""
    file.flush()
    digest = hashlib.sha256()
    tokens = np.memmap(path, dtype, "r", HEADER_BYTES, (count,))
    for begin in range(0, count, shard_tokens):
        if progress is not None:
            progress("sorting", begin, count)
        shard = np.asarray(tokens[begin : begin + shard_tokens])
        data = suffix_array(shard, DEPTH).astype(SUFFIX_DTYPE).tobytes()
        digest.update(data)
        file.write(data)
        del data  # not beside the next shard's
    if progress is not None:
        progress("sorting", count, count)
    return digest.hexdigest()


def _tokenized(
    pieces: Iterable[tuple[str, bool]], tokenizer: Any
) -> Iterator[tuple[list[int], bool]]:
    """Tokens of each piece, many pieces at a time."""
    held: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece[0])
        if size >= _CHUNK:
            yield from _tokens(held, tokenizer)
            held, size = [], 0
    yield from _tokens(held, tokenizer)


def _tokens(pieces: list[tuple[str, bool]], tokenizer: Any) -> Iterator[tuple[list[int], bool]]:
    if pieces:
        texts = [text for text, _ in pieces]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        yield from zip(encoded, (ends for _, ends in pieces), strict=True)


def _pieces(
    corpus: Items[AnyPath], field: str, progress: Progress | None
) -> Iterator[tuple[str, bool]]:
    """(text, whether a document ends there)."""
    try:
        sizes = [Path(path).stat().st_size for path in corpus]
    except OSError as error:
        raise InvalidArgumentError(f"corpus {error.filename!r}: {error.strerror}") from error
    before = 0
    for path, size in zip(corpus, sizes, strict=True):
        read = _json_lines if Path(path).suffix == ".jsonl" else _text
        try:
            with Path(path).open("rb") as file:
                for text, ends in read(file, field):
                    if progress is not None:
                        progress("reading", before + file.tell(), sum(sizes))
                    yield text, ends
        except OSError as error:
            raise InvalidArgumentError(f"corpus {os.fspath(path)!r}: {error.strerror}") from error
        except _BadCorpusError as error:
            raise InvalidArgumentError(f"corpus {os.fspath(path)!r}, {error}") from error
        before += size


def _not_blank(pieces: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """The same. Raises InvalidArgumentError behind the last where all were white space."""
    kinds = set[bool]()
    for text, ends in pieces:
        if text:
            kinds.add(text.isspace())
        yield text, ends
    if kinds == {True}:
        raise InvalidArgumentError("corpus: it holds no text but white space")


class _BadCorpusError(Exception):
    """Where in a file, and what is wrong there."""


def _text(file: BinaryIO, field: str) -> Iterator[tuple[str, bool]]:
    """Whole lines, where they are not too long."""
    del field
    decoder = codecs.getincrementaldecoder("utf-8")()
    while True:
        begin = file.tell() - len(decoder.getstate()[0])
        data = file.read(_CHUNK) + file.readline(_CHUNK)
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise _BadCorpusError(f"byte {begin + error.start}: it is not UTF-8 text") from error
        if "\0" in text:
            raise _BadCorpusError("it holds a zero byte: expected text, not a binary file")
        yield text, not data
        if not data:
            return


def _json_lines(file: BinaryIO, field: str) -> Iterator[tuple[str, bool]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _BadCorpusError(f"line {number}: it is not JSON: {error}") from error
        text = value.get(field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise _BadCorpusError(f"line {number}: expected an object with a text {field!r}")
        if "\0" in text or any("\ud800" <= mark <= "\udfff" for mark in text):
            raise _BadCorpusError(f"line {number}: {field!r} is not text")
        yield text, True
