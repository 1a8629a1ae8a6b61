"""Cost of proposing from the text itself, beside one single-row pass of a model of the built-in
big's shape (15M parameters) at 32k tokens of context.

    python -m specdec.evals.proposer_cost --out evals/results/proposer_cost.json

The text is source code of Python's standard library. Each proposer stands at 2k, 8k and 32k tokens
of it and goes on as decoding would: the tokens that it drafted right and one more are committed,
then it proposes again. A step is the whole of propose(): it takes in what was committed, drafts and
makes the TokenTree. The proposers take turns; in every turn some passes of the target come first,
a step behind each. Those steps but the first are `cold`: a pass has just streamed its weights
through the caches, and the proposer's own last step is one pass ago, as in decoding; most of what
it costs is Python and torch coming back. Five steps without a pass between them follow, which are
`warm`. One thread, and its processor time: what other jobs do on a shared machine does not count,
but for the caches that they share. The past of the suffix proposer is filled with other modules.
"""

import argparse
import ast
import difflib
import inspect
import json
import logging
import pdb
import subprocess
import tarfile
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, quantiles
from types import ModuleType
from typing import Any

import click
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from specdec import zoo
from specdec.cache import CacheGroup
from specdec.evals.provenance import provenance
from specdec.proposers import NgramProposer, Proposer, SuffixProposer
from specdec.rng import PhiloxNoise
from specdec.runner import ModelRunner, SequenceRows
from specdec.sampling import SamplingParams
from specdec.sequence import Sequence

TEXT: tuple[ModuleType, ...] = (argparse, inspect, logging, typing)
PAST: tuple[ModuleType, ...] = (ast, difflib, pdb, subprocess, tarfile)
CONTEXTS = (2048, 8192, 32768)
PASS_CONTEXT, BUDGET, OUTPUT = 32768, 4, 200
COLD, WARM = 2, 5  # steps of a turn that count
NOISE = PhiloxNoise()
MAX_OF_PASS, MAX_GROWTH = 0.01, 1.2
CPU = torch.device("cpu")

MAKE: dict[str, Callable[[], Proposer]] = {
    "ngram": NgramProposer,
    "ngram, 3 branches": lambda: NgramProposer(branches=3),
    "suffix": SuffixProposer,
    "suffix, no past": lambda: SuffixProposer(cache_tokens=0),
    "suffix, tree": lambda: SuffixProposer(mode="tree"),
}


@dataclass
class Run:
    """One proposer somewhere in the text."""

    name: str
    context: int
    text: list[int]
    proposer: Proposer
    sequence: Sequence
    cold: list[float] = field(default_factory=list)  # seconds per step
    warm: list[float] = field(default_factory=list)

    def step(self, seconds: list[float]) -> None:
        began = time.thread_time()
        [tree] = self.proposer.propose([self.sequence], [BUDGET], NOISE)
        seconds.append(time.thread_time() - began)
        at = len(self.sequence.tokens)
        node, right = -1, 0
        children = {
            (parent, token): child
            for child, (parent, token) in enumerate(
                zip(tree.parents, tree.tokens.tolist(), strict=True)
            )
        }
        while (node, self.text[at + right]) in children:
            node = children[node, self.text[at + right]]
            right += 1
        self.sequence.tokens += self.text[at : at + right + 1]


def source(tokenizer: Any, modules: tuple[ModuleType, ...]) -> list[int]:
    ids: list[int] = tokenizer("\n".join(map(inspect.getsource, modules)))["input_ids"]
    return ids


def target_pass() -> Callable[[], object]:
    """A single-row pass of the big's shape, of random weights, behind 32k tokens of context."""
    config = AutoConfig.from_pretrained(zoo.path("big"))
    config.max_position_embeddings = PASS_CONTEXT + 16
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    runner = ModelRunner(model)
    group = CacheGroup(16, PASS_CONTEXT + 16, CPU)
    runner.join(group)
    cache = group.open(PASS_CONTEXT + 1)

    def run() -> object:
        # what the slots hold does not matter to the time
        cache.computed[runner] = PASS_CONTEXT
        return runner.score([SequenceRows(cache, [5], keep=1)])

    return run


