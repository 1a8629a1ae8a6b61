"""Speed against transformers, both sides alternating in one process on one thread.

    python -m specdec.evals.speed pair --dtype bfloat16 --out evals/results/speed_pair_bfloat16.json
    python -m specdec.evals.speed shapes --out evals/results/speed_shapes.json

The baseline models are loaded apart and never wrapped. Each prompt's time is the minimum over the
repetitions; a contender's figure is the median over prompts of tokens per second. In float32 a
greedy run whose tokens differ from transformers' own stops the benchmark: no speed is reported for
an output that is wrong.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import specdec
from specdec import zoo
from specdec.evals.provenance import provenance
from specdec.proposers import DraftModelProposer
from specdec.runner import Runner, SequenceRows

PROMPTS = Path(__file__).parent / "prompts" / "heldout_code.jsonl"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES: dict[str, dict[str, Any]] = {
    "125M": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 2048,
             "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 32000},
    "500M": {"num_hidden_layers": 24, "hidden_size": 1280, "intermediate_size": 3456,
             "num_attention_heads": 20, "num_key_value_heads": 20, "vocab_size": 32000},
}  # fmt: skip

Generate = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Contender:
    """One way to generate; run(ids) -> (1, length) tokens, prompt included."""

    name: str
    run: Generate
    spec: specdec.SpecModel | None = None  # ours
    seconds: list[list[float]] = field(default_factory=list)  # per prompt, per repetition

    def rates(self, new_tokens: int) -> list[float]:
        """Tokens per second of each prompt, from its quickest repetition."""
        return [new_tokens / min(times) for times in self.seconds]


def race(
    contenders: list[Contender], prompts: list[torch.Tensor], repeats: int, label: str
) -> None:
    """Times every contender on every prompt, in turn, repeats times."""
    for index, ids in enumerate(tqdm(prompts, desc=label)):
        for contender in contenders:
            while len(contender.seconds) <= index:
                contender.seconds.append([])
        for repetition in range(repeats):
            for contender in contenders:
                torch.manual_seed(1000 * index + repetition)
                began = time.perf_counter()
                contender.run(ids)
                contender.seconds[index].append(time.perf_counter() - began)


def summary(contender: Contender, new_tokens: int) -> dict[str, Any]:
    rates = contender.rates(new_tokens)
    spread = quantiles(rates, n=5) if len(rates) > 1 else [rates[0]] * 4
    return {
        "tokens_per_second_median": median(rates),
        "tokens_per_second_p20_p80": [spread[0], spread[3]],
        "seconds": contender.seconds,
    }


def ratio(a: Contender, b: Contender, new_tokens: int) -> float:
    """Median over prompts of a's speed over b's on the same prompt."""
    pairs = zip(a.rates(new_tokens), b.rates(new_tokens), strict=True)
    return median(x / y for x, y in pairs)


def read_prompts(tokenizer: Any, count: int) -> list[torch.Tensor]:
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[:count]
    return [
        tokenizer(json.loads(line)["prompt"], return_tensors="pt")["input_ids"] for line in lines
    ]


@dataclass
class Pair:
    """Both sides of the comparison on the built-in pair."""

    tokens: int
    sampled: bool
    baseline: Any
    baseline_draft: Any
    target: Any
    draft: Any

    def flags(self) -> dict[str, Any]:
        sampling = {"do_sample": True, "top_k": 0, "temperature": 1.0} if self.sampled else {}
        return {"max_new_tokens": self.tokens, "do_sample": False, **sampling}

    def transformers_plain(self) -> Contender:
        return Contender("transformers", lambda ids: self.baseline.generate(ids, **self.flags()))

    def transformers_assisted(self, draft_tokens: int | None) -> Contender:
        """draft_tokens None: transformers' own defaults; else a constant number."""
        name = f"transformers assisted {draft_tokens or 'default'}"

        def run(ids: torch.Tensor) -> torch.Tensor:
            config = self.baseline_draft.generation_config
            kept = {
                "num_assistant_tokens": config.num_assistant_tokens,
                "num_assistant_tokens_schedule": config.num_assistant_tokens_schedule,
                "assistant_confidence_threshold": config.assistant_confidence_threshold,
            }
            if draft_tokens is not None:
                config.num_assistant_tokens = draft_tokens
                config.num_assistant_tokens_schedule = "constant"
                config.assistant_confidence_threshold = 0.0
            out: torch.Tensor = self.baseline.generate(
                ids, assistant_model=self.baseline_draft, **self.flags()
            )
            for name, value in kept.items():
                setattr(config, name, value)
            return out

        return Contender(name, run)

    def ours(self, draft_tokens: int) -> Contender:
        """Draft length 0: plain decoding."""
        options: dict[str, Any] = {}
        if draft_tokens:
            options = {"draft": self.draft, "num_draft_tokens": draft_tokens}
        spec = specdec.wrap(self.target, **options)
        name = f"specdec {draft_tokens}" if draft_tokens else "specdec plain"
        return Contender(name, lambda ids: spec.generate(ids, **self.flags()), spec)


