"""
Diagnostics of the critic, and the ratios that the trainers log: by hand, against slow loops, in their limits.
"""

import itertools
import math
import random

import numpy as np
import pytest
import torch

import reference
from dapo_trl.diagnostics import binary_cross_entropy, critic_metrics, expected_calibration_error, sibling_ranking
from dapo_trl.metrics import RatioMetrics


def random_critic(num_states: int = 50, seed: int = 0) -> tuple[list[float], list[int], list[int]]:
    """Values, and counts of 0 to n successes in n = 1 to 16 rollouts."""
    rng = random.Random(seed)
    values = [rng.uniform(0.01, 0.99) for _ in range(num_states)]
    rollouts = [rng.randint(1, 16) for _ in range(num_states)]
    return values, [rng.randint(0, n) for n in rollouts], rollouts


def entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


class TestCriticMetrics:
    def test_by_hand(self):
        """
        A state of value 3/4 has 2 successes in 4 rollouts, one of value 1/4 has 0 in 2. Of 6 outcomes the first four
        cost 2 log(4/3) + 2 log 4, the other two 2 log(4/3); with log(4/3) = 2 log 2 - log 3 that is 12 log 2 - 4 log 3
        in all. The mean outcome is 1/3, of entropy log 3 - (2/3) log 2. Squared errors are 2/16 + 2 * 9/16 + 2/16 =
        22/16. Both values lie 1/4 above their mean outcomes, in bins of their own.
        """
        metrics = critic_metrics([0.75, 0.25], successes=[2, 0], rollouts=[4, 2])
        bce, bce_constant = 2 * math.log(2) - 2 / 3 * math.log(3), math.log(3) - 2 / 3 * math.log(2)
        assert metrics == pytest.approx(
            {
                "bce": bce,
                "bce_constant": bce_constant,
                "skill": 1 - bce / bce_constant,
                "brier": 22 / 16 / 6,
                "calibration_error": 0.25,
            },
            rel=1e-12,
        )

    @pytest.mark.parametrize("seed", range(10))
    def test_equals_loop(self, seed):
        critic = random_critic(seed=seed)
        assert critic_metrics(*critic) == pytest.approx(reference.critic_metrics(*critic), rel=1e-9)

    def test_states_may_be_cut_into_outcomes(self):
        """Counts are a short form: one state of n rollouts, or n states of one rollout each, are the same data."""
        values, successes, rollouts = random_critic()
        outcomes = [float(j < k) for k, n in zip(successes, rollouts, strict=True) for j in range(n)]
        cut = critic_metrics(np.repeat(values, rollouts), outcomes, np.ones(len(outcomes)))
        assert critic_metrics(values, successes, rollouts) == pytest.approx(cut, rel=1e-9)

    def test_the_constant_has_no_skill(self):
        """The mean outcome everywhere: skill 0, no calibration error, and both other scores are those of a coin."""
        _, successes, rollouts = random_critic()
        mean = sum(successes) / sum(rollouts)
        metrics = critic_metrics([mean] * 50, successes, rollouts)
        assert metrics["skill"] == pytest.approx(0, abs=1e-12)
        assert metrics["calibration_error"] == pytest.approx(0, abs=1e-12)
        assert metrics["bce"] == pytest.approx(entropy(mean), rel=1e-12)
        assert metrics["brier"] == pytest.approx(mean * (1 - mean), rel=1e-12)

    def test_the_mean_outcomes_have_the_most_skill(self):
        """Values k/n: the Brier score is the variance within states, and any other values score worse."""
        values, successes, rollouts = random_critic()
        targets = [k / n for k, n in zip(successes, rollouts, strict=True)]
        best = critic_metrics(targets, successes, rollouts)
        variance = np.average([t * (1 - t) for t in targets], weights=rollouts)
        assert best["brier"] == pytest.approx(variance, rel=1e-12)
        assert best["calibration_error"] == pytest.approx(0, abs=1e-12)
        assert best["bce"] < best["bce_constant"] and 0 < best["skill"] < 1
        worse = critic_metrics([0.9 * t + 0.1 * v for t, v in zip(targets, values, strict=True)], successes, rollouts)
        assert worse["bce"] > best["bce"] and worse["brier"] > best["brier"] and worse["skill"] < best["skill"]

    def test_a_critic_that_is_wrong_has_negative_skill(self):
        metrics = critic_metrics([0.1, 0.9], successes=[9, 1], rollouts=[10, 10])
        assert metrics["skill"] < 0
        assert metrics["calibration_error"] == pytest.approx(0.8)

    def test_certain_values_stay_finite(self):
        """Values of 0 and 1 are moved by 1e-7: certain and right is free, certain and wrong costs log(1e7) nats."""
        assert critic_metrics([0.0, 1.0], [0, 5], [5, 5])["skill"] == pytest.approx(1, abs=1e-6)
        assert critic_metrics([1.0, 0.0], [0, 5], [5, 5])["bce"] == pytest.approx(7 * math.log(10), rel=1e-6)

    @pytest.mark.parametrize("outcome", [0, 1])
    def test_no_skill_where_nothing_is_to_be_predicted(self, outcome):
        """All outcomes alike: the constant is perfect, its cross-entropy 0; skill would divide by it and reads 0."""
        metrics = critic_metrics([0.3, 0.4], [4 * outcome, 4 * outcome], [4, 4])
        assert metrics["bce_constant"] == 0
        assert metrics["skill"] == 0

    def test_refuses_other_lengths(self):
        with pytest.raises(ValueError, match="Lengths differ: 2 values, 2 successes, 1 rollouts"):
            critic_metrics([0.5, 0.5], [1, 1], [2])

    @pytest.mark.parametrize("rollouts", [0, -1, math.nan])
    def test_refuses_a_state_without_rollout(self, rollouts):
        with pytest.raises(ValueError, match="Every state needs at least one rollout"):
            critic_metrics([0.5, 0.5], [1, 0], [2, rollouts])


