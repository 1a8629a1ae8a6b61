"""The captured forward replays what the modules compute; packed layers serve a step only."""

import builtins
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specdec.attention import Recorder, Segment, Step
from specdec.cache import BlockTable, CacheGroup, LayerShape, Paged
from specdec.forward import (
    CapturedForward,
    CaptureError,
    ModuleForward,
    PackedLinears,
    captured,
    jit,
    packing,
)
from specdec.runner import ModelRunner, SequenceRows
from specdec.selftest import TOLERANCE

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, POSITIONS = 97, 128
BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
# Of the root mean square of a row's logits, between two orders of the same float32 sums.
CLOSE = 2e-5


def build(stem: str = "Llama", model_class: Any = None, **options: Any) -> PreTrainedModel:
    """A tiny random model with weights large enough that attention matters."""
    config = getattr(transformers, f"{stem}Config")(**{**BASE, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = model_class or getattr(transformers, f"{stem}ForCausalLM")
        model: PreTrainedModel = made(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                else:
                    parameter.mul_(4)
    return model


class Pass:
    """One model's two forwards, each with a cache of its own holding the same prompt."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.own = model, ModuleForward(model)
        recorder = Recorder()
        three = torch.arange(3)
        self.own(three[None], three[None], three, recorder)
        self.shapes: list[LayerShape] = [recorder.shapes[i] for i in sorted(recorder.shapes)]
        self.windows = {window.size: window for window in recorder.windows}
        self.captured = CapturedForward(self.own, self.windows, POSITIONS)

    def logits(
        self, forward: ModuleForward | CapturedForward, rows: int, keep: list[int], context: int = 9
    ) -> Tensor:
        """A prompt of `context` tokens, then `rows` rows of a tree: two branches on one root."""
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(3, VOCAB, (1, context + rows), generator=generator)
        memory, table = Paged(self.shapes, 16, 4, torch.device("cpu")), BlockTable(4)
        table.extend([*range(8, 16), *range(8)])
        step = Step(memory, [Segment(context, 0, table)], self.windows)
        before = torch.arange(context)
        forward(ids[:, :context], before[None], before, step)
        mask = torch.ones(rows, rows).tril().bool()
        half = (rows + 1) // 2
        mask[half:, 1:half] = False
        positions = context + mask.sum(-1) - 1
        segment = Segment(rows, context, table, mask if rows > 1 else None, positions)
        step = Step(memory, [segment], self.windows)
        return forward(ids[:, context:], positions[None], torch.tensor(keep), step).float()


def assert_within(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(error.max()) <= tolerance


KEEPS: dict[str, Callable[[int], list[int]]] = {
    "all": lambda rows: list(range(rows)),
    "last": lambda rows: [rows - 1],
    "some-out-of-order": lambda rows: [rows - 1, 0, rows // 2],
}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": build,
    "llama-biases": lambda: build(attention_bias=True, mlp_bias=True),
    "llama-mha": lambda: build(num_key_value_heads=4),
    "llama-heads-of-64": lambda: build(head_dim=64),
    "qwen3": lambda: build("Qwen3", head_dim=12),
    "gemma2": lambda: build(
        "Gemma2", head_dim=12, attn_logit_softcapping=0.5, **SLIDING
    ),
    "mistral-heads-of-64": lambda: build("Mistral", head_dim=64, sliding_window=7),
    "gemma2-heads-of-64": lambda: build(
        "Gemma2", head_dim=64, attn_logit_softcapping=0.5, **SLIDING
    ),
    "cohere2": lambda: build("Cohere2", **SLIDING),
    "gpt2": lambda: build("GPT2", transformers.GPT2LMHeadModel, n_positions=POSITIONS),
    "phi": lambda: build("Phi"),
}  # fmt: skip


@pytest.fixture(scope="module")
def passes() -> "Passes":
    """Each model's passes, made once; compiled=False: as on a machine without the kernels."""
    made: dict[tuple[str, bool], Pass] = {}

    def get(name: str, *, compiled: bool = True) -> Pass:
        if (name, compiled) not in made:
            with pytest.MonkeyPatch.context() as patch:
                if not compiled:
                    patch.setattr(jit, "why_not", lambda: "not in this test")
                made[name, compiled] = Pass(MODELS[name]())
        return made[name, compiled]

    return get


Passes = Callable[..., Pass]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 2, 7, 40], ids=lambda rows: f"rows{rows}")
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
def test_captured_forward_equals_the_modules(
    name: str, rows: int, compiled: bool, passes: Passes
) -> None:
    both = passes(name, compiled=compiled)
    for keep in KEEPS.values():
        found = both.logits(both.captured, rows, keep(rows))
        assert_within(found, both.logits(both.own, rows, keep(rows)), CLOSE)


@pytest.mark.parametrize("name", ["llama", "llama-heads-of-64", "gemma2"])
@pytest.mark.parametrize("rows", [1, 2, 7, 40], ids=lambda rows: f"rows{rows}")
def test_bfloat16_replay_is_within_the_tolerance_table(name: str, rows: int) -> None:
    both = Pass(MODELS[name]().bfloat16())
    keep = list(range(rows))
    found = both.logits(both.captured, rows, keep)
    assert_within(found, both.logits(both.own, rows, keep), TOLERANCE[torch.bfloat16])


def test_no_row_kept_gives_no_logits(passes: Passes) -> None:
    both = passes("llama")
    nothing = torch.empty(0, dtype=torch.long)
    rows = torch.arange(3)
    recorder = Recorder()
    assert both.captured(rows[None], rows[None], nothing, recorder).shape == (0, VOCAB)


# What the rewrites make of the graph.


def source_of(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, *, compiled: bool = False
) -> str:
    """The replay's Python, with every global replaced by what it names."""
    sources: list[str] = []
    if not compiled:
        monkeypatch.setattr(jit, "why_not", lambda: "not in this test")

    def keep(source: str, *args: Any) -> Any:
        sources.append(source)
        return builtins.compile(source, *args)

    monkeypatch.setattr(captured, "compile", keep, raising=False)
    replay = Pass(model).captured._replay
    [source] = sources
    names: dict[str, Any] = getattr(replay, "__globals__")  # noqa: B009  # not on every Callable

    def named(match: re.Match[str]) -> str:
        value = names[match.group()]
        if isinstance(value, Tensor):
            return f"constant{list(value.shape)}"
        return str(getattr(value, "__name__", type(value).__name__))

    return re.sub(r"\bg\d+\b", named, source)


def test_rewrites_of_llama_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(build(), monkeypatch)
    # per layer: q, k and v in one; the output; gate and up in one; down. And the head.
    assert source.count("linear(") == 2 * 4 + 1
    assert source.count("constant[64, 32]") == 2  # (4 + 2 * 2) heads of 8
    assert source.count("constant[96, 32]") == 2
    assert source.count("qkv_attention(") == 2
    assert source.count("rms_norm(") == 5
    # the angles of all positions are tables: one of cosines, one of signed sines
    assert source.count(f"index_select(constant[{POSITIONS}, 1, 8], 0, positions_1[0])") == 2
    for left_over in ("cos(", "sin(", "pow(", "rsqrt(", "step.attend(", "neg(", "cat("):
        assert left_over not in source


@pytest.mark.skipif(bool(jit.why_not()), reason=jit.why_not())
def test_compiled_linears_take_in_norms_gates_and_residuals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = source_of(build(head_dim=64, vocab_size=112), monkeypatch, compiled=True)
    assert source.count("= linear(") == 2 * 4 + 1
    assert source.count("merged_attention(") == 2
    for left_over in ("rms_norm(", "silu(", "add(", "mul(", "qkv_attention("):
        assert left_over not in source.replace("qkv_attention =", "")


def test_biases_are_merged_with_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(build(attention_bias=True), monkeypatch)
    assert source.count("constant[64, 32], constant[64]") == 2


def test_scaling_between_norm_and_rotary_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3 normalises queries and keys after the projection: no straight way to attention."""
    source = source_of(MODELS["qwen3"](), monkeypatch)
    assert "qkv_attention(" not in source
    assert source.count("step.attend(") == 2
    assert source.count("rotary(") == 4
    assert source.count("constant[96, 32]") == 4  # q, k and v of (4 + 2 * 2) heads of 12; the MLP


def test_graph_without_these_patterns_is_replayed_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """GPT-2: layer norms, learned positions, one projection already."""
    source = source_of(MODELS["gpt2"](), monkeypatch)
    for pattern in ("rms_norm(", "rotary(", "qkv_attention("):
        assert pattern not in source
    assert source.count("layer_norm(") == 5
    assert source.count("step.attend(") == 2
    # the learned positions are a table of their own
    assert f"constant[1, {POSITIONS}, 32], 1, positions_1[0])" in source


class StretchedAngles(LlamaForCausalLM):
    """Its angles depend on the whole pass, as those of dynamic scaling do."""

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: Any, **kwargs: Any
    ) -> Any:
        stretched = position_ids * (1 + position_ids.amax())
        return super().forward(
            input_ids, position_ids=stretched, logits_to_keep=logits_to_keep, **kwargs
        )


def test_angles_of_more_than_a_rows_own_position_are_not_tabulated() -> None:
    both, keep = Pass(build(model_class=StretchedAngles)), list(range(7))
    assert_within(both.logits(both.captured, 7, keep), both.logits(both.own, 7, keep), CLOSE)


class Gated(LlamaForCausalLM):
    """Its attention has a gate that reads what q, k and v read, so that all four are merged."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            attend, gate = layer.self_attn.forward, nn.Linear(32, 32, bias=False)
            layer.self_attn.gate = gate

            def forward(
                hidden_states: Tensor, *args: Any, attend: Any = attend, gate: Any = gate, **kw: Any
            ) -> Any:
                out, weights = attend(hidden_states, *args, **kw)
                return out * gate(hidden_states).sigmoid(), weights

            layer.self_attn.forward = forward


def test_gate_merged_with_the_projections_does_not_pass_for_one_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(model_class=Gated)
    source = source_of(model, monkeypatch)
    assert source.count("constant[96, 32]") == 4  # q, k, v and the gate; gate and up
    assert "qkv_attention(" not in source
    both = Pass(model)
    keep = list(range(7))
    assert_within(both.logits(both.captured, 7, keep), both.logits(both.own, 7, keep), CLOSE)


# What cannot be captured.


class LooksAtValues(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        out = super().forward(input_ids, **kwargs)
        if bool(out.logits.max() > 1e9):
            raise AssertionError
        return out


class WritesInPlace(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        out = super().forward(input_ids, **kwargs)
        out.logits.mul_(2)
        return out


class CountsRows(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        out = super().forward(input_ids, **kwargs)
        if input_ids.shape[1] > 90:  # never in a trace, so the trace alone would not show it
            out.logits = out.logits * 2
        return out


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [
        (LooksAtValues, "GuardOnDataDependentSymNode"),
        (WritesInPlace, "its forward writes into tensors in place"),
        (CountsRows, "its Python branches on the number of rows"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_forward_that_cannot_be_captured_runs_by_its_modules(
    model_class: type[LlamaForCausalLM], reason: str
) -> None:
    class Named(model_class):  # type: ignore[valid-type,misc]
        """Takes the keywords that its parent hides behind **kwargs, as real models do."""

        def forward(
            self, input_ids: Tensor, position_ids: Any = None, logits_to_keep: Any = 0, **kw: Any
        ) -> Any:
            return super().forward(
                input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep, **kw
            )

    model = build(model_class=Named)
    with pytest.raises(CaptureError, match=reason):
        Pass(model)
    runner = ModelRunner(model)
    assert runner.forward_name == "module"
    assert runner.forward_note.startswith("not captured: ")
    assert reason in runner.forward_note


def test_replay_that_fails_its_proof_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = CapturedForward.__call__

    def wrong(forward: CapturedForward, *args: Any) -> Tensor:
        return replay(forward, *args) * 1.1

    monkeypatch.setattr(CapturedForward, "__call__", wrong)
    runner = ModelRunner(build())
    assert runner.forward_name == "module"
    assert runner.forward_note.startswith("not captured: its replay failed the proof: Llama")


class RemembersItsAngles(LlamaForCausalLM):
    """Keeps a tensor of each pass in its modules, as rotary embeddings with longrope do."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        rotary = self.model.rotary_emb
        rotary.scaled = rotary.inv_freq * 1.0
        rotary.register_buffer("held", rotary.inv_freq * 1.0, persistent=False)
        return super().forward(input_ids, **kwargs)


def test_tracing_leaves_no_tensor_of_its_own_in_the_model() -> None:
    model = build(model_class=RemembersItsAngles)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        before = model(ids).logits
    rotary = model.get_submodule("model.rotary_emb")
    scaled, held = rotary.scaled, rotary.held
    ModuleForward(model)
    captured._trace(ModuleForward(model), {}, torch.device("cpu"))
    assert rotary.scaled is scaled
    assert rotary.held is held
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


# Packed linear layers.


@pytest.mark.parametrize(
    ("weight", "pays"),
    [
        (torch.zeros(512, 512), False),
        (torch.zeros(513, 512), True),
        (torch.zeros(600, 600, dtype=torch.float64), False),
        (torch.zeros(600, 600, dtype=torch.float16), False),
        (torch.zeros(1 << 19), False),
        (torch.zeros(0), False),
        (torch.zeros(600, 600, device="meta"), False),
    ],
    ids=["small", "large", "float64", "float16", "vector", "released", "not-on-the-cpu"],
)
def test_packing_pays_for_large_float32_matrices_on_the_cpu(weight: Tensor, pays: bool) -> None:
    assert packing.pays_to_pack(weight) == (pays and torch.backends.mkldnn.is_available())


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 in this CPU's oneDNN"
)
def test_packing_pays_for_every_bfloat16_matrix() -> None:
    assert packing.pays_to_pack(torch.zeros(8, 8, dtype=torch.bfloat16))


@pytest.fixture
def large() -> nn.ModuleDict:
    """Three layers that pack, two with one weight and biases of their own, and two that do not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = nn.Linear(600, 600)
        tied = nn.Linear(600, 600)
        tied.weight = wide.weight
        return nn.ModuleDict(
            {
                "wide": wide,
                "tied": tied,
                "no_bias": nn.Linear(600, 600, bias=False),
                "narrow": nn.Linear(600, 4),
                "own": type("OwnLinear", (nn.Linear,), {})(600, 600),
            }
        )


@pytest.mark.parametrize("rows", [1, 3, 8, 65], ids=lambda rows: f"rows{rows}")
def test_packed_layer_computes_the_same(large: nn.ModuleDict, rows: int) -> None:
    x = torch.randn(1, rows, 600, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = {name: layer(x) for name, layer in large.items()}
        with PackedLinears(large).active():
            inside = {name: layer(x) for name, layer in large.items()}
        after = {name: layer(x) for name, layer in large.items()}
    for name in large:
        torch.testing.assert_close(inside[name], before[name], rtol=0, atol=1e-5)
        assert torch.equal(after[name], before[name])


def replaced(model: nn.ModuleDict) -> set[str]:
    return {name for name, layer in model.items() if "forward" in vars(layer)}


def test_layers_are_packed_inside_a_step_only(large: nn.ModuleDict) -> None:
    packed = PackedLinears(large)
    assert len(packed) == 3
    assert replaced(large) == set()
    before = {name: dict(vars(layer)) for name, layer in large.items()}
    with packed.active():
        assert replaced(large) == {"wide", "tied", "no_bias"}
    assert {name: dict(vars(layer)) for name, layer in large.items()} == before


def test_layers_are_unpacked_after_an_exception(large: nn.ModuleDict) -> None:
    packed = PackedLinears(large)

    def interrupted() -> None:
        with packed.active():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert replaced(large) == set()


def test_module_forward_packs_inside_its_step_only() -> None:
    model = build(vocab_size=8208)
    head = model.get_submodule("lm_head")
    forward = ModuleForward(model, PackedLinears(model))
    seen = []
    norm = model.get_submodule("model.norm")
    norm.register_forward_hook(lambda *_: seen.append("forward" in vars(head)))
    rows = torch.arange(3)
    forward(rows[None], rows[None], rows, Recorder())
    assert seen == [True]
    assert "forward" not in vars(head)


def test_module_forward_with_packed_layers_scores_like_the_model() -> None:
    class Eager(LooksAtValues):
        def forward(
            self, input_ids: Tensor, position_ids: Any = None, logits_to_keep: Any = 0, **kw: Any
        ) -> Any:
            return super().forward(
                input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep, **kw
            )

    model = build(model_class=Eager, vocab_size=8208)
    runner = ModelRunner(model)
    assert runner.forward_name == "module"
    group = CacheGroup(4, 64, runner.device)
    runner.join(group)
    prompt = list(range(3, 12))
    found = runner.score([SequenceRows(group.open(16), prompt, keep=9)])
    with torch.no_grad():
        wanted = model(torch.tensor([prompt])).logits[0]
    assert_within(found, wanted, CLOSE)
