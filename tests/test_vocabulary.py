"""A draft with a tokenizer of its own: which tokens are the same, and that nobody can tell."""

from collections.abc import Callable, Sequence as Items
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import specdec
from specdec import Engine, SamplingParams
from specdec.errors import InvalidArgumentError
from specdec.proposers import DraftModelProposer, TextDraftProposer
from specdec.proposers.vocabulary import Translation, Vocabulary
from specdec.rng import PhiloxNoise
from specdec.sequence import Sequence
from specdec.tree import TokenTree
from specdec.zoo.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part

KV = 1 << 22
CPU = torch.device("cpu")
TEXTS = [
    "def quicksort(items): return sorted(items)",
    "Grüße aus Köln, 你好世界 und ☃ — naïve café",
    "",
    "the quick brown fox jumps over the lazy dog; the quick brown fox sleeps",
]
GREEDY = SamplingParams(max_new_tokens=24, temperature=0)
SAMPLED = SamplingParams(max_new_tokens=24, temperature=0.9, top_p=0.95)


@pytest.fixture(scope="module")
def tokenizers() -> tuple[Any, Any]:
    """Byte-level, learnt from different texts: they share bytes and some words."""
    mine = train_tokenizer([TEXTS[0] * 2, TEXTS[1] * 3, TEXTS[3] * 2], 4096)
    its = train_tokenizer(["the brown items are sorted into boxes 世界 of boxes"] * 3, 4096)
    return mine, its


@pytest.fixture(scope="module")
def pair(tokenizers: tuple[Any, Any], make_llama: Callable[..., Model]) -> tuple[Model, Model]:
    mine, its = tokenizers
    target = make_llama(len(mine) + 5, seed=0)
    target.generation_config.eos_token_id = None
    return target, make_llama(len(its) + 3, seed=1)


@pytest.fixture(scope="module")
def make(tokenizers: tuple[Any, Any], pair: tuple[Model, Model]) -> Callable[..., Engine]:
    def build(how: str = "shared", **more: Any) -> Engine:
        mine, its = tokenizers
        options = {"tokenizer": mine, "draft_tokenizer": its, "vocabulary": how}
        options |= more.pop("proposer_options", {})
        fixed = {"policy": "constant"} if "tree" in more else {"num_draft_tokens": 4}
        given = {"kv_memory": KV, "proposer_options": options, **fixed, **more}
        return Engine(pair[0], draft=pair[1], **given)

    return build


@pytest.fixture(scope="module")
def plain(pair: tuple[Model, Model]) -> Callable[..., list[tuple[int, ...]]]:
    def run(*args: Any) -> list[tuple[int, ...]]:
        return texts(Engine(pair[0], kv_memory=KV), *args)

    return run


