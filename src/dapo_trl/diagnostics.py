"""
Is the critic any good? Pure functions of its values and of Monte Carlo counts.

S states, each with k successes in n rollouts; the mean outcome k/n is the target. Means over states are weighted by
their rollouts, so that every rollout counts the same.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


# Reference values of siblings that differ by less are not told apart by the few rollouts that a state usually has.
TOLD_APART = 0.3
_EPSILON = 1e-7  # as in most cross-entropies: a value of exactly 0 or 1 must not make the mean infinite


def critic_metrics(
    values: Sequence[float] | np.ndarray,
    successes: Sequence[float] | np.ndarray,
    rollouts: Sequence[float] | np.ndarray,
) -> dict[str, float]:
    """
    How well values predict outcomes, against the best constant.

    Args:
        values (sequence of `float`, length S):
            Predicted values, in [0, 1].
        successes (sequence of `float`, length S):
            Rollouts of each state that ended correct.
        rollouts (sequence of `float`, length S):
            Rollouts of each state, positive.

    Returns:
        `dict[str, float]`:

        - `bce`: binary cross-entropy of the outcomes, nats;
        - `bce_constant`: that of the best constant, the mean outcome;
        - `skill`: 1 - bce / bce_constant; 0 is no better than the constant, below 0 is worse;
        - `brier`: mean squared error against single outcomes;
        - `calibration_error`: expected calibration error over ten bins.

    Raises:
        ValueError: if lengths differ, there is no state, or a number is out of range.

    Example:

    ```python
    >>> from dapo_trl.diagnostics import critic_metrics

    >>> metrics = critic_metrics([0.9, 0.1], successes=[9, 1], rollouts=[10, 10])
    >>> {name: round(value, 3) for name, value in metrics.items()}
    {'bce': 0.325, 'bce_constant': 0.693, 'skill': 0.531, 'brier': 0.09, 'calibration_error': 0.0}

    ```
    """
    v_S, k_S, n_S = (np.asarray(x, dtype=np.float64) for x in (values, successes, rollouts))
    _check_states(v_S, k_S, n_S)
    target_S, mean = k_S / n_S, k_S.sum() / n_S.sum()
    bce = binary_cross_entropy(v_S, target_S, n_S)
    # Where all outcomes are alike, a constant knows them all: there is nothing to be skilled at.
    bce_constant = binary_cross_entropy(np.full_like(v_S, mean), target_S, n_S) if 0 < mean < 1 else 0.0
    brier_S = v_S**2 - 2 * v_S * target_S + target_S  # mean of (v - outcome)^2 over the outcomes of a state
    return {
        "bce": bce,
        "bce_constant": bce_constant,
        "skill": 1 - bce / bce_constant if bce_constant > 0 else 0.0,
        "brier": float(np.average(brier_S, weights=n_S)),
        "calibration_error": expected_calibration_error(v_S, target_S, n_S),
    }


def binary_cross_entropy(values: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    r"""
    Weighted mean of $-t \log v - (1 - t) \log (1 - v)$, in nats.

    Args:
        values (`np.ndarray` of shape `(S,)`):
            Predicted values; moved away from 0 and 1 by 1e-7.
        targets (`np.ndarray` of shape `(S,)`):
            Mean outcomes, in [0, 1].
        weights (`np.ndarray` of shape `(S,)`):
            Weights of the states.

    Returns:
        `float`. For a constant equal to the weighted mean target it is the entropy of that mean.
    """
    v_S = np.clip(values, _EPSILON, 1 - _EPSILON)
    losses = -targets * np.log(v_S) - (1 - targets) * np.log1p(-v_S)
    return float(np.average(losses, weights=weights))


def expected_calibration_error(
    values: np.ndarray, targets: np.ndarray, weights: np.ndarray, num_bins: int = 10
) -> float:
    """
    Mean distance between predicted value and mean outcome, over bins of equal width (Guo et al. 2017).

    Args:
        values (`np.ndarray` of shape `(S,)`):
            Predicted values, in [0, 1].
        targets (`np.ndarray` of shape `(S,)`):
            Mean outcomes, in [0, 1].
        weights (`np.ndarray` of shape `(S,)`):
            Weights of the states.
        num_bins (`int`, *optional*, defaults to `10`):
            Number of bins.

    Returns:
        `float` in [0, 1]; 0 is perfectly calibrated.
    """
    bins = np.minimum((np.asarray(values) * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, weights=weights * (np.asarray(values) - targets), minlength=num_bins)
    return float(np.abs(gaps).sum() / np.sum(weights))


def sibling_ranking(
    predicted: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], min_difference: float = 0.0
) -> tuple[float, int]:
    """
    How often the critic orders two candidate steps of one state as the reference values do.

    Args:
        predicted (sequence over states of sequences of `float`):
            Predicted values of the candidates.
        reference (sequence over states of sequences of `float`):
            Reference values of the same candidates, such as Monte Carlo values from many rollouts. Pairs that they do
            not tell apart are left out; a tie of the predictions counts one half.
        min_difference (`float`, *optional*, defaults to `0.0`):
            Leave out pairs whose reference values differ by less. Reference values from few rollouts order close pairs
            by chance, which no prediction could match.

    Returns:
        `tuple[float, int]`: the share of pairs ordered alike (0.5 is chance; NaN without any pair), and how many pairs.

    Raises:
        ValueError: if the two do not have the same candidates.

    Example:

    ```python
    >>> from dapo_trl.diagnostics import sibling_ranking

    >>> sibling_ranking([[0.8, 0.3, 0.5]], [[1.0, 0.0, 0.0]])
    (1.0, 2)

    ```
    """
    agreements = []
    for index, (p_C, r_C) in enumerate(zip(predicted, reference, strict=True)):
        if len(p_C) != len(r_C):
            raise ValueError(f"State {index} has {len(p_C)} predicted and {len(r_C)} reference values.")
        first, second = np.triu_indices(len(p_C), k=1)
        p, r = np.asarray(p_C, dtype=np.float64), np.asarray(r_C, dtype=np.float64)
        difference, given = r[first] - r[second], np.sign(p[first] - p[second])
        told_apart = (difference != 0) & (np.abs(difference) >= min_difference)
        agreements.append((0.5 + 0.5 * np.sign(difference) * given)[told_apart])
    pairs: Any = np.concatenate(agreements) if agreements else np.empty(0)
    return (float(pairs.mean()) if pairs.size else float("nan")), int(pairs.size)


def rank_correlation(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> float:
    """
    Spearman's rank correlation, where each state counts as often as its weight says; ties share their mean rank.

    Args:
        first (`np.ndarray` of shape `(S,)`):
            Numbers, such as values.
        second (`np.ndarray` of shape `(S,)`):
            Others, such as mean outcomes.
        weights (`np.ndarray` of shape `(S,)`):
            Weights of the states.

    Returns:
        `float` in [-1, 1]; NaN if one of the two is constant.
    """
    ranks = [_ranks(values, weights) for values in (first, second)]
    centred = [rank - np.average(rank, weights=weights) for rank in ranks]
    scale = np.sqrt(np.prod([np.average(rank**2, weights=weights) for rank in centred]))
    return float(np.average(centred[0] * centred[1], weights=weights) / scale) if scale > 0 else float("nan")


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    _, places = np.unique(values, return_inverse=True)
    totals = np.bincount(places, weights)
    return (np.cumsum(totals) - totals / 2)[places]


def _check_states(v_S: np.ndarray, k_S: np.ndarray, n_S: np.ndarray) -> None:
    """Refuse numbers that are no values and no counts, naming the first state that has them."""
    if not v_S.shape == k_S.shape == n_S.shape:
        raise ValueError(f"Lengths differ: {len(v_S)} values, {len(k_S)} successes, {len(n_S)} rollouts.")
    if v_S.size == 0:
        raise ValueError("There is no state to judge the critic on.")
    for problem, is_bad in (
        ("have no value in [0, 1]", ~((v_S >= 0) & (v_S <= 1))),
        ("have no rollout", ~(n_S > 0)),
        ("do not have from 0 to all of their rollouts as successes", ~((k_S >= 0) & (k_S <= n_S))),
    ):
        if is_bad.any():
            first = int(np.argmax(is_bad))
            raise ValueError(
                f"{is_bad.sum()} states {problem}; state {first} is the first, with value {v_S[first]:g}, "
                f"{k_S[first]:g} successes and {n_S[first]:g} rollouts. Every state needs at least one rollout."
            )
