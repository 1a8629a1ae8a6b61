"""The traffic model of tree attention against the loads and stores met in the interpreter."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from specdec.kernels import attention, traffic
from specdec.kernels.reference import pack_bits
from specdec.kernels.traffic import Shape

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")


def call(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """Arguments of the shape: chains over pages in order."""
    rows, width = shape.rows, shape.table_width
    batch = len(shape.sizes)
    pages = (batch * width, shape.page, shape.kv_heads)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(shape.dtype)

    masks = [torch.ones(n, n, dtype=torch.bool).tril() for _, n in shape.sizes]
    words = [pack_bits(mask) for mask in masks]
    padded = [torch.nn.functional.pad(w, (0, shape.words - w.shape[1])) for w in words]
    return {
        "q": normal(rows, shape.heads, shape.key_size),
        "k_pages": normal(*pages, shape.key_size),
        "v_pages": normal(*pages, shape.value_size),
        "block_table": torch.arange(batch * width, dtype=torch.int32).view(batch, width),
        "context_lens": torch.tensor([context for context, _ in shape.sizes]),
        "cu_nodes": torch.tensor([0, *(n for _, n in shape.sizes)]).cumsum(0),
        "bits": torch.cat(padded),
    }


def counted(
    shape: Shape, arguments: dict[str, Tensor], patch: pytest.MonkeyPatch
) -> Counter[str]:  # fmt: skip
    """Bytes that each argument's loads and stores request, by address."""
    builder = type(interpreter.interpreter_builder)
    load, store = builder.create_masked_load, builder.create_masked_store
    met: list[tuple[int, int]] = []

    def note(pointers: Any, mask: Any) -> None:
        width = pointers.dtype.element_ty.primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
        met.extend((int(address), width) for address in addresses.flat)

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        note(pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    patch.setattr(builder, "create_masked_load", counted_load)
    patch.setattr(builder, "create_masked_store", counted_store)
    executor = interpreter.GridExecutor
    to_host, ranges = executor._init_args_hst, list[tuple[int, int, str]]()

    def copied(self: Any, arguments: Any, named: Any) -> Any:
        """The interpreter works on copies; what stood where is known while they live."""
        hosts, rest = to_host(self, arguments, named)
        kept.append(hosts)
        for name, tensor in zip(self.arg_names, hosts, strict=False):
            if isinstance(tensor, Tensor):
                begin = tensor.data_ptr()
                ranges.append((begin, begin + tensor.numel() * tensor.element_size(), name))
        return hosts, rest

    kept: list[Any] = []
    patch.setattr(executor, "_init_args_hst", copied)
    out = torch.empty(shape.rows, shape.heads, shape.value_size, dtype=shape.dtype)
    named: dict[str, Any] = {
        "ancestor_bits" if name == "bits" else name: tensor for name, tensor in arguments.items()
    }
    attention.tree_attention(**named, scale=0.3, out=out, split=shape.split)
    found: Counter[str] = Counter()
    for address, width in met:
        [name] = {name for begin, end, name in ranges if begin <= address < end}
        found[name] += width
    return found


@pytest.mark.parametrize(
    "shape",
    [
        Shape(((40, 3),), 2, 1, 16, 16, 16, torch.float16),
        Shape(((0, 1), (70, 5), (9, 0)), 4, 2, 16, 7, 16, torch.float32, split=64),
        Shape(((70, 66),), 1, 1, 8, 16, 64, torch.float16, split=64),
        Shape(((100, 2),), 2, 2, 16, 16, 1, torch.float32, split=64),
    ],
    ids=["one split", "ragged", "two tiles, large pages", "pages of one"],
)
def test_formula_is_what_the_kernels_request(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = call(shape, torch.Generator().manual_seed(0))
    found = counted(shape, arguments, monkeypatch)
    assert +found == +traffic.does_move(shape)


def test_what_must_move_is_every_argument_once() -> None:
    shape = Shape(((40, 3), (64, 64)), 2, 1, 16, 8, 16, torch.float16)
    arguments = call(shape, torch.Generator().manual_seed(0))
    must = traffic.must_move(shape)
    for name in ("q", "context_lens", "cu_nodes", "bits"):
        assert must[name] == arguments[name].numel() * arguments[name].element_size()
    assert must["k_pages"] == (43 + 128) * 16 * 2
    assert must["v_pages"] == (43 + 128) * 8 * 2
    assert must["block_table"] == (3 + 8) * 4
    assert must["out"] == 67 * 2 * 8 * 2


def test_waste_at_the_benchmarks_shapes_is_bounded() -> None:
    """Up to 16 rows a page is asked for once, and partial sums stay below an eighth of the pages at
    32k slots; more rows ask for pages again, once per tile."""
    for line in traffic.table(batches=(1, 8), contexts=(32768,)):
        pages = line["requested_by"]["k_pages"] + line["requested_by"]["v_pages"]
        group, kv_heads = (4, 8) if line["model"].startswith("Llama-3-8B") else (8, 1)
        slots = (32768 + line["rows"]) * line["batch"]
        tiles = -(-line["rows"] * group // line["tile_rows"])
        once = slots * kv_heads * 2 * 128 * 2
        assert pages == once * tiles
        if kv_heads == 8 and line["rows"] <= 16:
            assert line["memory"] - line["must"] < pages / 8
