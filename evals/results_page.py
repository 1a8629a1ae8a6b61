"""docs/results.md: every committed raw file as tables, and nothing that is not in one."""

import json
from fnmatch import fnmatch
from pathlib import Path

from specdec.errors import InvalidArgumentError
from specdec.evals.results_sections import OPTIONAL, SECTIONS, Files, Raw

HEAD = [
    "# Results",
    "",
    "Made by `python -P evals/check_results.py --write` from the raw files in `evals/results/` and",
    "from nothing else; the check fails where the two differ. Times are of shared CPU cores, so",
    "ratios within one process say more than seconds do. GPU: not run on a GPU.",
]


def page(folder: Path) -> str:
    """The whole page. Raises InvalidArgumentError for a raw file that no section reads, for one
    that is not JSON, and for a section without a file."""
    contents: Files = {}
    for path in sorted(folder.glob("*.json")):
        try:
            contents[path.name] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InvalidArgumentError(f"{path.name}: not JSON: {error}") from error
    lines = list(HEAD)
    for section in SECTIONS:
        its = {name: contents[name] for name in contents if fnmatch(name, section.pattern)}
        if not its:
            if section.absent:
                lines += ["", f"## {section.title}", "", section.absent]
                continue
            if section.pattern in OPTIONAL:
                continue
            raise InvalidArgumentError(
                f"{section.pattern}: no such file in evals/results for the section "
                f"{section.title!r}"
            )
        lines += ["", f"## {section.title}", "", *section.make(its), ""]
        lines += [f"`{name}`: {origin(raw)}" for name, raw in its.items()]
    unread = [n for n in contents if not any(fnmatch(n, each.pattern) for each in SECTIONS)]
    if unread:
        raise InvalidArgumentError(
            f"{', '.join(unread)}: no section of docs/results.md reads it; add one to "
            "evals/results_sections.py"
        )
    return "\n".join(lines) + "\n"


def origin(raw: Raw) -> str:
    """Where a raw file was made, in one line."""
    found = raw.get("provenance")
    if found is None and raw.get("sessions"):
        found = raw["sessions"][-1]
    if found is None:
        parts = [f"{key} {raw[key]}" for key in ("sources", "python") if key in raw]
        return f"{', '.join(parts) or 'no provenance kept'}; not run on a GPU."
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    where = found.get("gpu") or "not run on a GPU"
    return (
        f"commit {found['commit'][:9]}, {found['date']}, Python {found['python']}, {versions}, "
        f"{found['machine']} {found['cpu_capability']}, {found['threads']} thread(s), load "
        f"{found['load_average'][0]:.1f}; {where}."
    )
