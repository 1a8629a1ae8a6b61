"""What the verification kernels are compiled with, for the compile check and its report."""

from collections.abc import Iterator
from typing import Any

from specdec.kernels.configuration import TARGETS, Configuration
from specdec.kernels.laws import GROUP, filter_kernel, stats_kernel
from specdec.kernels.verify import BLOCK, held_options, warps
from specdec.kernels.verify_chains import chain_kernel, residual_kernel
from specdec.kernels.verify_paths import follow_kernel
from specdec.kernels.verify_rows import best_kernel, law_kernel
from specdec.kernels.verify_trees import MOST_ROWS

_F32 = (
    "peaks", "sums", "groups", "list_scores", "dropped", "parts", "plain_parts", "laws", "q",
)  # fmt: skip
_I32 = ("picks", "list_tokens", "counts")
_F64 = ("temperature", "top_p", "min_p")


def configurations(target: str) -> list[Configuration]:
    """What the kernels are compiled with for a target of configuration.TARGETS, at a vocabulary of
    152k tokens: every launch of every rule, plain and with all of temperature, top-k, top-p, min-p.
    """
    hip = TARGETS[target].backend == "hip"
    found: dict[str, Configuration] = {}
    for logits in ("bf16", "fp16", "fp32"):
        for sparse in (False, True):
            for configuration in _configurations(logits, sparse, hip=hip):
                found.setdefault(configuration.name, configuration)
    return list(found.values())


def _configurations(logits: str, sparse: bool, *, hip: bool) -> Iterator[Configuration]:
    tiles, rows = 64, 64
    heat: dict[str, Any] = {"HAS_HEAT": sparse}
    limits: dict[str, Any] = {**heat, "HAS_TOP_K": sparse, "HAS_TOP_P": sparse, "HAS_MIN_P": sparse}
    name = f"{logits}, truncated" if sparse else logits
    shared: dict[str, Any] = {"BLOCK": BLOCK, "TILES": tiles}

    def made(title: str, kernel: Any, held: dict[str, Any], absent: set[str]) -> Configuration:
        signature = {}
        for argument in kernel.arg_names:
            kind = "*i64"
            if argument in ("V", "C", "depth"):
                kind = "i32"
            elif argument == "stride":
                kind = "i64"
            elif argument == "logits":
                kind = f"*{logits}"
            elif argument == "valid_out":
                kind = "*u8"
            for kinds, element in ((_F32, "*fp32"), (_I32, "*i32"), (_F64, "*fp64")):
                kind = element if argument in kinds else kind
            is_held = argument.isupper() and argument not in ("V", "C")
            signature[argument] = "constexpr" if is_held or argument in absent else kind
        constants = {a: held[a] for a in signature if a in held}
        constants.update({a: None for a in signature if a in absent})
        # Triton sees at the launch what is a multiple of 16; vocabularies are, tensors begin there
        whole = ("stride", "V")
        aligned = tuple(n for n, kind in signature.items() if kind.startswith("*") or n in whole)
        options = {"num_warps": warps(BLOCK)}
        if kernel in (law_kernel, chain_kernel):
            options = held_options(BLOCK, hip=hip)
        if kernel is follow_kernel:
            options = {"num_warps": 4}
        return Configuration(f"{title} {name}", kernel, signature, constants, aligned, options)

    unlimited: set[str] = set() if sparse else {"temperature", "top_k", "top_p", "min_p"}
    unlisted: set[str] = (
        set() if sparse else {"groups", "list_tokens", "list_scores", "counts", "dropped"}
    )
    for rule in ("greedy", "gumbel"):
        held = {**shared, **heat, "GUMBEL": rule == "gumbel"}
        if rule == "greedy" and sparse:
            continue
        yield made(f"best {rule}", best_kernel, held, unlimited)
    grouped = {**shared, **limits, "GROUP": GROUP, "GROUPS": 4096}
    yield made("stats", stats_kernel, grouped, unlimited | unlisted)
    if sparse:
        yield made("filter", filter_kernel, grouped, set())
    for rule, places in (
        ("law", 0),
        ("walk", 0),
        ("gumbel", 0),
        ("recursive", 1),
        ("recursive", 2),
    ):
        if rule == "gumbel" and not sparse:
            continue
        held = {
            **shared, **limits, "SPARSE": sparse, "RULE": rule, "PLACES": places,
            "PLACES_HELD": max(1, places),
        }  # fmt: skip
        absent = unlimited | unlisted | (set() if places else {"q"})
        title = f"law {rule}{places or ''}"
        yield made(title, law_kernel, held, absent)
    for rule in ("greedy", "walk", "recursive"):
        held = {
            **shared, "FROM_TILES": rule == "greedy", "BY_CHILD": rule == "recursive",
            "HAS_Q": rule == "walk", "CHECKED": rule == "walk", "ROWS": MOST_ROWS, "STEPS": 64,
            "SOME": 1024 // tiles,
        }  # fmt: skip
        unread = {"greedy": {"q"}, "walk": {"peaks", "picks"}}
        yield made(f"follow {rule}", follow_kernel, held, unread.get(rule, {"peaks", "picks", "q"}))
    for rule in ("token", "block"):
        held = {
            **shared, **heat, "HAS_Q": True, "SPARSE": sparse, "WHOLE": rule == "block",
            "ROWS": rows, "STEPS": 64,
        }  # fmt: skip
        unplain: set[str] = set() if sparse else {"plain_parts"}
        if rule == "block" or not sparse:
            yield made(f"residual {rule}", residual_kernel, held, unlimited | unlisted)
        yield made(f"chain {rule}", chain_kernel, held, unlimited | unlisted | unplain)