def load(name: str, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=dtype).eval()
    # every contender generates the same number of tokens
    model.generation_config.eos_token_id = None
    return model


def check_lossless(pair: Pair, prompts: list[torch.Tensor], lengths: list[int]) -> dict[str, Any]:
    """Greedy tokens of every contender of ours against transformers' plain ones."""
    wanted = [pair.transformers_plain().run(ids)[0].tolist() for ids in prompts]
    report: dict[str, Any] = {}
    for g in [0, *lengths]:
        contender = pair.ours(g)
        got = [contender.run(ids)[0].tolist() for ids in prompts]
        report[contender.name] = sum(a == b for a, b in zip(wanted, got, strict=True))
    report["prompts"] = len(prompts)
    return report


def forward_costs(
    spec: specdec.SpecModel,
    plain: specdec.SpecModel,
    draft_tokens: int,
    ids: torch.Tensor,
    repeats: int,
) -> dict[str, float]:
    """Seconds of one target pass over 1 and g + 1 rows and of one drafted token, interleaved.

    The single row is plain decoding's own, whose weights are laid out for one row.
    """
    proposer, tokens = spec.engine.proposer, ids[0].tolist()
    assert isinstance(proposer, DraftModelProposer)
    nodes = ids[0, :draft_tokens].clone()
    jobs: list[tuple[str, specdec.Engine, Runner, torch.Tensor | None]] = [
        ("target_1", plain.engine, plain.engine.target, None),
        ("target_g", spec.engine, spec.engine.target, nodes),
        ("draft_1", spec.engine, proposer.runner, None),
    ]
    caches = []
    for _, engine, runner, _ in jobs:
        caches.append(engine.group.open(len(tokens) + draft_tokens + 1))
        runner.score([SequenceRows(caches[-1], tokens[:-1], keep=1)])
    times: dict[str, list[float]] = {name: [] for name, *_ in jobs}
    for _ in range(repeats):
        for (name, _, runner, extra), cache in zip(jobs, caches, strict=True):
            keep = 1 if extra is None else 1 + draft_tokens
            began = time.perf_counter()
            runner.score([SequenceRows(cache, tokens[-1:], extra, None, keep)]).argmax(-1)
            times[name].append(time.perf_counter() - began)
            cache.computed[runner] = len(tokens) - 1
    for (_, engine, _, _), cache in zip(jobs, caches, strict=True):
        engine.group.close(cache)
    return {name: median(values) for name, values in times.items()}


@click.group()
def main() -> None:
    """Speed against transformers."""
    torch.set_num_threads(1)


@main.command()
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True)
@click.option("--prompts", "count", default=20, show_default=True)
@click.option("--tokens", default=128, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option(
    "--lengths", default="2,3,4,5,6", show_default=True, help="Draft lengths to choose from."
)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def pair(dtype: str, count: int, tokens: int, repeats: int, lengths: str, out: Path) -> None:
    """The built-in pair, greedy and at temperature 1."""
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("big"))
    prompts = read_prompts(tokenizer, count)
    choices = [int(n) for n in lengths.split(",")]
    kind = DTYPES[dtype]
    models = [load(name, kind) for name in ("big", "small", "big", "small")]
    result: dict[str, Any] = {"provenance": provenance(), "dtype": dtype, "tokens": tokens}
    for mode in ("greedy", "sampled"):
        both = Pair(tokens, mode == "sampled", *models)
        if mode == "greedy":
            result["lossless"] = check_lossless(both, prompts, choices[:1])
            equal = [v for k, v in result["lossless"].items() if k != "prompts"]
            if dtype == "float32" and min(equal) < len(prompts):
                raise click.ClickException(f"not lossless in float32: {result['lossless']}")
        result[mode] = _run_mode(both, prompts, choices, repeats, mode)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))
    for mode in ("greedy", "sampled"):
        click.echo(json.dumps({mode: result[mode]["ratios"]}, indent=1))


