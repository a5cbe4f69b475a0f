"""
Is the critic any good? Its skill on problems that it was not trained on, with 95% intervals by bootstrap over problems,
and a verdict in words.

States of a problem are alike, so that problems are drawn anew, never states. S states, P problems, Q pairs of siblings.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dapo_trl.diagnostics import TOLD_APART, binary_cross_entropy, expected_calibration_error
from dapo_trl.intervals import Estimate


# Distances from the end, in steps, that are told apart; the last one and all beyond are one.
_DISTANCES = (1, 2, 3, 4, 6, 8, 12, 16)
_CHANCE = 0.5

MIN_SKILL = 0.05  # of a critic that is of use, see docs/metrics.md


@dataclass(frozen=True)
class Diagnosis:
    """
    What a critic knows about states of problems that it was not trained on.

    Attributes:
        num_problems (`int`), num_states (`int`), num_rollouts (`int`):
            What it was measured on: different states, without those that end a solution.
        measures (`dict[str, Estimate]`):
            With 95% intervals; what cannot be measured is not there.

            - `skill`: 1 - BCE / BCE of the best constant;
            - `depth_skill`: the same against the best constant of each number of steps taken;
            - `brier_skill`: 1 - Brier score / that of the best constant;
            - `calibration_error`: expected calibration error over ten bins;
            - `rank_correlation`: Spearman's, with the mean outcomes;
            - `sibling_ranking`: share of pairs of next steps that it orders as the mean outcomes do;
            - `sign_accuracy`: share of next steps whose advantage has the sign that the mean outcomes give it;
            - `terminal_bias`: mean value minus reward of finished solutions.
        skill_by_distance (`dict[str, Estimate]`):
            Skill among the states that are so many steps from the end of their solution, as `"1"` or `"4-5"`.
        num_pairs (`int`):
            Pairs of siblings that the mean outcomes tell apart.
    """

    num_problems: int
    num_states: int
    num_rollouts: int
    num_pairs: int
    measures: dict[str, Estimate]
    skill_by_distance: dict[str, Estimate]

    @property
    def is_fit(self) -> bool:
        """Whether there is skill, and siblings are not ordered worse than by chance."""
        ranking = self.measures.get("sibling_ranking")
        return self.measures["skill"].mean > MIN_SKILL and (ranking is None or ranking.high > _CHANCE)

    @property
    def verdict(self) -> str:
        """What that means, in words."""
        skill, ranking = self.measures["skill"], self.measures.get("sibling_ranking")
        if skill.high < 0:
            text = "The critic is worse than saying the same of every state: do not use it."
        elif not self.is_fit:
            text = "The critic knows next to nothing about problems that it has not seen: do not use it."
            if skill.high > 2 * MIN_SKILL:
                text += f" (Of {self.num_problems} problems, that is not certain.)"
        elif skill.low <= 0:
            text = f"The critic seems to know something, but {self.num_problems} problems are too few to be sure."
        elif self.measures["depth_skill"].mean <= MIN_SKILL / 2:
            text = "The critic knows how far along a solution is, and little more."
        else:
            text = "The critic knows something about problems that it has not seen."
        if ranking is not None and ranking.low <= _CHANCE <= ranking.high:
            text += " Whether it tells next steps apart, which is what advantages are made of, cannot be said."
        if (error := self.measures["calibration_error"].mean) > 2 * abs(skill.mean) and error > 0.1:
            text += " Its values are far off on average; their order may still be right."
        return text


def diagnose(
    solutions: Iterable[Mapping[str, Any]],
    states: Iterable[Mapping[str, Any]] = (),
    min_rollouts: int = 4,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Diagnosis:
    """
    Measure a critic on scored rows of problems that it was not trained on.

    Args:
        solutions (iterable of `dict`):
            Solution rows with `problem_id`, `completions`, `reward`, `mc_successes`, `mc_rollouts` and `critic_values`.
            A state that several of them share counts once.
        states (iterable of `dict`, *optional*):
            State rows with `problem_id`, `counts`, `mc_successes`, `mc_rollouts` and `critic_values`, for what is said
            of siblings.
        min_rollouts (`int`, *optional*, defaults to `4`):
            Siblings with fewer are left out: they would be ordered by chance.
        num_resamples (`int`, *optional*, defaults to `1000`):
            Bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        [`Diagnosis`].

    Raises:
        ValueError: if a column is missing, or there are fewer than two problems with states.

    Example:

    ```python
    >>> from dapo_trl.diagnosis import diagnose

    >>> right = {"completions": ["a"], "reward": 1.0, "mc_successes": [4.0, 1.0], "mc_rollouts": [4, 1]}
    >>> wrong = {"completions": ["b"], "reward": 0.0, "mc_successes": [0.0, 0.0], "mc_rollouts": [4, 1]}
    >>> rows = [right | {"problem_id": "1", "critic_values": [0.9, 0.9]}]
    >>> rows += [wrong | {"problem_id": "2", "critic_values": [0.2, 0.1]}]
    >>> round(diagnose(rows, num_resamples=10).measures["skill"].mean, 2)
    0.76

    ```
    """
    sample = _Sample(list(solutions), list(states), min_rollouts)
    point = sample.measure(np.ones(sample.num_problems))
    rng = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {name: [] for name in point}
    for _ in range(num_resamples):
        weights = rng.multinomial(sample.num_problems, np.full(sample.num_problems, 1 / sample.num_problems))
        for name, value in sample.measure(weights.astype(np.float64)).items():
            draws[name].append(value)
    estimates = {name: _estimate(value, draws[name]) for name, value in point.items() if np.isfinite(value)}
    by_distance = {name.removeprefix("distance "): estimates.pop(name) for name in list(estimates) if " " in name}
    return Diagnosis(
        num_problems=sample.num_problems,
        num_states=len(sample.values),
        num_rollouts=int(sample.rollouts.sum()),
        num_pairs=len(sample.pairs),
        measures=estimates,
        skill_by_distance=by_distance,
    )


class _Sample:
    """States and siblings as arrays, of which weights of problems make measures."""

    def __init__(self, solutions: Sequence[Mapping[str, Any]], states: Sequence[Mapping[str, Any]], least: int) -> None:
        problems: dict[str, int] = {}
        different: dict[tuple[str, ...], list[float]] = {}
        ends: list[list[float]] = []
        for number, row in enumerate(solutions):
            problem = _problem(row, number, problems, ("completions", "reward"))
            steps = row["completions"]
            for depth, cells in enumerate(zip(*(row[name] for name in _COUNTED), strict=True)):
                if depth == len(steps):
                    ends.append([problem, cells[2] - row["reward"]])
                elif cells[1] > 0:
                    state = (row["problem_id"], *steps[:depth])
                    different.setdefault(state, [problem, *cells, depth, len(steps) - depth])
        self.num_problems = len(problems)
        if len({int(state[0]) for state in different.values()}) < 2:
            raise ValueError(
                "A critic is measured on states of at least two problems that it was not trained on; there are "
                f"{len(different)} states of {self.num_problems} problems. Sample more problems."
            )
        table = np.array(list(different.values()), dtype=np.float64)
        self.problems = table[:, 0].astype(int)
        successes, self.rollouts, self.values = table[:, 1], table[:, 2], table[:, 3]
        self.targets = successes / self.rollouts
        self.depths, distances = table[:, 4].astype(int), table[:, 5].astype(int)
        self.bins = np.searchsorted(_DISTANCES, distances, side="right") - 1
        self.ends = np.array(ends).reshape(-1, 2)
        siblings = [
            (_problem(row, number, problems, ("counts",), is_new=False), *_siblings(row, least))
            for number, row in enumerate(states)
        ]
        self.pairs = _flat((problem, agreement) for problem, pairs, _ in siblings for agreement in pairs)
        self.signs = _flat((problem, agreement) for problem, _, signs in siblings for agreement in signs)

    def measure(self, weights_P: np.ndarray) -> dict[str, float]:
        """All measures, where each problem counts as often as its weight says; NaN for what cannot be measured."""
        w_S = self.rollouts * weights_P[self.problems]
        mean = np.average(self.targets, weights=w_S)
        by_depth = np.bincount(self.depths, w_S * self.targets) / np.maximum(np.bincount(self.depths, w_S), 1e-12)
        spread = self.targets * (1 - self.targets)
        brier = np.average((self.values - self.targets) ** 2 + spread, weights=w_S)
        found = {
            "skill": self._skill(w_S, np.full_like(self.values, mean)),
            "depth_skill": self._skill(w_S, by_depth[self.depths]),
            "brier_skill": _share_saved(brier, mean * (1 - mean)),
            "calibration_error": expected_calibration_error(self.values, self.targets, w_S),
            "rank_correlation": _rank_correlation(self.values, self.targets, weights_P[self.problems]),
            "sibling_ranking": _mean(self.pairs, weights_P),
            "sign_accuracy": _mean(self.signs, weights_P),
            "terminal_bias": _mean(self.ends, weights_P),
        }
        for number in np.unique(self.bins):
            found[f"distance {_name_of_bin(number)}"] = self._skill_within(self.bins == number, w_S)
        return found

    def _skill(self, w_S: np.ndarray, constant_S: np.ndarray) -> float:
        constant = binary_cross_entropy(constant_S, self.targets, w_S)
        return _share_saved(binary_cross_entropy(self.values, self.targets, w_S), constant)

    def _skill_within(self, is_within: np.ndarray, w_S: np.ndarray) -> float:
        w, v, t = w_S[is_within], self.values[is_within], self.targets[is_within]
        if w.sum() == 0:
            return float("nan")
        constant = binary_cross_entropy(np.full_like(v, np.average(t, weights=w)), t, w)
        return _share_saved(binary_cross_entropy(v, t, w), constant)


_COUNTED = ("mc_successes", "mc_rollouts", "critic_values")


def _problem(
    row: Mapping[str, Any], number: int, problems: dict[str, int], columns: tuple[str, ...], is_new: bool = True
) -> int:
    """Number of a row's problem; refuses a row that lacks something."""
    if missing := [name for name in ("problem_id", *_COUNTED, *columns) if row.get(name) is None]:
        raise ValueError(
            f"Row {number} has no {', '.join(map(repr, missing))}. The rows are those that sampling wrote and "
            "`StepCriticTrainer.predict_values` valued, such as `data/solutions_critic.parquet` of a run."
        )
    if not is_new and row["problem_id"] not in problems:
        raise ValueError(f"State row {number} is of problem {row['problem_id']!r}, of which there is no solution row.")
    return problems.setdefault(row["problem_id"], len(problems))


