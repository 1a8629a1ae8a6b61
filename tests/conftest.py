"""The ground every test stands on: the installed package, one CPU setting, no network."""

import copy
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the root on the path, where kernels/ would pass for Hugging Face's package
# of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
# measured costs are those of this run, and stay out of the user's cache
os.environ["SPECDEC_CACHE"] = tempfile.mkdtemp(prefix="specdec-tests-")

import pytest
import torch

if not torch.cuda.is_available():
    # read when triton is imported, which transformers does: later, tl.max and tl.sum stay compiled
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec.zoo.tokenizer import train_tokenizer

# One thread: the order of a sum, and so its last bits, depends on their number, and two of them
# wait for each other at every operation when other jobs share the cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Passes of a tiny model lose more by a second thread than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """For kernels of many device functions: a launch patches Triton's language, and that every
    function inside does it again costs most of the interpreter's time."""
    from triton.runtime import interpreter

    patched: set[str] = set()

    def call(function: Any, *args: Any, **options: Any) -> Any:
        module = function.fn.__module__
        if module not in patched:
            interpreter._patch_lang(function.fn)
            patched.add(module)
        return function.rewrite()(*args, **options)

    if not torch.cuda.is_available():
        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
        builder = interpreter.interpreter_builder
        unchecked = replace(builder.options, sanitize_overflow=False)
        monkeypatch.setattr(builder, "options", unchecked)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, about 300 tokens: BOS 0, EOS 1, PAD 2, pads on the left."""
    texts = ["def quicksort(items):\n    return sorted(items)\n", "the quick brown fox", "stop it"]
    return train_tokenizer(texts, 256)


def tiny_llama(vocab_size: int, seed: int, **changes: int) -> LlamaForCausalLM:
    """A random Llama whose laws are peaked, so that its text does not repeat itself."""
    shape: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    config = LlamaConfig(vocab_size=vocab_size, initializer_range=0.3, **{**shape, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
        return model


def noisy_copy(model: LlamaForCausalLM, noise: float = 0.01) -> LlamaForCausalLM:
    """A draft that agrees with the model about half of the time."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * noise)
    return draft


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """tiny_llama(vocab_size, seed, **config)."""
    return tiny_llama


@pytest.fixture(scope="session")
def make_draft() -> Callable[..., LlamaForCausalLM]:
    """noisy_copy(model, noise)."""
    return noisy_copy


@pytest.fixture(scope="session")
def target(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny_llama(len(tokenizer), seed=0)


@pytest.fixture(scope="session")
def draft(target: LlamaForCausalLM) -> LlamaForCausalLM:
    return noisy_copy(target)


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
) -> Path:
    """A folder with `target` and `draft` in transformers' format."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("target", target), ("draft", draft)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder
