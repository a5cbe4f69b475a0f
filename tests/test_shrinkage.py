"""
`shrinkage.py`: a critic's values as a prior for counts.
"""

import math

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from dapo_trl.advantages import add_advantages
from dapo_trl.shrinkage import (
    add_critic_errors,
    add_monte_carlo_errors,
    add_shrinkage_values,
    fit_prior_strength,
    fit_strength,
    monte_carlo_estimates,
    shrinkage_values,
)
from dapo_trl.values import monte_carlo_values


def drawn(seed, num_states=4000, strength=8.0, rollouts=8, noise=0.0):
    """True values around the critic's, and rollouts of them."""
    rng = np.random.default_rng(seed)
    prior = rng.uniform(0.05, 0.95, num_states)
    truth = rng.beta(strength * prior, strength * (1 - prior))
    n = np.full(num_states, rollouts)
    return truth, rng.binomial(n, truth), n, np.clip(prior + noise * rng.normal(size=num_states), 0, 1)


class TestValues:
    @given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.floats(0, 1)), min_size=1, max_size=8))
    def test_between_the_critic_and_the_rollouts(self, states):
        k, extra, v = (np.array(part, dtype=float) for part in zip(*states, strict=True))
        n = k + extra
        values, errors = shrinkage_values(k, n, v, 3.0)
        clipped = np.clip(v, 0.001, 0.999)
        mean = np.where(n > 0, k / np.maximum(n, 1), clipped)
        assert (values >= np.minimum(mean, clipped) - 1e-12).all()
        assert (values <= np.maximum(mean, clipped) + 1e-12).all()
        assert ((errors > 0) & (errors <= 0.5)).all()

    def test_limits(self):
        k, n, v = [3, 0, 8], [8, 8, 8], [0.9, 0.5, 0.1]
        almost = shrinkage_values(k, n, v, 1e-9).values
        np.testing.assert_allclose(almost, monte_carlo_values(k, n), atol=1e-8)
        np.testing.assert_allclose(shrinkage_values(k, n, v, 1e9).values, v, atol=1e-6)
        np.testing.assert_allclose(shrinkage_values([0] * 3, [0] * 3, v, 2.0).values, v)

    def test_more_rollouts_smaller_error(self):
        errors = [shrinkage_values([n / 2], [n], [0.5], 4.0).errors[0] for n in (0, 2, 8, 32)]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] == pytest.approx(math.sqrt(0.25 / 5))

    def test_error_is_that_of_the_values(self):
        """Where the model holds, errors are honest: the mean squared error is the mean of their squares."""
        truth, k, n, v = drawn(0)
        values, errors = shrinkage_values(k, n, v, 8.0)
        assert np.mean((values - truth) ** 2) == pytest.approx(np.mean(errors**2), rel=0.05)

    def test_beats_both(self):
        truth, k, n, v = drawn(1)

        def error(values):
            return np.mean((values - truth) ** 2)

        both = error(shrinkage_values(k, n, v, fit_prior_strength(k, n, v)).values)
        assert both < 0.6 * min(error(monte_carlo_values(k, n)), error(v))

    def test_monte_carlo(self):
        values, errors = monte_carlo_estimates([0, 1, 8], [1, 1, 16])
        assert values.tolist() == [0.0, 1.0, 0.5]
        assert errors[0] == errors[1] > errors[2] > 0

    def test_monte_carlo_error_by_hand(self):
        """
        A success in one rollout, under a uniform prior: posterior Beta(2, 1), E[V (1 - V)] = 2/3 - 1/2 = 1/6. Four in
        four: Beta(5, 1), 5/6 - 5/7 = 5/42, of four rollouts 5/168.
        """
        errors = monte_carlo_estimates([1, 4], [1, 4]).errors
        assert errors.tolist() == pytest.approx([math.sqrt(1 / 6), math.sqrt(5 / 168)])

    @pytest.mark.parametrize(("mean", "strength"), [(0.5, 2.0), (0.2, 0.8), (0.7, 6.0)])
    def test_monte_carlo_errors_are_honest(self, mean, strength):
        """Where the prior holds, the mean squared error of k/n is the mean of the squares, however few rollouts."""
        rng = np.random.default_rng(0)
        truth = rng.beta(strength * mean, strength * (1 - mean), 40_000)
        for n in (1, 3):
            k = rng.binomial(n, truth)
            values, errors = monte_carlo_estimates(k, np.full(k.size, n), mean, strength)
            assert np.mean(errors**2) == pytest.approx(np.mean((values - truth) ** 2), rel=0.02)


