r"""
A critic's values and Monte Carlo counts of the same states, put together: the critic is the prior, the counts are data.

A state's value is taken for a draw from Beta(c v, c (1 - v)) around the critic's value v; the prior strength c says
for how many rollouts the critic stands, and is fitted on states that it was not trained on. With k successes in n
rollouts the posterior mean is (k + c v) / (n + c): Monte Carlo values are the limit c = 0, the critic's the case n = 0.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from dapo_trl.dataset_checks import refuse_missing_columns
from dapo_trl.tables import with_columns
from dapo_trl.values import check_table


# A critic that is sure is sure up to this: a prior of exactly 0 or 1 would outvote any number of rollouts.
_CLOSEST = 1e-3
_COLUMNS = ("mc_successes", "mc_rollouts", "critic_values")
_ENOUGH_TO_FIT = 20  # candidates with two rollouts
_STRENGTHS = np.geomspace(1e-2, 1e4, 121)  # where the fit begins to look


class ValueEstimates(NamedTuple):
    """
    Values of states and how far off they may be.

    Attributes:
        values (`np.ndarray` of shape `(S,)`):
            Estimates, in [0, 1].
        errors (`np.ndarray` of shape `(S,)`):
            Their standard errors: of shrunk values posterior standard deviations.
    """

    values: np.ndarray
    errors: np.ndarray


def shrinkage_values(
    successes: Sequence[float] | np.ndarray,
    rollouts: Sequence[int] | np.ndarray,
    prior: Sequence[float] | np.ndarray,
    strength: float,
) -> ValueEstimates:
    r"""
    Monte Carlo counts shrunk towards a critic's values.

    $$
    \hat V = \frac{k + c v}{n + c}, \qquad \mathrm{se}^2 = \frac{\hat V (1 - \hat V)}{n + c + 1}
    $$

    mean and standard deviation of the posterior Beta(c v + k, c (1 - v) + n - k). How many rollouts were drawn may
    depend on their outcomes (a stopping rule): the likelihood of a value is the same.

    Args:
        successes (sequence of `float`, length S):
            k, rollouts of each state that ended correct.
        rollouts (sequence of `int`, length S):
            n, rollouts of each state, 0 or more.
        prior (sequence of `float`, length S):
            v, values by the critic, in [0, 1]; moved away from 0 and 1 by 0.001.
        strength (`float`):
            c, rollouts that the critic stands for, positive; see [`fit_prior_strength`].

    Returns:
        [`ValueEstimates`].

    Raises:
        ValueError: if lengths differ, a number is out of range, or the strength is not positive.

    Example:

    ```python
    >>> from dapo_trl.shrinkage import shrinkage_values

    >>> shrinkage_values([4, 0], [4, 0], prior=[0.5, 0.5], strength=4.0).values.tolist()
    [0.75, 0.5]

    ```
    """
    k_S, n_S, v_S = _check(successes, rollouts, prior)
    if not (np.isfinite(strength) and strength > 0):
        raise ValueError(f"`strength` must be positive and finite, got {strength}.")
    values = (k_S + strength * v_S) / (n_S + strength)
    return ValueEstimates(values, np.sqrt(values * (1 - values) / (n_S + strength + 1)))


def monte_carlo_estimates(
    successes: Sequence[float] | np.ndarray,
    rollouts: Sequence[int] | np.ndarray,
    mean: float = 0.5,
    strength: float = 2.0,
) -> ValueEstimates:
    r"""
    Mean outcomes, with the standard error that they have: of a single rollout, too, nobody knows the value for sure.

    $$
    \mathrm{se}^2 = \frac{1}{n} E[V (1 - V) \mid k] = \frac{\tilde V (1 - \tilde V)}{n} \frac{n + c}{n + c + 1},
    \qquad \tilde V = \frac{k + c m}{n + c}
    $$

    the variance of a mean of n outcomes, expected under the posterior Beta(c m + k, c (1 - m) + n - k). Taking k/n for
    V instead would say that a state which failed once fails always, without error.

    Args:
        successes (sequence of `float`, length S):
            k, rollouts of each state that ended correct.
        rollouts (sequence of `int`, length S):
            n, rollouts of each state, positive.
        mean (`float`, *optional*, defaults to `0.5`):
            m, mean of the values of such states, moved away from 0 and 1 by 0.001.
        strength (`float`, *optional*, defaults to `2.0`):
            c, how close to it they lie. The defaults are a uniform prior; see [`add_monte_carlo_errors`] for another.

    Returns:
        [`ValueEstimates`]: k/n, and the standard errors of that.

    Raises:
        ValueError: if lengths differ, a number is out of range, or a state has no rollout.

    Example:

    ```python
    >>> from dapo_trl.shrinkage import monte_carlo_estimates

    >>> [round(error, 3) for error in monte_carlo_estimates([1, 8], [1, 16]).errors.tolist()]
    [0.408, 0.122]

    ```
    """
    k_S, n_S, m_S = _check(successes, rollouts, np.full(len(rollouts), mean))
    if (n_S == 0).any():
        raise ValueError(f"State {int(np.argmin(n_S))} has no rollout, so it has no Monte Carlo value.")
    posterior = shrinkage_values(k_S, n_S, m_S, strength)
    return ValueEstimates(k_S / n_S, posterior.errors * np.sqrt((n_S + strength) / n_S))


def fit_prior_strength(
    successes: Sequence[float] | np.ndarray,
    rollouts: Sequence[int] | np.ndarray,
    prior: Sequence[float] | np.ndarray,
) -> float:
    r"""
    For how many rollouts a critic stands: the prior strength c under which the outcomes of held-out states are most
    likely.

    $$
    \max_c \sum_s \log \frac{B(c v_s + k_s, c (1 - v_s) + n_s - k_s)}{B(c v_s, c (1 - v_s))}
    $$

    the beta-binomial likelihood. A critic that is right everywhere has no largest c: the search ends at 10,000. One
    that says nothing gets what the spread of the values themselves asks for.

    Args:
        successes (sequence of `float`, length S):
            k, rollouts of each state that ended correct: whole numbers.
        rollouts (sequence of `int`, length S):
            n, rollouts of each state. States with fewer than two say nothing about c.
        prior (sequence of `float`, length S):
            v, values of the same states by the critic, in [0, 1]. It must not have been trained on them.

    Returns:
        `float`: c, from 0.01 to 10,000.

    Raises:
        ValueError: if lengths differ, a number is out of range, successes are no whole numbers, or no state has two
            rollouts.

    Example:

    ```python
    >>> from dapo_trl.shrinkage import fit_prior_strength

    >>> right = fit_prior_strength([5, 15], [20, 20], prior=[0.25, 0.75])
    >>> wrong = fit_prior_strength([20, 0], [20, 20], prior=[0.25, 0.75])
    >>> right > 1000, wrong < 1
    (True, True)

    ```
    """
    k_S, n_S, v_S = _check(successes, rollouts, prior)
    if (k_S != np.round(k_S)).any():
        raise ValueError(
            f"State {int(np.argmax(k_S != np.round(k_S)))} has a success that is none of 0 and 1. The strength of a "
            "critic is fitted to outcomes that are right or wrong."
        )
    counted = n_S >= 2
    if not counted.any():
        raise ValueError("No state has two rollouts or more, so that nothing says how far off the critic is.")
    k_S, n_S, v_S = k_S[counted], n_S[counted], v_S[counted]
    best = int(np.argmax([_log_likelihood(k_S, n_S, v_S, strength) for strength in _STRENGTHS]))
    low, high = _STRENGTHS[max(best - 1, 0)], _STRENGTHS[min(best + 1, len(_STRENGTHS) - 1)]
    finer = np.geomspace(low, high, 41)
    return float(finer[np.argmax([_log_likelihood(k_S, n_S, v_S, strength) for strength in finer])])


def fit_strength(dataset: Dataset) -> float:
    """
    The prior strength of a critic, from the candidates of scored state rows.

    Args:
        dataset ([`~datasets.Dataset`]):
            State rows with `mc_successes`, `mc_rollouts` and `critic_values`, of problems that the critic was not
            trained on. Candidates that end the solution do not count: their reward is known.

    Returns:
        `float`: see [`fit_prior_strength`].

    Raises:
        ValueError: if a column is missing, or no candidate has two rollouts.
    """
    return fit_prior_strength(*_without_known_rewards(dataset, _COLUMNS))


def add_critic_errors(dataset: Dataset, strength: float) -> Dataset:
    r"""
    Add the standard errors of a critic's values, `critic_errors`.

    $$
    \mathrm{se}^2 = \frac{v (1 - v)}{c + 1}
    $$

    the case n = 0 of [`shrinkage_values`]: how far from the critic's value v values lie, of which it is worth c
    rollouts.

    Args:
        dataset ([`~datasets.Dataset`]):
            State rows with `critic_values`.
        strength (`float`):
            c, see [`fit_strength`].

    Returns:
        [`~datasets.Dataset`]: the same rows with `critic_errors` (list of float, one per candidate).
        [`~dapo_trl.advantages.add_advantages`] makes errors of advantages of them.

    Raises:
        ValueError: if the column is missing, or a row is bad; the message names it.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from dapo_trl.shrinkage import add_critic_errors

    >>> add_critic_errors(Dataset.from_list([{"critic_values": [0.5, 0.5]}]), strength=24.0)[0]["critic_errors"]
    [0.1, 0.1]

    ```
    """
    _refuse_missing(dataset, ("critic_values",))

    def errors(v_C: list[float]) -> list[float]:
        return shrinkage_values([0] * len(v_C), [0] * len(v_C), v_C, strength).errors.tolist()

    return with_columns(dataset, {"critic_errors": _each_row(errors, dataset, ("critic_values",))})


def add_monte_carlo_errors(dataset: Dataset) -> Dataset:
    """
    Add the standard errors of Monte Carlo values, `value_errors`.

    What is expected of candidates with few rollouts, their prior in [`monte_carlo_estimates`], is fitted to all of
    them: where most succeed nearly always or never, one outcome says more than where most are toss-ups. The prior is
    uniform where outcomes are not right or wrong, or fewer than twenty candidates have two rollouts.

    Args:
        dataset ([`~datasets.Dataset`]):
            State rows with `mc_successes` and `mc_rollouts`.

    Returns:
        [`~datasets.Dataset`]: the same rows with `value_errors` (list of float, one per candidate), for values without
        a rule that stops early; with one they are about as large.

    Raises:
        ValueError: if a column is missing, or a row is bad; the message names it.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from dapo_trl.shrinkage import add_monte_carlo_errors

    >>> rows = Dataset.from_list([{"mc_successes": [1.0, 8.0], "mc_rollouts": [1, 16]}])  # too few to fit a prior to
    >>> [round(error, 3) for error in add_monte_carlo_errors(rows)[0]["value_errors"]]
    [0.408, 0.122]

    ```
    """
    columns = _COLUMNS[:2]
    _refuse_missing(dataset, columns)
    mean, strength = _fit_prior(*_without_known_rewards(dataset, columns))

    def errors(k_C: list[float], n_C: list[int]) -> list[float]:
        return monte_carlo_estimates(k_C, n_C, mean, strength).errors.tolist()

    return with_columns(dataset, {"value_errors": _each_row(errors, dataset, columns)})


def add_shrinkage_values(dataset: Dataset, strength: float) -> Dataset:
    """
    Add what shrinkage makes of the values of candidates: `shrinkage_values` and their standard errors.

    Args:
        dataset ([`~datasets.Dataset`]):
            State rows with `mc_successes`, `mc_rollouts` and `critic_values`.
        strength (`float`):
            Rollouts that the critic stands for, see [`fit_strength`].

    Returns:
        [`~datasets.Dataset`]: the same rows with `shrinkage_values` and `shrinkage_errors` (lists of float, one per
        candidate). [`~dapo_trl.advantages.add_advantages`] makes advantages of them.

    Raises:
        ValueError: if a column is missing, or a row is bad; the message names it.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from dapo_trl.shrinkage import add_shrinkage_values

    >>> row = {"mc_successes": [4.0, 1.0], "mc_rollouts": [4, 1], "critic_values": [0.5, 0.25]}
    >>> add_shrinkage_values(Dataset.from_list([row]), strength=4.0)[0]["shrinkage_values"]
    [0.75, 0.4]

    ```
    """
    _refuse_missing(dataset, _COLUMNS)

    def estimates(k_C: list[float], n_C: list[int], v_C: list[float]) -> list[list[float]]:
        return [part.tolist() for part in shrinkage_values(k_C, n_C, v_C, strength)]

    values, errors = zip(*_each_row(estimates, dataset, _COLUMNS), strict=True) if len(dataset) else ((), ())
    return with_columns(dataset, {"shrinkage_values": list(values), "shrinkage_errors": list(errors)})


def with_mean_prior(dataset: Dataset, held_out: Dataset) -> Dataset:
    """
    State rows with the mean outcome in place of the critic's values: the prior where the critic is not to be used.

    A fitted strength makes a bad critic count for little, not for nothing: candidates of one rollout and the same
    outcome are still ordered by it alone, of an inverted one the wrong way round.

    Args:
        dataset ([`~datasets.Dataset`]):
            State rows with `mc_successes`, `mc_rollouts` and `critic_values`.
        held_out ([`~datasets.Dataset`]):
            The rows whose candidates the mean is taken of, each rollout counting the same.

    Returns:
        [`~datasets.Dataset`]: the same rows, `critic_values` all alike.

    Raises:
        ValueError: if a column is missing.
    """
    _refuse_missing(dataset, _COLUMNS)
    successes, rollouts = (sum(map(sum, held_out[name])) for name in _COLUMNS[:2])
    mean = successes / rollouts if rollouts else 0.5
    values = [[mean] * len(row) for row in dataset["critic_values"]]
    return dataset.remove_columns("critic_values").add_column("critic_values", values)


def _each_row(compute: Callable[..., list], dataset: Dataset, columns: Sequence[str]) -> list[list]:
    """What a function makes of the columns of each row; an error names the row."""
    found = []
    for index, row in enumerate(zip(*(dataset[name] for name in columns), strict=True)):
        try:
            found.append(compute(*row))
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error
    return found


def _without_known_rewards(dataset: Dataset, columns: Sequence[str]) -> list[Any]:
    """Columns of all candidates that do not end the solution."""
    _refuse_missing(dataset, columns)
    rewards = dataset["rewards"] if "rewards" in dataset.column_names else [None] * len(dataset)
    counted = [
        candidate
        for *row, r_C in zip(*(dataset[name] for name in columns), rewards, strict=True)
        for *candidate, reward in zip(*row, r_C or [None] * len(row[0]), strict=True)
        if reward is None
    ]
    return [[candidate[part] for candidate in counted] for part in range(len(columns))]


def _fit_prior(successes: list[float], rollouts: list[float]) -> tuple[float, float]:
    """Mean and strength of the Beta distribution that states come from, uniform if nothing can be said."""
    k_S, n_S = np.array(successes, dtype=np.float64), np.array(rollouts, dtype=np.float64)
    if (n_S >= 2).sum() < _ENOUGH_TO_FIT or (k_S != np.round(k_S)).any():
        return 0.5, 2.0
    mean = float(k_S.sum() / n_S.sum())
    return mean, fit_prior_strength(k_S, n_S, np.full_like(k_S, mean))


def _refuse_missing(dataset: Dataset, columns: Sequence[str]) -> None:
    who = "Shrinkage needs" if columns == _COLUMNS else "Standard errors need"
    cure = "Sampling writes the counts, `StepCriticTrainer.predict_values` adds the critic's values."
    refuse_missing_columns(dataset, who, columns, cure)


def _log_likelihood(k_S: np.ndarray, n_S: np.ndarray, v_S: np.ndarray, strength: float) -> float:
    """Beta-binomial, without the factor that does not depend on the strength: a product over rollouts one by one."""
    total = 0.0
    for rollout in range(int(n_S.max())):
        total += np.log(strength * v_S + rollout)[k_S > rollout].sum()
        total += np.log(strength * (1 - v_S) + rollout)[n_S - k_S > rollout].sum()
        total -= np.log(strength + rollout)[()] * (n_S > rollout).sum()
    return total


def _check(successes: object, rollouts: object, prior: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    v_S, k_S, n_S = check_table(prior, successes, rollouts, "value by the critic")
    return k_S, n_S, np.clip(v_S, _CLOSEST, 1 - _CLOSEST)
