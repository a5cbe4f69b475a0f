"""
The critic of a run against fresh completions of the held-out states: `dapo-trl diagnose recipe.yaml --num_completions`.

The completions of a run are few, and its critic was chosen by them. With 64 fresh ones a state's value is known to
about 0.06, so that more next steps can be told apart, and a critic is not blamed for the noise of its truth.
"""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Features, List, Value

from dapo_trl.calibration import draw_calibration
from dapo_trl.diagnosing import held_out_rows, record, scored_folder
from dapo_trl.diagnosis import Diagnosis, diagnose
from dapo_trl.engines import Engine, OnCompletion, SamplingConfig
from dapo_trl.files import dump_json, numbered_folders, only_one, refuse_differences, text_fingerprint, write_atomically
from dapo_trl.judging import RewardFunction, name_of
from dapo_trl.rollouts import RolloutConfig, fill_trees
from dapo_trl.run_folder import iteration_folder, model_path, policy_folder
from dapo_trl.stages import process_state, run_shards
from dapo_trl.state_tree import Rollout, StateTree
from dapo_trl.store import Shard, ShardStore, read_manifest
from dapo_trl.tables import PROBLEM_COLUMNS
from dapo_trl.values import Counts, State


if TYPE_CHECKING:
    from dapo_trl.recipe import Recipe


Row = dict[str, Any]

_SHARD_SIZE = 16  # problems: what a kill can cost
_TREE_COLUMNS = ("completions_ids", "prefix", "candidates", "prefix_ids", "candidates_ids", "prompt_ids", "truncated")
_FEATURES = Features(
    {
        "problem_id": Value("string"),
        "state": List(Value("string")),
        "mc_successes": Value("float64"),
        "mc_rollouts": Value("int32"),
    }
)


def diagnose_afresh(recipe: "Recipe", num_completions: int, max_problems: int | None = None) -> Diagnosis:
    """
    Measure the critic of a run against fresh completions, drawn from the run's generator with seeds that no run has.

    Every state of the held-out solutions gets them, and every state that a candidate leads to. They are kept beside the
    run in `diagnosis/`, with the result and its figure: what was killed goes on there, and what is done is not drawn
    again.

    Args:
        recipe ([`~dapo_trl.recipe.Recipe`]):
            The run. Its critic has valued the rows. Of several iterations, the last that is so far.
        num_completions (`int`):
            Completions of every state, 2 or more.
        max_problems (`int`, *optional*):
            Held-out problems that get them, spread evenly over the data set. `None` takes all.

    Returns:
        [`~dapo_trl.diagnosis.Diagnosis`].

    Raises:
        ValueError: if the run has no critic's values yet, its completions came from another model than that of the
            recipe, a file is damaged, or there are too few problems.
    """
    data = scored_folder(recipe.folder)
    solutions, states = spread_out(*held_out_rows(data, (*PROBLEM_COLUMNS, *_TREE_COLUMNS)), max_problems)
    values = read_manifest(data.parent / "values")["config"]
    engine = recipe.make_engine(_generator(recipe, data.parent))
    refuse_differences(data.parent / "values", values["engine"], json.loads(json.dumps(engine.describe())))
    config = fresh_config(values["rollouts"], num_completions)
    name = f"{num_completions}-completions" + (f"-{max_problems}-problems" if max_problems else "")
    folder, is_main = data.parent / "diagnosis" / name, process_state().is_main_process
    with only_one(recipe.folder) if is_main else nullcontext():
        counts = count_afresh(solutions, states, engine, recipe.reward_function, config, folder)
    found = diagnose(*with_counts(solutions, states, counts))
    if is_main:
        write_atomically(folder / "diagnosis.json", dump_json(record(found)))
        draw_calibration(found.calibration, folder / "calibration.png")
    return found


def fresh_config(rollouts: Row, num_completions: int) -> RolloutConfig:
    """
    How a run drew its completions, but more of them, and with other seeds.

    Args:
        rollouts (`dict`):
            Settings of the run, from the manifest of its values.
        num_completions (`int`):
            Completions of every state.

    Returns:
        [`~dapo_trl.rollouts.RolloutConfig`]: its seed is negative, which that of no run is.
    """
    config = RolloutConfig(**(rollouts | {"sampling": SamplingConfig(**rollouts["sampling"])}))
    return replace(config, num_completions=num_completions, min_completions=None, reuse=True, seed=-1 - config.seed)


