"""
What a report says of a run as a whole: its iterations, settings, versions and stages, and everything that was left out.
"""

import datetime
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from dapo_trl.files import numbered_folders, read_json, read_parquet
from dapo_trl.recipe_arguments import RecipeArguments, public_settings
from dapo_trl.run_folder import iteration_folder, shard_tables, stage_times, table_cure


POLICIES = {"policy": "critic", "policy_monte_carlo": "monte_carlo", "policy_shrinkage": "shrinkage"}
VALUES = {"critic": "critic", "monte_carlo": "Monte Carlo", "shrinkage": "shrunk"}  # what they are called
AGAIN = "Delete it to do this step again"
_STAGES = {"sampled": "Solutions", "values": "Completions and values"}
_SPLITS = {"train": "trained on", "eval": "measured with"}

# What stages count: what was left out or does not count as it is, and everything else.
LEFT_OUT = {
    "truncated": "broke off at `max_new_tokens`; they count as wrong, unless `overlong` is `drop`",
    "not_judged": "the verifier could not say whether they are right",
    "empty": "have no text at all",
    "problems_not_judged": "problems none of whose solutions could be judged",
    "problems_all_correct": "problems whose solutions are all right: nothing to compare",
    "problems_all_wrong": "problems whose solutions are all wrong: nothing to compare",
    "completions_altering_state": "ended at once or lengthened the last step: other actions, which do not count",
    "solutions_without_value": "kept solutions with a state that has no outcome",
    "candidates_cut_off": "broke off within the next step",
    "states_with_one_candidate": "states whose completions all took the same step: nothing to compare",
    "rows_merged": "rows that have joined others of the same state",
    "steps_truncated": "steps that did not fit into `max_length`",
    "rows_too_long": "rows of which no step fits into `max_length`",
    "rows_without_contrast": "states whose advantages differ by less than `min_advantage_gap`",
    "steps_unreliable": "next steps whose advantage is less reliable than `min_reliability`",
    "rows_unreliable": "states of which no next step is more reliable than that",
    "targets_unreachable": "steps trained on whose target is a probability above 1: `beta` is small for these data",
    "ids_rebuilt": "completions whose token ids were made from their text",
    "ids_not_round_trip": "completions whose text gives other ids",
    "prompts_as_text": "prefixes that a server took as text only",
    "prompts_not_round_trip": "prefixes whose text gives other ids",
    "not_repeatable": "completions of a server that does not honour seeds",
    "settings_unsaid": "completions of a server that could not be told all settings of sampling",
    "server_errors": "answers of servers that were errors",
    "retries": "requests that were sent again",
}
MEANINGS = LEFT_OUT | {
    "rows, sampled": "rows written: solutions",
    "rows, solutions": "rows written: solutions with values",
    "rows, states": "rows written: states with next steps to compare",
    "tokens_generated": "tokens that were sampled",
    "problems": "problems that solutions were sampled of",
    "solutions": "solutions that were sampled",
    "problems_with_signal": "problems with right and wrong solutions: these teach",
    "completions": "completions drawn from states",
    "problems_kept": "problems whose solutions have values",
    "solutions_kept": "solutions that have values",
    "states": "different states of kept solutions",
    "pairs": "states and next steps that can be compared",
    "rows": "rows that were given",
    "rows_kept": "rows that are trained on or measured with",
    "steps": "steps in these",
}


@dataclass(frozen=True)
class Iteration:
    """One pass of the method in a run's folder."""

    number: int
    folder: Path
    title: str  # "" if it is the only one


