"""The engine on Triton's kernels says what it says on their twins.

Without a GPU the kernels run in Triton's interpreter; backend.choose is made to name either.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from triton.runtime import interpreter

import specdec
from specdec import backend, runner as runner_module
from specdec.attention import LayerCall, Segment, Step
from specdec.backend import Choice, Window
from specdec.cache import BlockTable, CachedSequence, CacheGroup, LayerShape, Paged
from specdec.kernels import attention as attention_kernels, cache as cache_kernels, packed
from specdec.kernels.upload import upload
from specdec.runner import ModelRunner, SequenceRows
from specdec.sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Name = Literal["triton", "torch"]
# Of the root mean square of a row's logits, in float32; absolute, for attention of unit variance.
CLOSE_LOGITS, CLOSE = 5e-5, 1e-5

BASE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True)
class Family:
    """A model class with a tiny random configuration."""

    id: str
    stem: str  # of the class names
    options: dict[str, Any] = field(default_factory=dict)
    config_class: str = ""

    def build(self, **more: Any) -> PreTrainedModel:
        config_class = getattr(transformers, self.config_class or f"{self.stem}Config")
        config = config_class(**{**BASE, **self.options, **more})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: PreTrainedModel = getattr(transformers, f"{self.stem}ForCausalLM")(config)
            model.eval()
            with torch.no_grad():  # large enough that attention, biases and sinks all matter
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
                    else:
                        parameter.mul_(4)
            return torch.nn.Module.to(model, DEVICE)


LLAMA = Family("llama", "Llama")
GEMMA2 = Family(
    "gemma2-softcap-sliding", "Gemma2",
    {"head_dim": 12, "sliding_window": 6, "attn_logit_softcapping": 0.5,
     "attn_implementation": "eager"},
)  # fmt: skip
GPT_OSS = Family(
    "gpt_oss-sinks-sliding", "GptOss",
    {"head_dim": 12, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2,
     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
)  # fmt: skip
FAMILIES = [
    LLAMA, GEMMA2, GPT_OSS,
    Family("gemma3-sliding", "Gemma3",
           {"head_dim": 12, "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"]}, "Gemma3TextConfig"),
    Family("llama4-chunked", "Llama4",
           {"attention_chunk_size": 6, "head_dim": 8, "num_local_experts": 2,
            "intermediate_size_mlp": 48, "num_experts_per_tok": 1,
            "layer_types": ["chunked_attention", "full_attention"]}, "Llama4TextConfig"),
    # values of another size than keys
    Family("deepseek_v3-latent", "DeepseekV3",
           {**EXPERTS, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "n_group": 1,
            "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
            "num_key_value_heads": 4}),
]  # fmt: skip
by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)


@pytest.fixture(scope="module", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """A launch remaps triton.language once: not again at every call inside it, as the interpreter
    does, nor does every sum need a check for overflow."""
    if DEVICE.type == "cuda":
        yield
        return
    mapped: set[str] = set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.fn.__module__ not in mapped:
            mapped.add(function.fn.__module__)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        builder = interpreter.interpreter_builder
        quick = dataclasses.replace(builder.options, sanitize_overflow=False)
        patch.setattr(builder, "options", quick)
        yield


@contextmanager
def served_by(name: Name) -> Iterator[None]:
    """Every device is served by these kernels, and no model's forward is captured, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "choose", lambda _: Choice(name, "the test says so"))
        patch.setattr(runner_module, "_PREPARED", {})
        patch.setattr(runner_module, "_choose_forward", lambda own, *_: (own, "as on a GPU"))
        yield


def text(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, BASE["vocab_size"]) for _ in range(count)]


PARENTS = [-1, -1, 0, 0, 1, 2, 5, 6, 3]


