"""
Monte Carlo values: by hand, against slow loops, what they estimate, and what they refuse.
"""

import itertools
import math
import random

import numpy as np
import pytest

import reference
from dapo_trl.values import (
    Counts,
    Sample,
    StoppingRule,
    candidate_shares,
    candidate_value,
    monte_carlo_values,
    prefix_counts,
    sequential_value,
)


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


RULES = [
    StoppingRule(4, 8, 0.15),
    StoppingRule(4, 16, 0.15),
    StoppingRule(2, 12, 0.2),
    StoppingRule(3, 8, 0.17),  # the last look is no multiple of the first
    StoppingRule(1, 6, 0.25),
]


def stopping_probabilities(rule: StoppingRule, value: float) -> dict[tuple[int, int], float]:
    """By (successes, rollouts): probability to stop there, over all sequences of outcomes, one by one."""
    found: dict[tuple[int, int], float] = {}
    for outcomes in itertools.product([0.0, 1.0], repeat=rule.maximum):
        stop = rule.stopping_time(outcomes)
        place = (int(sum(outcomes[:stop])), stop)
        probability = math.prod(value if outcome else 1 - value for outcome in outcomes)
        found[place] = found.get(place, 0.0) + probability
    return found


class TestSequentialValue:
    @pytest.mark.parametrize("rule", RULES[:1] + RULES[2:])
    @pytest.mark.parametrize("value", [0.0, 0.03, 0.2, 0.5, 0.9, 1.0])
    def test_unbiased(self, rule, value):
        """Expectation over all sequences of outcomes, enumerated: the value itself."""
        found = stopping_probabilities(rule, value)
        mean = sum(probability * sequential_value(*place, rule) for place, probability in found.items())
        assert mean == pytest.approx(value, abs=1e-12)

    def test_the_plain_mean_is_biased(self):
        """What the estimator is for: at value 0.1 with looks after 4 and 8, the mean outcome is 0.05 too low."""
        rule = RULES[0]
        found = stopping_probabilities(rule, 0.1)
        mean = sum(probability * place[0] / place[1] for place, probability in found.items())
        assert mean == pytest.approx(0.0672, abs=1e-4)

    @pytest.mark.parametrize("rule", RULES)
    def test_bounds_and_symmetry(self, rule):
        """In [0, 1], and failures mirror successes."""
        for rollouts in rule.looks:
            for successes in range(rollouts + 1):
                try:
                    value = sequential_value(successes, rollouts, rule)
                except ValueError:
                    continue
                assert 0 <= value <= 1
                assert sequential_value(rollouts - successes, rollouts, rule) == pytest.approx(1 - value)

    def test_without_early_stops_it_is_the_mean(self):
        """A rule that never stops early (precision out of reach) or has one look: s / n."""
        for rule in (StoppingRule(4, 16, 1e-6), StoppingRule(16, 16, 0.15)):
            assert [sequential_value(s, 16, rule) for s in range(17)] == pytest.approx([s / 16 for s in range(17)])

    def test_refuses_what_cannot_be(self):
        with pytest.raises(ValueError, match="0 successes in 8 completions cannot be: the state stops earlier"):
            sequential_value(0, 8, RULES[0])
        for rule in (RULES[0], StoppingRule(8, 8, 0.15)):
            with pytest.raises(ValueError, match="A state without completions has no value"):
                sequential_value(0, 0, rule)


# Candidates of a state by (probability, value).
POLICIES = [{"a": (0.5, 0.1), "b": (0.5, 0.1)}, {"a": (0.8, 0.05), "b": (0.2, 0.5)}]
CANDIDATE_RULES = [StoppingRule(2, 6, 0.2), StoppingRule(3, 6, 0.17), StoppingRule(6, 6, 0.2)]


def count_of(draws, step=None) -> Counts:
    """Outcomes of the draws, or of those among them that took a step."""
    rewards = [reward for taken, reward in draws if step in (None, taken)]
    return Counts(sum(rewards), len(rewards))


