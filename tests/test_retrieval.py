"""Retrieval: what a scan of the corpus would find, from files that are checked and never loaded."""

import hashlib
import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from transformers import PreTrainedTokenizerFast

from specdec import Engine, SamplingParams
from specdec.cache import CacheGroup
from specdec.cli.main import main
from specdec.errors import InvalidArgumentError
from specdec.proposers import retrieval_index
from specdec.proposers.retrieval import (
    RetrievalProposer,
    Trie,
    likeliest_nodes,
    likeliest_path,
)
from specdec.proposers.retrieval_build import build_index, suffix_array, write_index
from specdec.proposers.retrieval_index import (
    HEADER_BYTES,
    MAGIC,
    NO_MATCH,
    Header,
    Match,
    RetrievalIndex,
    tokenizer_fingerprint,
)
from specdec.rng import PhiloxNoise
from specdec.sequence import Sequence
from specdec.toy import TableRunner
from specdec.zoo.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[..., RetrievalIndex]

KV = 1 << 20
CPU = torch.device("cpu")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """An index of documents."""

    def build(documents: list[list[int]], vocab_size: int = 10, **more: Any) -> RetrievalIndex:
        path = tmp_path / "some.idx"
        write_index(path, [(d, True) for d in documents], vocab_size=vocab_size, **more)
        return RetrievalIndex(path)

    return build


# --- sorting and searching, against a scan


@pytest.mark.parametrize("alphabet", [1, 2, 5, 60000])
@pytest.mark.parametrize("depth", [1, 3, 32])
def test_suffixes_are_sorted(alphabet: int, depth: int) -> None:
    draw = random.Random(alphabet + depth)
    for size in (1, 2, 3, 17, 200):
        tokens = [draw.randrange(alphabet) for _ in range(size)]
        order = suffix_array(np.array(tokens, "<u2"), depth).tolist()
        assert sorted(order) == list(range(size))
        heads = [(tokens[i : i + depth]) for i in order]
        assert heads == sorted(heads)


def scanned(documents: list[list[int]], shard: int, text: list[int], least: int, most: int) -> Any:
    """Length of the longest end that occurs, and the continuations, each up to its document's or
    its shard's end."""
    flat: list[int] = []
    for document in documents:
        flat += [*document, -1]
    for length in range(min(most, len(text)), least - 1, -1):
        end, found = text[len(text) - length :], []
        for begin in range(0, len(flat), shard):
            part = flat[begin : begin + shard]
            for i in range(len(part) - length + 1):
                if part[i : i + length] == end:
                    rest = [*part[i + length :], -1]
                    found.append(tuple(rest[: rest.index(-1)]))
        if found:
            return length, found
    return 0, []


@pytest.mark.parametrize("shard", [7, 64, 1 << 20])
@pytest.mark.parametrize("alphabet", [2, 5])
@pytest.mark.parametrize("wide", [False, True], ids=["two-byte", "four-byte"])
def test_search_finds_what_a_scan_finds(make: Make, shard: int, alphabet: int, wide: bool) -> None:
    draw = random.Random(shard)
    documents = [
        [draw.randrange(alphabet) for _ in range(draw.choice((1, 5, 60)))] for _ in range(9)
    ]
    index = make(documents, vocab_size=70000 if wide else 10, shard_tokens=shard)
    assert index.header.token_dtype == ("<u4" if wide else "<u2")
    index.check_contents()
    lengths = Counter[int]()
    for _ in range(60):
        text = [draw.randrange(alphabet + 1) for _ in range(draw.choice((1, 3, 20)))]
        least, most = draw.choice(((1, 4), (2, 16), (3, 3)))
        length, wanted = scanned(documents, shard, text, least, most)
        match = index.longest_match(text, least, most)
        assert (match.length, match.total) == (length, len(wanted))
        rows = index.continuations(match, 4096, 5)
        assert Counter(map(tuple, rows)) == Counter(row[:5] for row in wanted)
        lengths[length] += 1
    assert len(lengths) >= 3


