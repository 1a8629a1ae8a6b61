"""Rewrites towards the compiled kernels: each linear layer takes in the norm before it and the
residual or gate behind it."""

from typing import Any

import torch
from torch import Tensor, fx

from specdec.forward import jit
from specdec.forward.fused import fused_linear, rms_norm
from specdec.forward.patterns import is_call

aten = torch.ops.aten
Node = fx.Node


def merge_around_linears(module: fx.GraphModule) -> None:
    """Replaces linear layers that the kernels take by fused_linear, with all that fits in."""
    graph = module.graph
    for node in list(graph.nodes):
        if not is_call(node, aten.linear.default):
            continue
        weight, bias = (_tensor(module, a) for a in (*node.args, None)[1:3])
        if weight is None or not jit.takes(weight) or (len(node.args) > 2 and bias is None):
            continue
        _merge(graph, node, weight)
    graph.eliminate_dead_code()
    graph.lint()


def _merge(graph: fx.Graph, linear: Node, weight: Tensor) -> None:
    source, norm, eps = _norm_before(graph, linear)
    bias = linear.args[2] if len(linear.args) > 2 else None
    end, gated, residual = linear, False, None
    if bias is None and (product := _gate_behind(linear, weight)) is not None:
        end, gated = product, True
    elif (sum_and_other := _residual_behind(linear)) is not None:
        end, residual = sum_and_other
    with graph.inserting_before(end):
        arguments = (source, linear.args[1], bias, norm, eps, gated, residual)
        fused = graph.call_function(fused_linear, arguments)
    fused.meta = dict(end.meta)
    end.replace_all_uses_with(fused)


def _tensor(module: fx.GraphModule, node: Any) -> Tensor | None:
    if isinstance(node, Node) and node.op == "get_attr":
        value = getattr(module, str(node.target))
        return value if isinstance(value, Tensor) else None
    return None


def _norm_before(graph: fx.Graph, linear: Node) -> tuple[Any, Node | None, float]:
    """(input, doubled norm weight, eps); a choice of rows in between moves before the norm."""
    x = linear.args[0]
    assert isinstance(x, Node)
    normed: Any = x
    if is_call(x, aten.index.Tensor):
        normed = x.args[0]
    if not is_call(normed, rms_norm) or len(normed.users) > 1 or len(x.users) > 1:
        return x, None, 0.0
    before, doubled, _, eps = normed.args
    if normed is not x:
        with graph.inserting_before(x):
            before = graph.call_function(aten.index.Tensor, (before, *x.args[1:]))
    return before, doubled, eps


def _gate_behind(linear: Node, weight: Tensor) -> Node | None:
    """The product silu(first half) * second half, when nothing else reads the linear layer."""
    outputs = weight.shape[0]
    halves = {u.args[2:]: u for u in linear.users if is_call(u, aten.slice.Tensor)}
    first, second = halves.get((0, outputs // 2)), halves.get((outputs // 2, outputs))
    if len(linear.users) != 2 or first is None or second is None or outputs % 32:
        return None
    if any(len(half.users) != 1 or half.args[1] != -1 for half in (first, second)):
        return None
    silu, product = next(iter(first.users)), next(iter(second.users))
    if not (is_call(silu, aten.silu.default) and is_call(product, aten.mul.Tensor)):
        return None
    return product if len(silu.users) == 1 and silu in product.args else None


def _residual_behind(linear: Node) -> tuple[Node, Node] | None:
    """(sum, the other summand), when nothing but the sum reads the linear layer."""
    if len(linear.users) != 1:
        return None
    total = next(iter(linear.users))
    if not is_call(total, aten.add.Tensor) or total.kwargs or len(total.args) != 2:
        return None
    other = total.args[1] if total.args[0] is linear else total.args[0]
    if other is linear or not isinstance(other, Node):
        return None
    mine, theirs, result = (n.meta.get("val") for n in (linear, other, total))
    if mine is None or theirs is None or result is None:
        return None
    same = mine.dtype == theirs.dtype == result.dtype and mine.shape == theirs.shape
    return (total, other) if same else None
