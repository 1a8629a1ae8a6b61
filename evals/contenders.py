"""Ways to continue a text, ours and transformers', which answer alike and are counted alike."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from specdec import proposers
from specdec.engine import Engine
from specdec.errors import InvalidArgumentError
from specdec.proposers import DraftTreeProposer, SuffixProposer
from specdec.sampling import SamplingParams

OURS, THEIRS = "specdec", "transformers"
PLAIN = f"{OURS} plain"
# where transformers keeps how much an assistant drafts
_DRAFTING = (
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turn:
    """One continuation. Every pass of the target emits at least one token."""

    tokens: tuple[int, ...]  # new ones, with the end token where there is one
    emitted: tuple[int, ...]  # per pass of the target; they sum to the number of tokens
    drafted: tuple[int, ...]  # per pass
    seconds: float  # wall clock
    draft_seconds: float = 0.0  # of those; 0 where nobody measures it
    verify_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(values: dict[str, Any]) -> "Turn":
        """From what as_dict gave, after a journey through JSON."""
        kept: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return Turn(**kept)


class Contender(ABC):
    """One row of a benchmark."""

    name: str
    is_ours: bool
    # its text is a function of the seed, that of plain specdec decoding
    is_pathwise: bool = False
    label: str = ""  # SYNTHETIC, and how, where the draft is none

    @abstractmethod
    def run(self, prompt: Sequence[int], seed: int) -> Turn:
        """Continues one prompt."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """What drafts, and how much: NAME, NAME:N, tree:K1,K2,... or several names with commas."""

    text: str
    members: tuple[str, ...]
    length: int | None = None  # None: auto
    tree: tuple[int, ...] | None = None

    @staticmethod
    def parse(text: str) -> "Speculation":
        """Raises InvalidArgumentError."""
        names, _, how = text.partition(":")
        members = tuple(name.strip() for name in names.split(","))
        for name in members:
            proposers.find(name)
        if how in ("", "auto"):
            return Speculation(text, members)
        parts = how.split(",")
        if not all(part.isdecimal() for part in parts):
            raise InvalidArgumentError(
                f"proposer {text!r}: expected NAME, NAME:N or tree:K1,K2,... with whole numbers"
            )
        if members == (DraftTreeProposer.name,):
            return Speculation(text, members, tree=tuple(int(part) for part in parts))
        if len(parts) > 1:
            raise InvalidArgumentError(f"proposer {text!r}: expected one number after the name")
        return Speculation(text, members, length=int(how))

    @property
    def num_drafts(self) -> int:
        """How many draft models it needs."""
        return sum(proposers.find(name).needs_draft for name in self.members)

    def arguments(self, draft: Any, options: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Those of Engine. options: of proposers, by their name."""
        several = len(self.members) > 1
        found: dict[str, Any] = {"proposer": list(self.members) if several else self.members[0]}
        if self.num_drafts:
            found["draft"] = [draft] * self.num_drafts if several else draft
        if self.length is not None:
            found["num_draft_tokens"] = self.length
        if self.tree is not None:
            found |= {"tree": self.tree, "policy": "constant"}
        # rounds repeat prompts: remembering their answers would be no draft
        options = {**options, SuffixProposer.name: {"cache_tokens": 0, **options.get("suffix", {})}}
        its = {name: options[name] for name in self.members if options.get(name)}
        if its:
            found["proposer_options"] = its if several else its[self.members[0]]
        return found