class TestBinaryCrossEntropy:
    def test_by_hand(self):
        """-log(1/4) once and -log(3/4) / 2 - log(1/4) / 2 with weight 2: (2 log 2 + 4 log 2 - log 3) / 3."""
        loss = binary_cross_entropy(np.array([0.25, 0.75]), np.array([1.0, 0.5]), np.array([1.0, 2.0]))
        assert loss == pytest.approx((6 * math.log(2) - math.log(3)) / 3, rel=1e-14)

    def test_of_the_target_itself_is_the_entropy(self):
        p = np.linspace(0.1, 0.9, 9)
        expected = np.mean([entropy(x) for x in p])
        assert binary_cross_entropy(p, p, np.ones(9)) == pytest.approx(expected, rel=1e-14)


class TestExpectedCalibrationError:
    def test_by_hand(self):
        """
        Five bins. 0.1 and 0.15 share the first, where the errors 0.1 - 0.4 and 0.15 - 0 cancel in part: weights 1 and 1
        give |-0.3 + 0.15| = 0.15. 0.5 is alone with weight 2: |0.5 - 1| * 2 = 1. In all 1.15 / 4.
        """
        error = expected_calibration_error(
            np.array([0.1, 0.15, 0.5]), np.array([0.4, 0.0, 1.0]), np.array([1.0, 1.0, 2.0]), num_bins=5
        )
        assert error == pytest.approx(1.15 / 4, rel=1e-12)

    @pytest.mark.parametrize("num_bins", [1, 2, 5, 10, 16])
    @pytest.mark.parametrize("seed", range(5))
    def test_equals_loop(self, seed, num_bins):
        values, successes, _ = random_critic(seed=seed)
        outcomes = [float(k % 2) for k in successes]
        error = expected_calibration_error(np.array(values), np.array(outcomes), np.ones(50), num_bins)
        assert error == pytest.approx(reference.expected_calibration_error(values, outcomes, num_bins), rel=1e-9)

    def test_edges(self):
        """A value on an edge opens the bin above it; 1 belongs to the last bin."""
        values, targets = np.array([0.5, 0.6, 0.9, 1.0]), np.array([1.0, 0.1, 1.0, 0.9])
        error = expected_calibration_error(values, targets, np.ones(4))
        assert error == pytest.approx((0.5 + 0.5 + abs(-0.1 + 0.1)) / 4, rel=1e-12)

    def test_one_bin_is_the_bias(self):
        values, targets = np.array([0.9, 0.2, 0.4]), np.array([0.0, 1.0, 0.3])
        assert expected_calibration_error(values, targets, np.ones(3), 1) == pytest.approx(0.2 / 3, rel=1e-12)


