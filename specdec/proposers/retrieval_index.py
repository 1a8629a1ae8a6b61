"""A datastore of token sequences in one memory-mapped file: tokens and their suffix arrays (REST,
He et al. 2023, 2311.08252)."""

import hashlib
import json
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence as Items
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from specdec.errors import InvalidArgumentError

MAGIC = b"SDINDEX\n"
VERSION = 1
HEADER_BYTES = 4096
SUFFIX_DTYPE = np.dtype("<u4")
_DIGEST_BYTES = 32
_READ_BYTES = 1 << 24
CHECKED_BYTES = 64 << 20  # a file of at most so many is read and checked when it is opened


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself. It holds, little-endian: HEADER_BYTES of magic, SHA-256 and JSON;
    the tokens; from the next multiple of 8 on, per shard, its suffixes as offsets into it."""

    version: int
    token_dtype: str  # "<u2" or "<u4"; its largest value separates documents
    vocab_size: int  # every token is below it
    tokenizer: str  # tokenizer_fingerprint, empty: unknown
    num_tokens: int  # separators included
    shard_tokens: int  # of every shard but the last
    depth: int  # tokens by which suffixes are sorted, at least
    tokens_sha256: str
    suffixes_sha256: str

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_tokens", "shard_tokens", "depth"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}")
        if self.token_dtype not in ("<u2", "<u4"):
            raise ValueError(f"token_dtype is {self.token_dtype!r}")

    @property
    def suffixes_at(self) -> int:
        """Byte where the suffixes begin."""
        end = HEADER_BYTES + self.num_tokens * np.dtype(self.token_dtype).itemsize
        return -(-end // 8) * 8

    @property
    def file_bytes(self) -> int:
        return self.suffixes_at + self.num_tokens * SUFFIX_DTYPE.itemsize

    @property
    def num_shards(self) -> int:
        return -(-self.num_tokens // self.shard_tokens)

    def pack(self) -> bytes:
        """The first HEADER_BYTES of the file."""
        body = json.dumps(asdict(self)).encode()
        body = body.ljust(HEADER_BYTES - len(MAGIC) - _DIGEST_BYTES)
        return MAGIC + hashlib.sha256(body).digest() + body

    @staticmethod
    def unpack(data: bytes) -> "Header":
        """Raises ValueError with the reason for anything but a header of this version."""
        if not data.startswith(MAGIC):
            raise ValueError("it does not begin like one")
        if len(data) < HEADER_BYTES:
            raise ValueError("it ends within its header")
        digest, body = data[len(MAGIC) :][:_DIGEST_BYTES], data[len(MAGIC) + _DIGEST_BYTES :]
        if hashlib.sha256(body).digest() != digest:
            raise ValueError("its header is damaged: the checksum does not match")
        try:
            fields = json.loads(body)
        except RecursionError as error:
            raise ValueError("its header is nested") from error
        if not isinstance(fields, dict):
            raise ValueError("its header is no JSON object")
        if fields.get("version") != VERSION:
            raise ValueError(f"its version is {fields.get('version')}, not {VERSION}")
        return Header(**fields)


class Match(NamedTuple):
    """Where the end of a text occurs: per shard the suffixes `low` to `high` (excluded)."""

    length: int  # tokens of the text's end
    ranges: tuple[tuple[int, int, int], ...]  # (shard, low, high)

    @property
    def total(self) -> int:
        """Occurrences."""
        return sum(high - low for _, low, high in self.ranges)


NO_MATCH = Match(0, ())


class RetrievalIndex:
    """An index file, memory-mapped: size, version and the header's checksum are checked; of a file
    of at most CHECKED_BYTES the contents too, of a larger one, which is opened without being read,
    when `check_contents` is called.

    A search costs a binary search of each shard per halving of the longest length; the pages that
    it touches stay in the operating system's cache, and nowhere else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises InvalidArgumentError, naming the argument, for a file that is missing, damaged, of
        another version or of another kind."""
        self.path = os.fspath(path)
        try:
            with Path(path).open("rb") as file:
                self.header = Header.unpack(file.read(HEADER_BYTES))
                size = os.fstat(file.fileno()).st_size
        except (OSError, ValueError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise self._refusal(reason or str(error)) from error
        if size != self.header.file_bytes:
            raise self._refusal(f"it has {size} bytes, its header says {self.header.file_bytes}")
        if size <= CHECKED_BYTES:
            self.check_contents()
        header = self.header
        tokens = np.memmap(path, header.token_dtype, "r", HEADER_BYTES, (header.num_tokens,))
        suffixes = np.memmap(path, SUFFIX_DTYPE, "r", header.suffixes_at, (header.num_tokens,))
        starts = range(0, header.num_tokens, header.shard_tokens)
        # plain views: indexing a memmap costs several times as much
        self._tokens = [np.asarray(tokens[i : i + header.shard_tokens]) for i in starts]
        self._suffixes = [np.asarray(suffixes[i : i + header.shard_tokens]) for i in starts]

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raises InvalidArgumentError unless the index was made with this tokenizer."""
        if not hasattr(tokenizer, "get_vocab"):
            raise InvalidArgumentError(f"tokenizer={tokenizer!r}: expected that of the target")
        if self.header.tokenizer != tokenizer_fingerprint(tokenizer):
            raise InvalidArgumentError(
                f"index={self.path!r}: it was made with another tokenizer than the target's; build "
                "it with --tokenizer <the target>"
            )

    def check_contents(self) -> None:
        """Reads the whole file once, in constant memory. Raises InvalidArgumentError where the
        contents are not those that were written."""
        header = self.header
        with Path(self.path).open("rb") as file:
            for what, begin, end, wanted in (
                ("tokens", HEADER_BYTES, self.header.suffixes_at, header.tokens_sha256),
                ("suffixes", header.suffixes_at, header.file_bytes, header.suffixes_sha256),
            ):
                file.seek(begin)
                digest = hashlib.sha256()
                for at in range(begin, end, _READ_BYTES):
                    digest.update(file.read(min(_READ_BYTES, end - at)))
                if digest.hexdigest() != wanted:
                    raise self._refusal(f"its {what} are damaged: the checksum does not match")

    def longest_match(self, text: Items[int], least: int, most: int) -> Match:
        """The longest end of a text, of least to most tokens, that occurs, and where. most is at
        most header.depth."""
        most = min(most, len(text))
        length = least - 1
        for shard in range(len(self._tokens)):
            if length < most and self._occurs(shard, text, length + 1):
                # what occurs of length n occurs of every smaller one
                length, high = length + 1, most
                while length < high:
                    middle = (length + high + 1) // 2
                    if self._occurs(shard, text, middle):
                        length = middle
                    else:
                        high = middle - 1
        if length < least:
            return NO_MATCH
        end = list(text[len(text) - length :])
        spans = ((shard, *self._span(shard, end)) for shard in range(len(self._tokens)))
        return Match(length, tuple(span for span in spans if span[1] < span[2]))

    def continuations(self, match: Match, count: int, length: int) -> list[list[int]]:
        """At most `count` continuations of at most `length` tokens; none goes past its document.

        Of more occurrences than that, which are sorted by what follows, evenly spaced ones: so each
        continuation is there about in proportion to its occurrences.
        """
        total = match.total
        count = min(count, total)
        picks = (np.arange(count) * total + total // 2) // max(count, 1)
        found: list[list[int]] = []
        for shard, low, high in match.ranges:
            here = picks[picks < high - low]
            picks = picks[len(here) :] - (high - low)
            found += self._following(shard, self._suffixes[shard][low + here], match.length, length)
        return found

    def _following(
        self, shard: int, suffixes: NDArray[Any], skip: int, length: int
    ) -> list[list[int]]:
        tokens = self._tokens[shard]
        at = suffixes.astype(np.int64)[:, None] + np.arange(skip, skip + length)
        inside = at < len(tokens)
        rows = np.where(inside, tokens[np.where(inside, at, 0)], self.header.vocab_size)
        # a separator, the shard's end or damage
        ends = np.append(rows >= self.header.vocab_size, np.ones((len(rows), 1), bool), axis=1)
        return [row[:end] for row, end in zip(rows.tolist(), ends.argmax(1).tolist(), strict=True)]

    def _occurs(self, shard: int, text: Items[int], length: int) -> bool:
        pattern = list(text[len(text) - length :])
        suffixes, begins_with = self._suffixes[shard], self._reader(shard, length)
        at = bisect_left(range(len(suffixes)), pattern, key=begins_with)
        return at < len(suffixes) and begins_with(at) == pattern

    def _span(self, shard: int, pattern: list[int]) -> tuple[int, int]:
        """The suffixes that begin with a pattern."""
        every, key = range(len(self._suffixes[shard])), self._reader(shard, len(pattern))
        low = bisect_left(every, pattern, key=key)
        return low, bisect_right(every, pattern, low, key=key)

    def _reader(self, shard: int, length: int) -> Callable[[int], list[int]]:
        """suffix number -> its first tokens."""
        tokens, suffixes = self._tokens[shard], self._suffixes[shard]

        def first_tokens(number: int) -> list[int]:
            begin = int(suffixes[number])
            found: list[int] = tokens[begin : begin + length].tolist()
            return found

        return first_tokens

    def _refusal(self, reason: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"index={self.path!r}: expected a file made by `specdec index build`: {reason}"
        )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's tokens and their ids."""
    vocab = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocab).encode()).hexdigest()
