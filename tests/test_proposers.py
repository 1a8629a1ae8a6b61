"""The contract of every registered proposer, the registry itself, and trees drafted by a model."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence as Items
from importlib.metadata import EntryPoint
from math import log, sqrt
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
)

import specdec
from specdec import Engine, Proposer, SamplingParams, TokenTree, proposers
from specdec.cli.main import main
from specdec.errors import InvalidArgumentError
from specdec.proposers import REGISTRY
from specdec.proposers.model import DraftModel
from specdec.proposers.retrieval_build import write_index
from specdec.rng import Noise
from specdec.runner import SequenceRows
from specdec.sequence import Sequence
from specdec.shapes import expansion_parents, rows_per_level
from specdec.verifier import Verdict

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part

KV = 1 << 20
# they repeat themselves, so that something can be looked up in them
PROMPTS = [[0, 45, 67, 89, 45, 67], [0, 200, 31, 200], [0, *range(20, 60), *range(20, 30)], [7]]
NEW = 14
GREEDY = SamplingParams(max_new_tokens=NEW, temperature=0)
SAMPLED = SamplingParams(max_new_tokens=NEW, temperature=0.9, top_p=0.95)

# the second child of the root is a leaf, the third has more children than the first
IRREGULAR = (-1, -1, -1, 0, 2, 2, 3, 3, 4, 8)
# name -> options that it cannot do without
FOLDER = tempfile.TemporaryDirectory()
INDEX = Path(FOLDER.name) / "small.idx"
write_index(INDEX, [([3, 6, 4, 3, 7, 5, 2, 1, 0, 4, 6, 6], True)] * 2, vocab_size=8)
REQUIRED: dict[str, dict[str, Any]] = {
    "retrieval": {"index": INDEX, "min_match": 1},
    "tree": {"tree": (3, 2, 1)},
}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, REQUIRED.get(name, {})) for name in sorted(REGISTRY)),
    ("draft", {"kind": "coupled"}),
    ("dynamic_tree", {"kind": "coupled", "nodes": 9, "depth": 3, "top_k": 4}),
    ("beam_tree", {"width": 2, "depth": 3}),
    *(("tree", {"tree": (2, 2, 1), "kind": kind}) for kind in ("iid", "top_k", "coupled")),
    ("tree", {"tree": (1, 1, 2, 1)}),  # a trunk, then branches
    ("tree", {"tree": (1, 1, 1)}),  # a chain
    *(("tree", {"shape": IRREGULAR, "kind": kind}) for kind in ("auto", "iid", "top_k", "coupled")),
    ("ensemble", {"members": ["suffix", "tree", "ngram"], "tree": {"tree": (2, 2)}}),
]


def spelt(options: dict[str, Any]) -> str:
    """The same in every process that collects these tests."""
    return str([v.name if isinstance(v, Path) else v for v in options.values()])


each_proposer = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else spelt(v)
)


def spelling(tokens: int) -> dict[str, Any]:
    """The options of the proposer `text` where every token of both models is one letter."""
    raw = Tokenizer(BPE({chr(0x4E00 + token): token for token in range(tokens)}, []))
    its = PreTrainedTokenizerFast(tokenizer_object=raw)
    return {"tokenizer": its, "draft_tokenizer": its}


class Watched(Engine):
    """An engine whose cache is checked after every step."""

    def step(self) -> list[specdec.StepRecord]:
        records = super().step()
        self.check_integrity()
        return records


@pytest.fixture(scope="module")
def make(target: Model, draft: Model) -> Callable[..., Watched]:
    """An engine of the tiny target with a proposer by name; without a name plain decoding."""

    def build(name: str | None = None, options: Any = None, **more: Any) -> Watched:
        its_draft = draft if name is not None and REGISTRY[name].needs_draft else None
        has_shape = options and {"tree", "shape", "nodes", "width"} & set(options)
        fixed = {"policy": "constant"} if has_shape else {}
        given = {"draft": its_draft, "kv_memory": KV, **fixed, **more}
        if name == "text":
            options = spelling(target.config.vocab_size)
        return Watched(target, proposer=name, proposer_options=options, **given)

    return build


def texts(
    engine: Engine, prompts: Items[list[int]], params: SamplingParams, seeds: Items[int]
) -> list[tuple[int, ...]]:
    """The continuations of prompts that run side by side."""
    ids = [
        engine.add_request(prompt, params, seed=seed)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    found = {out.id: out.token_ids for out in engine}
    assert all(group.used == 0 for group in engine.groups)
    return [found[name] for name in ids]


# --- the contract


@each_proposer
def test_greedy_output_is_that_of_plain_decoding(
    make: Callable[..., Engine], name: str, options: dict[str, Any]
) -> None:
    wanted = texts(make(), PROMPTS, GREEDY, range(4))
    assert texts(make(name, options), PROMPTS, GREEDY, range(4)) == wanted


@each_proposer
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_ragged_batch_gives_each_prompt_what_it_gives_alone(
    make: Callable[..., Engine], name: str, options: dict[str, Any], params: SamplingParams
) -> None:
    seeds = [5, 6, 7, 8]
    fixed = {"policy": "constant"}  # of an adaptive one only the law is promised
    alone = [
        texts(make(name, options, **fixed), [prompt], params, [seed])[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert texts(make(name, options, **fixed), PROMPTS, params, seeds) == alone


@each_proposer
def test_empty_proposal_is_plain_decoding(
    make: Callable[..., Engine], name: str, options: dict[str, Any]
) -> None:
    engine = make(name, options, num_draft_tokens=0)
    assert texts(engine, PROMPTS, GREEDY, range(4)) == texts(make(), PROMPTS, GREEDY, range(4))
    assert engine.stats.drafted == 0
    engine = make(name, options)
    params = SamplingParams(max_new_tokens=1, temperature=0.7)  # nothing is worth a draft
    assert [len(text) for text in texts(engine, PROMPTS, params, range(4))] == [1] * 4
    assert engine.stats.drafted == 0


@each_proposer
def test_gumbel_output_is_that_of_plain_sampling_with_the_seed(
    make: Callable[..., Engine], name: str, options: dict[str, Any]
) -> None:
    seeds = range(11, 15)
    wanted = texts(make(), PROMPTS, SAMPLED, seeds)
    assert texts(make(name, options, verification="gumbel"), PROMPTS, SAMPLED, seeds) == wanted


@each_proposer
def test_trees_keep_the_protocol(
    make: Callable[..., Engine], name: str, options: dict[str, Any]
) -> None:
    engine = make(name, options, policy="constant")
    propose, seen = engine.proposer.propose, Counter[bool]()  # type: ignore[union-attr]

    def checked(sequences: Items[Sequence], budgets: Items[int], noise: Noise) -> list[TokenTree]:
        trees = propose(sequences, budgets, noise)
        for sequence, tree, budget in zip(sequences, trees, budgets, strict=True):
            assert len(tree) <= budget
            assert tree.max_depth < sequence.remaining
            TokenTree.build(tree.tokens, tree.parents, tree.proposals, tree.laws)
            seen[len(tree) > 0] += 1
        return trees

    engine.proposer.propose = checked  # type: ignore[method-assign, union-attr]
    for params in (GREEDY, SAMPLED):
        texts(engine, PROMPTS, params, range(4))
    assert seen[True] > 0


# --- the law of what is sampled

SAMPLES = 3072
PROMPT = [3, 6, 4, 3, 6, 4]


@pytest.fixture(scope="module")
def tiny_pair(
    make_llama: Callable[..., Model], make_draft: Callable[..., Model]
) -> tuple[Model, Model]:
    """Eight tokens, no end token, a draft that is right about half of the time."""
    target = make_llama(8, seed=3, hidden_size=16, num_hidden_layers=1)
    target.generation_config.eos_token_id = None
    return target, make_draft(target, 0.15)


def distance(target: Model, spec: specdec.SpecModel) -> tuple[float, float]:
    """Total variation between the law of two tokens and what was sampled, and what sampling noise
    alone exceeds with probability 1e-4 (the mean, then McDiarmid's inequality)."""
    with torch.no_grad():
        ids = torch.tensor([[*PROMPT, token] for token in range(8)])
        p = target(ids).logits.double().softmax(-1)
    law = (p[0, -2][:, None] * p[:, -1]).flatten()
    counts = torch.zeros(64)
    for seed in range(SAMPLES // 512):
        out = spec.generate(
            torch.tensor([PROMPT]), do_sample=True, max_new_tokens=3, num_return_sequences=512,
            top_k=0, seed=100 + seed,
        )  # fmt: skip
        pairs = out[:, len(PROMPT)] * 8 + out[:, len(PROMPT) + 1]
        counts += torch.bincount(pairs, minlength=64)
    noise = float((law * (1 - law) / SAMPLES).sqrt().sum()) / 2
    bound = noise + sqrt(log(1e4) / (2 * SAMPLES))
    return float((counts / SAMPLES - law).abs().sum()) / 2, bound


@each_proposer
def test_sampled_tokens_follow_the_target_s_law(
    tiny_pair: tuple[Model, Model], name: str, options: dict[str, Any]
) -> None:
    target, draft = tiny_pair
    its_draft = draft if REGISTRY[name].needs_draft else None
    if name == "text":
        options = spelling(8)
    spec = specdec.wrap(target, draft=its_draft, proposer=name, proposer_options=options)
    found, bound = distance(target, spec)
    assert found < bound


def test_siblings_in_another_order_are_caught(
    tiny_pair: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = tiny_pair
    largest = DraftModel.largest
    monkeypatch.setattr(
        DraftModel, "largest",
        lambda self, scores, width: largest(self, scores, width).sort(-1).values,
    )  # fmt: skip
    found, bound = distance(
        target, specdec.wrap(target, draft=draft, tree=(4, 2), policy="constant")
    )
    assert found > bound


@pytest.mark.parametrize("kind", ["without_replacement", "iid"])
def test_children_are_drawn_from_the_stored_law(tiny_pair: tuple[Model, Model], kind: str) -> None:
    target, draft = tiny_pair
    engine = Engine(
        target,
        draft=draft,
        tree=(2,),
        policy="constant",
        proposer_options={"kind": kind},
        kv_memory=1 << 22,
    )
    params = SamplingParams(max_new_tokens=4)
    for seed in range(2048):
        engine.add_request(PROMPT[:2], params, seed=seed)
    assert engine.proposer is not None
    sequences = engine.scheduler.running
    trees = engine.proposer.propose(sequences, [2] * len(sequences), engine.noise)
    counts = torch.zeros(8, 8, dtype=torch.float64)
    for tree in trees:
        first, second = tree.proposals
        counts[first.token, second.token] += 1
    assert trees[0].laws is not None
    q = trees[0].laws[0].double()
    law = q[:, None] * q[None]
    if kind == "without_replacement":
        law = (q[:, None] * q[None] / (1 - q)[:, None]).fill_diagonal_(0)
    chi_square = ((counts - law * 2048) ** 2 / (law * 2048).clamp_min(1e-9))[law > 0].sum()
    assert chi_square < 120  # 63 degrees of freedom: exceeded with probability 1e-5
    engine.abort_all()


# --- trees drafted by a model


@pytest.mark.parametrize(
    "shape",
    [
        *map(expansion_parents, [(2, 2, 1), (1, 2, 3), (3, 1, 1, 1), (1, 1, 1)]),
        (-1, -1, -1, 0, 0, 2, 3, 3, 5, 6),  # leaves beside nodes with children
        (-1, -1, 0, 0, 2, 2, 4),  # nodes with children on one line
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("kind", "params"),
    [("auto", GREEDY), ("auto", SAMPLED), ("coupled", SAMPLED)],
    ids=["greedy", "sampled", "coupled"],
)
def test_target_as_its_own_draft_is_accepted_to_the_last_level(
    target: Model, shape: tuple[int, ...], kind: str, params: SamplingParams
) -> None:
    # accepted nodes lie in scattered slots: a draft that read wrong ones would soon disagree
    engine = Watched(
        target, draft=target, proposer="tree", policy="constant", kv_memory=KV,
        proposer_options={"shape": shape, "kind": kind},
    )  # fmt: skip
    params = SamplingParams(60, params.temperature, top_p=params.top_p)
    engine.add_request(PROMPTS[0], params, seed=3)
    accepted = [record.accepted for _ in range(8) for record in engine.step()]
    assert accepted == [len(rows_per_level(shape))] * 8
    engine.abort_all()


@pytest.mark.parametrize(
    ("options", "wanted", "logits"),
    [
        ({"tree": (3, 2, 1)}, [6, 3, 9], [1, 3, 6]),
        ({"shape": IRREGULAR}, [6, 2, 4, 5], [1, 2, 2, 1]),  # leaves are not computed
        ({"shape": (-1, -1, 0, 0, 2, 2, 4)}, [6, 1, 1, 1], [1, 1, 1, 1]),  # one line: no branches
    ],
    ids=str,
)
def test_draft_runs_once_per_level(
    make: Callable[..., Engine], options: dict[str, Any], wanted: list[int], logits: list[int]
) -> None:
    engine = make("tree", options)
    assert isinstance(engine.proposer, proposers.DraftTreeProposer)
    runner = engine.proposer.model.runner
    computed: list[int] = []
    kept: list[int] = []
    score = runner.score

    def counted(rows: Items[SequenceRows]) -> Tensor:
        nodes = [0 if row.nodes is None else len(row.nodes) for row in rows]
        computed.append(sum(nodes) + sum(len(row.tokens) for row in rows))
        kept.append(sum(row.keep for row in rows))
        return score(rows)

    runner.score = counted  # type: ignore[method-assign]
    engine.add_request(PROMPTS[0], SAMPLED)
    engine.step()
    assert (computed, kept) == (wanted, logits)
    assert engine.proposer.draft_rows(9)[1:] == tuple(wanted[1:])


@pytest.mark.parametrize("kind", ["without_replacement", "top_k", "coupled"])
@pytest.mark.parametrize("shape", [expansion_parents((3, 2, 1)), IRREGULAR], ids=str)
def test_nothing_is_read_back_while_drafting(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, kind: str, shape: tuple[int, ...]
) -> None:
    engine = make("tree", {"shape": shape, "kind": kind})
    engine.add_request(PROMPTS[0], SAMPLED)
    engine.step()
    assert engine.proposer is not None

    def refuse(*_: Any) -> Any:
        raise AssertionError("a tensor was read back")

    for reader in ("tolist", "item", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, reader, refuse)
    [tree] = engine.proposer.propose(engine.scheduler.running, [15], engine.noise)
    monkeypatch.undo()
    assert len(tree) == len(shape)


@pytest.mark.parametrize(
    ("number", "drafted"), [(3, 3), (8, 3), (9, 9), (14, 9), (15, 15), (40, 15)]
)
def test_budget_is_used_up_by_whole_levels(
    make: Callable[..., Engine], number: int, drafted: int
) -> None:
    engine = make("tree", {"tree": (3, 2, 1)}, num_draft_tokens=number)
    engine.add_request(PROMPTS[0], SAMPLED)
    [record] = engine.step()
    assert record.drafted == drafted


def test_tree_is_no_deeper_than_what_may_still_be_emitted(make: Callable[..., Engine]) -> None:
    engine = make("tree", {"tree": (3, 2, 1)})
    engine.add_request(PROMPTS[0], SamplingParams(max_new_tokens=3, temperature=0))
    assert engine.step()[0].drafted == 9


def test_tree_at_the_end_of_the_context(make: Callable[..., Engine]) -> None:
    prompt = [5 + i % 200 for i in range(250)]  # of 256
    params = SamplingParams(max_new_tokens=50, temperature=0)
    wanted = texts(make(), [prompt], params, [1])
    assert texts(make("tree", {"tree": (3, 2, 2)}), [prompt], params, [1]) == wanted


def test_cut_law_gives_fewer_children(make: Callable[..., Engine]) -> None:
    engine = make("tree", {"tree": (4, 3)})
    engine.add_request(PROMPTS[0], SamplingParams(max_new_tokens=9, top_k=2))
    assert engine.step()[0].drafted == 2 + 4


@pytest.mark.parametrize("kind", ["without_replacement", "iid", "top_k", "coupled"])
def test_law_with_fewer_tokens_than_children(make: Callable[..., Engine], kind: str) -> None:
    # the nucleus is one token, temperature leaves others without mass
    params = SamplingParams(max_new_tokens=NEW, temperature=0.05, top_p=0.01)
    wanted = texts(make(), PROMPTS, GREEDY, range(4))
    assert texts(make("tree", {"tree": (4, 2), "kind": kind}), PROMPTS, params, range(4)) == wanted


def test_more_children_than_tokens(tiny_pair: tuple[Model, Model]) -> None:
    target, draft = tiny_pair
    engine = Engine(target, draft=draft, tree=(20,), policy="constant", kv_memory=KV)
    engine.add_request(PROMPT, SamplingParams(max_new_tokens=3))
    assert engine.step()[0].drafted == 8


def test_duplicates_of_iid_draws_share_a_node(tiny_pair: tuple[Model, Model]) -> None:
    target, draft = tiny_pair
    engine = Engine(
        target, draft=draft, tree=(8, 2), proposer_options={"kind": "iid"}, kv_memory=KV
    )
    engine.add_request(PROMPT, SamplingParams(max_new_tokens=9), seed=1)
    assert engine.proposer is not None
    [tree] = engine.proposer.propose(engine.scheduler.running, [24], engine.noise)
    nodes = {proposal.node for proposal in tree.proposals if proposal.parent < 0}
    draws = [proposal for proposal in tree.proposals if proposal.parent < 0]
    assert len(nodes) < len(draws) == 8
    assert len(tree.proposals) == 8 + 2 * len(nodes)


def shape_of(tree: TokenTree) -> tuple[int, ...]:
    """The tree's shape: parents level by level, siblings in draw order."""
    children: dict[int, list[int]] = {}
    for proposal in tree.proposals:
        its = children.setdefault(proposal.parent, [])
        if proposal.node not in its:
            its.append(proposal.node)
    parents: list[int] = []
    level = [(-1, -1)]  # number in the tree, number level by level
    while level:
        below = []
        for node, place in level:
            for child in children.get(node, []):
                below.append((child, len(parents)))
                parents.append(place)
        level = below
    return tuple(parents)


@pytest.mark.parametrize("kind", ["without_replacement", "top_k", "coupled"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tree_has_the_shape_asked_for(
    make: Callable[..., Engine], kind: str, params: SamplingParams
) -> None:
    engine = make("tree", {"shape": IRREGULAR, "kind": kind})
    assert engine.proposer is not None
    for budget, nodes in ((99, 10), (10, 10), (9, 9), (8, 6), (6, 6), (5, 3), (3, 3), (2, 0)):
        engine.abort_all()
        engine.add_request(PROMPTS[0], params)
        [tree] = engine.proposer.propose(engine.scheduler.running, [budget], engine.noise)
        assert shape_of(tree) == IRREGULAR[:nodes]


def test_shared_node_takes_the_place_of_its_first_draw(tiny_pair: tuple[Model, Model]) -> None:
    # places: the first has one child, the second none, the third two
    target, draft = tiny_pair
    options = {"shape": (-1, -1, -1, 0, 2, 2), "kind": "iid"}
    engine = Engine(target, draft=draft, proposer="tree", proposer_options=options, kv_memory=KV)
    params = SamplingParams(max_new_tokens=9)
    seen = set()
    for seed in range(64):
        name = engine.add_request(PROMPT, params, seed=seed)
        assert engine.proposer is not None
        [tree] = engine.proposer.propose(engine.scheduler.running, [6], engine.noise)
        a, b, c = [proposal.token for proposal in tree.proposals if proposal.parent < 0]
        below = Counter(tree.tokens[p.parent].item() for p in tree.proposals if p.parent >= 0)
        wanted = {a: 1} if c in (a, b) else {a: 1, c: 2}
        assert dict(below) == wanted
        seen.add((a == b, b == c, a == c))
        engine.abort(name)
    assert len(seen) == 5  # every way in which three draws can agree


def test_processors_act_along_each_path(target: Model) -> None:
    own = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
    ids = torch.tensor([PROMPTS[0]])
    wanted = target.generate(ids, **options, logits_processor=own)
    rates = []
    for use in (True, False):
        spec = specdec.wrap(
            target,
            draft=target,
            tree=(2, 2, 1),
            policy="constant",
            proposer_options={"processors": use},
        )
        assert torch.equal(spec.generate(ids, **options, logits_processor=own), wanted)
        assert spec.last_stats is not None
        rates.append(spec.last_stats.tokens_per_target_pass)
    assert rates[0] > 3.5 > rates[1]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"tree": (2, 2)}, "traversal"),
        ({"tree": (1, 1)}, "block"),
        ({"tree": (2, 2), "options": {"kind": "top_k"}}, "walk"),
        ({"tree": (2, 2), "options": {"kind": "coupled"}}, "gumbel"),
        ({"tree": (2, 2), "options": {"temperature": 0}}, "walk"),
    ],
    ids=lambda v: "" if isinstance(v, dict) else v,
)
def test_rule_that_auto_means(
    make: Callable[..., Engine], options: dict[str, Any], rule: str, draft: Model
) -> None:
    engine = make(**options, draft=draft)
    engine.add_request(PROMPTS[0], SAMPLED)
    assert engine.proposer is not None
    trees = engine.proposer.propose(engine.scheduler.running, [6], engine.noise)
    assert engine.verifier.rule_for(engine.scheduler.running[0].law, trees) == rule


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"tree": (2, 2), "verification": "gumbel"}, "coupled"),
        ({"tree": (2, 2), "verification": "kseq"}, "iid"),
        ({"verification": "gumbel"}, "coupled"),
        ({"name": "dynamic_tree", "verification": "gumbel"}, "coupled"),
        ({"name": "dynamic_tree", "options": {"kind": "coupled"}}, "coupled"),
        ({"name": "draft", "options": {"kind": "coupled"}}, "coupled"),
    ],
    ids=str,
)
def test_rule_and_kind_of_draws_choose_each_other(
    make: Callable[..., Engine], draft: Model, options: dict[str, Any], kind: str
) -> None:
    engine = make(**{"draft": draft, **options})
    assert engine.proposer is not None
    assert getattr(engine.proposer, "kind", engine.proposer.law) == kind
    assert engine.verifier.rule == options.get("verification", "gumbel")
    texts(engine, PROMPTS, SAMPLED, range(4))


