"""
What a critic can be trained on beside the kept solutions: next steps that were drawn from their states, and that none
of them takes.

A policy's advantages compare the next steps of a state, most of which no kept solution takes. Their completions were
drawn anyway, and say as much of them as of any other state.
"""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, Features, Value

from dapo_trl.dataset_checks import refuse_missing_columns
from dapo_trl.tables import to_dataset


Row = dict[str, Any]

_OF_STATE = ("prefix", "candidates", "prefix_ids", "candidates_ids", "counts", "advantages")  # not of its problem


def candidate_solutions(states: Dataset, solutions: Dataset) -> Dataset:
    """
    Candidates that no kept solution takes, as solution rows of which only the last state has completions.

    Args:
        states ([`~datasets.Dataset`]):
            State rows with `problem_id`, `values`, `mc_successes`, `mc_rollouts` and `rewards`. Candidates that end the
            solution are left out: their reward is known.
        solutions ([`~datasets.Dataset`]):
            The kept solutions of the same problems, with `problem_id`.

    Returns:
        [`~datasets.Dataset`]: rows with the columns of `solutions`, and `truncated`. `completions` are the steps before
        the candidate, and the candidate; `mc_rollouts` are 0 but for its state, so that
        [`~dapo_trl.StepCriticTrainer`] learns of that one only. `reward` is its value, as of a solution whose end
        nobody knows: no end token belongs to it, so that it is `truncated`.

    Raises:
        ValueError: if a column is missing.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from dapo_trl.critic_rows import candidate_solutions

    >>> kept = {"problem_id": "1", "prompt": "1+1=", "completions": ["2\\n", "#"], "values": [0.5, 1.0, 1.0]}
    >>> kept |= {"mc_successes": [2.0, 4.0, 1.0], "mc_rollouts": [4, 4, 1]}
    >>> state = {"problem_id": "1", "prompt": "1+1=", "prefix": [], "candidates": ["2\\n", "3\\n"], "counts": [3, 1]}
    >>> state |= {"values": [1.0, 0.0], "mc_successes": [4.0, 0.0], "mc_rollouts": [4, 1], "rewards": [None, None]}
    >>> candidate_solutions(Dataset.from_list([state]), Dataset.from_list([kept]))[0]["completions"]
    ['3\\n']

    ```
    """
    needed = ("problem_id", "prefix", "candidates", "values", "mc_successes", "mc_rollouts")
    refuse_missing_columns(states, "State rows need", needed, "The stage `values` of a run writes them.")
    taken = {
        (problem, *steps[: depth + 1])
        for problem, steps in zip(solutions["problem_id"], solutions["completions"], strict=True)
        for depth in range(len(steps))
    }
    features = Features({**solutions.features, "truncated": Value("bool")})
    return to_dataset([row for state in states for row in _rows(state, taken)], features)


def _rows(state: Row, taken: set[tuple[str, ...]]) -> Iterator[Row]:
    """Solution rows of the candidates of a state that nobody took."""
    rewards = state.get("rewards") or [None] * len(state["candidates"])
    shared = {name: value for name, value in state.items() if name not in _OF_STATE}
    before = len(state["prefix"]) + 1
    for place, (candidate, reward) in enumerate(zip(state["candidates"], rewards, strict=True)):
        if reward is not None or (state["problem_id"], *state["prefix"], candidate) in taken:
            continue
        value = state["values"][place]
        row = shared | {
            "completions": [*state["prefix"], candidate],
            "values": [value] * (before + 1),
            "mc_successes": [0.0] * before + [state["mc_successes"][place]],
            "mc_rollouts": [0] * before + [state["mc_rollouts"][place]],
            "reward": value,
            "truncated": True,
        }
        if state.get("candidates_ids") is not None:
            row["completions_ids"] = [*state["prefix_ids"], state["candidates_ids"][place]]
        yield row