def scored(model: PreTrainedModel, name: Name) -> Tensor:
    """Logits of two passes over three sequences on pages that lie apart: prompts, one of them with
    a tree, then a tree, a chain and a single row."""
    with served_by(name):
        runner = ModelRunner(model)
        assert runner.kernels.name == name
        group = CacheGroup(4, 4096, DEVICE)
        runner.join(group)
        caches = [group.open(1) for _ in range(3)]
        for slots in range(4, 60, 4):
            for cache in caches:
                group.reserve(cache, slots)
        nodes = torch.tensor(text(9, 2), device=DEVICE)
        first = [
            SequenceRows(caches[0], text(19), nodes, PARENTS, keep=28),
            SequenceRows(caches[1], text(7, 1), keep=7),
            SequenceRows(caches[2], text(12, 3), nodes[:3], keep=4),
        ]
        found = [runner.score(first)]
        group.truncate(caches[0], 19)
        second = [
            SequenceRows(caches[0], text(2, 4), nodes[:5], PARENTS[:5], keep=7),
            SequenceRows(caches[1], (), nodes[:4], [-1, -1, 0, 1], keep=4),  # a forest
            SequenceRows(caches[2], text(1, 5), keep=1),
        ]
        return torch.cat([*found, runner.score(second)])


@by_family
def test_logits_are_the_twins(family: Family) -> None:
    model = family.build()
    found, wanted = scored(model, "triton"), scored(model, "torch")
    assert found.shape == wanted.shape == (51, BASE["vocab_size"])
    error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(error.max()) < CLOSE_LOGITS


MODES: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    "plain": lambda _: {},
    "chain": lambda _: {"proposer": "ngram", "num_draft_tokens": 3, "policy": "constant"},
    "tree": lambda model: {"draft": model, "tree": (2, 1), "policy": "constant"},
}


def generated(
    model: PreTrainedModel, name: Name, mode: str, prompts: Sequence[Sequence[int]], count: int
) -> list[tuple[int, ...]]:
    with served_by(name):
        engine = specdec.Engine(model, grow=True, **MODES[mode](model))
        for prompt in prompts:
            engine.add_request(list(prompt), SamplingParams(max_new_tokens=count, temperature=0))
        outputs = {output.id: output.token_ids for output in engine}
        engine.check_integrity()
    return [outputs[name] for name in sorted(outputs)]


@pytest.mark.parametrize(
    ("family", "mode"),
    [(LLAMA, "plain"), (LLAMA, "chain"), (LLAMA, "tree"), (GEMMA2, "tree"), (GPT_OSS, "chain")],
    ids=lambda value: value if isinstance(value, str) else value.id,
)
def test_greedy_text_of_a_ragged_batch_is_the_twins(family: Family, mode: str) -> None:
    model = family.build()
    prompts = [[*text(6, 1), *text(6, 1), *text(4, 1)], text(3, 2), text(9, 3)]
    found = generated(model, "triton", mode, prompts, 5)
    assert found == generated(model, "torch", mode, prompts, 5)
    assert [len(tokens) for tokens in found] == [5, 5, 5]


