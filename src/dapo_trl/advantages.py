"""
From values to step advantages.

Time in the names: values belong to states 0..K, advantages to steps 1..K. C is the number of candidate steps of a
state.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


_LEAST_SIGNAL = 0.01  # of the spread of advantages; less is not told from nothing, and would leave no order of weights


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
    if v_C.ndim != 1 or v_C.size < 2:
        raise ValueError(
            f"An advantage compares candidates, so a state needs at least two, got {v_C.size}. Drop the state, sample "
            "more completions from it, or give `advantages` yourself."
        )
    n_C = _as_counts(counts, v_C, "values")
    check_probabilities(v_C)
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
    check_probabilities(v_tm1_to_K)
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


def advantage_errors(errors: Sequence[float], counts: Sequence[int] | None = None) -> np.ndarray:
    r"""
    Standard errors of the advantages of one state, from those of the values of its candidates.

    $$
    \mathrm{Var}(\hat A_i) = (1 - w_i)^2 e_i^2 + \sum_{j \neq i} w_j^2 e_j^2, \qquad w_j = \frac{n_j}{\sum_l n_l}
    $$

    as $\hat A_i = (1 - w_i) V_i - \sum_{j \neq i} w_j V_j$, with errors of the values that are independent of each
    other. Those of Monte Carlo values are: no completion counts for two candidates. A critic that misjudges a state may
    misjudge all its candidates alike, which cancels in their differences: the errors are then too large.

    Args:
        errors (sequence of `float`, length C):
            Standard error of the value of each candidate; 0 for one that ends the solution, whose reward is known.
        counts (sequence of `int`, length C, *optional*):
            How often each candidate was sampled, as for [`sibling_advantages`]. `None` counts every candidate once.

    Returns:
        `np.ndarray` of shape `(C,)`, float64.

    Raises:
        ValueError: if lengths differ, a count is below 1, or an error is negative or not finite.

    Example:

    ```python
    >>> from dapo_trl.advantages import advantage_errors

    >>> advantage_errors([0.4, 0.0], counts=[3, 1]).round(3).tolist()
    [0.1, 0.3]

    ```
    """
    e_C = np.asarray(errors, dtype=np.float64)
    n_C = _as_counts(counts, e_C, "errors")
    if bad := [error for error in e_C.tolist() if not 0 <= error < math.inf]:
        raise ValueError(f"Standard errors must be 0 or more and finite, got {bad[0]}.")
    w_C = n_C / n_C.sum()
    others_C = np.sum((w_C * e_C) ** 2) - (w_C * e_C) ** 2
    return np.sqrt(((1 - w_C) * e_C) ** 2 + np.maximum(others_C, 0))


def reliabilities(
    advantages: Sequence[float] | np.ndarray, errors: Sequence[float] | np.ndarray, posterior: bool = False
) -> np.ndarray:
    r"""
    How far the advantages of a data set can be relied on: the squared correlation of estimate and truth.

    $$
    r_i = \frac{\tau^2}{\tau^2 + \mathrm{se}_i^2}, \qquad
    \tau^2 = \begin{cases}
        \mathrm{mean}(\hat A^2) - \mathrm{mean}(\mathrm{se}^2) & \text{noise on top of the truth} \\
        \mathrm{mean}(\hat A^2) & \text{posterior means}
    \end{cases}
    $$

    Monte Carlo values are the truth with noise on top, so that the spread of their advantages is that of the truth and
    of the noise together, and $\tau^2$ is the variance of the true advantages. A posterior mean, such as a critic's
    value or one of shrinkage, is the part of the truth that is known: what is not known comes on top of *it*, and the
    spread has no noise in it to be taken out. Means are over candidates, each counted once, as in the loss.

    As weight of a pair $r_i$ is, up to a factor, the inverse variance of a regression on advantages with noise whose
    own misfit has variance $\tau^2$, see `docs/method.md`.

    Args:
        advantages (sequence of `float`, length N):
            Advantages of all candidates of a data set.
        errors (sequence of `float`, length N):
            Their standard errors, see [`advantage_errors`].
        posterior (`bool`, *optional*, defaults to `False`):
            Whether the advantages come from posterior means.

    Returns:
        `np.ndarray` of shape `(N,)`, float64, in (0, 1]: 1 where there is no error. Where the advantages differ by no
        more than their errors explain, one hundredth of their spread is taken for signal.

    Raises:
        ValueError: if lengths differ, there is no advantage, or a number is not finite or an error negative.

    Example:

    ```python
    >>> from dapo_trl.advantages import reliabilities

    >>> reliabilities([0.5, -0.5], [0.3, 0.3]).round(2).tolist()  # of a spread of 0.25, 0.09 are noise
    [0.64, 0.64]
    >>> reliabilities([0.32, -0.32], [0.24, 0.24], posterior=True).round(2).tolist()  # the same, shrunk by that
    [0.64, 0.64]

    ```
    """
    a_N, e_N = np.asarray(advantages, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if a_N.shape != e_N.shape or a_N.ndim != 1 or a_N.size == 0:
        raise ValueError(f"Every advantage needs an error: got {a_N.shape} advantages and {e_N.shape} errors.")
    if not (np.isfinite(a_N).all() and np.isfinite(e_N).all() and (e_N >= 0).all()):
        raise ValueError("Advantages and errors must be finite, and errors 0 or more.")
    spread, noise = np.mean(a_N**2), np.mean(e_N**2)
    signal = spread if posterior else spread - noise
    signal = max(signal, _LEAST_SIGNAL * spread, np.finfo(np.float32).tiny)
    return signal / (signal + e_N**2)


def add_advantages(dataset: Any, values: str = "values", errors: str | None = None, posterior: bool = False) -> Any:
    """
    Add the `advantages` column to state rows, from the values of their candidates; with a column of standard errors
    also what is needed to weigh the advantages by how far they can be relied on.

    Args:
        dataset ([`~datasets.Dataset`]):
            State rows with a column of candidate values and, optionally, `counts`. A `rewards` column, where present,
            holds the true reward of a candidate that ends the solution (null for others), which replaces its value.
        values (`str`, *optional*, defaults to `"values"`):
            Column that holds the candidates' values: for example `"critic_values"` as written by
            [`StepCriticTrainer.predict_values`].
        errors (`str`, *optional*):
            Column that holds the standard errors of these values: `"value_errors"`, `"critic_errors"` or
            `"shrinkage_errors"`, see `shrinkage.py`. A candidate with a reward has none.
        posterior (`bool`, *optional*, defaults to `False`):
            Whether the values are posterior means, as those of a critic or of shrinkage, rather than mean outcomes; see
            [`reliabilities`].

    Returns:
        [`~datasets.Dataset`]: the same rows with `advantages` (list of float, one per candidate), and with
        `advantage_errors` and `reliabilities` if there are errors.

    Raises:
        ValueError: if a column is missing, or a row cannot be valued; the message names the row.

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
    for name in (values, *([errors] if errors else [])):
        if name not in dataset.column_names:
            raise ValueError(
                f"The data set has no column {name!r} to compute advantages from, only {dataset.column_names}."
            )
    rewards = dataset["rewards"] if "rewards" in dataset.column_names else [None] * len(dataset)
    counts = dataset["counts"] if "counts" in dataset.column_names else [None] * len(dataset)

    def each_row(column: str, compute: Callable[..., np.ndarray], known: Callable[..., Any]) -> list[list[float]]:
        found = []
        for index, (x_C, r_C, n_C) in enumerate(zip(dataset[column], rewards, counts, strict=True)):
            try:
                found.append(compute(known(x_C, r_C), n_C).tolist())
            except ValueError as error:
                raise ValueError(f"Row {index}, column {column!r}: {error}") from error
        return found

    columns = {"advantages": each_row(values, sibling_advantages, with_true_rewards)}
    if errors:
        columns["advantage_errors"] = each_row(errors, advantage_errors, _without_known_errors)
        columns["reliabilities"] = _by_row(columns["advantages"], columns["advantage_errors"], posterior)
    old = [name for name in ("advantages", "advantage_errors", "reliabilities") if name in dataset.column_names]
    dataset = dataset.remove_columns(old)
    for name, column in columns.items():
        dataset = dataset.add_column(name, column)
    return dataset


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


