"""
Monte Carlo values: by hand, against slow loops, what they estimate, and what they refuse.
"""

import math
import random

import numpy as np
import pytest

import reference
from dapo_trl.values import Counts, Sample, monte_carlo_values, prefix_counts


def random_samples(num_samples: int, seed: int) -> list[Sample]:
    """Completions of 0 to 3 steps from states of 0 to 2 steps, few enough kinds of steps for paths to meet."""
    rng = random.Random(seed)
    samples = []
    for _ in range(num_samples):
        state, steps = (tuple(rng.choice("abc") for _ in range(rng.randint(0, most))) for most in (2, 3))
        samples.append(Sample(state, steps, rng.choice([0.0, 0.25, 1.0])))
    return samples


# A policy over two steps: the first step, its probability, and the probability that a solution through it ends correct.
FIRST_STEPS = {"a": (0.7, 0.8), "b": (0.3, 0.1)}
VALUE_OF_PROMPT = 0.7 * 0.8 + 0.3 * 0.1


def sample_solution(rng: random.Random, first_step: str | None = None) -> Sample:
    step = first_step or ("a" if rng.random() < FIRST_STEPS["a"][0] else "b")
    is_correct = rng.random() < FIRST_STEPS[step][1]
    end = "right" if is_correct else "wrong"
    return Sample((step,) if first_step else (), (end,) if first_step else (step, end), float(is_correct))


def standard_errors(counts: Counts, value: float) -> float:
    """Distance of an estimate to the true value, in its standard errors."""
    return (counts.value - value) / math.sqrt(value * (1 - value) / counts.rollouts)


class TestMonteCarloValues:
    def test_by_hand(self):
        """0 of 16, 5 of 16 and 3 of 3; partial credit of 1/2 in 4 rollouts is 1/8."""
        assert monte_carlo_values([0, 5, 3, 0.5], [16, 16, 3, 4]).tolist() == [0, 0.3125, 1, 0.125]
        assert monte_carlo_values([], []).tolist() == []

    @pytest.mark.parametrize("seed", range(5))
    def test_equals_mean_of_outcomes(self, seed):
        rng = random.Random(seed)
        outcomes = [[rng.randint(0, 1) for _ in range(rng.randint(1, 16))] for _ in range(20)]
        values = monte_carlo_values([sum(ys) for ys in outcomes], [len(ys) for ys in outcomes])
        assert values.dtype == "float64"
        for value, ys in zip(values.tolist(), outcomes, strict=True):
            assert value == pytest.approx(sum(ys) / len(ys), rel=1e-15)

    def test_agrees_with_counts(self):
        """The vector form and [`Counts.value`] are one definition."""
        counts = list(prefix_counts(random_samples(50, seed=0)).values())
        values = monte_carlo_values([c.successes for c in counts], [c.rollouts for c in counts])
        assert values.tolist() == [c.value for c in counts]

    @pytest.mark.parametrize("rollouts", [0, -1])
    def test_refuses_a_state_without_rollout(self, rollouts):
        with pytest.raises(ValueError, match="State 1 has no rollout, so it has no Monte Carlo value"):
            monte_carlo_values([1, 0, 0], [2, rollouts, rollouts])

    @pytest.mark.parametrize("successes", [17, -1, 16.5])
    def test_refuses_impossible_successes(self, successes):
        message = rf"State 2 has {successes} successes in 16 rollouts: expected 0 to 16\."
        with pytest.raises(ValueError, match=message):
            monte_carlo_values([0, 16, successes], [16, 16, 16])

    def test_refuses_different_lengths(self):
        message = r"`successes` and `rollouts` must have the same length, got \(2,\) and \(1,\)"
        with pytest.raises(ValueError, match=message):
            monte_carlo_values([1, 1], [2])


