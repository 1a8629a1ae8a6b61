"""What an ensemble of draft model and n-gram is worth: tokens per target pass of the built-in pair
on every prompt set, against each of the two alone.

    python -m specdec.evals.ensemble --out evals/results/ensemble.json

Every contender continues the same prompts with the same seeds by a fixed budget; nothing is timed.
The standard error is over prompts. The ensemble whose budget is the sum of theirs must not be below
the better of the two by more than one standard error on any set; at equal budget it is reported.
"""

import json
from collections.abc import Sequence
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
from specdec.evals import prompts as prompt_sets
from specdec.evals.provenance import provenance

BUDGET = 4  # of each of the two
MEMBERS = ("draft", "ngram")
SUM, EQUAL = "ensemble, sum of budgets", "ensemble, equal budget"


def contenders(target: Any, draft: Any) -> dict[str, specdec.SpecModel]:
    both = {"draft": draft, "proposer": list(MEMBERS), "policy": "constant"}
    alone = {"policy": "constant", "num_draft_tokens": BUDGET}
    return {
        "draft": specdec.wrap(target, draft=draft, **alone),
        "ngram": specdec.wrap(target, proposer="ngram", **alone),
        SUM: specdec.wrap(target, num_draft_tokens=2 * BUDGET, **both),
        EQUAL: specdec.wrap(target, num_draft_tokens=BUDGET, **both),
    }


def measure(
    spec: specdec.SpecModel, prompts: Sequence[torch.Tensor], temperature: float, new_tokens: int
) -> list[float]:
    """Tokens per target pass of each prompt; fixed seeds."""
    flags: dict[str, Any] = {"do_sample": False}
    if temperature:
        flags = {"do_sample": True, "temperature": temperature, "top_k": 0}
    found = []
    for index, ids in enumerate(prompts):
        spec.generate(
            ids, max_new_tokens=new_tokens, seed=1000 + index, eos_token_id=None, **flags,
        )  # fmt: skip
        assert spec.last_stats is not None
        found.append(spec.last_stats.tokens_per_target_pass)
    return found


def error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return stdev(values) / sqrt(len(values))


def verdict(rates: dict[str, list[float]]) -> dict[str, Any]:
    """One set's figures, and whether the sum of budgets kept up with the better member."""
    better = max(MEMBERS, key=lambda name: mean(rates[name]))
    gains = {
        name: [a - b for a, b in zip(rates[name], rates[better], strict=True)]
        for name in (SUM, EQUAL)
    }
    return {
        "tokens_per_target_pass": {
            name: [round(mean(values), 4), round(error(values), 4)]
            for name, values in rates.items()
        },
        "better_member": better,
        "gain_over_it": {
            name: [round(mean(values), 4), round(error(values), 4)]
            for name, values in gains.items()
        },
        "kept_up": mean(gains[SUM]) >= -error(gains[SUM]),
        "by_prompt": {name: [round(v, 4) for v in values] for name, values in rates.items()},
    }


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--set", "sets", multiple=True, help="Prompt sets.  [default: all that ship]")
@click.option("--prompts", "count", type=click.IntRange(min=2), default=20, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=1), default=96, show_default=True)
def main(out: Path, sets: tuple[str, ...], count: int, new_tokens: int) -> None:
    """Measures every set greedily and at temperature 1; fails where the ensemble fell behind."""
    torch.set_num_threads(1)
    target, draft = (
        AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=torch.float32)
        for name in ("big", "small")
    )
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("big"))
    specs = contenders(target, draft)
    result: dict[str, Any] = {
        "provenance": provenance(), "budget_of_each": BUDGET, "prompts": count,
        "new_tokens": new_tokens, "temperatures": {},
    }  # fmt: skip
    behind = []
    for temperature in (0.0, 1.0):
        rows = result["temperatures"].setdefault(str(temperature), {})
        for name in tqdm(sets or prompt_sets.names(), desc=f"T = {temperature:g}"):
            fitting = prompt_sets.fitting(
                prompt_sets.load(name), lambda text: len(tokenizer(text)["input_ids"]),
                context=target.config.max_position_embeddings, new_tokens=new_tokens,
            )  # fmt: skip
            ids = [
                tokenizer(prompt.text, return_tensors="pt")["input_ids"]
                for prompt in fitting.kept[:count]
            ]
            rates = {n: measure(s, ids, temperature, new_tokens) for n, s in specs.items()}
            rows[name] = {"prompts": len(ids), **verdict(rates)}
            if not rows[name]["kept_up"]:
                behind.append(f"{name} at temperature {temperature:g}")
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if behind:
        raise click.ClickException(f"the ensemble fell behind on {', '.join(behind)}")


if __name__ == "__main__":
    main()
