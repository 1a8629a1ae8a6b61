"""Philox gives the published words, the same on every path, and addresses do not overlap."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from specdec import kernels
from specdec.errors import InvalidArgumentError
from specdec.rng import (
    Noise,
    PhiloxNoise,
    Purpose,
    RecordedNoise,
    derive_seed,
    log_uniform,
    log_uniform_torch,
    philox_numpy,
    philox_torch,
    uniform,
    uniform_torch,
)

CPU = torch.device("cpu")
ONES = 0xFFFFFFFF

# Random123, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, expected words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def word(seed: int, node: int, position: int, purpose: int, block: int = 0) -> np.ndarray:
    """The four words at one address, from the pure function."""
    counter = np.array([block, node, position, purpose], np.uint32)
    return philox_numpy(counter, np.array([seed & ONES, seed >> 32], np.uint32))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_published_vectors(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = philox_numpy(np.array(counter, np.uint32), np.array(key, np.uint32))
    assert tuple(words.tolist()) == expected
    assert tuple(philox_torch(torch.tensor(counter), torch.tensor(key)).tolist()) == expected


@pytest.mark.parametrize("shape", [(1,), (63,), (3, 5)])
def test_numpy_and_torch_have_the_same_bits(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    counter = rng.integers(0, 2**32, (*shape, 4), dtype=np.uint32)
    key = rng.integers(0, 2**32, (*shape, 2), dtype=np.uint32)
    ours = philox_torch(
        torch.from_numpy(counter.astype(np.int64)), torch.from_numpy(key.astype(np.int64))
    )
    assert np.array_equal(philox_numpy(counter, key), ours.numpy())


def random_words(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Counters and keys, the published ones first."""
    rng = np.random.default_rng(n)
    counters = rng.integers(0, 2**32, (n, 4), dtype=np.uint32)
    keys = rng.integers(0, 2**32, (n, 2), dtype=np.uint32)
    for i, (counter, key, _) in enumerate(KNOWN[:n]):
        counters[i], keys[i] = counter, key
    return counters, keys


@pytest.mark.parametrize("n", [1, 63, 1000])
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_words_and_uniforms_have_the_same_bits_on_every_path(path: str, n: int) -> None:
    counters, keys = random_words(n)
    expected = philox_numpy(counters, keys)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide = [torch.from_numpy(a.astype(np.int64)).to(device) for a in (counters, keys)]
    if path == "triton":
        words, uniforms, log_uniforms = kernels.philox_words(*wide)
    else:
        words = philox_torch(*wide)
        uniforms, log_uniforms = uniform_torch(words), log_uniform_torch(words)
    assert np.array_equal(words.cpu().numpy(), expected.astype(np.int64))
    assert uniforms.dtype == torch.float32
    assert np.array_equal(uniforms.cpu().numpy(), uniform(expected))
    assert log_uniforms.dtype == torch.float64
    assert np.array_equal(log_uniforms.cpu().numpy(), log_uniform(expected))


COMPILE = """
from specdec.kernels import philox
from specdec.kernels.configuration import TARGETS
[configuration] = philox.configurations()
print(configuration.compile(TARGETS["sm_90"]).asm["ptx"])
"""


def test_kernel_compiles_ahead_of_time_for_hopper(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMPILE], capture_output=True, text=True, env=environment,
        cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ".target sm_90" in done.stdout
    assert "mul.hi.u32" in done.stdout


def test_uniforms_stay_inside_their_interval() -> None:
    extremes = np.array([0, 0xFF, 0x100, ONES], np.uint32)
    assert uniform(extremes).tolist() == [0.0, 0.0, 2.0**-24, 1 - 2.0**-24]
    assert log_uniform(extremes).tolist() == [2.0**-25, 2.0**-25, 1.5 * 2.0**-24, 1 - 2.0**-25]


