"""Which rule accepts most, and which way of drafting trees: tokens per target pass of the built-in
pair on held-out prompts, sampled, by rule, shape and kind of draws.

    python -m specdec.evals.rule_choice --out evals/results/rule_choice.json
    python -m specdec.evals.rule_choice --chain 2 --chain 4 --chain 8 --prompts 40 --samples 16 \
        --out evals/results/block_gain.json

The second one compares block with token-wise verification of chains.
Every contender continues the same prompts with the same seeds; the standard error is over prompts.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec
from specdec import zoo
from specdec.evals.provenance import provenance
from specdec.evals.speed import read_prompts

TREES = ((2, 2), (3, 1, 1), (4, 2, 1))
CHAIN_RULES = ("token", "block", "gumbel")
TREE_RULES = {
    "without_replacement": ("recursive", "traversal"),
    "iid": ("kseq", "recursive", "traversal"),
    "coupled": ("gumbel",),
    "top_k": ("walk",),
}


@dataclass(frozen=True)
class Contender:
    """One way to draft and judge."""

    shape: tuple[int, ...]
    kind: str
    rule: str

    @property
    def name(self) -> str:
        return f"{','.join(map(str, self.shape))} {self.kind} {self.rule}"

    def wrap(self, target: Any, draft: Any) -> specdec.SpecModel:
        return specdec.wrap(
            target, draft=draft, tree=self.shape, policy="constant", verification=self.rule,
            proposer_options={"kind": self.kind},
        )  # fmt: skip


def contenders(chains: Sequence[int]) -> list[Contender]:
    """Chains as deep as the trees have levels, then every tree under every rule that fits it; or
    the named chains alone, under the two rules for drawn ones."""
    if chains:
        return [
            Contender((1,) * depth, "without_replacement", rule)
            for depth in chains
            for rule in ("token", "block")
        ]
    found = [
        Contender((1,) * depth, "coupled" if rule == "gumbel" else "without_replacement", rule)
        for depth in sorted({len(tree) for tree in TREES})
        for rule in CHAIN_RULES
    ]
    found += [
        Contender(tree, kind, rule)
        for tree in TREES
        for kind, rules in TREE_RULES.items()
        for rule in rules
    ]
    return found


def measure(
    contender: Contender, pair: tuple[Any, Any], prompts: Sequence[torch.Tensor],
    temperature: float, samples: int, new_tokens: int,
) -> list[float]:  # fmt: skip
    """Tokens per target pass of each prompt, over all its samples; fixed seeds."""
    spec = contender.wrap(*pair)
    found = []
    for index, ids in enumerate(prompts):
        spec.generate(
            ids, do_sample=True, temperature=temperature, top_k=0, max_new_tokens=new_tokens,
            num_return_sequences=samples, seed=1000 + index, eos_token_id=None,
        )  # fmt: skip
        assert spec.last_stats is not None
        found.append(spec.last_stats.tokens_per_target_pass)
    return found


def error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return stdev(values) / sqrt(len(values))


def compare(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Mean of the paired differences and its standard error."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return [round(mean(differences), 4), round(error(differences), 4)]


def table(
    pair: tuple[Any, Any], prompts: Sequence[torch.Tensor], chains: Sequence[int],
    temperature: float, samples: int, new_tokens: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per contender, compared with the best one of its shape."""
    rates = {
        c: measure(c, pair, prompts, temperature, samples, new_tokens)
        for c in tqdm(contenders(chains), desc=f"T = {temperature}")
    }
    rows = []
    for contender, values in rates.items():
        same = [c for c in rates if c.shape == contender.shape]
        best = max(same, key=lambda c: mean(rates[c]))
        rows.append(
            {
                "shape": contender.shape,
                "kind": contender.kind,
                "rule": contender.rule,
                "tokens_per_target_pass": round(mean(values), 4),
                "standard_error": round(error(values), 4),
                "best_of_shape": best.name,
                "over_first_of_shape": round(mean(values) / mean(rates[same[0]]), 4),
                "less_than_best": compare(rates[best], values),
                "by_prompt": [round(value, 4) for value in values],
            }
        )
    return rows


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--prompts", "count", type=click.IntRange(min=2), default=20, show_default=True)
@click.option("--samples", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=1), default=96, show_default=True)
@click.option("--chain", "chains", type=click.IntRange(min=1), multiple=True)
def main(out: Path, count: int, samples: int, new_tokens: int, chains: tuple[int, ...]) -> None:
    """Measures every contender at temperatures 1 and 0.6."""
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
        "temperatures": {},
    }
    for t in (1.0, 0.6):
        rows = table((target, draft), prompts, chains, t, samples, new_tokens)
        result["temperatures"][str(t)] = rows
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
