"""Predicted against measured speed of the built-in pair, for draft lengths 1 to 8 and three trees.

    python -m specdec.evals.predicted_speed --out evals/results/predicted_speed.json

Each setting's prediction is that of `specdec eval` (evals/acceptance.py): what it accepts on the
prompts, counted, and what its steps cost on this machine, measured apart by the profiler. Plain
decoding and every setting continue the same prompts in turn; costs are measured anew for every
prompt, because a shared machine is not the same one all along, and the median counts. Engines are
made anew too: where its memory lies makes one quicker than its equal for as long as it lives.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec import Engine, SamplingParams, zoo
from specdec.evals import prompts as prompt_sets
from specdec.evals.acceptance import forecast, seconds_per_token
from specdec.evals.provenance import model_facts, provenance
from specdec.evals.recorder import Recorder, Tally
from specdec.rng import derive_seed

LENGTHS = range(1, 9)
TREES = ((2, 1), (2, 2, 1), (4, 2, 1))
BAR = 0.1
PLAIN = "plain"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def settings(draft: Any) -> dict[str, dict[str, Any]]:
    """Arguments of Engine by name; plain decoding first."""
    return {
        PLAIN: {},
        **{
            f"draft {n}": {"draft": draft, "num_draft_tokens": n, "policy": "constant"}
            for n in LENGTHS
        },
        **{
            f"tree {','.join(map(str, tree))}": {"draft": draft, "tree": tree, "policy": "constant"}
            for tree in TREES
        },
    }


class Prediction:
    """One setting's: its counts, and a forecast from each measurement of what its steps cost."""

    def __init__(
        self, make: Callable[[], Engine], prompts: list[list[int]], sampling: SamplingParams
    ) -> None:
        self._make, self._sampling = make, sampling
        recorder = Recorder(make())
        self._tallies: list[Tally] = []
        for number, prompt in enumerate(prompts):
            self._tallies += recorder.run([prompt], sampling, [derive_seed(0, number, 0)])
        self._forecasts: list[dict[str, Any]] = []

    def measure_costs(self) -> None:
        """Measures costs anew, and predicts with them."""
        depth = max(len(tally.offered) for tally in self._tallies)
        costs = self._make().step_costs(self._sampling, max_depth=depth, fresh=True)
        self._forecasts.append(forecast(self._tallies, costs, drafts=True))

    def outcome(self) -> dict[str, Any]:
        """Medians over the measurements of costs."""
        steps = sum(t.steps for t in self._tallies)
        values = [its["predicted_speed"] for its in self._forecasts]
        return {
            "predicted_speed": median(values), "predictions": values,
            "cost_ratio": median(its["cost_ratio"] for its in self._forecasts),
            "tokens_per_target_pass": sum(t.tokens for t in self._tallies) / steps,
        }  # fmt: skip


def race(
    makes: Mapping[str, Callable[[], Engine]], prompts: list[list[int]], sampling: SamplingParams,
    rounds: int, before: Callable[[], None] = lambda: None,
) -> dict[str, list[list[float]]]:  # fmt: skip
    """Seconds per token by setting, prompt and round, behind the step that reads the prompt; every
    prompt's first round warms up and is left out. before: called before every prompt."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in makes}
    for number, prompt in enumerate(tqdm(prompts, desc="measured")):
        before()
        engines = {name: make() for name, make in makes.items()}
        for times in seconds.values():
            times.append([])
        for round_ in range(rounds + 1):
            for name, engine in engines.items():
                its = seconds_per_token(engine, prompt, sampling, derive_seed(0, number, 0))
                if round_:
                    seconds[name][-1].append(its)
    return seconds


def rows(
    forecasts: dict[str, dict[str, Any]], seconds: dict[str, list[list[float]]]
) -> list[dict[str, Any]]:
    """Speeds against plain decoding: medians over the rounds, summed over the prompts."""
    total = {name: sum(median(times) for times in its) for name, its in seconds.items()}
    found = []
    for name, its in forecasts.items():
        measured, guess = total[PLAIN] / total[name], its["predicted_speed"]
        found.append(
            {
                "setting": name, "predicted": guess, "measured": round(measured, 4),
                "off_by": round(guess / measured - 1, 4), "within_bar": abs(guess / measured - 1)
                <= BAR, "tokens_per_target_pass": round(its["tokens_per_target_pass"], 4),
                "cost_ratio": its["cost_ratio"], "predictions": its["predictions"],
                "seconds": seconds[name],
            }
        )  # fmt: skip
    return found


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True)
@click.option("--prompts", "count", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--tokens", type=click.IntRange(min=8), default=128, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True)
def main(out: Path, dtype: str, count: int, tokens: int, rounds: int, temperature: float) -> None:
    """Predicts, then measures, every setting."""
    torch.set_num_threads(1)
    target, draft = (
        AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=DTYPES[dtype]).eval()
        for name in ("big", "small")
    )
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("big"))
    prompts = [tokenizer(p.text)["input_ids"] for p in prompt_sets.load("heldout_code")[:count]]
    sampling = SamplingParams(max_new_tokens=tokens, temperature=temperature)
    makes = {
        name: partial(Engine, target, grow=True, **arguments)
        for name, arguments in settings(draft).items()
    }
    predictions = {
        name: Prediction(make, prompts, sampling)
        for name, make in tqdm(makes.items(), desc="counted")
        if name != PLAIN
    }

    def measure_costs() -> None:
        for each in predictions.values():
            each.measure_costs()

    seconds = race(makes, prompts, sampling, rounds, measure_costs)
    found = rows({name: each.outcome() for name, each in predictions.items()}, seconds)
    worst = max(abs(row["off_by"]) for row in found)
    result = {
        "provenance": {
            **provenance(), "target": model_facts(target), "draft": model_facts(draft)
        },
        "dtype": dtype, "prompts": count, "tokens": tokens, "rounds": rounds,
        "temperature": temperature, "bar": BAR, "worst": worst,
        "within_bar": all(row["within_bar"] for row in found), "rows": found,
        "plain_seconds": seconds[PLAIN],
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in found:
        click.echo(
            f"{row['setting']:12} predicted {row['predicted']:.2f}  measured {row['measured']:.2f}"
            f"  off by {row['off_by']:+.1%}"
        )
    click.echo(f"worst {worst:.1%}, bar {BAR:.0%}")


if __name__ == "__main__":
    main()