def test_greedy_text_behind_a_prompt_of_more_than_256_tokens_is_the_twins() -> None:
    model = LLAMA.build(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    prompt = text(300)
    found = generated(model, "triton", "plain", [prompt], 3)
    assert found == generated(model, "torch", "plain", [prompt], 3)


SHAPE = LayerShape(1, 8, 8, torch.float32)


def table(*pages: int) -> BlockTable:
    found = BlockTable(16)
    found.extend(pages)
    return found


def random_parents(nodes: int) -> tuple[int, ...]:
    draw = random.Random(nodes)
    return tuple(draw.randrange(-1, node) for node in range(nodes))


def segment(rows: int, context: int, pages: BlockTable, parents: tuple[int, ...] = ()) -> Segment:
    """As the runner makes one: for the twin with a mask, for Triton with parents."""
    if not parents:
        return Segment(rows, context, pages)
    chain = rows - len(parents)
    mask = torch.ones(rows, rows, dtype=torch.bool).tril_()
    for node, parent in enumerate(parents):
        above = chain + parent if parent >= 0 else chain - 1
        mask[chain + node] = mask[above] if above >= 0 else False
        mask[chain + node, chain + node] = True
    positions = context + mask.sum(-1) - 1
    return Segment(rows, context, pages, mask.to(DEVICE), positions.to(DEVICE), parents)


def attended(
    name: Name, segments: Sequence[Segment], window: Window | None = None, heads: int = 2
) -> Tensor:
    """One layer's attention of a pass over pages full of numbers."""
    generator = torch.Generator().manual_seed(0)
    rows = sum(its.rows for its in segments)
    pages = 1 + max(page for its in segments for page in its.table.pages)
    q, k, v = (torch.randn(rows, n, 8, generator=generator).to(DEVICE) for n in (heads, 1, 1))
    with served_by(name):
        memory = Paged([SHAPE], pages, 16, DEVICE)
        for tensor in (*memory.keys, *memory.values):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        return Step(memory, segments, {}).attend(LayerCall(0, 0.3, window, None), q, k, v, None)


@pytest.mark.parametrize("window", [None, Window(10), Window(16, chunked=True)], ids=str)
def test_long_prompt_with_a_tree_behind_it_is_attended_in_pieces(
    window: Window | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "MAX_ROWS", 16)
    segments = [
        segment(40 + 6, 10, table(*range(4)), random_parents(6)),
        segment(1, 37, table(6, 4, 5)),
        segment(20, 5, table(8, 7)),
    ]
    found = attended("triton", segments, window)
    assert torch.allclose(found, attended("torch", segments, window), rtol=0, atol=CLOSE)


def test_pieces_hold_256_rows_and_begin_where_the_one_before_ends() -> None:
    pages = table(*range(99)).numbers

    def cut(rows: int, context: int, nodes: int) -> list[tuple[int, int, int]]:
        found = packed.pieces_of(rows, context, pages, random_parents(nodes))
        return [(piece.rows, piece.context, len(piece.parents)) for piece in found]

    assert cut(1, 7, 0) == [(1, 7, 0)]
    assert cut(256, 0, 0) == [(256, 0, 0)]
    assert cut(600, 3, 0) == [(256, 3, 0), (256, 259, 0), (88, 515, 0)]
    assert cut(256, 3, 255) == [(256, 3, 255)]
    assert cut(257, 3, 255) == [(1, 3, 0), (256, 4, 255)]
    assert cut(600, 0, 100) == [(256, 0, 0), (88, 256, 0), (256, 344, 100)]
    assert cut(300, 5, 300) == [(300, 5, 300)]  # no row of it is before all others
    assert cut(302, 5, 300) == [(2, 5, 0), (300, 7, 300)]
    assert cut(0, 5, 0) == []


def test_tree_of_more_than_256_nodes_is_the_twins() -> None:
    segments = [segment(261, 3, table(*range(20)), random_parents(260))]
    found = attended("triton", segments, heads=1)
    assert torch.allclose(found, attended("torch", segments, heads=1), rtol=0, atol=CLOSE)


def test_rows_beyond_the_workspace_are_attended_in_turn_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    segments = [
        segment(5, 70, table(0, 1, 2, 3, 4), random_parents(4)),
        segment(3, 2, table(5)),
        segment(4, 130, table(*range(6, 15)), random_parents(4)),
        segment(1, 0, table(16)),
    ]
    whole = attended("triton", segments)
    calls: list[int] = []
    attend = attention_kernels.attend

    def recorded(plan: Any, q: Tensor, *args: Any, **options: Any) -> None:
        calls.append(q.shape[0])
        attend(plan, q, *args, **options)

    monkeypatch.setattr(attention_kernels, "attend", recorded)
    monkeypatch.setattr(packed, "_WORKSPACE_BYTES", 8 * 2 * 10 * 4 * 3)  # 8 rows, 3 splits
    assert torch.equal(attended("triton", segments), whole)
    assert calls == [8, 5]


def test_what_the_layers_share_is_copied_once_per_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[int] = []

    def counted(parts: Any, device: torch.device) -> list[Tensor]:
        uploads.append(len(parts))
        return upload(parts, device)

    with served_by("triton"):
        runner = ModelRunner(LLAMA.build())
        group = CacheGroup(4, 4096, DEVICE)
        runner.join(group)
        caches = [group.open(40) for _ in range(2)]
        monkeypatch.setattr(packed, "upload", counted)
        runner.score([SequenceRows(cache, text(5), keep=1) for cache in caches])
    assert len(uploads) == 1


def test_layers_of_other_types_come_back_in_the_queries_type() -> None:
    """Some models turn queries into float32 before they attend."""
    with served_by("triton"):
        memory = Paged([LayerShape(1, 8, 8, torch.float16)], 4, 16, DEVICE)
        step = Step(memory, [segment(2, 0, table(0))], {})
        q, k, v = (torch.randn(2, n, 8, device=DEVICE) for n in (2, 1, 1))
        out = step.attend(LayerCall(0, 0.3, None, None), q, k.half(), v.half(), None)
    assert out.dtype == torch.float32
    assert out.isfinite().all()


def test_keys_of_any_layout_are_written() -> None:
    """transformers hands over heads first; a turned key may lie either way."""
    found = []
    for turned in (False, True):
        with served_by("triton"):
            memory = Paged([LayerShape(2, 8, 8, torch.float32)], 4, 16, DEVICE)
            step = Step(memory, [segment(3, 1, table(2, 0))], {})
            generator = torch.Generator().manual_seed(3)
            q, k, v = (torch.randn(3, n, 8, generator=generator).to(DEVICE) for n in (4, 2, 2))
            if turned:
                q, k, v = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v))
            found.append(step.attend(LayerCall(0, 0.3, None, None), q, k, v, None))
            assert torch.equal(memory.flat_keys[0][33:36], k)
            assert torch.equal(memory.flat_values[0][33:36], v)
    assert torch.equal(*found)


