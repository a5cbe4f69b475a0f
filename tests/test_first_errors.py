"""
`first_errors.py`: the first wrong step, by hand, against a search of all thresholds, and what is refused.
"""

import math
import random

import numpy as np
import pytest

import reference
from dapo_trl.first_errors import (
    RULES,
    evaluate_first_errors,
    fit_threshold,
    measure_first_errors,
    predict_first_error,
    step_scores,
)


def solution(values: list[float], first_error: int, **columns) -> dict:
    return {"critic_values": values, "first_error": first_error} | columns


def random_solutions(seed: int, number: int = 30, levels: int = 0) -> list[dict]:
    """Solutions of 1 to 6 steps; with few different values there are ties."""
    rng = random.Random(seed)
    rows = [solution([0.5, 0.5], -1), solution([0.5, 0.5], 0)]
    for _ in range(number):
        steps = rng.randint(1, 6)
        values = [rng.randrange(levels + 1) / levels if levels else rng.random() for _ in range(steps + 1)]
        rows.append(solution(values, rng.randint(-1, steps - 1)))
    return rows


class TestPrediction:
    def test_by_hand(self):
        """
        Values fall by 1/8 with the first step and by 1/2 with the third. At 3/8 they are below a half from then on, at
        7/8 and 3/4 before: by their value the first step below 0.8 is the first, below 0.5 the third.
        """
        values = [0.875, 0.75, 0.875, 0.375, 0.25]
        assert step_scores(values).tolist() == [-0.125, 0.125, -0.5, -0.125]
        assert step_scores(values, "value").tolist() == values[1:]
        assert [predict_first_error(values, threshold) for threshold in (-0.1, -0.3, -0.5)] == [0, 2, -1]
        assert [predict_first_error(values, threshold, "value") for threshold in (0.8, 0.5, 0.25)] == [0, 2, -1]

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("seed", range(5))
    def test_equals_loop(self, seed, rule):
        for row in random_solutions(seed, levels=4):
            for threshold in np.linspace(-1, 1, 17):
                expected = reference.predict_first_error(row["critic_values"], threshold, rule)
                assert predict_first_error(row["critic_values"], threshold, rule) == expected

    def test_a_higher_threshold_blames_an_earlier_step(self):
        for row in random_solutions(0):
            found = [predict_first_error(row["critic_values"], t) for t in np.linspace(-1.01, 1.01, 50)]
            blamed = [math.inf if step < 0 else step for step in found]
            assert blamed == sorted(blamed, reverse=True)
            assert (found[0], found[-1]) == (-1, 0)

    @pytest.mark.parametrize(
        ("values", "rule", "message"),
        [
            ([0.5, 0.5], "slope", "`rule` must be 'drop' or 'value', got 'slope'"),
            ([0.5], "drop", r"K \+ 1 values in \[0, 1\], got \[0.5\]"),
            ([0.5, 1.5], "value", r"got \[0.5, 1.5\]"),
            ([0.5, float("nan")], "drop", r"got \[0.5, nan\]"),
        ],
    )
    def test_refusals(self, values, rule, message):
        with pytest.raises(ValueError, match=message):
            step_scores(values, rule)


