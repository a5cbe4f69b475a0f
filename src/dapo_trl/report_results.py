"""
What a report says of the results of a run: accuracies, trainings, the critic, advantages.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dapo_trl.diagnosing import MEASURES, held_out_rows
from dapo_trl.diagnosis import Diagnosis, TooFewProblemsError, diagnose
from dapo_trl.files import numbered_folders, read_json, read_parquet, refuse_incomplete
from dapo_trl.intervals import Estimate
from dapo_trl.report_figures import (
    Figure,
    calibration_figure,
    curve_figure,
    histogram_figure,
    interval_figure,
    parts_figure,
)
from dapo_trl.report_run import AGAIN, POLICIES, VALUES, Iteration, stage_counts
from dapo_trl.run_folder import critic_folders, scored_config, table_cure


_MEASURED = ("greedy", "mean_at_k", "pass_at_k")

# Curves of a training: title -> names in the log and their labels. The first ones that are there are shown at once.
_CURVES = {
    "Loss": {"loss": "training", "eval_loss": "held-out problems"},
    "Skill on held-out problems": {"eval_skill": "skill"},
    "Accuracy on held-out problems": {"eval_accuracy/greedy": "greedy", "eval_accuracy/mean_at_k": "mean@k"},
    "Steps with the right sign": {"sign_accuracy": "training", "eval_sign_accuracy": "held-out"},
    "Log-ratio of steps, nats": {"log_ratios/positive": "advantage > 0", "log_ratios/negative": "advantage < 0"},
    "Share of the target reached": {"target_reached": "training", "eval_target_reached": "held-out"},
    "Drift from the reference, nats a step": {"kl": "training", "eval_kl": "held-out"},
    "Calibration error": {"eval_calibration_error": "held-out problems"},
    "Norm of the gradient": {"grad_norm": "norm"},
    "Learning rate": {"learning_rate": "rate"},
    "Tokens per second": {"tokens/per_second": "tokens"},
}
_NUM_CURVES = 3
_NO_CURVES = (
    "Nothing was kept of what was logged: the training has no checkpoint yet, or an earlier version of dapo-trl did it."
)


@dataclass
class Training:
    """Curves of a model."""

    title: str
    note: str
    figures: list[Figure] = field(default_factory=list)
    more: list[Figure] = field(default_factory=list)


@dataclass
class Critic:
    """What the critic of an iteration knows, or the mean of several."""

    iteration: Iteration
    note: str = ""
    diagnosis: Diagnosis | None = None
    measures: list[tuple[str, str]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)

    @property
    def number(self) -> int:
        """Critics whose mean value is meant."""
        return len(critic_folders(self.iteration.folder))

    @property
    def is_shifted(self) -> bool:
        """Whether it is the first iteration's, with values that are moved to this one's outcomes."""
        return "later_critics" in (scored_config(self.iteration.folder / "data") or {})


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a policy."""

    label: str
    style: str
    results: dict[str, Any]

    def estimate(self, name: str) -> Estimate:
        """Mean and interval of `"greedy"`, `"mean_at_k"` or `"pass_at_k"`."""
        return Estimate(**self.results[name])


# ---- Accuracy ----


def accuracies_of(folder: Path, iterations: list[Iteration]) -> list[Accuracy]:
    """
    Accuracies of all policies that were measured.

    Args:
        folder (`Path`):
            Folder of the run.
        iterations (`list[Iteration]`):
            Its iterations.

    Returns:
        `list[Accuracy]`: before training first.
    """
    paths = [("before training", "before", folder / "before.json")]
    for part in iterations:
        prefix = f"{part.title.lower()}, " if part.title else "trained on "
        for name, source in POLICIES.items():
            label = f"{prefix}{VALUES[source]} values"
            paths.append((label, source, part.folder / name / "accuracy.json"))
    found = []
    for label, style, path in paths:
        if path.exists():
            results = read_json(path, ["results"], AGAIN)["results"]
            refuse_incomplete(path, results, (*_MEASURED, "k", "num_problems"), AGAIN)
            found.append(Accuracy(label, style, results))
    return found


def accuracy_figures(accuracies: list[Accuracy]) -> list[Figure]:
    """
    Accuracies of all policies, a figure for each way to measure them.

    Args:
        accuracies (`list[Accuracy]`):
            Policies.

    Returns:
        `list[Figure]`.
    """
    titles = {"greedy": "Greedy", "mean_at_k": "One sample: mean@{k}", "pass_at_k": "Any of {k} samples: pass@{k}"}
    return [
        interval_figure(
            title.format(k=accuracies[0].results["k"]),
            [(row.label, row.style, row.estimate(name)) for row in accuracies],
            0,
            1,
        )
        for name, title in titles.items()
        if accuracies
    ]


# ---- Training ----


def trainings_of(iterations: list[Iteration]) -> list[Training]:
    """
    Curves of all trainings that have begun.

    Args:
        iterations (`list[Iteration]`):
            Iterations of the run.

    Returns:
        `list[Training]`: with a note where nothing was kept of what was logged.
    """
    policies = {name: f"Policy, {VALUES[source]} values" for name, source in POLICIES.items()}
    found = []
    for part in iterations:
        critics = [path for path in critic_folders(part.folder) if path.parent == part.folder]
        titles = {folder: f"Critic {number}" for number, folder in enumerate(critics, start=1)}
        if len(critics) == 1:
            titles = {critics[0]: "Critic"}
        for folder, title in (titles | {part.folder / name: title for name, title in policies.items()}).items():
            if (folder / "stage.json").exists() or (folder / "begun.json").exists():
                found.append(_training(folder, f"{part.title}: {title}" if part.title else title))
    return found


