"""Proof that a model runs exactly on packed rows: compared with its own forward, once per model.

A packed pass over a ragged pair of prompts and then over random trees on top of them must give, at
every row, the logits of the model's own forward on that row's path alone.
"""

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.attention import Recorder, Segment, Step
from specdec.backend import Window
from specdec.cache import BlockTable, LayerShape, Paged
from specdec.errors import NumericalError, UnsupportedModelError
from specdec.forward import ModuleForward

# Largest root mean square of a row's error, relative to that of its logits. Not the largest error:
# over tens of thousands of tokens rounding alone puts that at four times its root mean square.
TOLERANCE = {torch.float64: 5e-7, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_PAGE = 4
_SHORT_WINDOW = 8


class _Forward(Protocol):
    def __call__(
        self, input_ids: Tensor, positions: Tensor, keep: Tensor, step: Step | Recorder
    ) -> Tensor: ...


def prove(
    model: PreTrainedModel,
    forward: _Forward,
    shapes: Sequence[LayerShape],
    windows: Mapping[int, Window],
) -> None:
    """Raises UnsupportedModelError unless forward equals the model's own on packed trees.

    Where the model's window is longer than a quick test, a small copy of the model with a short
    window is proved as well.
    """
    _compare(model, forward, shapes, windows, lengths=(11, 6))
    long_windows = [size for size in windows if size > _SHORT_WINDOW]
    if long_windows:
        small = _with_short_window(model)
        own = ModuleForward(small)
        recorder = Recorder()
        rows = torch.arange(3, device=small.device)
        own(torch.ones_like(rows)[None], rows[None], rows, recorder)
        small_shapes = [recorder.shapes[layer] for layer in sorted(recorder.shapes)]
        found = {window.size: window for window in recorder.windows}
        if not any(size <= _SHORT_WINDOW for size in found):
            raise UnsupportedModelError(
                f"{type(model).__name__}: its window of {max(long_windows)} positions cannot be "
                "shortened for the proof, so specdec cannot vouch for it"
            )
        _compare(small, own, small_shapes, found, lengths=(27, 13))


def _with_short_window(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class with a short window, few layers and random weights."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    for name in ("sliding_window", "attention_chunk_size", "window_size"):
        if getattr(text, name, None):
            setattr(text, name, _SHORT_WINDOW)
    kinds = getattr(text, "layer_types", None)
    if kinds:
        count = max(kinds.index(kind) for kind in set(kinds)) + 1
        text.layer_types = kinds[:count]
        text.num_hidden_layers = count
    else:
        text.num_hidden_layers = min(text.num_hidden_layers, 2)
    if getattr(text, "max_window_layers", None) is not None:
        text.max_window_layers = min(text.max_window_layers, text.num_hidden_layers)
    # A generator of its own would not reach the model's initialisers: put the global one back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = type(model)(config)
    nn.Module.to(small, device=model.device, dtype=torch.float32)
    small.eval()
    return small


def _compare(
    model: PreTrainedModel,
    forward: _Forward,
    shapes: Sequence[LayerShape],
    windows: Mapping[int, Window],
    lengths: tuple[int, int],
) -> None:
    draw = random.Random(0)
    vocab = model.config.get_text_config().vocab_size
    prompts = [[draw.randrange(1, vocab) for _ in range(n)] for n in lengths]
    trees = [_random_tree(draw, n, vocab) for n in (9, 5)]
    pages = sum(-(-(len(p) + 16) // _PAGE) for p in prompts) + 1
    memory = Paged(shapes, pages, _PAGE, model.device)
    tables = _interleaved_tables([len(p) + 16 for p in prompts])
    prefill = [Segment(len(p) - 2, 0, t) for p, t in zip(prompts, tables, strict=True)]
    _run(model, forward, memory, windows, prefill, [p[:-2] for p in prompts])
    for prompt, table in zip(prompts, tables, strict=True):  # one row takes ways of its own
        alone = Segment(1, len(prompt) - 2, table)
        _run(model, forward, memory, windows, [alone], [prompt[-2:-1]])
    segments: list[Segment] = []
    ids: list[list[int]] = []
    paths: list[list[int]] = []
    for prompt, table, (tokens, parents) in zip(prompts, tables, trees, strict=True):
        rows = [prompt[-1], *tokens]
        up = [-1, *(p + 1 for p in parents)]
        lines = _lines(up)
        mask = torch.zeros(len(rows), len(rows), dtype=torch.bool)
        for row, line in enumerate(lines):
            mask[row, line] = True
        context = len(prompt) - 1
        positions = torch.tensor([context + len(line) - 1 for line in lines])
        segments.append(
            Segment(
                len(rows),
                context,
                table,
                mask.to(model.device),
                positions.to(model.device),
                tuple(parents),
            )
        )
        ids.append(rows)
        paths.extend([*prompt[:-1], *(rows[i] for i in line)] for line in lines)
    packed = _run(model, forward, memory, windows, segments, ids)
    wanted = torch.stack([_own_logits(model, path) for path in paths])
    if not torch.isfinite(wanted).all():
        raise NumericalError(
            f"{type(model).__name__}: its own logits hold NaN or infinity on a short prompt, "
            "before any step; check the weights and the dtype"
        )
    error = (packed.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    limit = TOLERANCE.get(model.dtype, 1e-2)
    worst = float(error.max())
    if not worst <= limit:
        layer = _first_bad_layer(model, forward, memory, windows, segments, ids, paths, limit)
        raise UnsupportedModelError(
            f"{type(model).__name__} on packed tree rows differs from its own forward by "
            f"{worst:.3g} of the logits' size (allowed: {limit:g}); first bad layer: {layer}"
        )


def _random_tree(draw: random.Random, nodes: int, vocab: int) -> tuple[list[int], list[int]]:
    parents = [draw.randrange(-1, n) for n in range(nodes)]
    return [draw.randrange(1, vocab) for _ in range(nodes)], parents


def _lines(parents: Sequence[int]) -> list[list[int]]:
    """For each row the rows on its path, itself last; parents[0] is -1, the root."""
    lines: list[list[int]] = []
    for row, parent in enumerate(parents):
        lines.append([*(lines[parent] if row else []), row])
    return lines


def _interleaved_tables(slots: Sequence[int]) -> list[BlockTable]:
    """One contiguous block table and one whose pages lie apart."""
    first, second = BlockTable(_PAGE), BlockTable(_PAGE)
    count = -(-slots[0] // _PAGE)
    first.extend(range(count))
    second.extend(list(range(count, count + -(-slots[1] // _PAGE)))[::-1])
    return [first, second]


def _run(
    model: PreTrainedModel,
    forward: _Forward,
    memory: Paged,
    windows: Mapping[int, Window],
    segments: Sequence[Segment],
    ids: Sequence[Sequence[int]],
) -> Tensor:
    device = model.device
    positions = [
        s.positions
        if s.positions is not None
        else torch.arange(s.context, s.context + s.rows, device=device)
        for s in segments
    ]
    flat = torch.tensor([token for row in ids for token in row], device=device)
    keep = torch.arange(len(flat), device=device)
    return forward(flat[None], torch.cat(positions)[None], keep, Step(memory, segments, windows))


@torch.no_grad()
def _own_logits(model: PreTrainedModel, path: Sequence[int]) -> Tensor:
    ids = torch.tensor([path], device=model.device)
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    logits: Tensor = out.logits[0, -1].float()
    return logits


def _first_bad_layer(
    model: PreTrainedModel,
    forward: _Forward,
    memory: Paged,
    windows: Mapping[int, Window],
    segments: Sequence[Segment],
    ids: Sequence[Sequence[int]],
    paths: Sequence[Sequence[int]],
    limit: float,
) -> str:
    """The first attention layer whose output differs at some row; by hooks on the modules."""
    del forward  # a replayed graph has no modules to hook: the module forward is asked instead
    seen: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if getattr(module, "layer_idx", None) is not None and "attn" in name.split(".")[-1]:

            def keep(_module: object, _args: object, out: object, name: str = name) -> None:
                first = out[0] if isinstance(out, tuple) else out
                assert isinstance(first, Tensor)
                seen[name] = first.detach().float()

            hooks.append(module.register_forward_hook(keep))
    try:
        _run(model, ModuleForward(model), memory, windows, segments, ids)
        packed = {name: value[0] for name, value in seen.items()}
        for name in packed:
            for row, path in enumerate(paths):
                _own_logits(model, path)
                wanted = seen[name][0, -1]
                error = (packed[name][row] - wanted).norm() / wanted.norm()
                if not float(error) <= limit:
                    return name
    finally:
        for hook in hooks:
            hook.remove()
    return "none of the attention layers: the difference arises outside them"
