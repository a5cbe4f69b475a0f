"""
Tables and figure of `learning.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from learning_jobs import K
from recording import interval, origin_in_words


TITLES = {
    "student": "student, untrained",
    "rft": "rejection fine-tuning (SFT)",
    "dpo": "DPO on solution pairs",
    "step_dpo": "Step-DPO on sibling steps",
    "kto": "KTO on solutions",
    "grpo": 'GRPO, `loss_type="dapo"` (online)',
    "larger_critics": "this method, three larger critics",
    "critic": "this method, critic",
    "paper": "this method, critic, loss as in the paper",
    "shrinkage": "this method, shrinkage",
    "monte_carlo": "this method, Monte Carlo",
    "critic_2": "this method, critic, two iterations",
    "shrinkage_2": "this method, shrinkage, two iterations",
    "monte_carlo_2": "this method, Monte Carlo, two iterations",
    "log_partition_sample": "critic, less the log-partition of the samples (AEPO)",
    "log_partition_gaussian": "critic, less the Gaussian log-partition (AEPO)",
    "listwise": "critic, listwise loss, no anchors (DriveDPO)",
    "hard_negatives": "DPO on next steps by the critic, closest negative (DriveDPO)",
    "worst_negatives": "DPO on next steps by the critic, worst negative",
    "warm_up": "GRPO on half the tokens, then critic (ByteDance's DAPO)",
}
BASELINES = ("rft", "dpo", "step_dpo", "kto", "grpo")
SIBLINGS = {  # and what each is measured against
    "log_partition_sample": ("critic",),
    "log_partition_gaussian": ("critic",),
    "listwise": ("critic",),
    "hard_negatives": ("worst_negatives", "critic"),
    "worst_negatives": ("step_dpo", "critic"),
    "warm_up": ("critic", "grpo"),
}
OWN = tuple(name for name in TITLES if name not in (*BASELINES, *SIBLINGS, "student"))
METRICS = (f"mean@{K}", "greedy")
NUM_SEEDS_SIBLINGS = 5


def scores(task: dict[str, Any], method: str, metric: str) -> np.ndarray:
    return np.array([run[metric] for run in task["results"][method].values()])


def differences(task: dict[str, Any], method: str, other: str, metric: str) -> np.ndarray:
    """How far a method is ahead of another one, for each seed that both have."""
    runs, others = task["results"][method], task["results"][other]
    return np.array([runs[seed][metric] - others[seed][metric] for seed in runs if seed in others])


def best(task: dict[str, Any], methods: Sequence[str], metric: str = METRICS[0]) -> str:
    """The method with the highest mean, of those that were tried on the task."""
    tried = [method for method in methods if method in task["results"]]
    return max(tried, key=lambda method: scores(task, method, metric).mean())


def spread(numbers: Sequence[float], form: str = "") -> str:
    mean, half = interval(numbers)
    return f"{mean:{form}.1f} ± {half:.1f}"


def table(task: dict[str, Any]) -> str:
    """Accuracy of each method, and how far the best of this method's is ahead of it, seed by seed."""
    ahead = best(task, OWN)
    titles = [f"{metric}" for metric in METRICS]
    titles += [f"{metric}: {TITLES[ahead].removeprefix('this method, ')} minus this" for metric in METRICS]
    lines = [f"| method | {' | '.join(titles)} | tokens | settings |", "|---" * (len(titles) + 3) + "|"]
    for method in task["results"]:
        if method in SIBLINGS:
            continue
        cells = [spread(scores(task, method, metric)) for metric in METRICS]
        for metric in METRICS:
            cells.append("" if method == ahead else spread(differences(task, ahead, method, metric), "+"))
        title = f"**{TITLES[method]}**" if method == ahead else TITLES[method]
        lines.append(f"| {title} | {' | '.join(cells)} | {_cost(task, method)} |")
    return "\n".join(lines)


def _cost(task: dict[str, Any], method: str) -> str:
    """Tokens and settings, the last cells of a row."""
    tokens = np.mean([run["tokens"] for run in task["results"][method].values()])
    settings = ", ".join(f"{name} {_shown(value)}" for name, value in task["settings"][method].items())
    return f"{tokens / 1000:,.0f} k | {settings}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def siblings_table(task: dict[str, Any]) -> str:
    """Each sibling method, and how far it is ahead of what it is measured against, seed by seed."""
    lines = [
        f"| method | {' | '.join(METRICS)} | minus | {' | '.join(METRICS)} | tokens | settings |",
        "|---" * 8 + "|",
    ]
    for method, others in SIBLINGS.items():
        for other in others if method in task["results"] else ():
            cells = [spread(scores(task, method, metric)) for metric in METRICS] + [TITLES[other]]
            cells += [spread(differences(task, method, other, metric), "+") for metric in METRICS]
            lines.append(f"| {TITLES[method]} | {' | '.join(cells)} | {_cost(task, method)} |")
    return "\n".join(lines)


