"""Runs one model on packed ragged rows over the paged cache; target and draft alike."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec import backend
from specdec.attention import Recorder, Segment, Step
from specdec.backend import Choice, Window
from specdec.cache import CachedSequence, CacheGroup, Paged, kernels_for
from specdec.errors import InvalidArgumentError, UnsupportedModelError
from specdec.forward import (
    CapturedForward,
    CaptureError,
    ModuleForward,
    PackedLinears,
    release_packed,
)
from specdec.selftest import prove
from specdec.tree import tree_depths


@dataclass(frozen=True, slots=True, eq=False)
class SequenceRows:
    """What one sequence contributes to a pass: new tokens in a chain, then the nodes of a tree."""

    cache: CachedSequence
    tokens: Sequence[int]  # committed tokens that the model has not computed yet; may be empty
    nodes: Tensor | None = None  # (N,) drafted tokens, on the device
    parents: Sequence[int] | None = None  # -1: the last of tokens; None: a chain
    keep: int = 0  # how many of the last rows need logits; 0: none


class Runner(Protocol):
    """One model on packed rows; hashable, as the cache counts per runner."""

    def __hash__(self) -> int: ...

    vocab_size: int  # width of the logits
    max_positions: int | None  # longest context; None: unbounded
    device: torch.device

    def join(self, group: CacheGroup) -> None:
        """Takes its place in a cache group; once, before any sequence is opened there."""

    def score(self, rows: Sequence[SequenceRows]) -> Tensor:
        """Computes the rows, fills their slots, returns float logits (sum of keep, V)."""


class ModelRunner:
    """A transformers causal LM. Its forward is proved against the model's own when it is made."""

    def __init__(self, model: PreTrainedModel, window: int | None = None) -> None:
        """Raises UnsupportedModelError for a class that cannot be run on packed rows.

        window: as a draft it looks at so many positions back (and at the first few), so that its
        cache need not hold more. Raises InvalidArgumentError for a model whose layers have windows
        of their own: those count positions, of which the cache would miss some.
        """
        check_supported(model)
        self.window = window
        self.model = model
        self.device = model.device
        self.max_positions = _exact_context(model)
        self._prepared = _prepare(self.model, self.max_positions)
        if window is not None and self._prepared.windows:
            sizes = ", ".join(str(size) for size in sorted(self._prepared.windows))
            raise InvalidArgumentError(
                f"draft_window={window}: layers of {type(model).__name__} have windows of their "
                f"own ({sizes} positions); leave draft_window out"
            )
        self.vocab_size: int = self._prepared.vocab_size
        self._memory: Paged | None = None
        self._positions = torch.arange(self.max_positions or 65536, device=self.device)

    @property
    def forward_name(self) -> str:
        """`captured` or `module`."""
        return self._prepared.forward.name

    @property
    def uses_threads(self) -> bool:
        """Whether a pass of few rows has work for more threads than one."""
        return self._prepared.forward.uses_threads

    @property
    def forward_note(self) -> str:
        """Why the forward is not captured; empty where it is."""
        return self._prepared.note

    @property
    def kernels(self) -> Choice:
        """Which kernels attend and keep the cache, and why."""
        return kernels_for(self._prepared.shapes, self.device)

    @property
    def slot_bytes(self) -> int:
        """Bytes of cache that one token costs in this model."""
        return sum(shape.slot_bytes for shape in self._prepared.shapes)

    def join(self, group: CacheGroup) -> None:
        if self._memory is not None:  # block tables of one group say nothing in another
            raise InvalidArgumentError(
                "this runner belongs to an engine already: expected one of its own for each"
            )
        self._memory = group.add_model(self, self._prepared.shapes)

    def refresh(self) -> None:
        """Packs the weights anew if they were changed since; cheap when they were not."""
        if self._prepared.versions != _versions(self.model):
            self._prepared = _prepare(self.model, self.max_positions)

    def release_weights(self) -> int:
        """Drops the originals that packed copies stand in for; returns the bytes freed.

        The model's own forward and state_dict() no longer work afterwards.
        """
        if self.device.type != "cpu":
            raise InvalidArgumentError(
                "release_weights=True: weights are packed on the CPU only; leave it out"
            )
        freed = release_packed(self.model)
        self._prepared.versions = _versions(self.model)
        return freed

    def score(self, rows: Sequence[SequenceRows]) -> Tensor:
        assert self._memory is not None, "join a cache group first"
        ids, positions, segments, keep = [], [], [], []
        begin = 0
        for row in rows:
            segment, its_ids, its_positions = self._lay_out(row)
            segments.append(segment)
            ids.append(its_ids)
            positions.append(its_positions)
            begin += segment.rows
            keep.append(range(begin - row.keep, begin))
        kept = [index for span in keep for index in span]
        everything = len(kept) == begin and begin <= self._positions.shape[0]
        logits = self._prepared.forward(
            (torch.cat(ids) if len(ids) > 1 else ids[0])[None],
            (torch.cat(positions) if len(positions) > 1 else positions[0])[None],
            self._positions[:begin] if everything else self._ids(kept),
            Step(self._memory, segments, self._prepared.windows),
        )
        for row, segment in zip(rows, segments, strict=True):
            row.cache.computed[self] = row.cache.computed_len(self) + segment.rows
        # the CPU's bfloat16 argmax and softmax take four times as long
        return logits.float() if logits.device.type == "cpu" else logits

    def _ids(self, numbers: Sequence[int]) -> Tensor:
        if self.device.type == "cuda":  # without a wait for what the device still does
            [ids] = backend.upload([(array("q", numbers).tobytes(), torch.long)], self.device)
            return ids
        return torch.tensor(numbers, dtype=torch.long, device=self.device)

    def _lay_out(self, row: SequenceRows) -> tuple[Segment, Tensor, Tensor]:
        first = row.cache.computed_len(self)
        context = first - row.cache.dropped
        chain = len(row.tokens)
        if row.nodes is None or row.nodes.shape[0] == 0:
            ids = self._ids(row.tokens)
            segment = Segment(chain, context, row.cache.table)
            return segment, ids, self._positions[first : first + chain]
        count = chain + row.nodes.shape[0]
        ids = row.nodes
        if chain:
            ids = torch.cat((self._ids(row.tokens), ids))
        if row.parents is None:
            segment = Segment(count, context, row.cache.table)
            return segment, ids, self._positions[first : first + count]
        if self._memory is not None and self._memory.on_triton:
            parents = tuple(row.parents)
            segment = Segment(count, context, row.cache.table, parents=parents)
            behind = first + chain - 1
            nodes = _depths(parents, self.device) + behind
            return segment, ids, torch.cat((self._positions[first : first + chain], nodes))
        mask, depths = _tree_mask(chain, tuple(row.parents), self.device)
        positions = self._positions[first + depths]
        return Segment(count, context, row.cache.table, mask, positions), ids, positions