def find_iterations(folder: Path) -> list[Iteration]:
    """
    The iterations of a run.

    Args:
        folder (`Path`):
            Folder of a run, or of one of its iterations.

    Returns:
        `list[Iteration]`: those that have begun.

    Raises:
        ValueError: if there is no such folder, or it is not of a run.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}. Name the `output_dir` of a run.")
    later = [path for number, path in numbered_folders(folder, "iteration") if number > 1]
    paths = [path for path in [iteration_folder(folder, 0), *later] if (path / "sampled" / "manifest.json").exists()]
    if not paths and not (folder / "before.json").exists():
        raise ValueError(
            f"{folder} is no folder of a run: nothing was sampled there. Name the `output_dir` of a run, which "
            "`dapo-trl run` makes."
        )
    is_one = len(paths) == 1
    return [Iteration(number, path, "" if is_one else f"Iteration {number}") for number, path in enumerate(paths, 1)]


# ---- What was run ----


def settings_of(folder: Path, iterations: list[Iteration]) -> tuple[dict[str, Any], dict[str, Any], str]:
    """
    Settings of a run.

    Args:
        folder (`Path`):
            Folder of the run.
        iterations (`list[Iteration]`):
            Its iterations.

    Returns:
        `tuple[dict, dict, str]`: what was set, what was left as it is, and a note on where that is from.
    """
    path = folder / "results.json"
    if path.exists():
        given = read_json(path, ["arguments"], "Start the run's command again, which writes it anew")["arguments"]
        others = {name: value for name, value in given.items() if _is_default(name, value)}
        changed = {name: value for name, value in given.items() if name not in others}
        return flat(public_settings(changed)), flat(public_settings(others)), ""
    found: dict[str, Any] = {}
    for part in iterations[:1]:
        for stage in _STAGES:
            if (path := part.folder / stage / "manifest.json").exists():
                found |= flat(read_json(path, ["config"], _cure(path))["config"].get("rollouts", {}))
        for name in ("critic", *POLICIES):  # of several critics, which differ in their seeds only, the first
            for path in (part.folder / name / "begun.json", part.folder / name / "stage.json"):
                if path.exists():
                    arguments = read_json(path, ["config"], AGAIN)["config"].get("arguments", {})
                    found |= flat(public_settings({"critic" if name == "critic" else "policy": arguments}))
    return found, {}, "The run has not come to its end, so these are the settings of the stages that have begun."


def _is_default(name: str, value: Any) -> bool:
    """Whether a recipe that does not name a setting has the same one."""
    known = RecipeArguments.__dataclass_fields__.get(name)
    if known is None:
        return False
    factory: Any = known.default_factory
    return value == (factory() if known.default is MISSING else known.default)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """
    Nested settings by their full names.

    Args:
        settings (`dict`):
            Settings.
        prefix (`str`, *optional*):
            What all names begin with.

    Returns:
        `dict`: such as `{"policy.beta": 0.1}`.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found


def versions_of(folder: Path, iterations: list[Iteration]) -> dict[str, str]:
    """
    Versions of packages that the run was made with.

    Args:
        folder (`Path`):
            Folder of the run.
        iterations (`list[Iteration]`):
            Its iterations.

    Returns:
        `dict[str, str]`: all of them, where stages had different ones.
    """
    found: dict[str, dict[str, None]] = {}
    for path in [folder / "before.json", *_records(iterations)]:
        if path.exists():
            for name, version in read_json(path, ["config"], _cure(path)).get("versions", {}).items():
                found.setdefault(name, {})[version] = None
    return {name: ", ".join(versions) for name, versions in found.items()}


def _records(iterations: list[Iteration]) -> Iterator[Path]:
    for part in iterations:
        for pattern in ("*/manifest.json", "*/stage.json", "data/scored.json", "policy*/accuracy.json"):
            yield from sorted(part.folder.glob(pattern))


def _cure(path: Path) -> str:
    return "Delete it, and go on with the settings of this folder" if path.name == "manifest.json" else AGAIN


