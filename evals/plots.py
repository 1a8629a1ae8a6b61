"""Plots of a report, as SVG that takes the colour of text from the page around it."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.errors import InvalidArgumentError

MISSING = "the report needs {}: pip install 'specdec[report]'"
# Told apart in light and dark and by those who do not see red and green alike (Okabe and Ito).
COLOURS = ("#0a84c6", "#e69f00", "#009e73", "#d55e00", "#a463b0", "#56b4e9", "#b8a500", "#888888")
_INK = "#010203"  # stands for the page's text colour


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one line; ranges: lower and upper ends of bars around them."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    ranges: Sequence[tuple[float, float]] = field(default=())
    joined: bool = True  # by a line; else dots
    colour: int = 0


def through(name: str, points: Sequence[tuple[float, float]], colour: int, **more: Any) -> Series:
    """A series through points."""
    return Series(name, [x for x, _ in points], [y for _, y in points], colour=colour, **more)


def lines(series: Sequence[Series], *, x: str, y: str, top: float | None = None) -> str:
    """Lines and dots over whole numbers. Raises InvalidArgumentError without matplotlib."""
    figure, axes = _figure()
    for each in series:
        colour = COLOURS[each.colour % len(COLOURS)]
        style = "-" if each.joined else "none"
        axes.plot(
            each.x, each.y, linestyle=style, marker="o", markersize=4 if each.joined else 7,
            color=colour, label=each.name,
        )  # fmt: skip
        if each.ranges:
            low = [max(0.0, v - r[0]) for v, r in zip(each.y, each.ranges, strict=True)]
            high = [max(0.0, r[1] - v) for v, r in zip(each.y, each.ranges, strict=True)]
            axes.errorbar(each.x, each.y, (low, high), fmt="none", ecolor=colour, capsize=2)
    axes.set(xlabel=x, ylabel=y)
    highest = max((end for s in series for end in (*s.y, *(r[1] for r in s.ranges))), default=1.0)
    axes.set_ylim(0, top or 1.08 * highest or 1.0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes, len(series))
    return _svg(figure)


def bars(groups: Mapping[str, Mapping[str, float]], *, y: str) -> str:
    """Groups of bars: group -> name -> height."""
    figure, axes = _figure()
    names = list(dict.fromkeys(name for its in groups.values() for name in its))
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        places = [g + (i - (len(names) - 1) / 2) * width for g in range(len(groups))]
        heights = [its.get(name, 0.0) for its in groups.values()]
        axes.bar(places, heights, width, color=COLOURS[i % len(COLOURS)], label=name)
    axes.set_xticks(range(len(groups)), list(groups), rotation=20 if len(groups) > 4 else 0)
    axes.set_ylabel(y)
    _legend(figure, axes, len(names))
    return _svg(figure)


def stacked(rows: Mapping[str, Mapping[str, float]], *, x: str) -> str:
    """Lying bars: row -> part -> length, one part behind the other."""
    figure, axes = _figure(height=1.2 + 0.32 * len(rows))
    parts = list(dict.fromkeys(part for its in rows.values() for part in its))
    begins = [0.0] * len(rows)
    for i, part in enumerate(parts):
        lengths = [its.get(part, 0.0) for its in rows.values()]
        axes.barh(range(len(rows)), lengths, left=begins, color=COLOURS[i], label=part, height=0.7)
        begins = [a + b for a, b in zip(begins, lengths, strict=True)]
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel(x)
    _legend(figure, axes, len(parts))
    return _svg(figure)


def _figure(height: float = 3.4) -> tuple[Any, Any]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidArgumentError(MISSING.format("matplotlib")) from error
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    ink: Any = dict.fromkeys(inked, _INK)
    with rc_context({**ink, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes = figure.subplots()
    axes.grid(axis="both", color=_INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return figure, axes


def _legend(figure: Any, axes: Any, count: int) -> None:
    if count > 1:
        columns = min(4, count)
        legend = figure.legend(
            *axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns,
            frameon=False, fontsize=8, labelcolor=_INK,
        )  # fmt: skip
        legend.set_in_layout(True)


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    file = io.StringIO()
    # text stays text; ids differ from plot to plot on the page
    names = [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "|".join(names)}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")