def texts(
    engine: Engine, prompts: Items[list[int]], params: SamplingParams, seeds: Items[int]
) -> list[tuple[int, ...]]:
    ids = [
        engine.add_request(prompt, params, seed=seed)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    while engine.scheduler.running:
        engine.step()
        engine.check_integrity()
    found = {out.id: out.token_ids for out in engine.take_finished()}
    assert all(group.used == 0 for group in engine.groups)
    return [found[name] for name in ids]


@pytest.fixture(scope="module")
def prompts(tokenizers: tuple[Any, Any]) -> list[list[int]]:
    return [tokenizers[0](text)["input_ids"] for text in TEXTS]


each_shape = pytest.mark.parametrize(
    "shape",
    [
        {}, {"tree": (3, 2)}, {"tree": (2, 2), "proposer_options": {"kind": "iid"}},
        {"tree": (2, 1), "proposer_options": {"kind": "top_k"}}, {"how": "text"},
    ],
    ids=["chain", "tree", "iid", "top_k", "text"],
)  # fmt: skip


# --- tokens and texts


def vocabulary(tokenizer: Any) -> Vocabulary:
    return Vocabulary(tokenizer, len(tokenizer), "tokenizer")


def test_tokens_say_the_bytes_of_the_text(tokenizers: tuple[Any, Any]) -> None:
    mine = vocabulary(tokenizers[0])
    for text in TEXTS:
        ids = tokenizers[0].encode(text, add_special_tokens=False)
        assert mine.text(ids) == text.encode()
        assert mine.tokens(text.encode()) == ids


def test_bytes_that_are_no_text_are_said_one_by_one(tokenizers: tuple[Any, Any]) -> None:
    mine = vocabulary(tokenizers[0])
    for data in (b"\xe4\xbd", b"ab\xe4", b"\xffab\xe4\xbd\xa0\x80", b"\x80" * 3000):
        assert mine.text(mine.tokens(data)) == data


def test_text_is_encoded_behind_what_stands_before(tokenizers: tuple[Any, Any]) -> None:
    mine = vocabulary(tokenizers[0])
    whole = tokenizers[0].encode(TEXTS[3], add_special_tokens=False)
    for cut in range(1, len(whole)):
        before, after = mine.text(whole[:cut]), mine.text(whole[cut:])
        assert mine.tokens(after, before) == whole[cut:]
    # where no token ends there, it is encoded alone
    assert mine.text(mine.tokens(b"uick brown", b"the q")) == b"uick brown"


def test_pieces_of_sentencepiece_are_read() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", "<0x41>", "<0xE4>", "▁", "A", "▁the", "the", "B"]
    raw = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    found = vocabulary(tokenizer)
    assert set(found.special) == {0, 1, 2}
    assert found.text([7, 6, 3, 4, 1]) == b" theAA\xe4"
    assert found.ids[b"A"] == 6  # not the byte
    assert found.tokens(b"AB") == [6, 9]  # without the space that it puts before everything
    assert found.tokens(b"\xe4A") == [4, 6]


def test_same_tokens_are_found_by_what_they_say(tokenizers: tuple[Any, Any]) -> None:
    mine, its = (vocabulary(tokenizer) for tokenizer in tokenizers)
    translation = Translation(mine, its, CPU)
    assert not translation.is_identity
    assert 256 < len(translation.pairs) < len(mine.bytes)
    for token, other in translation.pairs.items():
        if token in mine.bytes:
            assert mine.bytes[token] == its.bytes[other]
    assert [translation.pairs[t] for t in (mine.bos, mine.eos)] == [its.bos, its.eos]  # type: ignore[index]
    assert Translation(mine, mine, CPU).is_identity


def test_logits_stand_at_the_target_s_ids(tokenizers: tuple[Any, Any]) -> None:
    mine, its = (vocabulary(tokenizer) for tokenizer in tokenizers)
    translation = Translation(mine, its, CPU)
    logits = torch.randn(3, its.size)
    found = translation.logits(logits)
    assert found.shape == (3, mine.size)
    for token in range(mine.size):
        if token in translation.pairs:
            assert torch.equal(found[:, token], logits[:, translation.pairs[token]])
        else:
            assert bool((found[:, token].softmax(-1) > 0).all())  # finite
            assert bool((found.softmax(-1)[:, token] == 0).all())
    nodes = torch.tensor(list(translation.pairs))
    assert translation.nodes(nodes).tolist() == list(translation.pairs.values())


def test_committed_tokens_are_read_as_the_draft_s(tokenizers: tuple[Any, Any]) -> None:
    mine, its = (vocabulary(tokenizer) for tokenizer in tokenizers)
    translation = Translation(mine, its, CPU)
    for text in TEXTS:
        ids = tokenizers[0](text)["input_ids"]
        assert translation.begin(ids) == tokenizers[1](text)["input_ids"]
        read = translation.follow(ids[1:])
        assert its.text(read) == text.encode()
        shared = [translation.pairs[t] for t in ids[1:] if t in translation.pairs]
        assert [t for t in read if t in shared] != [] or not shared
        # what the draft guessed is kept as far as it says the same
        guess = its.tokens(text.encode())
        assert translation.follow(ids[1:], guess) == guess
        wrong = [*guess[: len(guess) // 2], its.tokens(b"~")[0]]
        found = translation.follow(ids[1:], wrong)
        assert its.text(found) == text.encode()
        assert found[: len(guess) // 2] == guess[: len(guess) // 2]


def test_prompt_without_text_still_gives_the_draft_a_token(tokenizers: tuple[Any, Any]) -> None:
    mine, its = (vocabulary(tokenizer) for tokenizer in tokenizers)
    translation = Translation(mine, its, CPU)
    assert mine.eos is not None
    assert translation.begin([mine.eos]) == [its.bos, its.eos]
    assert len(translation.begin([mine.size + 4])) == 1


# --- what comes out


@each_shape
def test_greedy_output_is_that_of_plain_decoding(
    make: Callable[..., Engine], plain: Callable[..., Any], prompts: list[list[int]],
    shape: dict[str, Any],
) -> None:  # fmt: skip
    engine = make(**shape)
    assert texts(engine, prompts, GREEDY, range(4)) == plain(prompts, GREEDY, range(4))
    assert engine.stats.drafted > 20


@each_shape
def test_gumbel_output_is_that_of_plain_sampling(
    make: Callable[..., Engine], plain: Callable[..., Any], prompts: list[list[int]],
    shape: dict[str, Any],
) -> None:  # fmt: skip
    engine = make(**shape, verification="gumbel")
    assert texts(engine, prompts, SAMPLED, range(4)) == plain(prompts, SAMPLED, range(4))


@each_shape
def test_ragged_batch_gives_each_prompt_what_it_gives_alone(
    make: Callable[..., Engine], prompts: list[list[int]], shape: dict[str, Any]
) -> None:
    alone = [texts(make(**shape), [p], SAMPLED, [i])[0] for i, p in enumerate(prompts)]
    assert texts(make(**shape), prompts, SAMPLED, range(4)) == alone


def test_draft_reads_what_was_said(
    make: Callable[..., Engine], prompts: list[list[int]], pair: tuple[Model, Model]
) -> None:
    """The stored law is that of the draft's own forward on the text in its tokens."""
    engine = make(num_draft_tokens=3)
    proposer = engine.proposer
    assert isinstance(proposer, DraftModelProposer)
    propose, checked = proposer.propose, 0

    def watched(
        sequences: Items[Sequence], budgets: Items[int], noise: PhiloxNoise
    ) -> list[TokenTree]:
        nonlocal checked
        trees = propose(sequences, budgets, noise)
        translation = proposer.model.translation
        assert translation is not None
        for sequence, tree in zip(sequences, trees, strict=True):
            text = proposer.model._texts[sequence].tokens
            assert translation.draft.text(text) == translation.target.text(sequence.tokens)
            if tree.laws is None:
                continue
            drafted = tree.tokens.tolist()
            ids = torch.tensor([[*text, *(translation.pairs[t] for t in drafted)]])
            with torch.no_grad():
                own = pair[1](ids).logits[0, len(text) - 1 : -1].float()
            law = sequence.law.probabilities(translation.logits(own), lambda: None)  # type: ignore[arg-type, return-value]
            torch.testing.assert_close(tree.laws, law, rtol=1e-3, atol=1e-5)
            shared = torch.zeros(tree.laws.shape[1], dtype=torch.bool)
            shared[translation.shared] = True
            assert bool((tree.laws[:, ~shared] == 0).all())
            torch.testing.assert_close(tree.laws.sum(-1), torch.ones(len(tree)))
            checked += len(tree)
        return trees

    proposer.propose = watched  # type: ignore[method-assign, assignment]
    texts(engine, prompts, SamplingParams(max_new_tokens=24, temperature=1.2), range(4))
    assert checked > 60


def test_drafted_tokens_are_drawn_from_the_stored_law(make: Callable[..., Engine]) -> None:
    engine = make(kv_memory=1 << 26)
    params = SamplingParams(max_new_tokens=4, top_k=5)
    for seed in range(1024):
        engine.add_request([0, 45], params, seed=seed)
    assert engine.proposer is not None
    sequences = engine.scheduler.running
    trees = engine.proposer.propose(sequences, [1] * len(sequences), engine.noise)
    counts = torch.zeros(trees[0].laws.shape[1])  # type: ignore[union-attr]
    for tree in trees:
        counts[tree.tokens[0]] += 1
    law = trees[0].laws[0]  # type: ignore[index]
    spread = (law * (1 - law) / 1024).sqrt()
    assert bool(((counts / 1024 - law).abs() <= 4.5 * spread + 1e-6).all())
    assert int((counts > 0).sum()) >= 3


def test_text_of_a_good_draft_is_accepted(
    tokenizers: tuple[Any, Any], make_llama: Callable[..., Model]
) -> None:
    """A target and a draft that go round in one word, each in its own tokens."""
    mine, its = tokenizers
    models = []
    for tokenizer in tokenizers:
        model = make_llama(len(tokenizer), seed=3)
        model.generation_config.eos_token_id = None
        [*_, word] = tokenizer(" brown")["input_ids"]
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.model.norm.weight.zero_()  # the logits are the same everywhere
        model.lm_head = torch.nn.Linear(model.config.hidden_size, len(tokenizer))
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.bias.zero_()
            model.lm_head.bias[word] = 9.0
        models.append(model.eval())
    spec = specdec.wrap(
        models[0], draft=models[1], num_draft_tokens=4,
        proposer_options={"tokenizer": mine, "draft_tokenizer": its, "vocabulary": "text"},
    )  # fmt: skip
    ids = torch.tensor([mine("the")["input_ids"]])
    out = spec.generate(ids, do_sample=False, max_new_tokens=20, return_dict_in_generate=True)
    assert mine.decode(out.sequences[0, ids.shape[1] :]) == " brown" * 20
    assert out.stats.accepted == out.stats.drafted > 0


def test_processors_that_leave_no_shared_token_are_followed(
    tokenizers: tuple[Any, Any], pair: tuple[Model, Model]
) -> None:
    mine, its = (vocabulary(tokenizer) for tokenizer in tokenizers)
    pairs = Translation(mine, its, CPU).pairs
    only = [token for token in mine.bytes if token not in pairs][:2]
    for tree in (None, (2, 1)):
        spec = specdec.wrap(
            pair[0], draft=pair[1], tree=tree, policy="constant",
            proposer_options={"tokenizer": tokenizers[0], "draft_tokenizer": tokenizers[1]},
        )  # fmt: skip
        out = spec.generate(
            torch.tensor([[0, 45, 46]]), do_sample=True, max_new_tokens=8, seed=1,
            prefix_allowed_tokens_fn=lambda *_: only,
        )  # fmt: skip
        assert set(out[0, 3:].tolist()) <= set(only)


# --- caches


@pytest.mark.parametrize("how", ["shared", "text"])
@pytest.mark.parametrize("window", [None, 16])
def test_interrupted_steps_leave_no_trace(
    make: Callable[..., Engine], prompts: list[list[int]], how: str, window: int | None
) -> None:
    wanted = texts(make(how, draft_window=window), prompts, SAMPLED, range(4))
    engine = make(how, draft_window=window)
    for seed, prompt in enumerate(prompts):
        engine.add_request(prompt, SAMPLED, seed=seed)
    verify, observe = engine.verifier.verify, engine.proposer.observe  # type: ignore[union-attr]
    steps = 0

    def raising(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps % 2:
            raise KeyboardInterrupt
        return verify(*args)

    def late(*args: Any) -> None:
        observe(*args)
        if steps % 4 == 0:
            raise KeyboardInterrupt

    engine.verifier.verify = raising  # type: ignore[method-assign, assignment]
    engine.proposer.observe = late  # type: ignore[method-assign, union-attr]
    while engine.scheduler.running:
        try:
            engine.step()
        except KeyboardInterrupt:
            engine.check_integrity()
    found = {out.id: out.token_ids for out in engine.take_finished()}
    assert [found[f"request-{i + 1}"] for i in range(4)] == wanted


@pytest.mark.parametrize("how", ["shared", "text"])
def test_draft_stops_where_its_own_context_ends(
    tokenizers: tuple[Any, Any], pair: tuple[Model, Model], make_llama: Callable[..., Model],
    plain: Callable[..., Any], how: str,
) -> None:  # fmt: skip
    mine, its = tokenizers
    short = make_llama(len(its), seed=1, max_position_embeddings=40)
    options = {"tokenizer": mine, "draft_tokenizer": its, "vocabulary": how}
    engine = Engine(
        pair[0], draft=short, kv_memory=KV, proposer_options=options, num_draft_tokens=4
    )
    prompts = [mine("the quick")["input_ids"], mine(TEXTS[1] * 2)["input_ids"]]
    params = SamplingParams(max_new_tokens=60, temperature=0)
    assert texts(engine, prompts, params, [0, 1]) == plain(prompts, params, [0, 1])
    assert engine.stats.drafted > 0


# --- what is chosen, and what is refused


def test_identical_tokenizers_cost_nothing(
    pair: tuple[Model, Model], tokenizers: tuple[Any, Any], make_draft: Callable[..., Model]
) -> None:
    options = {"tokenizer": tokenizers[0], "draft_tokenizer": tokenizers[0]}
    engine = Engine(pair[0], draft=make_draft(pair[0]), kv_memory=KV, proposer_options=options)
    assert isinstance(engine.proposer, DraftModelProposer)
    assert engine.proposer.model.translation is None
    assert len(engine.groups) == 1


def test_tokenizers_with_little_in_common_draft_text(
    tokenizers: tuple[Any, Any], pair: tuple[Model, Model], make_llama: Callable[..., Model]
) -> None:
    words = train_tokenizer(
        [" ".join(f"{a}{b}{c}qzx" for a in "klmnp" for b in "aeiou" for c in "rstvw" * 4)] * 2, 64
    )
    options = {"tokenizer": tokenizers[0], "draft_tokenizer": words}
    engine = Engine(
        pair[0], draft=make_llama(len(words), seed=1), kv_memory=KV, proposer_options=options
    )
    mine, its = vocabulary(tokenizers[0]), vocabulary(words)
    narrow = Translation(mine, its, CPU).is_narrow
    assert isinstance(engine.proposer, TextDraftProposer) == narrow


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"draft: its vocabulary has 5000 tokens, the target's \d+; .*'draft_tokenizer'"),
        ({"tokenizer": 1}, "tokenizer and draft_tokenizer: expected both"),
        ({"vocabulary": "text"}, "proposer='text' needs proposer_options="),
        ({"vocabulary": "words"}, "vocabulary='words': expected 'auto', 'shared' or 'text'"),
        ({"tokenizer": 1, "draft_tokenizer": 2}, "tokenizer=1: expected a transformers tokenizer"),
    ],
    ids=["none", "one", "text", "how", "no tokenizer"],
)
def test_what_is_missing_is_named(
    pair: tuple[Model, Model], make_llama: Callable[..., Model], options: dict[str, Any],
    message: str,
) -> None:  # fmt: skip
    other = make_llama(5000, seed=1, hidden_size=8)
    with pytest.raises(InvalidArgumentError, match=message):
        Engine(pair[0], draft=other, kv_memory=KV, proposer_options=options)


def test_text_drafts_no_trees(make: Callable[..., Engine]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"vocabulary=.text. drafts a chain: .* .tree."):
        make("text", tree=(2, 1))


def test_tokenizer_of_another_model_is_refused(
    pair: tuple[Model, Model], tokenizers: tuple[Any, Any], make_llama: Callable[..., Model]
) -> None:
    small = make_llama(100, seed=1)
    options = {"tokenizer": tokenizers[0], "draft_tokenizer": tokenizers[1]}
    with pytest.raises(InvalidArgumentError, match=r"draft_tokenizer: its ids go up to \d+, those"):
        Engine(pair[0], draft=small, kv_memory=KV, proposer_options=options)
