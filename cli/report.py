"""specdec report: one page about runs of bench, eval and tune."""

from pathlib import Path

import click

from specdec.cli.console import remark
from specdec.evals.report import write
from specdec.evals.report_parts import read


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--out", "outputs", multiple=True, default=("report.html",), show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="What to write, .html or .md; may be repeated.",
)  # fmt: skip
@click.option("--title", default="specdec report", show_default=True)
def report(runs: tuple[Path, ...], outputs: tuple[Path, ...], title: str) -> None:
    """Show RUNS, folders of bench --out and eval --out and files of tune --out, on one page.

    The page needs no other file and no network; .html needs specdec[report].
    """
    parts = [read(path) for path in runs]
    for path in outputs:
        write(parts, path, title)
        remark(f"written: {path}")
