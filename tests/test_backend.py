"""Which implementation of the kernels serves a device, and that it says why."""

import types

import pytest
import torch

from specdec import backend

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An H200 that no kernel is launched on, as torch reports it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    return monkeypatch


def test_a_gpu_gets_triton(gpu: pytest.MonkeyPatch) -> None:
    del gpu
    assert backend.choose(CUDA).name == "triton"


def test_an_amd_gpu_gets_triton_whatever_its_number(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.version, "hip", "6.4")
    gpu.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    assert backend.choose(CUDA).name == "triton"


@pytest.mark.parametrize("kind", ["cpu", "meta", "mps"])
def test_other_devices_get_the_twin(gpu: pytest.MonkeyPatch, kind: str) -> None:
    del gpu
    choice = backend.choose(torch.device(kind))
    assert choice.name == "torch"
    assert choice.why.endswith(f"not {kind}")


def test_a_gpu_before_ampere_gets_the_twin(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    assert backend.choose(CUDA) == backend.Choice(
        "torch", "compute capability 7.5; the kernels need 8.0 or newer"
    )


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_the_interpreter_is_not_run_on_a_gpu(gpu: pytest.MonkeyPatch, value: str) -> None:
    gpu.setenv("TRITON_INTERPRET", value)
    choice = backend.choose(CUDA)
    assert choice.name == "torch"
    assert "TRITON_INTERPRET is set" in choice.why


def test_the_interpreter_switched_off_is_off(gpu: pytest.MonkeyPatch) -> None:
    gpu.setenv("TRITON_INTERPRET", "0")
    assert backend.choose(CUDA).name == "triton"


def test_a_machine_without_triton_gets_the_twin(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(backend, "find_spec", lambda _: None)
    assert backend.choose(CUDA) == backend.Choice("torch", "triton is not installed")


@pytest.mark.parametrize(
    ("dtype", "size", "why"),
    [
        (torch.bfloat16, 256, ""),
        (torch.float32, 8, ""),
        (torch.float64, 8, "float16 or bfloat16, not in torch.float64"),
        (torch.int64, 1, "not in torch.int64"),
        (torch.float16, 257, "a head size of 257; the Triton kernels take up to 256"),
    ],
)
def test_a_models_layers_decide_too(
    gpu: pytest.MonkeyPatch, dtype: torch.dtype, size: int, why: str
) -> None:
    del gpu
    choice = backend.choose_for(CUDA, (torch.float32, dtype), (64, size))
    assert choice.name == ("torch" if why else "triton")
    assert choice.why.endswith(why)
    assert backend.choose_for(CPU, (dtype,), (size,)) == backend.choose(CPU)


def test_kernel_files_are_found_by_name() -> None:
    names = backend.kernel_files()
    assert {"attention", "cache", "configuration", "reference"} <= set(names)
    module = backend.kernel_file("reference")
    assert isinstance(module, types.ModuleType)
    assert module.attend is backend.attend
