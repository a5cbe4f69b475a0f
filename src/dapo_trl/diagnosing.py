"""
`dapo-trl diagnose`: the critic of a run, measured on the problems that it was not trained on.
"""

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dapo_trl.diagnosis import Diagnosis, diagnose
from dapo_trl.files import numbered_folders, read_parquet, write_atomically
from dapo_trl.run_folder import held_out_problems


MEASURES = {
    "skill": "skill: 1 - BCE / BCE of the best constant",
    "depth_skill": "the same, against a constant for each number of steps",
    "brier_skill": "1 - Brier score / that of the best constant",
    "calibration_error": "calibration error",
    "rank_correlation": "rank correlation with the mean outcomes",
    "sibling_ranking": "next steps ordered as their mean outcomes (0.3 apart)",
    "sign_accuracy": "advantages with the sign of their mean outcomes",
    "terminal_bias": "value minus reward of finished solutions",
}
_COLUMNS = ("problem_id", "mc_successes", "mc_rollouts", "critic_values")


def diagnose_run(folder: Path) -> Diagnosis:
    """
    Measure the critic of a run, and keep the result in `diagnosis.json` beside its values.

    Args:
        folder (`Path`):
            Folder of a run, or of one of its iterations. Of a run with several, the last that has a critic's values.

    Returns:
        [`~dapo_trl.diagnosis.Diagnosis`].

    Raises:
        ValueError: if the run has no critic's values yet, a file is damaged, or there are too few problems.
    """
    places = [folder, *(path for _, path in numbered_folders(folder, "iteration"))]
    scored = [path / "data" for path in places if (path / "data" / "solutions_critic.parquet").exists()]
    if not scored:
        raise ValueError(f"{folder} has no values by a critic. Run `dapo-trl score` with its recipe first.")
    data = scored[-1]
    cure = f"Delete {data / 'scored.json'} to score the rows again"
    solutions = read_parquet(
        data / "solutions_critic.parquet", cure, columns=[*_COLUMNS, "completions", "reward"]
    ).to_pylist()
    states = read_parquet(data / "states_critic.parquet", cure, columns=[*_COLUMNS, "counts"]).to_pylist()
    held_out = held_out_problems(row["problem_id"] for row in solutions)
    unseen = [[row for row in rows if row["problem_id"] in held_out] for rows in (solutions, states)]
    found = diagnose(unseen[0], unseen[1])
    record = asdict(found) | {"is_fit": found.is_fit, "verdict": found.verdict}
    write_atomically(data / "diagnosis.json", json.dumps(record, indent=2) + "\n")
    return found


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
    table = Table("measure", "with 95% interval", title=f"{title}, {found.num_rollouts:,} completions")
    for name, text in MEASURES.items():
        table.add_row(text, str(found.measures[name]) if name in found.measures else "cannot be measured")
    for distance, estimate in found.skill_by_distance.items():
        steps = "step" if distance == "1" else "steps"
        table.add_row(f"skill {distance} {steps} from the end", str(estimate))
    console.print(table)
    console.print(found.verdict, markup=False, highlight=False)
