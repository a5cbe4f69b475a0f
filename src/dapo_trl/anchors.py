"""
States that a policy is held in place at: those of the kept solutions where all completions take the same next step.

With nothing to compare, their advantage is 0, and a run leaves them out, as the paper leaves out states whose
advantages hardly differ. But then nothing keeps the policy from changing there, while it learns elsewhere: it may
forget how a solution ends. With an advantage of 0, the loss asks for a log-ratio of 0: the policy is to stay what it
was.
"""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, concatenate_datasets

from dapo_trl.dataset_checks import refuse_missing_columns
from dapo_trl.tables import to_dataset


Row = dict[str, Any]

_NEXT = ("values", "mc_successes", "mc_rollouts", "critic_values")  # of a solution's states: the next step leads to one
_CHUNK = 1000  # solutions whose rows are Python objects at the same time


def anchor_states(solutions: Dataset, states: Dataset) -> Dataset:
    """
    States of solutions that have no state row, with the step that was taken as their only candidate.

    Args:
        solutions ([`~datasets.Dataset`]):
            The kept solutions, with `problem_id`.
        states ([`~datasets.Dataset`]):
            State rows of the same problems, with `advantages`.

    Returns:
        [`~datasets.Dataset`]: rows with the columns of `states`, one of each state and step. `advantages` are 0,
        `counts` 1, and `reliabilities` 1, as the advantage of an only candidate is known. What nobody knows of a
        candidate is `None`. Steps that were cut off are left out.

    Raises:
        ValueError: if a column is missing.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from dapo_trl.anchors import anchor_states

    >>> kept = {"problem_id": "1", "prompt": "1+1=", "completions": ["2\\n", "#"], "reward": 1.0}
    >>> state = {"problem_id": "1", "prompt": "1+1=", "prefix": ["2\\n"], "candidates": ["#", "3\\n"]}
    >>> state |= {"counts": [3, 1], "advantages": [0.25, -0.75]}
    >>> anchors = anchor_states(Dataset.from_list([kept]), Dataset.from_list([state]))
    >>> anchors[0]["prefix"], anchors[0]["candidates"], anchors[0]["advantages"]
    ([], ['2\\n'], [0.0])

    ```
    """
    cure = "The stages `values` and `advantages` of a run write them."
    refuse_missing_columns(solutions, "`solutions` needs", ("problem_id", "completions"), cure)
    refuse_missing_columns(states, "`states` needs", ("problem_id", "advantages"), cure)
    known = {(row["problem_id"], *row["prefix"]) for row in states.select_columns(["problem_id", "prefix"])}
    chunks = [states.select([])]
    for start in range(0, len(solutions), _CHUNK):
        chunk = solutions.select(range(start, min(start + _CHUNK, len(solutions))))
        rows = [row for solution in chunk for row in _rows(solution, known)]
        chunks.append(to_dataset(rows, states.features))
    return concatenate_datasets(chunks)


def _rows(solution: Row, known: set[tuple[str, ...]]) -> Iterator[Row]:
    """State rows of the states of a solution that are not known, which they are from now on."""
    steps, ids = solution["completions"], solution.get("completions_ids")
    for depth, step in enumerate(steps):
        is_last = depth == len(steps) - 1
        state = (solution["problem_id"], *steps[:depth])
        if state in known or (is_last and solution.get("truncated")):
            continue
        known.add(state)
        row = solution | {"prefix": steps[:depth], "candidates": [step], "counts": [1]}
        row |= {"advantages": [0.0], "advantage_errors": [0.0], "reliabilities": [1.0]}
        row |= {"rewards": [solution.get("reward") if is_last else None]}
        row |= {name: [solution[name][depth + 1]] for name in _NEXT if solution.get(name) is not None}
        if ids is not None:
            row |= {"prefix_ids": ids[:depth], "candidates_ids": [ids[depth]]}
        yield row
