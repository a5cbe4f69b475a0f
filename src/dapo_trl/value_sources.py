"""
Where advantages come from: one of several estimators of the values of next steps.
"""

from datasets import Dataset

from dapo_trl.advantages import add_advantages
from dapo_trl.shrinkage import add_critic_errors, add_monte_carlo_errors, add_shrinkage_values


SOURCES = ("critic", "monte_carlo", "shrinkage")


def advantages_from(source: str, states: Dataset, strength: float | None = None) -> Dataset:
    """
    State rows with the advantages of a source of values, and how far they can be relied on.

    Args:
        source (`str`):
            `"critic"` (paper), `"monte_carlo"` or `"shrinkage"` (Monte Carlo counts with the critic as a prior).
        states ([`~datasets.Dataset`]):
            State rows with counts, and `critic_values` unless the source is `"monte_carlo"`.
        strength (`float`, *optional*):
            For how many rollouts the critic's values stand, see [`~dapo_trl.shrinkage.fit_strength`]. `"shrinkage"`
            needs it; without it nothing can be said of the errors of `"critic"`.

    Returns:
        [`~datasets.Dataset`]: the rows with `advantages`; with `reliabilities` and the errors of values, unless
        `strength` is missing.

    Raises:
        ValueError: if there is no such source, or `strength` is missing.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from dapo_trl.value_sources import advantages_from

    >>> state = {"prompt": "?", "prefix": [], "candidates": ["a", "b"], "counts": [1, 1], "critic_values": [0.75, 0.25]}
    >>> advantages_from("critic", Dataset.from_list([state]))["advantages"][0]
    [0.25, -0.25]

    ```
    """
    if source not in SOURCES:
        raise ValueError(f"`source` must be one of {', '.join(map(repr, SOURCES))}, got {source!r}.")
    if source == "monte_carlo":
        return add_advantages(add_monte_carlo_errors(states), "values", "value_errors")
    if strength is None and source == "critic":
        return add_advantages(states, "critic_values")
    if strength is None:
        raise ValueError("`strength` is needed to shrink values: `dapo_trl.shrinkage.fit_strength` gives it.")
    rows = (add_critic_errors if source == "critic" else add_shrinkage_values)(states, strength)
    return add_advantages(rows, f"{source}_values", f"{source}_errors", posterior=True)


def with_values_of(source: str, states: Dataset) -> Dataset:
    """
    State rows whose `values` are those of a source, as a listwise loss compares them.

    Args:
        source (`str`):
            `"critic"`, `"monte_carlo"` or `"shrinkage"`.
        states ([`~datasets.Dataset`]):
            What [`advantages_from`] gave for it.

    Returns:
        [`~datasets.Dataset`]: the rows with that column of values as `values`.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from dapo_trl.value_sources import with_values_of

    >>> with_values_of("critic", Dataset.from_list([{"values": [1.0, 0.0], "critic_values": [0.75, 0.25]}]))[0]
    {'values': [0.75, 0.25]}

    ```
    """
    if source == "monte_carlo":
        return states
    return states.remove_columns("values").rename_column(f"{source}_values", "values")
