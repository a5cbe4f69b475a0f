"""
How far values can be taken at their word: mean outcomes by predicted value, with 95% intervals by bootstrap over
problems.

S states, P problems, B bins.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dapo_trl.intervals import Estimate


@dataclass(frozen=True)
class Bin:
    """
    States with about the same predicted value.

    Attributes:
        value (`float`):
            Mean predicted value; each completion counts the same.
        outcome ([`Estimate`]):
            Mean outcome of their completions.
        num_problems (`int`), num_states (`int`), num_rollouts (`int`):
            Problems, their states, and completions behind these. Of few problems, the interval says nothing.
    """

    value: float
    outcome: Estimate
    num_problems: int
    num_states: int
    num_rollouts: int


def reliability(
    solutions: Iterable[Mapping[str, Any]], num_bins: int = 10, num_resamples: int = 1000, seed: int = 0
) -> list[Bin]:
    """
    Mean outcome of the states that a critic gives about the same value.

    Args:
        solutions (iterable of `dict`):
            Solution rows with `problem_id`, `completions`, `mc_successes`, `mc_rollouts` and `critic_values`. A state
            that several of them share counts once; ends of solutions do not count.
        num_bins (`int`, *optional*, defaults to `10`):
            Bins of equal width.
        num_resamples (`int`, *optional*, defaults to `1000`):
            Bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        `list[Bin]`: without empty bins. The mean distance of `value` and `outcome`, weighted by `num_rollouts`, is the
        expected calibration error.

    Example:

    ```python
    >>> from dapo_trl.calibration import reliability

    >>> row = {"problem_id": "1", "completions": ["a", "b"], "critic_values": [0.5, 0.9, 1.0]}
    >>> rows = [row | {"mc_successes": [2.0, 4.0, 1.0], "mc_rollouts": [4, 4, 1]}]
    >>> [(bin.value, bin.outcome.mean, bin.num_rollouts) for bin in reliability(rows)]
    [(0.5, 0.5, 4), (0.9, 1.0, 4)]

    ```
    """
    states = _different_states(solutions)
    if not states:
        return []
    table = np.array(states, dtype=np.float64)
    problems, k_S, n_S, v_S = table[:, 0].astype(int), table[:, 1], table[:, 2], table[:, 3]
    bins = np.minimum((v_S * num_bins).astype(int), num_bins - 1)
    shape = (problems.max() + 1, num_bins)
    k_PB, n_PB = (_sums(problems, bins, weights, shape) for weights in (k_S, n_S))
    draws = _redraw(k_PB, n_PB, num_resamples, seed)
    return [
        Bin(
            value=float(np.average(v_S[bins == number], weights=n_S[bins == number])),
            outcome=_estimate(k_PB[:, number].sum() / n_PB[:, number].sum(), draws[:, number]),
            num_problems=len(set(problems[bins == number])),
            num_states=int((bins == number).sum()),
            num_rollouts=int(n_PB[:, number].sum()),
        )
        for number in np.unique(bins)
    ]


def _different_states(solutions: Iterable[Mapping[str, Any]]) -> list[tuple[float, ...]]:
    """Number of the problem, successes, rollouts and value of each state that has completions."""
    problems: dict[str, int] = {}
    found: dict[tuple[str, ...], tuple[float, ...]] = {}
    for row in solutions:
        problem = problems.setdefault(row["problem_id"], len(problems))
        counted = zip(row["mc_successes"], row["mc_rollouts"], row["critic_values"], strict=True)
        for depth, cells in zip(range(len(row["completions"])), counted, strict=False):
            if cells[1] > 0:
                found.setdefault((row["problem_id"], *row["completions"][:depth]), (problem, *cells))
    return list(found.values())


def _sums(problems: np.ndarray, bins: np.ndarray, weights: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.bincount(problems * shape[1] + bins, weights, minlength=shape[0] * shape[1]).reshape(shape)


def _redraw(k_PB: np.ndarray, n_PB: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Mean outcomes of each bin, each time of other problems; NaN where none of them has a state there."""
    num_problems = len(k_PB)
    rng = np.random.default_rng(seed)
    weights_RP = rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), num_resamples)
    with np.errstate(invalid="ignore"):
        return (weights_RP @ k_PB) / (weights_RP @ n_PB)


def _estimate(mean: float, draws: Sequence[float] | np.ndarray) -> Estimate:
    finite = np.asarray(draws)[np.isfinite(draws)]
    low, high = np.quantile(finite, [0.025, 0.975]) if finite.size else (mean, mean)
    return Estimate(float(mean), float(low), float(high))