class TestMeasures:
    def test_by_hand(self):
        """
        A drop of more than 0.3 is an error. Of four with an error one is found at its place, one a step late and two
        not at all: 1/4. Of two without, one is blamed: 1/2. F1 = 2 / (4 + 2) = 1/3.
        """
        rows = [
            solution([0.9, 0.8, 0.2], 1),
            solution([0.9, 0.8, 0.2], 0),
            solution([0.5, 0.4, 0.3], 0),
            solution([0.5, 0.4, 0.3], 1),
            solution([0.5, 0.6, 0.7], -1),
            solution([0.9, 0.2, 0.9], -1),
        ]
        found = measure_first_errors(rows, threshold=-0.3)
        assert (found.erroneous.mean, found.correct.mean) == (0.25, 0.5)
        assert found.f1.mean == pytest.approx(1 / 3)
        assert (found.num_erroneous, found.num_correct, found.threshold, found.rule) == (4, 2, -0.3, "drop")

    @pytest.mark.parametrize("levels", [0, 4])
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("seed", range(5))
    def test_equals_loop(self, seed, rule, levels):
        """Also where scores are tied with the threshold."""
        rows = random_solutions(seed, levels=levels)
        for threshold in np.linspace(-1, 1, 17):
            found = measure_first_errors(rows, threshold, rule, num_resamples=2)
            expected = reference.first_error_f1(rows, threshold, rule)
            assert (found.f1.mean, found.erroneous.mean, found.correct.mean) == pytest.approx(expected, abs=1e-12)

    def test_limits(self):
        """One that is always right; one that is never; nobody blamed is right about all without an error, and no F1."""
        rows = [solution([0.9, 0.9, 0.1], 1), solution([0.9, 0.9, 0.9], -1)]
        assert measure_first_errors(rows, -0.5).f1.mean == 1
        assert measure_first_errors(rows, 1.1).f1.mean == 0
        nobody = measure_first_errors(rows, -1.1)
        assert (nobody.f1.mean, nobody.erroneous.mean, nobody.correct.mean) == (0, 0, 1)

    def test_intervals(self):
        """Those of 40 and 60 independent answers: of a share p of n about p ± 2 sqrt(p (1 - p) / n)."""
        rows = [solution([0.9, 0.1 if i < 20 else 0.9], 0) for i in range(40)]
        rows += [solution([0.9, 0.1 if i < 15 else 0.9], -1) for i in range(60)]
        found = measure_first_errors(rows, -0.5)
        for estimate, p, n in ((found.erroneous, 0.5, 40), (found.correct, 0.75, 60)):
            half = 1.96 * math.sqrt(p * (1 - p) / n)
            assert (estimate.low, estimate.high) == pytest.approx((p - half, p + half), abs=0.03)
        assert found.f1.low < found.f1.mean == 0.6 < found.f1.high
        assert measure_first_errors(rows, -0.5) == found


class TestThreshold:
    def test_by_hand(self):
        """
        Drops of 0.4 are errors, drops of 0.2 are none: any threshold between finds all, the middle is taken. A
        threshold that is as good on rows that say nothing of it is the lowest.
        """
        rows = [solution([0.8, 0.6, 0.2], 1), solution([0.8, 0.6, 0.4], -1)]
        assert fit_threshold(rows) == pytest.approx(-0.3)
        assert fit_threshold([solution([0.5, 0.5], 0), solution([0.5, 0.5], -1)]) == pytest.approx(-0.5)

    @pytest.mark.parametrize("levels", [0, 4])
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("seed", range(5))
    def test_none_is_better(self, seed, rule, levels):
        rows = random_solutions(seed, levels=levels)
        best = max(reference.first_error_f1(rows, t, rule)[0] for t in np.linspace(-1.01, 1.01, 405))
        found = reference.first_error_f1(rows, fit_threshold(rows, rule), rule)[0]
        assert found >= best - 1e-12


class TestSplits:
    rows = tuple(
        solution(values, error, problem_id=f"{part}-{error}")
        for part in ("gsm8k", "math")
        for values, error in (([0.9, 0.8, 0.2], 1), ([0.9, 0.8, 0.7], -1))
    )

    def test_threshold_of_others(self):
        found = evaluate_first_errors(self.rows[:2], self.rows[2:])
        assert found == measure_first_errors(self.rows[2:], fit_threshold(self.rows[:2]))

    def test_the_same_solutions_are_refused(self):
        with pytest.raises(ValueError, match=r"1 solutions are in `fit_rows` and in `rows`, such as 'math-1'"):
            evaluate_first_errors(self.rows[:3], self.rows[2:])
        unknown = [solution([0.5, 0.5], -1)]
        with pytest.raises(ValueError, match="Row 0 of `rows` has no `problem_id`"):
            evaluate_first_errors(self.rows[:2], unknown)


GOOD = [solution([0.5, 0.5, 0.5], 1), solution([0.5, 0.5, 0.5], -1)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (GOOD[1:], r"no solutions with a wrong step \(`first_error` of 0 or more\)"),
        (GOOD[:1], r"no solutions without one \(-1\)"),
        ([], "no solutions with a wrong step"),
        (
            [*GOOD, solution([0.5, 0.5], 1)],
            "Row 2: `first_error` is 1, but the solution has 1 steps: expected -1",
        ),
        ([*GOOD, solution([0.5, 0.5], -2)], "Row 2: `first_error` is -2"),
        ([*GOOD, solution([0.5, 0.5], 0.5)], "Row 2: `first_error` is 0.5"),
        ([*GOOD, solution([0.5, 2.0], 0)], "Row 2: A solution of K steps"),
        ([*GOOD, {"first_error": 0}], "Row 2 has no 'critic_values'. `dapo_trl.readers.read_processbench` reads"),
    ],
)
def test_refused_rows(rows, message):
    for judge in (fit_threshold, lambda rows: measure_first_errors(rows, 0.0)):
        with pytest.raises(ValueError, match=message):
            judge(rows)