class TestStrength:
    @pytest.mark.parametrize("strength", [1.0, 8.0, 60.0])
    def test_is_found(self, strength):
        _, k, n, v = drawn(2, strength=strength, rollouts=16)
        assert fit_prior_strength(k, n, v) == pytest.approx(strength, rel=0.2)

    def test_is_the_maximum(self):
        """Against the likelihood from gamma functions, on a fine grid."""
        _, k, n, v = drawn(3, num_states=60)
        v = np.clip(v, 0.001, 0.999)

        def beta(a, b):
            return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

        def likelihood(c):
            terms = zip(k.tolist(), n.tolist(), v.tolist(), strict=True)
            return sum(beta(c * p + x, c * (1 - p) + m - x) - beta(c * p, c * (1 - p)) for x, m, p in terms)

        grid = np.geomspace(0.1, 1000, 2001)
        best = grid[np.argmax([likelihood(c) for c in grid])]
        assert fit_prior_strength(k, n, v) == pytest.approx(best, rel=0.02)

    def test_a_worse_critic_counts_less(self):
        strengths = [fit_prior_strength(*drawn(4, noise=noise)[1:]) for noise in (0.0, 0.1, 0.3)]
        assert strengths == sorted(strengths, reverse=True)
        assert strengths[-1] < strengths[0] / 2

    def test_single_rollouts_say_nothing(self):
        _, k, n, v = drawn(5, num_states=200)
        more = (np.append(k, [1, 0]), np.append(n, [1, 1]), np.append(v, [0.01, 0.99]))
        assert fit_prior_strength(*more) == fit_prior_strength(k, n, v)


ROW = {"mc_successes": [4.0, 1.0, 1.0], "mc_rollouts": [4, 4, 1], "critic_values": [0.5, 0.5, 0.5]}


