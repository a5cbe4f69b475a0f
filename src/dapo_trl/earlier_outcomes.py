r"""
Values of states under the policy of today, also from what its earlier versions did there.

Two ways of the literature, for step-level offline training: kernelized advantage estimation (KAE, arXiv 2604.28005)
takes outcomes of the same state under earlier policies, the older the less; batchwise advantage estimation (BASIS,
arXiv 2605.27293) moves a table of earlier values as a whole, so that it fits outcomes of today of any of its states.

Shapes: I iterations, the last one being today's; S states.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from dapo_trl.dataset_checks import refuse_missing_columns
from dapo_trl.tables import with_columns
from dapo_trl.values import check_table


Numbers = Sequence[float] | np.ndarray

_SHIFTS = np.linspace(-6.0, 6.0, 241)  # of log-odds, that a table is moved by
_COUNTED = ("problem_id", "mc_successes", "mc_rollouts")
_VALUED = (*_COUNTED, "critic_values")
_MARGIN = 0.02  # states with values nearer to 0 or 1 say nothing about others
_END = "end"  # of the key of a state that is a finished solution
_CLOSEST = 1e-6  # values of a table lie this far from 0 and 1 at least


class KernelEstimates(NamedTuple):
    """
    Values from outcomes of several iterations.

    Attributes:
        values (`np.ndarray` of shape `(S,)`):
            Weighted mean outcomes, NaN where there is none.
        effective (`np.ndarray` of shape `(S,)`):
            Effective sample size, $(\\sum w)^2 / \\sum w^2$ over outcomes: of so many of today's a mean would have the
            same variance.
    """

    values: np.ndarray
    effective: np.ndarray


class Revalued(NamedTuple):
    """
    Rows with an earlier critic's values, moved to the policy of today.

    Attributes:
        solutions ([`~datasets.Dataset`]), states ([`~datasets.Dataset`]):
            Rows with other `critic_values`.
        shift (`float`):
            By how much, in nats of the log-odds, see [`fit_shift`].
    """

    solutions: Dataset
    states: Dataset
    shift: float


def kernel_weights(num_iterations: int, bandwidth: float) -> np.ndarray:
    r"""
    Weights of the outcomes of iterations 1 to I for the values of iteration I.

    $$
    w_j = K\left(\frac{I - j}{I h}\right), \qquad K(u) = \max(1 - u, 0)
    $$

    with the triangular kernel K (arXiv 2604.28005). What is more than I h iterations ago counts for nothing, and h of
    infinity weighs all alike.

    Args:
        num_iterations (`int`):
            I, the iteration that is valued, from 1.
        bandwidth (`float`):
            h, positive.

    Returns:
        `np.ndarray` of shape `(I,)`: in [0, 1], the last one 1.

    Raises:
        ValueError: if a number is out of range.

    Example:

    ```python
    >>> from dapo_trl.earlier_outcomes import kernel_weights

    >>> kernel_weights(4, 0.5).tolist()
    [0.0, 0.0, 0.5, 1.0]

    ```
    """
    if num_iterations < 1:
        raise ValueError(f"`num_iterations` must be at least 1, got {num_iterations}.")
    if not bandwidth > 0:
        raise ValueError(f"`bandwidth` must be positive, got {bandwidth}.")
    ages = np.arange(num_iterations - 1, -1, -1.0)
    return np.maximum(1 - ages / (num_iterations * bandwidth), 0.0)


def kernel_values(
    successes: Sequence[Numbers] | np.ndarray,
    rollouts: Sequence[Numbers] | np.ndarray,
    bandwidth: float,
    left_out: Numbers | None = None,
) -> KernelEstimates:
    r"""
    Mean outcome of each state over this and earlier iterations, the older outcomes weighing less.

    $$
    V(s) = \frac{\sum_j w_j k_j(s)}{\sum_j w_j n_j(s)}, \qquad
    n_\mathrm{eff}(s) = \frac{(\sum_j w_j n_j)^2}{\sum_j w_j^2 n_j}
    $$

    for k successes in n rollouts, with the weights of [`kernel_weights`]. It is biased as far as the policy has
    changed, and has less variance; which of the two matters more depends on n. Where the effective size is small, take
    another value, such as a critic's.

    Args:
        successes (sequence of I sequences of `float`, length S):
            Rollouts of each state that ended correct, in each iteration, the oldest first.
        rollouts (sequence of I sequences of `int`, length S):
            Rollouts of each state, 0 where an iteration did not visit it.
        bandwidth (`float`):
            h, see [`kernel_weights`].
        left_out (sequence of `float`, length S, *optional*):
            Outcome of one of today's rollouts of each state, that is not to count: a sample is compared with the others
            only. NaN leaves none out.

    Returns:
        [`KernelEstimates`].

    Raises:
        ValueError: if shapes differ, a number is out of range, or what is left out is not among the outcomes.

    Example:

    ```python
    >>> from dapo_trl.earlier_outcomes import kernel_values

    >>> found = kernel_values([[2.0], [3.0]], [[4], [4]], bandwidth=1.0)  # last time 2 of 4, with half the weight
    >>> found.values.round(3).tolist(), found.effective.tolist()
    ([0.667], [7.2])

    ```
    """
    k_IS, n_IS = np.array(successes, dtype=np.float64), np.array(rollouts, dtype=np.float64)
    if k_IS.ndim != 2 or k_IS.shape != n_IS.shape:
        raise ValueError(f"Each iteration has a number per state: got successes {k_IS.shape}, rollouts {n_IS.shape}.")
    if left_out is not None:
        out_S = np.asarray(left_out, dtype=np.float64)
        if out_S.shape != k_IS.shape[1:]:
            raise ValueError(f"`left_out` has an outcome per state: got {out_S.shape} for {k_IS.shape[1]} states.")
        k_IS[-1] -= np.nan_to_num(out_S)
        n_IS[-1] -= ~np.isnan(out_S)
    bad = ~((k_IS >= -1e-9) & (k_IS <= n_IS + 1e-9))
    if bad.any():
        iteration, state = np.argwhere(bad)[0]
        raise ValueError(
            f"State {state} has {k_IS[iteration, state]:g} successes in {n_IS[iteration, state]:g} rollouts of "
            f"iteration {iteration + 1}"
            + (" without what is left out." if left_out is not None and iteration == len(k_IS) - 1 else ".")
        )
    w_I = kernel_weights(len(k_IS), bandwidth)
    total_S = w_I @ n_IS
    with np.errstate(invalid="ignore", divide="ignore"):
        effective = np.where(total_S > 0, total_S**2 / (w_I**2 @ n_IS), 0.0)
        return KernelEstimates(np.where(total_S > 0, w_I @ k_IS / total_S, np.nan), effective)


def add_kernel_values(states: Dataset, earlier: Sequence[Iterable[Dataset]], bandwidth: float) -> Dataset:
    """
    State rows whose `values` also count what earlier iterations saw from the same states, see [`kernel_values`].

    Args:
        states ([`~datasets.Dataset`]):
            State rows of this iteration with `problem_id`, `mc_successes` and `mc_rollouts`.
        earlier (sequence of iterables of [`~datasets.Dataset`]):
            State rows and solution rows of each earlier iteration, the oldest first.
        bandwidth (`float`):
            h, see [`kernel_weights`].

    Returns:
        [`~datasets.Dataset`]: the same rows with other `values`, and `effective_rollouts` (list of float, one per
        candidate). A candidate that no earlier iteration came by keeps its mean outcome. The counts stay those of this
        iteration.

    Raises:
        ValueError: if a column is missing, or a number is out of range.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from dapo_trl.earlier_outcomes import add_kernel_values

    >>> state = {"problem_id": "1", "prefix": [], "candidates": ["a\\n", "b\\n"], "rewards": [None, None]}
    >>> before, now = (
    ...     Dataset.from_list([state | {"mc_successes": successes, "mc_rollouts": [4, 4], "values": [0.0, 0.0]}])
    ...     for successes in ([4.0, 0.0], [1.0, 1.0])
    ... )
    >>> add_kernel_values(now, [[before]], bandwidth=1.0)["values"][0]
    [0.5, 0.16666666666666666]

    ```
    """
    for rows in (states, *(rows for tables in earlier for rows in tables)):
        refuse_missing_columns(rows, "Kernel values need", _COUNTED, "Sampling writes them.")
    known = [dict(item for rows in tables for row in rows for item in _outcomes(row)) for tables in earlier]
    columns: dict[str, list[list[float]]] = {"values": [], "effective_rollouts": []}
    for row in states:
        keys = _state_keys(row)
        counts = [[outcomes.get(key, (0.0, 0)) for key in keys] for outcomes in known]
        counts.append(list(zip(row["mc_successes"], row["mc_rollouts"], strict=True)))
        successes, rollouts = np.moveaxis(np.array(counts, dtype=np.float64), 2, 0)
        found = kernel_values(successes, rollouts, bandwidth)
        for column, numbers in zip(columns.values(), found, strict=True):
            column.append(numbers.tolist())
    return with_columns(states, columns)


def _outcomes(row: Mapping[str, Any]) -> Iterator[tuple[Hashable, tuple[float, int]]]:
    """Successes and rollouts of the states that a row knows of, but for its solution's end."""
    counts = zip(row["mc_successes"], row["mc_rollouts"], strict=True)
    for key, outcomes in zip(_state_keys(row), counts, strict=True):
        if "candidates" in row or key[-1] != _END:
            yield key, outcomes


def _state_keys(row: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What tells the states of a row apart, one for each count: problem, steps, and `_END` for a finished solution."""
    if "candidates" in row:
        rewards = row.get("rewards") or [None] * len(row["candidates"])
        return [
            (row["problem_id"], *row["prefix"], step, None if reward is None else _END)
            for step, reward in zip(row["candidates"], rewards, strict=True)
        ]
    steps = row["completions"]
    return [
        (row["problem_id"], *steps[:depth], _END if depth == len(steps) else None)
        for depth in range(len(row["mc_rollouts"]))
    ]


def shifted_values(values: Numbers, shift: float) -> np.ndarray:
    r"""
    A table of values for a policy that has become better, or worse, everywhere alike.

    $$
    \mathrm{logit}\, V = \mathrm{logit}\, p + c
    $$

    Args:
        values (sequence of `float`, length S):
            p, in [0, 1].
        shift (`float`):
            c, in nats of the log-odds: 0 is the table itself.

    Returns:
        `np.ndarray` of shape `(S,)`: 0 and 1 stay what they are.

    Example:

    ```python
    >>> from dapo_trl.earlier_outcomes import shifted_values

    >>> shifted_values([0.0, 0.5, 1.0], 1.0).round(3).tolist()
    [0.0, 0.731, 1.0]

    ```
    """
    p_S = np.asarray(values, dtype=np.float64)
    better = p_S * np.exp(shift)
    return better / (better + 1 - p_S)


def fit_shift(values: Numbers, successes: Numbers, rollouts: Numbers, shifts: Numbers = _SHIFTS) -> float:
    r"""
    By how much a table of values is to be moved, so that outcomes of today are most likely.

    $$
    \max_c \sum_s k_s \log V_s + (n_s - k_s) \log (1 - V_s), \qquad \mathrm{logit}\, V_s = \mathrm{logit}\, p_s + c
    $$

    over a grid of c. In arXiv 2605.27293 c is the reciprocal of a temperature that the batch's outcomes choose; the
    likelihood as criterion is worked out from its description.

    Args:
        values (sequence of `float`, length S):
            p, values under an earlier policy; moved away from 0 and 1 by 1e-6.
        successes (sequence of `float`, length S):
            k, rollouts under today's policy that ended correct.
        rollouts (sequence of `int`, length S):
            n, of each state; 0 for those that it did not visit.
        shifts (sequence of `float`, *optional*):
            The grid. Defaults to -6 to 6 in steps of 0.05.

    Returns:
        `float`: c, of equally good ones the closest to 0.

    Raises:
        ValueError: if lengths differ, or a number is out of range.

    Example:

    ```python
    >>> from dapo_trl.earlier_outcomes import fit_shift

    >>> round(fit_shift([0.5, 0.5], [3, 3], [4, 4]), 2)  # from log-odds of 0 to log 3 = 1.10
    1.1

    ```
    """
    p_S, k_S, n_S = check_table(values, successes, rollouts)
    p_S = np.clip(p_S, _CLOSEST, 1 - _CLOSEST)

    def log_likelihood(shift: float) -> float:
        v_S = np.clip(shifted_values(p_S, shift), 1e-300, 1 - 1e-16)
        return float(k_S @ np.log(v_S) + (n_S - k_S) @ np.log1p(-v_S))

    return max((float(shift) for shift in shifts), key=lambda shift: (log_likelihood(shift), -abs(shift)))


def batch_values(
    values: Numbers,
    successes: Numbers,
    rollouts: Numbers,
    groups: Sequence[object] | None = None,
    margin: float = _MARGIN,
) -> np.ndarray:
    r"""
    Values of the states of a batch, each moved by how the others turned out.

    $$
    b_i = V_i \, \frac{\sum_{j \neq i} k_j / (1 - V_j)}{\sum_{j \neq i} n_j V_j / (1 - V_j)}
    $$

    clipped to [0, 1]. The ratio is the weighted least squares estimate of the factor r in E[outcome_j] = r V_j: an
    outcome has the variance V_j (1 - V_j) where r is near 1, so that it weighs V_j^2 / (V_j (1 - V_j)). Source: arXiv
    2605.27293, for single rollouts; with several the sums go over rollouts.

    Args:
        values (sequence of `float`, length S):
            V, see [`shifted_values`].
        successes (sequence of `float`, length S):
            k, rollouts of each state that ended correct.
        rollouts (sequence of `int`, length S):
            n, rollouts of each state.
        groups (sequence, length S, *optional*):
            What each state belongs to, such as its trajectory or problem: for a state, no state of its own group
            counts, as their outcomes are not independent of its own. `None` makes each state its own.
        margin (`float`, *optional*, defaults to `0.02`):
            States with values that near to 0 or 1 say nothing about the others, and keep their values: near 1 a
            weight would have no bound, near 0 it is next to nothing.

    Returns:
        `np.ndarray` of shape `(S,)`: b. Where no other state counts, the value itself.

    Raises:
        ValueError: if lengths differ, or a number is out of range.

    Example:

    ```python
    >>> from dapo_trl.earlier_outcomes import batch_values

    >>> batch_values([0.5, 0.5, 0.5], [1, 0, 0], [1, 1, 1]).tolist()  # of the two others one, one, none succeeded
    [0.0, 0.5, 0.5]

    ```
    """
    v_S, k_S, n_S = check_table(values, successes, rollouts)
    if not 0 < margin < 0.5:
        raise ValueError(f"`margin` must lie between 0 and 1/2, got {margin}.")
    names = range(len(v_S)) if groups is None else groups
    if len(names) != len(v_S):
        raise ValueError(f"Each state has a group: got {len(names)} groups for {len(v_S)} states.")
    ratio, counted = _ratios(v_S, k_S, n_S, names, margin)
    return np.where(counted, np.clip(v_S * ratio, 0.0, 1.0), v_S)


def _ratios(
    v_S: np.ndarray, k_S: np.ndarray, n_S: np.ndarray, groups: Sequence[object], margin: float
) -> tuple[np.ndarray, np.ndarray]:
    """For each state the ratio of successes to values in the other groups, and whether the state counts in such."""
    numbers: dict[object, int] = {}
    g_S = np.array([numbers.setdefault(name, len(numbers)) for name in groups], dtype=np.int64)
    counted = (v_S > margin) & (v_S < 1 - margin)
    w_S = np.where(counted, 1 / np.where(counted, 1 - v_S, 1.0), 0.0)
    found, expected = w_S * k_S, w_S * n_S * v_S
    others = [total.sum() - np.bincount(g_S, total, len(numbers))[g_S] for total in (found, expected)]
    usable = others[1] > 1e-12 * max(expected.sum(), 1.0)
    return np.where(usable, others[0] / np.where(usable, others[1], 1.0), 1.0), counted


def revalue(solutions: Dataset, states: Dataset, with_ratio: bool = False) -> Revalued:
    """
    Rows of today with the values of a critic of before, moved so that they fit the outcomes of today.

    The shift is fitted to the outcomes of all states of solutions and after candidates, each once, but for the ends of
    solutions: these keep their values, as their outcomes depend on no policy.

    Args:
        solutions ([`~datasets.Dataset`]):
            Solution rows of an iteration, with `critic_values` of an earlier critic, `problem_id`, `mc_successes` and
            `mc_rollouts`.
        states ([`~datasets.Dataset`]):
            State rows, with the same.
        with_ratio (`bool`, *optional*, defaults to `False`):
            Move the values of each problem also by how the others turned out, see [`batch_values`]; all of them, so
            that the order of its states stays what it is.

    Returns:
        [`Revalued`].

    Raises:
        ValueError: if a column is missing, or a number is out of range.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from dapo_trl.earlier_outcomes import revalue

    >>> row = {"problem_id": "1", "mc_successes": [3.0, 3.0], "mc_rollouts": [4, 4], "critic_values": [0.5, 0.5]}
    >>> states = Dataset.from_list([row | {"prefix": [], "candidates": ["a\\n", "b\\n"], "rewards": [None, None]}])
    >>> solutions = Dataset.from_list([row | {"completions": ["a\\n"]}])
    >>> found = revalue(solutions, states)
    >>> round(found.shift, 2), [round(value, 2) for value in found.solutions["critic_values"][0]]
    (1.1, [0.75, 0.5])

    ```
    """
    tables = (states, solutions)
    for rows, name in zip(tables, ("prefix", "completions"), strict=True):
        wanted = (*_VALUED, name)
        refuse_missing_columns(
            rows, "Values of an earlier critic need", wanted, "Sampling and `predict_values` write them."
        )
    known = {
        key: counts
        for rows in tables
        for row in rows
        for key, *counts in zip(
            _state_keys(row), row["critic_values"], row["mc_successes"], row["mc_rollouts"], strict=True
        )
        if key[-1] != _END
    }
    if not known:
        return Revalued(solutions, states, 0.0)
    v_S, k_S, n_S = (np.array(column) for column in zip(*known.values(), strict=True))
    shift = fit_shift(v_S, k_S, n_S)
    ratios: dict[str, float] = {}
    if with_ratio:
        problems = [key[0] for key in known]
        ratios = dict(zip(problems, _ratios(shifted_values(v_S, shift), k_S, n_S, problems, _MARGIN)[0], strict=True))

    def moved(row: Mapping[str, Any]) -> list[float]:
        ratio, values = ratios.get(row["problem_id"], 1.0), row["critic_values"]
        return [
            old if key[-1] == _END else min(ratio * value, 1.0)
            for key, old, value in zip(_state_keys(row), values, shifted_values(values, shift).tolist(), strict=True)
        ]

    of_solutions, of_states = ([moved(row) for row in rows] for rows in (solutions, states))
    return Revalued(
        with_columns(solutions, {"critic_values": of_solutions}),
        with_columns(states, {"critic_values": of_states}),
        shift,
    )
