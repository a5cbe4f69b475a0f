"""
The critic of a run, measured on the problems that it was not trained on: `dapo-trl score` and `dapo-trl diagnose`.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from dapo_trl.calibration import draw_calibration
from dapo_trl.diagnosis import Diagnosis, TooFewProblemsError, diagnose
from dapo_trl.files import dump_json, named_damage, numbered_folders, read_json, read_parquet, write_atomically
from dapo_trl.run_folder import measured_problems, scored_config


Row = dict[str, Any]

MEASURES = {
    "skill": "skill: 1 - BCE / BCE of the best constant",
    "depth_skill": "the same, against a constant for each number of steps",
    "brier_skill": "1 - Brier score / that of the best constant",
    "depth_brier_skill": "the same, against a constant for each number of steps",
    "calibration_error": "calibration error",
    "rank_correlation": "rank correlation with the mean outcomes",
    "advantage_correlation": "correlation of advantages with those of the mean outcomes",
    "sibling_ranking": "next steps ordered as their mean outcomes (0.3 apart)",
    "clear_ranking": "the same, two standard errors apart",
    "sign_accuracy": "advantages with the sign of their mean outcomes",
    "terminal_bias": "value minus reward of finished solutions",
}
_COLUMNS = ("problem_id", "mc_successes", "mc_rollouts", "critic_values")
_CURE = "Delete it to measure the critic again"
_RULES = 2  # of what is measured, and of who is fit: what was found by others is found anew


def scored_folder(folder: Path) -> Path:
    """
    Where the values of a run's critic are.

    Args:
        folder (`Path`):
            Folder of a run, or of one of its iterations. Of a run with several, the last that has a critic's values.

    Returns:
        `Path`: its folder `data`.

    Raises:
        ValueError: if the run has no critic's values yet.
    """
    places = [folder, *(path for _, path in numbered_folders(folder, "iteration"))]
    scored = [path / "data" for path in places if (path / "data" / "solutions_critic.parquet").exists()]
    if not scored:
        raise ValueError(f"{folder} has no values by a critic. Run `dapo-trl score` with its recipe first.")
    return scored[-1]


def held_out_rows(data: Path, extra: tuple[str, ...] = ()) -> tuple[list[Row], list[Row]]:
    """
    The scored rows of problems that the critic was not trained on.

    Args:
        data (`Path`):
            Folder of the scored rows.
        extra (`tuple[str, ...]`, *optional*):
            More columns of both tables.

    Returns:
        `tuple[list[dict], list[dict]]`: solution rows and state rows, with what [`~dapo_trl.diagnosis.diagnose`] asks
        for.

    Raises:
        ValueError: if a file is damaged.
    """
    cure = f"Delete {data / 'scored.json'} to score the rows again"
    both = {"solutions": ("completions", "reward"), "states": ("counts",)}
    problems = read_parquet(data / "solutions_critic.parquet", cure, columns=["problem_id"])["problem_id"].to_pylist()
    held_out = measured_problems(data.parent, problems)
    filters = [("problem_id", "in", held_out)] if problems else None
    tables = []
    for name, columns in both.items():
        path = data / f"{name}_critic.parquet"
        with named_damage(path, cure):
            known = pq.read_schema(path).names
        wanted = [*_COLUMNS, *columns, *(column for column in ("rewards", *extra) if column in known)]
        tables.append(read_parquet(path, cure, columns=wanted, filters=filters).to_pylist())
    return tables[0], tables[1]


def diagnose_run(folder: Path) -> Diagnosis:
    """
    Measure the critic of a run, and keep the result in `diagnosis.json` beside its values and in `calibration.png`.

    Args:
        folder (`Path`):
            Folder of a run, or of one of its iterations. Of a run with several, the last that has a critic's values.

    Returns:
        [`~dapo_trl.diagnosis.Diagnosis`].

    Raises:
        ValueError: if the run has no critic's values yet, a file is damaged, or there are too few problems.
    """
    data = scored_folder(folder)
    found = diagnose(*held_out_rows(data))
    _keep(record(found), data)
    draw_calibration(found.calibration, data.parent / "calibration.png")
    return found


def _keep(found: Row, data: Path) -> None:
    """Keep what was found, with the rows that it was found on, and by which rules."""
    write_atomically(data / "diagnosis.json", dump_json(found | _basis(data)))


def _basis(data: Path) -> Row:
    return {"scored": scored_config(data), "rules": _RULES}


def diagnose_once(data: Path, is_main: bool = True) -> Row:
    """
    What [`diagnose_run`] keeps, measured anew only if the rows were scored anew, or by other rules.

    Args:
        data (`Path`):
            Folder of the scored rows.
        is_main (`bool`, *optional*, defaults to `True`):
            Whether this process writes it.

    Returns:
        `dict`: fields of [`~dapo_trl.diagnosis.Diagnosis`], `is_fit` and `verdict`. A critic that cannot be measured,
        because there are too few problems, is not fit: `measures` is empty, and the verdict says why.

    Raises:
        ValueError: if a file is damaged.
    """
    path = data / "diagnosis.json"
    if path.exists():
        known = read_json(path, ("measures",), _CURE)
        basis = {name: known.pop(name, None) for name in ("scored", "rules")}  # earlier versions did not say
        if basis == _basis(data):
            return known
    solutions, states = held_out_rows(data)
    try:
        diagnosis = diagnose(solutions, states)
    except TooFewProblemsError as error:
        found: Row = {"is_fit": False, "verdict": f"The critic could not be measured. {error}", "measures": {}}
    else:
        found = record(diagnosis)
        if is_main:
            draw_calibration(diagnosis.calibration, data.parent / "calibration.png")
    if is_main:
        _keep(found, data)
    return found


def record(found: Diagnosis) -> Row:
    """
    A diagnosis as JSON values.

    Args:
        found ([`~dapo_trl.diagnosis.Diagnosis`]):
            It.

    Returns:
        `dict`: its fields, `is_fit` and `verdict`.
    """
    return asdict(found) | {"is_fit": found.is_fit, "verdict": found.verdict}


def print_diagnosis(found: Diagnosis, console: Console | None = None) -> None:
    """
    Show what a critic knows.

    Args:
        found ([`~dapo_trl.diagnosis.Diagnosis`]):
            What it knows.
        console ([`~rich.console.Console`], *optional*):
            Where to; the terminal by default.
    """
    console = console or Console()
    title = f"Critic on {found.num_states:,} states of {found.num_problems:,} held-out problems"
    table = Table("measure", "with 95% interval", "pairs", title=f"{title}, {found.num_rollouts:,} completions")
    pairs = {"sibling_ranking": found.num_pairs, "clear_ranking": found.num_clear_pairs}
    for name, text in MEASURES.items():
        number = f"{pairs[name]:,}" if name in pairs else ""
        table.add_row(text, str(found.measures[name]) if name in found.measures else "cannot be measured", number)
    for name, estimate in found.ranking_by_difference.items():
        table.add_row(f"next steps ordered right, {name} apart", str(estimate), f"{found.pairs_by_difference[name]:,}")
    for distance, estimate in found.skill_by_distance.items():
        steps = "step" if distance == "1" else "steps"
        table.add_row(f"skill {distance} {steps} from the end", str(estimate), "")
    console.print(table)
    console.print(found.verdict, markup=False, highlight=False)


def describe(found: Mapping[str, Any]) -> str:
    """
    What decides whether a critic is fit, in one line.

    Args:
        found (`dict`):
            What [`diagnose_once`] gave.

    Returns:
        `str`: without a full stop; empty if the critic could not be measured.
    """
    if not found["measures"]:
        return ""
    shown = {
        "skill": "skill {}",
        "advantage_correlation": "correlation of advantages with those of the mean outcomes {}",
        "sibling_ranking": f"{{}} of {found['num_pairs']:,} pairs of next steps ordered right",
        "calibration_error": "calibration error {}",
    }
    parts = [
        text.format(_interval(found["measures"][name])) for name, text in shown.items() if name in found["measures"]
    ]
    return (
        f"On {found['num_states']:,} states of {found['num_problems']:,} held-out problems, with 95% intervals: "
        f"{', '.join(parts)}"
    )


def _interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['mean']:.1%} [{estimate['low']:.1%}, {estimate['high']:.1%}]"