def _without_known_errors(errors: Sequence[float], rewards: Sequence[float | None] | None) -> list[float]:
    """The reward of a candidate that ends the solution is known."""
    known = None if rewards is None else [None if reward is None else 0.0 for reward in rewards]
    return with_true_rewards(errors, known)


def _by_row(advantages: list[list[float]], errors: list[list[float]], posterior: bool) -> list[list[float]]:
    """Reliabilities of all rows, whose variance of advantages is that of the data set."""
    if not advantages:
        return []
    sizes = [len(row) for row in advantages]
    if sizes != [len(row) for row in errors]:
        row = next(index for index, row in enumerate(errors) if len(row) != sizes[index])
        raise ValueError(f"Row {row}: there are {len(errors[row])} standard errors of {sizes[row]} candidates.")
    flat = reliabilities(np.concatenate(advantages), np.concatenate(errors), posterior)
    return [part.tolist() for part in np.split(flat, np.cumsum(sizes)[:-1])]


def _as_counts(counts: Sequence[int] | None, values: np.ndarray, name: str) -> np.ndarray:
    n_C = np.ones_like(values) if counts is None else np.asarray(counts, dtype=np.float64)
    if n_C.shape != values.shape:
        raise ValueError(f"`{name}` and `counts` must have the same length, got {values.size} and {n_C.size}.")
    if not (n_C >= 1).all():
        raise ValueError(f"`counts` must be at least 1, got {n_C.tolist()}.")
    return n_C


def check_probabilities(values: np.ndarray) -> None:
    """
    Refuse values that are no probabilities.

    Args:
        values (`np.ndarray`):
            Values of states.

    Raises:
        ValueError: if one is not in [0, 1].
    """
    bad = [value for value in values.tolist() if not (math.isfinite(value) and 0.0 <= value <= 1.0)]
    if bad:
        raise ValueError(f"Values are probabilities of success and must lie in [0, 1], got {bad[0]}.")
