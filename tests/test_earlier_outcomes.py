"""
`earlier_outcomes.py`: by hand, against slow loops, in their limits, and in small simulated worlds.
"""

import math
import random

import numpy as np
import pytest
from datasets import Dataset

import reference
from dapo_trl.earlier_outcomes import (
    add_kernel_values,
    batch_values,
    fit_shift,
    kernel_values,
    kernel_weights,
    revalue,
    shifted_values,
)
from dapo_trl.recipe_arguments import RecipeArguments
from dapo_trl.values import monte_carlo_values


NAN = float("nan")


class TestKernelWeights:
    def test_by_hand(self):
        """At iteration 4 with h = 1/2 the window is two iterations: ages 3, 2, 1, 0 over 2 leave 0, 0, 1/2, 1."""
        assert kernel_weights(4, 0.5).tolist() == [0, 0, 0.5, 1]
        assert kernel_weights(4, 1.0).tolist() == [0.25, 0.5, 0.75, 1]

    def test_limits(self):
        assert kernel_weights(1, 0.1).tolist() == [1]
        assert kernel_weights(5, 1e-9).tolist() == [0, 0, 0, 0, 1]  # today's outcomes only
        assert kernel_weights(5, math.inf).tolist() == [1] * 5  # all alike
        assert (np.diff(kernel_weights(7, 0.8)) >= 0).all()

    def test_refuses(self):
        for arguments, message in (
            ((0, 1.0), "`num_iterations`"),
            ((1, 0.0), "`bandwidth`"),
            ((1, NAN), "`bandwidth`"),
        ):
            with pytest.raises(ValueError, match=message):
                kernel_weights(*arguments)


class TestKernelValues:
    def test_by_hand(self):
        """
        Two iterations, h = 1: weights 1/2 and 1. State 0: (1/2 * 2 + 3) / (1/2 * 4 + 4) = 2/3, of 36 / 5 = 7.2
        outcomes. State 1 was not visited before: 1/4 of 4. State 2 is not visited today: 3/4 of 4, each of the same
        small weight. State 3 was never visited.
        """
        found = kernel_values([[2, 0, 3, 0], [3, 1, 0, 0]], [[4, 0, 4, 0], [4, 4, 0, 0]], 1.0)
        np.testing.assert_allclose(found.values, [2 / 3, 1 / 4, 3 / 4, NAN])
        np.testing.assert_allclose(found.effective, [7.2, 4, 4, 0])

    @pytest.mark.parametrize("bandwidth", [0.3, 0.7, 1.0, 5.0, math.inf])
    def test_equals_loop(self, bandwidth):
        rng = random.Random(0)
        for _ in range(50):
            rollouts = [rng.randint(0, 6) for _ in range(rng.randint(1, 5))] + [rng.randint(1, 6)]
            successes = [float(rng.randint(0, n)) for n in rollouts]
            expected = reference.kernel_value(successes, rollouts, bandwidth)
            found = kernel_values([[k] for k in successes], [[n] for n in rollouts], bandwidth)
            assert (found.values[0], found.effective[0]) == pytest.approx(expected, rel=1e-12)

    def test_limits(self):
        """Infinite bandwidth: the plain mean of all outcomes; none: Monte Carlo of today. The size is their number."""
        successes, rollouts = [[1, 4], [2, 0]], [[2, 4], [8, 4]]
        pooled = kernel_values(successes, rollouts, math.inf)
        np.testing.assert_allclose(pooled.values, monte_carlo_values([3, 4], [10, 8]))
        np.testing.assert_allclose(pooled.effective, [10, 8])
        today = kernel_values(successes, rollouts, 1e-9)
        np.testing.assert_allclose(today.values, monte_carlo_values(successes[1], rollouts[1]))
        np.testing.assert_allclose(today.effective, rollouts[1])

    def test_the_sample_that_is_valued_is_left_out(self):
        """As if it had not been drawn; its own outcome does not move what it is compared with."""
        for outcome in (0.0, 1.0):
            found = kernel_values([[2, 2], [1 + outcome, 3]], [[4, 4], [4, 4]], 1.0, left_out=[outcome, NAN])
            without = kernel_values([[2, 2], [1, 3]], [[4, 4], [3, 4]], 1.0)
            np.testing.assert_allclose(found.values, without.values)
            np.testing.assert_allclose(found.effective, without.effective)

    def test_less_error_where_the_policy_changes_little(self):
        """Values that move by 0.02: four of today's and sixteen earlier outcomes beat four alone; where they move by
        0.5, they do not."""
        rng = np.random.default_rng(0)
        errors = {}
        for move in (0.02, 0.5):
            before = rng.uniform(0.05, 0.45, 4000)
            today = before + move
            k_IS = [rng.binomial(16, before), rng.binomial(4, today)]
            n_IS = [np.full(4000, 16), np.full(4000, 4)]
            errors[move] = [((kernel_values(k_IS, n_IS, h).values - today) ** 2).mean() for h in (1e-9, 1.0)]
        assert errors[0.02][1] < 0.5 * errors[0.02][0]
        assert errors[0.5][1] > 1.2 * errors[0.5][0]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (([[1, 1]], [[1]], 1.0), "Each iteration has a number per state"),
            (([1.0], [1], 1.0), "Each iteration has a number per state"),
            (([[2]], [[1]], 1.0), "State 0 has 2 successes in 1 rollouts of iteration 1"),
            (([[0, 1]], [[1, 1]], 1.0, [1.0, NAN]), "State 0 has -1 successes .* without what is left out"),
            (([[0]], [[1]], 1.0, [0.0, 0.0]), "`left_out` has an outcome per state"),
        ],
    )
    def test_refuses(self, given, message):
        with pytest.raises(ValueError, match=message):
            kernel_values(*given)


