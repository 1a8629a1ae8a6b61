"""Draft and target with tokenizers of their own: which tokens are the same, texts as tokens."""

import re
from collections.abc import Sequence as Items
from typing import Any, Literal

import torch
from torch import Tensor

from specdec.errors import InvalidArgumentError

# Below this share of the smaller vocabulary two tokenizers have too little in common to draft from.
_LEAST_SHARED = 0.25
_NEVER = -1e30  # float16 does not reach it
_NEVER_FLOAT16 = -1e4
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_STAND_IN = 0  # stands for what the draft cannot be told


class Vocabulary:
    """The tokens of one tokenizer as bytes, and texts as its tokens."""

    def __init__(
        self, tokenizer: Any, size: int, role: Literal["tokenizer", "draft_tokenizer"]
    ) -> None:
        """size: width of its model's logits. Raises InvalidArgumentError for what is no tokenizer,
        or has tokens that the model has no logits for."""
        try:
            tokens: dict[str, int] = tokenizer.get_vocab()
            added = {token: str(t) for token, t in tokenizer.added_tokens_decoder.items()}
            special = {token for token, t in tokenizer.added_tokens_decoder.items() if t.special}
            start = tokenizer.encode(" a")
            is_bytes = "Ġ" in "".join(tokenizer.convert_ids_to_tokens(start))
        except (AttributeError, TypeError) as error:
            raise InvalidArgumentError(
                f"{role}={tokenizer!r}: expected a transformers tokenizer"
            ) from error
        largest = max(tokens.values(), default=0)
        if largest >= size:
            raise InvalidArgumentError(
                f"{role}: its ids go up to {largest}, those of its model to {size - 1}; expected "
                "the model's own tokenizer"
            )
        self.size, self._tokenizer = size, tokenizer
        special |= set(tokenizer.all_special_ids)
        read = _from_byte_level if is_bytes else _from_pieces
        self.special: dict[int, str] = {}
        self.bytes: dict[int, bytes] = {}
        self.ids: dict[bytes, int] = {}
        # of two tokens that say the same, the one that is not spelt as a byte
        for text, token in sorted(tokens.items(), key=lambda t: (_is_byte(t[0]), t[1])):
            if token in special:
                self.special[token] = text
            else:
                data = added[token].encode() if token in added else read(text)
                self.bytes[token] = data
                self.ids.setdefault(data, token)
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        self.starts_with_bos = self.bos is not None and start[:1] == [self.bos]

    def text(self, tokens: Items[int]) -> bytes:
        """What ordinary tokens say; special ones and ids without a token say nothing."""
        return b"".join(self.bytes.get(token, b"") for token in tokens)

    def tokens(self, text: bytes, before: bytes = b"") -> list[int]:
        """Tokens that say the text: what the tokenizer makes of it behind `before`, where a token
        ends there. Bytes that are no text are said one by one where there are such tokens, else
        left out."""
        found: list[int] = []
        while text:
            try:
                text.decode()
                end = len(text)
            except UnicodeDecodeError as error:
                end = error.start
            found += self._of_text(text[:end], before)
            single = self.ids.get(text[end : end + 1])
            if single is not None and end < len(text):
                found.append(single)
            text, before = text[end + 1 :], b""
        return found

    def _of_text(self, text: bytes, before: bytes) -> list[int]:
        if not text:
            return []
        head = before.decode(errors="ignore")
        ids: list[int] = self._tokenizer.encode(
            head + text.decode(), add_special_tokens=False, verbose=False
        )
        # counted from the end, as some tokenizers put a space before everything
        missing, first = len(text), len(ids)
        while missing > 0 and first > 0:
            first -= 1
            missing -= len(self.bytes.get(ids[first], b""))
        if missing == 0:
            return ids[first:]
        return self._of_text(text, b"") if head else ids


