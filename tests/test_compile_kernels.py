"""Kernels compile ahead of time for every target, and what is wrong with one fails the run."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from specdec.evals import compile_kernels
from specdec.evals.compile_kernels import SHARED_LIMIT, Compiled, configurations, violations

FINE = Compiled(registers=64, shared=1024, spilled={}, instructions={"mma": 1})


def run(*arguments: str, cache: Path) -> "subprocess.CompletedProcess[str]":
    """The script in a process of its own: this one's Triton interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run(
        [sys.executable, "-P", "-m", "specdec.evals.compile_kernels", *arguments],
        capture_output=True, text=True, env=environment, cwd=cache, check=False,
    )  # fmt: skip


def test_one_kernel_of_each_kind_compiles_for_every_target(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    done = run("--only", "plain bf16 64 page 16 rows", "--out", str(out), cache=tmp_path)
    assert done.returncode == 0, done.stderr
    raw = json.loads(out.read_text())
    assert list(raw["targets"]) == list(SHARED_LIMIT)
    product = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "mfma"}
    for target, rows in raw["targets"].items():
        kinds = {name.split()[0] for name in rows}
        assert kinds == {"attend", "combine"}
        for name, (registers, shared, spilled, instructions, options) in rows.items():
            assert 8 < registers <= 512
            assert shared <= SHARED_LIMIT[target]
            assert spilled == {}
            assert options["num_warps"] in (4, 8)
            if name.startswith("attend"):
                assert instructions[product[target]] > 0


def test_a_compiler_that_refuses_fails_the_run_by_name(tmp_path: Path) -> None:
    code = (
        "import sys; from specdec.evals import compile_kernels as c\n"
        "from specdec.kernels.configuration import Configuration as C\n"
        "from specdec.kernels import cache\n"
        "good = cache.configurations()[0]\n"
        "bad = C('broken', good.kernel, good.signature, {**good.constants, 'LANES': 3}, (), {})\n"
        "c.configurations = lambda target: [bad]\n"
        "sys.argv = ['x', '--target', 'sm_80']; c.main()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "broken, sm_80: " in done.stderr


def main(monkeypatch: pytest.MonkeyPatch, found: Compiled, *arguments: str) -> Any:
    """The command in this process, with a compiler that always finds the same."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(compile_kernels, "compiled", lambda *_: found)
    return CliRunner().invoke(compile_kernels.main, arguments)


def test_a_spill_fails_the_run_and_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "table.json"
    spills = Compiled(registers=255, shared=0, spilled={"bytes of stack": 8}, instructions={})
    only = ["--only", "scatter fp32 to", "--target", "sm_80", "--out", str(out)]
    result = main(monkeypatch, spills, *only)
    assert result.exit_code == 1
    assert result.stderr == "Error: scatter fp32 to e4m3, sm_80: spills 8 bytes of stack\n"
    raw = json.loads(out.read_text())
    assert raw["violations"] == ["scatter fp32 to e4m3, sm_80: spills 8 bytes of stack"]
    assert raw["targets"]["sm_80"]["scatter fp32 to e4m3"][:3] == [255, 0, {"bytes of stack": 8}]
    assert main(monkeypatch, FINE, *only).exit_code == 0
    assert json.loads(out.read_text())["violations"] == []


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_shared_memory_is_held_to_the_target(target: str) -> None:
    limit = SHARED_LIMIT[target]
    assert violations(target, "k", Compiled(1, limit, {}, {})) == []
    [wrong] = violations(target, "k", Compiled(1, limit + 1, {}, {}))
    assert wrong == f"k, {target}: {limit + 1} bytes of shared memory, of {limit}"


def test_the_interpreter_is_refused() -> None:
    result = CliRunner().invoke(compile_kernels.main, [], env={"TRITON_INTERPRET": "1"})
    assert result.exit_code == 1
    assert "TRITON_INTERPRET is set" in result.stderr


def test_a_name_that_no_configuration_has_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    result = main(monkeypatch, FINE, "--only", "no such kernel")
    assert result.exit_code == 1
    assert "--only 'no such kernel': no configuration" in result.stderr


def test_ptx_is_counted_by_kind_and_width() -> None:
    text = """
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 };
	mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 { %r1 }, { %r2 };
	tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p1;
	@%p1 cp.async.cg.shared.global [ %r81 + 0 ], [ %rd7 + 0 ], 0x10, %r2;
	cp.async.ca.shared.global [ %r81 + 0 ], [ %rd7 + 0 ], 0x4, %r2;
	cp.async.commit_group;
	cp.async.wait_group 	3;
	ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	@%p1 ld.global.b64 { %rd1 }, [ %rd2 + 0 ];
	ld.global.L1::evict_last.v2.b16 { %rs1, %rs2 }, [ %rd2 + 0 ];
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1}, [%r2];
	ld.shared.v4.b32 {%r1}, [%r2];
"""
    assert compile_kernels.ptx_instructions(text) == {
        "cp.async 16 B": 1, "cp.async 4 B": 1, "ld.global 16 B": 1, "ld.global 4 B": 1,
        "ld.global 8 B": 1, "ldmatrix": 1, "mma": 2, "tcgen05.mma": 1, "wgmma": 1,
    }  # fmt: skip


def test_amd_assembly_is_counted_by_kind_and_width() -> None:
    text = """
	buffer_load_dwordx4 v[0:3], v8, s[8:11], 0 offen
	global_load_dword v1, v2, s[0:1]
	global_load_ushort v1, v2, s[0:1]
	buffer_load_ubyte v1, v2, s[0:3], 0 offen
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
	ds_read_b128 v[0:3], v4
	global_store_dwordx4 v0, v[0:3], s[0:1]
"""
    assert compile_kernels.gcn_instructions(text) == {
        "ds_read": 1, "load 1 B": 1, "load 16 B": 1, "load 2 B": 1, "load 4 B": 1, "mfma": 1,
    }  # fmt: skip


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_every_configuration_has_a_name_of_its_own(target: str) -> None:
    names = Counter(configuration.name for configuration in configurations(target))
    assert len(names) > 20
    assert max(names.values()) == 1


# The committed table.

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "evals" / "results" / "kernel_compile.json"


def differences(rows: dict[str, Any], target: str) -> set[str]:
    """Configurations that the table or the kernels have alone, or with other options."""
    listed = {each.name: dict(each.options) for each in configurations(target)}
    found = {name: row[4] for name, row in rows.items()}
    return {name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name)}


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_the_committed_table_is_of_the_configurations_that_the_kernels_list(target: str) -> None:
    rows = json.loads(RESULT.read_text())["targets"][target]
    assert differences(rows, target) == set()
    first, *others = rows
    missing = {name: rows[name] for name in others}
    assert differences(missing, target) == {first}
    assert differences({**rows, "one too many": rows[first]}, target) == {"one too many"}
    assert differences({**rows, first: [*rows[first][:4], {}]}, target) == {first}


def test_the_committed_table_has_no_violation() -> None:
    raw = json.loads(RESULT.read_text())
    assert list(raw["targets"]) == list(SHARED_LIMIT)
    found = [
        wrong
        for target, rows in raw["targets"].items()
        for name, row in rows.items()
        for wrong in violations(target, name, Compiled(*row[:4]))
    ]
    assert found == raw["violations"] == []


def test_every_kernel_is_compiled_for_every_target() -> None:
    defined = {
        name
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    for target in SHARED_LIMIT:
        assert {each.kernel.fn.__name__ for each in configurations(target)} == defined
