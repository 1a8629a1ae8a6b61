"""Counts over past outputs: bounded, the oldest out first, kept in a file."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from specdec.errors import InvalidArgumentError, SpecDecError
from specdec.proposers.suffix_automaton import SuffixAutomaton

_FORMAT = 1
_MAGIC = b"PK\x03\x04"
_FIELDS = ("format", "vocab_size", "tokens", "ends", "checksum")


@dataclass(slots=True)
class _Age:
    automaton: SuffixAutomaton
    outputs: list[NDArray[np.int32]] = field(default_factory=list)

    def add(self, output: NDArray[np.int32]) -> None:
        self.automaton.begin()
        for token in output.tolist():
            self.automaton.append(token)
        self.outputs.append(output)


class PastOutputs:
    """An automaton over the newest outputs, at most max_tokens tokens of them; 0 keeps nothing.

    An automaton forgets nothing, so a second one grows beside it from half of the bound on, and
    takes its place when the bound is reached: the older half of the requests leaves at once, an
    output costs at most twice its tokens, and memory is at most one and a half times the bound.
    """

    def __init__(self, max_tokens: int, depth: int, width: int = 1) -> None:
        self.max_tokens, self.depth, self.width = max_tokens, depth, width
        self.version = 0  # grows with every change: states found before mean nothing after it
        self._now, self._next = self._empty(), self._empty()

    def _empty(self) -> _Age:
        return _Age(SuffixAutomaton(self.depth, self.width))

    @property
    def automaton(self) -> SuffixAutomaton:
        return self._now.automaton

    @property
    def outputs(self) -> list[list[int]]:
        """The outputs that are counted, oldest first."""
        return [output.tolist() for output in self._now.outputs]

    def add(self, tokens: list[int]) -> None:
        """Counts one output; of one longer than the bound its end."""
        if not tokens or not self.max_tokens:
            return
        output = np.array(tokens[-self.max_tokens :], np.int32)
        while self.automaton.num_tokens + len(output) > self.max_tokens:
            self._now, self._next = self._next, self._empty()
        if 2 * self.automaton.num_tokens >= self.max_tokens:
            self._next.add(output)
        self._now.add(output)
        self.version += 1

    def save(self, path: str | os.PathLike[str], vocab_size: int) -> None:
        """Writes the outputs to a file, whole or not at all. Raises SpecDecError where it cannot be
        written."""
        if not isinstance(path, str | os.PathLike):
            raise InvalidArgumentError(f"path={path!r}: expected the path of a file")
        outputs = self._now.outputs
        tokens = np.concatenate(outputs) if outputs else np.empty(0, np.int32)
        ends = np.cumsum([len(output) for output in outputs], dtype=np.int64)
        sizes = {"format": np.int64(_FORMAT), "vocab_size": np.int64(vocab_size)}
        part = Path(f"{os.fspath(path)}.part")
        try:
            try:
                with part.open("wb") as file:
                    np.savez(
                        file, allow_pickle=False, tokens=tokens, ends=ends,
                        checksum=_checksum(vocab_size, tokens, ends), **sizes,
                    )  # fmt: skip
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise SpecDecError(
                f"{os.fspath(path)}: past outputs cannot be saved: {error.strerror or error}"
            ) from error

    def load(self, path: str | os.PathLike[str]) -> int:
        """Adds the outputs of a file; returns the vocabulary size that they were made with.

        Raises InvalidArgumentError, naming the argument and the file, for one that is missing,
        damaged, of another version or of another kind.
        """
        if not isinstance(path, str | os.PathLike):
            raise InvalidArgumentError(f"cache_file={path!r}: expected the path of a file")
        fields = _read(path)
        version = _number(path, fields, "format")
        if version != _FORMAT:
            raise _refuse(path, f"its format is {version}, not {_FORMAT}")
        vocab_size = _number(path, fields, "vocab_size")
        tokens, ends = fields["tokens"], fields["ends"]
        if not np.array_equal(_checksum(vocab_size, tokens, ends), fields["checksum"]):
            raise _refuse(path, "its checksum does not match its contents")
        fault = _fault(tokens, ends, vocab_size)
        if fault:
            raise _refuse(path, fault)
        for output in np.split(tokens, ends[:-1]):
            self.add(output.tolist())
        return vocab_size


def _checksum(
    vocab_size: int, tokens: NDArray[np.generic], ends: NDArray[np.generic]
) -> NDArray[np.uint8]:
    digest = hashlib.sha256(f"{_FORMAT} {vocab_size} {tokens.dtype} {ends.dtype}".encode())
    digest.update(tokens.tobytes())
    digest.update(ends.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _number(path: str | os.PathLike[str], fields: dict[str, NDArray[np.generic]], name: str) -> int:
    field = fields[name]
    if field.shape or field.dtype != np.int64:
        raise _refuse(path, f"its {name} is no number")
    return int(field)


def _fault(tokens: NDArray[np.generic], ends: NDArray[np.generic], vocab_size: int) -> str:
    """What is wrong with contents that are as they were written; empty where nothing is."""
    if tokens.ndim != 1 or tokens.dtype != np.int32 or ends.ndim != 1 or ends.dtype != np.int64:
        return "its arrays are of another shape or type"
    if (np.diff(ends, prepend=0) < 0).any() or (int(ends[-1]) if len(ends) else 0) != len(tokens):
        return "its outputs do not end where its tokens do"
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        return f"it has tokens outside its vocabulary of {vocab_size}"
    return ""


def _read(path: str | os.PathLike[str]) -> dict[str, NDArray[np.generic]]:
    try:
        with Path(path).open("rb") as stream:
            if stream.read(len(_MAGIC)) != _MAGIC:
                raise _refuse(path, "it does not begin like one")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                missing = set(_FIELDS) - set(file.files)
                if missing:
                    raise _refuse(path, f"it has no {min(missing)}")
                fields = {name: file[name] for name in _FIELDS}
    except InvalidArgumentError:
        raise
    except OSError as error:
        raise _refuse(path, error.strerror or str(error)) from error
    except Exception as error:  # numpy and zipfile have many words for it
        raise _refuse(path, f"it is damaged ({type(error).__name__})") from error
    if not all(isinstance(field, np.ndarray) for field in fields.values()):
        raise _refuse(path, "it holds something else than arrays")
    return fields


def _refuse(path: str | os.PathLike[str], reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"cache_file={os.fspath(path)!r}: expected past outputs saved by specdec's suffix "
        f"proposer: {reason}"
    )
