"""Collective boost-tuning: several small drafts, each trained on what those before it missed
(SpecInfer, Miao et al. 2023, 2305.09781, section 3.2).

    python -m specdec.zoo.boost --work build/boost --out boost.json

The target continues prompts greedily. A span of its tokens is covered once some draft says all of
them, each behind the target's own text; the next draft starts from the same model and is tuned on
the spans that are left. Written are the drafts, draft-1, draft-2, .. (wrap(target, draft=[...])
takes them all), and the coverage curve on held-out prompts: the share of positions where at least
one of the first i drafts has the target's next token as its best one.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from specdec import zoo
from specdec.zoo import corpus
from specdec.zoo.train import Recipe, make_optimisers

PROMPT = 64  # tokens before each continuation
_BATCH = 32  # rows of one pass


def covered(hits: Tensor, span: int) -> Tensor:
    """(N, T) whether a draft has each token right -> (N, T) whether the whole span, of `span`
    tokens, that the token lies in was right; a last, shorter span counts like the others."""
    marked = torch.empty_like(hits)
    for first in range(0, hits.shape[1], span):
        part = slice(first, first + span)
        marked[:, part] = hits[:, part].all(1, keepdim=True)
    return marked


def coverage_curve(hits: Sequence[Tensor]) -> list[float]:
    """Per i the share of tokens that at least one of the first i drafts has right; (N, T) each."""
    some, curve = torch.zeros_like(hits[0]), []
    for more in hits:
        some = some | more
        curve.append(float(some.float().mean()))
    return curve


def right_tokens(draft: LlamaForCausalLM, texts: Tensor) -> Tensor:
    """(N, T) whether the draft's best token is the text's, behind PROMPT tokens of each text."""
    parts = []
    with torch.no_grad():
        for rows in texts.split(_BATCH):
            best = draft(input_ids=rows[:, :-1], use_cache=False).logits.argmax(-1)
            parts.append(best[:, PROMPT - 1 :] == rows[:, PROMPT:])
    return torch.cat(parts)


def loss_on(draft: LlamaForCausalLM, rows: Tensor, wanted: Tensor) -> Tensor:
    """Mean cross-entropy of the continuations' tokens where wanted (n, T) is true."""
    logits = draft(input_ids=rows[:, :-1], use_cache=False).logits[:, PROMPT - 1 :].float()
    each = F.cross_entropy(logits.flatten(0, 1), rows[:, PROMPT:].flatten(), reduction="none")
    weights = wanted.flatten().float()
    return (each * weights).sum() / weights.sum().clamp_min(1)