class TestSiblingRanking:
    def test_by_hand(self):
        """
        First state: the reference 2 > 1 > 0 tells three pairs apart; the prediction orders (0.9, 0.1) and (0.9, 0.5)
        alike and (0.1, 0.5) the other way. Second state: a reference tie is left out, and a predicted tie is a half, so
        1/2 + 1 of its two pairs. In all 3.5 of 5.
        """
        share, pairs = sibling_ranking([[0.9, 0.1, 0.5], [0.4, 0.4, 0.3]], [[2, 1, 0], [1, 0, 0]])
        assert (share, pairs) == (0.7, 5)

    @pytest.mark.parametrize("seed", range(10))
    def test_equals_loop(self, seed):
        """Few different values, so that ties of all kinds occur."""
        rng = random.Random(seed)
        sizes = [rng.randint(1, 6) for _ in range(30)]
        predicted, expected = ([[rng.randint(0, 4) / 4 for _ in range(size)] for size in sizes] for _ in range(2))
        slow = reference.sibling_ranking(predicted, expected)
        assert sibling_ranking(predicted, expected) == pytest.approx(slow, rel=1e-12)

    def test_close_pairs_can_be_left_out(self):
        """Of the differences 0.3, 0.2 and 0.1, only the first is at least 0.25: that pair is ordered alike."""
        assert sibling_ranking([[0.9, 0.1, 0.0]], [[0.5, 0.2, 0.3]], min_difference=0.25) == (1.0, 1)

    @pytest.mark.parametrize(
        ("values", "successes", "rollouts", "message"),
        [
            ([0.5, 1.5], [1, 1], [2, 2], r"1 states have no value in \[0, 1\]; state 1 is the first, with value 1.5"),
            ([float("nan")], [1], [2], "have no value"),
            ([0.5], [3], [2], "3 successes and 2 rollouts"),
            ([0.5], [float("nan")], [2], "from 0 to all of their rollouts"),
            ([], [], [], "no state to judge"),
        ],
    )
    def test_bad_numbers(self, values, successes, rollouts, message):
        with pytest.raises(ValueError, match=message):
            critic_metrics(values, successes, rollouts)

    def test_limits(self):
        """The reference itself ranks perfectly, its reverse never, a constant is chance; only the order counts."""
        rng = random.Random(0)
        expected = [[rng.random() for _ in range(4)] for _ in range(20)]
        predicted = [[rng.random() for _ in range(4)] for _ in range(20)]
        assert sibling_ranking(expected, expected) == (1.0, 120)
        assert sibling_ranking([[-v for v in row] for row in expected], expected) == (0.0, 120)
        assert sibling_ranking([[0.3] * 4] * 20, expected) == (0.5, 120)
        share, _ = sibling_ranking(predicted, expected)
        assert sibling_ranking([[math.exp(5 * v) for v in row] for row in predicted], expected)[0] == share
        assert sibling_ranking([[-v for v in row] for row in predicted], expected)[0] == pytest.approx(1 - share)

    def test_against_right_and_wrong_it_is_the_area_under_the_roc_curve(self):
        """One state whose candidates are right or wrong: the area under the curve, from its points, by trapezoids."""
        rng = random.Random(0)
        outcomes = [rng.randint(0, 1) for _ in range(200)]
        scores = [rng.randint(0, 20) + 3 * outcome for outcome in outcomes]
        rights, wrongs = sum(outcomes), len(outcomes) - sum(outcomes)
        points = [(0.0, 0.0)]
        for threshold in sorted(set(scores), reverse=True):
            above = [outcome for score, outcome in zip(scores, outcomes, strict=True) if score >= threshold]
            points.append(((len(above) - sum(above)) / wrongs, sum(above) / rights))
        area = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(points))
        share, pairs = sibling_ranking([scores], [outcomes])
        assert (share, pairs) == (pytest.approx(area, rel=1e-12), rights * wrongs)
        assert 0.5 < share < 1

    @pytest.mark.parametrize(("predicted", "expected"), [([], []), ([[0.5]], [[1.0]]), ([[0.1, 0.9]], [[0.5, 0.5]])])
    def test_nothing_to_rank(self, predicted, expected):
        share, pairs = sibling_ranking(predicted, expected)
        assert math.isnan(share) and pairs == 0

    def test_refuses_other_candidates(self):
        with pytest.raises(ValueError, match="State 1 has 2 predicted and 3 reference values"):
            sibling_ranking([[0.1, 0.2], [0.1, 0.2]], [[0, 1], [0, 1, 2]])
        with pytest.raises(ValueError, match="zip"):
            sibling_ranking([[0.1, 0.2]], [[0, 1], [0, 1]])