class TestAddKernelValues:
    def rows(self, successes, rollouts, **columns):
        state = {"problem_id": "1", "prefix": ["a\n"], "candidates": ["b\n", "c", "c"], "rewards": [None, 1.0, None]}
        return Dataset.from_list([state | {"mc_successes": successes, "mc_rollouts": rollouts} | columns])

    def test_by_hand(self):
        """
        h = 1 of two iterations: the first counts half. "b": (1/2 * 4 + 1) / (1/2 * 4 + 4) = 1/2. "c" that ends is
        another state than "c" that goes on, which nobody saw before.
        """
        before = self.rows([4.0, 2.0], [4, 2]).map(
            lambda row: {name: row[name][:2] for name in ("candidates", "rewards")}
        )
        now = self.rows([1.0, 2.0, 1.0], [4, 2, 4], values=[9.0, 9.0, 9.0])
        found = add_kernel_values(now, [[before]], 1.0)
        assert found["values"][0] == pytest.approx([1 / 2, 1.0, 1 / 4])
        assert found["effective_rollouts"][0] == pytest.approx([36 / 5, 3**2 / 2.5, 4])
        assert found["mc_rollouts"][0] == [4, 2, 4]

    def test_states_of_solutions_count_too(self):
        """The state after "a" and "b" of a solution that went on there; its end is no state that others could be in."""
        row = {"problem_id": "1", "completions": ["a\n", "b\n", "c"], "mc_successes": [0.0, 1.0, 4.0, 1.0]}
        solutions = Dataset.from_list([row | {"mc_rollouts": [9, 2, 4, 1]}])
        now = self.rows([1.0, 0.0, 0.0], [4, 1, 1])
        assert add_kernel_values(now, [[solutions]], 1.0)["values"][0] == pytest.approx([1 / 2, 0.0, 0.0])
        of_another = solutions.map(lambda row: {"problem_id": "2"})
        assert add_kernel_values(now, [[of_another]], 1.0)["values"][0] == pytest.approx([1 / 4, 0.0, 0.0])

    def test_no_earlier_iteration_is_monte_carlo(self):
        assert add_kernel_values(self.rows([1.0, 1.0, 0.0], [2, 2, 2]), [], 1.0)["values"][0] == [0.5, 0.5, 0.0]

    def test_refuses_rows_without_counts(self):
        rows = self.rows([1.0, 1.0, 0.0], [2, 2, 2])
        with pytest.raises(ValueError, match=r"Kernel values need .* 'mc_rollouts' are not there"):
            add_kernel_values(rows, [[rows.remove_columns("mc_rollouts")]], 1.0)


