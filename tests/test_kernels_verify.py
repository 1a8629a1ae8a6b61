"""The fused verification emits the twin's tokens: specdec.sampling's laws and the batched rules."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from specdec.acceptance import batched
from specdec.acceptance.batched import Outcome, TreeBatch
from specdec.kernels import verify as fused, verify_chains, verify_rows
from specdec.kernels.verify import Trees, Verified, verify
from specdec.rng import PhiloxNoise, StepNoise, split_seed
from specdec.sampling import Truncation
from specdec.tree import Law, Proposal, TokenTree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POINT = Law("point")
PLAIN = Truncation()

pytestmark = pytest.mark.usefixtures("quick_interpreter")


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launch did not write is NaN, or a number that no result holds."""
    empty = torch.empty

    def poisoned(shape: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer = empty(shape, dtype=dtype, device=device)
        return buffer.fill_(float("nan") if dtype.is_floating_point else 77)

    class Torch:
        """torch, but for empty."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    own = Torch()
    own.empty = poisoned  # type: ignore[attr-defined]
    monkeypatch.setattr(fused, "torch", own)


@dataclass(eq=False)
class Case:
    """One sequence."""

    tree: TokenTree
    logits: Tensor  # (rows, V)
    seed: int
    position: int
    truncation: Truncation = PLAIN


def drawn(generator: torch.Generator, law: Tensor) -> int:
    return int(torch.multinomial(law, 1, generator=generator))


def make_case(
    rng: random.Random, V: int, *, kind: str, size: int, depth: int, width: int,
    truncation: Truncation = PLAIN, dtype: torch.dtype = torch.float32, spread: float = 3.0,
) -> Case:  # fmt: skip
    """A tree of up to `size` nodes really drawn from laws that are near the target's."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    rows: list[Tensor] = []
    laws: list[Tensor] = []
    tokens, parents, depths = list[int](), list[int](), [0]
    proposals: list[Proposal] = []
    while len(rows) <= len(tokens):
        row = len(rows)
        rows.append((torch.randn(V, generator=generator) * spread).to(dtype))
        if len(tokens) >= size or depths[row] >= depth:
            continue
        listed: list[tuple[int, Law]] = []
        inner: Any = (
            rng.choice(["iid", "without_replacement", "point"]) if kind == "mixed" else kind
        )
        for _ in range(2 if kind == "mixed" and width > 1 else 1):
            noise = torch.randn(V, generator=generator) * rng.choice([0.3, 1.0, 3.0])
            law = torch.softmax(rows[row].float() + noise, -1)
            count = min(width, size - len(tokens)) if width == 1 else rng.randrange(1, width + 1)
            if inner == "point":
                found = law.topk(min(count, V)).indices.tolist()
                listed += [(token, POINT) for token in found]
            else:
                left = law.clone()
                for _ in range(count):
                    if left.sum() <= 0:
                        break
                    listed.append((drawn(generator, left), Law(inner, len(laws))))
                    if inner == "without_replacement":
                        left[listed[-1][0]] = 0
                laws.append(law)
        children: dict[int, int] = {}
        for token, held in listed:
            if token not in children:
                children[token] = len(tokens)
                tokens.append(token)
                parents.append(row - 1)
                depths.append(depths[row] + 1)
            proposals.append(Proposal(row - 1, token, held, children[token]))
    stored = torch.stack(laws) if laws else None
    tree = TokenTree.build(tokens, parents, proposals, stored)
    seed, position = rng.randrange(2**64), rng.randrange(1, 5000)
    return Case(tree, torch.stack(rows), seed, position, truncation)


def kernel_trees(batch: TreeBatch, cases: Sequence[Case]) -> Trees:
    draws = [(d.parent, d.row, d.law, bool(d.taken)) for d in batch.layout.draws]
    parents = [case.tree.parents for case in cases]
    return Trees.of(batch.tokens.to(DEVICE), parents, draws, batch.layout.laws)


def limits(cases: Sequence[Case]) -> dict[str, Tensor]:
    """The options that some case needs, per sequence."""
    kinds = {"temperature": torch.float64, "top_k": torch.int64, "top_p": torch.float64,
             "min_p": torch.float64}  # fmt: skip
    return {
        name: torch.tensor([getattr(c.truncation, name) for c in cases], dtype=dtype, device=DEVICE)
        for name, dtype in kinds.items()
        if any(getattr(c.truncation, name) != getattr(PLAIN, name) for c in cases)
    }


def run_kernel(rule: str, cases: Sequence[Case], block: int) -> Verified:
    batch = TreeBatch.of([case.tree for case in cases])
    laws = [case.tree.laws for case in cases if case.tree.laws is not None]
    found = verify(
        rule, torch.cat([case.logits for case in cases]).to(DEVICE), kernel_trees(batch, cases),
        torch.tensor([split_seed(case.seed) for case in cases], device=DEVICE),
        torch.tensor([case.position for case in cases], device=DEVICE),
        **limits(cases), q=torch.cat(laws).to(DEVICE) if laws else None, block=block,
    )  # fmt: skip
    return Verified(found.accepted.cpu(), found.tokens.cpu(), found.path.cpu(), found.valid.cpu())


def run_twin(
    rule: str, cases: Sequence[Case], nudge: random.Random | None = None, size: float = 0.0
) -> Outcome:
    """The batched rule; nudge: with laws and coins moved by up to `size`, laws relatively."""
    batch = TreeBatch.of([case.tree for case in cases])
    logits = torch.cat([case.logits for case in cases])
    noise, cpu = PhiloxNoise(), torch.device("cpu")
    if rule == "greedy":
        return batched.greedy(batch, logits.argmax(-1), logits)
    laws = []
    for case in cases:
        if nudge is None:
            laws.append(case.truncation.law(case.logits))
            continue
        g = torch.Generator().manual_seed(nudge.randrange(2**31))
        moved = case.logits.double()
        moved += torch.empty_like(moved).uniform_(-size, size, generator=g)
        laws.append(case.truncation.law(moved.float()).double())
    p = torch.cat(laws)
    if nudge is not None:
        g = torch.Generator().manual_seed(nudge.randrange(2**31))
        p *= 1 + torch.empty_like(p).uniform_(-size, size, generator=g)
    stored = [case.tree.laws for case in cases if case.tree.laws is not None]
    q = torch.cat(stored) if stored else None
    if rule == "gumbel":
        where = [(c.seed, c.position + d) for c in cases for d in (0, *c.tree.depths)]
        rows = noise.gumbel([s for s, _ in where], [at for _, at in where], p.shape[1], cpu)
        return batched.gumbel(batch, p, rows)
    coins = noise.step(
        [c.seed for c in cases], [c.position for c in cases],
        max(len(c.tree) for c in cases) + 1, cpu, batch.copies,
    )  # fmt: skip
    if nudge is not None:
        shift = nudge.uniform(-size, size)
        held = [(t.double() + shift).clamp(0, 1 - 2**-53) for t in (
            coins.draft, coins.accept, coins.residual, coins.bonus)]  # fmt: skip
        coins = StepNoise(*held)
    return batched.BY_COINS[rule](batch, p, q, coins)


def same(a: Outcome | Verified, i: int, b: Outcome | Verified, j: int) -> bool:
    def row(found: Outcome | Verified, k: int) -> tuple[list[int], list[int], bool]:
        n = int(found.accepted[k])
        start = int(found.path[k, 0]) if n else 0
        path = [r - start for r in found.path[k, :n].tolist()]
        return found.tokens[k, : n + 1].tolist(), path, bool(found.valid[k])

    return row(a, i) == row(b, j)


def check(rule: str, cases: Sequence[Case], block: int = 64) -> int:
    """Asserts equality; returns how many sequences differ because a coin lies at a boundary: those
    must follow from laws and coins moved by a few roundings."""
    found, wanted = run_kernel(rule, cases, block), run_twin(rule, cases)
    assert found.tokens.shape == wanted.tokens.shape
    assert found.path.shape == wanted.path.shape
    if torch.equal(found.tokens, wanted.tokens) and torch.equal(found.path, wanted.path):
        assert torch.equal(found.accepted, wanted.accepted)
        assert torch.equal(found.valid, wanted.valid)
        return 0
    differ = [i for i in range(len(cases)) if not same(found, i, wanted, i)]
    for i in differ:
        nudge = random.Random(i)
        near = (run_twin(rule, [cases[i]], nudge, 2e-6) for _ in range(300))
        assert any(same(found, i, other, 0) for other in near), (
            f"{rule}: sequence {i} emits {found.tokens[i].tolist()}, the twin "
            f"{wanted.tokens[i].tolist()}, and no coin is near a boundary"
        )
    return len(differ)


TRUNCATIONS = {
    "temperature": Truncation(temperature=0.7),
    "top-k": Truncation(top_k=3),
    "top-p": Truncation(top_p=0.8),
    "min-p": Truncation(min_p=0.1),
    "all": Truncation(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02),
    "one token": Truncation(top_k=1),
    "tiny top-p": Truncation(top_p=1e-9),
    "plain": PLAIN,
}
SAMPLED = tuple(rule for rule in fused.RULES if rule != "greedy")
DRAFTS = {
    "greedy": ("point", 3), "gumbel": ("point", 3), "walk": ("mixed", 3), "token": ("iid", 1),
    "block": ("iid", 1), "recursive": ("mixed", 3),
}  # fmt: skip


def some(rng: random.Random, rule: str, V: int, count: int, **options: Any) -> list[Case]:
    """Sequences with drafts that the rule judges, of all sizes."""
    kind, width = DRAFTS[rule]
    return [
        make_case(
            rng, V, kind=options.get("kind", kind), size=rng.choice([0, 1, 3, 6]),
            depth=6 if width == 1 else 3, width=width,
            truncation=options.get("truncation", PLAIN),
            dtype=options.get("dtype", torch.float32),
        )
        for _ in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("rule", fused.RULES)
def test_tokens_are_the_twins(rule: str) -> None:
    rng = random.Random(rule)
    cases = [some(rng, rule, V, 16 if V == 7 else 4) for V in (1, 2, 7, 100, 257)]
    differ = sum(check(rule, batch) for batch in cases)
    assert differ <= 1, "of about 100 rows"


@pytest.mark.parametrize("name", ["temperature", "top-k", "top-p", "min-p", "all"])
def test_every_option_leaves_the_twins_law(name: str) -> None:
    rng = random.Random(name)
    for V in (7, 257):
        assert check("walk", some(rng, "walk", V, 2, truncation=TRUNCATIONS[name])) == 0


@pytest.mark.parametrize("rule", SAMPLED)
def test_one_batch_may_mix_options(rule: str) -> None:
    rng = random.Random(rule + " mixed")
    cases = [
        case
        for truncation in TRUNCATIONS.values()
        for case in some(rng, rule, 100, 1, truncation=truncation)
    ]
    assert check(rule, cases) == 0


def test_ties_are_kept_and_cut_as_in_the_twin() -> None:
    """Equal logits at the k-th place, and at the boundary of the nucleus, zeros of both signs."""
    row = torch.tensor([2.0, 1.0, 1.0, 0.0, -0.0, -3.0, 1.0])
    for truncation in (Truncation(top_k=2), Truncation(top_k=5), Truncation(top_p=0.5)):
        law = truncation.law(row[None])[0]
        cases = []
        for seed in range(4):
            tree = TokenTree.chain(torch.empty(0, dtype=torch.long))
            cases.append(Case(tree, row[None], seed, 3, truncation))
        assert check("walk", cases) == 0
        emitted = {int(t) for t in run_kernel("walk", cases, 64).tokens[:, 0]}
        assert emitted <= set(law.nonzero().flatten().tolist())


@pytest.mark.parametrize("rule", ["walk", "block"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_logits(rule: str, dtype: torch.dtype) -> None:
    rng = random.Random(str(dtype))
    assert check(rule, some(rng, rule, 63, 4, dtype=dtype)) == 0


@pytest.mark.parametrize("rule", fused.RULES)
def test_vocabularies_of_several_tiles(rule: str) -> None:
    rng = random.Random(rule)
    assert check(rule, some(rng, rule, 4099, 2), fused.BLOCK) == 0
    large = some(rng, rule, 33_001, 1)  # where the twin too sums by blocks
    assert check(rule, large, fused.BLOCK) == 0


def test_long_lists_are_searched_beyond_their_first_tile() -> None:
    rng = random.Random(3)
    for truncation in (Truncation(top_k=150), Truncation(top_p=0.999), Truncation(min_p=1e-4)):
        cases = [
            make_case(
                rng, 257, kind="iid", size=1, depth=1, width=1, truncation=truncation, spread=0.5
            )
        ]
        assert check("walk", cases) == 0
        assert check("block", cases) == 0


@pytest.mark.parametrize("rule", ["greedy", "walk", "recursive"])
def test_trees_of_256_rows(rule: str) -> None:
    rng = random.Random(rule)
    deep = make_case(rng, 50, kind="point", size=255, depth=255, width=1)
    wide = make_case(rng, 50, kind="point", size=100, depth=7, width=3)
    tree = TokenTree.chain(torch.empty(0, dtype=torch.long))
    empty = Case(tree, torch.randn(1, 50, generator=torch.Generator().manual_seed(1)), 5, 9)
    assert len(deep.tree) == 255
    assert check(rule, [deep, empty, wide]) == 0


@pytest.mark.parametrize("rule", ["token", "block", "recursive"])
@pytest.mark.parametrize("kind", ["point", "iid"])
def test_chains_that_are_accepted_to_their_end(rule: str, kind: str) -> None:
    """Drafts that are the target's own: bonus tokens, and residuals without mass."""
    rng = random.Random(kind)
    cases = some(rng, rule, 7, 12, kind=kind) if rule != "recursive" else []
    for case in cases or some(rng, "token", 7, 12, kind=kind):
        if case.tree.laws is not None:
            case.tree = replace(case.tree, laws=torch.softmax(case.logits[: len(case.tree)], -1))
        cases = cases if case in cases else [*cases, case]
    assert check(rule, cases) == 0
    if kind == "iid":
        accepted = run_kernel(rule, cases, 64).accepted.tolist()
        assert accepted == [len(case.tree) for case in cases]


def test_a_sequence_gets_the_same_alone_and_in_company() -> None:
    rng = random.Random(8)
    for rule in ("walk", "block", "recursive"):
        cases = some(rng, rule, 100, 3)
        together = run_kernel(rule, cases, 64)
        for i, case in enumerate(cases):
            assert same(run_kernel(rule, [case], 64), 0, together, i)


# Planted faults.


FAULTS: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "extra token from p": (
        "token", verify_chains, "_left_of", lambda *args, **_: args[1] / args[2],
    ),
    "half of every run": (
        "token", verify_chains, "_first_rejected",
        lambda *args: tl.sum(args[0].to(tl.int64)) // 2,
    ),
    "weights forgotten": (
        "block", verify_chains, "_chain_weights", lambda *args: args[1].to(tl.float64) * 0 + 1,
    ),
    "last token drawn": (
        "walk", verify_rows, "pick_token",
        lambda *args: tl.max(tl.where(args[1] > 0, args[0], 0)).to(tl.int64),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, module, function, wrong = FAULTS[name]
    cases = some(random.Random(name), rule, 7, 12)
    assert check(rule, cases) == 0
    monkeypatch.setattr(module, function, wrong)
    with pytest.raises(AssertionError, match="no coin is near a boundary"):
        check(rule, cases)


# What came is no law.


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rule", fused.RULES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_none_clear_valid_of_their_sequence_alone(rule: str, value: float) -> None:
    cases = some(random.Random(1), rule, 100, 3)
    cases[1].logits[-1, 70] = value
    for truncation in (PLAIN, Truncation(top_p=0.9)):
        for case in cases:
            case.truncation = truncation
        assert run_kernel(rule, cases, 64).valid.tolist() == [True, False, True]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rule", ["walk", "token", "block", "recursive"])
def test_a_token_without_mass_in_its_law_clears_valid(rule: str) -> None:
    case = make_case(random.Random(2), 7, kind="iid", size=1, depth=1, width=1)
    assert case.tree.laws is not None
    case.tree.laws[0, case.tree.tokens[0]] = 0
    assert run_kernel(rule, [case], 64).valid.tolist() == [False]


# Launches and refusals.

LAUNCHES = {"greedy": (2, 2), "gumbel": (2, 4), "walk": (3, 4), "token": (4, 4), "block": (4, 5),
            "recursive": (3, 4)}  # fmt: skip


@pytest.mark.parametrize("rule", fused.RULES)
def test_number_of_launches(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    run = interpreter.InterpretedFunction.run

    def counted(function: Any, *args: Any, **options: Any) -> Any:
        launched.append(function.fn.__name__)
        return run(function, *args, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", counted)
    for most, truncation in zip(LAUNCHES[rule], (PLAIN, Truncation(top_k=3)), strict=True):
        launched.clear()
        run_kernel(rule, some(random.Random(0), rule, 7, 2, truncation=truncation), 64)
        assert len(launched) == most, launched


def test_bad_arguments_are_named() -> None:
    cases = some(random.Random(0), "block", 7, 2)
    batch = TreeBatch.of([case.tree for case in cases])
    laws = [case.tree.laws for case in cases if case.tree.laws is not None]
    logits = torch.cat([case.logits for case in cases]).to(DEVICE)
    good: dict[str, Any] = {
        "rule": "block", "logits": logits, "trees": kernel_trees(batch, cases),
        "keys": torch.zeros(2, 2, dtype=torch.int64, device=DEVICE),
        "positions": torch.zeros(2, dtype=torch.int64, device=DEVICE),
        "q": torch.cat(laws).to(DEVICE) if laws else torch.empty(0, 7, device=DEVICE),
    }  # fmt: skip
    ones = torch.ones(2, dtype=torch.float64, device=DEVICE)
    siblings = [(0, 1, -1, False), (0, 2, -1, False)]
    wide = Trees.of(torch.zeros(2, dtype=torch.int64, device=DEVICE), [[-1, -1]], siblings)
    bad: dict[str, list[Any]] = {
        "rule": ["kseq"], "logits": [logits.double(), logits[1:], logits.T],
        "trees": [wide],
        "keys": [good["keys"].int(), good["keys"][:1]],
        "positions": [good["positions"].int(), good["positions"].to("meta")],
        "temperature": [ones.float(), ones[:1]], "top_k": [ones], "top_p": [ones.float()],
        "min_p": [ones[None]], "q": [good["q"].double(), good["q"][:, :6]], "block": [32, 96],
    }  # fmt: skip
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                verify(**{**good, name: value})


def test_trees_that_are_none_are_refused() -> None:
    tokens = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for parents in ([1, 0], [0, -1], [-1, 1], [-1, -2]):
        with pytest.raises(ValueError, match="parents"):
            Trees.of(tokens, [parents], [])
    with pytest.raises(ValueError, match="256 rows"):
        Trees.of(tokens.new_zeros(256), [list(range(-1, 255))], [])
    for draw in ((0, 2, -1, False), (0, 1, 0, False), (0, 9, -1, False)):
        with pytest.raises(ValueError, match="draws"):
            Trees.of(tokens, [[-1, 0]], [draw])
    with pytest.raises(ValueError, match="tokens"):
        Trees.of(tokens[:1], [[-1, 0]], [])


# Ahead of time.

COMPILE = """
import subprocess, sys, triton
from pathlib import Path
from specdec.kernels.configuration import TARGETS
from specdec.kernels.verify_configurations import configurations
tool = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"
chosen = [c for c in configurations("sm_80") if c.name in sys.argv[1:]]
assert len(chosen) == len(sys.argv) - 1, [c.name for c in configurations("sm_80")]
for configuration in chosen:
    done = configuration.compile(TARGETS["sm_80"])
    Path("kernel.cubin").write_bytes(done.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", "kernel.cubin"], capture_output=True, text=True)
    assert " STACK:0 " in usage.stdout, (configuration.name, usage)
"""


def test_kernels_compile_ahead_of_time_and_spill_nothing(tmp_path: Path) -> None:
    """One of each kernel; the report compiles every configuration for every target."""
    names = ["best gumbel bf16", "stats bf16", "filter bf16, truncated",
             "law recursive1 bf16, truncated", "follow walk bf16", "residual block bf16",
             "chain block bf16"]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMPILE, *names], capture_output=True, text=True,
        env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