class Translation:
    """Which tokens of two vocabularies are the same: those that say the same bytes, special ones of
    the same name, and both ends and both beginnings of text (cf. Timor et al. 2025, 2502.05202)."""

    def __init__(self, target: Vocabulary, draft: Vocabulary, device: torch.device) -> None:
        self.target, self.draft, self.device = target, draft, device
        pairs = {token: draft.ids[data] for data, token in target.ids.items() if data in draft.ids}
        named = {text: token for token, text in draft.special.items()}
        pairs.update(
            (token, named[text]) for token, text in target.special.items() if text in named
        )
        roles = ((target.bos, draft.bos), (target.eos, draft.eos))
        pairs.update((a, b) for a, b in roles if a is not None and b is not None)
        self.pairs = dict(sorted(pairs.items()))  # target id -> draft id
        # (V,) of the target: the draft's id, or one behind its last where it has no such token
        columns = torch.full((target.size,), draft.size, dtype=torch.long)
        shared = torch.tensor(list(self.pairs), dtype=torch.long)
        columns[shared] = torch.tensor(list(self.pairs.values()), dtype=torch.long)
        self._columns, self.shared = columns.to(device), shared.to(device)
        self._nodes = torch.where(columns < draft.size, columns, _STAND_IN).to(device)

    @property
    def is_identity(self) -> bool:
        """Whether every token that either has is the other's token of the same id."""
        every = len(self.target.bytes) + len(self.target.special)
        return (
            len(self.pairs) == every == len(self.draft.bytes) + len(self.draft.special)
            and all(mine == its for mine, its in self.pairs.items())
        )  # fmt: skip

    @property
    def is_narrow(self) -> bool:
        """Whether the two have too little in common to draft token by token."""
        smaller = min(len(self.target.bytes), len(self.draft.bytes))
        return len(self.pairs) < _LEAST_SHARED * smaller

    def nodes(self, tokens: Tensor) -> Tensor:
        """Target ids (N,) -> draft ids (N,), on the device."""
        return self._nodes.index_select(0, tokens)

    def logits(self, logits: Tensor) -> Tensor:
        """(n, draft's V) -> (n, target's V); so low where the draft has no such token that its
        probability is zero, unless processors leave no other."""
        low = _NEVER_FLOAT16 if logits.dtype == torch.float16 else _NEVER
        missing = logits.new_full((logits.shape[0], 1), low)
        return torch.cat((logits, missing), dim=1).index_select(1, self._columns)

    def begin(self, tokens: Items[int]) -> list[int]:
        """A prompt in draft tokens, as its own tokenizer would have them; at least one."""
        found: list[int] = []
        if self.draft.starts_with_bos and (not tokens or tokens[0] != self.target.bos):
            assert self.draft.bos is not None
            found.append(self.draft.bos)
        run: list[int] = []
        for token in tokens:
            if token in self.target.bytes:
                run.append(token)
                continue
            found += self.draft.tokens(self.target.text(run))
            run = []
            if token in self.pairs:
                found.append(self.pairs[token])
        found += self.draft.tokens(self.target.text(run))
        return found or [self.draft.bos if self.draft.bos is not None else _STAND_IN]

    def follow(self, tokens: Items[int], guess: Items[int] = ()) -> list[int]:
        """Committed tokens in draft tokens: those of the guess that say the same, then the same
        token where there is one, else its text."""
        found = self._guessed(tokens, guess)
        said = len(self.draft.text(found))
        run: list[int] = []
        for token in tokens:
            data = self.target.bytes.get(token, b"")
            if said and said >= len(data):
                said -= len(data)
            elif said:  # the guess ends within the token
                found += self.draft.tokens(data[said:])
                said = 0
            elif token not in self.pairs:
                run.append(token)
            else:
                found += self.draft.tokens(self.target.text(run))
                run = []
                found.append(self.pairs[token])
        return found + self.draft.tokens(self.target.text(run))

    def _guessed(self, tokens: Items[int], guess: Items[int]) -> list[int]:
        """The leading ordinary tokens of the guess that say what the tokens say."""
        ordinary = next((i for i, t in enumerate(tokens) if t in self.target.special), len(tokens))
        text, said = self.target.text(tokens[:ordinary]), b""
        found: list[int] = []
        for token in guess:
            data = self.draft.bytes.get(token)
            if not data or not text.startswith(data, len(said)):
                break
            said += data
            found.append(token)
        return found


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as (GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + index): byte for index, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _from_byte_level(text: str) -> bytes:
    if all(letter in _ALPHABET for letter in text):
        return bytes(_ALPHABET[letter] for letter in text)
    return text.encode()


def _is_byte(text: str) -> bool:
    return _BYTE.fullmatch(text) is not None


def _from_pieces(text: str) -> bytes:
    """SentencePiece: a low block for a space, <0xE4> for a byte."""
    if _is_byte(text):
        return bytes([int(text[3:5], 16)])
    return text.replace("\u2581", " ").encode()


def common_prefix(a: Items[int], b: Items[int]) -> int:
    """How many leading tokens two lists share."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