class TestShiftedValues:
    def test_by_hand(self):
        """Odds of 1/4 times e^log 4 are 1: a value of 1/5 becomes 1/2."""
        np.testing.assert_allclose(shifted_values([0.2, 0.0, 1.0], math.log(4)), [0.5, 0.0, 1.0])

    def test_no_shift_is_the_table(self):
        table = np.linspace(0, 1, 11)
        np.testing.assert_allclose(shifted_values(table, 0.0), table)

    def test_shifts_add(self):
        table = np.linspace(0, 1, 11)
        np.testing.assert_allclose(shifted_values(shifted_values(table, 0.7), -1.2), shifted_values(table, -0.5))

    def test_fit_finds_the_shift_of_a_world(self):
        """10,000 single outcomes of values that are the table's, moved by 0.8: found to 0.1, on the grid."""
        rng = np.random.default_rng(0)
        table = rng.uniform(0.05, 0.95, 10_000)
        outcomes = rng.random(10_000) < shifted_values(table, 0.8)
        assert fit_shift(table, outcomes, np.ones(10_000)) == pytest.approx(0.8, abs=0.1)

    def test_fit_balances_outcomes_and_values(self):
        """At the best c the moved values sum to the number of successes: the gradient of the likelihood is 0."""
        rng = np.random.default_rng(1)
        table, rollouts = rng.uniform(0.1, 0.9, 50), rng.integers(0, 5, 50)
        successes = rng.binomial(rollouts, 0.6)
        shift = fit_shift(table, successes, rollouts, np.linspace(-3, 3, 60_001))
        assert rollouts @ shifted_values(table, shift) == pytest.approx(successes.sum(), abs=0.01)

    def test_without_outcomes_nothing_moves(self):
        assert fit_shift([0.2, 0.9], [0, 0], [0, 0]) == pytest.approx(0.0, abs=1e-12)

    def test_a_table_that_was_certain_and_wrong_can_be_fitted(self):
        assert -6 <= fit_shift([0.0, 1.0], [1, 0], [1, 1]) <= 6


