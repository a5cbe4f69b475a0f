"""
Figure and tables of `values.py`.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from recording import origin_in_words


TITLES = {
    "own": "every state for itself (paper)",
    "counted": "the same draws, passing ones counted",
    "reuse": "reuse, fixed number",
    "reuse, adaptive": "reuse + adaptive",
    "reuse, adaptive: plain mean": "reuse + adaptive, plain mean",
    "adaptive": "adaptive without reuse",
    "adaptive: plain mean": "adaptive without reuse, plain mean",
}
STYLES = {  # colours of Paul Tol's "bright" scheme
    "own": ("#000000", "o", "-"),
    "counted": ("#888888", "s", "--"),
    "reuse": ("#4477aa", "^", "-"),
    "reuse, adaptive": ("#ee6677", "D", "-"),
    "reuse, adaptive: plain mean": ("#ee6677", "v", ":"),
    "adaptive": ("#228833", "P", "-"),
    "adaptive: plain mean": ("#228833", "X", ":"),
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Error against tokens, a line a scheme."""
    figure = Figure(figsize=(8.5, 5.6), layout="constrained")
    axis = figure.subplots()
    for name, points in results["curves"].items():
        color, marker, line = STYLES[name]
        tokens, errors = ([point[column] for point in points] for column in ("tokens", "error"))
        bars = np.abs(np.transpose([point["error_interval"] for point in points]) - errors)
        axis.plot(tokens, errors, color=color, marker=marker, linestyle=line, markersize=5, label=TITLES[name])
        axis.errorbar(tokens, errors, bars, color=color, linestyle="none", alpha=0.35, linewidth=1)
    reference = next(point for point in results["curves"]["own"] if point["maximum"] == 16)
    axis.axhline(reference["error"], color="#bbbbbb", linewidth=1, zorder=0)
    axis.annotate(
        "error of 16 completions of every state", (10.5, reference["error"]), (0, 4), textcoords="offset points"
    )
    axis.set(xscale="log", yscale="log", xlabel="generated tokens per state", ylabel="mean squared error of a value")
    ticks = [10, 20, 50, 100, 200, 500, 1000]
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ticks = [0.002, 0.005, 0.01, 0.02, 0.05]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.savefig(path, dpi=120)


def setting(point: dict[str, Any]) -> str:
    if point["minimum"] is None:
        return f"n = {point['maximum']}"
    return f"{point['minimum']} to {point['maximum']}, precision {point['precision']:g}"


def signed(bias: float) -> str:
    return f"{bias:+.3f}"


def table(results: dict[str, Any]) -> str:
    """Schemes: their tokens at the baseline's error, and the setting chosen for it."""
    reference = results["tokens_at_reference"]["own"]
    lines = [
        "| scheme | setting | tokens per state | mean squared error | fewer tokens at equal error "
        "| tokens at the error of 16 of every state |",
        "|---|---|---|---|---|---|",
    ]
    for name in results["curves"]:
        fixed = [point for point in results["curves"][name] if point["maximum"] == 16 and point["minimum"] is None]
        point = results["chosen"].get(name) or fixed[0]
        at_reference = results["tokens_at_reference"][name]
        of_reference = "" if at_reference is None else f"{at_reference:.0f} ({at_reference / reference - 1:+.0%})"
        lines.append(
            f"| {TITLES[name]} | {setting(point)} | {point['tokens']:.0f} | {spread(point, 'error', '.4f')} | "
            f"{'' if name == 'own' else spread(point, 'saving', '.0%')} | {of_reference} |"
        )
    return "\n".join(lines)


def spread(point: dict[str, Any], name: str, form: str) -> str:
    low, high = point[f"{name}_interval"]
    return f"{point[name]:{form}} ({low:{form}} to {high:{form}})"


def bias_table(results: dict[str, Any]) -> str:
    """Mean signed error of the values, by true value."""
    edges = results["edges"]
    bins = [f"{low:g}-{high:g}" for low, high in itertools.pairwise(edges)]
    lines = [f"| scheme | setting | {' | '.join(bins)} |", "|---" * (len(bins) + 2) + "|"]
    fixed = [point for name in ("own", "reuse") for point in results["curves"][name] if point["maximum"] == 16]
    for point in (*fixed, *results["chosen"].values(), *results["examples"]):
        cells = " | ".join(map(signed, point["bias_by_bin"]))
        lines.append(f"| {TITLES[point['estimator']]} | {setting(point)} | {cells} |")
    lines.append(f"| states | | {' | '.join(map(str, results['states_by_bin']))} |")
    return "\n".join(lines)


def candidate_table(results: dict[str, Any]) -> str:
    """Errors of the candidates' values."""
    lines = [
        "| scheme | setting | candidates | mean squared error: `values` | plain mean | as often as drawn: `values` | "
        "plain mean | bias: `values` | plain mean |",
        "|---" * 9 + "|",
    ]
    for point in results["candidates"]:
        cells = [
            f"{point[name][column]:.4f}" for column in ("error", "error_by_count") for name in ("values", "plain mean")
        ]
        cells += [signed(point[name]["bias"]) for name in ("values", "plain mean")]
        lines.append(
            f"| {TITLES[point['family']]} | {setting(point)} | {point['per_run']:,.0f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def details(record: dict[str, Any]) -> str:
    results = record["results"]
    covered = min(point["covered"] for point in results["candidates"])
    return (
        f"{origin_in_words(record)} "
        f"{sum(results['states'].values()):,} states of {sum(results['problems'].values())} problems, "
        f"{record['arguments']['num_truth']} completions each; {record['arguments']['search_repeats']} runs of each "
        f"setting on the half that chooses, {record['arguments']['repeats']} on the half that reports "
        f"({results['states']['report']} states, {results['problems']['report']} problems).\n\n"
        f"{table(results)}\n\nMean signed error by true value:\n\n{bias_table(results)}\n\n"
        f"Candidates that do not end the solution and whose truth rests on 4 completions at least ({covered:.0%} or "
        f"more of them):\n\n{candidate_table(results)}"
    )
