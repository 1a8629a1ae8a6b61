"""Measured costs: the table, the file it is kept in, and the measuring."""

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LogitsProcessor, LogitsProcessorList

import specdec
from specdec import Engine, SamplingParams, profiling
from specdec.costs import CostCache, StepCosts, cache_folder, machine
from specdec.policy import CostPolicy
from specdec.sampling import Law
from specdec.toy import TableRunner, random_table, with_overlap

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part

COSTS = StepCosts(
    1, 64, (0, 1, 4), (1, 2, 5), (0.0, 0.2, 0.8), (1.0, 1.1, 1.4),
    draft_slope=0.01, verify_slope=0.001, verify_row_slope=0.002, catch_up=0.05,
)  # fmt: skip
PROMPT = [0, 45, 67, 89, 45, 67]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "deep" / "cache"))
    monkeypatch.setattr(profiling, "_MEASURED", {})
    return tmp_path / "deep" / "cache"


def test_costs_lie_on_lines_between_the_measured() -> None:
    assert COSTS.draft_seconds(0, 64) == 0
    assert COSTS.draft_seconds(1, 64) == pytest.approx(0.2)
    assert COSTS.draft_seconds(3, 64) == pytest.approx(0.6)
    assert COSTS.draft_seconds(6, 64) == pytest.approx(1.2)  # beyond the last
    assert COSTS.draft_seconds(2, 164) == pytest.approx(0.4 + 2 * 1.0)
    assert COSTS.verify_seconds(1, 10) == pytest.approx(1.0)  # contexts below are not cheaper
    assert COSTS.verify_seconds(3.5, 64) == pytest.approx(1.25)
    assert COSTS.verify_seconds(2, 164) == pytest.approx(1.1 + 0.1 + 0.4)


def test_single_measured_depth_is_all_there_is() -> None:
    flat = StepCosts(1, 64, (0,), (1,), (0.0,), (2.0,))
    assert flat.verify_seconds(5, 64) == 2.0
    assert flat.draft_seconds(3, 64) == 0.0


def test_kept_costs_come_back(folder: Path) -> None:
    cache = CostCache({"b": "2", "a": "1"})
    assert cache.load() is None
    cache.save(COSTS)
    assert CostCache({"a": "1", "b": "2"}).load() == COSTS
    assert CostCache({"a": "1", "b": "3"}).load() is None
    assert [path.parent for path in folder.iterdir()] == [folder]


def damages(path: Path) -> list[bytes]:
    whole = path.read_bytes()
    content = json.loads(whole)
    costs = content["costs"]
    changed = [
        {"format": 1}, {**content, "format": 2}, {**content, "key": {"a": "2"}},
        {**content, "costs": {**costs, "catch_up": 9.0}},
    ]  # fmt: skip
    return [
        b"", b"{", b"[]", b"null", bytes(range(256)), b"\xff\xfe" + whole, b"[" * 100_000,
        whole + b" " * (1 << 20), *(json.dumps(each).encode() for each in changed),
    ]  # fmt: skip


def test_damaged_file_is_measured_anew_with_one_warning(folder: Path) -> None:
    del folder
    cache = CostCache({"a": "1"})
    cache.save(COSTS)
    for data in damages(cache.path):
        cache.path.write_bytes(data)
        with pytest.warns(UserWarning, match="is damaged .* measuring anew") as seen:
            assert cache.load() is None
        assert len(seen) == 1
    cache.save(COSTS)
    assert cache.load() == COSTS


def test_folder_that_cannot_be_written_is_said(folder: Path) -> None:
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file")
    with pytest.warns(UserWarning, match="not kept for the next run.*SPECDEC_CACHE"):
        CostCache({"a": "1"}).save(COSTS)


@pytest.mark.parametrize(
    "change", [{"depths": [1, 2, 3]}, {"rows": [1]}, {"speed": 3}, {"draft": ["x", 1, 2]}]
)
def test_lists_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        StepCosts.from_dict({**asdict(COSTS), **change})


def test_default_folder_is_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPECDEC_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "specdec"


def test_machine_names_device_threads_and_versions() -> None:
    assert set(machine()) == {"device", "threads", "specdec", "torch", "transformers"}
    assert all(machine().values())


# --- measuring


def engine_of(target: Model, draft: Model, **options: Any) -> Engine:
    return Engine(target, draft=draft, kv_memory=1 << 20, **options)


def costs_of(engine: Engine) -> StepCosts:
    policy = engine.policy
    assert isinstance(policy, CostPolicy)
    assert policy._costs is not None
    return policy._costs


def generate(engine: Engine, temperature: float = 0.0, requests: int = 1) -> None:
    params = SamplingParams(max_new_tokens=10, temperature=temperature)
    for _ in range(requests):
        engine.add_request(PROMPT, params, seed=1)
    list(engine)


def test_measuring_leaves_no_trace(target: Model, draft: Model, folder: Path) -> None:
    engine, still = engine_of(target, draft), engine_of(target, draft, num_draft_tokens=3)
    for each in (engine, still):
        generate(each)
    assert list(folder.iterdir())
    assert engine.group.used == 0
    engine.group.check_integrity()
    assert engine.stats.tokens == still.stats.tokens == 10
    assert max(engine.stats.drafted_lengths) <= 9


