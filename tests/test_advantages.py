"""
Advantages: by hand, against slow loops, in the cases where two estimators are one, and what they refuse.
"""

import math
import random

import numpy as np
import pytest
from datasets import Dataset

import reference
from dapo_trl.advantages import (
    add_advantages,
    advantage_errors,
    advantage_gap,
    reliabilities,
    sibling_advantages,
    step_advantages,
    with_true_rewards,
)


def random_siblings(seed: int) -> tuple[list[float], list[int]]:
    """Values of 2 to 8 candidates, and how often each was sampled."""
    rng = random.Random(seed)
    size = rng.randint(2, 8)
    return [rng.random() for _ in range(size)], [rng.randint(1, 9) for _ in range(size)]


class TestSiblingAdvantages:
    def test_by_hand(self):
        """
        Values 1, 1/2, 0, sampled 1, 2 and 5 times: the mean over 8 samples is (1 + 2/2) / 8 = 1/4. Counted once each
        it is 1/2.
        """
        assert sibling_advantages([1, 0.5, 0], counts=[1, 2, 5]).tolist() == [0.75, 0.25, -0.25]
        assert sibling_advantages([1, 0.5, 0]).tolist() == [0.5, 0, -0.5]

    @pytest.mark.parametrize("seed", range(20))
    def test_equals_loop(self, seed):
        values, counts = random_siblings(seed)
        advantages = sibling_advantages(values, counts)
        assert advantages.dtype == np.float64
        assert advantages.tolist() == pytest.approx(reference.sibling_advantages(values, counts), abs=1e-15)
        ones = [1] * len(values)
        assert sibling_advantages(values).tolist() == pytest.approx(
            reference.sibling_advantages(values, ones), abs=1e-15
        )

    @pytest.mark.parametrize("seed", range(5))
    def test_duplicates_are_counts(self, seed):
        """Listing every sample and dropping duplicates afterwards, as the paper says, gives what the counts give."""
        values, counts = random_siblings(seed)
        all_samples = sibling_advantages(np.repeat(values, counts))
        firsts = np.cumsum([0, *counts[:-1]])
        np.testing.assert_allclose(all_samples[firsts], sibling_advantages(values, counts), rtol=0, atol=1e-15)

    @pytest.mark.parametrize("seed", range(5))
    def test_center_shift_and_gap(self, seed):
        """The weighted mean is zero; a common shift of the values changes nothing; neither do counts change the gap."""
        values, counts = random_siblings(seed)
        advantages = sibling_advantages(values, counts)
        assert np.dot(advantages, counts) == pytest.approx(0, abs=1e-14)
        shifted = sibling_advantages([0.5 * value + 0.5 for value in values], counts)
        np.testing.assert_allclose(shifted, 0.5 * advantages, rtol=0, atol=1e-15)
        assert advantage_gap(advantages) == pytest.approx(max(values) - min(values), abs=1e-15)
        assert advantage_gap(advantages) == pytest.approx(advantage_gap(sibling_advantages(values)), abs=1e-15)

    def test_equal_values_leave_nothing_to_learn(self):
        assert sibling_advantages([0.5, 0.5, 0.5], [3, 1, 4]).tolist() == [0, 0, 0]

    @pytest.mark.parametrize("values", [[], [0.5]])
    def test_refuses_too_few_candidates(self, values):
        message = f"a state needs at least two, got {len(values)}. Drop the state, sample more"
        with pytest.raises(ValueError, match=message):
            sibling_advantages(values)

    @pytest.mark.parametrize("counts", [[1], [1, 1, 1]])
    def test_refuses_other_lengths(self, counts):
        message = f"`values` and `counts` must have the same length, got 2 and {len(counts)}"
        with pytest.raises(ValueError, match=message):
            sibling_advantages([0.5, 1.0], counts)

    @pytest.mark.parametrize("count", [0, -1, math.nan])
    def test_refuses_counts_below_one(self, count):
        with pytest.raises(ValueError, match=rf"`counts` must be at least 1, got \[2.0, {float(count)}\]"):
            sibling_advantages([0.5, 1.0], [2, count])

    @pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, -math.inf])
    def test_refuses_what_is_no_probability(self, value):
        """A logit, a percentage or a failed division would otherwise turn into an advantage."""
        with pytest.raises(ValueError, match=rf"must lie in \[0, 1\], got {value}\."):
            sibling_advantages([0.5, value])


