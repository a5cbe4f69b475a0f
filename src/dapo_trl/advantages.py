"""
From values to step advantages.

Time in the names: values belong to states 0..K, advantages to steps 1..K. C is the number of candidate steps of a
state.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def sibling_advantages(values: Sequence[float], counts: Sequence[int] | None = None) -> np.ndarray:
    r"""
    Advantages of the candidate steps of one state against the mean over all samples, duplicates included.

    $$
    \hat A(s, a_i) = V(s \circ a_i) - \frac{1}{\sum_j n_j} \sum_j n_j V(s \circ a_j)
    $$

    where n_j says how often a_j was sampled. The count-weighted mean of the advantages is zero. Source: arXiv
    2412.18279, advantage estimate; candidates are unique because duplicates are removed *after* this step.

    Args:
        values (sequence of `float`, length C):
            Value of the state that each candidate leads to, in [0, 1]. For a candidate that ends the solution, its true
            reward.
        counts (sequence of `int`, length C, *optional*):
            How often each candidate was sampled. `None` counts every candidate once.

    Returns:
        `np.ndarray` of shape `(C,)`, float64, in [-1, 1].

    Raises:
        ValueError: if there are fewer than two candidates, lengths differ, a count is below 1, or a value is not in
            [0, 1].

    Example:

    ```python
    >>> from dapo_trl.advantages import sibling_advantages

    >>> sibling_advantages([1.0, 0.0], counts=[3, 1]).tolist()
    [0.25, -0.75]

    ```
    """
    v_C = np.asarray(values, dtype=np.float64)
    n_C = np.ones_like(v_C) if counts is None else np.asarray(counts, dtype=np.float64)
    if v_C.ndim != 1 or v_C.size < 2:
        raise ValueError(
            f"An advantage compares candidates, so a state needs at least two, got {v_C.size}. Drop the state, sample "
            "more completions from it, or give `advantages` yourself."
        )
    if n_C.shape != v_C.shape:
        raise ValueError(f"`values` and `counts` must have the same length, got {v_C.size} and {n_C.size}.")
    if not (n_C >= 1).all():
        raise ValueError(f"`counts` must be at least 1, got {n_C.tolist()}.")
    _check_probabilities(v_C)
    return v_C - np.average(v_C, weights=n_C)


def step_advantages(values: Sequence[float]) -> np.ndarray:
    r"""
    Advantages of the steps of one solution, from the values of its states.

    $$
    A_t = V(s_t) - V(s_{t-1}), \quad t = 1 \dots K
    $$

    They sum to the outcome minus the value of the prompt. This is the one-sample form of the paper's advantage: the
    mean over siblings is replaced by the value of the state itself.

    Args:
        values (sequence of `float`, length K + 1):
            V(s_0)..V(s_K), in [0, 1]; the last one is the outcome reward.

    Returns:
        `np.ndarray` of shape `(K,)`, float64, in [-1, 1].

    Raises:
        ValueError: if there are fewer than two values, or a value is not in [0, 1].

    Example:

    ```python
    >>> from dapo_trl.advantages import step_advantages

    >>> step_advantages([0.5, 0.75, 0.25, 1.0]).tolist()
    [0.25, -0.5, 0.75]

    ```
    """
    v_tm1_to_K = np.asarray(values, dtype=np.float64)
    if v_tm1_to_K.ndim != 1 or v_tm1_to_K.size < 2:
        raise ValueError(f"A solution of K steps has K + 1 values, so at least two, got {v_tm1_to_K.size}.")
    _check_probabilities(v_tm1_to_K)
    return np.diff(v_tm1_to_K)


def advantage_gap(advantages: Sequence[float]) -> float:
    """
    Largest minus smallest advantage of a state: how much is at stake in the choice of the next step.

    The paper drops states whose gap is below 0.1.

    Args:
        advantages (sequence of `float`, length C):
            Advantages of the candidates of one state.

    Returns:
        `float`: the gap, in [0, 1] for advantages that come from values.

    Example:

    ```python
    >>> from dapo_trl.advantages import advantage_gap

    >>> advantage_gap([0.25, -0.75])
    1.0

    ```
    """
    return float(np.max(advantages) - np.min(advantages))


def add_advantages(dataset: Any, values: str = "values") -> Any:
    """
    Add the `advantages` column to state rows, from the values of their candidates.

    Args:
        dataset ([`~datasets.Dataset`]):
            State rows with a column of candidate values and, optionally, `counts`. A `rewards` column, where present,
            holds the true reward of a candidate that ends the solution (null for others), which replaces its value.
        values (`str`, *optional*, defaults to `"values"`):
            Column that holds the candidates' values: for example `"critic_values"` as written by
            [`StepCriticTrainer.predict_values`].

    Returns:
        [`~datasets.Dataset`]: the same rows with `advantages` (list of float, one per candidate).

    Raises:
        ValueError: if the column is missing, or a row cannot be valued; the message names the row.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from dapo_trl import add_advantages

    >>> state = {"prompt": "1+1=", "prefix": [], "candidates": ["2", "3"]}
    >>> rows = [state | {"values": [0.9, 0.5], "rewards": [1.0, None]}]
    >>> add_advantages(Dataset.from_list(rows))[0]["advantages"]
    [0.25, -0.25]

    ```
    """
    if "completions" in dataset.column_names and "candidates" not in dataset.column_names:
        raise ValueError(
            "`add_advantages` compares candidates of a state, but these are solution rows. They need no advantages: "
            "`DAPOTrainer` takes the differences of `values`. To use a critic's, put them there: "
            "`dataset.remove_columns('values').rename_column('critic_values', 'values')`."
        )
    if values not in dataset.column_names:
        raise ValueError(
            f"The data set has no column {values!r} to compute advantages from, only {dataset.column_names}."
        )
    rewards = dataset["rewards"] if "rewards" in dataset.column_names else [None] * len(dataset)
    counts = dataset["counts"] if "counts" in dataset.column_names else [None] * len(dataset)
    advantages = []
    for index, (v_C, r_C, n_C) in enumerate(zip(dataset[values], rewards, counts, strict=True)):
        try:
            advantages.append(sibling_advantages(with_true_rewards(v_C, r_C), n_C).tolist())
        except ValueError as error:
            raise ValueError(f"Row {index}, column {values!r}: {error}") from error
    if "advantages" in dataset.column_names:
        dataset = dataset.remove_columns("advantages")
    return dataset.add_column("advantages", advantages)


def with_true_rewards(values: Sequence[float], rewards: Sequence[float | None] | None) -> list[float]:
    """
    Replace the value of every candidate that ends the solution by its true reward.

    Args:
        values (sequence of `float`, length C):
            Values of the candidates.
        rewards (sequence of `float` or `None`, length C, *optional*):
            True reward of each candidate that ends the solution, `None` for the others.

    Returns:
        `list[float]` of length C.

    Raises:
        ValueError: if lengths differ.
    """
    if rewards is None:
        return list(values)
    if len(rewards) != len(values):
        raise ValueError(f"`values` and `rewards` must have the same length, got {len(values)} and {len(rewards)}.")
    return [value if reward is None else reward for value, reward in zip(values, rewards, strict=True)]


def _check_probabilities(values: np.ndarray) -> None:
    bad = [value for value in values.tolist() if not (math.isfinite(value) and 0.0 <= value <= 1.0)]
    if bad:
        raise ValueError(f"Values are probabilities of success and must lie in [0, 1], got {bad[0]}.")