class Ours(Contender):
    """An engine of ours, one request at a time."""

    is_ours = True

    def __init__(
        self, name: str, engine: Engine, sampling: SamplingParams, label: str = ""
    ) -> None:
        self.name, self.engine, self.sampling, self.label = name, engine, sampling, label
        self.is_pathwise = engine.proposer is None or engine.verifier.rule == "gumbel"

    def run(self, prompt: Sequence[int], seed: int) -> Turn:
        _settle(self.engine.target.device)
        began = time.perf_counter()
        self.engine.add_request(list(prompt), self.sampling, seed=seed)
        records = []
        while self.engine.scheduler.running:
            records += self.engine.step()
        _settle(self.engine.target.device)
        seconds = time.perf_counter() - began
        [out] = self.engine.take_finished()
        return Turn(
            out.token_ids, tuple(len(record.tokens) for record in records),
            tuple(record.drafted for record in records), seconds, out.stats.draft_seconds,
            out.stats.verify_seconds,
        )  # fmt: skip

    def predicted_speed(self, turns: Sequence[Turn], context: float) -> float | None:
        """Against plain decoding, by the cost model: the tokens of these turns' passes over what
        such passes cost, measured apart, at `context` tokens. None where trees are drafted, and
        where nothing is."""
        proposer = self.engine.proposer
        passes = [each for t in turns for each in list(zip(t.emitted, t.drafted, strict=True))[1:]]
        depth = max((drafted for _, drafted in passes), default=0)
        if proposer is None or any(proposer.nodes_within(n) != n for n in range(1, depth + 1)):
            return None
        if not depth:
            return None
        costs = self.engine.step_costs(self.sampling, max_depth=depth)
        if costs is None:
            return None
        seconds = sum(costs.verify_seconds(drafted + 1, context) for _, drafted in passes)
        if proposer.draft_rows(1):
            seconds += sum(costs.draft_seconds(drafted, context) for _, drafted in passes)
        return sum(emitted for emitted, _ in passes) * costs.verify_seconds(1, context) / seconds


class Theirs(Contender):
    """transformers' own generate; `more` are further arguments, an assistant_model say.

    constant: the assistant drafts so many tokens in every pass; None: its own configuration.
    """

    is_ours = False

    def __init__(
        self, name: str, model: Any, sampling: SamplingParams, *, label: str = "",
        constant: int | None = None, **more: Any,
    ) -> None:  # fmt: skip
        self.name, self.model, self.sampling, self.label = name, model, sampling, label
        self.constant, self.more = constant, more
        self.config = _generation_config(sampling)

    def run(self, prompt: Sequence[int], seed: int) -> Turn:
        torch.manual_seed(seed)
        ids = torch.tensor([prompt], device=self.model.device)
        passes = _Passes(len(prompt))
        hook = self.model.register_forward_pre_hook(passes, with_kwargs=True)
        _settle(ids.device)
        try:
            with self._configured():
                began = time.perf_counter()
                out: Tensor = self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), generation_config=self.config,
                    **self.more,
                )  # fmt: skip
                _settle(ids.device)
                seconds = time.perf_counter() - began
        finally:
            hook.remove()
        tokens = tuple(out[0, len(prompt) :].tolist())
        return Turn(tokens, passes.emitted(len(tokens)), tuple(passes.drafted), seconds)

    @contextmanager
    def _configured(self) -> Iterator[None]:
        """Sets the draft length, and takes back what transformers' schedule learns: it writes that
        into the assistant, and each text starts anew."""
        assistant = self.more.get("assistant_model")
        if assistant is None:
            yield
            return
        config = assistant.generation_config
        kept = {name: getattr(config, name) for name in _DRAFTING}
        if self.constant is not None:
            for name, value in zip(_DRAFTING, (self.constant, "constant", 0.0), strict=True):
                setattr(config, name, value)
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(config, name, value)


class _Passes:
    """Counts what each forward of transformers' target commits, from the length of its cache."""

    def __init__(self, prompt_len: int) -> None:
        self.before: list[int] = []  # tokens committed before each pass
        self.drafted: list[int] = []
        self._prompt_len = prompt_len

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        rows = (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1]
        known = self._prompt_len if past == 0 else past + 1
        self.before.append(known)
        self.drafted.append(past + rows - known)

    def emitted(self, tokens: int) -> tuple[int, ...]:
        ends = [*self.before[1:], self._prompt_len + tokens]
        return tuple(end - begin for begin, end in zip(self.before, ends, strict=True))


def _generation_config(sampling: SamplingParams) -> GenerationConfig:
    """The same law for transformers; nothing is left to a model's own defaults."""
    ends = list(sampling.eos_token_ids)
    config: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens}
    if ends:
        config |= {"eos_token_id": ends, "pad_token_id": ends[0]}
    if sampling.temperature == 0:
        return GenerationConfig(do_sample=False, **config)
    return GenerationConfig(
        do_sample=True, temperature=sampling.temperature, top_k=sampling.top_k,
        top_p=sampling.top_p, min_p=sampling.min_p or None, **config,
    )  # fmt: skip


def without_defaults(model: Any) -> Any:
    """The model, without decoding defaults of its own, which generate would add to what it is told.
    Those about drafting stay."""
    own = model.generation_config
    fresh = GenerationConfig()
    for name in _DRAFTING:
        setattr(fresh, name, getattr(own, name))
    model.generation_config = fresh
    return model


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