class TestStepAdvantages:
    def test_by_hand(self):
        """From 1/2 the first step gains 1/4, the second loses 3/4, the third changes nothing, the fourth rescues it."""
        assert step_advantages([0.5, 0.75, 0, 0, 1]).tolist() == [0.25, -0.75, 0, 1]

    @pytest.mark.parametrize("seed", range(10))
    def test_equals_loop_and_telescopes(self, seed):
        """Exactly the differences; they sum to the outcome minus the value of the prompt."""
        rng = random.Random(seed)
        values = [rng.random() for _ in range(rng.randint(2, 12))]
        advantages = step_advantages(values)
        assert advantages.dtype == np.float64
        assert advantages.tolist() == reference.step_advantages(values)
        assert advantages.sum() == pytest.approx(values[-1] - values[0], abs=1e-14)

    @pytest.mark.parametrize("seed", range(5))
    def test_is_the_sibling_form_where_the_state_is_worth_its_samples(self, seed):
        """If V(s) is the mean over the sampled siblings, a solution's advantage equals that among siblings."""
        values, counts = random_siblings(seed)
        value_of_state = np.average(values, weights=counts)
        expected = [step_advantages([value_of_state, value]).item() for value in values]
        np.testing.assert_allclose(sibling_advantages(values, counts), expected, rtol=0, atol=1e-15)

    @pytest.mark.parametrize("values", [[], [1.0]])
    def test_refuses_too_few_values(self, values):
        message = rf"A solution of K steps has K \+ 1 values, so at least two, got {len(values)}\."
        with pytest.raises(ValueError, match=message):
            step_advantages(values)

    @pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
    def test_refuses_what_is_no_probability(self, value):
        with pytest.raises(ValueError, match=rf"must lie in \[0, 1\], got {value}\."):
            step_advantages([0.5, value, 1.0])


class TestAdvantageGap:
    def test_by_hand(self):
        assert advantage_gap([0.25, -0.5, 0.125]) == 0.75
        assert advantage_gap([-0.25]) == 0
        assert type(advantage_gap(np.array([0.0, 1.0]))) is float


class TestAdvantageErrors:
    def test_by_hand(self):
        """
        Sampled 3 and 1 times, the advantages are (V_1 - V_2) / 4 and 3 (V_2 - V_1) / 4. With errors 0.3 and 0.4 of the
        values the difference has error 0.5.
        """
        assert advantage_errors([0.3, 0.4], counts=[3, 1]) == pytest.approx([0.125, 0.375])
        assert advantage_errors([0.3, 0.4]) == pytest.approx([0.25, 0.25])

    @pytest.mark.parametrize("seed", range(20))
    def test_equals_loop(self, seed):
        errors, counts = random_siblings(seed)
        assert advantage_errors(errors, counts).tolist() == pytest.approx(
            reference.advantage_errors(errors, counts), rel=1e-12
        )

    @pytest.mark.parametrize("size", [2, 3, 8])
    def test_equal_errors(self, size):
        """Of C candidates alike the mean takes a share 1 / C of the variance away."""
        expected = 0.2 * math.sqrt(1 - 1 / size)
        assert advantage_errors([0.2] * size).tolist() == pytest.approx([expected] * size)

    def test_limits(self):
        """Nothing unknown, no error; a candidate that is nearly all samples is nearly the mean, and has none either."""
        assert advantage_errors([0.0, 0.0, 0.0], [1, 2, 3]).tolist() == [0, 0, 0]
        often, once = advantage_errors([0.3, 0.0], [10**9, 1])
        assert often == pytest.approx(0, abs=1e-9)
        assert once == pytest.approx(0.3)

    def test_is_the_spread_of_advantages(self):
        """Over many draws of the values around the truth."""
        rng = np.random.default_rng(0)
        errors, counts = np.array([0.02, 0.05, 0.01]), [4, 1, 2]
        drawn = 0.5 + errors * rng.normal(size=(20000, 3))
        spread = np.std([sibling_advantages(values, counts) for values in drawn], axis=0)
        np.testing.assert_allclose(advantage_errors(errors, counts), spread, rtol=0.03)

    @pytest.mark.parametrize("error", [-0.1, math.nan, math.inf])
    def test_refuses_what_is_no_error(self, error):
        with pytest.raises(ValueError, match=f"Standard errors must be 0 or more and finite, got {error}"):
            advantage_errors([0.1, error])

    def test_refuses_other_lengths(self):
        with pytest.raises(ValueError, match="`errors` and `counts` must have the same length, got 2 and 3"):
            advantage_errors([0.1, 0.1], [1, 1, 1])