class TestBatchValues:
    def test_by_hand(self):
        """
        Values 1/2, 1/2 and 3/4, single outcomes 1, 0, 1. For the first: (0 + 1 / (1/4)) / (1 + 3) = 1, so it stays 1/2.
        For the second: (2 + 4) / (1 + 3) = 3/2, so 3/4. For the third: (2 + 0) / (1 + 1) = 1, so 3/4.
        """
        np.testing.assert_allclose(batch_values([0.5, 0.5, 0.75], [1, 0, 1], [1, 1, 1]), [0.5, 0.75, 0.75])

    @pytest.mark.parametrize("seed", range(3))
    def test_equals_loop(self, seed):
        rng = random.Random(seed)
        values = [rng.choice([0.0, 0.01, rng.random(), 1.0]) for _ in range(30)]
        outcomes, groups = [float(rng.random() < 0.5) for _ in values], [rng.choice("abcdef") for _ in values]
        for given in (groups, list(range(30))):
            expected = [reference.batch_value(i, values, outcomes, given) for i in range(30)]
            np.testing.assert_allclose(batch_values(values, outcomes, [1] * 30, given), expected, rtol=1e-12)

    def test_rollouts_are_single_outcomes(self):
        """Three rollouts of a state with two successes are that state three times, in one group."""
        several = batch_values([0.3, 0.6], [2, 1], [3, 2])
        single = batch_values([0.3] * 3 + [0.6] * 2, [1, 1, 0, 1, 0], [1] * 5, [0] * 3 + [1] * 2)
        np.testing.assert_allclose(several, single[[0, 3]])

    def test_as_expected_nothing_moves(self):
        """Outcomes that are the values themselves: the ratio is 1."""
        values = [0.2, 0.5, 0.9]
        np.testing.assert_allclose(batch_values(values, values, [1, 1, 1]), values)

    def test_own_group_does_not_count(self):
        """Whole trajectories are left out: what happened on one's own says nothing about its states' baselines."""
        values, groups = [0.5, 0.6, 0.4, 0.7], ["a", "a", "b", "b"]
        won, lost = (batch_values(values, [x, x, 1, 0], [1] * 4, groups)[:2] for x in (1, 0))
        np.testing.assert_allclose(won, lost)
        alone = [batch_values(values, [x, x, 1, 0], [1] * 4)[:2] for x in (1, 0)]
        assert np.abs(alone[0] - alone[1]).min() > 0.05

    def test_what_is_certain_says_nothing_and_stays(self):
        """At 0.99 a failure would weigh a hundred times as much as at 0; and there is nothing to compare one with."""
        assert batch_values([0.5, 0.99], [1, 0], [1, 1]).tolist() == [0.5, 0.99]
        assert batch_values([0.5], [1], [1]).tolist() == [0.5]

    def test_in_a_world_where_all_became_better_by_a_factor(self):
        """Single outcomes of 400 states move a table by 1.3, on average over worlds, with little scatter."""
        rng = np.random.default_rng(0)
        ratios = []
        for _ in range(50):
            table = rng.uniform(0.1, 0.6, 400)
            outcomes = rng.random(400) < 1.3 * table
            ratios.append((batch_values(table, outcomes, np.ones(400)) / table).mean())
        assert np.mean(ratios) == pytest.approx(1.3, abs=0.03) and np.std(ratios) < 0.1

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (([0.5], [1], [1, 1]), "Lengths differ"),
            (([1.5], [1], [1]), r"State 0 has a value that is not in \[0, 1\]"),
            (([0.5], [2], [1]), "State 0 does not have from 0 to all of its rollouts as successes"),
            (([0.5], [1], [1], ["a", "b"]), "Each state has a group"),
            (([0.5], [1], [1], None, 0.0), "`margin` must lie between"),
        ],
    )
    def test_refuses(self, given, message):
        with pytest.raises(ValueError, match=message):
            batch_values(*given)