@lru_cache(maxsize=256)
def _depths(parents: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(tree_depths(parents), device=device)


def _tree_mask(chain: int, parents: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Visibility among chain rows and then tree nodes, and each row's offset in position."""
    count = chain + len(parents)
    seen = [[False] * count for _ in range(count)]
    offsets = list(range(chain))
    for row in range(count):
        if row < chain:
            seen[row][: row + 1] = [True] * (row + 1)
            continue
        parent = parents[row - chain]
        above = chain - 1 if parent < 0 else chain + parent
        if above >= 0:
            seen[row] = list(seen[above])
        seen[row][row] = True
        offsets.append((offsets[above] if above >= 0 else -1) + 1)
    return torch.tensor(seen, device=device), torch.tensor(offsets, device=device)


@dataclass(slots=True)
class _Prepared:
    """What is made once per model and shared by all its runners."""

    forward: ModuleForward | CapturedForward
    note: str
    shapes: list[Any]
    windows: dict[int, Window]
    vocab_size: int
    versions: "_Versions"


# A model is prepared and proved once, however often it is wrapped.
_PREPARED: "WeakKeyDictionary[PreTrainedModel, _Prepared]" = WeakKeyDictionary()


_Versions = tuple[tuple[int, int, int], ...]


def _versions(model: PreTrainedModel) -> _Versions:
    """Changes with every weight that is written in place, replaced or given other data."""
    return tuple((id(p), p._version, p.data_ptr()) for p in model.parameters())


def _exact_context(model: PreTrainedModel) -> int | None:
    """The longest context in which a row's logits do not depend on how rows share a pass."""
    text = model.config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None)]
    ropes = getattr(text, "rope_parameters", None) or {}
    # longrope: beyond this length the whole pass changes its frequencies with its longest row
    limits += [
        rope.get("original_max_position_embeddings")
        for rope in (ropes, *ropes.values())
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope"
    ]
    # Llama 4 counts the rows of a pass, not positions, from here on (attention temperature)
    if getattr(text, "attn_temperature_tuning", False) and hasattr(text, "floor_scale"):
        limits.append(int(text.floor_scale) - 1)
    return min((limit for limit in limits if limit is not None), default=None)