class TestReliabilities:
    def test_by_hand(self):
        """Mean squares 0.25 and (0.09 + 0.25) / 2 = 0.17: the truth has variance 0.08, or 0.25 of posterior means."""
        advantages, errors = [0.5, -0.5], [0.3, 0.5]
        assert reliabilities(advantages, errors) == pytest.approx([0.08 / 0.17, 0.08 / 0.33])
        assert reliabilities(advantages, errors, posterior=True) == pytest.approx([0.25 / 0.34, 0.5])

    @pytest.mark.parametrize("posterior", [False, True])
    @pytest.mark.parametrize("seed", range(10))
    def test_equals_loop(self, seed, posterior):
        rng = random.Random(seed)
        advantages = [rng.uniform(-1, 1) for _ in range(12)]
        errors = [rng.uniform(0, 0.5) for _ in advantages]
        assert reliabilities(advantages, errors, posterior).tolist() == pytest.approx(
            reference.reliabilities(advantages, errors, posterior), rel=1e-12
        )

    @pytest.mark.parametrize("posterior", [False, True])
    def test_limits(self, posterior):
        """Without error 1; alike for errors alike; and the same whatever advantages are counted in."""
        advantages = [0.4, -0.1, -0.3]
        assert reliabilities(advantages, [0.0] * 3, posterior).tolist() == [1, 1, 1]
        assert len(set(reliabilities(advantages, [0.1] * 3, posterior).tolist())) == 1
        errors = np.array([0.0, 0.1, 0.2])
        found = reliabilities(advantages, errors, posterior)
        assert found[0] == 1 > found[1] > found[2] > 0
        np.testing.assert_allclose(reliabilities(np.multiply(advantages, 7), 7 * errors, posterior), found)

    @pytest.mark.parametrize("noise", [0.05, 0.3])
    def test_both_kinds_are_one(self, noise):
        """
        Advantages with noise, shrunk by their reliability r, are posterior means with variance tau^2 (1 - r): those
        have the same reliability.
        """
        advantages = np.array([0.6, -0.2, -0.4])
        with_noise = reliabilities(advantages, [noise] * 3)
        signal = np.mean(advantages**2) - noise**2
        errors = np.sqrt(signal * (1 - with_noise))
        np.testing.assert_allclose(reliabilities(with_noise * advantages, errors, posterior=True), with_noise)

    def test_nothing_but_noise(self):
        """Errors that explain more than there is: still positive, and smaller where the error is larger."""
        found = reliabilities([0.1, -0.1], [0.3, 0.6])
        assert found == pytest.approx([1e-4 / (1e-4 + 0.09), 1e-4 / (1e-4 + 0.36)])
        assert (reliabilities([0.0, 0.0], [0.1, 0.0]) > 0).all()

    def test_is_the_squared_correlation_with_the_truth(self):
        """Of both kinds of estimates."""
        rng = np.random.default_rng(0)
        truth, noise = 0.2 * rng.normal(size=200_000), 0.3
        estimates = truth + noise * rng.normal(size=truth.size)
        share = 0.2**2 / (0.2**2 + noise**2)
        posterior = share * estimates
        for given, error, kind in (
            (estimates, noise, False),
            (posterior, 0.2 * math.sqrt(1 - share), True),
        ):
            found = reliabilities(given, np.full(truth.size, error), kind)[0]
            assert found == pytest.approx(np.corrcoef(given, truth)[0, 1] ** 2, rel=0.02)

    @pytest.mark.parametrize(
        ("advantages", "errors", "message"),
        [
            ([0.1, 0.2], [0.1], "Every advantage needs an error"),
            ([], [], "Every advantage needs an error"),
            ([0.1, math.nan], [0.1, 0.1], "must be finite"),
            ([0.1, 0.1], [0.1, -0.1], "errors 0 or more"),
        ],
    )
    def test_refusals(self, advantages, errors, message):
        with pytest.raises(ValueError, match=message):
            reliabilities(advantages, errors)