class TwoProcesses:
    """Stands for an accelerator of two processes, of which the other one has collected the same sums times `factor`."""

    device = torch.device("cpu")

    def __init__(self, factor: float = 0.0):
        self.factor = factor
        self.calls = 0

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        self.calls += 1
        return tensor * (1 + self.factor)


class TestRatioMetrics:
    def test_mean_over_pairs_not_over_batches(self):
        """Batches of 3 of 4 and 0 of 1 are 3 of 5; the mean of their means would be 3/8."""
        metrics = RatioMetrics()
        metrics.add("accuracy", torch.tensor(3.0), torch.tensor(4))
        metrics.add("accuracy", torch.tensor(0.0), torch.tensor(1))
        metrics.add("loss", torch.tensor(1.0, requires_grad=True), torch.tensor(2.0))
        assert metrics.pop(TwoProcesses()) == {"accuracy": 0.6, "loss": 0.5}

    def test_splitting_changes_nothing(self):
        """Sums are kept in float64: 10,000 small parts of a sum give the whole to 12 digits."""
        generator = torch.Generator().manual_seed(0)
        terms = torch.rand(10_000, generator=generator)
        metrics = RatioMetrics()
        for term in terms:
            metrics.add("mean", term, torch.tensor(1.0))
        assert metrics.pop(TwoProcesses())["mean"] == pytest.approx(terms.double().mean().item(), rel=1e-12)

    def test_pop_forgets(self):
        metrics = RatioMetrics()
        metrics.add("x", torch.tensor(1.0), torch.tensor(1.0))
        metrics.pop(TwoProcesses())
        assert metrics.pop(TwoProcesses()) == {}
        metrics.add("x", torch.tensor(3.0), torch.tensor(1.0))
        assert metrics.pop(TwoProcesses()) == {"x": 3.0}

    def test_zero_denominators_are_left_out(self):
        """No positive action in any batch: there is no mean over positive actions, and no NaN in the log."""
        metrics = RatioMetrics()
        metrics.add("positive", torch.tensor(0.0), torch.tensor(0.0))
        metrics.add("negative", torch.tensor(-1.0), torch.tensor(4.0))
        assert metrics.pop(TwoProcesses()) == {"negative": -0.25}

    def test_sums_over_processes(self):
        """Numerators and denominators are summed before they are divided, in one message for all metrics."""
        metrics, accelerator = RatioMetrics(), TwoProcesses(factor=2.0)
        for name in "xyz":
            metrics.add(name, torch.tensor(1.0), torch.tensor(8.0))
        assert metrics.pop(accelerator) == {"x": 0.125, "y": 0.125, "z": 0.125}
        assert accelerator.calls == 1