class TestRevalue:
    def tables(self):
        """Two problems; the first has candidates that go on, one of them without outcomes, and one that ends."""
        states = [
            {
                "problem_id": "1",
                "prefix": [],
                "candidates": ["a\n", "b\n", "c"],
                "rewards": [None, None, 1.0],
                "mc_successes": [3.0, 0.0, 9.0],
                "mc_rollouts": [4, 0, 9],
                "critic_values": [0.5, 0.2, 0.1],
            },
            {
                "problem_id": "2",
                "prefix": [],
                "candidates": ["d\n"],
                "rewards": [None],
                "mc_successes": [3.0],
                "mc_rollouts": [4],
                "critic_values": [0.5],
            },
        ]
        solution = {"problem_id": "1", "completions": ["a\n", "c"], "critic_values": [0.5, 0.5, 0.3]}
        solutions = [solution | {"mc_successes": [0.0, 3.0, 1.0], "mc_rollouts": [0, 4, 1]}]
        return Dataset.from_list(solutions), Dataset.from_list(states)

    def test_by_hand(self):
        """
        States with outcomes: 3 of 4 twice, valued 1/2, one of them both a candidate and a solution's state;
        odds of 1 become 3. Odds of 1/4 become 3/4. The ends keep their values, and their outcomes do not count.
        """
        found = revalue(*self.tables())
        assert found.shift == pytest.approx(math.log(3), abs=0.03)
        for rows, expected in (
            (found.states, [[3 / 4, 3 / 7, 0.1], [3 / 4]]),
            (found.solutions, [[3 / 4, 3 / 4, 0.3]]),
        ):
            for values, wanted in zip(rows["critic_values"], expected, strict=True):
                assert values == pytest.approx(wanted, abs=0.01)
        assert found.states["mc_rollouts"][:] == [[4, 0, 9], [4]]

    def test_states_of_solutions_count_where_there_is_no_candidate(self):
        """After a step without alternatives. 12 outcomes, 3 right: odds of 1 become 1/3."""
        solutions, states = self.tables()
        solutions = solutions.map(lambda row: {"mc_successes": [0.0, 3.0, 1.0], "mc_rollouts": [8, 4, 1]})
        only = states.select([])
        assert revalue(solutions, only).shift == pytest.approx(math.log(1 / 3), abs=0.03)
        assert revalue(solutions.select([]), only).shift == 0.0

    def test_ratio_is_that_of_the_other_problems(self):
        """
        Problem 1 is moved by how 2 turned out, and the other way round: as expected after the shift, so not at all.
        With other outcomes of 2, all that 1 has is moved by their ratio, k / (n V): the order stays.
        """
        plain, both = (revalue(*self.tables(), with_ratio).states["critic_values"][0] for with_ratio in (False, True))
        assert both == pytest.approx(plain, abs=0.01)
        solutions, states = self.tables()
        values = {"1": [0.5, 0.99, 0.1], "2": [0.5]}  # 0.99 is too near 1 to say anything about others
        states = states.map(
            lambda row: {
                "critic_values": values[row["problem_id"]],
                "mc_successes": [4.0] if row["problem_id"] == "2" else row["mc_successes"],
            }
        )
        solutions = solutions.map(lambda row: {"critic_values": [0.5, 0.5, 0.3]})
        shifted, found = (revalue(solutions, states, with_ratio).states for with_ratio in (False, True))
        moved = shifted["critic_values"]
        ratios = {"1": 4 / (4 * moved[1][0]), "2": 3 / (4 * moved[0][0])}
        for row, before in zip(found, moved, strict=True):
            expected = [min(value * ratios[row["problem_id"]], 1.0) for value in before[:2]]
            assert row["critic_values"][:2] == pytest.approx(expected)
        assert found["critic_values"][0][2] == 0.1

    def test_outcomes_as_valued_move_nothing(self):
        solutions, states = self.tables()
        solutions = solutions.map(lambda row: {"mc_successes": [0.0, 2.0, 1.0]})
        states = states.map(
            lambda row: {"mc_successes": [n * v for n, v in zip(row["mc_rollouts"], row["critic_values"], strict=True)]}
        )
        found = revalue(solutions, states)
        assert found.shift == pytest.approx(0, abs=1e-9)
        for rows, before in ((found.states, states), (found.solutions, solutions)):
            for values, old in zip(rows["critic_values"], before["critic_values"], strict=True):
                assert values == pytest.approx(old)

    def test_refuses_rows_without_values(self):
        solutions, states = self.tables()
        with pytest.raises(ValueError, match=r"Values of an earlier critic need .*'critic_values'"):
            revalue(solutions, states.remove_columns("critic_values"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"later_critics": "shift"}, "got `values: critic` and 1 iterations"),
        ({"later_critics": "batch", "values": "monte_carlo", "iterations": 2}, "got `values: monte_carlo` and 2"),
        ({"later_critics": "new", "iterations": 2}, "`later_critics` must be 'train', 'shift' or 'batch', got 'new'"),
        (
            {"later_critics": "batch", "iterations": 2, "min_completions": 4},
            '`later_critics="batch"` takes mean outcomes, which `min_completions` biases',
        ),
        ({"kernel_bandwidth": 0.0, "values": "monte_carlo", "iterations": 2}, "`kernel_bandwidth` must be positive"),
        ({"kernel_bandwidth": 1.0, "iterations": 2}, "got 'critic' and 2"),
        ({"kernel_bandwidth": 1.0, "values": "monte_carlo"}, "got 'monte_carlo' and 1"),
        (
            {"kernel_bandwidth": 1.0, "values": "monte_carlo", "iterations": 2, "min_completions": 4},
            "`kernel_bandwidth` takes mean outcomes, which `min_completions` biases",
        ),
    ],
)
def test_recipes_refuse(given, message):
    with pytest.raises(ValueError, match=message):
        RecipeArguments(**given)