def start(name: str, context: int, text: list[int], past: list[int]) -> Run:
    proposer = MAKE[name]()
    group = CacheGroup(16, 16, CPU)
    proposer.join(group, 4096)
    if isinstance(proposer, SuffixProposer):
        for at in range(0, len(past), OUTPUT):
            proposer.past.add(past[at : at + OUTPUT])
    sequence = Sequence(
        name, 0, text[:context], context, SamplingParams(temperature=0).law(), 0, len(text),
        frozenset(), None, group.open(1),
    )  # fmt: skip
    proposer.start(sequence)
    return Run(name, context, text, proposer, sequence)


def costs(seconds: list[float], whole: float) -> dict[str, Any]:
    spread = quantiles(seconds, n=5)
    return {
        "microseconds_mean": 1e6 * mean(seconds),
        "microseconds_median": 1e6 * median(seconds),
        "microseconds_p20_p80": [1e6 * spread[0], 1e6 * spread[3]],
        "of_pass": mean(seconds) / whole,
    }


def report(runs: list[Run], passes: list[float]) -> dict[str, Any]:
    whole = median(passes)
    rows: dict[str, Any] = {}
    for run in runs:
        steps = len(run.cold) * (1 + COLD) // COLD + len(run.warm)
        rows.setdefault(run.name, {})[str(run.context)] = {
            "cold": costs(run.cold, whole), "warm": costs(run.warm, whole),
            "tokens_per_step": (len(run.sequence.tokens) - run.context) / steps,
        }  # fmt: skip
    for row in rows.values():
        for kind in ("cold", "warm"):
            first, last = (row[str(context)][kind] for context in (CONTEXTS[0], CONTEXTS[-1]))
            growth = last["microseconds_mean"] / first["microseconds_mean"]
            row[f"{kind}_growth"] = growth
            row[f"{kind}_reached"] = {
                "of_pass": last["of_pass"] <= MAX_OF_PASS, "growth": growth <= MAX_GROWTH
            }  # fmt: skip
    return rows


@click.command()
@click.option("--rounds", default=100, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(rounds: int, out: Path) -> None:
    """Cost of proposing from the text itself, beside one pass of a 15M model at 32k context."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("big"), model_max_length=1 << 20)
    text, past = source(tokenizer, TEXT), source(tokenizer, PAST)
    needed = CONTEXTS[-1] + rounds * (1 + COLD + WARM) * (BUDGET + 1) + 1
    assert len(text) >= needed, (len(text), needed)
    run_pass = target_pass()
    runs = [start(name, context, text, past) for name in MAKE for context in CONTEXTS]
    passes: list[float] = []
    for _ in tqdm(range(rounds)):
        for run in runs:
            for seconds in ([], *[run.cold] * COLD):
                began = time.thread_time()
                run_pass()
                passes.append(time.thread_time() - began)
                run.step(seconds)
            for _ in range(WARM):
                run.step(run.warm)
    rows = report(runs, passes)
    result = {
        "provenance": provenance(), "rounds": rounds, "cold_steps": COLD, "warm_steps": WARM,
        "budget": BUDGET,
        "bars": {"of_pass": MAX_OF_PASS, "growth": MAX_GROWTH},
        "pass_microseconds": 1e6 * median(passes), "past_tokens": len(past), "proposers": rows,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(f"pass {1e6 * median(passes):.0f} us")
    for name, row in rows.items():
        for context in CONTEXTS:
            at = row[str(context)]
            for kind in ("cold", "warm"):
                cost = at[kind]
                click.echo(
                    f"{name:18s} {context:6d} {kind} {cost['microseconds_mean']:7.1f} us mean "
                    f"{cost['microseconds_median']:7.1f} median {100 * cost['of_pass']:6.2f} % of "
                    f"a pass, {at['tokens_per_step']:.2f} tokens a step"
                )
        for kind in ("cold", "warm"):
            growth, reached = row[f"{kind}_growth"], row[f"{kind}_reached"]
            click.echo(f"{name:18s} {kind} growth {growth:.2f}, bars reached: {reached}")


if __name__ == "__main__":
    main()
