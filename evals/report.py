"""One self-contained report, HTML or Markdown, from the raw files of bench, eval and tune runs."""

import re
from collections.abc import Sequence
from pathlib import Path

from specdec.errors import InvalidArgumentError
from specdec.evals.markdown import cell, table
from specdec.evals.plots import COLOURS, MISSING
from specdec.evals.report_parts import Part


def html(parts: Sequence[Part], title: str) -> str:
    """One page that needs no other file. Raises InvalidArgumentError without jinja2 or matplotlib.

    Everything that comes from files, token texts above all, is escaped by the template.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise InvalidArgumentError(MISSING.format("jinja2")) from error
    environment = Environment(
        loader=PackageLoader("specdec.evals", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    template = environment.get_template("report.html.j2")
    return template.render(parts=parts, title=title, cell=cell, colours=COLOURS)


def markdown(parts: Sequence[Part], title: str) -> str:
    """The same without pictures."""
    lines = [f"# {_plain(title)}"]
    for part in parts:
        lines += ["", f"## {_plain(part.title)}", ""]
        lines += [f"- **{_plain(warning)}**" for warning in part.warnings]
        lines += [f"- {_plain(name)}: {_plain(text)}" for name, text in part.facts]
        for each in part.tables:
            lines += ["", f"### {_plain(each.title)}", "", *table(each.heads, each.rows)]
        for view in part.views:
            lines += ["", f"### {_plain(view.title)}", "", *table(*view.counts)]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text that is no markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def write(parts: Sequence[Part], path: Path, title: str) -> None:
    """By the suffix of the path, .html or .md. Raises InvalidArgumentError for another one."""
    makers = {".html": html, ".md": markdown}
    if path.suffix not in makers:
        raise InvalidArgumentError(f"--out {path}: expected a name that ends in .html or .md")
    path.write_text(makers[path.suffix](parts, title), encoding="utf-8")
