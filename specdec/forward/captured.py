"""A model's forward pass captured once as a graph and replayed without its modules.

At the sizes speculation runs (1-64 rows) a CPU spends as long in module calls as in arithmetic.
The graph has a symbolic row count, linear layers packed for the CPU, and attention calls that go
straight to the running Step.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from specdec.attention import Recorder, Step, call_of
from specdec.backend import Window
from specdec.forward import jit
from specdec.forward.fused import fused_linear, qkv_attention, rms_norm, rotary
from specdec.forward.merge import merge_around_linears
from specdec.forward.module import ModuleForward
from specdec.forward.packing import quick_linear
from specdec.forward.rewrite import Rewriter, position_only_nodes

aten = torch.ops.aten
Node = fx.Node

# The same operators by their quicker names: an OpOverload costs about a microsecond more a call.
_QUICK: dict[Any, Callable[..., Any]] = {
    aten.mul.Tensor: torch.mul, aten.add.Tensor: torch.add, aten.sub.Tensor: torch.sub,
    aten.div.Tensor: torch.div, aten.view.default: Tensor.view, aten.neg.default: torch.neg,
    aten.reshape.default: Tensor.reshape, aten.transpose.int: torch.transpose,
    aten.to.dtype: Tensor.to, aten.silu.default: F.silu, aten.pow.Tensor_Scalar: torch.pow,
    aten.mean.dim: torch.mean, aten.rsqrt.default: torch.rsqrt, aten.tanh.default: torch.tanh,
    aten.unsqueeze.default: torch.unsqueeze, aten.cat.default: torch.cat,
    aten.embedding.default: torch.embedding, aten.layer_norm.default: torch.layer_norm,
    aten.permute.default: torch.permute, aten.linear.default: F.linear,
    aten.index_select.default: torch.index_select, aten.select.int: torch.select,
    aten.matmul.default: torch.matmul,
}  # fmt: skip


class CaptureError(Exception):
    """This forward pass cannot be replayed as a graph; the message says why."""


class _TracingStep(Recorder):
    """Present while tracing: knows the windows, attends to nothing (the operator is opaque)."""

    def __init__(self, windows: Mapping[int, Window]) -> None:
        super().__init__()
        self._known = windows

    def window(self, size: int, sees: Callable[[int, int], bool]) -> Window:
        del sees  # calling it would need values that a trace does not have
        return self._known[size]


class CapturedForward:
    """The replay. Holds packed copies of the weights as they were when it was made."""

    name = "captured"

    def __init__(
        self,
        own: ModuleForward,
        windows: Mapping[int, Window],
        max_positions: int | None,
    ) -> None:
        """Raises CaptureError where the model's Python depends on values or writes in place."""
        module = _trace(own, windows, next(own.model.parameters()).device)
        rewriter = Rewriter(module)
        rewriter.drop_no_ops()
        if not rewriter.is_pure():
            raise CaptureError("its forward writes into tensors in place")
        with torch.no_grad():
            rewriter.run()
            tables = _position_tables(module, max_positions) if max_positions else {}
            if not jit.why_not():
                merge_around_linears(module)
        emitter = _Emitter(module, tables)
        self._replay = emitter.function()
        self.uses_threads = emitter.uses_threads  # some linear layer is not a compiled kernel

    def __call__(
        self, input_ids: Tensor, positions: Tensor, keep: Tensor, step: Step | Recorder
    ) -> Tensor:
        """Logits (n, V) of the rows named by keep; input_ids and positions are (1, R)."""
        with torch.inference_mode():
            logits: Tensor = self._replay(input_ids, positions, keep, step)
            return logits


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Takes back what the model's Python stores in its modules: while traced, tensors of no value.

    Rotary embeddings with longrope scaling keep their frequencies so.
    """
    held = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in held:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def _trace(
    own: ModuleForward, windows: Mapping[int, Window], device: torch.device
) -> fx.GraphModule:
    # Row counts that no model dimension equals, so that no symbol is mistaken for a constant.
    rows, kept = 13, 11
    ids = torch.ones(1, rows, dtype=torch.long, device=device)
    positions = torch.arange(rows, device=device)[None]
    keep = torch.arange(kept, device=device)

    def forward(ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        return own.logits(ids, positions, keep)

    tracer = make_fx(
        forward, tracing_mode="symbolic", pre_dispatch=True, _allow_non_fake_inputs=True
    )
    try:
        with own.inside(_TracingStep(windows)), torch.no_grad(), _left_alone(own.model):
            module = tracer(ids, positions, keep)
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, KeyError) as error:
        # whatever a model's own Python cannot do with symbolic shapes
        first = str(error).strip().splitlines()
        reason = first[0] if first else type(error).__name__
        raise CaptureError(f"{type(error).__name__}: {reason}") from error
    values = (node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder")
    fake = next(value for value in values if isinstance(value, FakeTensor))
    guards = fake.fake_mode.shape_env.guards if fake.fake_mode.shape_env else []
    if guards:  # the trace took one side of a branch for good
        raise CaptureError(f"its Python branches on the number of rows: {guards[0].expr}")
    return module


def _position_tables(module: fx.GraphModule, max_positions: int) -> dict[Node, tuple[Tensor, int]]:
    """For each value computed from positions alone (rotary angles): its table over all positions.

    Returns node -> (table, dimension of the rows). A value that is not a function of each row's own
    position (dynamic scaling) is found by comparison and left in the graph.
    """
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    frontier = position_only_nodes(module.graph, inputs[1])
    if not frontier:
        return {}
    device = next((v.device for v in module.buffers()), next(iter(module.parameters())).device)
    everything = torch.arange(max_positions, device=device)[None]
    sample = torch.randint(max_positions, (1, 17), generator=torch.Generator().manual_seed(0))
    sample = sample.to(device)
    whole, some = (_evaluate(module, frontier, p) for p in (everything, sample))
    tables = {}
    for node in frontier:
        dims = [d for d, size in enumerate(whole[node].shape) if size == max_positions]
        if len(dims) == 1:
            picked = whole[node].index_select(dims[0], sample[0])
            if torch.equal(picked, some[node]):
                tables[node] = (whole[node].contiguous(), dims[0])
    return tables


def _evaluate(module: fx.GraphModule, wanted: list[Node], positions: Tensor) -> dict[Node, Tensor]:
    """The values of the wanted nodes for these positions."""
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    values: dict[Node, Any] = {inputs[0]: positions, inputs[1]: positions}

    def value(node: Node) -> Any:
        if node not in values:
            if node.op == "get_attr":
                values[node] = getattr(module, str(node.target))
            else:
                assert callable(node.target)
                if node.target is aten.sym_size.int:
                    dim = node.args[1]
                    assert isinstance(dim, int)
                    return positions.shape[dim]
                args = fx.map_arg(node.args, value)
                values[node] = node.target(*args, **fx.map_arg(node.kwargs, value))
        return values[node]

    return {node: value(node) for node in wanted}


class _Emitter:
    """Writes the graph as one Python function over quick operator names."""

    def __init__(self, module: fx.GraphModule, tables: dict[Node, tuple[Tensor, int]]) -> None:
        self.module, self.tables = module, tables
        self.names: dict[str, Any] = {}
        self.lines: list[str] = []
        self.uses_threads = False

    def bind(self, value: Any) -> str:
        for name, held in self.names.items():
            if held is value:
                return name
        name = f"g{len(self.names)}"
        self.names[name] = value
        return name

    def function(self) -> Callable[..., Any]:
        needed = self._needed()
        inputs = [n.name for n in self.module.graph.nodes if n.op == "placeholder"]
        for node in self.module.graph.nodes:
            if node in needed and node.op not in ("placeholder", "get_attr"):
                self._emit(node, inputs)
        source = f"def replay({', '.join(inputs)}, step):\n    " + "\n    ".join(self.lines)
        exec(compile(source, "<captured forward>", "exec"), self.names)
        function: Callable[..., Any] = self.names["replay"]
        return function

    def _needed(self) -> set[Node]:
        """What the output reaches without entering a tabulated value."""
        output = next(n for n in self.module.graph.nodes if n.op == "output")
        needed: set[Node] = set()
        pending = [output]
        while pending:
            node = pending.pop()
            if node not in needed:
                needed.add(node)
                if node not in self.tables:
                    pending.extend(node.all_input_nodes)
        return needed

    def _emit(self, node: Node, inputs: list[str]) -> None:
        last_uses = self._released(node)
        if node.op == "output":
            self.lines.append(f"return {self.text(node.args[0])}")
            return
        if node in self.tables:
            table, dim = self.tables[node]
            text = f"{self.bind(torch.index_select)}({self.bind(table)}, {dim}, {inputs[1]}[0])"
        else:
            text = self._call(node)
        self.lines.append(f"{node.name} = {text}")
        if last_uses:
            self.lines[-1] += f"; del {', '.join(last_uses)}"

    def _released(self, node: Node) -> list[str]:
        """Intermediate values whose last reader this node is: freed for the allocator to reuse."""
        order = {n: i for i, n in enumerate(self.module.graph.nodes)}
        if node.op == "output" or node in self.tables:
            return []
        return [
            source.name
            for source in node.all_input_nodes
            if source.op == "call_function" and max(order[u] for u in source.users) == order[node]
        ]

    def _call(self, node: Node) -> str:
        target = node.target
        if target is aten.sym_size.int:
            source, dim = node.args
            return f"{self.text(source)}.shape[{dim}]"
        if target is aten.linear.default:
            return self._linear(node)
        if target is aten.slice.Tensor:
            return self._slice(node)
        if target is aten.index.Tensor and self._is_keep(node):
            return f"{self.text(node.args[0])}.index_select(1, {self.text(node.args[1][1])})"  # type: ignore[index]
        if target is qkv_attention:
            call = self.bind(call_of(*node.args[1]))  # type: ignore[misc]
            rest = ", ".join(self.text(a) for a in node.args[2:])
            return f"{self.bind(self._attention_for(node))}(step, {call}, {rest})"
        if target is fused_linear:
            return self._fused_linear(node)
        if "specdec.attention" in str(target):
            q, k, v, sinks = (self.text(a) for a in node.args[:4])
            call = self.bind(call_of(*node.args[4:]))  # type: ignore[arg-type]
            rows = ", ".join(f"{t}[0].transpose(0, 1)" for t in (q, k, v))
            return f"step.attend({call}, {rows}, {sinks})[None]"
        function = target if target in (rotary, rms_norm) else _QUICK.get(target, target)
        arguments = [self.text(a) for a in node.args]
        arguments += [f"{k}={self.text(v)}" for k, v in node.kwargs.items()]
        return f"{self.bind(function)}({', '.join(arguments)})"

    @staticmethod
    def _is_keep(node: Node) -> bool:
        indices = node.args[1]
        return isinstance(indices, (list, tuple)) and len(indices) == 2 and indices[0] is None

    def _linear(self, node: Node) -> str:
        weight = self._constant(node.args[1])
        self.uses_threads |= weight is None or not jit.takes(weight)
        bias_node = node.args[2] if len(node.args) > 2 else None
        bias = self._constant(bias_node)
        x = self.text(node.args[0])
        quick = None
        if weight is not None and (bias_node is None or bias is not None):
            quick = quick_linear(weight, bias)
        if quick is None:
            rest = "".join(f", {self.text(a)}" for a in node.args[1:])
            return f"{self.bind(F.linear)}({x}{rest})"
        return f"{self.bind(quick)}({x})"

    def _fused_linear(self, node: Node) -> str:
        from specdec.forward.jit.linear import make_linear

        x, weight, bias, doubled, eps, gated, residual = node.args
        matrix, norm = self._constant(weight), self._constant(doubled)
        assert matrix is not None
        assert isinstance(eps, float)
        halved = None if norm is None else (norm[: matrix.shape[1]].clone(), eps)
        linear = make_linear(matrix, self._constant(bias), norm=halved, gated=bool(gated))
        rest = "" if residual is None else f", {self.text(residual)}"
        return f"{self.bind(linear)}({self.text(x)}{rest})"

    def _attention_for(self, node: Node) -> Callable[..., Tensor]:
        """The compiled attention where it takes this node's heads and numbers."""
        if jit.why_not():
            return qkv_attention
        from specdec.forward.jit.attention import fits, merged_attention

        _, call, heads, kv_heads, qkv, cos, sin = node.args
        if call_of(*call).softcap is not None:  # type: ignore[misc]
            return qkv_attention
        assert isinstance(heads, int)
        assert isinstance(kv_heads, int)
        angles = [self.tables.get(a) for a in (cos, sin) if isinstance(a, Node)]
        weight = self._constant(qkv.args[1]) if isinstance(qkv, Node) else None
        if weight is None or len(angles) != 2:
            return qkv_attention
        size = weight.shape[0] // (heads + 2 * kv_heads)
        same = all(a is not None and a[0].dtype == weight.dtype for a in angles)
        return (
            merged_attention
            if same and fits(heads, kv_heads, size, weight.dtype)
            else qkv_attention
        )

    def _slice(self, node: Node) -> str:
        source, dim, begin, end = (*node.args, 0, 2**63 - 1)[:4]
        value = source.meta.get("val") if isinstance(source, Node) else None
        if isinstance(begin, int) and isinstance(end, int) and dim == -1:
            return f"{self.text(source)}[..., {begin}:{end}]"
        del value
        arguments = ", ".join(self.text(a) for a in node.args)
        return f"{self.bind(aten.slice.Tensor)}({arguments})"

    def _constant(self, node: Any) -> Tensor | None:
        if isinstance(node, Node) and node.op == "get_attr":
            value = getattr(self.module, str(node.target))
            return value.detach() if isinstance(value, Tensor) else None
        return None

    def text(self, value: Any) -> str:
        """A graph argument as Python source."""
        if isinstance(value, Node):
            if value.op == "get_attr":
                return self.bind(self._constant_or_value(value))
            return value.name
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(self.text(v) for v in value) + "]"
        if isinstance(value, (bool, int, str, type(None))):
            return repr(value)
        if isinstance(value, float) and value == value and abs(value) != float("inf"):
            return repr(value)
        return self.bind(value)

    def _constant_or_value(self, node: Node) -> Any:
        value = getattr(self.module, str(node.target))
        return value.detach() if isinstance(value, Tensor) else value
