"""The README's tables of figures, made from the committed raw files and from nothing else.

python -P evals/check_readme.py           exits 1 when the README is stale
python -P evals/check_readme.py --write   brings it up to date
"""

import json
import sys
from pathlib import Path
from typing import Any

from specdec.evals import rule_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "evals" / "results"
# (label, ratio in the raw file)
ROWS = (
    ("against plain transformers", "specdec / transformers"),
    ("against `assistant_model`, default settings", "specdec / transformers assisted default"),
    (
        "against `assistant_model`, best constant length",
        "specdec / transformers assisted best constant",
    ),
    ("against plain specdec decoding", "specdec / specdec plain"),
    ("plain specdec decoding against plain transformers", "specdec plain / transformers"),
    ("share of the ceiling E t1 / (g t_draft + t_verify)", "share of ceiling"),
)


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


def pair_table() -> list[str]:
    """One column per dtype and mode."""
    runs = {d: read(f"speed_pair_{d}.json") for d in ("bfloat16", "float32")}
    modes = (("greedy", "greedy"), ("sampled", "T = 1"))
    columns = [(d, mode, label) for d in runs for mode, label in modes]
    lines = [
        "| built-in pair | " + " | ".join(f"{d}, {label}" for d, _, label in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for label, key in ROWS:
        cells = [f"{runs[d][mode]['ratios'][key]:.2f}" for d, mode, _ in columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    per_pass = [f"{runs[d][mode]['tokens_per_target_pass']:.2f}" for d, mode, _ in columns]
    lines.append("| tokens per target pass | " + " | ".join(per_pass) + " |")
    return lines


def shapes_table() -> list[str]:
    shapes = read("speed_shapes.json")["shapes"]
    lines = ["| random Llama shape | plain specdec against plain transformers |", "|---|---|"]
    for name, shape in shapes.items():
        lines.append(f"| {name} | {shape['specdec plain / transformers']:.2f} |")
    return lines


def speed_block() -> list[str]:
    return [*pair_table(), "", *shapes_table()]


def rules_block() -> list[str]:
    return rule_table.table(read("rule_choice.json"))


# marker in the README -> what stands between its begin and end
BLOCKS = {"speed": speed_block, "rules": rules_block}


def main() -> None:
    readme = ROOT / "README.md"
    text = fresh = readme.read_text(encoding="utf-8")
    for name, block in BLOCKS.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
        before, rest = fresh.split(begin)
        fresh = before + begin + "\n".join(block()) + "\n" + end + rest.split(end)[1]
    if "--write" in sys.argv[1:]:
        readme.write_text(fresh, encoding="utf-8")
    elif fresh != text:
        sys.exit("README.md: its tables differ from evals/results; run with --write")


if __name__ == "__main__":
    main()
