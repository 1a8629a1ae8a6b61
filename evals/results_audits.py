"""Sections of docs/results.md about exactness and about the evaluation itself."""

from collections import Counter
from typing import Any

from specdec.evals.markdown import table

Files = dict[str, dict[str, Any]]
Lines = list[str]


def exact_matrix(files: Files) -> Lines:
    [raw] = files.values()
    cells = Counter(name.split(", ")[0] for name in raw["results"])
    worst: dict[str, float] = {}
    for name, found in raw["results"].items():
        rule = name.split(", ")[0]
        worst[rule] = max(worst.get(rule, 0.0), float(found.get("float64") or 0.0))
    rows = [[rule, count, f"{worst[rule]:.1e}"] for rule, count in sorted(cells.items())]
    return [
        "Every rule by enumeration of all its random outcomes against the target's law, on",
        f"tables and trees, in float64 and in fractions: {raw['cells']} cells,",
        f"{len(raw['failed'])} failed.",
        "`python -m specdec.evals.nightly_exact`.",
        "",
        *table(["rule", "cells", "largest difference in float64"], rows),
    ]


def mutation(files: Files) -> Lines:
    [raw] = files.values()
    rows = [
        [name, found["mutants"], found["killed"], len(found["survivors"])]
        for name, found in raw.items()
    ]
    return [
        "Planted faults in the acceptance core, one at a time, that its tests found; every",
        "survivor has a written reason. `python -m specdec.evals.mutation`.",
        "",
        *table(["module", "mutants", "found", "survivors with a reason"], rows),
    ]


def predicted_speed(files: Files) -> Lines:
    [raw] = files.values()
    rows = [
        [row["setting"], row["predicted"], row["measured"], f"{row['off_by']:+.1%}",
         row["tokens_per_target_pass"]]
        for row in raw["rows"]
    ]  # fmt: skip
    return [
        "Speed against plain decoding as `specdec eval` predicts it from counts and costs, and as",
        f"measured, on the built-in pair in {raw['dtype']}; at most {raw['worst']:.1%} off.",
        "`python -m specdec.evals.predicted_speed`.",
        "",
        *table(["setting", "predicted", "measured", "off by", "tokens per target pass"], rows),
    ]


def estimators(files: Files) -> Lines:
    [raw] = files.values()
    rows = [
        [name, len(found), *(f"{part(_shares(found)):.1%}" for part in (min, max))]
        for name, found in raw["cases"].items()
    ]
    rates = [rate for found in raw["cases"].values() for rate in found.values()]
    kinds = {rates[0]["first"]: "covered_first", rates[0]["runs"]: "covered"}
    inside = {
        runs: sum(0.92 <= rate[covered] / runs <= 0.98 for rate in rates)
        for runs, covered in kinds.items()
    }
    return [
        f"How often the {raw['confidence']:.0%} intervals of `specdec eval` cover the truth, which",
        f"is known on table models; {raw['texts']} texts a run.",
        *(
            f"Covered in 92 to 98% of {runs} runs: {count} of {len(rates)} rates."
            for runs, count in inside.items()
        ),
        "In 200 runs chance alone puts 3 of 100 rates that are covered in 95% outside.",
        "`python -m specdec.evals.estimators`.",
        "",
        *table(["tree and rule", "rates", "covered, least", "covered, most"], rows),
    ]


def _shares(found: dict[str, Any]) -> list[float]:
    return [row["covered"] / row["runs"] for row in found.values()]


def verify_power(files: Files) -> Lines:
    [raw] = files.values()
    rows = [
        [found["name"], f"{found['total_variation']:.4f}", f"{found['caught']} of {found['runs']}"]
        for found in raw["faults"]
    ]
    return [
        f"What the two-sample test of `specdec verify --detect-tv {raw['detect_tv']:g}` sees:",
        "planted mistakes, the distance of their texts' law from the target's, and in how many",
        f"runs they were caught. Above {raw['above']:g}: {raw['always_caught_above']} of",
        f"{raw['faults_above']} in every run. `python -m specdec.evals.verify_power`.",
        "",
        *table(["mistake", "total variation", "caught"], rows),
        "",
        *(
            f"False alarms on {name}: {null['alarms']} of {null['runs']} runs at the level "
            f"{null['level']:g}."
            for name, null in raw["null"].items()
        ),
    ]


def verify_pair(files: Files) -> Lines:
    lines = [
        "`specdec verify` on the built-in pair: is it lossless, and could the audit have failed?",
    ]
    for name, raw in files.items():
        its = raw["settings"]
        lines += [
            "",
            f"### {name.removesuffix('.json')}",
            "",
            f"`--draft {its['draft']['name']} --target {its['target']['name']}` in "
            f"{its['target']['dtype']}, rule {its['verification']}, {its['num_draft_tokens']} "
            f"drafted tokens, temperature {its['temperature']:g}; texts of "
            f"{its['sampled_tokens']} tokens behind {its['sampled_context'] or 'all'} tokens of "
            f"{its['sampled_prompts']} prompts; `--detect-tv {its['detect_tv']:g}`.",
            "",
            raw["verdict"].split(" | ")[0].capitalize() + ".",
            "",
            *table(
                ["part", "check", "passed", "what came out"],
                [
                    [part, finding["name"], "yes" if finding["passed"] else "NO", finding["note"]]
                    for part, content in raw["parts"].items()
                    for finding in content["findings"]
                ],
            ),
        ]
    return lines


def _sound(faults: list[dict[str, Any]]) -> str:
    """Of the rows that are no mistakes, if there are any."""
    sound = [found["caught"] for found in faults if found["sound"]]
    if not sound:
        return ""
    return f" Sound ones in the same machinery, caught: {sum(sound)} of {len(sound)}."


def planted_power(files: Files) -> Lines:
    [raw] = files.values()
    rows = [
        [
            found["name"] + (" (sound)" if found["sound"] else ""),
            f"{found['total_variation']:.4f}",
            "refused by the engine" if "refused" in found else f"{found['p_value']:.2g}",
            "caught" if found["caught"] else "not caught",
        ]
        for found in raw["faults"]
    ]
    return [
        "The same test on texts that the production engine samples with a mistake planted in it,",
        f"{raw['faults'][0]['texts']} on each side, as `specdec verify --detect-tv "
        f"{raw['detect_tv']:g}` would: {raw['caught_above']} of {raw['faults_above']} mistakes",
        f"above {raw['above']:g} caught.{_sound(raw['faults'])}",
        "The total variation is that of whole steps, enumerated.",
        "`python -m specdec.evals.planted_power`.",
        "",
        *table(["mistake", "total variation", "p-value", "verdict"], rows),
    ]