def verdict(task: dict[str, Any]) -> str:
    """Which baselines the best of this method's is ahead of, in words."""
    own = best(task, OWN)
    groups: dict[str, list[str]] = {"is ahead of": [], "is behind": [], "cannot be told apart from": []}
    for other in BASELINES:
        mean, half = interval(differences(task, own, other, METRICS[0]))
        relation = "is ahead of" if mean > half else "is behind" if mean < -half else "cannot be told apart from"
        groups[relation].append(f"{TITLES[other]} ({mean:+.1f} ± {half:.1f})")
    said = "; ".join(f"{relation} {', '.join(others)}" for relation, others in groups.items() if others)
    return f'{METRICS[0]}, points: "{TITLES[own]}" {said}.'


def tuning_table(task: dict[str, Any]) -> str:
    """All settings that were tried, on validation problems; those of the finalists on all tuning seeds."""
    lines = [f"| method | settings | validation {METRICS[0]} | greedy |", "|---|---|---|---|"]
    for method, found in task["tuning"].items():
        for run in found["tried"]:
            settings = ", ".join(f"{name} {_shown(value)}" for name, value in run["settings"].items())
            mark = "**" if run["settings"] == found["chosen"] else ""
            again = [other for other in found["finals"] if other["settings"] == run["settings"]] or [run]
            cells = [mark + ", ".join(f"{100 * each[metric]:.1f}" for each in again) + mark for metric in METRICS]
            lines.append(f"| {TITLES[method]} | {settings} | {' | '.join(cells)} |")
    return "\n".join(lines)


def details(record: dict[str, Any]) -> str:
    text = origin_in_words(record) + "\n"
    for name, task in record["tasks"].items():
        seeds = ", ".join(task["results"]["critic"])
        text += f"\n### Task `{name}`\n\nTrained {task['trained']}; seeds {seeds}. {verdict(task)}\n\n{table(task)}\n"
        if any(method in SIBLINGS for method in task["results"]):
            text += f"\nSibling methods, of the first {NUM_SEEDS_SIBLINGS} seeds, with differences of the same seeds:"
            text += f"\n\n{siblings_table(task)}\n"
        text += f"\n<details><summary>All settings that were tried</summary>\n\n{tuning_table(task)}\n\n</details>\n"
    return text.rstrip()


def short(record: dict[str, Any]) -> str:
    """Accuracies of all tasks in one table, and who is ahead."""
    tasks = record["tasks"]
    titles = [f"{name.replace('_', ' ')}: {metric}" for name in tasks for metric in METRICS]
    lines = [f"| method | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for method in next(iter(tasks.values()))["results"]:
        if method in SIBLINGS:  # these are in the details
            continue
        cells = [
            spread(scores(task, method, metric)) if method in task["results"] else ""
            for task in tasks.values()
            for metric in METRICS
        ]
        lines.append(f"| {TITLES[method]} | {' | '.join(cells)} |")
    verdicts = [f"{name.replace('_', ' ').capitalize()}, {verdict(task)}" for name, task in tasks.items()]
    return "\n".join([*lines, "", " ".join(verdicts)])


def draw(record: dict[str, Any], path: Path) -> None:
    """A line a method: accuracy of one sample and of greedy decoding, with intervals."""
    tasks = record["tasks"]
    figure = Figure(figsize=(6.2 * len(tasks), 4.6), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    methods = [method for method in next(iter(tasks.values()))["results"] if method not in SIBLINGS][::-1]
    for axis, (name, task) in zip(axes, tasks.items(), strict=True):
        for metric, marker, shift in zip(METRICS, "os", (0.12, -0.12), strict=True):
            for row, method in enumerate(methods):
                if method not in task["results"]:
                    continue
                mean, half = interval(scores(task, method, metric))
                color = "#4477aa" if method in OWN else "#bbbbbb" if method == "student" else "#ee6677"
                filled = color if metric == METRICS[0] else "white"
                axis.errorbar(mean, row + shift, xerr=half, fmt=marker, color=color, markerfacecolor=filled)
        axis.set(
            title=name.replace("_", " "), xlabel="% correct on test problems", xlim=(None, min(100, axis.get_xlim()[1]))
        )
        axis.set_yticks(range(len(methods)), [TITLES[method].replace("`", "") for method in methods])
        axis.grid(axis="x", alpha=0.3)
    axes[0].plot([], [], "o", color="#555555", label=f"{METRICS[0]}, temperature 1")
    axes[0].plot([], [], "s", color="#555555", markerfacecolor="white", label="greedy")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)