def filled(name: Name) -> tuple[CacheGroup, list[CachedSequence]]:
    """Two layers; three sequences of 30 slots, each slot holding its own number."""
    with served_by(name):
        group = CacheGroup(4, 400, DEVICE)
        shapes = [LayerShape(2, 4, 4, torch.float32), LayerShape(1, 8, 6, torch.float32)]
        memory = group.add_model("model", shapes)
        sequences = [group.open(4, sinks=4) for _ in range(3)]
        for slots in range(8, 33, 4):
            for sequence in sequences:
                group.reserve(sequence, slots)
    for tensor in (*memory.keys, *memory.values):
        numbers = torch.arange(tensor.shape[0] * tensor.shape[1], device=DEVICE)
        tensor.copy_(numbers.view(*tensor.shape[:2], 1, 1).expand_as(tensor))
    for sequence in sequences:
        sequence.computed["model"] = 30
    group.drop(sequences[2], 9)
    assert sequences[2].dropped == 4
    sequences[2].computed["model"] = 34
    return group, sequences


def test_paths_of_all_sequences_are_committed_in_one_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    commit = cache_kernels.commit

    def counted(layers: Any, block_table: Tensor, *rest: Tensor) -> None:
        calls.append(block_table.shape[0])
        commit(layers, block_table, *rest)

    monkeypatch.setattr(cache_kernels, "commit", counted)

    def committed(name: Name) -> tuple[Paged, BlockTable]:
        group, (first, second, third) = filled(name)
        group.commit_all([(first, 11, [13, 14, 19]), (second, 3, [3, 4]), (third, 20, [21, 33])])
        assert [s.computed["model"] for s in (first, second, third)] == [14, 5, 22]
        group.check_integrity()
        return group.memory["model"], first.table

    (memory, pages), (wanted, _) = committed("triton"), committed("torch")
    assert calls == [2], "what lies where it belongs is not moved"
    for ours, theirs in zip(
        (*memory.keys, *memory.values), (*wanted.keys, *wanted.values), strict=True
    ):
        assert torch.equal(ours, theirs)
    kept = [int(memory.flat_keys[1][pages.flat(slot), 0, 0]) for slot in range(10, 15)]
    assert kept == [pages.flat(slot) for slot in (10, 13, 14, 19, 14)]


def test_commit_follows_a_pool_that_grew() -> None:
    with served_by("triton"):
        group, (first, *_) = filled("triton")
        group.commit(first, 5, [7])
        group.allocate(90)
        before = group.memory["model"].keys[1].clone().flatten(0, 1)
        first.computed["model"] = 30
        group.commit(first, 6, [9])
    after = group.memory["model"].flat_keys[1]
    assert torch.equal(after[first.table.flat(6)], before[first.table.flat(9)])


@pytest.mark.parametrize(
    ("change", "why"),
    [({"head_dim": 264}, "a head size of 264"), ({"dtype": torch.float64}, "not in torch.float64")],
    ids=["wide", "double"],
)
def test_models_that_the_kernels_do_not_take_keep_the_twin_and_say_so(
    change: dict[str, Any], why: str
) -> None:
    with served_by("triton"):
        model = LLAMA.build(**change).to(change.get("dtype", torch.float32))
        runner = ModelRunner(model)
        group = CacheGroup(4, 64, DEVICE)
        runner.join(group)
        assert runner.kernels.name == "torch"
        assert why in runner.kernels.why
        assert not group.memory[runner].on_triton
        logits = runner.score([SequenceRows(group.open(8), text(5), keep=1)])
    assert logits.isfinite().all()