@pytest.mark.parametrize("rows", [1, 2, 8, 63])
def test_step_noise_is_addressed_as_promised(rows: int) -> None:
    seeds, positions = [7, 2**64 - 1, 2**33 + 5], [0, 4096, 9]
    noise = PhiloxNoise().step(seeds, positions, rows, CPU)
    for name, purpose in [("draft", 1), ("accept", 2), ("residual", 3), ("bonus", 4)]:
        drawn = getattr(noise, name)
        drawn = drawn[..., 0] if name == "accept" else drawn
        assert drawn.shape == (3, rows)
        assert drawn.dtype == torch.float32
        for (b, seed), row in itertools.product(enumerate(seeds), range(rows)):
            assert drawn[b, row] == uniform(word(seed, row, positions[b], purpose)[:1])[0]


@pytest.mark.parametrize("copies", [2, 4, 5, 9])
def test_copies_of_a_proposal_have_coins_of_their_own(copies: int) -> None:
    seeds, positions, rows = [7, 2**33 + 5], [0, 4096], 5
    noise = PhiloxNoise().step(seeds, positions, rows, CPU, copies=copies)
    once = PhiloxNoise().step(seeds, positions, rows, CPU)
    assert noise.accept.shape == (2, rows, copies)
    assert torch.equal(noise.accept[..., :1], once.accept)
    for name in ("draft", "residual", "bonus"):
        assert torch.equal(getattr(noise, name), getattr(once, name))
    for (b, seed), row, copy in itertools.product(enumerate(seeds), range(rows), range(copies)):
        lanes = word(seed, row, positions[b], Purpose.ACCEPT, copy // 4)
        assert noise.accept[b, row, copy] == uniform(lanes)[copy % 4]


@pytest.mark.parametrize("vocab", [1, 4, 63, 1000])
def test_gumbel_noise_is_addressed_as_promised(vocab: int) -> None:
    seeds, positions = [7, 2**40 + 3], [12, 0]
    noise = PhiloxNoise().gumbel(seeds, positions, vocab, CPU)
    assert noise.shape == (2, vocab)
    assert noise.dtype == torch.float32
    for r, token in itertools.product(range(2), range(vocab)):
        lane = word(seeds[r], 0, positions[r], Purpose.COUPLED, token // 4)[
            token % 4 : token % 4 + 1
        ]
        expected = -np.log(-np.log(log_uniform(lane)))[0]
        assert noise[r, token].item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_no_two_addresses_share_their_numbers() -> None:
    addresses = itertools.product((1, 2), range(4), range(4), range(5), range(4))
    words = [tuple(word(s, n, p, u, w).tolist()) for s, n, p, u, w in addresses]
    assert len(set(words)) == len(words)


def test_a_sequence_draws_the_same_alone_and_in_any_batch() -> None:
    noise = PhiloxNoise()
    alone, mates = noise.step([5], [17], 4, CPU), noise.step([9, 5], [3, 17], 9, CPU)
    assert torch.equal(alone.accept[0], mates.accept[1, :4])
    long = noise.gumbel([9, 5], [17, 17], 100, CPU)
    assert torch.equal(noise.gumbel([5], [17], 64, CPU)[0], long[1, :64])


def test_uniforms_are_uniform() -> None:
    drawn = PhiloxNoise().step(list(range(64)), [3] * 64, 256, CPU).accept
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
    counts = torch.histc(drawn, 16, 0, 1)
    expected = drawn.numel() / 16
    assert ((counts - expected) ** 2 / expected).sum().item() < 37.7  # chi-square, 15 dof, 1e-3


def test_derived_seeds_differ_and_the_first_is_the_seed() -> None:
    seed = 2**63 + 11
    assert derive_seed(seed, 0, 0) == seed
    derived = {derive_seed(seed, row, sample) for row in range(20) for sample in range(20)}
    assert len(derived) == 400
    assert all(0 <= s < 2**64 for s in derived)
    assert derive_seed(seed, 1, 2) != derive_seed(seed, 2, 1)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_outside_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(InvalidArgumentError, match="seed="):
        derive_seed(seed, 1, 0)
    with pytest.raises(InvalidArgumentError, match="seed="):
        PhiloxNoise().step([seed], [0], 1, CPU)
    with pytest.raises(InvalidArgumentError, match="seed="):
        PhiloxNoise().gumbel([seed], [0], 4, CPU)


def test_recorded_noise_replays_and_refuses_the_rest() -> None:
    uniforms: dict[Purpose, torch.Tensor] = {
        p: torch.full((2, 3), float(p) / 8) for p in Purpose if p != Purpose.COUPLED
    }
    noise: Noise = RecordedNoise(uniforms, {4: torch.arange(5.0)})
    step = noise.step([0, 0], [1, 2], 2, CPU)
    assert torch.equal(step.accept, torch.full((2, 2, 1), 0.25))
    coins = torch.rand(2, 3, 4)
    copied = RecordedNoise({**uniforms, Purpose.ACCEPT: coins}).step([0, 0], [1, 2], 2, CPU, 3)
    assert torch.equal(copied.accept, coins[:, :2, :3])
    with pytest.raises(InvalidArgumentError, match="ACCEPT"):
        noise.step([0, 0], [1, 2], 2, CPU, copies=2)
    assert torch.equal(noise.gumbel([0, 0], [4, 4], 5, CPU), torch.arange(5.0).expand(2, 5))
    with pytest.raises(InvalidArgumentError, match="DRAFT"):
        noise.step([0, 0], [1, 2], 4, CPU)
    with pytest.raises(InvalidArgumentError, match="position 7"):
        noise.gumbel([0], [7], 5, CPU)
    with pytest.raises(InvalidArgumentError, match="BONUS"):
        RecordedNoise({p: u for p, u in uniforms.items() if p != Purpose.BONUS}).step(
            [0, 0], [0, 0], 1, CPU
        )


def test_draft_gumbel_rows_are_addressed_by_seed_step_row_and_token() -> None:
    noise = PhiloxNoise().draft_gumbel([7, 7, 2**63 + 5], [10, 10, 3], [0, 6, 255], 9, CPU)
    assert noise.shape == (3, 9)
    assert noise.dtype == torch.float32
    for row, (seed, position, node) in enumerate([(7, 10, 0), (7, 10, 6), (2**63 + 5, 3, 255)]):
        words = np.concatenate(
            [word(seed, node, position, Purpose.DRAFT, block) for block in range(3)]
        )
        wanted = -np.log(-np.log(log_uniform(words[:9])))
        assert noise[row].tolist() == wanted.astype(np.float32).tolist()


def test_draft_gumbel_bits_are_pinned() -> None:
    row = PhiloxNoise().draft_gumbel([1], [5], [2], 4, CPU)[0]
    words = np.array([3398225440, 1056373018, 3230266205, 3116041829], np.uint32)
    wanted = -np.log(-np.log(((words >> np.uint32(8)) + 0.5) * 2.0**-24))
    assert row.tolist() == wanted.astype(np.float32).tolist()


def test_draft_gumbel_rows_do_not_depend_on_their_number() -> None:
    noise = PhiloxNoise()
    vocab = 40_000  # two rows are more than are made at once
    both = noise.draft_gumbel([1, 2], [3, 3], [0, 1], vocab, CPU)
    assert torch.equal(both[1:], noise.draft_gumbel([2], [3], [1], vocab, CPU))
    assert not torch.equal(both[0], noise.gumbel([1], [3], vocab, CPU)[0])


def test_noise_without_gumbel_rows_for_drafts_says_so() -> None:
    with pytest.raises(InvalidArgumentError, match="RecordedNoise has no Gumbel noise for drafts"):
        RecordedNoise().draft_gumbel([1], [0], [0], 4, CPU)
