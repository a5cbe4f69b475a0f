"""
`calibration.py`: mean outcomes by predicted value.
"""

import numpy as np
import pytest

from dapo_trl.diagnosis import diagnose
from dapo_trl.calibration import reliability
from test_diagnosis import noisy, perfect, world


def row(problem, values, successes, rollouts=8):
    """A solution whose last state is its end."""
    steps = [f"{problem} {number}" for number in range(len(values))]
    counts = {"mc_successes": [*map(float, successes), 1.0], "mc_rollouts": [rollouts] * len(values) + [1]}
    return {"problem_id": problem, "completions": steps, "critic_values": [*values, 1.0]} | counts


def test_by_hand():
    """
    Bins are [0.2, 0.3) and [0.9, 1]: the first has 2 + 4 of 16 right, valued (0.2 + 0.28) / 2 = 0.24. The prompt, which
    both solutions of a problem share, and the ends do not count twice or at all.
    """
    rows = [row("a", [0.2, 0.95], [2, 8]), row("a", [0.2], [2]), row("b", [0.28], [4])]
    first, second = reliability(rows)
    assert (first.value, first.outcome.mean) == (pytest.approx(0.24), 6 / 16)
    assert (first.num_problems, first.num_states, first.num_rollouts) == (2, 2, 16)
    assert (second.value, second.outcome.mean, second.num_problems) == (0.95, 1.0, 1)


def test_bounds():
    """0 is in the first bin and 1 in the last; a state without completions is in none."""
    assert [bin.value for bin in reliability([row("a", [0.0, 1.0], [0, 8])])] == [0.0, 1.0]
    assert reliability([row("a", [0.5], [0], rollouts=0)]) == reliability([]) == []


@pytest.mark.parametrize("critic", [perfect, noisy])
def test_its_distance_is_the_calibration_error(critic):
    """As of `diagnose`, which knows nothing of it."""
    solutions, _ = world(critic)
    bins = reliability(solutions)
    gaps = [abs(bin.value - bin.outcome.mean) for bin in bins]
    error = np.average(gaps, weights=[bin.num_rollouts for bin in bins])
    assert error == pytest.approx(diagnose(solutions, num_resamples=1).measures["calibration_error"].mean)


def test_intervals():
    """Those of a perfect critic hold its values, in about 95 of 100 bins; of more problems they are narrower."""
    few, many = (reliability(world(perfect, num_problems=number, seed=1)[0]) for number in (50, 800))
    widths = [np.mean([bin.outcome.high - bin.outcome.low for bin in bins]) for bins in (few, many)]
    assert widths[1] < widths[0] / 2.5
    held = [
        bin.outcome.low <= bin.value <= bin.outcome.high
        for seed in range(20)
        for bin in reliability(world(perfect, seed=seed)[0], num_resamples=200)
    ]
    assert 0.85 < np.mean(held) < 0.99


def test_repeatable():
    solutions, _ = world(noisy, num_problems=20)
    assert reliability(solutions, seed=3) == reliability(solutions, seed=3)