def tune(
    draft: LlamaForCausalLM, texts: Tensor, remaining: Tensor, steps: int, rate: float, seed: int
) -> list[float]:
    """Trains the draft in place on the tokens that remain (N, T); returns the losses."""
    rows = remaining.any(1).nonzero().squeeze(1)
    if not len(rows):
        return []
    optimisers = make_optimisers(draft, Recipe(tokens=0, matrix_rate=rate, vector_rate=rate))
    groups = [group for optimiser in optimisers for group in optimiser.param_groups]
    generator = torch.Generator().manual_seed(seed)
    losses = []
    draft.train()
    for step in tqdm(range(steps), desc="tuning"):
        chosen = rows[torch.randint(len(rows), (_BATCH // 2,), generator=generator)]
        for group in groups:
            group["lr"] = rate * (1 - step / steps)
        loss = loss_on(draft, texts[chosen], remaining[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    draft.eval()
    return losses


def boost(
    base: LlamaForCausalLM, texts: Tensor, held_out: Tensor, *, drafts: int, steps: int,
    rate: float, span: int, seed: int,
) -> tuple[list[LlamaForCausalLM], dict[str, Any]]:  # fmt: skip
    """The drafts, each tuned on the spans of `texts` that those before it left, and the figures.

    Texts are (N, PROMPT + T) tokens: prompts and the target's continuations. Ends early where
    nothing is left.
    """
    remaining = torch.ones_like(texts[:, PROMPT:], dtype=torch.bool)
    found: list[LlamaForCausalLM] = []
    hits, trained = [], []
    for i in range(drafts):
        if not remaining.any():
            break
        draft = copy.deepcopy(base)
        share = float(remaining.float().mean())
        losses = tune(draft, texts, remaining, steps, rate, seed + i)
        remaining &= ~covered(right_tokens(draft, texts), span)
        hits.append(right_tokens(draft, held_out))
        found.append(draft)
        trained.append(
            {
                "remaining_before": round(share, 4),
                "remaining_after": round(float(remaining.float().mean()), 4),
                "first_loss": round(losses[0], 4),
                "last_loss": round(losses[-1], 4),
                "alone": round(float(hits[-1].float().mean()), 4),
            }
        )
    return found, {
        "untuned": round(float(right_tokens(base, held_out).float().mean()), 4),
        "coverage": [round(value, 4) for value in coverage_curve(hits)],
        "drafts": trained,
    }


def continued(target: Any, streams: Tensor, new_tokens: int) -> Tensor:
    """(N, PROMPT) prompts -> (N, PROMPT + new_tokens), as the target goes on greedily, end
    tokens left out."""
    flags: dict[str, Any] = {
        "do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens,
    }  # fmt: skip
    bar = tqdm(streams.split(_BATCH), desc="the target's continuations")
    return torch.cat(
        [target.generate(rows, attention_mask=torch.ones_like(rows), **flags) for rows in bar]
    )


def prompts(tokenizer: Any, count: int, *, held_out: bool) -> Tensor:
    """(count, PROMPT) pieces of the corpus, from files spread evenly over their side of it."""
    files = [file for file in corpus.read_corpus() if file.held_out == held_out]
    files = files[:: max(1, len(files) // count)]
    pieces: list[list[int]] = []
    offset = 0
    while len(pieces) < count:
        before = len(pieces)
        for file in files:
            ids = tokenizer(file.text[2000 * offset : 2000 * (offset + 1)])["input_ids"]
            if len(ids) >= PROMPT and len(pieces) < count:
                pieces.append(ids[:PROMPT])
        if len(pieces) == before:
            raise click.ClickException(f"--prompts {count}: the corpus has {before} pieces")
        offset += 1
    return torch.tensor(pieces)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default="build/boost", show_default=True)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="Where the figures go as JSON.  [default: boost.json in the work folder]",
)
@click.option("--drafts", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=60,
    show_default=True,
    help="Optimiser steps of each draft.",
)
@click.option(
    "--prompts",
    "count",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="To train on; a quarter as many are held out.",
)
@click.option("--new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--span",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Tokens that a draft must have right to cover them.",
)
@click.option("--rate", type=click.FloatRange(0, min_open=True), default=3e-4, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    work: Path, out: Path | None, drafts: int, steps: int, count: int, new_tokens: int, span: int,
    rate: float, seed: int,
) -> None:  # fmt: skip
    """Tune copies of the built-in small model, one after the other, to cover big together."""
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("big"))
    target, base = (
        AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=torch.float32).eval()
        for name in ("big", "small")
    )
    texts, held_out = (
        continued(target, prompts(tokenizer, n, held_out=side), new_tokens)
        for n, side in ((count, False), (max(2, count // 4), True))
    )
    torch.manual_seed(seed)
    models, figures = boost(
        base, texts, held_out, drafts=drafts, steps=steps, rate=rate, span=span, seed=seed
    )
    work.mkdir(parents=True, exist_ok=True)
    for number, model in enumerate(models, 1):
        model.save_pretrained(work / f"draft-{number}")
        tokenizer.save_pretrained(work / f"draft-{number}")
    settings = {
        "steps": steps, "prompts": count, "new_tokens": new_tokens, "span": span, "rate": rate,
        "seed": seed,
    }  # fmt: skip
    text = json.dumps({"settings": settings, **figures}, indent=1) + "\n"
    (out or work / "boost.json").write_text(text, encoding="utf-8")
    click.echo(text, nl=False)


if __name__ == "__main__":
    main()
