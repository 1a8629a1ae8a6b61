"""What the rewrites look for in a captured forward graph; a match gives None for anything else."""

from typing import Any

import torch
from torch import Tensor, fx

from specdec.forward.fused import rotary

aten = torch.ops.aten
Node = fx.Node


def is_call(node: Any, target: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target


def match_rms_norm(node: Node) -> tuple[Node, Node, float] | None:
    """(x, weight, eps) of weight * (x * rsqrt(mean(x ** 2) + eps)), with or without casts."""
    if not is_call(node, aten.mul.Tensor):
        return None
    for weight, normed in (node.args[:2], node.args[1::-1]):
        if not (isinstance(weight, Node) and weight.op == "get_attr"):
            continue
        scaled = _uncast(normed)
        if not is_call(scaled, aten.mul.Tensor):
            continue
        assert isinstance(scaled, Node)
        for x, inverse in (scaled.args[:2], scaled.args[1::-1]):
            eps = _inverse_rms(inverse, x)
            source = _uncast(x)
            if eps is not None and isinstance(source, Node):
                return source, weight, eps
    return None


def _uncast(node: Any) -> Any:
    return node.args[0] if is_call(node, aten.to.dtype) else node


def _inverse_rms(node: Any, x: Any) -> float | None:
    """eps when node is rsqrt(mean(x ** 2, -1) + eps)."""
    if not is_call(node, aten.rsqrt.default) or not is_call(node.args[0], aten.add.Tensor):
        return None
    mean, eps = node.args[0].args
    if not is_call(mean, aten.mean.dim) or mean.args[1:] != ([-1], True):
        return None
    square = mean.args[0]
    if not is_call(square, aten.pow.Tensor_Scalar) or square.args != (x, 2):
        return None
    return eps if isinstance(eps, float) else None


def match_rotary(node: Node) -> tuple[Node, Node, Node, int] | None:
    if not is_call(node, aten.add.Tensor) or node.kwargs:
        return None
    for straight, turned in (node.args[:2], node.args[1::-1]):
        if not (is_call(straight, aten.mul.Tensor) and is_call(turned, aten.mul.Tensor)):
            continue
        assert isinstance(straight, Node)
        assert isinstance(turned, Node)
        for rotated, sin in (turned.args[:2], turned.args[1::-1]):
            half = _rotate_half(rotated)
            if half is None:
                continue
            source, size = half
            for x, cos in (straight.args[:2], straight.args[1::-1]):
                if x is source and isinstance(cos, Node) and isinstance(sin, Node):
                    return source, cos, sin, size
    return None


def _rotate_half(node: Any) -> tuple[Node, int] | None:
    """(x, half size) when node is cat([-x[..., h:], x[..., :h]], -1)."""
    if (
        not is_call(node, aten.cat.default)
        or len(node.args[0]) != 2
        or node.args[1:] not in ((-1,), (3,))
    ):
        return None
    negated, low = node.args[0]
    if not (is_call(negated, aten.neg.default) and is_call(low, aten.slice.Tensor)):
        return None
    high = negated.args[0]
    if not is_call(high, aten.slice.Tensor) or high.args[0] is not low.args[0]:
        return None
    half = low.args[3]
    value = low.args[0].meta.get("val")
    ok = value is not None and value.shape[-1] == 2 * half
    last = (3, -1)
    ok = ok and low.args[1] in last and high.args[1] in last and low.args[2] == 0
    return (low.args[0], half) if ok and high.args[2] == half else None


def _heads_of(node: Any) -> tuple[Node, int, int, int] | None:
    """(merged projection, begin, end, head size) of transpose(view(slice(projection)))."""
    if not is_call(node, aten.transpose.int) or tuple(node.args[1:]) != (1, 2):
        return None
    view = node.args[0]
    if not is_call(view, aten.view.default) or len(view.args[1]) != 4:
        return None
    part = view.args[0]
    if not is_call(part, aten.slice.Tensor) or part.args[1] != -1:
        return None
    whole = part.args[0]
    if not is_call(whole, aten.linear.default) or not isinstance(view.args[1][3], int):
        return None
    return whole, part.args[2], part.args[3], view.args[1][3]


def match_qkv(node: Node) -> tuple[Node, Node, Node, int, int, int] | None:
    q, k, v, sinks = node.args[:4]
    if sinks is not None or not (is_call(q, rotary) and is_call(k, rotary)):
        return None
    assert isinstance(q, Node)
    assert isinstance(k, Node)
    if q.args[1:] != k.args[1:]:
        return None
    parts = [_heads_of(q.args[0]), _heads_of(k.args[0]), _heads_of(v)]
    if any(part is None for part in parts):
        return None
    (whole, b0, e0, size), (w1, b1, e1, s1), (w2, b2, e2, s2) = (p for p in parts if p)
    adjacent = b0 == 0 and b1 == e0 and b2 == e1 and e2 - b2 == e1 - b1
    cos, sin = q.args[1:]
    assert isinstance(cos, Node)
    assert isinstance(sin, Node)
    angles = all(
        isinstance(a.meta.get("val"), Tensor)
        and a.meta["val"].shape[-1] == size
        and a.meta["val"].ndim == 4
        and a.meta["val"].shape[:2] == (1, 1)
        for a in (cos, sin)
    )
    if not (adjacent and angles and w1 is whole and w2 is whole and size == s1 == s2):
        return None
    return whole, cos, sin, (e0 - b0) // size, (e1 - b1) // size, size
