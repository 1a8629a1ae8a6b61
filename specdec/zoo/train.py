"""Train the built-in pair from nothing: tokenizer, big, small, then small on big's own output.

    python -m specdec.zoo.train --work build/zoo

Seeded (the batch of a step is a function of the seed and the step) and resumable: each stage saves
its state as safetensors and goes on from there. Loss curves and the closing measurements are
appended to training_log.jsonl in the work folder; --install copies weights, tokenizer and log into
the package.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec.zoo import corpus, tokenizer as zoo_tokenizer

CONTEXT = 1024
PACKAGE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of one model of the pair."""

    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how fast one stage trains."""

    tokens: int  # in total
    batch: int = 8192  # tokens per optimiser step
    micro: int = 2048  # tokens per forward pass
    matrix_rate: float = 2e-3  # peak learning rate of Muon, matched to AdamW's update size
    vector_rate: float = 2e-3  # peak learning rate of AdamW: embedding and norms
    warmup: float = 0.04  # fraction of the steps
    # (fraction of the steps done, row length): short rows first, they are cheaper
    lengths: tuple[tuple[float, int], ...] = ((0.55, 256), (0.85, 512), (1.0, 1024))

    @property
    def steps(self) -> int:
        return self.tokens // self.batch

    def length(self, step: int) -> int:
        return next(n for fraction, n in self.lengths if step < fraction * self.steps)

    def rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero."""
        warm = max(1, int(self.warmup * self.steps))
        return min((step + 1) / warm, (self.steps - step) / (self.steps - warm))


SHAPES = {
    "big": Shape(layers=8, width=384, intermediate=896, heads=6, kv_heads=2),
    "small": Shape(layers=2, width=128, intermediate=352, heads=2, kv_heads=1),
}
LossFunction = Callable[[LlamaForCausalLM, torch.Tensor], torch.Tensor]


def build_model(shape: Shape, tok: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A model of this shape with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=zoo_tokenizer.VOCAB_SIZE,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    return LlamaForCausalLM(config)


def token_streams(tok: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray]:
    """All training tokens and all held-out tokens, each file framed by BOS and EOS."""
    streams: tuple[list[int], list[int]] = ([], [])
    for file in corpus.read_corpus():
        streams[file.held_out].extend([*tok(file.text)["input_ids"], tok.eos_token_id])
    train, held_out = (np.asarray(s, dtype=np.int64) for s in streams)
    return train, held_out


def batch_rows(stream: np.ndarray, seed: int, step: int, rows: int, length: int) -> torch.Tensor:
    """Rows of length + 1 tokens at random offsets: a function of (seed, step) alone."""
    offsets = np.random.default_rng((seed, step)).integers(len(stream) - length - 1, size=rows)
    return torch.from_numpy(np.stack([stream[o : o + length + 1] for o in offsets]))


def plain_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def distillation_loss(teacher: LlamaForCausalLM) -> LossFunction:
    """Forward KL to the teacher's soft targets: what acceptance, 1 - TV, is bounded by."""

    def loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=rows[:, :-1], use_cache=False).logits.float()
        got = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        wanted, got = wanted.log_softmax(-1).flatten(0, 1), got.log_softmax(-1).flatten(0, 1)
        return F.kl_div(got, wanted, reduction="batchmean", log_target=True)

    return loss