class TestCandidateValue:
    def test_by_hand(self):
        """
        Looks after 4 and 8; one success in 8, so V = 1/4. Candidate a took the success and 3 of the 7 failures: shares
        1/4 and 3/4 * 3/7 = 9/28, value 1/4 / (16/28) = 7/16. Candidate b has 4 failures: no share of success.
        """
        rule, state, none = RULES[0], Counts(1, 8), Counts(0, 0)
        assert candidate_shares(Counts(1, 4), state, rule) == pytest.approx((1 / 4, 9 / 28))
        assert candidate_value(Counts(1, 4), none, state, rule) == pytest.approx(7 / 16)
        assert candidate_value(Counts(0, 4), none, state, rule) == 0.0
        # Two more that came after the stop, one of them right: (8/4 + 1) / (8 * 16/28 + 2).
        assert candidate_value(Counts(1, 4), Counts(1, 2), state, rule) == pytest.approx(3 / (32 / 7 + 2))
        assert candidate_value(none, Counts(1, 2), state, rule) == 0.5

    @pytest.mark.parametrize("rule", CANDIDATE_RULES)
    @pytest.mark.parametrize("policy", POLICIES)
    def test_shares_are_unbiased(self, rule, policy):
        """Expectation over all sequences of candidates and outcomes, enumerated: p(a) V(a) and p(a) (1 - V(a))."""
        kinds = [(step, reward) for step in policy for reward in (0.0, 1.0)]
        weights = {(step, r): p * (v if r else 1 - v) for step, (p, v) in policy.items() for r in (0.0, 1.0)}
        mean = {step: np.zeros(2) for step in policy}
        for draws in itertools.product(kinds, repeat=rule.maximum):
            stopped = draws[: rule.stopping_time([reward for _, reward in draws])]
            probability = math.prod(weights[kind] for kind in draws)
            for step in policy:
                shares = candidate_shares(count_of(stopped, step), count_of(stopped), rule)
                mean[step] += probability * np.array(shares)
        for step, (p, v) in policy.items():
            assert mean[step] == pytest.approx([p * v, p * (1 - v)], abs=1e-12)

    @pytest.mark.parametrize("rule", RULES)
    def test_shares_sum_to_the_value_of_the_state(self, rule):
        rng = random.Random(0)
        for _ in range(200):
            draws = [(rng.choice("abc"), float(rng.random() < 0.3)) for _ in range(rule.maximum)]
            stopped = draws[: rule.stopping_time([reward for _, reward in draws])]
            state = count_of(stopped)
            shares = np.array([candidate_shares(count_of(stopped, step), state, rule) for step in "abc"])
            value = sequential_value(*state, rule)
            assert shares.sum(axis=0) == pytest.approx([value, 1 - value])

    def test_with_one_number_for_all_it_is_the_mean(self):
        """Exactly, and with outcomes between 0 and 1."""
        rule = StoppingRule(16, 16, 0.15)
        assert candidate_value(Counts(0.3, 3), Counts(0.4, 4), Counts(5.1, 16), rule) == (0.3 + 0.4) / 7

    @pytest.mark.parametrize("rule", [*RULES, StoppingRule(1, 9, 0.19), StoppingRule(2, 15, 0.12)])
    def test_every_candidate_has_a_share(self, rule):
        """Wherever a state can stop, a candidate with a single outcome has the value of that outcome."""
        none, reached = Counts(0, 0), 0
        for rollouts, successes in itertools.product(range(1, rule.maximum + 1), range(rule.maximum + 1)):
            state = Counts(successes, rollouts)
            try:
                sequential_value(*state, rule)
            except ValueError:
                continue
            reached += 1
            if successes:
                assert candidate_value(Counts(1, 1), none, state, rule) == 1.0
            if successes < rollouts:
                assert candidate_value(Counts(0, 1), none, state, rule) == 0.0
        assert reached > rule.minimum

    def test_refuses_what_has_no_value(self):
        none = Counts(0, 0)
        with pytest.raises(ValueError, match="A candidate without completions has no value"):
            candidate_value(none, none, Counts(1, 8), RULES[0])
        with pytest.raises(ValueError, match="A state without completions has no value"):
            candidate_value(Counts(1, 1), none, none, RULES[0])


class TestStoppingRule:
    def test_by_hand(self):
        """After 4 equal outcomes Beta(1, 5) has sd sqrt(5 / (36 * 7)) = 0.141; after 2 of 4 Beta(3, 3) has 0.189."""
        rule = StoppingRule(4, 16, 0.15)
        assert rule.is_enough(0, 4) and rule.is_enough(4, 4) and not rule.is_enough(2, 4)
        assert not StoppingRule(4, 16, 0.14).is_enough(0, 4)
        assert rule.stopping_time([0.0] * 3) is None
        assert rule.stopping_time([0.0] * 7) == 4
        assert rule.stopping_time([0.0, 1.0] * 8) == 12  # Beta(7, 7): 0.129

    def test_outcomes_between(self):
        """Partial rewards have no sequential estimate, but a fixed number of completions needs none."""
        with pytest.raises(ValueError, match="Leave `min_completions` out"):
            StoppingRule(2, 4, 0.15).stopping_time([0.5, 1.0])
        assert StoppingRule(2, 2, 0.15).stopping_time([0.5, 1.0]) == 2

    @pytest.mark.parametrize(
        ("numbers", "message"),
        [
            ((0, 4, 0.1), "must lie between 1 and the largest, 4, got 0"),
            ((5, 4, 0.1), "must lie between 1 and the largest, 4, got 5"),
            ((2, 4, 0.0), "`precision` must lie in"),
            ((2, 4, 1.0), "`precision` must lie in"),
        ],
    )
    def test_refuses(self, numbers, message):
        with pytest.raises(ValueError, match=message):
            StoppingRule(*numbers)