class TestWithTrueRewards:
    def test_by_hand(self):
        """Only what ends the solution is replaced, a reward of 0 included."""
        assert with_true_rewards([0.9, 0.8, 0.7], [None, 0.0, 1.0]) == [0.9, 0.0, 1.0]
        assert with_true_rewards([0.9, 0.8], None) == [0.9, 0.8]

    def test_refuses_other_lengths(self):
        with pytest.raises(ValueError, match="`values` and `rewards` must have the same length, got 2 and 1"):
            with_true_rewards([0.9, 0.8], [None])


class TestAddAdvantages:
    def test_by_hand(self):
        """
        First row: the terminal candidate counts as 0 and was sampled 3 times, so the mean is (1 + 3 * 0) / 4. Second
        row: values 1/2 and 1, sampled once each; mean 3/4.
        """
        dataset = Dataset.from_dict(
            {
                "candidates": [["x", "y"], ["x", "y"]],
                "values": [[1.0, 0.75], [0.5, 1.0]],
                "rewards": [[None, 0.0], [None, None]],
                "counts": [[1, 3], [1, 1]],
            }
        )
        added = add_advantages(dataset)
        assert added["advantages"][:] == [[0.75, -0.25], [-0.25, 0.25]]
        assert added.remove_columns("advantages").to_dict() == dataset.to_dict()
        assert "advantages" not in dataset.column_names

    @pytest.mark.parametrize("with_counts", [False, True])
    def test_equals_loop(self, with_counts):
        siblings = [random_siblings(seed) for seed in range(10)]
        columns = {"values": [values for values, _ in siblings]}
        columns |= {"counts": [counts for _, counts in siblings]} if with_counts else {}
        expected = [
            reference.sibling_advantages(values, counts if with_counts else [1] * len(values))
            for values, counts in siblings
        ]
        for advantages, row in zip(add_advantages(Dataset.from_dict(columns))["advantages"], expected, strict=True):
            assert advantages == pytest.approx(row, abs=1e-15)

    def test_other_column_replaces_old_advantages(self):
        """Advantages of the critic take the place of those of Monte Carlo values; both columns of values stay."""
        dataset = add_advantages(Dataset.from_dict({"values": [[1.0, 0.0]], "critic_values": [[0.25, 0.75]]}))
        assert dataset[0]["advantages"] == [0.5, -0.5]
        dataset = add_advantages(dataset, values="critic_values")
        assert dataset[0] == {"values": [1.0, 0.0], "critic_values": [0.25, 0.75], "advantages": [-0.25, 0.25]}

    def test_errors_by_hand(self):
        """
        The candidate that ends the solution has its reward, without error. Values 1 and 0, sampled once each, the first
        with error 0.4: advantages 1/2 and -1/2 with error 0.2; of the spread 0.25 then 0.04 are noise.
        """
        row = {"critic_values": [1.0, 0.8], "errors": [0.4, 0.3], "rewards": [None, 0.0]}
        added = add_advantages(Dataset.from_list([row]), "critic_values", "errors")[0]
        assert added["advantages"] == [0.5, -0.5]
        assert added["advantage_errors"] == pytest.approx([0.2, 0.2])
        assert added["reliabilities"] == pytest.approx([0.84, 0.84])
        added = add_advantages(Dataset.from_list([row]), "critic_values", "errors", posterior=True)[0]
        assert added["reliabilities"] == pytest.approx([0.25 / 0.29] * 2)

    def test_the_signal_is_that_of_all_rows(self):
        rows = [{"values": [1.0, 0.0], "errors": [0.1, 0.1]}, {"values": [0.5, 0.5], "errors": [0.1, 0.2]}]
        added = add_advantages(Dataset.from_list(rows), errors="errors")
        flat = [[number for row in added[name] for number in row] for name in ("advantages", "advantage_errors")]
        expected = reliabilities(*flat).tolist()
        assert [*added[0]["reliabilities"], *added[1]["reliabilities"]] == pytest.approx(expected)

    def test_other_advantages_have_other_errors(self):
        """What is known of the old ones does not stay beside the new."""
        rows = Dataset.from_list([{"values": [1.0, 0.0], "critic_values": [0.5, 0.0], "errors": [0.1, 0.1]}])
        added = add_advantages(rows, errors="errors")
        assert {"advantage_errors", "reliabilities"} <= set(added.column_names)
        again = add_advantages(added, "critic_values")
        assert set(again.column_names) == {*rows.column_names, "advantages"}

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"rewards": [[None, 0.0]] * 2}, "The data set has no column 'errors'"),
            ({"errors": [[0.1, 0.1], [0.1, -0.1]]}, "Row 1, column 'errors': Standard errors must be 0 or more"),
            ({"errors": [[0.1, 0.1], [0.1]]}, "Row 1: there are 1 standard errors of 2 candidates"),
            ({"errors": [[0.1], [0.1, 0.1]], "counts": [[1, 1]] * 2}, "Row 0, column 'errors': `errors` and `counts`"),
        ],
    )
    def test_bad_errors_are_named(self, columns, message):
        with pytest.raises(ValueError, match=message):
            add_advantages(Dataset.from_dict({"values": [[1.0, 0.0]] * 2} | columns), errors="errors")

    def test_refuses_solution_rows(self):
        """Values along a solution are not those of candidates: comparing them with each other would be wrong."""
        rows = Dataset.from_dict({"completions": [["a", "b"]], "values": [[0.5, 0.5, 1.0]]})
        with pytest.raises(ValueError, match="these are solution rows"):
            add_advantages(rows)

    def test_refuses_a_missing_column(self):
        message = r"The data set has no column 'critic_values' to compute advantages from, only \['values'\]"
        with pytest.raises(ValueError, match=message):
            add_advantages(Dataset.from_dict({"values": [[1.0, 0.0]]}), values="critic_values")

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"values": [[1.0, 0.0], [1.0]]}, "a state needs at least two, got 1"),
            ({"values": [[1.0, 0.0], [1.0, 2.0]]}, r"must lie in \[0, 1\], got 2.0"),
            ({"values": [[1.0, 0.0]] * 2, "counts": [[1, 1], [1]]}, "`values` and `counts` must have the same length"),
            ({"values": [[1.0, 0.0]] * 2, "counts": [[1, 1], [1, 0]]}, "`counts` must be at least 1"),
            ({"values": [[1.0, 0.0]] * 2, "rewards": [[1.0, 0.0], [1.0]]}, "`values` and `rewards` must have the same"),
        ],
    )
    def test_errors_name_the_row(self, columns, message):
        with pytest.raises(ValueError, match=rf"Row 1, column 'values': .*{message}"):
            add_advantages(Dataset.from_dict(columns))
