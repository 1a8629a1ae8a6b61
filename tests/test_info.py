"""specdec info: what it says of this machine, and of others."""

import json
import os
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import specdec
from specdec.cli import info
from specdec.cli.main import main
from specdec.forward import jit


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """What was found out about numba is forgotten before and after."""
    jit.why_not.cache_clear()
    yield
    jit.why_not.cache_clear()


def output(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["info", *arguments])
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def facts() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output("--json"))
    return found


def paths() -> dict[str, dict[str, Any]]:
    return {path["name"]: path for path in facts()["fast_paths"]}


def test_json_is_one_object_that_holds_everything() -> None:
    found = facts()
    assert list(found) == ["versions", "environment", "devices", "fast_paths"]
    assert found["versions"]["specdec"] == specdec.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu"
    assert found["devices"][0]["threads"] == torch.get_num_threads()
    assert found["devices"][0]["cores"] == os.cpu_count()
    assert all(path["why"] for path in found["fast_paths"])


def test_the_text_says_the_same() -> None:
    found, text = facts(), output()
    for name, number in found["versions"].items():
        assert f"{name} {number or 'absent'}" in text
    for path in found["fast_paths"]:
        assert re.search(
            rf"^{'on ' if path['on'] else 'off'}  {path['name']}: ", text, re.MULTILINE
        )
        assert path["why"] in text


def test_numba_missing_is_the_reason_why_cpu_kernels_are_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert paths()["CPU kernels compiled by numba"]["on"] == (not jit.why_not())
    jit.why_not.cache_clear()
    monkeypatch.setattr(jit, "find_spec", lambda _: None)
    found = paths()
    assert not found["CPU kernels compiled by numba"]["on"]
    assert "numba is not installed" in found["CPU kernels compiled by numba"]["why"]
    assert not found["large weights in CPU kernels"]["on"]


def test_threads_decide_who_multiplies_large_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "why_not", lambda: "")
    for threads, on in ((1, True), (2, True), (3, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        [found] = [path for path in info.fast_paths() if path.name.startswith("large weights")]
        assert found.on == on
        assert f"{threads} thread" in found.why


def test_no_gpu_is_the_reason_why_triton_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    found = paths()["Triton kernels"]
    assert not found["on"]
    assert "built without CUDA and HIP; plain torch twins run instead" in found["why"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert paths()["Triton kernels"]["why"].startswith("torch sees no GPU;")


def test_every_gpu_is_named_with_what_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="NVIDIA H200", total_memory=1 << 37, major=9, minor=0, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    capabilities = {0: (9, 0), 1: (7, 0)}
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[device.index]
    )
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = facts()
    assert [device["device"] for device in found["devices"]] == ["cpu", "cuda:0", "cuda:1"]
    assert found["devices"][1]["capability"] == "9.0"
    assert paths()["Triton kernels on cuda:0"]["on"]
    assert "head size above 256 run on torch twins" in paths()["Triton kernels on cuda:0"]["why"]
    assert not paths()["Triton kernels on cuda:1"]["on"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert facts()["environment"]["TRITON_INTERPRET"] == "1"
    assert "TRITON_INTERPRET is set" in paths()["Triton kernels on cuda:0"]["why"]


def test_the_program_lists_the_command() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert re.search(r"^  info  +Show versions", result.output, re.MULTILINE)
