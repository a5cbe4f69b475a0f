"""
Whether a critic tells the next steps of a state apart as the outcomes of completions do: what advantages are made of.

Of each state there are C candidates, with mean outcomes t, n rollouts each, and the critic's values v. P problems.
The sums are unbiased also where a candidate has a single rollout, so that they use all candidates; ordering pairs of
such candidates would be chance.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from dapo_trl.diagnostics import TOLD_APART


_CLEAR = 2.0  # standard errors
_TIED = 1e-6  # advantages that are this small are what is left of equal values after rounding
_EDGES = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)

DIFFERENCES = {f"{low:g}-{high:g}": (low, high) for low, high in pairwise(_EDGES)}


class SiblingAgreement:
    """
    Pairs of siblings, and advantages of candidates, of which weights of problems make measures.

    Args:
        problems (sequence of `int`):
            Number of the problem of each state row, from 0 to P - 1.
        states (sequence of `dict`):
            State rows with `counts`, `mc_successes`, `mc_rollouts` and `critic_values`. Candidates whose reward is
            known, in a column `rewards`, are left out: their advantages need no critic.
        least (`int`):
            Candidates with fewer rollouts are left out where pairs or signs are counted.
        num_problems (`int`):
            P.

    Attributes:
        num_pairs (`dict[str, int]`):
            Pairs of siblings: `sibling_ranking`, whose mean outcomes are 0.3 apart, `clear_ranking`, which are more
            than two standard errors apart, and those that are as far apart as each of `DIFFERENCES` says.
        num_compared (`int`):
            Problems with candidates whose outcomes differ.
    """

    def __init__(
        self, problems: Sequence[int], states: Sequence[Mapping[str, Any]], least: int, num_problems: int
    ) -> None:
        known = [_known(problem, row) for problem, row in zip(problems, states, strict=True)]
        often = [_chosen(each, each.n_C >= least) for each in known]
        pairs = np.concatenate([np.empty((0, 4)), *map(_pairs, often)])
        signs = np.concatenate([np.empty((0, 2)), *map(_signs, often)])
        sums = np.concatenate([np.empty((0, 4)), *map(_sums, known)])
        apart = pairs[:, 2] + 1e-9  # 0.7 - 0.4 is a little less than 0.3
        kinds = {"sibling_ranking": apart >= TOLD_APART, "clear_ranking": pairs[:, 3] > _CLEAR}
        kinds |= {name: (apart >= low) & (apart < high + (high == 1)) for name, (low, high) in DIFFERENCES.items()}
        self.num_pairs = {name: int(chosen.sum()) for name, chosen in kinds.items()}
        self._means = {name: _totals(pairs[chosen], num_problems) for name, chosen in kinds.items()}
        self._means["sign_accuracy"] = _totals(signs, num_problems)
        self._sums = np.stack([np.bincount(sums[:, 0].astype(int), part, num_problems) for part in sums.T[1:]])
        self.num_compared = int((self._sums[1] > 0).sum())

    def measure(self, weights_P: np.ndarray) -> dict[str, float]:
        """
        What is measured, where each problem counts as often as its weight says.

        Args:
            weights_P (`np.ndarray` of shape `(P,)`):
                Weights of the problems.

        Returns:
            `dict[str, float]`: `advantage_correlation`, `sibling_ranking`, `clear_ranking` and `sign_accuracy`, see
            [`~dapo_trl.diagnosis.Diagnosis`], and the ranking for each of `DIFFERENCES`; NaN for what cannot be
            measured.
        """
        found = {"advantage_correlation": self._correlation(weights_P)}
        for name, totals in self._means.items():
            right, number = totals @ weights_P
            found[name] = float(right / number) if number > 0 else float("nan")
        return found

    def _correlation(self, weights_P: np.ndarray) -> float:
        """Of the advantages within states; a critic to which all next steps are alike has none, which is 0."""
        both, outcomes, values = self._sums @ weights_P
        if outcomes <= 0:
            return float("nan")
        return float(both / np.sqrt(outcomes * values)) if values > 0 else 0.0


class _Candidates(NamedTuple):
    """Those of one state that the critic is asked about."""

    problem: int
    t_C: np.ndarray
    n_C: np.ndarray
    v_C: np.ndarray
    counts_C: np.ndarray


def _known(problem: int, row: Mapping[str, Any]) -> _Candidates:
    columns = (row[name] for name in ("mc_successes", "mc_rollouts", "critic_values", "counts"))
    k_C, n_C, v_C, counts_C = (np.asarray(column, dtype=np.float64) for column in columns)
    rewards = row.get("rewards") or [None] * len(k_C)
    asked = np.array([reward is None for reward in rewards], dtype=bool) & (n_C > 0)
    return _chosen(_Candidates(problem, k_C / np.maximum(n_C, 1), n_C, v_C, counts_C), asked)


def _chosen(state: _Candidates, chosen_C: np.ndarray) -> _Candidates:
    return _Candidates(state.problem, *(part[chosen_C] for part in state[1:]))


def _advantages(state: _Candidates, weights_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of the outcomes, and those of the critic."""
    a_t, a_v = (x - np.average(x, weights=weights_C) for x in (state.t_C, state.v_C))
    a_v[np.abs(a_v) < _TIED] = 0.0
    return a_t, a_v


def _pairs(state: _Candidates) -> np.ndarray:
    """Problem, whether both are ordered alike, difference, and difference in standard errors, of pairs that differ."""
    first, second = np.triu_indices(len(state.t_C), k=1)
    difference, given = state.t_C[first] - state.t_C[second], state.v_C[first] - state.v_C[second]
    mean_C = (state.t_C * state.n_C + 1) / (state.n_C + 2)  # of one outcome, too, nobody knows the value for sure
    variance_C = mean_C * (1 - mean_C) / (state.n_C + 3)
    clear = np.abs(difference) / np.sqrt(variance_C[first] + variance_C[second])
    agreement = 0.5 + 0.5 * np.sign(difference) * np.sign(given)
    columns = (np.full(len(first), state.problem), agreement, np.abs(difference), clear)
    return np.stack(columns, axis=1)[difference != 0]


def _signs(state: _Candidates) -> np.ndarray:
    """Problem, and whether both advantages have one sign, where that of the outcomes is far enough from 0."""
    if len(state.t_C) < 2:
        return np.empty((0, 2))
    a_t, a_v = _advantages(state, state.counts_C)
    agreement = 0.5 + 0.5 * np.sign(a_t) * np.sign(a_v)
    return np.stack((np.full(len(a_t), state.problem), agreement), axis=1)[np.abs(a_t) >= TOLD_APART / 2]


def _sums(state: _Candidates) -> np.ndarray:
    """
    Problem, and the sums over candidates of n a_t a_v, n a_t² and n a_v², for advantages a of outcomes and values.

    The noise of the outcomes is independent of the critic, which has not seen them: the first sum is unbiased,
    however few rollouts there are.
    """
    if len(state.t_C) < 2:
        return np.empty((0, 4))
    a_t, a_v = _advantages(state, state.n_C)
    return np.array([[state.problem, state.n_C @ (a_t * a_v), state.n_C @ a_t**2, state.n_C @ a_v**2]])


def _totals(rows: np.ndarray, num_problems: int) -> np.ndarray:
    """Sum and number of agreements, of each problem."""
    problems = rows[:, 0].astype(int)
    return np.stack([np.bincount(problems, part, num_problems) for part in (rows[:, 1], np.ones(len(rows)))])
