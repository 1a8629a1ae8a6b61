"""ModelRunner: packed rows equal the model's own forward, class by class, or the class is refused.

The expected logits come from the model itself, one path at a time and outside any step.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralForCausalLM, PreTrainedModel

import specdec
from specdec import runner as runner_module
from specdec.attention import STEP, Recorder, Step
from specdec.backend import Window
from specdec.cache import CachedSequence, CacheGroup
from specdec.errors import InvalidArgumentError, NumericalError, UnsupportedModelError
from specdec.forward import ModuleForward, jit
from specdec.runner import ModelRunner, SequenceRows

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 97
PAGE = 4
# Of the root mean square of a row's logits; float32 sums in another order stay well below.
CLOSE = 5e-5

BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}


@dataclass(frozen=True)
class Case:
    """One model class with a tiny random configuration."""

    id: str
    stem: str  # of the class names
    forward: str  # which forward it must get: captured, module; or why it is refused
    options: dict[str, Any] = field(default_factory=dict)
    model_class: str = ""
    config_class: str = ""

    def build(self, **more: Any) -> PreTrainedModel:
        config_class = getattr(transformers, self.config_class or f"{self.stem}Config")
        model_class = getattr(transformers, self.model_class or f"{self.stem}ForCausalLM")
        return randomised(model_class, config_class(**{**BASE, **self.options, **more}))


def randomised(model_class: Callable[[Any], PreTrainedModel], config: Any) -> PreTrainedModel:
    """The model with weights large enough that attention, biases and sinks all matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        model.eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                else:
                    parameter.mul_(4)
    return model