def _run_mode(
    both: Pair, prompts: list[torch.Tensor], choices: list[int], repeats: int, mode: str
) -> dict[str, Any]:
    # Each side's best constant draft length, from a pilot on a few prompts.
    pilot = prompts[:4]
    theirs = [both.transformers_assisted(g) for g in choices]
    mine = [both.ours(g) for g in choices]
    race([*theirs, *mine], pilot, 2, f"{mode}: pilot")
    speed = {c.name: median(c.rates(both.tokens)) for c in (*theirs, *mine)}
    best_theirs = max(choices, key=lambda g: speed[f"transformers assisted {g}"])
    best_mine = max(choices, key=lambda g: speed[f"specdec {g}"])
    plain, assisted = both.transformers_plain(), both.transformers_assisted(None)
    tuned, own_plain, own = (
        both.transformers_assisted(best_theirs), both.ours(0), both.ours(best_mine),
    )  # fmt: skip
    everyone = [plain, assisted, tuned, own_plain, own]
    stats = specdec.RunStats()
    inner, spec = own.run, own.spec
    assert spec is not None

    def counted(ids: torch.Tensor) -> torch.Tensor:
        tokens = inner(ids)
        last = spec.last_stats
        assert last is not None
        stats.tokens, stats.steps = stats.tokens + last.tokens, stats.steps + last.steps
        stats.drafted, stats.accepted = stats.drafted + last.drafted, stats.accepted + last.accepted
        stats.draft_seconds += last.draft_seconds
        stats.verify_seconds += last.verify_seconds
        stats.total_seconds += last.total_seconds
        return tokens

    own.run = counted
    race(everyone, prompts, repeats, mode)
    assert own_plain.spec is not None
    costs = forward_costs(spec, own_plain.spec, best_mine, prompts[0], 200)
    per_pass = stats.tokens_per_target_pass
    ceiling = per_pass * costs["target_1"] / (best_mine * costs["draft_1"] + costs["target_g"])
    n = both.tokens
    measured = ratio(own, own_plain, n)
    return {
        "draft_length": {"transformers": best_theirs, "specdec": best_mine},
        "pilot": speed,
        "ratios": {
            "specdec / transformers": ratio(own, plain, n),
            "specdec / transformers assisted default": ratio(own, assisted, n),
            "specdec / transformers assisted best constant": ratio(own, tuned, n),
            "specdec plain / transformers": ratio(own_plain, plain, n),
            "specdec / specdec plain": measured,
            "ceiling": ceiling,
            "share of ceiling": measured / ceiling,
        },
        "tokens_per_target_pass": per_pass,
        "acceptance_rate": stats.acceptance_rate,
        "seconds": {"draft": stats.draft_seconds, "verify": stats.verify_seconds,
                    "total": stats.total_seconds},
        "forward_seconds": costs,
        "contenders": {c.name: summary(c, n) for c in everyone},
    }  # fmt: skip


def _greedy(model: Any, tokens: int) -> Generate:
    return lambda ids: model.generate(ids, max_new_tokens=tokens, do_sample=False)


@main.command()
@click.option("--tokens", default=32, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--prompts", "count", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def shapes(tokens: int, repeats: int, count: int, out: Path) -> None:
    """Plain decoding of random Llama models of 125M and 500M parameters."""
    result: dict[str, Any] = {"provenance": provenance(), "tokens": tokens, "shapes": {}}
    for name, shape in SHAPES.items():
        for dtype, kind in DTYPES.items():
            torch.manual_seed(0)
            config = LlamaConfig(**shape, max_position_embeddings=2048, eos_token_id=None)
            baseline, wrapped = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
            wrapped.load_state_dict(baseline.state_dict())
            for model in (baseline, wrapped):
                torch.nn.Module.to(model, kind)
            spec = specdec.wrap(wrapped, release_weights=True)
            plain = Contender("transformers", _greedy(baseline, tokens))
            own = Contender("specdec plain", _greedy(spec, tokens))
            draw = torch.Generator().manual_seed(0)
            prompts = [torch.randint(1, 32000, (1, 16), generator=draw) for _ in range(count)]
            race([plain, own], prompts, repeats, f"{name} {dtype}")
            result["shapes"][f"{name} {dtype}"] = {
                "specdec plain / transformers": ratio(own, plain, tokens),
                "contenders": {c.name: summary(c, tokens) for c in (plain, own)},
            }
            click.echo(f"{name} {dtype}: {ratio(own, plain, tokens):.2f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