def _siblings(row: Mapping[str, Any], least: int) -> tuple[list[float], list[float]]:
    """Of the pairs of candidates, and of the candidates, whether the critic agrees with their mean outcomes."""
    k, n, v, counts = (np.asarray(row[name], dtype=np.float64) for name in (*_COUNTED, "counts"))
    known = n >= least
    if known.sum() < 2:
        return [], []
    t, v, counts = k[known] / n[known], v[known], counts[known]
    first, second = np.triu_indices(len(t), k=1)
    difference, given = t[first] - t[second], v[first] - v[second]
    agreements = 0.5 + 0.5 * np.sign(difference) * np.sign(given)
    a_t, a_v = (x - np.average(x, weights=counts) for x in (t, v))
    signs = 0.5 + 0.5 * np.sign(a_t) * np.sign(a_v)
    return (
        agreements[np.abs(difference) >= TOLD_APART].tolist(),
        signs[np.abs(a_t) >= TOLD_APART / 2].tolist(),
    )


def _flat(rows: Iterable[tuple[int, float]]) -> np.ndarray:
    return np.array(list(rows), dtype=np.float64).reshape(-1, 2)


def _mean(rows: np.ndarray, weights_P: np.ndarray) -> float:
    weights = weights_P[rows[:, 0].astype(int)]
    return float(np.average(rows[:, 1], weights=weights)) if weights.sum() > 0 else float("nan")


