"""Joins transformers' attention interface to the paged cache.

During a specdec step, and only then, STEP holds what the attention layers of the running model
need: where each packed row's keys and values go and what it may see. Outside a step the registered
functions hand over to the implementation that the model had before.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specdec import backend
from specdec.backend import Window
from specdec.cache import BlockTable, LayerShape, Paged
from specdec.errors import UnsupportedModelError

PREFIX: Final = "specdec_over_"


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """The rows that one sequence contributes to a packed pass."""

    rows: int
    context: int  # slots filled before; row i goes to slot context + i
    table: BlockTable
    mask: Tensor | None = None  # (rows, rows) bool with self; None: every row sees those before it
    positions: Tensor | None = None  # (rows,) absolute; needed only with a mask and a window
    # What Triton reads instead: of the last rows, the nodes of a tree; -1: the row before them all.
    parents: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerCall:
    """The constants of one attention layer's call."""

    layer: int
    scale: float
    window: Window | None
    softcap: float | None


class Step:
    """One packed pass of one model: writes each layer's keys and values, and attends."""

    def __init__(
        self, memory: Paged, segments: Sequence[Segment], windows: Mapping[int, Window]
    ) -> None:
        self.memory, self.segments, self.windows = memory, segments, windows
        self._biases: dict[tuple[int, Window | None, int], Tensor | None] = {}
        self._flat: dict[int, Tensor] = {}
        self._derived: dict[object, list[Any]] = {}
        self.longest = max(segment.rows for segment in segments)
        self._packed = None
        if memory.on_triton:
            assert all(s.mask is None or s.parents for s in segments), "Triton reads parents"
            rows = [(s.rows, s.context, s.table.numbers, s.parents) for s in segments]
            self._packed = backend.packed_pass(rows, memory.page_size, memory.device)

    def derived(self, key: object, make: Callable[[Segment], Any]) -> list[Any]:
        """What make says of each segment; asked once per pass and key, shared by the layers."""
        found = self._derived.get(key)
        if found is None:
            found = self._derived[key] = [make(segment) for segment in self.segments]
        return found

    def window(self, size: int, sees: Callable[[int, int], bool]) -> Window:
        """The window of this size, as a Recorder learnt it."""
        del sees
        return self.windows[size]

    def attend(
        self, call: LayerCall, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> Tensor:
        """q (R, H, D), k (R, K, D), v (R, K, Dv) of all packed rows -> (R, H, Dv)."""
        if self._packed is not None:
            return self._packed.layer(
                q, k, v, self.memory.keys[call.layer], self.memory.values[call.layer],
                scale=call.scale, window=call.window, softcap=call.softcap, sinks=sinks,
            )  # fmt: skip
        if len(self.segments) == 1:  # spares the slices and the concatenation
            return self._attend_segment(0, call, q, k, v, sinks)
        outputs, begin = [], 0
        for index, segment in enumerate(self.segments):
            rows = slice(begin, begin + segment.rows)
            outputs.append(self._attend_segment(index, call, q[rows], k[rows], v[rows], sinks))
            begin += segment.rows
        return torch.cat(outputs)

    def _attend_segment(
        self, index: int, call: LayerCall, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> Tensor:
        segment = self.segments[index]
        keys, values = self.memory.flat_keys[call.layer], self.memory.flat_values[call.layer]
        end = segment.context + segment.rows
        if segment.table.contiguous:
            base = segment.table.base
            keys[base + segment.context : base + end] = k
            values[base + segment.context : base + end] = v
            seen_keys = backend.heads_first(keys, base, base + end)
            seen_values = backend.heads_first(values, base, base + end)
        else:
            flat = self._flat_slots(index, end)
            keys.index_copy_(0, flat[segment.context :], k.to(keys.dtype))
            values.index_copy_(0, flat[segment.context :], v.to(values.dtype))
            seen_keys = backend.heads_first(keys.index_select(0, flat), 0, end)
            seen_values = backend.heads_first(values.index_select(0, flat), 0, end)
        bias = self._bias(index, call.window, q.shape[1] // k.shape[1], q.dtype)
        return backend.attend(
            q, seen_keys, seen_values, bias, scale=call.scale, softcap=call.softcap, sinks=sinks
        )

    def _bias(
        self, index: int, window: Window | None, groups: int, dtype: torch.dtype
    ) -> Tensor | None:
        """The additive mask of one segment, made once per pass and shared by the layers."""
        if window is None and self.segments[index].rows == 1:
            return None
        key = (index, window, groups)
        if key not in self._biases:
            segment = self.segments[index]
            seen = backend.visibility(
                segment.context, segment.rows, segment.mask, segment.positions, window,
                self.memory.device,
            )  # fmt: skip
            self._biases[key] = backend.packed_bias(backend.additive(seen, dtype), groups)
        return self._biases[key]

    def _flat_slots(self, index: int, end: int) -> Tensor:
        """Flat numbers of the first `end` slots of a scattered sequence, made once per pass."""
        if index not in self._flat:
            table, device = self.segments[index].table, self.memory.device
            pages = torch.tensor(table.pages, device=device)
            slots = torch.arange(end, device=device)
            offsets = slots % table.page_size
            self._flat[index] = pages[slots // table.page_size] * table.page_size + offsets
        return self._flat[index]


@dataclass(slots=True)
class Recorder:
    """Stands in for a Step in a first pass of a model: causal attention over the rows themselves.

    It learns what the cache must hold, layer by layer, and which windows the model uses.
    """

    shapes: dict[int, LayerShape] = field(default_factory=dict)
    windows: set[Window] = field(default_factory=set)

    def window(self, size: int, sees: Callable[[int, int], bool]) -> Window:
        """The window of this size; sees(query, key) tells sliding and chunked ones apart."""
        # A sliding window lets position `size` see position 1; a chunk of that size does not.
        window = Window(size, chunked=size > 1 and not sees(size, 1))
        self.windows.add(window)  # some models make masks that no layer of theirs uses
        return window

    def attend(
        self, call: LayerCall, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> Tensor:
        self.shapes[call.layer] = LayerShape(k.shape[1], k.shape[2], v.shape[2], k.dtype)
        if call.window is not None:
            self.windows.add(call.window)
        rows, groups = q.shape[0], q.shape[1] // k.shape[1]
        seen = backend.visibility(0, rows, None, None, call.window, q.device)
        bias = backend.packed_bias(backend.additive(seen, q.dtype), groups)
        keys, values = backend.heads_first(k, 0, rows), backend.heads_first(v, 0, rows)
        return backend.attend(
            q, keys, values, bias, scale=call.scale, softcap=call.softcap, sinks=sinks
        )


STEP: ContextVar["Step | Recorder | None"] = ContextVar("specdec_step", default=None)

# The packed attention of one layer, opaque to tracing; forward/captured.py replaces it.
_LIBRARY = torch.library.Library("specdec", "FRAGMENT")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, int layer, float scale, int window, "
    "bool chunked, float softcap) -> Tensor"
)


def call_of(layer: int, scale: float, window: int, chunked: bool, softcap: float) -> LayerCall:
    """The operator's plain arguments as a LayerCall; 0 stands for absent."""
    return LayerCall(
        layer, scale, Window(window, chunked) if window else None, softcap if softcap else None
    )


@torch.library.impl(_LIBRARY, "attention", "CompositeExplicitAutograd")
def _attention_operator(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layer: int, scale: float,
    window: int, chunked: bool, softcap: float,
) -> Tensor:  # fmt: skip
    """q (1, H, R, D), k, v (1, K, R, D) as transformers hands them over -> (1, R, H, Dv)."""
    step = STEP.get()
    assert step is not None, "the attention operator runs inside a step only"
    call = call_of(layer, scale, window, chunked, softcap)
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
    return step.attend(call, q, k, v, sinks)[None]


@torch.library.register_fake("specdec::attention")  # type: ignore[untyped-decorator]
def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layer: int, scale: float,
    window: int, chunked: bool, softcap: float,
) -> Tensor:  # fmt: skip
    del k, sinks, layer, scale, window, chunked, softcap
    return q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])


@dataclass(frozen=True, slots=True)
class MaskNote:
    """What a model's mask creation asked for; it travels to the layers in the mask's place."""

    window: Window | None


def _mask_note(step: "Step | Recorder", kwargs: dict[str, Any]) -> MaskNote:
    size = kwargs.get("local_size")
    if size is None:
        return MaskNote(None)

    def sees(query: int, key: int) -> bool:
        zero = torch.tensor(0)
        return bool(kwargs["mask_function"](zero, zero, torch.tensor(query), torch.tensor(key)))

    return MaskNote(step.window(int(size), sees))


class _Registration:
    """The attention and mask functions registered over one original implementation."""

    def __init__(self, original: str) -> None:
        self.original = original

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        step = STEP.get()
        if step is None:
            return ALL_MASK_ATTENTION_FUNCTIONS[self.original](*args, **kwargs)
        return _mask_note(step, kwargs)

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if STEP.get() is None:
            function = _original_attention(self.original, module)
            extra = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
            given = {name: value for name, value in extra.items() if value is not None}
            return function(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
                **given, **kwargs,
            )  # fmt: skip
        window = _layer_window(module, attention_mask, sliding_window)
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise UnsupportedModelError(f"{type(module).__name__} does not know its layer_idx")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        size, chunked = (window.size, window.chunked) if window else (0, False)
        out = torch.ops.specdec.attention(
            query, key, value, s_aux, layer, scale, size, chunked, softcap or 0.0
        )
        return out, None


def _original_attention(name: str, module: nn.Module) -> Callable[..., Any]:
    function: Callable[..., Any]
    if name == "eager":  # every modeling file has its own
        function = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    else:
        function = ALL_ATTENTION_FUNCTIONS[name]
    return function


def _layer_window(module: nn.Module, mask: Any, sliding_window: int | None) -> Window | None:
    """The layer's window: from its mask where it has one, else from its attention keyword."""
    if isinstance(mask, MaskNote):
        if mask.window is not None or sliding_window is None:
            return mask.window
    elif mask is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} builds its own attention mask ({type(mask).__name__}), "
            "which a packed tree cannot honour"
        )
    return None if sliding_window is None else Window(int(sliding_window))


def implementation_over(original: str) -> str:
    """The name of specdec's attention implementation that falls back to original, registered."""
    name = PREFIX + original
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        registration = _Registration(original)
        AttentionInterface.register(name, registration.attention)
        AttentionMaskInterface.register(name, registration.mask)
    return name
