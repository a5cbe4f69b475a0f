"""
Is the critic any good? Its skill on problems that it was not trained on, with 95% intervals by bootstrap over problems,
and a verdict in words.

States of a problem are alike, so that problems are drawn anew, never states. S states, P problems, Q pairs of siblings.

A critic is fit to train on if its skill is above 5% (`MIN_SKILL`), its advantages go with those of the outcomes, and
its values are not more than 0.1 (`MAX_CALIBRATION_ERROR`) off on average. Skill alone is not enough: most of it may
come from telling easy problems from hard ones, which cancels out between the next steps of one state. See
`docs/metrics.md`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dapo_trl.diagnostics import binary_cross_entropy, expected_calibration_error, rank_correlation
from dapo_trl.intervals import Estimate
from dapo_trl.sibling_agreement import DIFFERENCES, SiblingAgreement


# Distances from the end, in steps, that are told apart; the last one and all beyond are one.
_DISTANCES = (1, 2, 3, 4, 6, 8, 12, 16)
_CHANCE = 0.5
_NUM_BINS = 10  # of values, for their calibration


class TooFewProblemsError(ValueError):
    """There are not two problems that a critic could be measured on."""


MIN_SKILL = 0.05  # of a critic that is of use, see docs/metrics.md
MAX_CALIBRATION_ERROR = 0.1  # as large as the smallest gap of advantages that the paper trains on
ENOUGH_PROBLEMS = 10  # to ask for an interval without 0: of fewer, bootstrap intervals cannot be relied on


@dataclass(frozen=True)
class CalibrationBin:
    """
    States to which the critic gives about the same value.

    Attributes:
        value (`float`):
            Mean value by the critic, weighted by rollouts.
        outcome ([`~dapo_trl.intervals.Estimate`]):
            Mean outcome, with its 95% interval. Of a calibrated critic it is the value.
        num_problems (`int`), num_states (`int`):
            How many. Of few problems, the interval says nothing.
    """

    value: float
    outcome: Estimate
    num_problems: int
    num_states: int


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
            - `depth_brier_skill`: the same against the best constant of each number of steps taken;
            - `calibration_error`: expected calibration error over ten bins, less what the noise of the outcomes adds;
            - `rank_correlation`: Spearman's, with the mean outcomes;
            - `advantage_correlation`: correlation of the critic's advantages of next steps with those of the mean
              outcomes, weighted by rollouts; 0 is chance, and the noise of the outcomes keeps it below 1;
            - `sibling_ranking`: share of pairs of next steps that it orders as the mean outcomes do, where these are
              0.3 apart or more;
            - `clear_ranking`: the same where they are more than two of their standard errors apart;
            - `sign_accuracy`: share of next steps whose advantage has the sign that the mean outcomes give it;
            - `terminal_bias`: mean value minus reward of finished solutions.
        skill_by_distance (`dict[str, Estimate]`):
            Skill among the states that are so many steps from the end of their solution, as `"1"` or `"4-5"`.
        num_pairs (`int`), num_clear_pairs (`int`):
            Pairs of siblings behind `sibling_ranking` and `clear_ranking`.
        num_sibling_problems (`int`):
            Problems with siblings that could be compared.
        ranking_by_difference (`dict[str, Estimate]`), pairs_by_difference (`dict[str, int]`):
            Share of pairs that it orders right by how far apart their mean outcomes are, as `"0.3-0.5"`, and how many
            pairs these are. Of few rollouts, small differences are noise.
        calibration (`list[CalibrationBin]`):
            Mean outcomes by value, in ten bins with about as many states each.
    """

    num_problems: int
    num_states: int
    num_rollouts: int
    num_pairs: int
    num_clear_pairs: int
    num_sibling_problems: int
    measures: dict[str, Estimate]
    skill_by_distance: dict[str, Estimate]
    ranking_by_difference: dict[str, Estimate]
    pairs_by_difference: dict[str, int]
    calibration: list[CalibrationBin]

    @property
    def is_fit(self) -> bool:
        """
        Whether a policy should be trained on its values: there is skill, it tells next steps apart, and the values are
        about as large as the outcomes.

        All outcomes alike, there is nothing to be skilled at, and nothing to learn.
        """
        return self.has_skill and self.tells_apart and not self.is_far_off

    @property
    def has_skill(self) -> bool:
        """Whether its skill is above 5%."""
        return "skill" in self.measures and self.measures["skill"].mean > MIN_SKILL

    @property
    def tells_apart(self) -> bool:
        """
        Whether its advantages go with those of the outcomes, beyond doubt where there are problems enough to say so.

        Where there are no siblings, it must know more than how far along a solution is.
        """
        found = self.measures.get("advantage_correlation")
        if found is None:
            return "depth_skill" in self.measures and self.measures["depth_skill"].mean > MIN_SKILL
        return (found.low if self.num_sibling_problems >= ENOUGH_PROBLEMS else found.mean) > 0

    @property
    def is_far_off(self) -> bool:
        """Whether its values are more than 0.1 off on average, beyond doubt; of few problems that cannot be said."""
        if self.num_problems < ENOUGH_PROBLEMS:
            return False
        return self.measures["calibration_error"].low > MAX_CALIBRATION_ERROR

    @property
    def verdict(self) -> str:
        """What that means, in words."""
        if "skill" not in self.measures:
            return "All outcomes are alike: there is nothing that a critic could know. Do not use it."
        skill = self.measures["skill"]
        text = self._praise(skill) if self.is_fit else self._refusal(skill)
        if self.is_far_off:
            text += f" Its values are more than {MAX_CALIBRATION_ERROR:g} off on average"
            is_sure = self.tells_apart and self.num_sibling_problems >= ENOUGH_PROBLEMS
            text += ", though they order next steps better than chance." if is_sure else "."
        return text

    def _refusal(self, skill: Estimate) -> str:
        if skill.high < 0:
            return "The critic is worse than saying the same of every state: do not use it."
        if self.has_skill and self.tells_apart:
            return "The critic tells states apart, but its values are no probabilities of success: do not use it."
        if self.has_skill and "advantage_correlation" not in self.measures:
            return "The critic knows how far along a solution is, and little more: do not use it."
        if self.has_skill:
            return (
                "The critic knows something about problems that it has not seen, but does not tell the next steps of a "
                "state apart, which is what advantages are made of: do not use it."
            )
        text = "The critic knows next to nothing about problems that it has not seen: do not use it."
        if skill.high > 2 * MIN_SKILL:
            text += f" (Of {self.num_problems} problems, that is not certain.)"
        return text

    def _praise(self, skill: Estimate) -> str:
        if skill.low <= 0 or self.num_problems < ENOUGH_PROBLEMS:
            text = f"The critic seems to know something, but {self.num_problems} problems are too few to be sure."
        else:
            text = "The critic knows something about problems that it has not seen."
        if (found := self.measures.get("advantage_correlation")) is None or found.low <= 0:
            text += " Whether it tells next steps apart, which is what advantages are made of, cannot be said."
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
            of siblings. Candidates whose reward is known, in a column `rewards`, are left out: their advantages need no
            critic.
        min_rollouts (`int`, *optional*, defaults to `4`):
            Siblings with fewer are left out where pairs or signs are counted: these would be chance.
        num_resamples (`int`, *optional*, defaults to `1000`):
            Bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        [`Diagnosis`].

    Raises:
        TooFewProblemsError: if there are fewer than two problems with states.
        ValueError: if a column is missing.

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
    draws: dict[tuple[str, str], list[float]] = {key: [] for key in point}
    for _ in range(num_resamples):
        weights = rng.multinomial(sample.num_problems, np.full(sample.num_problems, 1 / sample.num_problems))
        for key, value in sample.measure(weights.astype(np.float64)).items():
            draws[key].append(value)
    groups: dict[str, dict[str, Estimate]] = {"": {}, "distance": {}, "difference": {}, "bin": {}}
    for key, value in point.items():
        if np.isfinite(value):
            grows_with_noise = key == ("", "calibration_error")
            make = Estimate.from_biased_draws if grows_with_noise else Estimate.from_draws
            groups[key[0]][key[1]] = make(value, draws[key])
    siblings = sample.siblings
    return Diagnosis(
        num_problems=sample.num_problems,
        num_states=len(sample.values),
        num_rollouts=int(sample.rollouts.sum()),
        num_pairs=siblings.num_pairs["sibling_ranking"],
        num_clear_pairs=siblings.num_pairs["clear_ranking"],
        num_sibling_problems=siblings.num_compared,
        measures=groups[""],
        skill_by_distance=groups["distance"],
        ranking_by_difference=groups["difference"],
        pairs_by_difference={name: siblings.num_pairs[name] for name in groups["difference"]},
        calibration=[sample.bin(int(name), estimate) for name, estimate in groups["bin"].items()],
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
            raise TooFewProblemsError(
                "A critic is measured on states of at least two problems that it was not trained on; there are "
                f"{len(different)} states of {self.num_problems} problems. Sample more problems."
            )
        table = np.array(list(different.values()), dtype=np.float64)
        self.problems = table[:, 0].astype(int)
        successes, self.rollouts, self.values = table[:, 1], table[:, 2], table[:, 3]
        self.targets = successes / self.rollouts
        self.depths, distances = table[:, 4].astype(int), table[:, 5].astype(int)
        self.distances = np.searchsorted(_DISTANCES, distances, side="right") - 1
        edges = np.quantile(self.values, np.arange(1, _NUM_BINS) / _NUM_BINS)
        self.bins = np.searchsorted(np.unique(edges), self.values, side="right")
        self.ends = np.array(ends).reshape(-1, 2)
        numbers = [_problem(row, number, problems, ("counts",), is_new=False) for number, row in enumerate(states)]
        self.siblings = SiblingAgreement(numbers, states, least, self.num_problems)

    def bin(self, number: int, outcome: Estimate) -> CalibrationBin:
        """What is said of the states of a bin of values."""
        within = self.bins == number
        value = float(np.average(self.values[within], weights=self.rollouts[within]))
        return CalibrationBin(value, outcome, len(set(self.problems[within])), int(within.sum()))

    def measure(self, weights_P: np.ndarray) -> dict[tuple[str, str], float]:
        """
        All measures by group and name, where each problem counts as often as its weight says; NaN for what cannot be
        measured.
        """
        w_S = self.rollouts * weights_P[self.problems]
        mean = np.average(self.targets, weights=w_S)
        by_depth = np.bincount(self.depths, w_S * self.targets) / np.maximum(np.bincount(self.depths, w_S), 1e-12)
        spread = self.targets * (1 - self.targets)
        brier = np.average((self.values - self.targets) ** 2 + spread, weights=w_S)
        brier_by_depth = np.average((by_depth[self.depths] - self.targets) ** 2 + spread, weights=w_S)
        found = {
            "skill": self._skill(w_S, np.full_like(self.values, mean)),
            "depth_skill": self._skill(w_S, by_depth[self.depths]),
            "brier_skill": _share_saved(brier, mean * (1 - mean)),
            "depth_brier_skill": _share_saved(brier, brier_by_depth),
            "calibration_error": expected_calibration_error(self.values, self.targets, w_S),
            "rank_correlation": rank_correlation(self.values, self.targets, weights_P[self.problems]),
            "terminal_bias": _mean(self.ends, weights_P),
        }
        found |= self.siblings.measure(weights_P)
        measures = {("difference" if name in DIFFERENCES else "", name): value for name, value in found.items()}
        for number in np.unique(self.distances):
            within = self.distances == number
            measures["distance", _name_of_bin(number)] = self._skill_within(within, w_S)
        for number in np.unique(self.bins):
            measures["bin", str(number)] = _average(self.targets, w_S * (self.bins == number))
        return measures

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


def _mean(rows: np.ndarray, weights_P: np.ndarray) -> float:
    return _average(rows[:, 1], weights_P[rows[:, 0].astype(int)])


def _average(values: np.ndarray, weights: np.ndarray) -> float:
    return float(np.average(values, weights=weights)) if weights.sum() > 0 else float("nan")


def _share_saved(loss: float, constant: float) -> float:
    """Where all outcomes are alike, a constant knows them all: there is nothing to be skilled at."""
    return float(1 - loss / constant) if constant > 1e-6 else float("nan")


def _name_of_bin(number: int) -> str:
    low = _DISTANCES[number]
    if number + 1 == len(_DISTANCES):
        return f"{low} and more"
    high = _DISTANCES[number + 1] - 1
    return str(low) if low == high else f"{low}-{high}"
