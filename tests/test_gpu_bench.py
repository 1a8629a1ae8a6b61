"""The GPU benchmark without a GPU: its shapes, its judgement of kernels, what it writes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from specdec import backend
from specdec.evals import gpu_bench, gpu_problems as problems
from specdec.evals.gpu_bench import attention, check, chosen, measure
from specdec.evals.gpu_problems import OURS, PEERS, Call, Cell, Contender, Inputs
from specdec.evals.gpu_timing import Timer, WrongKernelError, spread
from specdec.evals.gpu_verify import Case

CPU = torch.device("cpu")
FLOAT = torch.float32
TINY = Cell("tiny", heads=4, kv_heads=2, size=16, batch=2, context=37, rows=5)
LIMITS = {"read_bytes_per_second": 4e12, "flops_per_second": 8e14}


def tiny(cell: Cell = TINY, **options: Any) -> list[Inputs]:
    return problems.inputs(cell, sets=2, device=CPU, dtype=FLOAT, **options)


def counting(times: Sequence[float] = (3.0, 1.0, 2.0, 4.0, 5.0)) -> Timer:
    """A timer that runs each call once and always measures the same."""

    def timer(calls: Sequence[Callable[[], Any]]) -> list[float]:
        for call in calls:
            call()
        return list(times)

    return timer


def peer(name: str) -> Contender:
    [found] = [contender for contender in PEERS if contender.name.startswith(name)]
    return found


def dense(problem: Inputs, masks: Tensor) -> Call:
    """The right answer for other masks."""
    return lambda: problems.expected(replace(problem, masks=masks))


# --- shapes


def test_the_shapes_are_those_of_the_issue() -> None:
    cells = problems.cells()
    assert len(cells) == len(set(cells)) == 2 * 4 * 3 * 6
    assert {(c.heads, c.kv_heads, c.size) for c in cells} == {(32, 8, 128), (8, 1, 128)}
    assert {c.batch for c in cells} == {1, 8, 32, 64}
    assert {c.context for c in cells} == {2048, 8192, 32768}
    assert {c.rows for c in cells} >= {1, 8, 32, 64, 128}
    traffic = backend.kernel_file("traffic")
    assert {m: h[:2] for m, h in problems.MODELS.items()} == traffic.MODELS
    assert (problems.BATCHES, problems.CONTEXTS, problems.ROWS) == (
        traffic.BATCHES, traffic.CONTEXTS, traffic.ROWS,
    )  # fmt: skip


def test_a_choice_of_shapes_keeps_to_it_and_adds_large_pages_at_the_longest_context() -> None:
    found = list(chosen([], [8], [2048, 32768], [16]))
    assert [(c.model[:11], c.context, c.page) for c, _ in found] == [
        (model, context, page)
        for model in ("Llama-3-8B,", "Llama-3-70B")
        for context, page in ((2048, 16), (32768, 16), (32768, 128))
    ]
    assert all(who == (PEERS if cell.page == 16 else ()) for cell, who in found)
    assert list(chosen([], [3], [], [])) == []


def test_input_sets_are_larger_than_the_cache() -> None:
    for cell in problems.cells():
        sets = problems.sets_for(cell, 50 << 20)
        assert 2 <= sets <= 64
        assert sets * cell.kv_bytes >= 2 * (50 << 20) or sets == 64


def test_bytes_and_operations_of_a_cell() -> None:
    assert TINY.kv_bytes == 2 * 2 * 2 * (37 + 5) * 2 * 16  # keys and values, two bytes
    assert TINY.flops == 2 * 2 * 2 * 5 * 4 * 16 * 42


def test_inputs_are_trees_over_shuffled_pages() -> None:
    first, second = tiny()
    tables = torch.stack((first.block_table, second.block_table))
    assert tables.flatten().sort().values.tolist() == list(range(tables.numel()))
    assert not torch.equal(first.masks[0], first.masks[1])
    assert not torch.equal(first.q, second.q)
    for problem in (first, second):
        assert problem.masks.diagonal(dim1=1, dim2=2).all()
        assert not problem.masks.triu(1).any()
        assert problem.masks[:, :, 0].all()
        unpacked = backend.kernel_file("reference").unpack_bits(problem.ancestor_bits, 5)
        assert torch.equal(unpacked.view(2, 5, 5), problem.masks)
    [same, _] = tiny(one_tree=True)
    assert torch.equal(same.masks[0], same.masks[1])


# --- right and wrong


@pytest.mark.parametrize("page", [16, 128])
def test_our_kernel_and_the_yardsticks_are_right(page: int) -> None:
    sets = tiny(replace(TINY, page=page))
    for contender in (OURS, peer("2D grid"), peer("SDPA")):
        check(contender, sets, [contender.prepare(problem) for problem in sets])


@pytest.mark.parametrize("rows", [1, 4])
def test_small_trees_are_right_in_the_grid_kernel(rows: int) -> None:
    sets = tiny(replace(TINY, rows=rows, batch=1, kv_heads=1, context=70))
    check(peer("2D grid"), sets, [peer("2D grid").prepare(problem) for problem in sets])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_given_the_same_mask() -> None:
    sets = tiny()
    calls = [problems.flex(problem, compiled=lambda function: function) for problem in sets]
    check(peer("Flex"), sets, calls)


@pytest.mark.parametrize("context", [37, 32768])
def test_a_kernel_that_forgets_the_tree_is_caught_at_any_context(context: int) -> None:
    sets = tiny(replace(TINY, context=context, batch=1))
    everything = [dense(p, torch.ones_like(p.masks)) for p in sets]
    with pytest.raises(WrongKernelError, match=f"ours is wrong at batch 1, context {context}"):
        check(Contender("ours", problems.specdec), sets, everything)
    chain = [dense(p, torch.ones_like(p.masks).tril()) for p in sets]
    with pytest.raises(WrongKernelError):
        check(Contender("ours", problems.specdec), sets, chain)
    check(OURS, sets, [dense(p, p.masks) for p in sets])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out.mul(0),
        lambda out: out.mul(1.01),
        lambda out: out.clone().index_fill_(0, torch.tensor([9]), float("nan")),
        lambda out: out[1:],
        lambda out: out.roll(1, 1),
    ],
    ids=["zeros", "scaled", "NaN", "shape", "heads"],
)
def test_a_wrong_result_is_caught(spoil: Callable[[Tensor], Tensor]) -> None:
    sets = tiny()
    calls = [lambda p=p: spoil(problems.expected(p)) for p in sets]
    with pytest.raises(WrongKernelError):
        check(OURS, sets, calls)


def test_the_last_set_is_compared_too() -> None:
    sets = tiny()
    calls = [dense(sets[0], sets[0].masks), dense(sets[0], sets[0].masks)]
    with pytest.raises(WrongKernelError):
        check(OURS, sets, calls)


def test_a_wrong_kernel_of_ours_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Contender("specdec", lambda p: lambda: problems.expected(p) * 2)
    monkeypatch.setattr(gpu_bench, "OURS", wrong)

    def timer(calls: Sequence[Callable[[], Any]]) -> list[float]:
        raise AssertionError(f"{len(calls)} calls timed")

    with pytest.raises(WrongKernelError, match="specdec is wrong"):
        attention(TINY, [], timer, CPU, FLOAT, 1)


def test_a_contender_that_is_wrong_absent_or_fails_has_no_time() -> None:
    def fails(problem: Inputs) -> Call:
        raise ValueError(f"no kernel for a head size of {problem.cell.size}\nmore")

    others = [
        Contender("wrong", lambda p: lambda: problems.expected(p) * 2),
        Contender("fails", fails),
        Contender("absent", fails, needs="no_such_package_of_attention"),
        Contender("right", lambda p: dense(p, p.masks), one_tree=True),
    ]
    row = attention(TINY, others, counting(), CPU, FLOAT, 1)
    found = row["contenders"]
    assert "off by 1 of the answer" in found["wrong"]["error"]
    assert found["fails"] == {"error": "ValueError: no kernel for a head size of 16"}
    assert found["absent"] == {"error": "not installed"}
    assert found["right"]["median_us"] == found["specdec"]["median_us"] == 3.0
    assert found["right"]["of_ours"] == 1.0


@pytest.mark.parametrize("name", ["xformers", "FlashInfer FA2", "FlashInfer XQA"])
def test_packages_that_are_not_here_are_said_so(name: str) -> None:
    contender = peer(name)
    assert contender.needs in ("xformers", "flashinfer")
    assert contender.installed == (find_spec(contender.needs) is not None)


# --- commit


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(gpu_bench.LAYERS, "small", (2, 1, 8))
    return "small"


def test_commit_is_compared_and_timed(small_model: str) -> None:
    found = gpu_bench.commit(small_model, 2, counting(), CPU, FLOAT, context=20)
    assert found["median_us"] == 3.0
    assert found["moved_bytes"] == 2 * 2 * 8 * 2 * 2 * 8 * 4


def test_a_commit_that_moves_nothing_is_not_timed(
    small_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = backend.kernel_file("cache")
    monkeypatch.setattr(cache, "commit", lambda *_: None)
    with pytest.raises(WrongKernelError, match="commit is wrong for small at batch 2"):
        gpu_bench.commit(small_model, 2, counting(), CPU, FLOAT, context=20)


# --- what is written


def test_json_holds_device_versions_commit_and_every_cell(tmp_path: Path, small_model: str) -> None:
    out = tmp_path / "gpu.json"
    fast = Contender("fast", lambda p: dense(p, p.masks))
    measure(
        [(TINY, [fast]), (replace(TINY, page=128), [])], counting(), CPU, FLOAT, cache_bytes=1,
        commits=[(small_model, 1)], judged=[], limits=LIMITS,
        save=lambda raw: gpu_bench._save(out, raw),
    )  # fmt: skip
    raw = json.loads(out.read_text())
    assert {"commit", "versions", "gpu", "date"} <= raw["provenance"].keys()
    assert "triton" in raw["provenance"]["versions"]
    assert raw["device"] == {"name": "cpu"}
    assert raw["ceilings"] == LIMITS
    assert raw["dtype"] == "float32"
    first, second = raw["attention"]
    assert (first["page"], second["page"]) == (16, 128)
    assert list(first["contenders"]) == ["specdec", "fast"]
    assert first["contenders"]["specdec"] == {
        "median_us": 3.0, "p20_us": 1.2, "p80_us": 4.8, "of_ours": 1.0,
    }  # fmt: skip
    assert first["must_bytes"] > TINY.kv_bytes
    assert first["floor_us"]["bytes"] == round(first["must_bytes"] / 4e6, 3)
    assert 0 < first["of_bandwidth"] <= first["of_floor"]
    assert [row["model"] for row in raw["commit"]] == ["small"]
    assert raw["verification"] == []


def test_cases_of_verification_are_saved_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(
        gpu_bench, "verification", lambda case, *_, bandwidth, **__: [case.rule, bandwidth]
    )

    def save(raw: dict[str, Any]) -> None:
        saved.append(len(raw["verification"]))
        last[:] = raw["verification"]

    last: list[Any] = []
    judged = [Case("walk", "plain", 1, 8), Case("block", "plain", 1, 8)]
    measure(
        [], counting(), CPU, FLOAT, cache_bytes=1, commits=[], judged=judged, limits=LIMITS,
        save=save,
    )  # fmt: skip
    assert saved == [0, 1, 2]
    assert last == [["walk", 4e12], ["block", 4e12]]


def test_percentiles_of_one_time_are_that_time() -> None:
    assert spread([2.5]) == {"median_us": 2.5, "p20_us": 2.5, "p80_us": 2.5}


# --- the command


def test_without_a_gpu_it_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "gpu.json"
    result = CliRunner().invoke(gpu_bench.main, ["--out", str(out)])
    assert result.exit_code == 1
    assert result.stderr == "Error: it needs a CUDA device, and torch sees none here\n"
    assert not out.exists()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPU is this CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: type("P", (), {"L2_cache_size": 1})
    )
    monkeypatch.setattr(gpu_bench, "ceilings", lambda *_: LIMITS)
    monkeypatch.setattr(backend, "choose", lambda _: backend.Choice("triton", ""))


@pytest.mark.usefixtures("command")
def test_a_wrong_kernel_ends_the_command_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise WrongKernelError("specdec is wrong at batch 1")

    monkeypatch.setattr(gpu_bench, "measure", wrong)
    result = CliRunner().invoke(gpu_bench.main, [])
    assert result.exit_code == 1
    assert result.stderr == "Error: not timed: specdec is wrong at batch 1\n"


@pytest.mark.usefixtures("command")
def test_numbers_that_no_shape_has_are_an_error() -> None:
    result = CliRunner().invoke(gpu_bench.main, ["--batch", "3"])
    assert result.exit_code == 1
    assert "no shape of the benchmark has these numbers" in result.stderr


@pytest.mark.usefixtures("command")
def test_parts_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: dict[str, Any] = {}

    def measured(cells: Any, *_: object, judged: Any, commits: Any, **__: object) -> None:
        ran.update(attention=len(cells), commit=len(commits), verification=len(judged))

    monkeypatch.setattr(gpu_bench, "measure", measured)
    for part in gpu_bench.PARTS:
        arguments = ["--part", part, "--batch", "8", "--rows", "8"]
        assert CliRunner().invoke(gpu_bench.main, arguments).exit_code == 0
        assert {name for name, count in ran.items() if count} == {part}
    assert CliRunner().invoke(gpu_bench.main, []).exit_code == 0
    assert all(ran.values())


@pytest.mark.usefixtures("command")
def test_an_old_gpu_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "choose", lambda _: backend.Choice("torch", "too old"))
    result = CliRunner().invoke(gpu_bench.main, [])
    assert result.exit_code == 1
    assert "the Triton kernels do not run here: too old" in result.stderr
