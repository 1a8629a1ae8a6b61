"""A trace as a report shows it: tokens coloured by who proposed them, each step's tree drawn."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from specdec.evals.plots import COLOURS
from specdec.evals.trace import TARGET

_WIDTH, _HEIGHT = 150, 42  # of a place in a drawn tree


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of the text."""

    text: str
    colour: str  # empty: the target's own
    hint: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """A node of a drawn tree."""

    x: float
    y: float
    text: str
    odds: str
    hint: str
    colour: str
    accepted: bool
    edge: tuple[float, float, float, float]  # from the right end of its parent to itself


@dataclass(frozen=True, slots=True)
class StepView:
    """One pass: its tree, and what came out."""

    title: str
    nodes: list[Drawn]
    width: float
    height: float
    root: tuple[float, float]
    emitted: str


@dataclass(frozen=True, slots=True)
class TokenView:
    """One generation."""

    title: str
    prompt: str
    tokens: list[Token]
    legend: list[tuple[str, str]]  # who, colour
    counts: tuple[list[str], list[list[object]]]  # a table: tokens by who proposed them
    steps: list[StepView]


def token_view(found: dict[str, Any]) -> TokenView:
    """From {"row", "set", "prompt id", "trace"} as bench keeps them."""
    trace = found["trace"]
    texts: dict[str, str] = trace["texts"]
    steps = trace["steps"]
    seen = Counter(tuple(by) for step in steps for by in step["by"])
    drafted = Counter(tuple(node["by"]) for step in steps for node in step["nodes"])
    whos = sorted({*seen, *drafted} - {(TARGET,)}, key=lambda by: (len(by), by))
    colours = {by: COLOURS[i % len(COLOURS)] for i, by in enumerate(whos)}
    tokens = [
        Token(texts[str(token)], colours.get(tuple(by), ""), f"pass {i}: {_who(by)}")
        for i, step in enumerate(steps, 1)
        for token, by in zip(step["emitted"], step["by"], strict=True)
    ]
    rows: list[list[object]] = [[_who(by), drafted[by], seen[by]] for by in whos]
    rows.append([TARGET, None, seen[TARGET,]])
    return TokenView(
        f"{found['row']}, prompt {found['prompt']} of {found['set']}",
        "".join(texts[str(token)] for token in trace["prompt"]), tokens,
        [(_who(by), colours[by]) for by in whos],
        (["proposed by", "drafted", "in the text"], rows),
        [_step(i, step, texts, colours) for i, step in enumerate(steps, 1)],
    )  # fmt: skip


def _who(by: Any) -> str:
    return " and ".join(by)


def _step(
    number: int, step: dict[str, Any], texts: dict[str, str], colours: dict[tuple[str, ...], str]
) -> StepView:
    nodes = step["nodes"]
    places = _places([node["parent"] for node in nodes])
    drawn = []
    for node, (x, y) in zip(nodes, places, strict=True):
        parent = node["parent"]
        from_x, from_y = places[parent] if parent >= 0 else _root(places)
        text = _short(texts[str(node["token"])])
        draft = "chosen" if node["draft"] is None else f"q {node['draft']:.3f}"
        odds = f"{draft}, p {node['target']:.3f}"
        hint = f"{texts[str(node['token'])]!r}, proposed by {_who(node['by'])}"
        drawn.append(
            Drawn(x, y, text, odds, hint, colours[tuple(node["by"])], node["accepted"],
                  (from_x + _WIDTH - 24, from_y, x, y))
        )  # fmt: skip
    right = max((x for x, _ in places), default=0.0) + _WIDTH
    height = max((y for _, y in places), default=0.0) + _HEIGHT
    emitted = "".join(_visible(texts[str(token)]) for token in step["emitted"])
    kept = sum(node["accepted"] for node in nodes)
    title = f"pass {number}: {kept} of {len(nodes)} drafted tokens kept"
    return StepView(title, drawn, right, height, _root(places), emitted)


def _root(places: list[tuple[float, float]]) -> tuple[float, float]:
    return 0.0, places[0][1] if places else _HEIGHT / 2


def _places(parents: list[int]) -> list[tuple[float, float]]:
    """Depth to the right; leaves below each other, in order; a parent beside its first child."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    found: dict[int, tuple[float, float]] = {}
    line = 0

    def place(node: int, depth: int) -> None:
        nonlocal line
        found[node] = (depth * _WIDTH, line * _HEIGHT + _HEIGHT / 2)
        for index, child in enumerate(children.get(node, ())):
            line += index > 0
            place(child, depth + 1)

    for index, child in enumerate(children.get(-1, ())):
        line += index > 0
        place(child, 1)
    return [found[node] for node in range(len(parents))]


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def _short(text: str) -> str:
    visible = _visible(text).replace(" ", "␣")
    return visible if len(visible) <= 14 else visible[:13] + "…"