class TestPrefixCounts:
    def test_by_hand(self):
        """
        Three completions of the prompt, "ab" right, "ac" wrong, "a" right, and one from state "a": "b", wrong. Through
        the prompt go 3 with 2 right; through "a" all 4, 2 right; through "ab" the first and the last, 1 right; through
        "ac" one, wrong.
        """
        samples = [
            Sample((), ("a", "b"), 1.0),
            Sample((), ("a", "c"), 0.0),
            Sample((), ("a",), 1.0),
            Sample(("a",), ("b",), 0.0),
        ]
        assert prefix_counts(samples) == {
            (): Counts(2, 3),
            ("a",): Counts(2, 4),
            ("a", "b"): Counts(1, 2),
            ("a", "c"): Counts(0, 1),
        }

    @pytest.mark.parametrize("seed", range(20))
    def test_equals_loop(self, seed):
        samples = random_samples(40, seed)
        assert prefix_counts(samples) == reference.prefix_counts(samples)

    def test_any_iterable_in_any_order(self):
        samples = random_samples(40, seed=0)
        assert prefix_counts(iter(samples)) == prefix_counts(samples[::-1]) == prefix_counts(samples)
        assert prefix_counts([]) == {}

    def test_types(self):
        """Counts go into JSON and data sets: plain Python numbers, whatever the rewards. Ids are as good as text."""
        state = ((5, 6),)
        starts = [Sample(state, (), reward) for reward in (0, np.float32(1))]
        counts = prefix_counts([Sample((), (*state, (7,)), True), *starts])
        assert counts == {(): Counts(1, 1), state: Counts(2, 3), (*state, (7,)): Counts(1, 1)}
        assert {(type(c.successes), type(c.rollouts)) for c in counts.values()} == {(float, int)}

    def test_without_sharing_only_starting_states_count(self):
        """Where no two paths meet, a state's counts are those of the completions that were drawn from it."""
        samples = [Sample((f"state {i}",), (f"step {i} {j}",), float(j < i)) for i in range(5) for j in range(4)]
        counts = prefix_counts(samples)
        assert [counts[(f"state {i}",)] for i in range(5)] == [Counts(min(i, 4), 4) for i in range(5)]

    @pytest.mark.parametrize("seed", range(5))
    def test_counts_flow_through_the_tree(self, seed):
        """Of completions of the prompt, what goes through a state ends there or goes through one of its children."""
        samples = [Sample((), state + steps, reward) for state, steps, reward in random_samples(60, seed)]
        counts = prefix_counts(samples)
        assert counts[()].rollouts == 60
        for state, (successes, rollouts) in counts.items():
            children = [count for child, count in counts.items() if child and child[:-1] == state]
            ending = [sample.reward for sample in samples if sample.steps == state]
            assert rollouts == len(ending) + sum(child.rollouts for child in children)
            assert successes == pytest.approx(sum(ending) + sum(child.successes for child in children))

    def test_passing_samples_are_unbiased(self):
        """
        States of a policy whose values are known: completions of the prompt that pass through a state, together with
        those drawn from it, estimate its value; 20,000 of them to within 4 standard errors.
        """
        rng = random.Random(0)
        counts = prefix_counts(sample_solution(rng, first) for first in [None] * 20_000 + ["a", "b"] * 1_000)
        assert counts[()].rollouts == 20_000
        assert counts[("a",)].rollouts == pytest.approx(15_000, abs=300)
        assert abs(standard_errors(counts[()], VALUE_OF_PROMPT)) < 4
        for step, (_, value) in FIRST_STEPS.items():
            assert abs(standard_errors(counts[(step,)], value)) < 4

    def test_samples_kept_for_their_outcome_are_biased(self):
        """
        The control, and the warning of the docstring. Of the solutions, as many correct as wrong ones are kept, as the
        paper does: the prompt then looks like 1/2 instead of 0.59, and the odds of "a" fall from 4 to 1 by the factor
        (1 - 0.59) / 0.59: 4 * 0.41 / 0.59 = 2.78, a value of 0.735 instead of 0.8.
        """
        rng = random.Random(0)
        solutions = [sample_solution(rng) for _ in range(20_000)]
        correct, wrong = ([s for s in solutions if s.reward == reward] for reward in (1.0, 0.0))
        kept = correct[: len(wrong)] + wrong
        counts = prefix_counts(kept)
        assert counts[()].value == 0.5
        assert counts[("a",)].value == pytest.approx(0.735, abs=0.01)
        assert abs(standard_errors(counts[("a",)], 0.8)) > 10
