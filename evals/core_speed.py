"""Cost of the acceptance rules beside a target pass and a softmax over the same rows.

    python -m specdec.evals.core_speed --out evals/results/core_speed.json

64 rows of 151,936 tokens: 8 sequences with chains of 7 drafted tokens, then with trees of 7. The
pass is that of a random Llama of half a billion parameters in bfloat16 through specdec's own
runner. One thread, and its processor time: what other jobs do on a shared machine does not count.
Every round takes each job once, the figures are ratios of medians. Every Outcome must be valid;
that the answers are right is for tests/test_batched.py.
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
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.acceptance import batched
from specdec.acceptance.batched import Outcome, TreeBatch
from specdec.cache import CacheGroup
from specdec.evals.provenance import provenance
from specdec.rng import PhiloxNoise, StepNoise
from specdec.runner import ModelRunner, SequenceRows
from specdec.sampling import SamplingParams
from specdec.tree import Law, Proposal, TokenTree

SEQUENCES, NODES, VOCAB, CONTEXT = 8, 7, 151936, 32
ROWS = SEQUENCES * (NODES + 1)
SHAPE: dict[str, Any] = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": VOCAB,
    "max_position_embeddings": 512, "eos_token_id": None,
}  # fmt: skip
TREE_PARENTS = (-1, -1, 0, 0, 1, 1, 2)
CPU = torch.device("cpu")

# Job: what it is compared with, and the most it may cost of that.
BARS = {
    "greedy chain": ("pass", 0.05), "greedy tree": ("pass", 0.05),
    "walk chain": ("pass", 0.05), "walk tree": ("pass", 0.05),
    "gumbel chain": ("pass", 0.05), "gumbel tree": ("pass", 0.05),
    "token chain": ("pass", 0.05),
    "block chain": ("softmax", 3.0),
    "recursive tree": ("softmax", 3.0), "recursive chain": ("softmax", 3.0),
    "traversal tree": ("softmax", 3.0), "traversal chain": ("softmax", 3.0),
    "top-k 50": ("softmax", 4.0), "top-p 0.95": ("softmax", 4.0),
    "top-k 50, top-p 0.95": ("softmax", 4.0),
}  # fmt: skip


@dataclass
class Job:
    """Something that is timed."""

    name: str
    run: Callable[[], object]
    seconds: list[float] = field(default_factory=list)  # per round


def target_pass() -> Job:
    """One pass over the 64 rows behind a context of 32 tokens per sequence."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval().to(torch.bfloat16)
    runner = ModelRunner(model)
    group = CacheGroup(16, 2 * SEQUENCES * (CONTEXT + ROWS), CPU)
    runner.join(group)
    caches = [group.open(2 * CONTEXT) for _ in range(SEQUENCES)]
    for cache in caches:
        runner.score([SequenceRows(cache, list(range(CONTEXT)), keep=1)])
    nodes = torch.arange(NODES)
    parents = list(TREE_PARENTS)

    def run() -> Tensor:
        rows = [SequenceRows(cache, [5], nodes, parents, NODES + 1) for cache in caches]
        logits = runner.score(rows)
        for cache in caches:
            cache.computed[runner] = CONTEXT
        return logits

    assert run().shape == (ROWS, VOCAB)
    return Job("pass", run)


@dataclass
class Drafts:
    """Drafted sequences and all that a rule reads of them."""

    batch: TreeBatch
    p: Tensor  # (ROWS, VOCAB)
    q: Tensor  # (L, VOCAB)
    noise: StepNoise
    gumbel: Tensor  # (ROWS, VOCAB)

    @staticmethod
    def of(trees: list[TokenTree], logits: Tensor) -> "Drafts":
        batch = TreeBatch.of(trees)
        seeds, starts = list(range(SEQUENCES)), [CONTEXT] * SEQUENCES
        noise = PhiloxNoise().step(seeds, starts, NODES + 1, CPU, batch.copies)
        keys = [(b, d) for b, tree in enumerate(trees) for d in (0, *tree.depths)]
        gumbel = PhiloxNoise().gumbel([b for b, _ in keys], [d for _, d in keys], VOCAB, CPU)
        laws = [tree.laws for tree in trees if tree.laws is not None]
        return Drafts(batch, torch.softmax(logits, -1), torch.cat(laws), noise, gumbel)

    def jobs(self, kind: str, logits: Tensor) -> list[Job]:
        def checked(outcome: Outcome) -> Outcome:
            assert outcome.valid.all()
            return outcome

        def rule(name: str) -> Job:
            function = getattr(batched, name)
            return Job(
                f"{name} {kind}",
                lambda: checked(function(self.batch, self.p, self.q, self.noise)),
            )

        names = ["walk", "recursive", "traversal"] + ["token", "block"] * (kind == "chain")
        return [
            Job(
                f"greedy {kind}",
                lambda: checked(batched.greedy(self.batch, logits.argmax(-1), logits)),
            ),
            Job(f"gumbel {kind}", lambda: checked(batched.gumbel(self.batch, self.p, self.gumbel))),
            *(rule(name) for name in names),
        ]


