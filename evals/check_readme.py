"""The README's table of measured ratios, made from the committed raw files and from nothing else.

python -P evals/check_readme.py           exits 1 when the README is stale
python -P evals/check_readme.py --write   brings it up to date
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "evals" / "results"
BEGIN, END = "<!-- speed:begin -->\n", "<!-- speed:end -->\n"
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


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    block = "\n".join([*pair_table(), "", *shapes_table()]) + "\n"
    fresh = before + BEGIN + block + END + after
    if "--write" in sys.argv[1:]:
        readme.write_text(fresh, encoding="utf-8")
    elif fresh != text:
        sys.exit("README.md: its speed table differs from evals/results; run with --write")


if __name__ == "__main__":
    main()