def count_afresh(
    solutions: list[Row],
    states: list[Row],
    engine: Engine,
    reward_function: RewardFunction,
    config: RolloutConfig,
    folder: Path,
) -> dict[tuple[str, State], Counts]:
    """
    Outcomes of completions of all states of some rows.

    Args:
        solutions (`list[dict]`):
            Solution rows with token ids.
        states (`list[dict]`):
            State rows with token ids, of the same problems.
        engine ([`~dapo_trl.engines.Engine`]):
            Sampling back end of the policy that the rows are from.
        reward_function (`Callable`):
            TRL reward function, see [`~dapo_trl.rollouts.collect_rollouts`].
        config ([`~dapo_trl.rollouts.RolloutConfig`]):
            How to draw them, and how many.
        folder (`Path`):
            Where they are kept, in shards. What was killed goes on there.

    Returns:
        `dict`: problem and state -> [`~dapo_trl.values.Counts`].

    Raises:
        ValueError: if the folder holds completions of other settings or rows.
    """
    by_problem: dict[str, tuple[list[Row], list[Row]]] = {}
    for number, rows in enumerate((solutions, states)):
        for row in rows:
            by_problem.setdefault(row["problem_id"], ([], []))[number].append(row)
    problems = list(by_problem)
    parts = [problems[start : start + _SHARD_SIZE] for start in range(0, len(problems), _SHARD_SIZE)]
    settings = {
        "stage": "diagnosis",
        "rows": text_fingerprint(json.dumps([[row["problem_id"], _steps_of(row)] for row in (*solutions, *states)])),
        "engine": engine.describe(),
        "reward_function": name_of(reward_function),
        "rollouts": config.describe(),
    }
    store = ShardStore(folder, settings, {"counts": _FEATURES}, len(parts))

    def work(index: int, on_completion: OnCompletion) -> Shard:
        trees = {problem: plant(*by_problem[problem], config) for problem in parts[index]}
        drawn = [(_source(by_problem[problem][0][0]), tree) for problem, tree in trees.items()]
        counts = fill_trees(drawn, engine, reward_function, config, on_completion)
        return Shard({"counts": [row for problem, tree in trees.items() for row in _rows(problem, tree)]}, counts)

    run_shards(store, work, "Completions", engine, lambda index: len(parts[index]))
    store.finish()
    rows = [row for index in range(len(parts)) for row in store.rows(index, "counts")]
    return {(row["problem_id"], tuple(row["state"])): Counts(row["mc_successes"], row["mc_rollouts"]) for row in rows}


def plant(solutions: list[Row], states: list[Row], config: RolloutConfig) -> StateTree:
    """
    The states of the solutions of a problem, and those that its candidates lead to.

    Args:
        solutions (`list[dict]`):
            Its solution rows.
        states (`list[dict]`):
            Its state rows. Candidates that end the solution lead nowhere.
        config ([`~dapo_trl.rollouts.RolloutConfig`]):
            How many completions they get.

    Returns:
        [`~dapo_trl.state_tree.StateTree`]: without completions.
    """
    paths = [(row["completions"], row["completions_ids"]) for row in solutions]
    for row in states:
        for step, ids, reward in zip(row["candidates"], row["candidates_ids"], row["rewards"], strict=True):
            if reward is None:  # a step after it makes it a state on the way
                paths.append(([*row["prefix"], step, ""], [*row["prefix_ids"], ids, []]))
    rollouts = [Rollout(tuple(steps), tuple(map(tuple, steps_ids)), None, False) for steps, steps_ids in paths]
    return StateTree(rollouts, config.stopping_rule, config.reuse)


def with_counts(
    solutions: list[Row], states: list[Row], counts: dict[tuple[str, State], Counts]
) -> tuple[list[Row], list[Row]]:
    """
    Rows with other counts; those of finished solutions, whose reward is known, stay as they are.

    Args:
        solutions (`list[dict]`):
            Solution rows.
        states (`list[dict]`):
            State rows.
        counts (`dict`):
            Problem and state -> [`~dapo_trl.values.Counts`]; where there is none, no completion could be counted.

    Returns:
        `tuple[list[dict], list[dict]]`: solution rows and state rows.
    """

    def counted(row: Row, reached: list[list[str] | None]) -> Row:
        known = zip(row["mc_successes"], row["mc_rollouts"], strict=True)
        found = [
            old if state is None else counts.get((row["problem_id"], tuple(state)), Counts(0.0, 0))
            for old, state in zip(known, reached, strict=True)
        ]
        return row | {"mc_successes": [k for k, _ in found], "mc_rollouts": [n for _, n in found]}

    def along(row: Row) -> list[list[str] | None]:
        return [*(row["completions"][:depth] for depth in range(len(row["completions"]))), None]

    def after(row: Row) -> list[list[str] | None]:
        pairs = zip(row["candidates"], row["rewards"], strict=True)
        return [[*row["prefix"], step] if reward is None else None for step, reward in pairs]

    return [counted(row, along(row)) for row in solutions], [counted(row, after(row)) for row in states]


def spread_out(solutions: list[Row], states: list[Row], max_problems: int | None) -> tuple[list[Row], list[Row]]:
    """
    Rows of some problems, spread evenly over the data set.

    Args:
        solutions (`list[dict]`):
            Solution rows.
        states (`list[dict]`):
            State rows.
        max_problems (`int`, *optional*):
            How many problems at most; `None` for all.

    Returns:
        `tuple[list[dict], list[dict]]`: solution rows and state rows.
    """
    problems = list(dict.fromkeys(row["problem_id"] for row in solutions))
    number = min(max_problems or len(problems), len(problems))
    chosen = {problems[place * len(problems) // number] for place in range(number)}
    solutions, states = ([row for row in rows if row["problem_id"] in chosen] for rows in (solutions, states))
    return solutions, states


def _generator(recipe: "Recipe", folder: Path) -> str:
    """The policy that an iteration samples from: the one before has trained it."""
    number = next((number for number, path in numbered_folders(recipe.folder, "iteration") if path == folder), 1)
    if number == 1:
        return recipe.model
    return model_path(iteration_folder(recipe.folder, number - 2) / policy_folder(recipe.arguments.values))


def _steps_of(row: Row) -> list[Any]:
    return [row["completions"]] if "completions" in row else [row["prefix"], row["candidates"]]


def _source(row: Row) -> Row:
    return {name: row[name] for name in (*PROBLEM_COLUMNS, "prompt_ids") if name in row}


def _rows(problem: str, tree: StateTree) -> list[Row]:
    return [
        {"problem_id": problem, "state": list(state), "mc_successes": successes, "mc_rollouts": rollouts}
        for state, (successes, rollouts) in tree.counts().items()
    ]
