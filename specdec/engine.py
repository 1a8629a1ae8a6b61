"""The step loop: propose, verify, commit, observe. Everything that generates runs on it."""

import time
from collections.abc import Iterator, Sequence as Items
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from specdec import proposers
from specdec.acceptance import RULES
from specdec.cache import CacheGroup, pages_for_memory
from specdec.costs import StepCosts
from specdec.errors import InvalidArgumentError
from specdec.forward import one_thread
from specdec.policy import Policy, make_policy, planned
from specdec.profiling import Profiler, Report, silent
from specdec.proposers import (
    DraftModelProposer,
    DraftTreeProposer,
    EnsembleProposer,
    Proposer,
)
from specdec.proposers.checked import check_proposer, checked, join
from specdec.proposers.text import by_vocabulary
from specdec.rng import Noise, PhiloxNoise, derive_seed
from specdec.runner import ModelRunner, Runner
from specdec.sampling import Law, SamplingParams, SharedLaws
from specdec.scheduler import Scheduler
from specdec.sequence import Sequence, StopCheck
from specdec.shapes import expansion
from specdec.stats import RunStats, StepRecord
from specdec.tree import TokenTree
from specdec.verifier import Verifier

PAGE_SIZE = 16
# The rules that need or gain most from one way of drafting: its kind, by rule and proposer.
_KINDS = {
    "gumbel": dict.fromkeys(("draft", "tree", "dynamic_tree"), "coupled"),
    "kseq": {"tree": "iid"},
}
# Up to here torch's operators around the compiled kernels are too small for a second thread.
_LIGHT_ROWS, _LIGHT_LOGITS = 32, 1 << 19
_DEFAULT_KV_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One finished sample of a request."""

    id: str
    index: int
    token_ids: tuple[int, ...]  # generated, without the prompt
    finish_reason: str  # "stop", "length" or "abort"
    stats: RunStats


class Engine:
    """Serves any number of requests over one target; each step() advances all of them.

    The tokens of a request are distributed exactly as the target alone would sample them, whatever
    the draft proposes and whoever else is in the batch. Arguments as in specdec.wrap; the page pool
    is allocated here, at once (`grow=True`: on demand, up to kv_memory).
    """

    def __init__(
        self,
        target: PreTrainedModel | Runner,
        *,
        draft: Any = None,
        proposer: str | Proposer | Items[str | Proposer] | None = None,
        verification: str = "auto",
        num_draft_tokens: int | Literal["auto"] = "auto",
        tree: Items[int] | None = None,
        policy: str | Policy = "auto",
        draft_window: int | None = None,
        lossy: bool = False,
        kv_memory: int | None = None,
        release_weights: bool = False,
        proposer_options: dict[str, Any] | None = None,
        grow: bool = False,
        noise: Noise | None = None,
    ) -> None:
        if not lossy and verification in RULES and not RULES[verification].lossless:
            raise InvalidArgumentError(
                f"verification={verification!r} changes what the target says; pass lossy=True "
                "(--lossy) to accept that"
            )
        self.target = _runner(target)
        options = dict(proposer_options or {})
        if tree is not None:
            proposer = _tree_proposer(proposer, tree, num_draft_tokens, options)
        self.proposer = _make_proposer(
            proposer, draft, self.target, verification, options, draft_window
        )
        if self.proposer is not None:
            check_proposer(self.proposer)
        # a draft with side branches fills more slots than it can add tokens
        self._spare_slots = self.proposer.spare_slots if self.proposer is not None else 0
        preferred = self.proposer.preferred_nodes if self.proposer is not None else None
        if policy == "constant" and num_draft_tokens == "auto" and preferred:
            num_draft_tokens = preferred
        if draft_window is not None and isinstance(policy, str):
            is_alone = not isinstance(self.proposer, EnsembleProposer)
            most = preferred if is_alone and num_draft_tokens == "auto" else num_draft_tokens
            _check_window(draft_window, most)
        self.policy = make_policy(policy, num_draft_tokens)
        self.noise = noise or PhiloxNoise()
        self.group = CacheGroup(PAGE_SIZE, 0, self.target.device)
        rule = verification
        if rule == "auto" and self.proposer is not None and self.proposer.law == "coupled":
            rule = "gumbel"
        self.verifier = Verifier(self.target, self.group, rule, drafts=self.proposer is not None)
        if self.proposer is not None:
            if self.proposer.free and self.proposer.law != "point":
                raise InvalidArgumentError(
                    f"proposer={self.proposer.name!r} is free and its law {self.proposer.law!r}: "
                    "expected 'point', as drawn tokens may not be cut"
                )
            join(self.proposer, self.group, self.target.vocab_size)
            # measured costs of a proposer object are not kept: nobody knows its options
            parts = proposer if isinstance(proposer, (list, tuple)) else [proposer]
            unknown = any(isinstance(part, Proposer) for part in parts)
            named = "" if unknown else repr((*parts, draft_window, options))
            self._profiler = Profiler(self.verifier, self.proposer, self.groups, self.noise, named)
            coupled = self.verifier.rule == "gumbel"
            self.policy.join(self.proposer, self._profiler, lambda s: coupled or s.law.greedy)
        self._divide_memory(_DEFAULT_KV_BYTES if kv_memory is None else kv_memory, grow)
        if release_weights and isinstance(self.target, ModelRunner):
            self.target.release_weights()
        self.scheduler = Scheduler()
        self.stats = RunStats(lossless=verification == "auto" or RULES[verification].lossless)
        self._requests = 0
        self._laws = SharedLaws()
        self._finished: list[Sequence] = []

    def _divide_memory(self, kv_memory: int, grow: bool) -> None:
        """As many pages for each group: no draft needs more of them than its target, so that it is
        never the draft's that run out."""
        memories = [memory for group in self.groups for memory in group.memory.values()]
        slot_bytes = sum(memory.slot_bytes for memory in memories) or 1
        for group in self.groups:
            group.max_pages = pages_for_memory(kv_memory, PAGE_SIZE, slot_bytes)
            if not grow:
                group.allocate(group.max_pages)

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        """Every cache group: the target's, then those that drafts have to themselves."""
        return (self.group, *(self.proposer.groups if self.proposer is not None else ()))

    def step_costs(
        self, sampling: SamplingParams, *, batch: int = 1, max_depth: int = 16,
        context: int | None = None, fresh: bool = False, report: Report = silent,
    ) -> StepCosts | None:  # fmt: skip
        """Measured seconds of a step of `batch` sequences, by drafted depth, from the cache of
        measured costs where they are known; None without a proposer, and where the cache has no
        room to measure them.

        context: tokens of each sequence, and the costs hold there only; None: of a short one, with
        what further tokens add. fresh: measured now and kept nowhere. report: called with what
        share of the measuring is done.
        """
        if self.proposer is None:
            return None
        law = sampling.law()
        return self._profiler.costs(
            law, batch, max_depth, context=context, fresh=fresh, report=report
        )

    def check_integrity(self) -> None:
        """Raises AssertionError unless every cache group is in order."""
        for group in self.groups:
            group.check_integrity()

    @property
    def max_positions(self) -> int | None:
        """Longest context of the target."""
        return self.target.max_positions

    def add_request(
        self,
        input_ids: Items[int] | torch.Tensor,
        sampling: SamplingParams,
        *,
        n: int = 1,
        seed: int | None = None,
        stop: StopCheck | None = None,
        request_id: str | None = None,
    ) -> str:
        """Admits a prompt and returns the request's id.

        stop: called after every emitted token with all tokens so far, prompt included; True ends
        the sequence there. Sample j uses derive_seed(seed, 0, j); sample 0 the seed itself.
        """
        tokens = _one_prompt(input_ids)
        if n < 1:
            raise InvalidArgumentError(f"n={n}: expected at least 1")
        self._requests += 1
        name = request_id if request_id is not None else f"request-{self._requests}"
        if any(s.request_id == name for s in self.scheduler.running):
            raise InvalidArgumentError(
                f"request_id={name!r} is running already: expected a new one"
            )
        law = self._laws.of(sampling)
        seed = fresh_seed() if seed is None else seed
        seeds = [derive_seed(seed, 0, index) for index in range(n)]
        admitted: list[Sequence] = []
        try:
            for index, its_seed in enumerate(seeds):
                admitted.append(
                    self.admit(
                        name, index, tokens, law, its_seed, sampling.max_new_tokens,
                        sampling.eos_token_ids, stop,
                    )
                )  # fmt: skip
        except BaseException:  # all samples or none
            for sequence in admitted:
                self._withdraw(sequence)
            raise
        return name

    def admit(
        self, request_id: str, index: int, prompt: list[int], law: Law, seed: int,
        max_new_tokens: int, eos_token_ids: Items[int], stop: StopCheck | None,
        left_padding: int = 0, keep_cache: bool = False, resume: Sequence | None = None,
    ) -> Sequence:  # fmt: skip
        """One sequence, ready for the next step.

        keep_cache leaves its pages open when it is over; resume takes over those of such a
        sequence and computes only what the two prompts do not share. release() closes them.
        """
        self.check_prompt(prompt)
        self.verifier.check_law(law)
        law.prove(prompt, self.target.vocab_size, self.target.device)
        limit = self.max_positions
        if limit is not None:
            max_new_tokens = min(max_new_tokens, limit - len(prompt) + 1)
        slots = len(prompt) + max_new_tokens + self._spare_slots
        if resume is None:
            cache = self.group.open(slots)
        else:
            cache = resume.cache
            # the last token of the prompt is computed in any case: its logits are needed
            shared = min(_common_prefix(resume.tokens, prompt), len(prompt) - 1)
            self.group.truncate(cache, shared)
            self.group.reserve(cache, slots)
        sequence = Sequence(
            request_id, index, list(prompt), len(prompt), law, seed, max_new_tokens,
            frozenset(eos_token_ids), stop, cache, keep_cache, left_padding,
        )  # fmt: skip
        sequence.stats.slow_processors = law.slow_processors
        self.scheduler.admit(sequence)
        if self.proposer is not None:
            try:
                self.proposer.start(sequence)
            except BaseException:
                self._withdraw(sequence)
                raise
        return sequence

    def check_prompt(self, prompt: list[int]) -> None:
        """Raises InvalidArgumentError for a prompt that the target cannot continue."""
        if not prompt:
            raise InvalidArgumentError("the prompt is empty: expected at least one token")
        bad = [t for t in prompt if not 0 <= t < self.target.vocab_size]
        if bad:
            raise InvalidArgumentError(
                f"prompt token {bad[0]}: expected 0 to {self.target.vocab_size - 1}"
            )
        limit = self.max_positions
        if limit is not None and len(prompt) > limit:
            raise InvalidArgumentError(
                f"the prompt has {len(prompt)} tokens, the target's context holds {limit}; "
                "shorten the prompt"
            )

    def step(self) -> list[StepRecord]:
        """Advances every running sequence by one target pass; empty when none is running.

        A step that raises or is interrupted leaves every sequence at its last whole token: the next
        step takes up from there.
        """
        sequences = self.scheduler.next_batch()
        if not sequences:
            return []
        if self.proposer is not None:
            self.policy.prepare(sequences)
        try:
            several = torch.get_num_threads() > 1
            with one_thread() if several and self._is_light(sequences) else nullcontext():
                return self._advance(sequences)
        except BaseException:  # KeyboardInterrupt too
            for sequence in sequences:
                self.group.truncate(sequence.cache, len(sequence.tokens) - 1)
            raise

    def _is_light(self, sequences: list[Sequence]) -> bool:
        """Whether nothing in the coming step is worth a second thread: few rows, and every runner
        on compiled kernels, which have one."""
        if self._uses_threads():
            return False
        pending = sum(len(s.tokens) - s.cache.computed_len(self.target) for s in sequences)
        return pending <= _LIGHT_ROWS and pending * self.target.vocab_size <= _LIGHT_LOGITS

    def _uses_threads(self) -> bool:
        """Whether some runner has work for a second thread in every pass."""
        runners = (runner for group in self.groups for runner in group.memory)
        return any(getattr(runner, "uses_threads", True) for runner in runners)

    def _advance(self, sequences: list[Sequence]) -> list[StepRecord]:
        began = time.perf_counter()
        trees = self._propose(sequences)
        asked = trees is not None
        if trees is None:
            trees = [TokenTree.empty(self.target.device)] * len(sequences)
        drafted = time.perf_counter()
        verdicts = self.verifier.verify(sequences, trees, self.noise)
        verified = time.perf_counter()
        if self.proposer is not None:
            self.policy.observe(sequences, trees, verdicts)
            if asked:
                self.proposer.observe(sequences, verdicts)
        records = []
        share = 1 / len(sequences)
        for sequence, tree, verdict in zip(sequences, trees, verdicts, strict=True):
            kept = sequence.append(list(verdict.tokens))
            if sequence.logits is not None:
                rows = [0, *(node + 1 for node in verdict.path)]
                sequence.logits.append(verdict.logits[rows[: len(kept)]])
            record = StepRecord(
                sequence.request_id, sequence.index, tuple(kept), verdict.drafted,
                verdict.accepted, sequence.finish_reason, tree.ranks(verdict.path),
            )  # fmt: skip
            records.append(record)
            for stats in (sequence.stats, self.stats):
                stats.add(record)
                stats.draft_seconds += (drafted - began) * share
                stats.verify_seconds += (verified - drafted) * share
            if sequence.finish_reason is not None:
                self._retire(sequence)
        seconds = time.perf_counter() - began
        self.stats.total_seconds += seconds
        for sequence in sequences:
            sequence.stats.total_seconds += seconds * share
        return records

    def _propose(self, sequences: list[Sequence]) -> list[TokenTree] | None:
        """None: nobody was asked, as nothing is to be drafted."""
        if self.proposer is None:
            return None
        limits = [m for m in (self.max_positions, self.proposer.max_positions) if m is not None]
        # Of the remaining tokens the last one is the target's own: it need not be drafted.
        rooms = [
            max(0, min([s.remaining - 1, *(m - len(s.tokens) for m in limits)])) for s in sequences
        ]
        wanted = planned(self.policy, sequences, rooms)
        if not any(wanted):
            return None
        fitting = [self.proposer.nodes_within(room) if room else 0 for room in rooms]
        budgets = [min(pair) for pair in zip(wanted, fitting, strict=True)]
        trees = self.proposer.propose(sequences, budgets, self.noise)
        where = self.target.vocab_size, self.target.device
        trees = checked(self.proposer, trees, sequences, budgets, *where)
        return self.policy.cut(sequences, trees)

    def abort(self, request_id: str) -> None:
        """Ends a request at once; what it has generated so far is its output."""
        for sequence in self.scheduler.of_request(request_id):
            sequence.finish_reason = "abort"
            self._retire(sequence)

    def abort_all(self) -> None:
        """Ends every running request, as an interrupted caller must."""
        for request_id in {s.request_id for s in self.scheduler.running}:
            self.abort(request_id)

    def release(self, sequence: Sequence) -> None:
        """Gives back the pages of a sequence that is over."""
        self.group.close(sequence.cache)

    def refresh(self) -> None:
        """Packs the weights of target and draft anew if they were changed; cheap otherwise."""
        for runner in [runner for group in self.groups for runner in group.memory]:
            if isinstance(runner, ModelRunner):
                runner.refresh()

    def _retire(self, sequence: Sequence) -> None:
        self._withdraw(sequence)
        self._finished.append(sequence)

    def _withdraw(self, sequence: Sequence) -> None:
        self.scheduler.retire(sequence)
        if not sequence.keep_cache:
            self.release(sequence)
        if self.proposer is not None:
            self.policy.forget(sequence)
            self.proposer.finish(sequence)

    def __iter__(self) -> Iterator[RequestOutput]:
        """Steps until nothing is running, and yields each sample when it is done."""
        while self.scheduler.running or self._finished:
            if not self._finished:
                self.step()
            yield from self.take_finished()

    def take_finished(self) -> list[RequestOutput]:
        """The samples that finished since the last call."""
        finished, self._finished = self._finished, []
        return [
            RequestOutput(
                s.request_id, s.index, tuple(s.tokens[s.prompt_len :]), s.finish_reason or "",
                s.stats,
            )
            for s in finished
        ]  # fmt: skip