def make_optimisers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for everything else."""
    inner = {id(p) for p in model.model.layers.parameters() if p.ndim == 2}
    matrices = [p for p in model.parameters() if id(p) in inner]
    others = [p for p in model.parameters() if id(p) not in inner]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.matrix_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=recipe.vector_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Checkpoint:
    """One stage's state on disk: weights, optimiser moments and the step reached."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, step: int, model: nn.Module, optimisers: list[torch.optim.Optimizer]) -> None:
        state = {f"model.{k}": v for k, v in model.state_dict().items() if k != "lm_head.weight"}
        for index, optimiser in enumerate(optimisers):
            for param, moments in optimiser.state_dict()["state"].items():
                for key, value in moments.items():
                    state[f"optimiser.{index}.{param}.{key}"] = torch.as_tensor(value)
        partial = self.path.with_suffix(".partial")
        save_file({k: v.contiguous() for k, v in state.items()}, partial, {"step": str(step)})
        partial.replace(self.path)

    def load(self, model: nn.Module, optimisers: list[torch.optim.Optimizer]) -> int:
        """Restores what was saved and returns the step reached, 0 without a file."""
        if not self.path.exists():
            return 0
        tensors = load_file(self.path)
        weights = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
        model.load_state_dict(weights, strict=False)  # lm_head is tied to the embedding
        for index, optimiser in enumerate(optimisers):
            moments: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimiser.{index}."):
                    _, _, param, name = key.split(".")
                    moments.setdefault(int(param), {})[name] = value
            state = optimiser.state_dict()
            optimiser.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
        with self.path.open("rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        return int(header["__metadata__"]["step"])


class Trainer:
    """Runs the stages of one training job in one work folder."""

    def __init__(self, work: Path, seed: int, device: str, save_every: int) -> None:
        self.work, self.seed, self.device, self.save_every = work, seed, device, save_every
        work.mkdir(parents=True, exist_ok=True)
        self.tok = self._tokenizer()
        self.train_stream, self.held_out_stream = token_streams(self.tok)

    def log(self, **record: object) -> None:
        with (self.work / "training_log.jsonl").open("a") as handle:
            handle.write(json.dumps(record) + "\n")

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        folder = self.work / "tokenizer"
        if not folder.exists():
            texts = [f.text for f in corpus.read_corpus() if not f.held_out]
            zoo_tokenizer.train_tokenizer(texts, CONTEXT).save_pretrained(folder)
        tok: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
        return tok

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16)

    def run_stage(
        self, stage: str, model: LlamaForCausalLM, recipe: Recipe, loss_function: LossFunction
    ) -> None:
        """Trains model in place for the whole recipe, from the last checkpoint of this stage."""
        optimisers = make_optimisers(model, recipe)
        checkpoint = Checkpoint(self.work / f"{stage}.safetensors")
        start = checkpoint.load(model, optimisers)
        self.log(stage=stage, from_step=start, recipe=asdict(recipe), seed=self.seed)
        peaks = [group["lr"] for o in optimisers for group in o.param_groups]
        bar = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, desc=stage)
        for step in bar:
            began = time.perf_counter()
            for peak, group in zip(
                peaks, (g for o in optimisers for g in o.param_groups), strict=True
            ):
                group["lr"] = peak * recipe.rate(step)
            loss = self._step(model, recipe, step, loss_function)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            bar.set_postfix(loss=f"{loss:.3f}")
            last = step + 1 == recipe.steps
            if (step + 1) % self.save_every == 0 or last:
                held_out = self.held_out_loss(model, windows=4 if not last else 64)
                seconds = time.perf_counter() - began
                self.log(stage=stage, step=step + 1, tokens=(step + 1) * recipe.batch, loss=loss,
                         held_out_loss=held_out, step_seconds=round(seconds, 3))  # fmt: skip
                checkpoint.save(step + 1, model, optimisers)

    def _step(
        self, model: LlamaForCausalLM, recipe: Recipe, step: int, loss_function: LossFunction
    ) -> float:
        length = recipe.length(step)
        rows = batch_rows(self.train_stream, self.seed, step, recipe.batch // length, length)
        parts = rows.split(max(1, recipe.micro // length))
        total = torch.zeros((), device=self.device)
        for part in parts:
            with self.autocast():
                loss = loss_function(model, part.to(self.device)) / len(parts)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return float(total)

    @torch.no_grad()
    def held_out_loss(self, model: LlamaForCausalLM, windows: int) -> float:
        """Mean negative log-likelihood per held-out token, in nats, over evenly spread rows."""
        stream = self.held_out_stream
        offsets = np.linspace(0, len(stream) - 1026, windows).astype(int)
        losses = []
        for offset in offsets:
            row = torch.from_numpy(stream[offset : offset + 1025])[None].to(self.device)
            with self.autocast():
                losses.append(float(plain_loss(model, row)))
        return sum(losses) / len(losses)

    def save_model(self, name: str, model: LlamaForCausalLM) -> LlamaForCausalLM:
        """Writes the model in bf16 beside the tokenizer and returns what was written."""
        folder = self.work / name
        nn.Module.to(model, torch.bfloat16)
        model.save_pretrained(folder)
        self.tok.save_pretrained(folder)
        reloaded: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        nn.Module.to(reloaded, self.device)
        return reloaded


@torch.no_grad()
def measure_acceptance(
    trainer: Trainer, big: LlamaForCausalLM, small: LlamaForCausalLM, prompts: int
) -> Iterator[tuple[str, float]]:
    """Closing measurements of the pair on held-out files.

    greedy: share of positions of big's own greedy continuations where small's argmax agrees.
    sampled: mean of sum(min(p, q)) on big's own sampled continuations at temperature 1.
    """
    stream = trainer.held_out_stream
    offsets = np.linspace(0, len(stream) - 300, prompts).astype(int)
    rows = torch.from_numpy(np.stack([stream[o : o + 128] for o in offsets])).to(trainer.device)
    for name, do_sample in (("greedy", False), ("sampled", True)):
        torch.manual_seed(trainer.seed)
        whole: Any = big  # generate's annotations fit no concrete model class
        text = whole.generate(
            rows, attention_mask=torch.ones_like(rows), max_new_tokens=128, min_new_tokens=128,
            do_sample=do_sample, top_k=0,
        )  # fmt: skip
        p = big(input_ids=text).logits[:, 127:-1].float()
        q = small(input_ids=text).logits[:, 127:-1].float()
        if do_sample:
            value = torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1).mean()
        else:
            value = (p.argmax(-1) == q.argmax(-1)).float().mean()
        yield f"acceptance_{name}", round(float(value), 4)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default="build/zoo", show_default=True)
@click.option("--big-tokens", default=7_400_000, show_default=True)
@click.option("--small-tokens", default=9_000_000, show_default=True)
@click.option("--distil-tokens", default=9_000_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--save-every", default=50, show_default=True, help="Steps between checkpoints.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--install", is_flag=True, help="Copy the result into the package.")
def main(
    work: Path, big_tokens: int, small_tokens: int, distil_tokens: int, seed: int,
    save_every: int, device: str, install: bool,
) -> None:  # fmt: skip
    """Train the built-in pair on this Python's standard library."""
    trainer = Trainer(work, seed, device, save_every)
    big = build_model(SHAPES["big"], trainer.tok, seed)
    nn.Module.to(big, device)
    trainer.run_stage("big", big, Recipe(tokens=big_tokens), plain_loss)
    big = trainer.save_model("big", big).eval()
    small = build_model(SHAPES["small"], trainer.tok, seed + 1)
    nn.Module.to(small, device)
    trainer.run_stage("small", small, Recipe(tokens=small_tokens), plain_loss)
    trainer.run_stage("distil", small, Recipe(tokens=distil_tokens), distillation_loss(big))
    small = trainer.save_model("small", small).eval()
    result = {
        f"held_out_perplexity_{name}": round(math.exp(trainer.held_out_loss(model, 128)), 3)
        for name, model in (("big", big), ("small", small))
    }
    result |= dict(measure_acceptance(trainer, big, small, prompts=64))
    trainer.log(stage="result", **result)
    click.echo(json.dumps(result, indent=2))
    if install:
        for name in ("big", "small"):
            shutil.copytree(work / name, PACKAGE / name, dirs_exist_ok=True)
        shutil.copy(work / "training_log.jsonl", PACKAGE / "training_log.jsonl")


if __name__ == "__main__":
    main()
