"""Optimal trees on the built-in pair: how well acceptance by depth and rank, measured on half of
the prompts, predicts the tokens per target pass of the trees built from it on the other half, and
the other way round; and such trees against chains, dynamic trees and stochastic-beam trees of as
many nodes.

Acceptance is measured twice (evals/tree_rates.py), and the tree that is tried is the best one for
what the second tree showed.

    python -m specdec.evals.optimal_trees --out evals/results/optimal_trees.json

Nothing is timed. Every contender continues the same prompts with the same seeds; standard errors
are over prompts. Counted are steps that drafted all their nodes, not those cut short by the end of
the text.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec import Engine, SamplingParams, zoo
from specdec.evals.provenance import provenance
from specdec.evals.rule_choice import error
from specdec.evals.speed import read_prompts
from specdec.evals.tree_rates import LEVELS, PROBE, by_depth_and_rank, refined
from specdec.optimal import expected_tokens, optimal_shape
from specdec.stats import RunStats

NODES = (8, 16, 32)
TEMPERATURES = {"sampled": 1.0, "coupled": 1.0, "greedy": 0.0}
KINDS = {"sampled": "without_replacement", "coupled": "coupled", "greedy": "top_k"}

Contender = tuple[str, dict[str, Any], int]  # proposer, its options, nodes


def measure(
    contender: Contender, pair: tuple[Any, Any], prompts: Sequence[torch.Tensor], setting: str,
    samples: int, new_tokens: int,
) -> tuple[list[tuple[int, int]], RunStats]:  # fmt: skip
    """Tokens and steps of each prompt, over all its samples, and the sums over all."""
    name, options, nodes = contender
    params = SamplingParams(new_tokens, TEMPERATURES[setting])
    engine = Engine(
        pair[0], draft=pair[1], proposer=name, proposer_options=options, num_draft_tokens=nodes,
        policy="constant", grow=True,
    )  # fmt: skip
    found: list[tuple[int, int]] = []
    for index, ids in enumerate(prompts):
        engine.add_request(ids, params, n=samples if params.temperature else 1, seed=1000 + index)
        whole: list[int] = []
        while records := engine.step():
            whole += [1 + record.accepted for record in records if record.drafted == nodes]
        engine.take_finished()
        found.append((sum(whole), len(whole)))
    return found, engine.stats


def rate(counts: Sequence[tuple[int, int]]) -> float:
    """Tokens per target pass."""
    return sum(tokens for tokens, _ in counts) / sum(steps for _, steps in counts)


def spread(counts: Sequence[tuple[int, int]]) -> float:
    """Standard error of the rate, over prompts (of a ratio of sums, to first order)."""
    of_all, mean_steps = rate(counts), mean(steps for _, steps in counts)
    return error([(tokens - of_all * steps) / mean_steps for tokens, steps in counts])


def contenders(setting: str, nodes: int, shape: tuple[int, ...]) -> dict[str, Contender]:
    kind = KINDS[setting]
    coupled = {"kind": "coupled"} if setting == "coupled" else {}
    found: dict[str, Contender] = {
        "optimal tree": ("tree", {"shape": shape, "kind": kind}, len(shape)),
        "chain": ("draft", coupled, nodes),
    }
    if setting != "sampled":
        options = {"nodes": nodes, "depth": LEVELS, **coupled}
        found["dynamic tree"] = ("dynamic_tree", options, nodes)
    else:
        options = {"width": 4, "depth": nodes // 4}
        found["stochastic-beam tree"] = ("beam_tree", options, nodes)
    return found


def rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def fold(
    setting: str, pair: tuple[Any, Any], learnt_from: Sequence[torch.Tensor],
    tried_on: Sequence[torch.Tensor], nodes: int, rough: Sequence[Sequence[float]], samples: int,
    new_tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """One size: the tree of one half of the prompts, what it promises, what all do on the other."""
    kind = KINDS[setting]
    first = optimal_shape(rough, nodes, LEVELS)
    again: Contender = ("tree", {"shape": first, "kind": kind}, len(first))
    _, stats = measure(again, pair, learnt_from, setting, samples, new_tokens)
    acceptance = refined(rough, stats)
    shape = optimal_shape(acceptance, nodes, LEVELS)
    return {
        "shape": shape,
        "acceptance_by_depth_and_rank": [rounded(row) for row in acceptance],
        "predicted": expected_tokens(shape, acceptance),
        "predicted_from_wide_tree": expected_tokens(shape, rough),
        "counts": {
            name: measure(contender, pair, tried_on, setting, samples, new_tokens)[0]
            for name, contender in contenders(setting, nodes, shape).items()
        },
    }


def together(nodes: int, folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Both halves: each was predicted from the other, so that what sets one apart from the other
    is on both sides of the comparison."""
    counts = {
        name: [pair for fold in folds for pair in fold["counts"][name]]
        for name in folds[0]["counts"]
    }
    measured = rate(counts["optimal tree"])
    predicted, from_wide = (
        mean(fold[key] for fold in folds) for key in ("predicted", "predicted_from_wide_tree")
    )
    return {
        "nodes": nodes,
        "predicted": round(predicted, 4),
        "predicted_over_measured": round(predicted / measured, 4),
        "predicted_over_measured_from_wide_tree": round(from_wide / measured, 4),
        "optimal_tree_over_chain": round(measured / rate(counts["chain"]), 4),
        "contenders": {
            name: {
                "tokens_per_target_pass": round(rate(its), 4),
                "standard_error": round(spread(its), 4),
            }
            for name, its in counts.items()
        },
        "folds": [{**fold, "predicted": round(fold["predicted"], 4)} for fold in folds],
    }


def tables(
    setting: str, pair: tuple[Any, Any], halves: Sequence[Sequence[torch.Tensor]], samples: int,
    new_tokens: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The table of one setting, again and again as it grows."""
    probe: Contender = ("tree", {"shape": PROBE, "kind": KINDS[setting]}, len(PROBE))
    rough = []
    for half in halves:
        _, stats = measure(probe, pair, half, setting, samples, new_tokens)
        rough.append(by_depth_and_rank(stats))
    sizes: list[dict[str, Any]] = []
    for nodes in tqdm(NODES, desc=setting):
        folds = [
            fold(setting, pair, halves[i], halves[1 - i], nodes, rough[i], samples, new_tokens)
            for i in (0, 1)
        ]
        sizes.append(together(nodes, folds))
        yield {
            "acceptance_in_wide_tree": [[rounded(row) for row in each] for each in rough],
            "sizes": sizes,
        }


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--prompts", "count", type=click.IntRange(min=4), default=40, show_default=True)
@click.option("--samples", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--setting", "settings", type=click.Choice(list(KINDS)), multiple=True)
@click.option("--new-tokens", type=click.IntRange(min=48), default=64, show_default=True)
def main(out: Path, count: int, samples: int, settings: tuple[str, ...], new_tokens: int) -> None:
    """Measures sampled, coupled and greedy trees, or the settings given."""
    torch.set_num_threads(1)
    target, draft = (
        AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=torch.float32)
        for name in ("big", "small")
    )
    prompts = read_prompts(AutoTokenizer.from_pretrained(zoo.path("big")), count)
    result: dict[str, Any] = {
        "provenance": provenance(),
        "prompts": count,
        "samples": samples,
        "new_tokens": new_tokens,
        "probe": PROBE,
        "settings": {},
    }
    halves = prompts[::2], prompts[1::2]
    for setting in settings or KINDS:
        for table in tables(setting, (target, draft), halves, samples, new_tokens):
            result["settings"][setting] = table
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