def _share_saved(loss: float, constant: float) -> float:
    """Where all outcomes are alike, a constant knows them all: there is nothing to be skilled at."""
    return float(1 - loss / constant) if constant > 1e-6 else float("nan")


def _rank_correlation(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> float:
    """Spearman's, where each state counts as often as its weight says; ties share their mean rank."""
    ranks = [_ranks(values, weights) for values in (first, second)]
    centred = [rank - np.average(rank, weights=weights) for rank in ranks]
    scale = np.sqrt(np.prod([np.average(rank**2, weights=weights) for rank in centred]))
    return float(np.average(centred[0] * centred[1], weights=weights) / scale) if scale > 0 else float("nan")


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    _, places = np.unique(values, return_inverse=True)
    totals = np.bincount(places, weights)
    return (np.cumsum(totals) - totals / 2)[places]


def _name_of_bin(number: int) -> str:
    low = _DISTANCES[number]
    if number + 1 == len(_DISTANCES):
        return f"{low} and more"
    high = _DISTANCES[number + 1] - 1
    return str(low) if low == high else f"{low}-{high}"


def _estimate(value: float, draws: Sequence[float]) -> Estimate:
    finite = [draw for draw in draws if np.isfinite(draw)]
    low, high = np.quantile(finite, [0.025, 0.975]) if finite else (value, value)
    return Estimate(float(value), float(low), float(high))
