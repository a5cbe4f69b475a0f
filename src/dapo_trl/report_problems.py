"""
Problems of a run for the browser of a report: solutions, the value of every step, and what else was sampled there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dapo_trl.execution.unit_tests import shown_answer
from dapo_trl.files import named_damage, read_parquet
from dapo_trl.inspection import color
from dapo_trl.problem_tree import Node, Row, add_critic, best_first, build_tree, note_advantages, solution_path
from dapo_trl.report_run import POLICIES, Iteration
from dapo_trl.run_folder import measured_problems, shard_tables, table_cure


NUM_COLORS = 21  # values are coloured in steps of 1/20; they are written beside it


@dataclass(frozen=True)
class Step:
    """
    A step of a solution.

    Attributes:
        node ([`~dapo_trl.problem_tree.Node`]):
            The state that it leads to.
        siblings (`list[Node]`):
            Other next steps of the state before, the best first.
        shown_at (`str`):
            Where the siblings were listed already, if they were.
    """

    node: Node
    siblings: list[Node]
    shown_at: str


@dataclass(frozen=True)
class Problem:
    """
    What was sampled of a problem.

    Attributes:
        iteration (`str`):
            Title of its iteration.
        problem_id (`str`), prompt (`str`), answer (`str`):
            Of the data set.
        is_held_out (`bool`):
            Whether the critic was not trained on it.
        root ([`~dapo_trl.problem_tree.Node`]):
            The bare prompt.
        solutions (`list[tuple[str, list[Step]]]`):
            Verdict, `"right"`, `"wrong"` or `"cut off"`, and steps of each kept solution.
    """

    iteration: str
    problem_id: str
    prompt: str
    answer: str
    is_held_out: bool
    root: Node
    solutions: list[tuple[str, list[Step]]]

    @property
    def verdicts(self) -> str:
        """How its solutions ended, in words."""
        found = [verdict for verdict, _ in self.solutions]
        return ", ".join(f"{found.count(name)} {name}" for name in ("right", "wrong", "cut off") if name in found)

    @property
    def has_critic(self) -> bool:
        """Whether a critic has valued it."""
        return any(step.node.critic_value is not None for _, steps in self.solutions for step in steps)


def spread(items: Sequence[Any], number: int) -> list[Any]:
    """
    Some items of many, at equal distances.

    Args:
        items (sequence):
            All of them.
        number (`int`):
            How many at most.

    Returns:
        `list`.

    Example:

    ```python
    >>> from dapo_trl.report_problems import spread

    >>> spread("abcdefghij", 4), spread("ab", 4)
    (['a', 'c', 'f', 'h'], ['a', 'b'])

    ```
    """
    number = min(number, len(items))
    return [items[index * len(items) // number] for index in range(number)]


def problem_ids(part: Iteration) -> list[str]:
    """
    Problems of an iteration with values.

    Args:
        part ([`~dapo_trl.report_run.Iteration`]):
            Iteration.

    Returns:
        `list[str]`: in the order of the run.

    Raises:
        ValueError: if a file is damaged.
    """
    paths = shard_tables(part.folder / "values", "solutions")
    ids = [read_parquet(path, table_cure(path), columns=["problem_id"])["problem_id"].to_pylist() for path in paths]
    return list(dict.fromkeys(problem_id for some in ids for problem_id in some))


def read_problems(part: Iteration, number: int) -> list[Problem]:
    """
    Some problems of an iteration, at equal distances among those with values.

    Args:
        part ([`~dapo_trl.report_run.Iteration`]):
            Iteration.
        number (`int`):
            How many at most.

    Returns:
        `list[Problem]`.

    Raises:
        ValueError: if a file is damaged.
    """
    known = problem_ids(part)
    chosen = spread(known, number)
    has_critic = (part.folder / "critic" / "stage.json").exists() or (part.folder / "data" / "scored.json").exists()
    held_out = measured_problems(part.folder, known) if has_critic else set()
    values, data = part.folder / "values", part.folder / "data"
    states, solutions = (_by_problem(shard_tables(values, name), chosen) for name in ("states", "solutions"))
    scored = [_by_problem([data / f"{name}_critic.parquet"], chosen) for name in ("states", "solutions")]
    advantages = {source: _by_problem([data / f"states_{source}.parquet"], chosen) for source in POLICIES.values()}
    problems = []
    for problem_id in chosen:
        root = build_tree(states.get(problem_id, []), solutions[problem_id])
        add_critic(root, *(rows.get(problem_id, []) for rows in scored))
        for source, rows in advantages.items():
            note_advantages(root, rows.get(problem_id, []), source)
        problems.append(_problem(part, root, solutions[problem_id], problem_id in held_out))
    return problems


def palette() -> list[str]:
    """
    Colours of values 0, 1/20, ..., 1.

    Returns:
        `list[str]`: red, green and blue for a style sheet.
    """
    found = []
    for number in range(NUM_COLORS):
        rgb: Any = color(number / (NUM_COLORS - 1)).color
        found.append(" ".join(map(str, rgb.triplet)))
    return found


def _problem(part: Iteration, root: Node, rows: list[Row], is_held_out: bool) -> Problem:
    shown: dict[int, str] = {}
    solutions = []
    for number, row in enumerate(rows, 1):
        steps = list(_steps(solution_path(root, row), number, shown))
        solutions.append((_verdict(row), steps))
    answer = rows[0].get("answer")
    return Problem(
        part.title,
        rows[0]["problem_id"],
        root.step,
        "" if answer is None else shown_answer(str(answer)),
        is_held_out,
        root,
        solutions,
    )


def _steps(path: list[Node], solution: int, shown: dict[int, str]) -> Iterator[Step]:
    """The steps along a path; siblings that an earlier solution showed are not shown again."""
    for depth, (state, node) in enumerate(pairwise(path), 1):
        siblings = [child for child in sorted(state.children.values(), key=best_first) if child is not node]
        seen = shown.setdefault(id(state), f"solution {solution}, step {depth}")
        is_first = seen == f"solution {solution}, step {depth}"
        yield Step(node, siblings, "" if is_first or not siblings else seen)


def _verdict(row: Row) -> str:
    if row.get("truncated"):
        return "cut off"
    return "right" if row["values"][-1] >= 0.5 else "wrong"


def _by_problem(paths: list[Path], chosen: list[str]) -> dict[str, list[Row]]:
    """Rows of some problems, without token ids."""
    found: dict[str, list[Row]] = {}
    for path in paths if chosen else []:
        if path.exists():
            with named_damage(path, table_cure(path)):
                columns = [name for name in pq.read_schema(path).names if not name.endswith("_ids")]
            filters = [("problem_id", "in", chosen)]
            for row in read_parquet(path, table_cure(path), columns=columns, filters=filters).to_pylist():
                found.setdefault(row["problem_id"], []).append(row)
    return found