def _training(folder: Path, title: str) -> Training:
    path, note = folder / "trainer_state.json", ""
    if not path.exists():
        saved = [state for _, at in numbered_folders(folder, "checkpoint") if (state := at / path.name).exists()]
        if not saved:
            return Training(title, _NO_CURVES)
        path, note = saved[-1], f"As far as {saved[-1].parent.name}."
    history = read_json(path, ["log_history"], "Delete it; only this report reads it")["log_history"]
    figures = [figure for title, names in _CURVES.items() if (figure := _curves(title, names, history))]
    return Training(title, note, figures[:_NUM_CURVES], figures[_NUM_CURVES:])


def _curves(title: str, names: dict[str, str], history: list[dict[str, Any]]) -> Figure | None:
    series = {
        label: [(row["step"], row[name]) for row in history if row.get(name) is not None and math.isfinite(row[name])]
        for name, label in names.items()
    }
    known = {label: points for label, points in series.items() if points}
    if max(map(len, known.values()), default=0) < 2:
        return None
    constants = [row["eval_bce_constant"] for row in history if "eval_bce_constant" in row]
    constant = ("best constant", constants[-1]) if constants and "eval_loss" in names else None
    return curve_figure(title, known, "optimizer steps", constant)


# ---- The critic ----


def critics_of(iterations: list[Iteration]) -> list[Critic]:
    """
    What the critics know about problems that they were not trained on.

    Args:
        iterations (`list[Iteration]`):
            Iterations of the run.

    Returns:
        `list[Critic]`: of the iterations whose rows the critic has valued.

    Raises:
        ValueError: if valued rows are damaged.
    """
    return [_critic(part) for part in iterations if (part.folder / "data" / "solutions_critic.parquet").exists()]


def _critic(part: Iteration) -> Critic:
    data = part.folder / "data"
    rows = held_out_rows(data)
    try:
        found = diagnose(*rows)
    except TooFewProblemsError as error:  # which does not stop a report
        return Critic(part, note=str(error))
    measures = [
        (title, str(found.measures[name]) if name in found.measures else "cannot be measured")
        for name, title in MEASURES.items()
    ]
    figures = [calibration_figure(found.calibration)]
    if found.skill_by_distance:
        figures.append(_distances(found))
    return Critic(part, "", found, measures, figures)


def _distances(found: Diagnosis) -> Figure:
    rows = []
    for distance, estimate in found.skill_by_distance.items():
        rows.append((f"{distance} {'step' if distance == '1' else 'steps'} from the end", "critic", estimate))
    ends = [end for _, _, estimate in rows for end in (estimate.low, estimate.high)]
    low = max(min(-0.1, math.floor(min(ends) * 5) / 5), -1.0)
    return interval_figure("Skill by distance from the end", rows, low, max(math.ceil(max(ends) * 5) / 5, 0.2))


# ---- Advantages ----


def advantage_figures(part: Iteration) -> list[Figure]:
    """
    Distribution of the advantages of an iteration, by the values that they were made of.

    Args:
        part ([`Iteration`]):
            Iteration.

    Returns:
        `list[Figure]`: of each source, advantages of next steps, and what is at stake in each state.
    """
    figures = []
    is_shrunk = (part.folder / "data" / "states_shrinkage.parquet").exists()
    for source in POLICIES.values():
        path = part.folder / "data" / f"states_{source}.parquet"
        name = f"{VALUES[source]} values" + (", not trained on" if is_shrunk and source == "critic" else "")
        if path.exists():
            column = _column(path, "advantages")
            advantages = np.asarray(column.flatten(), dtype=np.float64)
            if len(advantages):
                starts = np.asarray(column.offsets)[:-1] - column.offsets[0].as_py()
                gaps = np.maximum.reduceat(advantages, starts) - np.minimum.reduceat(advantages, starts)
                title = f"Advantages of {len(advantages):,} steps, {name}"
                figures.append(histogram_figure(title, advantages, -1, 1, source, "advantage of a step"))
                title = f"Gap of {len(gaps):,} states, {name}"
                figures.append(histogram_figure(title, gaps, 0, 1, source, "largest − smallest advantage"))
    return figures


def _column(path: Path, name: str) -> Any:
    column = read_parquet(path, table_cure(path), columns=[name])[name]
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def outcome_figure(part: Iteration) -> Figure | None:
    """
    What the generator made of the problems.

    Args:
        part ([`Iteration`]):
            Iteration.

    Returns:
        [`Figure`] or `None`: `None` before anything is sampled.
    """
    counts = stage_counts(part.folder / "sampled")
    if not counts.get("problems"):
        return None
    names = {
        "problems_all_correct": ("all solutions right", "good"),
        "problems_with_signal": ("some right, some wrong", "critic"),
        "problems_all_wrong": ("all solutions wrong", "bad"),
        "problems_not_judged": ("no solution could be judged", "before"),
    }
    parts = [(label, style, counts.get(name, 0)) for name, (label, style) in names.items()]
    if rest := counts["problems"] - sum(size for _, _, size in parts):
        parts.append(("other", "before", rest))
    return parts_figure(f"{counts['problems']:,} problems by their solutions", parts)