def test_costs_rise_with_depth_and_rows(target: Model, draft: Model, folder: Path) -> None:
    del folder
    engine = engine_of(target, draft)
    generate(engine)
    found = costs_of(engine)
    assert found.depths[0] == 0
    assert found.depths[-1] == 16
    assert found.rows == tuple(d + 1 for d in found.depths)
    assert found.draft[0] == 0 < found.draft[1]
    assert list(found.draft) == sorted(found.draft)
    assert list(found.verify) == sorted(found.verify)
    # sixteen passes one after the other against one
    assert found.draft[-1] > 6 * found.draft[1]


def test_each_way_of_sampling_and_batch_is_measured_once(
    target: Model, draft: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[bool, int]] = []

    def measured(*args: Any, **kwargs: Any) -> StepCosts:
        del kwargs
        law: Law = args[3]
        calls.append((law.greedy, args[4]))
        return replace(COSTS, batch=args[4])

    monkeypatch.setattr(profiling, "profile", measured)
    for _ in range(2):
        engine = engine_of(target, draft)
        generate(engine)
        generate(engine, 0.7)
        generate(engine, requests=3)
        generate(engine, requests=4)
    # three and four share their figures once sequences run out
    assert calls == [(True, 1), (False, 1), (True, 4)]
    assert len(list(folder.iterdir())) == 3
    monkeypatch.setattr(profiling, "_MEASURED", {})  # another process
    generate(engine_of(target, draft))
    assert len(calls) == 3


def test_own_proposer_objects_are_not_kept_on_disk(target: Model, folder: Path) -> None:
    proposer = specdec.proposers.NgramProposer()
    engine = Engine(target, proposer=proposer, kv_memory=1 << 20)
    generate(engine)
    assert not folder.exists()
    assert costs_of(engine).draft[1] > 0


def test_no_room_to_measure_means_the_default(target: Model, draft: Model, folder: Path) -> None:
    slot = sum(m.slot_bytes for m in engine_of(target, draft).group.memory.values())
    engine = Engine(target, draft=draft, kv_memory=slot * 32)
    generate(engine)
    assert not folder.exists()
    assert engine.stats.drafted_lengths[4] > 0


def test_costs_are_measured_without_the_callers_processors(
    target: Model, draft: Model, folder: Path
) -> None:
    """A function of the caller's is called for the caller's text only."""
    del folder
    seen: list[int] = []

    class Counts(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            seen.append(input_ids.shape[1])
            return scores

    engine = engine_of(target, draft)
    params = SamplingParams(
        max_new_tokens=4, temperature=0.7, processors=LogitsProcessorList([Counts()])
    )
    engine.add_request(PROMPT, params, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(engine)
    assert max(seen) < 20


def test_runner_that_watches_its_slots_can_be_measured(folder: Path) -> None:
    del folder
    table = random_table(40, seed=1)
    target, draft = TableRunner(table, 40), TableRunner(with_overlap(table, 0.8), 40)
    engine = Engine(target, draft=draft)
    engine.add_request([1, 2, 3], SamplingParams(max_new_tokens=30), seed=1)
    [out] = list(engine)
    assert len(out.token_ids) == 30
    assert costs_of(engine).depths[-1] == 16


class Levels:
    """A proposer as the profiler sees it: rows of each drafted level."""

    def __init__(self, rows: int, growth: int = 0) -> None:
        self.rows, self.growth = rows, growth

    def draft_rows(self, depth: int) -> tuple[int, ...]:
        return tuple(self.rows + self.growth * level for level in range(depth)) * (self.rows > 0)


def drafting(proposer: Levels, seconds: dict[int, float]) -> tuple[float, ...]:
    return profiling._drafting(proposer, seconds)  # type: ignore[arg-type]


def test_disturbed_figure_does_not_move_what_equal_levels_take() -> None:
    true = {0: 0.0, **{depth: 0.1 + 0.2 * depth for depth in (1, 2, 3, 4, 6, 8)}}
    assert drafting(Levels(1), true) == pytest.approx(list(true.values()))
    for depth in (1, 2, 8):
        found = drafting(Levels(1), {**true, depth: 2 * true[depth]})
        assert found == pytest.approx(list(true.values()), rel=0.2)
        assert found[0] == 0.0


@pytest.mark.parametrize("proposer", [Levels(1, growth=2), Levels(0)])
def test_other_drafts_take_what_was_measured(proposer: Levels) -> None:
    """Levels that grow, and lookups, lie on no line; more work is never quicker."""
    assert drafting(proposer, {0: 0.0, 1: 0.1, 2: 0.6, 3: 0.5, 4: 2.0}) == (0.0, 0.1, 0.5, 0.5, 2.0)


def test_two_depths_make_no_line() -> None:
    assert drafting(Levels(1), {0: 0.0, 1: 0.3, 2: 0.2}) == (0.0, 0.2, 0.2)