SUPPORTED = [
    Case("llama", "Llama", "captured"),
    Case("llama-biases-mha", "Llama", "captured",
         {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    Case("mistral-sliding", "Mistral", "captured", {"sliding_window": 6}),
    Case("mixtral", "Mixtral", "module", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Case("qwen2", "Qwen2", "captured"),
    Case("qwen2-sliding", "Qwen2", "captured", SLIDING),
    Case("qwen3", "Qwen3", "captured", {"head_dim": 12}),
    # its mask for a window of 0 is made and used by no layer
    Case("qwen2_moe", "Qwen2Moe", "module",
         {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}),
    Case("qwen2_moe-sliding", "Qwen2Moe", "module",
         {**EXPERTS, **SLIDING, "num_experts": 4, "shared_expert_intermediate_size": 16}),
    Case("qwen3_moe", "Qwen3Moe", "module", {**EXPERTS, "num_experts": 4, "head_dim": 8}),
    Case("gemma", "Gemma", "captured", {"head_dim": 12}),
    # eager: transformers 5.17's own sdpa forward leaves the softcap out
    Case("gemma2-softcap-sliding", "Gemma2", "captured",
         {"head_dim": 12, "sliding_window": 6, "attn_logit_softcapping": 0.5,
          "attn_implementation": "eager"}),
    Case("gemma3-sliding", "Gemma3", "captured",
         {"head_dim": 12, "sliding_window": 6,
          "layer_types": ["sliding_attention", "full_attention"]},
         config_class="Gemma3TextConfig"),
    Case("phi", "Phi", "captured"),
    Case("phi3-sliding", "Phi3", "captured", {"sliding_window": 6}),
    Case("gpt2", "GPT2", "captured", model_class="GPT2LMHeadModel"),
    Case("gpt_neox", "GPTNeoX", "captured"),
    Case("gpt_oss-sinks-sliding", "GptOss", "module",
         {"head_dim": 12, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2,
          "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    Case("olmo", "Olmo", "captured"),
    Case("olmo2", "Olmo2", "captured"),
    Case("granite", "Granite", "captured",
         {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0}),
    Case("cohere", "Cohere", "captured"),
    Case("cohere2-sliding", "Cohere2", "captured",
         {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    Case("opt", "OPT", "captured", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Case("starcoder2-sliding", "Starcoder2", "captured", {"sliding_window": 6}),
    Case("stablelm", "StableLm", "captured"),
    Case("smollm3", "SmolLM3", "captured", {"use_sliding_window": False}),
    Case("llama4-chunked", "Llama4", "module",
         {"attention_chunk_size": 6, "head_dim": 8, "num_local_experts": 2,
          "intermediate_size_mlp": 48, "layer_types": ["chunked_attention", "full_attention"]},
         config_class="Llama4TextConfig"),
    Case("phimoe-sliding", "Phimoe", "module",
         {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # attention output that the model views, so it must be contiguous
    Case("afmoe-sliding", "Afmoe", "module",
         {**EXPERTS, "head_dim": 8, "sliding_window": 6, "num_experts": 4,
          "layer_types": ["sliding_attention", "full_attention"]}),
    # values of another size than keys
    Case("deepseek_v3-latent", "DeepseekV3", "module", {**EXPERTS, **LATENT}),
]  # fmt: skip

NO_INTERFACE = "does not attend through transformers' attention interface"
REFUSED = [
    Case("doge-dynamic-mask", "Doge", "cannot run on packed rows", {"sliding_window": 6}),
    Case("falcon", "Falcon", NO_INTERFACE,
         {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    Case("gptj", "GPTJ", NO_INTERFACE, {"rotary_dim": 4}),
    Case("bloom-alibi", "Bloom", NO_INTERFACE, {"n_head": 4}),
    Case("mpt-alibi", "Mpt", NO_INTERFACE, {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    # the last row of a path sees all of it either way: a difference shows one layer later
    Case("gemma3-bidirectional", "Gemma3", "model.layers.1.self_attn",
         {"head_dim": 12, "sliding_window": 6, "use_bidirectional_attention": True,
          "layer_types": ["sliding_attention", "full_attention"]},
         config_class="Gemma3TextConfig"),
    # attends twice per layer, with halves of its values
    Case("diffllama", "DiffLlama", "model.layers.0.self_attn"),
    Case("t5-encoder-decoder", "T5", "is an encoder-decoder; specdec needs a causal LM",
         {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
         model_class="T5ForConditionalGeneration"),
    Case("mamba-recurrent", "Mamba", "keeps a recurrent state",
         {"state_size": 4}),
    Case("jamba-recurrent", "Jamba", "keeps a recurrent state",
         {"mamba_d_state": 4, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}),
    Case("recurrent_gemma", "RecurrentGemma", "keeps a recurrent state", {"lru_width": 32}),
    Case("llama-without-head", "Llama", "no language-model head", model_class="LlamaModel"),
]  # fmt: skip


def by_id(cases: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.id for case in cases])


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return SUPPORTED[0].build()


@torch.no_grad()
def own_logits(model: PreTrainedModel, path: Sequence[int]) -> Tensor:
    """(len(path), V) from the model as it is outside specdec."""
    ids = torch.tensor([list(path)])
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[0].float()


def tree_logits(
    model: PreTrainedModel, prefix: Sequence[int], nodes: Sequence[int], parents: Sequence[int]
) -> Tensor:
    """(N, V): for each node the last row of the model's own forward on its path."""
    rows = []
    for node in range(len(nodes)):
        path: list[int] = []
        while node >= 0:
            path.insert(0, nodes[node])
            node = parents[node]
        rows.append(own_logits(model, [*prefix, *path])[-1])
    return torch.stack(rows)


def assert_same_logits(found: Tensor, wanted: Tensor, tolerance: float = CLOSE) -> None:
    assert found.shape == wanted.shape
    size = wanted.square().mean(-1).sqrt()
    assert float(size.min()) > 1e-3, "logits this small prove nothing"
    error = (found - wanted).abs().amax(-1) / size
    assert float(error.max()) <= tolerance


def tokens(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, VOCAB) for _ in range(count)]


def opened(runner: ModelRunner, *slots: int, scattered: bool = False) -> list[CachedSequence]:
    """Sequences in a group of their own; scattered: grown in turns, so that their pages mix."""
    group = CacheGroup(PAGE, 4096, runner.device)
    runner.join(group)
    if not scattered:
        return [group.open(count) for count in slots]
    caches = [group.open(1) for _ in slots]
    for size in range(PAGE, max(slots) + PAGE, PAGE):
        for cache, count in zip(caches, slots, strict=True):
            group.reserve(cache, min(size, count))
    assert not any(cache.table.contiguous for cache in caches)
    return caches


PARENTS = [-1, -1, 0, 0, 1, 2, 5, 6, 3]


@by_id(SUPPORTED)
def test_packed_tree_and_chain_equal_the_models_own_forward(case: Case) -> None:
    model = case.build()
    runner = ModelRunner(model)
    assert runner.forward_name == case.forward, runner.forward_note
    assert bool(runner.forward_note) == (case.forward == "module")
    long, short, nodes, more = tokens(19), tokens(7, 1), tokens(9, 2), tokens(4, 3)
    first, second = opened(runner, 40, 24, scattered=True)
    tree = SequenceRows(first, long, torch.tensor(nodes), PARENTS, keep=len(long) + len(nodes))
    chain = SequenceRows(second, short, torch.tensor(more), None, keep=len(more) + 1)
    found = runner.score([tree, chain])
    wanted = torch.cat((
        own_logits(model, long),
        tree_logits(model, long, nodes, PARENTS),
        own_logits(model, [*short, *more])[-5:],
    ))  # fmt: skip
    assert_same_logits(found, wanted)


@by_id(REFUSED)
def test_class_that_cannot_run_on_packed_rows_is_refused_by_name(case: Case) -> None:
    model = case.build()
    implementation = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError) as refusal:
        ModelRunner(model)
    assert type(model).__name__ in str(refusal.value)
    assert case.forward in str(refusal.value)
    assert model.config._attn_implementation == implementation
    assert STEP.get() is None


def test_something_else_than_a_transformers_model_is_wrong_usage() -> None:
    with pytest.raises(InvalidArgumentError, match="expected a transformers PreTrainedModel"):
        ModelRunner(nn.Linear(2, 2))  # type: ignore[arg-type]


# A model that a packed pass would get wrong must be refused, and the place named.


class RowCounting(LlamaForCausalLM):
    """Numbers its rows itself, whatever positions it is given."""

    def forward(self, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if position_ids is not None:
            position_ids = torch.arange(position_ids.shape[1])[None]
        return super().forward(*args, position_ids=position_ids, **kwargs)


def mix_rows(_module: nn.Module, _inputs: object, output: Any) -> Any:
    """A hook through which every row sees the rows before it, in or out of its path."""
    first = output[0] if isinstance(output, tuple) else output
    mixed = first + first.cumsum(1).roll(1, 1)
    return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


def test_model_that_numbers_its_own_rows_is_refused() -> None:
    model = randomised(RowCounting, LlamaConfig(**BASE))
    with pytest.raises(UnsupportedModelError, match=r"RowCounting.*model\.layers\.0\.self_attn"):
        ModelRunner(model)


def test_attention_that_ignores_the_mask_is_refused(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specdec.backend.additive", lambda *_: None)
    monkeypatch.setattr(runner_module, "_PREPARED", {})
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaForCausalLM.*first bad layer: model\.layers\.0\.self_at"
    ):
        ModelRunner(llama)


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("model.layers.0.self_attn", r"model\.layers\.0\.self_attn"),
        ("model.layers.1.self_attn", r"model\.layers\.1\.self_attn"),
        ("model.norm", "none of the attention layers"),
    ],
)
def test_first_bad_layer_is_named(place: str, named: str) -> None:
    model = SUPPORTED[0].build()
    model.get_submodule(place).register_forward_hook(mix_rows)
    with pytest.raises(UnsupportedModelError, match=f"first bad layer: {named}"):
        ModelRunner(model)


class FixedWindow(MistralForCausalLM):
    """Has a window that its configuration cannot shorten."""

    def __init__(self, config: Any) -> None:
        config.sliding_window = 100
        super().__init__(config)


def test_long_window_that_cannot_be_shortened_for_the_proof_is_refused() -> None:
    model = randomised(FixedWindow, transformers.MistralConfig(**BASE))
    with pytest.raises(UnsupportedModelError, match="window of 100 positions cannot be shortened"):
        ModelRunner(model)


def test_window_longer_than_the_proof_is_proved_on_a_short_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The window is wrong by one position only beyond 24, where the model's own proof ends."""
    first_visible = Window.first_visible

    def wrong(window: Window, positions: Tensor) -> Tensor:
        first: Tensor = first_visible(window, positions)
        return first + (positions >= window.size).long()

    monkeypatch.setattr(Window, "first_visible", wrong)
    model = SUPPORTED[2].build(sliding_window=24)
    with pytest.raises(UnsupportedModelError, match=r"first bad layer: model\.layers\.0"):
        ModelRunner(model)


# The wrapped model stays what it was.


def test_wrapping_and_generating_leave_the_model_bit_equal() -> None:
    model: Any = SUPPORTED[0].build()
    draft = SUPPORTED[0].build(num_hidden_layers=1)
    ids = torch.tensor([tokens(9)])

    def state() -> dict[str, Any]:
        with torch.no_grad():
            generated = model.generate(ids, max_new_tokens=8, do_sample=False)
            logits = model(ids).logits
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        return {"logits": logits, "generated": generated, **weights}

    before, modules = state(), {name: set(vars(m)) for name, m in model.named_modules()}
    spec = specdec.wrap(model, draft=draft)
    out = spec.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(out, before["generated"])
    after = state()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert modules == {name: set(vars(m)) for name, m in model.named_modules()}
    assert model.config._attn_implementation == "sdpa"


def test_attention_implementation_returns_after_a_forward_that_raises(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        assert llama.config._attn_implementation == "specdec_over_sdpa"
        raise ZeroDivisionError

    monkeypatch.setattr(llama.get_submodule("model.norm"), "forward", fail)
    rows = torch.arange(3)
    with pytest.raises(ZeroDivisionError):
        ModuleForward(llama)(rows[None], rows[None], rows, Recorder())
    assert llama.config._attn_implementation == "sdpa"
    assert STEP.get() is None


def test_eager_attention_is_restored_too() -> None:
    model = SUPPORTED[0].build(attn_implementation="eager")
    before = own_logits(model, tokens(9))
    ModelRunner(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(own_logits(model, tokens(9)), before)


# One model, several runners; weights that change.


def test_second_runner_shares_the_preparation(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ModelRunner(llama)

    def proved_again(*_: object) -> None:
        raise AssertionError("the model was proved a second time")

    monkeypatch.setattr(runner_module, "prove", proved_again)
    second = ModelRunner(llama)
    prompt = tokens(9)
    scores = [
        runner.score([SequenceRows(opened(runner, 16)[0], prompt, keep=1)])
        for runner in (first, second)
    ]
    assert torch.equal(scores[0], scores[1])


def write_in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(-1)


def replace_data(weight: nn.Parameter) -> None:
    weight.data = -weight.data


@pytest.mark.parametrize("change", [write_in_place, replace_data])
@pytest.mark.parametrize("name", ["lm_head", "model.layers.1.self_attn.q_proj"])
def test_refresh_takes_up_changed_weights(
    name: str, change: Callable[[nn.Parameter], None]
) -> None:
    model, prompt = SUPPORTED[0].build(), tokens(9)
    runner = ModelRunner(model)
    [cache] = opened(runner, 16)
    before = runner.score([SequenceRows(cache, prompt, keep=9)])
    change(model.get_submodule(name).weight)  # type: ignore[arg-type]
    runner.refresh()
    cache.computed.clear()
    after = runner.score([SequenceRows(cache, prompt, keep=9)])
    assert float((after - before).abs().max()) > 0.01
    assert_same_logits(after, own_logits(model, prompt))


def test_refresh_without_a_change_prepares_nothing(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = ModelRunner(llama)
    monkeypatch.setattr(runner_module, "_prepare", None)
    runner.refresh()


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
def test_released_weights_free_their_bytes_and_score_the_same(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(jit, "why_not", lambda: "not in this test")
    vocab = 8208  # lm_head is large enough for oneDNN to pay in float32, nothing else is
    model, prompt = SUPPORTED[0].build(vocab_size=vocab), tokens(9)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    bytes_of_all = sum(m.weight.nbytes for m in linears)
    runner = ModelRunner(model)
    [cache] = opened(runner, 16)
    before = runner.score([SequenceRows(cache, prompt, keep=9)])
    freed = bytes_of_all if compiled and not jit.why_not() else vocab * 32 * 4
    assert runner.release_weights() == freed
    assert model.get_submodule("lm_head").weight.numel() == 0  # type: ignore[operator]
    runner.refresh()
    cache.computed.clear()
    assert torch.equal(runner.score([SequenceRows(cache, prompt, keep=9)]), before)


def test_released_weights_leave_a_tied_embedding_alone() -> None:
    model, prompt = SUPPORTED[0].build(vocab_size=8208, tie_word_embeddings=True), tokens(9)
    wanted = own_logits(model, prompt)
    runner = ModelRunner(model)
    runner.release_weights()
    assert model.get_submodule("lm_head").weight.numel() == 8208 * 32  # type: ignore[operator]
    [cache] = opened(runner, 16)
    found = runner.score([SequenceRows(cache, prompt, keep=9)])
    assert_same_logits(found, wanted)


# Scoring.


@by_id([SUPPORTED[0], SUPPORTED[2], SUPPORTED[11]])
@pytest.mark.parametrize("scattered", [False, True], ids=["contiguous", "scattered"])
def test_scoring_in_several_calls_equals_scoring_at_once(case: Case, scattered: bool) -> None:
    model, prompt, nodes = case.build(), tokens(23), tokens(9, 2)
    runner = ModelRunner(model)
    cache, other = opened(runner, 40, 40, scattered=scattered)
    at_once = runner.score([SequenceRows(other, prompt, torch.tensor(nodes), PARENTS, keep=11)])
    assert runner.score([SequenceRows(cache, prompt[:14])]).shape == (0, VOCAB)
    assert cache.computed_len(runner) == 14
    single = runner.score([SequenceRows(cache, prompt[14:15], keep=1)])
    chain = runner.score([SequenceRows(cache, [], torch.tensor(prompt[15:22]), None, keep=1)])
    assert cache.computed_len(runner) == 22
    tree = runner.score([SequenceRows(cache, prompt[22:], torch.tensor(nodes), PARENTS, keep=10)])
    assert cache.computed_len(runner) == 32
    assert_same_logits(torch.cat((chain, tree)), at_once)
    assert_same_logits(single, own_logits(model, prompt[:15])[-1:])
    assert_same_logits(tree[1:], tree_logits(model, prompt, nodes, PARENTS))


@by_id([SUPPORTED[0], SUPPORTED[2], SUPPORTED[11], SUPPORTED[17], SUPPORTED[27]])
def test_prompt_of_more_rows_than_one_mask_word(case: Case) -> None:
    model = case.build()
    prompt, nodes = tokens(100), tokens(9, 2)
    runner = ModelRunner(model)
    [cache] = opened(runner, 120)
    found = runner.score([SequenceRows(cache, prompt, torch.tensor(nodes), PARENTS, keep=109)])
    wanted = torch.cat((own_logits(model, prompt), tree_logits(model, prompt, nodes, PARENTS)))
    assert_same_logits(found, wanted)


def test_tree_grows_from_the_slots_of_its_chain(llama: PreTrainedModel) -> None:
    """Drafted rows scored level by level, as a draft does, equal the tree scored at once."""
    runner, prompt = ModelRunner(llama), tokens(9)
    [cache] = opened(runner, 16)
    runner.score([SequenceRows(cache, prompt, keep=1)])
    level = runner.score([SequenceRows(cache, [], torch.tensor([5, 6]), [-1, -1], keep=2)])
    assert_same_logits(level, tree_logits(llama, prompt, [5, 6], [-1, -1]))


def test_rows_without_logits_are_computed_all_the_same(llama: PreTrainedModel) -> None:
    runner, prompt = ModelRunner(llama), tokens(9)
    silent, loud = opened(runner, 16, 16)
    found = runner.score(
        [SequenceRows(silent, prompt[:5], keep=0), SequenceRows(loud, prompt, keep=2)]
    )
    assert_same_logits(found, own_logits(llama, prompt)[-2:])
    rest = runner.score([SequenceRows(silent, prompt[5:], keep=4)])
    assert_same_logits(rest, own_logits(llama, prompt)[-4:])


# Contexts in which a pass depends on more than each row's own path.


def test_context_ends_where_longrope_would_change_the_whole_pass() -> None:
    factors = [1.0, 2.0, 3.0, 4.0]
    rope = {
        "rope_type": "longrope", "short_factor": factors, "long_factor": factors[::-1],
        "rope_theta": 1e4, "original_max_position_embeddings": 40,
    }  # fmt: skip
    model = Case("", "Phi3", "").build(
        rope_parameters=rope, original_max_position_embeddings=40, sliding_window=None
    )
    runner = ModelRunner(model)
    assert runner.max_positions == 40
    [cache] = opened(runner, 40)
    found = runner.score([SequenceRows(cache, tokens(40), keep=40)])
    assert_same_logits(found, own_logits(model, tokens(40)))
    assert float((own_logits(model, tokens(41))[:40] - found).abs().max()) > 0.01


def test_context_ends_where_llama4_would_count_rows_for_positions() -> None:
    model = SUPPORTED[27].build(attn_temperature_tuning=True, floor_scale=30, attn_scale=2.0)
    runner, prompt = ModelRunner(model), tokens(29)
    assert runner.max_positions == 29
    [cache] = opened(runner, 32)
    runner.score([SequenceRows(cache, prompt[:20])])
    found = runner.score([SequenceRows(cache, prompt[20:], keep=9)])
    assert_same_logits(found, own_logits(model, prompt)[-9:])


def test_planted_wrong_position_is_seen_by_these_tests(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above is not blind: one row attending to one slot too many fails it."""
    runner, prompt = ModelRunner(llama), tokens(9)
    [cache] = opened(runner, 16)
    bias = Step._bias

    def leaky(step: Step, *args: Any) -> Tensor | None:
        result = bias(step, *args)
        if result is not None:
            result[3, 5] = 0.0
        return result

    monkeypatch.setattr(Step, "_bias", leaky)
    found = runner.score([SequenceRows(cache, prompt, keep=9)])
    with pytest.raises(AssertionError):
        assert_same_logits(found, own_logits(llama, prompt))


def test_model_whose_own_logits_are_nan_is_named_as_that() -> None:
    model = SUPPORTED[0].build()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="LlamaForCausalLM: its own logits hold NaN"):
        ModelRunner(model)


def test_runner_serves_one_engine(target: LlamaForCausalLM) -> None:
    """Block tables of one cache group say nothing in another's memory."""
    runner = ModelRunner(target)
    runner.join(CacheGroup(16, 64, torch.device("cpu")))
    with pytest.raises(InvalidArgumentError, match="belongs to an engine already"):
        runner.join(CacheGroup(16, 64, torch.device("cpu")))
