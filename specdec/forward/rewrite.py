"""Rewrites of a captured forward graph: the same function in fewer, larger operations.

Every rewrite is a pattern over aten operators and leaves alone what it does not recognise; the
runner compares the rewritten forward with the model's own before it is used.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from specdec.forward.fused import qkv_attention, rms_norm, rotary
from specdec.forward.patterns import is_call, match_qkv, match_rms_norm, match_rotary

aten = torch.ops.aten
Node = fx.Node

_IDENTITIES = {
    aten.contiguous.default, aten.detach.default, aten.alias.default, aten.dropout.default,
    aten.lift_fresh_copy.default,
}  # fmt: skip
_NO_EFFECT = ("_set_grad_enabled", "_assert", "_enter_autocast", "_exit_autocast")


class Rewriter:
    """One captured graph and the constants it refers to."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph

    def constant(self, node: Any) -> Tensor | None:
        """The tensor behind a get_attr node."""
        if isinstance(node, Node) and node.op == "get_attr":
            value = getattr(self.module, str(node.target))
            return value if isinstance(value, Tensor) else None
        return None

    def add_constant(self, value: Tensor, before: Node) -> Node:
        name = f"_rewritten{sum(1 for n in self.graph.nodes if n.op == 'get_attr')}"
        while hasattr(self.module, name):
            name += "_"
        self.module.register_buffer(name, value, persistent=False)
        with self.graph.inserting_before(before):
            return self.graph.get_attr(name)

    def call(self, before: Node, target: Callable[..., Any], *args: Any) -> Node:
        with self.graph.inserting_before(before):
            return self.graph.call_function(target, args)

    def run(self) -> None:
        """All rewrites, in the order in which they enable each other."""
        self.drop_no_ops()
        self.share_equal_nodes()
        self.merge_linears()
        self.fuse_rms_norms()
        self.fuse_rotary()
        self.share_equal_nodes()
        self.fuse_qkv_attention()
        self.share_equal_nodes()
        self.graph.eliminate_dead_code()
        self.graph.lint()

    def is_pure(self) -> bool:
        """Whether no operator writes into its arguments; the rewrites assume it."""
        for node in self.graph.nodes:
            schema = getattr(node.target, "_schema", None)
            if node.op == "call_function" and schema is not None and schema.is_mutable:
                return False
        return True

    def drop_no_ops(self) -> None:
        for node in list(self.graph.nodes):
            if node.op != "call_function":
                continue
            if any(mark in str(node.target) for mark in _NO_EFFECT) and not node.users:
                self.graph.erase_node(node)
            elif node.target in _IDENTITIES or self._is_same_dtype(node):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)

    @staticmethod
    def _is_same_dtype(node: Node) -> bool:
        if node.target not in (aten.to.dtype, aten.to.device, aten._to_copy.default):
            return False
        source = node.args[0]
        assert isinstance(source, Node)
        before, after = source.meta.get("val"), node.meta.get("val")
        if source.op == "get_attr" or not isinstance(before, Tensor):
            return False
        assert isinstance(after, Tensor)
        return bool(before.dtype == after.dtype and before.device == after.device)

    def share_equal_nodes(self) -> None:
        """Common subexpression elimination; get_attr nodes are equal when their tensors are."""
        seen: dict[Any, Node] = {}
        for node in list(self.graph.nodes):
            if node.op == "get_attr":
                value = getattr(self.module, str(node.target))
                key: Any = ("constant", id(value))
            elif node.op == "call_function" and "attention" not in str(node.target):
                key = (node.target, _frozen(node.args), _frozen(node.kwargs))
            else:
                continue
            if key in seen:
                node.replace_all_uses_with(seen[key])
                self.graph.erase_node(node)
            else:
                seen[key] = node

    def merge_linears(self) -> None:
        """Linear layers that read the same input become one, cut apart behind it."""
        groups: dict[tuple[Node, bool], list[Node]] = {}
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target is aten.linear.default:
                weight = self.constant(node.args[1])
                has_bias = len(node.args) > 2 and node.args[2] is not None
                if weight is not None and isinstance(node.args[0], Node):
                    groups.setdefault((node.args[0], has_bias), []).append(node)
        for (source, has_bias), nodes in groups.items():
            if len(nodes) > 1:
                self._merge(source, nodes, has_bias)

    def _merge(self, source: Node, nodes: list[Node], has_bias: bool) -> None:
        first = nodes[0]
        weights = [self.constant(node.args[1]) for node in nodes]
        merged = torch.cat([w.detach() for w in weights if w is not None])
        args: list[Any] = [source, self.add_constant(merged, first)]
        if has_bias:
            biases = [self.constant(node.args[2]) for node in nodes]
            if any(b is None for b in biases):
                return
            args.append(
                self.add_constant(torch.cat([b.detach() for b in biases if b is not None]), first)
            )
        whole = self.call(first, aten.linear.default, *args)
        begin, parts = 0, []
        for weight in weights:
            assert weight is not None
            end = begin + weight.shape[0]
            parts.append(self.call(first, aten.slice.Tensor, whole, -1, begin, end))
            begin = end
        for node, part in zip(nodes, parts, strict=True):
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
            self.graph.erase_node(node)

    def fuse_rms_norms(self) -> None:
        """The six to eight operations of a root-mean-square norm become one function."""
        for node in list(self.graph.nodes):
            found = match_rms_norm(node)
            if found is None:
                continue
            x, weight, eps = found
            value, scale = x.meta.get("val"), self.constant(weight)
            if not isinstance(value, Tensor) or scale is None or scale.ndim != 1:
                continue
            if value.dtype == scale.dtype and value.shape[-1] == scale.shape[0]:
                doubled = self.add_constant(torch.cat((scale.detach(),) * 2), node)
                fused = self.call(node, rms_norm, x, doubled, scale.shape[0], eps)
                fused.meta = dict(node.meta)
                node.replace_all_uses_with(fused)
        self.graph.eliminate_dead_code()

    def fuse_rotary(self) -> None:
        """add(mul(x, cos), mul(rotate_half(x), sin)) -> rotary(x, cos, signed sin)."""
        for node in list(self.graph.nodes):
            found = match_rotary(node)
            if found is None:
                continue
            x, cos, sin, half = found
            value = x.meta.get("val")
            if value is None:
                continue
            sign = torch.ones(2 * half, dtype=value.dtype, device=value.device)
            sign[:half] = -1
            signed = self.call(sin.next, aten.mul.Tensor, sin, self._sign(sign))
            signed.meta = dict(sin.meta)
            fused = self.call(node, rotary, x, cos, signed)
            fused.meta = dict(node.meta)
            node.replace_all_uses_with(fused)
            self.graph.eliminate_dead_code()

    def _sign(self, sign: Tensor) -> Node:
        """The one constant node that holds sign."""
        for node in self.graph.nodes:
            held = self.constant(node)
            if held is not None and held.dtype == sign.dtype and torch.equal(held, sign):
                assert isinstance(node, Node)
                return node
        first = next(n for n in self.graph.nodes if n.op != "placeholder")
        return self.add_constant(sign, first)

    def fuse_qkv_attention(self) -> None:
        """attention over three slices of one merged projection -> qkv_attention."""
        rows: Node | None = None
        for node in list(self.graph.nodes):
            if node.op != "call_function" or "specdec.attention" not in str(node.target):
                continue
            found = match_qkv(node)
            if found is None:
                continue
            whole, cos, signed_sin, heads, kv_heads, size = found
            weight = self.constant(whole.args[1])
            if weight is None or weight.shape[0] != (heads + 2 * kv_heads) * size:
                continue  # more than q, k and v was merged: a gate, say
            if rows is None:
                ids = next(n for n in self.graph.nodes if n.op == "placeholder")
                rows = self.call(ids.next, aten.sym_size.int, ids, 1)
            flat = [self._row_vectors(angle, rows, size) for angle in (cos, signed_sin)]
            fused = self.call(
                node, qkv_attention, "step", tuple(node.args[4:]), heads, kv_heads, whole, *flat
            )
            node.replace_all_uses_with(fused)
            self.graph.erase_node(node)

    def _row_vectors(self, angle: Node, rows: Node, size: int) -> Node:
        """(1, 1, R, D) -> (R, 1, D), right behind where angle and rows exist."""
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        later = max(angle, rows, key=lambda n: order[n])
        node = self.call(later.next, aten.view.default, angle, [rows, 1, size])
        node.meta["rows_first"] = True
        return node


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _frozen(v)) for k, v in value.items()))
    if isinstance(value, (int, float, bool)):
        return (type(value), value)  # 1, 1.0 and True are different arguments
    return value


def position_only_nodes(graph: fx.Graph, positions: Node) -> list[Node]:
    """Nodes computed from positions and constants alone that something else uses."""
    inside: set[Node] = {positions}
    constants = {n for n in graph.nodes if n.op == "get_attr"}
    for node in graph.nodes:
        if node.op != "call_function" or node.target in (aten.sym_size.int, operator.getitem):
            continue
        sources = set(node.all_input_nodes)
        if sources and sources <= constants:
            constants.add(node)
            continue
        known = all(s in inside or s in constants or is_call(s, aten.sym_size.int) for s in sources)
        if known and sources & inside:
            inside.add(node)
    return [
        n
        for n in graph.nodes
        if n in inside and n is not positions and any(u not in inside for u in n.users)
    ]