def _prepare(model: PreTrainedModel, max_positions: int | None) -> _Prepared:
    known = _PREPARED.get(model)
    if known is not None and known.versions == _versions(model):
        return known
    if model.training:
        model.eval()
    own = ModuleForward(model)
    recorder, vocab_size = _record(own)
    shapes = [recorder.shapes[layer] for layer in sorted(recorder.shapes)]
    if sorted(recorder.shapes) != list(range(len(shapes))):
        raise UnsupportedModelError(
            f"{type(model).__name__}: layers {sorted(recorder.shapes)} attend through the "
            "interface; specdec needs every layer from 0 on to do so"
        )
    windows = {window.size: window for window in recorder.windows}
    if len(windows) < len(recorder.windows):
        raise UnsupportedModelError(
            f"{type(model).__name__} has a sliding and a chunked window of the same size"
        )
    forward, note = _choose_forward(own, windows, max_positions)
    try:
        prove(model, forward, shapes, windows)
    except (RuntimeError, UnsupportedModelError) as error:
        if isinstance(forward, ModuleForward):
            raise
        forward = ModuleForward(model, PackedLinears(model))
        note = f"not captured: its replay failed the proof: {error}"
        prove(model, forward, shapes, windows)
    prepared = _Prepared(forward, note, shapes, windows, vocab_size, _versions(model))
    _PREPARED[model] = prepared
    return prepared


def _record(own: ModuleForward) -> tuple[Recorder, int]:
    recorder = Recorder()
    device = own.model.device
    ids = torch.ones(1, 3, dtype=torch.long, device=device)
    rows = torch.arange(3, device=device)
    try:
        logits = own(ids, rows[None], rows, recorder)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # its own code computes with the mask that a packed pass does not have
        reason = f"its forward raised {type(error).__name__}: {error}"
        if not getattr(own.model, "_supports_attention_backend", True):
            reason = "it does not attend through transformers' attention interface"
        raise UnsupportedModelError(
            f"{type(own.model).__name__} cannot run on packed rows: {reason}"
        ) from error
    if not recorder.shapes:
        raise UnsupportedModelError(
            f"{type(own.model).__name__} does not attend through transformers' attention "
            "interface, so specdec cannot run it on packed rows"
        )
    return recorder, logits.shape[-1]


def _choose_forward(
    own: ModuleForward, windows: dict[int, Window], max_positions: int | None
) -> tuple[ModuleForward | CapturedForward, str]:
    """The quickest forward that this model and device allow, and why not a quicker one."""
    if own.model.device.type != "cpu":
        return own, "capture is for the CPU"
    try:
        return CapturedForward(own, windows, max_positions), ""
    except CaptureError as error:
        return ModuleForward(own.model, PackedLinears(own.model)), f"not captured: {error}"


def check_supported(model: Any) -> None:
    """Refuses by name what specdec cannot run, with the reason."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise InvalidArgumentError(
            f"expected a transformers PreTrainedModel, got {type(model).__module__}.{name}"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; specdec needs a causal LM")
    if not model.can_generate():
        raise UnsupportedModelError(f"{name} has no language-model head to generate with")
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    recurrent = sorted(k for k in kinds if "attention" not in k or "linear" in k)
    if getattr(model, "_is_stateful", False) or recurrent:
        what = f" ({', '.join(recurrent)} layers)" if recurrent else ""
        raise UnsupportedModelError(
            f"{name} keeps a recurrent state{what}, which cannot be taken back when drafted "
            "tokens are rejected; specdec supports attention layers only"
        )