def test_some_of_many_occurrences_are_there_in_proportion(make: Make) -> None:
    documents = [[1, 2, 3]] * 60 + [[1, 2, 4]] * 30 + [[1, 2, 5]] * 10
    random.Random(0).shuffle(documents)
    for shard in (1 << 20, 150):
        index = make(documents, shard_tokens=shard)
        match = index.longest_match([9, 1, 2], 1, 16)
        rows = index.continuations(match, 10, 4)
        assert len(rows) == 10
        counts = Counter(row[0] for row in rows if row)
        assert abs(counts[3] - 6) <= 1
        assert abs(counts[4] - 3) <= 1
        assert index.continuations(match, 10, 4) == rows


def test_nothing_is_found_where_nothing_is(make: Make) -> None:
    index = make([[1, 2, 3]])
    assert index.longest_match([], 1, 16) == NO_MATCH
    assert index.longest_match([9, 9], 1, 16) == NO_MATCH
    assert index.longest_match([3], 2, 16) == NO_MATCH
    assert index.longest_match([70000, 2], 1, 16).length == 1
    assert index.continuations(NO_MATCH, 8, 4) == []
    end = index.longest_match([2, 3], 1, 16)
    assert index.continuations(end, 8, 4) == [[]]


def test_cost_grows_with_the_logarithm_of_the_corpus(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    reader, looks = RetrievalIndex._reader, 0

    def counted(self: RetrievalIndex, shard: int, length: int) -> Callable[[int], list[int]]:
        read = reader(self, shard, length)

        def look(number: int) -> list[int]:
            nonlocal looks
            looks += 1
            return read(number)

        return look

    monkeypatch.setattr(RetrievalIndex, "_reader", counted)
    costs: list[int] = []
    for size in (1 << 10, 1 << 17):
        index = make([draw.integers(0, 8, size).tolist()])
        looks = 0
        for _ in range(20):
            index.longest_match(draw.integers(0, 8, 16).tolist(), 2, 16)
        costs.append(looks)
    assert costs[0] > 20 * 10
    assert costs[1] < costs[0] * 17 / 10 * 1.1


def test_file_of_many_gigabytes_is_not_loaded(tmp_path: Path) -> None:
    header = Header(1, "<u4", 10, "", 1 << 31, 1 << 30, 32, "", "")
    path = tmp_path / "sparse.idx"
    with path.open("wb") as file:  # 16 GiB, of which nothing but the header is on the disk
        file.write(header.pack())
        file.truncate(header.file_bytes)
    tracemalloc.start()
    index = RetrievalIndex(path)
    match = index.longest_match([5, 0, 0, 0], 1, 16)
    rows = index.continuations(match, 8, 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (match.length, match.total) == (3, 1 << 31)
    assert rows == [[0] * 4] * 8
    assert peak < 1 << 20


# --- what is proposed


def sequence(tokens: list[int], left: int = 64) -> Sequence:
    cache = CacheGroup(16, 16, CPU).open(1)
    law = SamplingParams(temperature=0).law()
    return Sequence("one", 0, tokens, len(tokens), law, 0, left, frozenset(), None, cache)


def paths(index: RetrievalIndex, text: list[int], budget: int, **options: Any) -> list[Any]:
    """Every node's path in one proposal."""
    proposer, its = RetrievalProposer(index=index.path, **options), sequence(text)
    proposer.start(its)
    [tree] = proposer.propose([its], [budget], PhiloxNoise())
    proposer.finish(its)
    assert tree.laws is None
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def test_nodes_that_most_continuations_go_through_come_first(make: Make) -> None:
    index = make([[1, 2, 3, 4]] * 3 + [[1, 2, 5, 6, 7]] * 2 + [[1, 2, 3, 8]])
    assert paths(index, [1, 2], 9) == [(3,), (3, 4), (5,), (5, 6), (5, 6, 7), (3, 8)]
    assert paths(index, [1, 2], 2) == [(3,), (3, 4)]
    assert paths(index, [1, 2], 9, mode="path") == [(3,), (3, 4)]
    assert paths(index, [1, 2], 1, mode="path") == [(3,)]
    assert paths(index, [1, 2], 0) == []
    assert paths(index, [1, 9], 4) == []


def test_longer_match_wins(make: Make) -> None:
    index = make([[2, 3]] * 5 + [[1, 2, 4]])
    assert paths(index, [1, 2], 1) == [(4,)]
    assert paths(index, [1, 2], 1, max_match=1, min_match=1) == [(3,)]
    assert paths(index, [9, 2], 1) == []
    assert paths(index, [9, 2], 1, min_match=1) == [(3,)]


def test_draft_ends_before_the_last_token_and_with_its_document(make: Make) -> None:
    index = make([[1, 2, 3, 4, 5, 6], [7, 8]])
    proposer, its = RetrievalProposer(index=index.path), sequence([1, 2], left=3)
    [tree] = proposer.propose([its], [8], PhiloxNoise())
    assert tree.tokens.tolist() == [3, 4]
    assert paths(index, [5, 6], 8) == []
    assert len(paths(index, [3, 4], 8)) == 2


def test_situation_is_the_length_of_the_match(make: Make) -> None:
    index = make([[1, 2, 3, 4]])
    proposer = RetrievalProposer(index=index.path)
    its = sequence([2, 3])
    assert proposer.situation(its) == 2
    its.tokens += [4]
    assert proposer.situation(its) == 3
    its.tokens += [1]
    assert proposer.situation(its) == 0
    proposer.finish(its)
    proposer.finish(its)


def test_best_nodes_are_those_of_a_sort() -> None:
    draw = random.Random(3)
    for _ in range(50):
        rows = [[draw.randrange(3) for _ in range(draw.randrange(5))] for _ in range(20)]
        trie, budget = Trie.of(rows), draw.randrange(1, 20)
        tokens, parents = likeliest_nodes(trie, budget)
        counts = Counter(tuple(row[:n]) for row in rows for n in range(1, len(row) + 1))
        found: list[tuple[int, ...]] = []
        for token, parent in zip(tokens, parents, strict=True):
            found.append((*(found[parent] if parent >= 0 else ()), token))
        assert len(set(found)) == len(found) == min(budget, len(counts))
        best = sorted(counts.values(), reverse=True)[:budget]
        assert [counts[path] for path in found] == best
        chain, above = likeliest_path(trie, budget)
        assert above == list(range(-1, len(chain) - 1))
        for n in range(len(chain)):
            siblings = [counts[p] for p in counts if len(p) == n + 1 and p[:n] == tuple(chain[:n])]
            assert counts[tuple(chain[: n + 1])] == max(siblings)


def test_corpus_of_what_the_target_says_is_accepted(make: Make) -> None:
    runner = TableRunner(lambda context: np.eye(16)[sum(context[-2:]) * 5 % 16], 16)
    params = SamplingParams(max_new_tokens=40, temperature=0)
    plain = Engine(runner, kv_memory=KV)
    plain.add_request([1, 2, 3], params)
    [wanted] = plain
    index = make([[1, 2, 3, *wanted.token_ids]], vocab_size=16)
    for mode in ("path", "tree"):
        engine = Engine(
            TableRunner(lambda context: np.eye(16)[sum(context[-2:]) * 5 % 16], 16),
            proposer="retrieval", proposer_options={"index": index.path, "mode": mode},
            num_draft_tokens=8, kv_memory=KV,
        )  # fmt: skip
        engine.add_request([1, 2, 3], params)
        [out] = engine
        assert out.token_ids == wanted.token_ids
        assert out.stats.accepted > 20


# --- files


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "begin like one": lambda data: b"import os\n" + data,
    "within its header": lambda data: data[:100],
    "header is damaged": lambda data: data[:200] + b"!" + data[201:],
    "bytes, its header says": lambda data: data[:-4],
    "bytes, its header  says": lambda data: data + b"\0",
    "begin like  one": lambda data: data[:0],
}


@pytest.mark.parametrize("reason", BROKEN)
def test_file_that_is_no_index_is_refused(make: Make, reason: str) -> None:
    path = Path(make([[1, 2, 3]]).path)
    path.write_bytes(BROKEN[reason](path.read_bytes()))
    with pytest.raises(InvalidArgumentError, match=r"index='.*some.idx': expected a file made by"):
        RetrievalProposer(index=path)
    with pytest.raises(InvalidArgumentError, match=" ".join(reason.split())):
        RetrievalIndex(path)


def test_missing_file_and_other_version_are_refused(tmp_path: Path, make: Make) -> None:
    with pytest.raises(InvalidArgumentError, match=r"none.idx': .*: No such file"):
        RetrievalIndex(tmp_path / "none.idx")
    with pytest.raises(InvalidArgumentError, match="Is a directory"):
        RetrievalIndex(tmp_path)
    path = Path(make([[1, 2, 3]]).path)
    header = Header.unpack(path.read_bytes()[:HEADER_BYTES])
    for field, value, reason in (
        ("version", 2, "its version is 2, not 1"),
        ("token_dtype", "O", "token_dtype is 'O'"),
        ("num_tokens", -1, "num_tokens is -1"),
    ):
        data = bytearray(path.read_bytes())
        fields = {name: getattr(header, name) for name in Header.__slots__} | {field: value}
        other = object.__new__(Header)
        for name in Header.__slots__:
            object.__setattr__(other, name, fields[name])
        data[:HEADER_BYTES] = other.pack()
        path.with_name("other.idx").write_bytes(data)
        with pytest.raises(InvalidArgumentError, match=reason):
            RetrievalIndex(path.with_name("other.idx"))


@pytest.mark.parametrize("body", [b"[1]", b"null", b"5", b"[" * 4056, b"{}"], ids=lambda b: b[:5])
def test_header_of_another_program_is_refused(tmp_path: Path, body: bytes) -> None:
    body = body.ljust(HEADER_BYTES - len(MAGIC) - 32)
    (tmp_path / "list.idx").write_bytes(MAGIC + hashlib.sha256(body).digest() + body)
    with pytest.raises(InvalidArgumentError, match=r"index='.*list.idx': expected a file made by"):
        RetrievalIndex(tmp_path / "list.idx")


@pytest.mark.parametrize("what", ["tokens", "suffixes"])
def test_damaged_contents_of_a_small_file_are_found_when_it_is_opened(
    make: Make, what: str
) -> None:
    index = make([[1, 2, 3, 4] * 20])
    data = bytearray(Path(index.path).read_bytes())
    data[HEADER_BYTES + 9 if what == "tokens" else index.header.suffixes_at + 9] ^= 1
    Path(index.path).write_bytes(data)
    with pytest.raises(InvalidArgumentError, match=f"some.idx': .*: its {what} are damaged"):
        RetrievalProposer(index=index.path)


@pytest.mark.parametrize("what", ["tokens", "suffixes"])
def test_damaged_contents_of_a_large_file_are_found_on_request_and_never_crash(
    make: Make, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval_index, "CHECKED_BYTES", 0)
    index = make([[1, 2, 3, 4] * 20])
    index.check_contents()
    data = bytearray(Path(index.path).read_bytes())
    begin = HEADER_BYTES if what == "tokens" else index.header.suffixes_at
    draw = random.Random(0)
    data[begin : begin + 100] = draw.randbytes(100)
    Path(index.path).write_bytes(data)
    damaged = RetrievalIndex(index.path)
    with pytest.raises(InvalidArgumentError, match=f"its {what} are damaged"):
        damaged.check_contents()
    for _ in range(50):
        text = [draw.randrange(5) for _ in range(6)]
        for row in damaged.continuations(damaged.longest_match(text, 1, 8), 16, 4):
            assert all(0 <= token < 10 for token in row)
    assert damaged.continuations(Match(1, ((0, 0, 20),)), 20, 4) != []


def test_vocabulary_of_another_target_is_refused(make: Make) -> None:
    index = make([[1, 2, 3]], vocab_size=50000)
    with pytest.raises(InvalidArgumentError, match=r"idx': .* of 50000 tokens, the target has"):
        RetrievalProposer(index=index.path).join(CacheGroup(16, 16, CPU), 300)


def test_index_of_another_tokenizer_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path, corpus = tmp_path / "a.idx", tmp_path / "a.txt"
    corpus.write_text("def quicksort(items):")
    build_index([corpus], tokenizer, path)
    RetrievalProposer(index=path, tokenizer=tokenizer)
    other = train_tokenizer(["another text altogether, with other words"], 270)
    with pytest.raises(InvalidArgumentError, match=r"a.idx': it was made with another tokenizer"):
        RetrievalProposer(index=path, tokenizer=other)
    with pytest.raises(InvalidArgumentError, match=r"tokenizer='big': expected that of the target"):
        RetrievalProposer(index=path, tokenizer="big")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_match": 0}, "min_match=0: expected a whole number, 1 to 32"),
        ({"max_match": 33}, "max_match=33: expected a whole number, 2 to 32"),
        ({"max_match": 1}, "max_match=1: expected a whole number, 2 to 32"),
        ({"max_continuations": 0}, "max_continuations=0: expected a whole number, 1 to 4096"),
        ({"max_continuations": True}, "max_continuations=True: expected a whole number"),
        ({"mode": "best"}, "mode='best': expected tree or path"),
        ({"index": 3}, "index=3: expected the path of a file"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(
    make: Make, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        RetrievalProposer(**{"index": make([[1]]).path, **options})


# --- building


def contents(path: Path) -> list[list[int]]:
    """The documents of an index of one shard."""
    index = RetrievalIndex(path)
    index.check_contents()
    documents: list[list[int]] = [[]]
    for token in index._tokens[0].tolist():
        if token < index.header.vocab_size:
            documents[-1].append(token)
        else:
            documents.append([])
    return documents[:-1]


def test_text_and_json_lines_become_documents(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = ["def f(x):\n    return x\n", "grüße, Ωmega\n", "the end"]
    (tmp_path / "a.txt").write_text(texts[0], encoding="utf-8")
    lines = [json.dumps({"text": text, "id": 3}) for text in texts[1:]]
    (tmp_path / "b.jsonl").write_text(lines[0] + "\n\n" + lines[1], encoding="utf-8")
    out = tmp_path / "out.idx"
    seen: list[tuple[str, int, int]] = []
    header = build_index(
        [tmp_path / "a.txt", tmp_path / "b.jsonl"], tokenizer, out,
        progress=lambda what, done, total: seen.append((what, done, total)),
    )  # fmt: skip
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert contents(out) == wanted
    assert header.vocab_size == max(tokenizer.get_vocab().values()) + 1
    assert header.tokenizer == tokenizer_fingerprint(tokenizer)
    assert [path.name for path in tmp_path.glob("*.part")] == []
    for what in ("reading", "sorting"):
        steps = [(done, total) for it, done, total in seen if it == what]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1] > 0


def test_long_text_is_read_in_pieces(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specdec.proposers.retrieval_build._CHUNK", 10)
    text = "ä line\n" * 20 + "ü" * 50  # letters of two bytes across the ends of pieces
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    build_index([tmp_path / "a.txt"], tokenizer, tmp_path / "a.idx")
    [document] = contents(tmp_path / "a.idx")
    assert tokenizer.decode(document) == text


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    peaks = []
    for shards in (1, 8):
        documents = ([(draw.integers(0, 50, 512).tolist(), True)] for _ in range(32 * shards))
        tracemalloc.start()
        write_index(
            tmp_path / "a.idx", (piece for pieces in documents for piece in pieces), vocab_size=50,
            shard_tokens=1 << 14,
        )  # fmt: skip
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert RetrievalIndex(tmp_path / "a.idx").header.num_shards >= shards
    assert peaks[0] > 1 << 18
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < 60 * (1 << 14) + (1 << 18)


BAD = [
    ("a.txt", b"", "corpus: it holds no text"),
    ("a.jsonl", b"\n\n", "corpus: it holds no text"),
    ("a.txt", b" \n\t\r\n ", "corpus: it holds no text but white space"),
    ("a.jsonl", b'{"text": ""}\n{"text": " \\n"}\n', "corpus: it holds no text but white space"),
    ("a.txt", b"abc\n\xff\xfe def", r"a.txt', byte 4: it is not UTF-8 text"),
    ("a.txt", b"abc \xc3", r"a.txt', byte 4: it is not UTF-8 text"),
    ("a.txt", b"MZ\0\0", r"a.txt', it holds a zero byte"),
    ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a.jsonl', line 2: it is not JSON"),
    ("a.jsonl", b'{"text": "a"}\n\n["b"]', r"a.jsonl', line 3: expected an object with a text 'te"),
    ("a.jsonl", b'{"text": 5}', r"a.jsonl', line 1: expected an object with a text 'text'"),
    ("a.jsonl", b'{"text": "\\ud800"}', r"a.jsonl', line 1: 'text' is not text"),
    ("a.jsonl", b'{"text": "\xff"}', r"a.jsonl', line 1: it is not JSON"),
    ("a.jsonl", b"[" * 100000, r"a.jsonl', line 1: it is not JSON"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD, ids=[message for *_, message in BAD])
def test_corpus_that_is_no_text_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    out = tmp_path / "kept.idx"
    out.write_text("as it was")
    with pytest.raises(InvalidArgumentError, match=message):
        build_index([tmp_path / name], tokenizer, out)
    assert out.read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "kept.idx"])


def test_files_that_cannot_be_used_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    corpus = tmp_path / "a.txt"
    corpus.write_text("text")
    for files, out, message in (
        ([], tmp_path / "x", "corpus: expected at least one file"),
        ([tmp_path / "none.txt"], tmp_path / "x", r"corpus '.*none.txt': No such file"),
        ([tmp_path], tmp_path / "x", r"corpus '.*': Is a directory"),
        ([corpus], tmp_path / "none" / "x", r"out='.*none/x': No such file"),
        ([corpus], corpus, r"out='.*a.txt': it is the corpus"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            build_index(files, tokenizer, out)
    with pytest.raises(InvalidArgumentError, match=r"shard_tokens=0: expected 1 to 2\*\*30"):
        build_index([corpus], tokenizer, tmp_path / "x", shard_tokens=0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("token", [-1, 10, 1 << 16])
def test_token_outside_the_vocabulary_is_refused(tmp_path: Path, token: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"token {token}: expected 0 to 9"):
        write_index(tmp_path / "a.idx", [([3, 4], True), ([5, token], True)], vocab_size=10)
    assert list(tmp_path.iterdir()) == []


# --- the command line


def run(*args: Any) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def test_index_is_built_looked_at_and_drafted_from(models: Path, tmp_path: Path) -> None:
    target, out = models / "target", tmp_path / "code.idx"
    generate = ["generate", "def f", "--target", target, "--device", "cpu", "--json"]
    generate += ["--max-new-tokens", "24"]
    plain = json.loads(run(*generate, "--no-speculation").stdout)
    (tmp_path / "corpus.txt").write_text("def f" + plain["outputs"][0]["text"], encoding="utf-8")
    built = run("index", "build", tmp_path / "corpus.txt", "--tokenizer", target, "--out", out)
    assert (built.exit_code, built.stderr) == (0, "")
    assert built.stdout.startswith("code.idx: ")
    assert "tokens in 1 shard, vocabulary of" in built.stdout
    assert run("index", "info", out).stdout == built.stdout
    facts = json.loads(run("index", "info", out, "--check", "--json").stdout)
    assert facts["bytes"] == out.stat().st_size
    retrieval = [
        "--num-draft-tokens",
        "6",
        "--proposer",
        "retrieval",
        "--proposer-option",
        f"index={out}",
    ]
    found = json.loads(run(*generate, *retrieval, "--proposer-option", "min_match=1").stdout)
    assert found["outputs"] == plain["outputs"]
    assert found["stats"]["accepted"] > 0


def test_mistakes_are_one_line(models: Path, tmp_path: Path) -> None:
    target, empty, other = models / "target", tmp_path / "empty.txt", tmp_path / "other.idx"
    empty.write_text("")
    write_index(other, [([1, 2, 3], True)], vocab_size=9)
    build = ["index", "build", empty, "--tokenizer", target, "--out"]
    generate = ["generate", "x", "--target", target, "--device", "cpu", "--proposer", "retrieval"]
    for args, message in (
        ([*build, tmp_path / "x.idx"], "corpus: it holds no text"),
        ([*build, tmp_path / "none" / "x.idx"], "out='"),
        (["index", "build", tmp_path / "none", "--out", "x"], "does not exist"),
        (["index", "build", "--out", "x"], "Missing argument 'CORPUS...'"),
        (["index", "info", empty], "it does not begin like one"),
        (generate, "proposer='retrieval' needs proposer_options={'index': ...}"),
        ([*generate, "--proposer-option", f"index={other}"], "made with another tokenizer"),
        ([*generate, "--proposer-option", "index"], "'index': expected NAME=VALUE."),
        ([*generate, "--proposer-option", "indx=a"], "'indx' is no option of proposer='retrieval'"),
    ):
        result = run(*args)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.count("\n") == 1
        assert message in result.stderr
