"""The README's table of rules and trees, from the raw result of evals/rule_choice.py."""

from typing import Any

KINDS = {
    "without_replacement": "without replacement",
    "iid": "iid",
    "coupled": "coupled",
    "top_k": "top-k",
}


def cell(row: dict[str, Any]) -> str:
    return f"{row['tokens_per_target_pass']:.2f} ± {row['standard_error']:.2f}"


def table(result: dict[str, Any]) -> list[str]:
    """One column per temperature and tree; first chains as deep as that tree, then the tree."""
    cells: dict[tuple[str, str, str, tuple[int, ...]], str] = {}
    trees: list[tuple[int, ...]] = []
    for temperature, rows in result["temperatures"].items():
        for row in rows:
            shape = tuple(row["shape"])
            cells[row["kind"], row["rule"], temperature, shape] = cell(row)
            if max(shape) > 1 and shape not in trees:
                trees.append(shape)
    columns = [(t, tree) for t in result["temperatures"] for tree in trees]
    heads = [f"T = {float(t):g}, {','.join(map(str, tree))}" for t, tree in columns]
    lines = [
        "| tokens per target pass | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(columns),
    ]
    kinds = dict.fromkeys((kind, rule) for kind, rule, _, _ in cells)
    for is_chain in (True, False):
        for kind, rule in kinds:
            shapes = [(1,) * len(tree) if is_chain else tree for _, tree in columns]
            keys = [(kind, rule, t, s) for (t, _), s in zip(columns, shapes, strict=True)]
            if all(key in cells for key in keys):
                label = f"chain as deep, `{rule}`" if is_chain else f"{KINDS[kind]}, `{rule}`"
                lines.append(f"| {label} | " + " | ".join(cells[key] for key in keys) + " |")
    return lines