@pytest.mark.parametrize(
    ("name", "options"),
    [("draft", {}), ("tree", {"tree": (2, 2, 1)}), ("dynamic_tree", {})],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_coupled_draft_of_the_same_model_is_accepted_whole(
    target: Model, name: str, options: dict[str, Any]
) -> None:
    engine = Watched(
        target, draft=target, proposer=name, proposer_options=options, verification="gumbel",
        kv_memory=KV, policy="constant",
    )  # fmt: skip
    engine.add_request(PROMPTS[0], SamplingParams(60, 0.9, top_p=0.95), seed=3)
    records = [record for _ in range(6) for record in engine.step()]
    assert all(record.accepted >= 3 for record in records)
    engine.abort_all()


# --- the command line


def test_tree_on_the_command_line(models: Path) -> None:
    args = ["generate", "def f", "--target", str(models / "target"), "--draft"]
    args += [str(models / "draft"), "--max-new-tokens", "9", "--json"]
    plain, tree = (
        json.loads(CliRunner().invoke(main, [*args, *more]).stdout)
        for more in (["--num-draft-tokens", "0"], ["--tree", "3,2,1", "--policy", "constant"])
    )
    assert tree["outputs"] == plain["outputs"]
    assert tree["stats"]["drafted"] > 9 > plain["stats"]["drafted"] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tree", "3,x"], "'--tree': '3,x': expected numbers such as 3,2,1."),
        (["--tree", "3,0"], "expected the number of children per level"),
        (["--tree", "2", "--no-speculation"], "--no-speculation: expected no --tree"),
    ],
    ids=str,
)
def test_tree_that_cannot_be_drafted_is_one_line(args: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["generate", "x", *args])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


