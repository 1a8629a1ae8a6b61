"""wrap(): transformers' own generate, with every step speculated.

Input preparation, logits processors and stopping criteria stay transformers' own: generation goes
through generate(custom_generate=...), and only the decoding loop is ours.
"""

import copy
from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.engine import Engine, fresh_seed
from specdec.errors import InvalidArgumentError
from specdec.rng import derive_seed
from specdec.sampling import Law, Paths, Prefix
from specdec.sequence import Sequence, StopCheck
from specdec.stats import RunStats

# Ways of decoding that transformers would choose by these, were the loop not ours.
_REFUSED_MODES = ("penalty_alpha", "dola_layers", "prompt_lookup_num_tokens")
_REFUSED_OUTPUTS = ("output_attentions", "output_hidden_states")
# Processors that look at the number of a row in transformers' batch, and the argument behind them.
_BY_ROW: dict[type, str] = {
    PrefixConstrainedLogitsProcessor: "prefix_allowed_tokens_fn",
    EncoderRepetitionPenaltyLogitsProcessor: "encoder_repetition_penalty",
    EncoderNoRepeatNGramLogitsProcessor: "encoder_no_repeat_ngram_size",
}
_REFUSED_ARGUMENTS = {
    "position_ids": "specdec counts positions from the attention mask",
    "assistant_model": "the draft is given to specdec.wrap(target, draft=...)",
    "inputs_embeds": "specdec drafts tokens, so it needs input_ids",
    "negative_prompt_ids": "classifier-free guidance runs a second model inside",
    "past_key_values": "specdec keeps its own paged cache",
}


@dataclass
class SpecOutput(GenerateDecoderOnlyOutput):
    """transformers' output of generate, with what speculation did in `stats`."""

    stats: RunStats | None = None