def generator_of(iterations: list[Iteration]) -> str:
    """
    The model that a run begins with.

    Args:
        iterations (`list[Iteration]`):
            Iterations of the run.

    Returns:
        `str`: as sampled rows name it; `""` before anything is sampled.
    """
    for part in iterations[:1]:
        for path in shard_tables(part.folder / "sampled", "sampled")[:1]:
            table = read_parquet(path, table_cure(path), columns=["generator"])
            return str(table["generator"][0].as_py()) if table.num_rows else ""
    return ""


def sampling_began(iterations: list[Iteration]) -> str:
    """
    When the first solution was sampled.

    Args:
        iterations (`list[Iteration]`):
            Iterations of the run.

    Returns:
        `str`: date and time, UTC; `""` if that is not known.
    """
    begun = [
        read_json(path, ["begun"], "Delete it to compute the shard again")["begun"]
        for part in iterations[:1]
        for path in sorted((part.folder / "sampled" / "shards").glob("[0-9]*.json"))
    ]
    if not any(begun):
        return ""
    date = datetime.datetime.fromtimestamp(min(filter(None, begun)), datetime.UTC)
    return f"{date:%Y-%m-%d %H:%M} UTC"


def stages_of(folder: Path, iterations: list[Iteration]) -> list[dict[str, Any]]:
    """
    Time and tokens of each stage.

    Args:
        folder (`Path`):
            Folder of the run.
        iterations (`list[Iteration]`):
            Its iterations.

    Returns:
        `list[dict]`: `name`, `seconds`, `tokens`, and `state`: "done", or how far it is.
    """
    found = []
    for name, row in stage_times(folder, [part.folder for part in iterations]).items():
        state = "done"
        if (folder / name / "manifest.json").exists():
            path = folder / name / "manifest.json"
            manifest = read_json(path, ["num_shards"], _cure(path))
            if "counts" not in manifest:
                done = len(list((folder / name / "shards").glob("[0-9]*.json")))
                state = f"under way: {done} of {manifest['num_shards']} shards"
        found.append(row | {"name": name, "state": state})
    return found


# ---- What was left out ----


def counts_of(iterations: list[Iteration]) -> list[tuple[str, list[tuple[str, int]]]]:
    """
    What every stage did and left out, as its manifest or its results say.

    Args:
        iterations (`list[Iteration]`):
            Iterations of the run.

    Returns:
        `list[tuple[str, list[tuple[str, int]]]]`: stage -> counts by name.

    Raises:
        ValueError: if a file is damaged.
    """
    found = []
    for part in iterations:
        prefix = f"{part.title}: " if part.title else ""
        for stage in _STAGES:
            if (part.folder / stage / "manifest.json").exists():
                found.append((f"{prefix}{_STAGES[stage]}", list(stage_counts(part.folder / stage).items())))
        for name in ("critic", *POLICIES):  # all critics have the same rows
            path = part.folder / name / "stage.json"
            if path.exists():
                dropped = read_json(path, ["results"], AGAIN)["results"].get("dropped", {})
                for split, counts in dropped.items():
                    title = f"Policy, {VALUES[POLICIES[name]]} values" if name in POLICIES else "Critic"
                    found.append((f"{prefix}{title}: rows {_SPLITS.get(split, split)}", list(counts.items())))
    return found


def stage_counts(folder: Path) -> dict[str, int]:
    """
    Rows and counts of a sampling stage. While it is under way, those of the shards that are there.

    Args:
        folder (`Path`):
            Folder of the stage.

    Returns:
        `dict[str, int]`.
    """
    manifest = read_json(folder / "manifest.json", ["config"], _cure(folder / "manifest.json"))
    if "counts" in manifest:
        return {f"rows, {name}": number for name, number in manifest.get("rows", {}).items()} | manifest["counts"]
    total: Counter[str] = Counter()
    for path in sorted((folder / "shards").glob("[0-9]*.json")):
        shard = read_json(path, ["counts", "rows"], "Delete it to compute the shard again")
        total.update({f"rows, {name}": number for name, number in shard["rows"].items()} | shard["counts"])
    return dict(total)
