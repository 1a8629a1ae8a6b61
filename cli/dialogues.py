"""Prompts of the evaluation commands as the target reads them: each turn behind all before it."""

from dataclasses import dataclass

from specdec.cli.console import remark, with_bar
from specdec.cli.options import Pair, end_tokens
from specdec.evals import prompts as prompt_sets
from specdec.evals.bench import Dialogue
from specdec.evals.prompts import Prompt
from specdec.sampling import SamplingParams

TURNS = (
    "A dialogue is continued at each turn, behind the target's own greedy answers to the others."
)


@dataclass(frozen=True, slots=True)
class Contexts:
    """A prompt, and the tokens before the answer to each of its turns."""

    prompt: Prompt
    tokens: list[list[int]]


def read_contexts(
    pair: Pair, source: str, column: str | None, limit: int, new_tokens: int
) -> list[Contexts]:
    """The first prompts of a set or file that fit with so many new tokens a turn; says which do
    not. Earlier answers of a dialogue are decoded here, greedily by the target alone."""
    dialogue = Dialogue(pair.tokenizer, chat=False)
    found = prompt_sets.load(source, column=column)[:limit]
    fitting = prompt_sets.fitting(
        found, dialogue.length, context=pair.context, new_tokens=new_tokens
    )
    if fitting.note:
        remark(f"{source}: {fitting.note}")
    several = [prompt for prompt in fitting.kept if len(prompt.turns) > 1]
    answers = _answers(pair, dialogue, several, new_tokens) if several else {}
    return [
        Contexts(
            prompt,
            [
                dialogue.tokens(prompt.turns[:count], answers.get(prompt.id, [])[: count - 1])
                for count in range(1, len(prompt.turns) + 1)
            ],
        )
        for prompt in fitting.kept
    ]


def _answers(
    pair: Pair, dialogue: Dialogue, prompts: list[Prompt], new_tokens: int
) -> dict[str, list[list[int]]]:
    """To all turns but the last, by prompt."""
    engine = pair.plain()
    ends = end_tokens(pair.target, pair.tokenizer)
    greedy = SamplingParams(new_tokens, 0.0, eos_token_ids=ends)
    found: dict[str, list[list[int]]] = {}
    for prompt in with_bar(prompts, "earlier turns"):
        its = found.setdefault(prompt.id, [])
        for count in range(1, len(prompt.turns)):
            engine.add_request(dialogue.tokens(prompt.turns[:count], its), greedy, seed=0)
            [out] = list(engine)
            its.append(list(out.token_ids))
    return found
