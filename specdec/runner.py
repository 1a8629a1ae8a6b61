"""Runs one model on packed ragged rows over the paged cache; target and draft alike."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.attention import Recorder, Segment, Step
from specdec.backend import Window
from specdec.cache import CachedSequence, CacheGroup, Paged
from specdec.errors import InvalidArgumentError, UnsupportedModelError
from specdec.forward import CapturedForward, CaptureError, ModuleForward, PackedLinears
from specdec.selftest import prove


@dataclass(frozen=True, slots=True, eq=False)
class SequenceRows:
    """What one sequence contributes to a pass: new tokens in a chain, then the nodes of a tree."""

    cache: CachedSequence
    tokens: Sequence[int]  # committed tokens that the model has not computed yet; may be empty
    nodes: Tensor | None = None  # (N,) drafted tokens, on the device
    parents: Sequence[int] | None = None  # -1: the last of tokens; None: a chain
    keep: int = 0  # how many of the last rows need logits; 0: none


class Runner(Protocol):
    """One model on packed rows."""

    vocab_size: int  # width of the logits
    max_positions: int | None  # longest context; None: unbounded
    device: torch.device

    def join(self, group: CacheGroup) -> None:
        """Takes its place in a cache group; once, before any sequence is opened there."""

    def score(self, rows: Sequence[SequenceRows]) -> Tensor:
        """Computes the rows, fills their slots, returns float logits (sum of keep, V)."""


class ModelRunner:
    """A transformers causal LM. Its forward is proved against the model's own when it is made.

    exact=False allows a float32 copy of a small half-precision model on the CPU, where that is
    quicker: right for a draft, whose law is kept as it was sampled and owes nobody a dtype.
    """

    def __init__(self, model: PreTrainedModel, *, exact: bool = True) -> None:
        """Raises UnsupportedModelError for a class that cannot be run on packed rows."""
        check_supported(model)
        self._source, self._exact = model, exact
        self.model = model if exact else _quick_copy(model)
        self.device = model.device
        text = model.config.get_text_config()
        self.max_positions: int | None = getattr(text, "max_position_embeddings", None)
        self._prepared = _prepare(model, self.max_positions)
        self.vocab_size: int = self._prepared.vocab_size
        self._memory: Paged | None = None
        self._positions = torch.arange(self.max_positions or 65536, device=self.device)

    @property
    def forward_name(self) -> str:
        """`captured` or `module`."""
        return self._prepared.forward.name

    @property
    def forward_note(self) -> str:
        """Why the forward is not captured; empty where it is."""
        return self._prepared.note

    @property
    def slot_bytes(self) -> int:
        """Bytes of cache that one token costs in this model."""
        return sum(shape.slot_bytes for shape in self._prepared.shapes)

    def join(self, group: CacheGroup) -> None:
        self._memory = group.add_model(self, self._prepared.shapes)

    def refresh(self) -> None:
        """Packs the weights anew if they were changed since; cheap when they were not."""
        if not self._exact:
            self.model = _quick_copy(self._source)
        if self._prepared.versions != _versions(self.model):
            self._prepared = _prepare(self.model, self.max_positions)

    def release_weights(self) -> int:
        """Drops the originals that packed copies stand in for; returns the bytes freed.

        The model's own forward and state_dict() no longer work afterwards.
        """
        packed = self._prepared.packed
        freed = packed.release() if packed is not None else 0
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
        whole = len(kept) == begin and begin <= self._positions.shape[0]
        keep_rows = self._positions[:begin] if whole else torch.tensor(kept, device=self.device)
        step = Step(self._memory, segments, self._prepared.windows)
        logits = self._prepared.forward(
            (torch.cat(ids) if len(ids) > 1 else ids[0])[None],
            (torch.cat(positions) if len(positions) > 1 else positions[0])[None],
            keep_rows,
            step,
        )
        for row, segment in zip(rows, segments, strict=True):
            row.cache.computed[self] = segment.context + segment.rows
        return logits

    def _lay_out(self, row: SequenceRows) -> tuple[Segment, Tensor, Tensor]:
        context = row.cache.computed_len(self)
        chain = len(row.tokens)
        if row.nodes is None or row.nodes.shape[0] == 0:
            ids = torch.tensor(row.tokens, device=self.device)
            segment = Segment(chain, context, row.cache.table)
            return segment, ids, self._positions[context : context + chain]
        count = chain + row.nodes.shape[0]
        ids = row.nodes
        if chain:
            ids = torch.cat((torch.tensor(row.tokens, device=self.device), ids))
        if row.parents is None:
            segment = Segment(count, context, row.cache.table)
            return segment, ids, self._positions[context : context + count]
        mask, depths = _tree_mask(chain, tuple(row.parents), self.device)
        positions = self._positions[context + depths]
        return Segment(count, context, row.cache.table, mask, positions), ids, positions


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
    packed: PackedLinears | None
    versions: tuple[tuple[int, int], ...]


# A model is prepared and proved once, however often it is wrapped.
_PREPARED: "WeakKeyDictionary[PreTrainedModel, _Prepared]" = WeakKeyDictionary()


# Copies made by _quick_copy, each with the state of the original it was made from.
_COPIES: "WeakKeyDictionary[PreTrainedModel, tuple[tuple[tuple[int, int], ...], PreTrainedModel]]"
_COPIES = WeakKeyDictionary()
_QUICK_COPY_PARAMETERS = 1 << 23


def _quick_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A float32 copy of a small half-precision model on the CPU, else the model itself."""
    small = model.num_parameters() <= _QUICK_COPY_PARAMETERS
    if model.device.type != "cpu" or model.dtype == torch.float32 or not small:
        return model
    known = _COPIES.get(model)
    if known is None or known[0] != _versions(model):
        known = (_versions(model), copy.deepcopy(model).float())
        _COPIES[model] = known
    return known[1]


def _versions(model: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    return tuple((id(p), p._version) for p in model.parameters())


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
    forward, note, packed = _choose_forward(own, windows, max_positions)
    prove(model, forward, shapes, windows)
    prepared = _Prepared(forward, note, shapes, windows, vocab_size, packed, _versions(model))
    _PREPARED[model] = prepared
    return prepared


def _record(own: ModuleForward) -> tuple[Recorder, int]:
    recorder = Recorder()
    device = own.model.device
    ids = torch.ones(1, 3, dtype=torch.long, device=device)
    rows = torch.arange(3, device=device)
    logits = own(ids, rows[None], rows, recorder)
    if not recorder.shapes:
        raise UnsupportedModelError(
            f"{type(own.model).__name__} does not attend through transformers' attention "
            "interface, so specdec cannot run it on packed rows"
        )
    return recorder, logits.shape[-1]


def _choose_forward(
    own: ModuleForward, windows: dict[int, Window], max_positions: int | None
) -> tuple[ModuleForward | CapturedForward, str, PackedLinears | None]:
    """The quickest forward that this model and device allow, and why not a quicker one."""
    if own.model.device.type != "cpu":
        return own, "capture is for the CPU", None
    packed = PackedLinears(own.model)
    try:
        return CapturedForward(own, windows, max_positions), "", packed
    except CaptureError as error:
        return ModuleForward(own.model, packed), f"not captured: {error}", packed


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
