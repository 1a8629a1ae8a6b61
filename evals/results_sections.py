"""The sections of docs/results.md: each reads raw files of one kind and makes tables of them.

A new raw file needs a section here, or joins the pattern of one. `specdec bench --out FOLDER`
leaves a summary.json: copied to evals/results/bench_<what>.json it is read too.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from specdec.evals import rule_table
from specdec.evals.markdown import table
from specdec.evals.results_audits import (
    estimators,
    exact_matrix,
    mutation,
    planted_power,
    predicted_speed,
    verify_pair,
    verify_power,
)
from specdec.evals.results_kernels import attention_traffic, gpu_bench, kernel_compile

Raw = dict[str, Any]
Lines = list[str]
Files = dict[str, Raw]  # name of the file -> what it holds


@dataclass(frozen=True, slots=True)
class Section:
    """One heading of the page."""

    title: str
    pattern: str  # of the names of its files
    make: Callable[[Files], Lines]
    absent: str = ""  # what the page says where there is no such file


# --- speed

_RATIOS = (
    ("against plain transformers", "specdec / transformers"),
    ("against `assistant_model`, its defaults", "specdec / transformers assisted default"),
    ("against `assistant_model`, best constant", "specdec / transformers assisted best constant"),
    ("against plain specdec", "specdec / specdec plain"),
    ("plain specdec against plain transformers", "specdec plain / transformers"),
    ("share of the ceiling E t1 / (g t_draft + t_verify)", "share of ceiling"),
)


def speed_pair(files: Files) -> Lines:
    columns = [(raw, mode) for raw in files.values() for mode in ("greedy", "sampled")]
    heads = [f"{raw['dtype']}, {mode}" for raw, mode in columns]
    rows: list[list[object]] = [
        [label, *(raw[mode]["ratios"][key] for raw, mode in columns)] for label, key in _RATIOS
    ]
    rows += [
        ["tokens per target pass", *(raw[mode]["tokens_per_target_pass"] for raw, mode in columns)],
        ["acceptance rate", *(raw[mode]["acceptance_rate"] for raw, mode in columns)],
        *(
            [
                f"drafted tokens per pass, {who}",
                *(raw[m]["draft_length"][who] for raw, m in columns),
            ]
            for who in ("specdec", "transformers")
        ),
    ]
    return [
        "The built-in pair on held-out code, each side with its best constant draft length: median",
        "over prompts of the ratio of tokens per second. `python -m specdec.evals.speed pair`.",
        "",
        *table(["built-in pair", *heads], rows),
        "",
        *(_lossless(raw) for raw in files.values()),
    ]


def _lossless(raw: Raw) -> str:
    its = {k: v for k, v in raw["lossless"].items() if k != "prompts"}
    counts = ", ".join(f"{name} {count}" for name, count in its.items())
    total = raw["lossless"]["prompts"]
    return f"Greedy texts equal to transformers' own in {raw['dtype']}, of {total}: {counts}."


def speed_shapes(files: Files) -> Lines:
    [raw] = files.values()
    rows = [
        [
            name, shape["specdec plain / transformers"],
            *(shape["contenders"][who]["tokens_per_second_median"]
              for who in ("specdec plain", "transformers")),
        ]
        for name, shape in raw["shapes"].items()
    ]  # fmt: skip
    return [
        "Plain decoding of Llama models with random weights, short prompts.",
        "`python -m specdec.evals.speed shapes`.",
        "",
        *table(["shape", "ratio", "specdec tokens/s", "transformers tokens/s"], rows),
    ]


def bench(files: Files) -> Lines:
    lines = [
        "`specdec bench`: medians over prompts and rounds, 20th to 80th percentile in brackets; a",
        "row that is not lossless has no speed.",
    ]
    for name, raw in files.items():
        baselines = list(dict.fromkeys(b for row in raw["rows"] for b in row["speed_against"]))
        rows = [
            [
                row["name"] + (f" ({row['label']})" if row["label"] else ""),
                _spread(row["tokens_per_second"]),
                *(_spread(row["speed_against"].get(b)) for b in baselines),
                row["tokens_per_pass"], row["lossless"]["note"],
            ]
            for row in raw["rows"]
        ]  # fmt: skip
        heads = ["row", "tokens/s", *(f"against {b}" for b in baselines)]
        lines += ["", f"### {name.removesuffix('.json')}", "", bench_settings(raw["settings"])]
        lines += ["", *table([*heads, "tokens per pass", "lossless"], rows)]
    return lines


def bench_settings(settings: Raw) -> str:
    target, draft = settings["target"], settings["draft"]
    how = "greedy" if settings["temperature"] == 0 else f"temperature {settings['temperature']:g}"
    sets = Counter(name for name, _ in settings["prompts"])
    prompts = ", ".join(f"{count} of {name}" for name, count in sets.items())
    parts = [
        f"Target {target['name']} ({target['parameters'] / 1e6:.0f}M, {target['dtype']})",
        f"draft {draft['name']} ({draft['parameters'] / 1e6:.1f}M)" if draft else "no draft model",
        how, f"{settings['max_new_tokens']} new tokens", f"{settings['rounds']} rounds",
        f"prompts: {prompts}",
    ]  # fmt: skip
    if settings["random_weights"]:
        parts.append("RANDOM WEIGHTS")
    if settings["synthetic_acceptance"] is not None:
        parts.append(f"SYNTHETIC draft, acceptance {settings['synthetic_acceptance']:g}")
    return "; ".join(parts) + "."


def _spread(found: Raw | None) -> str:
    if found is None:
        return "-"
    return f"{found['median']:.2f} ({found['p20']:.2f} to {found['p80']:.2f})"


# --- how much is drafted


def _policy_row(label: str, found: Raw) -> list[object]:
    speed = found["speed against plain"]
    best = found["best fixed"]
    decoding = found["decoding against plain"]["auto"]
    return [label, speed["auto"], decoding, best, speed[best], found["auto against best fixed"]]


_POLICY_HEADS = [
    "", "auto against plain", "decoding alone", "best fixed", "that against plain",
    "auto against it",
]  # fmt: skip
_DECODING = "Decoding alone leaves out the step that reads the prompt."


def policy_sets(files: Files) -> Lines:
    [raw] = files.values()
    rows = [_policy_row(label, found) for label, found in raw["sets"].items()]
    raced = {label.partition(",")[0] for label in raw["sets"]}
    turns = "Of multi_turn the first turn is continued. " if "multi_turn" in raced else ""
    return [
        "Adaptive drafting beside fixed lengths and plain decoding on the built-in pair;",
        "copy_edits is held to its reference, the draft on random text has shuffled weights.",
        turns + "At T=1 the rule is `gumbel`, under which all write the same text. " + _DECODING,
        "`python -m specdec.evals.policy_speed sets`.",
        "",
        *table(_POLICY_HEADS, rows),
    ]


def policy_synthetic(files: Files) -> Lines:
    [raw] = files.values()
    rows = [_policy_row(f"acceptance {a}", found) for a, found in raw["acceptance"].items()]
    return [
        f"SYNTHETIC drafts of a known acceptance; a pass of one costs {raw['share']:g} of a target",
        f"pass. {_DECODING} `python -m specdec.evals.policy_speed synthetic`.",
        "",
        *table(_POLICY_HEADS, rows),
    ]


def policy_lookup(files: Files) -> Lines:
    [raw] = files.values()
    decoding = raw["decoding against plain"]
    rows = [
        [name, speed, decoding.get(name, "")] for name, speed in raw["speed against plain"].items()
    ]
    return [
        "Prompt lookup on copy-heavy prompts, held to the copy on both sides; speeds against",
        f"plain specdec decoding. {_DECODING} Against the best of transformers,",
        f"{raw['best of transformers']}: auto {raw['auto against it']:.2f}, {raw['best fixed']}",
        f"{raw['best fixed against it']:.2f}.",
        "`python -m specdec.evals.policy_speed lookup`.",
        "",
        *table(["", "speed", "decoding alone"], rows),
    ]


# --- what is accepted


def rule_choice(files: Files) -> Lines:
    [raw] = files.values()
    return [
        "Tokens per target pass and standard error; the built-in pair in float32,",
        f"{raw['prompts']} held-out prompts, {raw['samples']} samples each of",
        f"{raw['new_tokens']} tokens.",
        "`python -m specdec.evals.rule_choice`.",
        "",
        *rule_table.table(raw),
    ]


def block_gain(files: Files) -> Lines:
    [raw] = files.values()
    rows = [
        [
            f"T = {float(temperature):g}, {len(row['shape'])} drafted, `{row['rule']}`",
            rule_table.cell(row),
            row["over_first_of_shape"],
        ]
        for temperature, found in raw["temperatures"].items()
        for row in found
    ]
    return [
        "Block against token-wise verification of chains; the built-in pair in float32,",
        f"{raw['prompts']} held-out prompts, {raw['samples']} samples each of",
        f"{raw['new_tokens']} tokens. `python -m specdec.evals.rule_choice --chain 8`.",
        "",
        *table(["", "tokens per target pass", "over `token`"], rows),
    ]


def optimal_trees(files: Files) -> Lines:
    [raw] = files.values()
    rows = []
    for setting, found in raw["settings"].items():
        for size in found["sizes"]:
            rates = {name: rule_table.cell(its) for name, its in size["contenders"].items()}
            other = next((n for n in rates if n not in ("optimal tree", "chain")), "")
            rows.append(
                [
                    f"{setting}, {size['nodes']}", size["predicted"], rates["optimal tree"],
                    size["predicted_over_measured"], rates["chain"],
                    size["optimal_tree_over_chain"], f"{other} {rates.get(other, '')}".strip(),
                    _best_over_chain(size["contenders"]),
                ]
            )  # fmt: skip
    return [
        "Tokens per target pass of optimal trees (Sequoia): predicted from acceptance by depth and",
        "rank on half of the held-out prompts for the other half, both ways; and other drafts of",
        f"as many nodes; {raw['prompts']} prompts, {raw['samples']} samples each of",
        f"{raw['new_tokens']} tokens, float32. Coupled trees are held to a coupled chain.",
        "`python -m specdec.evals.optimal_trees`.",
        "",
        *table(
            [
                "nodes", "predicted", "measured", "ratio", "chain", "tree over chain", "another",
                "best over chain",
            ],
            rows,
        ),
    ]  # fmt: skip


def _best_over_chain(contenders: dict[str, Any]) -> float:
    """Tokens per target pass of the best tree over those of the chain."""
    rates = {name: float(its["tokens_per_target_pass"]) for name, its in contenders.items()}
    chain = rates.pop("chain")
    return max(rates.values()) / chain


def ensemble(files: Files) -> Lines:
    [raw] = files.values()
    names = ("draft", "ngram", "ensemble, equal budget", "ensemble, sum of budgets")
    rows = [
        [
            f"{name}, T = {float(temperature):g}",
            *("{:.2f} ± {:.2f}".format(*found["tokens_per_target_pass"][who]) for who in names),
        ]
        for temperature, sets in raw["temperatures"].items()
        for name, found in sets.items()
    ]  # fmt: skip
    return [
        f"Tokens per target pass and standard error over {raw['prompts']} prompts, budget",
        f"{raw['budget_of_each']} each. `python -m specdec.evals.ensemble`.",
        "",
        *table(["set", *names], rows),
    ]


def boost(files: Files) -> Lines:
    [raw] = files.values()
    rows = [
        [i, f"{covered:.4f}", f"{draft['alone']:.4f}"]
        for i, (covered, draft) in enumerate(zip(raw["coverage"], raw["drafts"], strict=True), 1)
    ]
    return [
        "Share of positions where at least one of the first i boost-tuned drafts has the target's",
        f"token first; the untuned draft: {raw['untuned']:.4f}. `python -m specdec.zoo.boost`.",
        "",
        *table(["drafts", "covered together", "this one alone"], rows),
    ]


# --- what parts cost


def core_speed(files: Files) -> Lines:
    [raw] = files.values()
    rows = [
        [name, f"{job['seconds_median'] * 1e3:.2f}", f"{job['of pass']:.3f}",
         job.get("bar"), job.get("reached")]
        for name, job in raw["jobs"].items()
    ]  # fmt: skip
    return [
        f"The acceptance core on {raw['rows']} rows of {raw['vocabulary']} tokens beside one",
        "target pass. `python -m specdec.evals.core_speed`.",
        "",
        *table(["job", "ms", "of a pass", "bar", "reached"], rows),
    ]


def proposer_cost(files: Files) -> Lines:
    [raw] = files.values()
    lengths = ("2048", "8192", "32768")
    rows = [
        [
            f"{name}, {kind}", *(f"{found[n][kind]['microseconds_median']:.0f}" for n in lengths),
            f"{max(found[n][kind]['of_pass'] for n in lengths):.4f}", found[f"{kind}_growth"],
        ]
        for name, found in raw["proposers"].items()
        for kind in ("cold", "warm")
    ]  # fmt: skip
    heads = ["proposer", *(f"µs at {n}" for n in lengths), "of a pass at most", "growth"]
    return [
        "One step of proposers that look text up, at three lengths of text; a target pass of a",
        f"model of the built-in big's shape takes {raw['pass_microseconds'] / 1e3:.1f} ms.",
        "`python -m specdec.evals.proposer_cost`.",
        "",
        *table(heads, rows),
    ]


def draft_window(files: Files) -> Lines:
    [raw] = files.values()
    passes = [
        [
            f"{model}, {how}, {length}",
            *(f"{its[kind]['microseconds_median']:.0f}" for kind in ("full", "window")),
            its["window"]["full_over_this"],
        ]
        for model, ways in raw["passes"].items()
        for how, lengths in ways.items()
        for length, its in lengths.items()
    ]  # fmt: skip
    temperatures = [name for name in raw["tokens"] if name.startswith("temperature")]
    windows = list(raw["tokens"][temperatures[0]])
    tokens = [
        [
            "everything" if window == "None" else window,
            *(raw["tokens"][name][window]["tokens_per_pass"] for name in temperatures),
        ]
        for window in windows
    ]  # fmt: skip
    return [
        f"One draft pass with the whole cache and with a window of {raw['window']} tokens, and",
        "what windows do to tokens per target pass of the built-in pair.",
        "`python -m specdec.evals.draft_window`.",
        "",
        *table(["draft pass at a context of", "full, µs", "window, µs", "gain"], passes),
        "",
        *table(["window", *(f"tokens per pass, {name}" for name in temperatures)], tokens),
    ]


SECTIONS: list[Section] = [
    Section("Speed of the built-in pair", "speed_pair_*.json", speed_pair),
    Section("Plain decoding of random shapes", "speed_shapes.json", speed_shapes),
    Section("Every way to draft, side by side", "bench_*.json", bench),
    Section("Adaptive drafting on prompt sets", "policy_sets.json", policy_sets),
    Section("Adaptive drafting with synthetic drafts", "policy_synthetic.json", policy_synthetic),
    Section("Prompt lookup on copies", "policy_lookup.json", policy_lookup),
    Section("Rules and trees", "rule_choice.json", rule_choice),
    Section("Block verification", "block_gain.json", block_gain),
    Section("Optimal trees", "optimal_trees.json", optimal_trees),
    Section("Ensembles", "ensemble.json", ensemble),
    Section("Boost-tuned drafts", "boost_tuning.json", boost),
    Section("The acceptance core", "core_speed.json", core_speed),
    Section("Proposers that look text up", "proposer_cost.json", proposer_cost),
    Section("Draft windows", "draft_window.json", draft_window),
    Section("Exactness of the rules", "exact_matrix.json", exact_matrix),
    Section("Mutation check", "mutation.json", mutation),
    Section("What a lossless audit sees", "verify_power.json", verify_power),
    Section("Mistakes planted in the engine", "planted_power.json", planted_power),
    Section("The built-in pair, audited", "verify_pair*.json", verify_pair),
    Section("Intervals against the truth", "estimators.json", estimators),
    Section("Predicted and measured speed", "predicted_speed.json", predicted_speed),
    Section("Bytes of tree attention", "attention_traffic.json", attention_traffic),
    Section(
        "Kernels, compiled ahead of time",
        "kernel_compile.json",
        kernel_compile,
        "Not made yet: `python -m specdec.evals.compile_kernels --out FILE` makes the raw file.",
    ),
    Section(
        "Kernels on a GPU",
        "gpu_bench.json",
        gpu_bench,
        "Not run on a GPU: `python -m specdec.evals.gpu_bench` has the figures to come.",
    ),
]
# Patterns of runs that need not be there.
OPTIONAL = {
    "bench_*.json", "verify_power.json", "estimators.json", "predicted_speed.json",
    "optimal_trees.json", "planted_power.json",
}  # fmt: skip