class SpecModel:
    """A wrapped target: generate() as transformers', and callable as its custom_generate."""

    def __init__(self, target: PreTrainedModel, engine: Engine) -> None:
        self.target, self.engine = target, engine
        self.last_stats: RunStats | None = None

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        streamer: Any = None,
        tokenizer: Any = None,
        stop_strings: str | list[str] | None = None,
        stopping_criteria: Any = None,
        generation_config: GenerationConfig | None = None,
        seed: int | list[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' generate, same arguments and output; the law of the output is unchanged.

        seed: one 64-bit seed, or one per row; None draws one from torch's global generator. Raises
        InvalidArgumentError, by name, for what speculation cannot do: num_beams > 1,
        assistant_model, inputs_embeds, output_attentions/hidden_states, negative_prompt_ids, a
        filled past_key_values, a logits processor whose state drafts would corrupt.

        output_scores and output_logits, with return_dict_in_generate, give one (rows, V) float32
        tensor per generated token: the target's processed scores, whose softmax is the law that the
        token follows, and its raw logits. Rows that are over hold zeros there.
        """
        for name, reason in _REFUSED_ARGUMENTS.items():
            if kwargs.get(name) is not None:
                raise InvalidArgumentError(f"{name}: {reason}; leave it out")
        criteria = StoppingCriteriaList(stopping_criteria or [])
        defaults = self.target.generation_config.stop_strings
        if stop_strings is None and generation_config is not None:
            stop_strings = generation_config.stop_strings
        stop_strings = stop_strings if stop_strings is not None else defaults
        if stop_strings:
            if tokenizer is None:
                raise InvalidArgumentError("stop_strings needs tokenizer=<the model's tokenizer>")
            criteria.append(StopStringCriteria(tokenizer, stop_strings))
            # transformers would ask for the tokenizer again, which its hook does not pass on
            if defaults is not None:
                kwargs["stop_strings"] = None
            if generation_config is not None:
                generation_config = copy.deepcopy(generation_config)
                generation_config.stop_strings = None
        return self.target.generate(  # type: ignore[operator]
            inputs,
            generation_config=generation_config,
            stopping_criteria=criteria,
            custom_generate=_Bound(self, streamer),
            seed=seed,
            **kwargs,
        )

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        seed: int | list[int] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """transformers' custom_generate hook: model.generate(..., custom_generate=spec).

        The hook passes on no streamer: stream through spec.generate.
        """
        return self.run(
            model, input_ids, logits_processor, stopping_criteria, generation_config, seed,
            model_kwargs, None,
        )  # fmt: skip

    def run(
        self, model: PreTrainedModel, input_ids: Tensor, logits_processor: Any,
        stopping_criteria: Any, config: GenerationConfig, seed: int | list[int] | None,
        model_kwargs: dict[str, Any], streamer: Any,
    ) -> Any:  # fmt: skip
        """The decoding loop on inputs that transformers has prepared."""
        if model is not self.target:
            raise InvalidArgumentError(
                f"custom_generate: this spec wraps another {type(self.target).__name__}; wrap the "
                "model that you generate with"
            )
        _check_request(config, model_kwargs, logits_processor, input_ids.shape[0])
        self.engine.refresh()
        self.engine.stats = RunStats(lossless=self.engine.stats.lossless)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))
        paddings = [input_ids.shape[1] - len(prompt) for prompt in prompts]
        stops = _Stops(stopping_criteria)
        law = Law(
            _for_any_row(logits_processor, paddings),
            greedy=not config.do_sample,
            eos_token_ids=stops.eos_token_ids,
        )
        samples = config.num_return_sequences or 1
        keeps_logits = bool(
            config.return_dict_in_generate and (config.output_scores or config.output_logits)
        )
        seeds = _row_seeds(seed, input_ids.shape[0] // samples, samples)
        rows: list[Sequence] = []
        try:
            for row, (prompt, padding) in enumerate(zip(prompts, paddings, strict=True)):
                rows.append(
                    self.engine.admit(
                        f"row-{row}", 0, prompt, law, seeds[row],
                        stops.max_length - input_ids.shape[1], stops.eos_token_ids,
                        stops.check(input_ids[row, :padding].tolist(), input_ids.device),
                        left_padding=padding,
                    )
                )  # fmt: skip
                rows[-1].logits = [] if keeps_logits else None
            while self.engine.scheduler.running:
                for record in self.engine.step():
                    for token in record.tokens if streamer is not None else ():
                        streamer.put(torch.tensor([token]))
            if streamer is not None:
                streamer.end()
        finally:
            self.engine.abort_all()
            self.engine.take_finished()
            self.last_stats = self.engine.stats
            self.last_stats.slow_processors = law.slow_processors
        sequences = _collect(input_ids, rows, config)
        if not config.return_dict_in_generate:
            return sequences
        return SpecOutput(  # transformers types its tuples as if they held one tensor
            sequences=sequences,  # type: ignore[arg-type]
            scores=_per_token(rows, config.output_scores, law.scores),  # type: ignore[arg-type]
            logits=_per_token(rows, config.output_logits, _raw),  # type: ignore[arg-type]
            stats=self.last_stats,
        )


class _Bound:
    """A SpecModel with the streamer that transformers' hook would not pass on."""

    def __init__(self, spec: SpecModel, streamer: Any) -> None:
        self.spec, self.streamer = spec, streamer

    def __call__(
        self, model: PreTrainedModel, input_ids: Tensor, logits_processor: Any,
        stopping_criteria: Any, generation_config: GenerationConfig,
        seed: int | list[int] | None = None, **model_kwargs: Any,
    ) -> Any:  # fmt: skip
        return self.spec.run(
            model, input_ids, logits_processor, stopping_criteria, generation_config, seed,
            model_kwargs, self.streamer,
        )  # fmt: skip


class _Stops:
    """transformers' stopping criteria: length and end tokens read off, the rest called."""

    def __init__(self, criteria: Any) -> None:
        self.max_length = 1 << 62
        self.eos_token_ids: tuple[int, ...] = ()
        self._others: list[Callable[..., Any]] = []
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                self.max_length = min(self.max_length, int(criterion.max_length))
            elif isinstance(criterion, EosTokenCriteria):
                self.eos_token_ids += tuple(criterion.eos_token_id.flatten().tolist())
            else:
                self._others.append(criterion)

    def check(self, padding: list[int], device: torch.device) -> StopCheck | None:
        """Whether one of the other criteria ends a row with this left padding."""
        if not self._others:
            return None

        def stop(tokens: list[int]) -> bool:
            ids = torch.tensor([[*padding, *tokens]], device=device)
            return any(bool(torch.as_tensor(c(ids, None)).all()) for c in self._others)

        return stop


def stop_check(tokenizer: Any, strings: Items[str]) -> StopCheck | None:
    """Ends a sequence with the token that completes one of the strings."""
    if not strings:
        return None
    return _Stops([StopStringCriteria(tokenizer, list(strings))]).check([], torch.device("cpu"))


def _prompts(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Each row's tokens without its padding."""
    rows: list[list[int]] = input_ids.tolist()
    if mask is None:
        return rows
    kept = mask.bool().tolist()
    return [
        [token for token, keep in zip(row, keeps, strict=True) if keep]
        for row, keeps in zip(rows, kept, strict=True)
    ]


def _for_any_row(processors: Items[Any], paddings: list[int]) -> list[Any]:
    """The processors, less what in them belongs to one row of the batch.

    transformers' repetition penalty holds each row's padding, which our paths do not have.
    """
    shared = []
    for processor in processors:
        ignored = getattr(processor, "prompt_ignore_length", None)
        if isinstance(ignored, Tensor):
            if ignored.tolist() != paddings:
                raise InvalidArgumentError(
                    f"{type(processor).__name__}: prompt_ignore_length={ignored.tolist()}: "
                    "expected one number for all rows"
                )
            processor = RepetitionPenaltyLogitsProcessor(processor.penalty)
        shared.append(processor)
    return shared


def _row_seeds(seed: int | list[int] | None, prompts: int, samples: int) -> list[int]:
    if isinstance(seed, (list, tuple)):
        if len(seed) != prompts:
            raise InvalidArgumentError(
                f"seed: expected one number, or one per prompt ({prompts}); got {len(seed)}"
            )
        return [derive_seed(s, 0, j) for s in seed for j in range(samples)]
    whole = fresh_seed() if seed is None else seed
    return [derive_seed(whole, i, j) for i in range(prompts) for j in range(samples)]


def _check_request(
    config: GenerationConfig, model_kwargs: dict[str, Any], processors: Any, rows: int
) -> None:
    """Refuses by name what the loop cannot honour."""
    if (config.num_beams or 1) > 1:
        raise InvalidArgumentError(
            f"num_beams={config.num_beams}: expected 1; beams are not drafted"
        )
    for name in (*_REFUSED_OUTPUTS, *_REFUSED_MODES):
        if getattr(config, name, None):
            raise InvalidArgumentError(
                f"{name}={getattr(config, name)!r} is not supported: leave it out"
            )
    if model_kwargs.get("inputs_embeds") is not None:
        raise InvalidArgumentError(f"inputs_embeds: {_REFUSED_ARGUMENTS['inputs_embeds']}")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise InvalidArgumentError(f"past_key_values: {_REFUSED_ARGUMENTS['past_key_values']}")
    for processor in processors if rows > 1 else ():
        if type(processor) in _BY_ROW:
            raise InvalidArgumentError(
                f"{_BY_ROW[type(processor)]}: expected a batch of one prompt, got {rows} rows"
            )


def _collect(input_ids: Tensor, rows: list[Sequence], config: GenerationConfig) -> Tensor:
    """(B, L + longest) prompts and generated tokens, padded on the right like transformers'."""
    longest = max((row.generated for row in rows), default=0)
    pad = config._pad_token_tensor
    fill = 0 if pad is None else int(pad)
    tail = input_ids.new_full((len(rows), longest), fill)
    for index, row in enumerate(rows):
        generated = row.tokens[row.prompt_len :]
        tail[index, : len(generated)] = torch.tensor(generated, device=input_ids.device)
    return torch.cat((input_ids, tail), dim=1)


def _per_token(
    rows: Items[Sequence], wanted: bool | None,
    scored: Callable[[Tensor, Callable[[], Paths]], Tensor],
) -> tuple[Tensor, ...] | None:  # fmt: skip
    """One (B, V) tensor per generated token, as transformers returns scores and logits, if wanted.

    transformers goes on computing rows that are over; here they hold zeros.
    """
    if not wanted:
        return None
    longest = max(row.generated for row in rows)
    columns: list[Tensor] = []
    for index, row in enumerate(rows):
        prompt = Prefix(row.tokens[: row.prompt_len], row.prompt_len, row.left_padding)
        generated = row.tokens[row.prompt_len :]
        logits = torch.cat(row.logits or [])
        drafted = torch.tensor(generated, device=logits.device)
        lines = [(0, range(count)) for count in range(len(generated))]
        scores = scored(logits, partial(Paths.of, [prompt], drafted, lines))
        if not columns:
            columns = [scores.new_zeros(len(rows), scores.shape[1]) for _ in range(longest)]
        for column, its_scores in zip(columns, scores, strict=False):
            column[index] = its_scores
    return tuple(columns)


def _raw(logits: Tensor, _: Callable[[], Paths]) -> Tensor:
    return logits.float()


def wrap(target: PreTrainedModel, **options: Any) -> SpecModel:
    """Makes a transformers causal LM generate speculatively, with the same output law.

        spec = specdec.wrap(target, draft=small)
        out = spec.generate(**inputs, max_new_tokens=128, return_dict_in_generate=True)
        out.sequences; out.stats

    target is proved once to run exactly on packed rows (UnsupportedModelError otherwise) and is
    itself left as it was. Options, all by keyword:

    draft: a small model, or a list of them: an ensemble. With a tokenizer of its own, both are
        needed: proposer_options={"tokenizer": the target's, "draft_tokenizer": the draft's}.
    proposer: a name (specdec.proposers.names()), or a Proposer; default: "draft" with a draft,
        plain decoding without. A list of those is an ensemble: its members draft into one tree
        under one budget, and those that need a draft take the models of draft in order.
        "ensemble" is the list of "draft" per model and "ngram".
    tree: the draft proposes a tree, its number of children per level: (3, 2, 1) has 3 + 6 + 6
        nodes. Under policy="auto" that is the largest one: a step drafts its first levels, all or
        none; "constant" drafts all of it in every step. proposer_options={"kind": ...} says what
        siblings are: "without_replacement" draws, "iid" draws, the "top_k" tokens, or "coupled"
        with the target's own noise.
    verification: "auto" or a name in specdec.acceptance.RULES.
    num_draft_tokens: tokens drafted per step, of a tree its whole levels that fit; or "auto". A
        policy with a name of its own starts from this number ("heuristic") or stays below it.
    policy: "auto": the number, where one is given, else what measured costs and the acceptance so
        far make quickest, down to nothing ("cost"): a length; of a shape (tree, or the options
        tree, shape, nodes, width) how many levels; of a "dynamic_tree" all of it or nothing.
        "constant": the number or the whole shape; "heuristic" (transformers' schedule),
        "confidence" (until a drafted token is unlikely), or a specdec.policy.Policy. Costs are
        measured once per machine and models, in about two seconds, and kept in ~/.cache/specdec
        (SPECDEC_CACHE); where there is no room to measure them, a shape is drafted whole.
    draft_window: the draft looks at so many tokens back, and at the first few, in a cache of its
        own that grows no further; the target always sees everything. At least 16.
    lossy: must be True for a rule that changes the law.
    proposer_options: keywords of the proposer that a name or a draft makes; of a list, a mapping
        per member, by its name ({"ngram": {"branches": 2}}; "draft-1", "draft-2" where one name is
        there twice), and shares: proportions of the budget by those names. For a draft model
        temperature, top_k, top_p, min_p: what the draft samples with where it differs from the
        target; processors=False: the target's logits processors do not act on the draft. With two
        tokenizers vocabulary: "shared" drafts the tokens that both have, from the draft's law on
        them; "text" drafts text, which the target's tokenizer encodes; "auto" chooses.
    kv_memory: bytes that the caches of all models may take; the pool grows up to it on demand.
    release_weights: drop the originals of weights that packed copies stand in for; the target's
        own forward and state_dict() stop working.
    """
    return SpecModel(target, Engine(target, grow=True, **options))