def drafts(kind: str, logits: Tensor) -> Drafts:
    """Drafts whose laws are near the target's; in trees two draws without replacement per row."""
    generator = torch.Generator().manual_seed(1)
    trees = []
    for rows in logits.view(SEQUENCES, NODES + 1, VOCAB):
        noise = torch.randn((NODES, VOCAB), generator=generator) * 0.5
        if kind == "chain":
            laws = torch.softmax(rows[:-1] + noise, -1)
            tokens = torch.multinomial(laws, 1, generator=generator)[:, 0]
            trees.append(TokenTree.chain(tokens, laws))
            continue
        above = sorted(set(TREE_PARENTS))
        laws = torch.softmax(rows[[p + 1 for p in above]] + noise[: len(above)], -1)
        left = {p: torch.multinomial(laws[i], 2, generator=generator).tolist()
                for i, p in enumerate(above)}  # fmt: skip
        proposals = [
            Proposal(p, left[p].pop(0), Law("without_replacement", above.index(p)), node)
            for node, p in enumerate(TREE_PARENTS)
        ]
        trees.append(TokenTree.build([x.token for x in proposals], TREE_PARENTS, proposals, laws))
    return Drafts.of(trees, logits)


def law_jobs(logits: Tensor) -> list[Job]:
    """The laws themselves, from float32 logits."""
    found = []
    for name, params in {
        "top-k 50": SamplingParams(top_k=50),
        "top-p 0.95": SamplingParams(top_p=0.95),
        "top-k 50, top-p 0.95": SamplingParams(top_k=50, top_p=0.95),
    }.items():
        law = params.law()

        def run(law: Any = law) -> object:
            return law.probabilities(logits, list)

        found.append(Job(name, run))
    return found


def report(jobs: list[Job]) -> dict[str, Any]:
    medians = {job.name: median(job.seconds) for job in jobs}
    rows = {}
    for job in jobs:
        spread = quantiles(job.seconds, n=5)
        rows[job.name] = {
            "seconds_median": medians[job.name],
            "seconds_p20_p80": [spread[0], spread[3]],
            "of pass": medians[job.name] / medians["pass"],
            "of softmax": medians[job.name] / medians["softmax"],
        }
        if job.name in BARS:
            base, most = BARS[job.name]
            rows[job.name] |= {"bar": f"{most} of {base}"}
            rows[job.name] |= {"reached": medians[job.name] <= most * medians[base]}
    return rows


@click.command()
@click.option("--rounds", default=9, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(rounds: int, out: Path) -> None:
    """Cost of the acceptance rules beside a target pass and a softmax."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((ROWS, VOCAB), generator=generator) * 3
    chains, trees = drafts("chain", logits), drafts("tree", logits)
    noise, keys, buffer = PhiloxNoise(), list(range(ROWS)), torch.empty_like(logits)
    jobs = [
        target_pass(),
        Job("softmax", lambda: torch.softmax(logits, -1)),
        Job("softmax into a buffer", lambda: torch.softmax(logits, -1, out=buffer)),
        *chains.jobs("chain", logits),
        *trees.jobs("tree", logits),
        *law_jobs(logits),
        Job("gumbel noise of 64 rows", lambda: noise.gumbel(keys, keys, VOCAB, CPU)),
        Job("gumbel noise of 8 rows", lambda: noise.gumbel(keys[:8], keys[:8], VOCAB, CPU)),
    ]
    for job in jobs:
        job.run()
    for _ in tqdm(range(rounds)):
        for job in jobs:
            began = time.process_time()
            job.run()
            job.seconds.append(time.process_time() - began)
    result = {"provenance": provenance(), "rows": ROWS, "vocabulary": VOCAB, "rounds": rounds}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**result, "jobs": report(jobs)}, indent=1) + "\n")
    for name, row in report(jobs).items():
        bar = f"   bar {row['bar']}: {row['reached']}" if "bar" in row else ""
        click.echo(
            f"{name:26s} {1e3 * row['seconds_median']:9.2f} ms  {100 * row['of pass']:6.2f} % "
            f"of the pass  {row['of softmax']:6.2f} softmax{bar}"
        )


if __name__ == "__main__":
    main()
