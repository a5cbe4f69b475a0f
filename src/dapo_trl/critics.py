"""
Several critics, which value rows together: the mean of their values is steadier than each of them.

Critics that were trained on the same rows from other seeds err in part alike, where the rows mislead them, and in part
each in its own way. The mean keeps the first and loses most of the second.
"""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from dapo_trl.diagnostics import critic_metrics


def mean_values(scored: Sequence[Dataset]) -> Dataset:
    """
    Rows with the mean of the values of several critics.

    Args:
        scored (sequence of [`~datasets.Dataset`]):
            The same rows with the `critic_values` of each critic, as
            [`~dapo_trl.StepCriticTrainer.predict_values`] gives them.

    Returns:
        [`~datasets.Dataset`]: the rows with the means in `critic_values`, in [0, 1].

    Raises:
        ValueError: if there is no critic, or the numbers of rows or of their values differ.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from dapo_trl.critics import mean_values

    >>> rows = Dataset.from_dict({"problem_id": ["a"]})
    >>> scored = [rows.add_column("critic_values", [values]) for values in ([0.25, 1.0], [0.75, 0.5])]
    >>> mean_values(scored)["critic_values"][:]
    [[0.5, 0.75]]

    ```
    """
    if not scored:
        raise ValueError("There are no critics, so there is no mean of their values.")
    if len(scored) == 1:
        return scored[0]
    columns = [rows["critic_values"][:] for rows in scored]
    if len(set(map(len, columns))) > 1:
        raise ValueError(f"The critics valued different numbers of rows: {', '.join(str(len(c)) for c in columns)}.")
    for index, rows in enumerate(zip(*columns, strict=True)):
        if len(set(map(len, rows))) > 1:
            raise ValueError(f"Row {index} has different numbers of values: {', '.join(str(len(r)) for r in rows)}.")
    means = [np.mean(rows, axis=0).tolist() for rows in zip(*columns, strict=True)]
    return scored[0].remove_columns("critic_values").add_column("critic_values", means)


def solution_metrics(rows: Dataset) -> dict[str, float]:
    """
    Metrics of the values of solution rows, as [`~dapo_trl.StepCriticTrainer`] measures them.

    Args:
        rows ([`~datasets.Dataset`]):
            Solution rows with `critic_values`, `mc_successes` and `mc_rollouts`.

    Returns:
        `dict[str, float]`: metrics of [`~dapo_trl.diagnostics.critic_metrics`], over all states with rollouts.
    """
    names = ("critic_values", "mc_successes", "mc_rollouts")
    values, successes, rollouts = (np.concatenate(rows[name][:]).astype(np.float64) for name in names)
    counted = rollouts > 0
    return critic_metrics(values[counted], successes[counted], rollouts[counted])
