"""docs/results.md, made from the committed raw files and from nothing else.

python -P evals/check_results.py           exits 1 when the page is stale
python -P evals/check_results.py --write   brings it up to date
"""

import sys
from pathlib import Path

from specdec.errors import InvalidArgumentError
from specdec.evals.results_page import page

ROOT = Path(__file__).resolve().parent.parent


def main(root: Path = ROOT) -> None:
    path = root / "docs" / "results.md"
    try:
        fresh = page(root / "evals" / "results")
    except InvalidArgumentError as error:
        sys.exit(f"docs/results.md: {error}")
    if "--write" in sys.argv[1:]:
        path.parent.mkdir(exist_ok=True)
        path.write_text(fresh, encoding="utf-8")
    elif not path.is_file() or path.read_text(encoding="utf-8") != fresh:
        sys.exit("docs/results.md: it differs from evals/results; run with --write")


if __name__ == "__main__":
    main()
