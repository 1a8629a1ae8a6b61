"""A copy with edits: followed across them, its edits made again, given up where it is none."""

import random

import pytest
import torch

from specdec.cache import CacheGroup
from specdec.errors import InvalidArgumentError
from specdec.proposers.edited_copy import EditedCopy
from specdec.proposers.ngram import NgramProposer
from specdec.rng import PhiloxNoise
from specdec.sampling import SamplingParams
from specdec.sequence import Sequence

END = 99  # of the prompt
NAME = 7  # what is renamed
SOURCE = [1, 2, NAME, 3, 4, NAME, 5, 6, 8, NAME, 9, 10, 11, 12]
RENAMED = [20, 21]


def after(said: list[int], prompt: list[int] | None = None) -> tuple[EditedCopy, list[int]]:
    """The state behind a prompt and what was said of its copy, and all tokens."""
    prompt = [*SOURCE, END] if prompt is None else prompt
    copy = EditedCopy(len(prompt))
    copy.begin(0, 6)
    tokens = [*prompt, *said]
    for place in range(len(prompt), len(tokens)):
        assert copy.follows
        copy.read(tokens, place)
    return copy, tokens


def guess(said: list[int], count: int = 32, otherwise: tuple[int, ...] = ()) -> list[int]:
    copy, tokens = after(said)
    return copy.continuation(tokens, count, otherwise) if copy.follows else []


def sequence(tokens: list[int]) -> Sequence:
    cache = CacheGroup(16, 16, torch.device("cpu")).open(1)
    law = SamplingParams(temperature=0).law()
    return Sequence("one", 0, tokens, len(tokens), law, 0, 64, frozenset(), None, cache)


def test_a_copy_goes_on_to_the_end_of_the_prompt() -> None:
    assert guess([1, 2]) == [*SOURCE[2:], END]
    assert guess([1, 2], count=3) == SOURCE[2:5]
    copy, _ = after([*SOURCE, END])
    assert not copy.follows


def test_an_edit_is_made_again_wherever_its_source_comes() -> None:
    said = [1, 2, *RENAMED, 3, 4]
    expected = [*RENAMED, 5, 6, 8, *RENAMED, 9, 10, 11, 12, END]
    assert guess(said) == expected
    # within the second one
    assert guess([*said, RENAMED[0]]) == expected[1:]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([1, 2, 30, NAME, 3, 4], [30, NAME, 5, 6, 8, 30, NAME, 9]),  # inserted
        ([1, 2, 3, 4], [5, 6, 8, 9]),  # left out
        ([1, 2, 30, 3, 4], [30, 5, 6, 8, 30, 9]),  # replaced
        ([1, 2, 30, 4], [30, 6, 8, 30, 10]),  # with the token behind it
    ],
)
def test_insertions_deletions_and_replacements_are_told_apart(
    said: list[int], expected: list[int]
) -> None:
    assert guess(said, count=len(expected)) == expected


def test_an_edit_is_forgotten_when_its_source_is_copied_as_it_is() -> None:
    said = [1, 2, *RENAMED, 3, 4, NAME, 5]
    assert guess(said) == [6, 8, NAME, 9, 10, 11, 12, END]


def test_an_edit_seen_at_another_token_is_finished_alike() -> None:
    # `3` becomes what NAME became
    assert guess([1, 2, *RENAMED, 3, 4, *RENAMED, 5, RENAMED[0]])[:3] == [
        RENAMED[1],
        8,
        *RENAMED[:1],
    ]


def test_a_new_edit_ends_where_the_guess_is_back_at_the_source() -> None:
    assert guess([1, 2, 50], otherwise=(51, 3, 60)) == [
        51,
        3,
        4,
        NAME,
        5,
        6,
        8,
        NAME,
        *SOURCE[10:],
        END,
    ]
    assert guess([1, 2, 50], otherwise=(51, 52)) == []  # it does not come back
    assert guess([1, 2, 50])[:3] == [3, 4, NAME]  # no guess: one token was replaced


def test_what_is_no_copy_any_more_is_given_up() -> None:
    copy, _ = after([1, 2, *range(50, 58)])
    assert copy.follows
    assert copy.run == 0
    copy, tokens = after([1, 2, *range(50, 58)])
    tokens.append(58)
    copy.read(tokens, len(tokens) - 1)
    assert not copy.follows


def test_a_copy_that_breaks_off_again_and_again_is_given_up() -> None:
    said = [60, 2, 61, 3, 62, NAME]
    copy, tokens = after(said)
    assert copy.follows
    assert copy.run == 1
    tokens.append(63)
    copy.read(tokens, len(tokens) - 1)
    assert not copy.follows


def test_what_the_text_repeats_of_its_own_is_not_followed() -> None:
    found = []
    for source in (4, 3):
        copy = EditedCopy(4)
        copy.begin(source, 10)
        found.append((copy.follows, copy.run))
    assert found == [(False, 0), (True, 10)]


def test_reading_at_once_and_token_by_token_come_to_the_same() -> None:
    draw = random.Random(0)
    followed = 0
    for _ in range(200):
        prompt = [draw.randrange(12) for _ in range(40)]
        said = list(prompt[:30])
        for _ in range(4):  # edits
            place = draw.randrange(len(said))
            said[place : place + draw.randrange(3)] = [draw.randrange(12, 16)] * draw.randrange(3)
        whole, often = (NgramProposer(branches=2) for _ in range(2))
        one, two = sequence(list(prompt)), sequence(list(prompt))
        whole.start(one)
        often.start(two)
        for token in said:
            two.tokens.append(token)
            often.situation(two)
        one.tokens += said
        trees = [
            proposer.propose([its], [9], PhiloxNoise())[0]
            for proposer, its in ((whole, one), (often, two))
        ]
        assert trees[0].tokens.tolist() == trees[1].tokens.tolist()
        assert trees[0].parents == trees[1].parents
        assert len(trees[0]) <= 9
        assert whole.situation(one) == often.situation(two)
        followed += whole._copies[one].follows
    assert followed > 20


def drafted(said: list[int], **options: object) -> list[list[int]]:
    """Every path that is proposed behind a prompt, an instruction and what was said."""
    proposer = NgramProposer(**options)  # type: ignore[arg-type]
    its = sequence([*SOURCE, END])
    proposer.start(its)
    its.tokens += said
    [tree] = proposer.propose([its], [8], PhiloxNoise())
    paths: list[list[int]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents, strict=True):
        paths.append([*(paths[parent] if parent >= 0 else []), token])
    return [path for node, path in enumerate(paths) if node not in tree.parents]


def test_the_proposer_follows_a_copy_of_six_tokens_and_puts_it_first() -> None:
    said = [*SOURCE[:5], NAME, 5, *RENAMED, 8]  # 6 is renamed
    assert drafted(said) == [[NAME, 9, 10, 11, 12, END]]
    assert drafted(said, edits=False) == [[NAME, 9, 10, 11, 12, END, *said[:2]]]
    behind = [*said, 70, 71]  # NAME is edited too: no match at all
    assert drafted(behind, edits=False) == []
    assert drafted(behind) == [[9, 10, 11, 12, END]]
    # NAME went on with 9 in the source, and last with 5
    assert drafted([*said, NAME], branches=2) == [[9, 10, 11, 12], [5, *RENAMED, 8]]


def test_edits_is_a_switch() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        NgramProposer(edits=1)  # type: ignore[arg-type]
    assert str(caught.value) == "edits=1: expected True or False"