class TestRows:
    def test_advantages(self):
        """The true reward of a candidate that ends the solution is not shrunk."""
        rows = Dataset.from_list([ROW | {"rewards": [None, None, 1.0], "candidates": ["a", "b", "c"]}])
        shrunk = add_advantages(add_shrinkage_values(rows, 4.0), "shrinkage_values")[0]
        assert shrunk["shrinkage_values"] == [0.75, 0.375, 0.6]
        mean = (0.75 + 0.375 + 1) / 3
        assert shrunk["advantages"] == pytest.approx([0.75 - mean, 0.375 - mean, 1 - mean])
        again = add_shrinkage_values(Dataset.from_list([shrunk]), 1e6)[0]
        assert again["shrinkage_values"] == pytest.approx([0.5] * 3, abs=1e-5)

    def test_strength_leaves_out_known_rewards(self):
        rows = [ROW | {"rewards": [None, None, None]}] * 3
        known = ROW | {"mc_successes": [0.0, 8.0, 0.0], "mc_rollouts": [8, 8, 8], "rewards": [0.0, 1.0, 0.0]}
        assert fit_strength(Dataset.from_list([*rows, known])) == fit_strength(Dataset.from_list(rows))

    def test_critic_errors_by_hand(self):
        """sqrt(0.5 * 0.5 / 25) and sqrt(0.2 * 0.8 / 25): the limit of shrinkage without any rollout."""
        rows = Dataset.from_list([{"critic_values": [0.5, 0.2]}])
        (errors,) = add_critic_errors(rows, 24.0)["critic_errors"]
        assert errors == pytest.approx([0.1, 0.08])
        assert errors == pytest.approx(shrinkage_values([0, 0], [0, 0], [0.5, 0.2], 24.0).errors.tolist())

    def test_monte_carlo_prior_is_fitted(self):
        """Values near 0 and 1: one rollout says nearly all. Rewards that are known say nothing about that."""
        rng = np.random.default_rng(1)
        truth = rng.beta(0.1, 0.1, (300, 3))
        n = np.broadcast_to([8, 4, 1], truth.shape)
        rows = [
            {"mc_successes": k.tolist(), "mc_rollouts": m.tolist(), "rewards": [None] * 3}
            for k, m in zip(rng.binomial(n, truth).astype(float), n, strict=True)
        ]
        errors = np.array(add_monte_carlo_errors(Dataset.from_list(rows))["value_errors"])
        values = np.array([row["mc_successes"] for row in rows]) / n
        np.testing.assert_allclose(np.mean(errors**2, axis=0), np.mean((values - truth) ** 2, axis=0), rtol=0.3)
        assert errors[:, 2].mean() < 0.6 * monte_carlo_estimates([1], [1]).errors[0]
        known = {"mc_successes": [8.0, 4.0], "mc_rollouts": [16, 8], "rewards": [1.0, 0.0]}
        more = add_monte_carlo_errors(Dataset.from_list([*rows, known]))["value_errors"]
        assert list(more)[:-1] == errors.tolist()

    @pytest.mark.parametrize("successes", [[0.5, 1.5], [1.0, 2.0]])
    def test_a_prior_that_cannot_be_fitted_is_uniform(self, successes):
        rows = Dataset.from_list([{"mc_successes": successes, "mc_rollouts": [2, 2]}])
        assert (
            add_monte_carlo_errors(rows)[0]["value_errors"] == monte_carlo_estimates(successes, [2, 2]).errors.tolist()
        )

    def test_errors_need_their_columns(self):
        need = "Standard errors need the columns"
        with pytest.raises(ValueError, match=f"{need} 'critic_values'; 'critic_values' are not there"):
            add_critic_errors(Dataset.from_list([{"values": [0.5]}]), 1.0)
        with pytest.raises(ValueError, match=rf"{need} .*; 'mc_rollouts' are not there"):
            add_monte_carlo_errors(Dataset.from_list([{"mc_successes": [0.5]}]))
        with pytest.raises(ValueError, match="Row 1: State 0 has no rollout"):
            add_monte_carlo_errors(Dataset.from_list([{"mc_successes": [0.0], "mc_rollouts": [n]} for n in (1, 0)]))

    def test_weights_bring_noisy_advantages_nearer_to_the_truth(self):
        """
        States with next steps of 8, 4, 2 and 1 rollouts: the error of weighted Monte Carlo advantages is less than half
        that of plain ones. Those from shrinkage are nearest as they are: weights take something away a second time.
        """
        rng = np.random.default_rng(3)
        prior = np.clip(rng.beta(2, 2, (2000, 1)) + 0.1 * rng.normal(size=(2000, 4)), 0.02, 0.98)
        truth, n = rng.beta(6 * prior, 6 * (1 - prior)), np.broadcast_to([8, 4, 2, 1], prior.shape)
        k = rng.binomial(n, truth).astype(float)
        rows = Dataset.from_dict(
            {"mc_successes": k, "mc_rollouts": n, "counts": n, "values": k / n, "critic_values": prior}
        )
        true = truth - np.average(truth, axis=1, weights=n[0])[:, None]

        def errors(rows):
            given, weights = (np.array(rows[name]) for name in ("advantages", "reliabilities"))
            return np.mean((given - true) ** 2), np.mean((weights * given - true) ** 2)

        plain, weighted = errors(add_advantages(add_monte_carlo_errors(rows), "values", "value_errors"))
        assert weighted < 0.5 * plain
        shrunk = add_shrinkage_values(rows, fit_strength(rows))
        plain, weighted = errors(add_advantages(shrunk, "shrinkage_values", "shrinkage_errors", posterior=True))
        assert plain < weighted

    def test_refusals(self):
        rows = Dataset.from_list([ROW])
        for bad in ("critic_values", "mc_rollouts"):
            with pytest.raises(ValueError, match=f"Shrinkage needs the columns .*; '{bad}' are not there"):
                add_shrinkage_values(rows.remove_columns(bad), 1.0)
        worse = Dataset.from_list([ROW, ROW | {"critic_values": [0.5, 2.0, 0.5]}])
        with pytest.raises(ValueError, match="Row 1: State 1 has a value by the critic that is not in"):
            add_shrinkage_values(worse, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [2], [0.5, 0.5]), "Lengths differ"),
        (([3], [2], [0.5]), "State 0 does not have from 0 to all of its rollouts as successes"),
        (([0, 1], [2, 2], [0.5, float("nan")]), r"State 1 has a value by the critic that is not in \[0, 1\]"),
        (([0.5], [2], [0.5]), "State 0 has a success that is none of 0 and 1"),
        (([1, 0], [1, 1], [0.5, 0.5]), "No state has two rollouts or more"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_prior_strength(*arguments)


@pytest.mark.parametrize("strength", [0.0, -1.0, float("inf"), float("nan")])
def test_refused_strengths(strength):
    with pytest.raises(ValueError, match="`strength` must be positive and finite"):
        shrinkage_values([1], [2], [0.5], strength)


def test_no_rollout_no_monte_carlo_value():
    with pytest.raises(ValueError, match="State 1 has no rollout"):
        monte_carlo_estimates([1, 0], [2, 0])
