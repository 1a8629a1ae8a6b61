"""Cut the held-out code prompts from the standard library files that training never saw.

    python -m specdec.evals.make_prompts

Writes prompts/heldout_code.jsonl: one object per line with id, source and prompt. A prompt is the
text before the body of a function, up to 900 characters of it, starting at a line.
"""

import ast
import json
from pathlib import Path

from specdec.zoo.corpus import SourceFile, read_corpus

COUNT = 40
MAX_CHARS, MIN_CHARS = 900, 200
OUT = Path(__file__).parent / "prompts" / "heldout_code.jsonl"


def cut_points(file: SourceFile) -> list[int]:
    """Character offsets right behind the docstring, or the signature, of each function."""
    lines = file.text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    offsets = [
        starts[node.body[1].lineno - 1]
        for node in ast.walk(ast.parse(file.text))
        if isinstance(node, ast.FunctionDef) and len(node.body) > 2
    ]
    return sorted(o for o in offsets if o >= MIN_CHARS)


def prompts() -> list[dict[str, str]]:
    """COUNT prompts, spread evenly over the held-out files' functions."""
    found = []
    for file in read_corpus():
        if file.held_out:
            for offset in cut_points(file):
                begin = file.text.find("\n", max(0, offset - MAX_CHARS)) + 1
                text = file.text[begin:offset].rstrip("\n") + "\n"
                found.append({"source": file.name, "prompt": text})
    step = len(found) / COUNT
    chosen = [found[int(i * step)] for i in range(COUNT)]
    return [{"id": f"code-{i:02d}", **prompt} for i, prompt in enumerate(chosen)]


def main() -> None:
    OUT.write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in prompts()))


if __name__ == "__main__":
    main()
