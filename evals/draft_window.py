"""What a draft window saves and costs: draft pass time at long contexts, tokens per target pass.

    python -m specdec.evals.draft_window --out evals/results/draft_window.json

Passes: one row of a random-weight draft behind 2k, 8k and 32k tokens, with its whole cache and with
a window of 512; what stands in the cache makes no difference to the time, so it is not computed.
The windowed cache is timed twice: as it is after many drops, its pages in a ring, and with its
pages in one run, which is what copying instead of recycling them would give; both by the captured
forward and by the model's own modules, which gather scattered pages. Variants take turns.

Tokens: the built-in pair on held-out code, as far as its 1024 positions go, with and without
windows, greedy and sampled: tokens per target pass, and seconds per token, variants taking turns.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from specdec import Engine, SamplingParams, zoo
from specdec.cache import CachedSequence, CacheGroup
from specdec.evals.speed import provenance
from specdec.forward import ModuleForward
from specdec.proposers.model import SINKS, window_slots
from specdec.runner import ModelRunner, SequenceRows

CONTEXTS, WINDOW, PAGE = (2048, 8192, 32768), 512, 16
CPU = torch.device("cpu")
SHAPES: dict[str, dict[str, int]] = {
    "as the built-in small": {
        "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 4096,
    },
    "68M": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 2,
        "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 32000,
    },
}  # fmt: skip
PAIR_WINDOWS = (None, 512, 256, 128, 64)


def _cache(group: CacheGroup, runner: ModelRunner, context: int, window: int | None) -> Any:
    """A cache as it stands when the draft has read so many tokens."""
    slots = context + PAGE if window is None else window_slots(window, PAGE)
    cache = group.open(slots, 0 if window is None else SINKS)
    filled = cache.table.capacity if window is not None else context
    while window is not None and filled < context:  # page by page, as a text grows
        cache.computed[runner] = filled
        group.drop(cache, filled - window)
        filled = min(context, filled + PAGE)
    cache.computed[runner] = context
    if window is not None:
        group.drop(cache, context - window)
    return cache


def _in_one_run(group: CacheGroup, cache: CachedSequence) -> CachedSequence:
    other = group.open(cache.table.capacity, SINKS)
    return replace(cache, table=other.table, computed=dict(cache.computed))


def _time(variants: dict[str, Callable[[], object]], turns: int) -> dict[str, dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns + 2):
        for name, run in variants.items():
            began = time.thread_time()
            run()
            if turn >= 2:
                seconds[name].append(time.thread_time() - began)
    return {
        name: {
            "microseconds_median": 1e6 * median(values),
            "microseconds_p20_p80": [1e6 * quantiles(values, n=5)[i] for i in (0, 3)],
        }
        for name, values in seconds.items()
    }


def passes(shape: dict[str, int], turns: int) -> dict[str, Any]:
    """Seconds of one single-row pass by context, forward and kind of cache."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=max(CONTEXTS) + PAGE)  # type: ignore[arg-type]
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    found: dict[str, Any] = {}
    for forward in ("captured", "modules"):
        runner = ModelRunner(model)
        if forward == "modules":
            runner._prepared = replace(runner._prepared, forward=ModuleForward(model))
        group = CacheGroup(PAGE, 1 << 17, CPU)
        runner.join(group)
        for context in CONTEXTS:
            full = _cache(group, runner, context, None)
            ring = _cache(group, runner, context, WINDOW)
            caches = {"full": full, "window": ring, "window, one run": _in_one_run(group, ring)}
            assert not ring.table.contiguous

            def one(cache: CachedSequence, context: int = context, by: Any = runner) -> object:
                cache.computed[by] = context
                return by.score([SequenceRows(cache, [5], keep=1)])

            variants = {
                name: lambda cache=cache, one=one: one(cache)  # type: ignore[misc]
                for name, cache in caches.items()
            }
            times = _time(variants, turns)
            whole = times["full"]["microseconds_median"]
            for of in times.values():
                of["full_over_this"] = whole / of["microseconds_median"]
            found.setdefault(forward, {})[str(context)] = times
            group.close(full)
    return found


def tokens(prompts: int, new_tokens: int) -> dict[str, Any]:
    """Tokens per target pass and seconds per token of the built-in pair, by window."""
    models = {
        name: AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=torch.bfloat16).eval()
        for name in zoo.NAMES
    }
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("big"))
    lines = (Path(__file__).parent / "prompts" / "heldout_code.jsonl").read_text().splitlines()
    text = "\n\n".join(json.loads(line)["prompt"] for line in lines)
    ids = tokenizer(text)["input_ids"]
    length = 1024 - new_tokens
    starts = [1 + i * length for i in range(prompts) if 1 + (i + 1) * length <= len(ids)]
    texts = [[ids[0], *ids[at : at + length - 1]] for at in starts]
    found: dict[str, Any] = {"prompts": len(texts), "context": length, "new_tokens": new_tokens}
    for temperature in (0.0, 1.0):
        engines = {
            str(window): Engine(
                models["big"], draft=models["small"], draft_window=window, num_draft_tokens=4,
                kv_memory=1 << 26,
            )
            for window in PAIR_WINDOWS
        }  # fmt: skip
        params = SamplingParams(max_new_tokens=new_tokens, temperature=temperature)
        for seed, prompt in enumerate(texts):
            for engine in engines.values():
                engine.add_request(prompt, params, seed=seed)
                list(engine)
        found[f"temperature {temperature:g}"] = {
            window: {
                "tokens_per_pass": engine.stats.tokens / engine.stats.steps,
                "accepted": engine.stats.accepted / engine.stats.drafted,
                "draft_seconds_per_token": engine.stats.draft_seconds / engine.stats.tokens,
                "own_bytes_of_a_sequence": sum(
                    memory.slot_bytes * window_slots(int(window), PAGE)
                    for group in engine.groups[1:]
                    for memory in group.memory.values()
                ),
            }
            for window, engine in engines.items()
        }
    return found


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--turns", type=click.IntRange(min=5), default=60, show_default=True)
@click.option("--prompts", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--new-tokens", type=click.IntRange(1, 1000), default=128, show_default=True)
def main(out: Path, turns: int, prompts: int, new_tokens: int) -> None:
    torch.set_num_threads(1)
    result = {
        "provenance": provenance(),
        "window": WINDOW,
        "slots": window_slots(WINDOW, PAGE),
        "passes": {name: passes(shape, turns) for name, shape in SHAPES.items()},
        "tokens": tokens(prompts, new_tokens),
    }
    out.write_text(json.dumps(result, indent=2) + "\n")
    click.echo(json.dumps(result["passes"], indent=2))
    click.echo(json.dumps(result["tokens"], indent=2))


if __name__ == "__main__":
    main()
