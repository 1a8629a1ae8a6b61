"""The built-in pair, big and small: where it lives and how it was made (see MODEL_CARD.md)."""

from pathlib import Path

NAMES = ("big", "small")


def path(name: str) -> Path:
    """The folder of a built-in model, in ordinary transformers format."""
    if name not in NAMES:
        raise ValueError(f"built-in models are {', '.join(NAMES)}; got {name!r}")
    return Path(__file__).parent / name