def _one_prompt(input_ids: Items[int] | torch.Tensor) -> list[int]:
    ids = torch.as_tensor(input_ids)
    if ids.ndim > 2 or (ids.ndim == 2 and ids.shape[0] != 1):
        raise InvalidArgumentError(
            f"input_ids: expected one prompt, got shape {tuple(ids.shape)}; add a request for each"
        )
    if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise InvalidArgumentError(f"input_ids: expected token ids, got {ids.dtype}")
    return [int(token) for token in ids.flatten().tolist()]


def _common_prefix(a: list[int], b: list[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def fresh_seed() -> int:
    """64 bits from torch's global generator, so that torch.manual_seed governs them."""
    high, low = torch.randint(0, 1 << 32, (2,), dtype=torch.int64).tolist()
    return int(high) << 32 | int(low)


def _runner(model: Any, window: int | None = None) -> Runner:
    if isinstance(model, PreTrainedModel) or not hasattr(model, "score"):
        return ModelRunner(model, window)
    if window is not None:
        raise InvalidArgumentError(
            f"draft_window={window}: expected a transformers model as draft, got "
            f"{type(model).__name__}"
        )
    runner: Runner = model
    return runner


def _check_window(window: Any, nodes: int | str | None) -> None:
    if not isinstance(window, int) or isinstance(window, bool) or window < PAGE_SIZE:
        raise InvalidArgumentError(
            f"draft_window={window!r}: expected a whole number of tokens from {PAGE_SIZE} on"
        )
    if isinstance(nodes, int) and nodes > window:
        raise InvalidArgumentError(
            f"draft_window={window}: expected at least the {nodes} tokens that a step drafts"
        )


def _tree_proposer(
    proposer: str | Proposer | Items[str | Proposer] | None, tree: Items[int],
    num_draft_tokens: int | str, options: dict[str, Any],
) -> str:  # fmt: skip
    """The name behind tree=; its options go into `options`."""
    widths = expansion(tree)
    if proposer not in (None, DraftModelProposer.name, DraftTreeProposer.name):
        raise InvalidArgumentError(
            f"tree={tree!r}: expected proposer='tree' or none, got {proposer!r}"
        )
    if isinstance(num_draft_tokens, int) and 0 < num_draft_tokens < widths[0]:
        raise InvalidArgumentError(
            f"num_draft_tokens={num_draft_tokens} leaves out the first level of tree={tree!r}: "
            f"expected at least {widths[0]}, or 'auto'"
        )
    options["tree"] = widths
    return DraftTreeProposer.name


def _make_proposer(
    proposer: str | Proposer | Items[str | Proposer] | None, draft: Any, target: Runner,
    verification: str,
    options: dict[str, Any], window: int | None,
) -> Proposer | None:  # fmt: skip
    if window is not None:
        _check_window(window, 0)
        if draft is None:
            raise InvalidArgumentError(
                f"draft_window={window}: expected draft=<a small model> to go with it"
            )
    if isinstance(proposer, Proposer):
        if draft is not None:
            raise InvalidArgumentError("pass either draft or a Proposer object, not both")
        return _without_options(proposer, options)
    drafts = list(draft) if isinstance(draft, (list, tuple)) else [draft]
    if not drafts:
        raise InvalidArgumentError("draft: expected one model or more, got none")
    if proposer is None and draft is None:
        return _without_options(None, options)
    runners = [_draft_runner(each, target, window) for each in drafts if each is not None]
    if len({id(runner) for runner in runners}) < len(runners):
        raise InvalidArgumentError("draft: expected different Runners, one came twice")
    proposer = DraftModelProposer.name if proposer is None else proposer
    if len(runners) == 1 and isinstance(proposer, str):
        sizes = target.vocab_size, runners[0].vocab_size
        proposer = by_vocabulary(proposer, options, *sizes)
    kinds = _KINDS.get(verification, {})
    if len(runners) > 1 or proposer == EnsembleProposer.name or not isinstance(proposer, str):
        return proposers.make_several(proposer, runners, options, kinds)
    kind = kinds.get(proposer)
    options = {"kind": kind, **options} if kind else options
    return proposers.make(proposer, runners[0] if runners else None, options)


def _without_options(proposer: Proposer | None, options: dict[str, Any]) -> Proposer | None:
    if options:
        raise InvalidArgumentError(
            f"proposer_options={options!r}: expected none here; they are for a proposer that a "
            "name or a draft makes"
        )
    return proposer


def _draft_runner(draft: Any, target: Runner, window: int | None) -> Runner:
    runner = _runner(draft, window)
    if runner.device != target.device:
        raise InvalidArgumentError(
            f"draft: it is on {runner.device}, the target on {target.device}; move one of them"
        )
    return runner
