"""Every error that a caller can cause.

    SpecDecError                    base: catch this one to catch all
    ├── InvalidArgumentError        wrong usage; also a ValueError
    │   └── InvalidLawError         a law or a tree that an acceptance rule cannot work with
    ├── UnsupportedModelError       a model that would not give its own results under specdec
    ├── CacheFullError              no page left for what was asked
    └── NumericalError              NaN or infinity where a law was expected

What only a bug of ours can break is an AssertionError.
"""


class SpecDecError(Exception):
    """Base of every error that a caller can cause."""


class InvalidArgumentError(SpecDecError, ValueError):
    """Wrong usage: the message says what was expected, what came and what to do."""


class InvalidLawError(InvalidArgumentError):
    """An acceptance rule met a law or a tree that it is not defined for."""

    def __init__(self, rule: str, node: str, reason: str) -> None:
        super().__init__(rule, node, reason)  # all three, so that the error survives pickling
        self.rule, self.node, self.reason = rule, node, reason

    def __str__(self) -> str:
        return f"rule {self.rule!r}, node {self.node}: {self.reason}"


class UnsupportedModelError(SpecDecError):
    """A model that would not give its own results under specdec: names the class and the layer."""


class CacheFullError(SpecDecError):
    """The cache has no page left for what was asked."""


class NumericalError(SpecDecError):
    """NaN or infinity where a law was expected, or a law that does not sum to one."""