# --- what is refused, and plug-ins


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tree": (3, 0)}, r"tree=\(3, 0\): expected the number of children per level"),
        ({"tree": (16, 16)}, "has 272 nodes: expected at most 255"),
        ({"tree": (3, 2), "num_draft_tokens": 2}, "leaves out the first level"),
        ({"tree": (2,), "proposer_options": {"kind": "best"}}, "kind='best': expected one of auto"),
        ({"tree": (2,), "proposer_options": {"size": 2}}, "'size' is no option of proposer='tree'"),
        ({"tree": (2,), "draft": None}, "proposer='tree' needs draft="),
        ({"tree": (2,), "proposer": "plug-in"}, "expected proposer='tree' or none, got 'plug-in'"),
        ({"proposer": "tree"}, "needs proposer_options={'tree': ...}, or {'shape': ...}"),
        ({"tree": (2,), "proposer_options": {"shape": (-1,)}}, "expected one of them"),
        ({"proposer": "tree", "proposer_options": {"shape": (0,)}}, r"shape\[0\]=0: expected -1"),
        ({"proposer": "nobody"}, f"expected one of .*{', '.join(sorted(REGISTRY))}"),
        ({"draft": None, "proposer_options": {"tree": 3}}, "expected none here"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(
    target: Model, draft: Model, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        specdec.wrap(target, **{"draft": draft, **options})


class Repeats(Proposer):
    """Proposes the last token again, as another package might."""

    name = "repeats"
    law = "point"
    seen: ClassVar[list[int]] = []

    def __init__(self, *, times: int = 2) -> None:
        self.times = times

    def propose(
        self, sequences: Items[Sequence], budgets: Items[int], noise: Noise
    ) -> list[TokenTree]:
        del noise
        return [
            TokenTree.chain(torch.tensor(s.tokens[-1:] * min(self.times, budget)).long())
            for s, budget in zip(sequences, budgets, strict=True)
        ]

    def observe(self, sequences: Items[Sequence], verdicts: Items[Verdict]) -> None:
        del sequences
        self.seen.extend(verdict.accepted for verdict in verdicts)


@pytest.fixture
def plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points as three other packages would declare them."""
    group = proposers.PLUG_INS
    points = {
        name: EntryPoint(name, value, group)
        for name, value in {
            "repeats": "its_package:Repeats", "gone": "specdec.no_such_module:X",
            "wrong": "specdec.errors:SpecDecError",
        }.items()
    }  # fmt: skip
    load = EntryPoint.load
    monkeypatch.setattr(
        EntryPoint, "load", lambda self: Repeats if self.name == "repeats" else load(self)
    )
    monkeypatch.setattr(proposers, "_plug_ins", lambda: points)


@pytest.mark.usefixtures("plug_ins")
def test_plug_in_is_found_by_its_name(target: Model, make: Callable[..., Engine]) -> None:
    assert {"repeats", "gone", *REGISTRY} <= set(proposers.names())
    engine = Watched(
        target, proposer="repeats", proposer_options={"times": 3}, policy="constant", kv_memory=KV
    )
    Repeats.seen.clear()
    asked = 0
    observe = engine.policy.observe

    def counted(sequences: Any, trees: Any, verdicts: Any) -> None:
        nonlocal asked
        asked += any(len(tree) for tree in trees)
        observe(sequences, trees, verdicts)

    engine.policy.observe = counted  # type: ignore[method-assign]
    assert texts(engine, PROMPTS, GREEDY, range(4)) == texts(make(), PROMPTS, GREEDY, range(4))
    assert 0 < asked <= len(Repeats.seen) <= engine.stats.steps


@pytest.mark.usefixtures("plug_ins")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proposer": "gone"}, "plug-in specdec.no_such_module:X cannot be imported"),
        ({"proposer": "wrong"}, "plug-in specdec.errors:SpecDecError is no subclass of specdec.P"),
        ({"proposer": "repeats", "proposer_options": {"often": 1}}, "'often' is no option of .*ti"),
        ({"proposer": "other"}, "expected one of .*gone.*repeats"),
    ],
    ids=str,
)
def test_plug_in_that_does_not_work_is_named(
    target: Model, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        specdec.wrap(target, **options)


# One module of each, as another package would have it; the class is called X.
BROKEN = {
    "raises": ('raise RuntimeError("no licence")', "cannot be imported: RuntimeError: no licence"),
    "syntax": ("def (", "cannot be imported: SyntaxError"),
    "abstract": ('law = "point"', r"breaks the protocol: it has no propose\(\)"),
    "nameless": ("name = None\n def propose(self, s, b, n): ...", "its name is None: expected a"),
    "joins": (
        "def join(self): ...\n def propose(self, s, b, n): ...",
        r"its join\(\) cannot be called with 2 arguments: too many positional",
    ),
    "proposes": ("def propose(self, s): ...", r"its propose\(\) cannot be called with 3 arguments"),
    "position": (
        "def __init__(self, size): ...\n def propose(self, s, b, n): ...",
        "its constructor needs 'size' by position: expected options that are keyword-only",
    ),
    "draftless": (
        "needs_draft = True\n def propose(self, s, b, n): ...", "its constructor takes no draft"
    ),
    "fails": (
        'def __init__(self, *, size=3): raise KeyError("size")\n def propose(self, s, b, n): ...',
        r"proposer='fails': its constructor failed with proposer_options={}: KeyError: 'size'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_class_of_a_plug_in_that_breaks_the_protocol_is_named(
    target: Model, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, message = BROKEN[name]
    module = f"specdec_plug_in_{name}"
    head = "" if name in ("raises", "syntax") else "import specdec\nclass X(specdec.Proposer):\n "
    named = "name = 'x'\n " if head else ""
    (tmp_path / f"{module}.py").write_text(f"{head}{named}{body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint(name, f"{module}:X", proposers.PLUG_INS)
    monkeypatch.setattr(proposers, "_plug_ins", lambda: {name: point})
    with pytest.raises(InvalidArgumentError, match=message) as refused:
        Engine(target, proposer=name, kv_memory=KV)
    assert f"proposer='{name}'" in str(refused.value)


def test_error_of_a_plug_ins_constructor_about_an_argument_is_its_own(
    target: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Strict(Repeats):
        def __init__(self, *, times: int = 2) -> None:
            raise InvalidArgumentError(f"times={times}: expected 3")

    monkeypatch.setattr(EntryPoint, "load", lambda _: Strict)
    points = {"strict": EntryPoint("strict", "its_package:Strict", proposers.PLUG_INS)}
    monkeypatch.setattr(proposers, "_plug_ins", lambda: points)
    with pytest.raises(InvalidArgumentError, match=r"^times=2: expected 3$"):
        Engine(target, proposer="strict", kv_memory=KV)


WRONG_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"law": "weird"}, "law='weird': expected one of point, sampled, coupled"),
    ({"law": None}, "law=None: expected one of"),
    ({"preferred_nodes": -3}, "preferred_nodes=-3: expected a whole number, 1 to 255, or None"),
    ({"preferred_nodes": "many"}, "preferred_nodes='many': expected a whole number"),
    ({"spare_slots": -1}, "spare_slots=-1: expected a whole number, 0 or more"),
    ({"max_positions": 0}, "max_positions=0: expected a whole number, 1 or more, or None"),
    ({"nodes_within": lambda *_: -5}, r"nodes_within\(1\)=-5: expected a whole number, 0 to 1"),
    ({"nodes_within": lambda *_: 9}, r"nodes_within\(1\)=9: expected a whole number, 0 to 1"),
    ({"nodes_within": lambda _, depth: depth / 2}, r"nodes_within\(1\)=0.5: expected a whole"),
    ({"draft_rows": lambda *_: [1]}, r"draft_rows\(1\)=\[1\]: expected a tuple of numbers of rows"),
    ({"observe": lambda _: None}, r"its observe\(\) cannot be called with 2 arguments"),
]


@pytest.mark.parametrize(("values", "message"), WRONG_VALUES, ids=[str(m) for _, m in WRONG_VALUES])
@pytest.mark.parametrize("is_member", [False, True], ids=["alone", "member"])
def test_value_of_a_proposer_that_breaks_the_protocol_is_named(
    target: Model, values: dict[str, Any], message: str, is_member: bool
) -> None:
    proposer = type("Broken", (Repeats,), values)()
    given: Any = [proposer, "ngram"] if is_member else proposer
    with pytest.raises(InvalidArgumentError, match=f"proposer='repeats' broke the .*{message}"):
        Engine(target, proposer=given, kv_memory=KV)


@pytest.mark.parametrize("found", ["x", None, 2.0, -1], ids=repr)
@pytest.mark.parametrize("is_member", [False, True], ids=["alone", "member"])
def test_situation_that_is_no_number_is_named(target: Model, found: Any, is_member: bool) -> None:
    class Broken(Repeats):
        def situation(self, sequence: Sequence) -> int:
            del sequence
            number: int = found
            return number

    engine = Watched(target, proposer=[Broken(), "ngram"] if is_member else Broken(), kv_memory=KV)
    engine.add_request(PROMPTS[0], GREEDY, seed=1)
    with pytest.raises(InvalidArgumentError, match=r"'repeats' broke .*situation\(\)=.*: expected"):
        list(engine)
    engine.abort_all()
    assert engine.group.used == 0


@pytest.mark.usefixtures("plug_ins")
def test_draft_that_nobody_asked_for_is_refused(target: Model, draft: Model) -> None:
    with pytest.raises(InvalidArgumentError, match="proposer='repeats' has no use for a draft"):
        specdec.wrap(target, proposer="repeats", draft=draft)


def test_readmes_plug_in_keeps_the_contract(target: Model) -> None:
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"<!-- plug-in:begin -->\n```python\n(.*?)```", readme, re.DOTALL)
    found: dict[str, Any] = {}
    exec(block, found)
    kind = found["Circles"]
    assert kind(longest=3).draft([5, 1, 2, 1, 2], 3).tokens.tolist() == [1, 2, 1]
    assert len(kind().draft([5, 1, 2, 1, 2], 0)) == 0
    assert len(kind().draft([5, 1, 2, 1, 3], 4)) == 0
    with pytest.raises(InvalidArgumentError, match="longest=0"):
        kind(longest=0)
    prompts = [*PROMPTS, [3, 4, 3, 4]]
    for params in (GREEDY, SAMPLED):
        engine = Watched(target, proposer=kind(), kv_memory=KV, policy="constant")
        plain = Engine(target, kv_memory=KV)
        if params is GREEDY:
            wanted = texts(plain, prompts, params, range(5))
            assert texts(engine, prompts, params, range(5)) == wanted
        else:
            assert len(texts(engine, prompts, params, range(5))) == 5
        assert engine.stats.drafted > 0
