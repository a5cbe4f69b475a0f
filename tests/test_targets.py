"""
`targets.py`: which targets exceed certainty, and what a trainer says of them.
"""

import logging
import math
import random

import numpy as np
import pytest
from datasets import Dataset

import reference
from conftest import make_policy, random_state_rows
from dapo_trl import DAPOTrainer
from dapo_trl.targets import excess_nats, gaussian_excess, log_partition, reachable_beta
from test_dapo_trainer import config


def random_pairs(number: int, seed: int = 0) -> tuple[list[float], list[float]]:
    rng = random.Random(seed)
    return [rng.uniform(-1, 1) for _ in range(number)], [-rng.expovariate(0.1) for _ in range(number)]


def test_excess_by_hand():
    """0.3 / 0.1 = 3 nats: one more than the reference leaves at log-probability -2, none at -3, and -5 is a target."""
    np.testing.assert_allclose(excess_nats([0.3, 0.3, -0.3], [-2.0, -3.0, -2.0], 0.1), [1.0, 0.0, 0.0], atol=1e-15)


def test_excess_equals_a_loop():
    """One pair after the other: the log of a probability above 1."""
    advantages, ref_logps = random_pairs(200)
    for beta in (0.01, 0.1, 1.0):
        expected = [max(a / beta + logp, 0.0) for a, logp in zip(advantages, ref_logps, strict=True)]
        assert excess_nats(advantages, ref_logps, beta).tolist() == pytest.approx(expected)


def test_excess_vanishes_with_beta():
    """With beta large every target is the reference itself; with beta small only the signs count."""
    advantages, ref_logps = random_pairs(200)
    assert not excess_nats(advantages, ref_logps, 1e9).any()
    assert ((excess_nats(advantages, ref_logps, 1e-9) > 0) == (np.array(advantages) > 0)).all()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3])
def test_reachable_beta_is_the_smallest(share):
    """At the given beta no more pairs than the share exceed certainty; just below it more do."""
    advantages, ref_logps = random_pairs(200)
    beta = reachable_beta(advantages, ref_logps, share)
    assert (excess_nats(advantages, ref_logps, beta * (1 + 1e-9)) > 0).mean() <= share
    assert (excess_nats(advantages, ref_logps, beta * (1 - 1e-6)) > 0).mean() > share


def test_a_step_that_is_certain_can_gain_nothing():
    assert reachable_beta([0.5, -0.5], [0.0, -1.0]) == math.inf
    assert reachable_beta([-0.5, 0.0], [0.0, 0.0]) == 0.0


def test_trainer_warns_with_numbers(tmp_path, tokenizer, caplog):
    """Counted in the report at any beta, and said aloud if they are many; the beta that is advised is enough."""
    rows = Dataset.from_list(random_state_rows(6))

    def train_with(beta):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trainer = DAPOTrainer(make_policy(), None, config(tmp_path, beta=beta), None, rows, None, tokenizer)
        pairs = [
            (advantage, logp)
            for row in trainer.train_dataset
            for advantage, logp in zip(row["advantages"], row["ref_logps"], strict=True)
        ]
        expected = sum(advantage / beta + logp > 0 for advantage, logp in pairs)
        assert trainer.preprocessing_report["train"]["targets_unreachable"] == expected
        return expected, len(pairs)

    beyond, total = train_with(0.001)
    assert (
        f"`beta=0.001` asks {beyond} of {total} pairs ({beyond / total:.0%}) for a probability above 1" in caplog.text
    )
    advised = float(caplog.text.split("With `beta=")[1].split("`")[0])
    assert train_with(advised * 1.1)[0] <= 0.05 * total
    assert "probability above 1" not in caplog.text


class TestLogPartition:
    def test_by_hand(self):
        """
        Advantages 1/4 and -3/4, sampled three times and once, at beta = 1/4: targets 1 and -3, mean 0, variance
        (3 * 1 + 9) / 4 = 3. The log of (3 e + e^-3) / 4; the Gaussian form 0 + 3/2.
        """
        expected = math.log((3 * math.e + math.exp(-3)) / 4)
        assert log_partition([0.25, -0.75], 0.25, [3, 1]) == pytest.approx(expected, rel=1e-14)
        assert log_partition([0.25, -0.75], 0.25, [3, 1], "gaussian") == pytest.approx(1.5, rel=1e-14)

    @pytest.mark.parametrize("kind", ["sample", "gaussian"])
    @pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
    def test_equals_loop(self, kind, beta):
        rng = random.Random(0)
        for _ in range(50):
            size = rng.randint(1, 6)
            advantages, counts = [rng.uniform(-1, 1) for _ in range(size)], [rng.randint(1, 5) for _ in range(size)]
            expected = reference.log_partition(advantages, beta, counts, kind)
            assert log_partition(advantages, beta, counts, kind) == pytest.approx(expected, rel=1e-10, abs=1e-12)

    def test_limits(self):
        """
        Large beta: both are the mean of A / beta, 0 here, and differ by the third cumulant, which vanishes as beta^-3.
        Small beta: the largest target, less the log of how rare it is; the Gaussian form grows as beta^-2.
        """
        advantages, counts = [0.3, -0.1, -0.1], [1, 2, 1]
        differences = [
            log_partition(advantages, beta, counts) - log_partition(advantages, beta, counts, "gaussian")
            for beta in (5.0, 10.0)
        ]
        assert differences[0] / differences[1] == pytest.approx(8, rel=0.02)
        assert log_partition(advantages, 1e6, counts) == pytest.approx(0, abs=1e-12)
        assert log_partition(advantages, 1e-3, counts) == pytest.approx(300 + math.log(1 / 4), abs=1e-9)
        assert log_partition(advantages, 1e-3, counts, "gaussian") == pytest.approx(0.03 / 2e-6, rel=1e-9)

    def test_a_shift_of_all_is_a_shift(self):
        """log E exp((A + c) / beta) = log E exp(A / beta) + c / beta: targets less it have no baseline."""
        for kind in ("sample", "gaussian"):
            moved = log_partition([0.75, 0.25], 0.1, [1, 3], kind)
            assert moved - log_partition([0.5, 0.0], 0.1, [1, 3], kind) == pytest.approx(2.5, rel=1e-12)

    def test_equal_advantages_have_none(self):
        assert log_partition([0.0, 0.0], 0.01) == 0.0
        assert log_partition([0.2], 0.1, [7], "gaussian") == pytest.approx(2.0)

    def test_gaussian_is_exact_for_a_normal_distribution(self):
        """A hundred thousand samples of standard deviation 0.3 at beta = 0.3: log Z = 1/2."""
        advantages = 0.3 * np.random.default_rng(0).standard_normal(100_000)
        assert log_partition(advantages, 0.3) == pytest.approx(0.5, abs=0.02)
        assert log_partition(advantages, 0.3, kind="gaussian") == pytest.approx(0.5, abs=0.01)

    def test_gaussian_excess_of_two_begins_at_a_quarter_of_their_gap(self):
        for gap in (0.1, 0.5, 1.0):
            advantages = [gap / 2, -gap / 2]
            assert gaussian_excess(advantages, 1.001 * gap / 4) == 0.0
            assert gaussian_excess(advantages, 0.999 * gap / 4) > 0.0

    def test_refuses(self):
        for arguments, message in (
            (([0.5], 0.1, None, "mean"), "`kind` must be"),
            (([0.5], 0.0), "`beta` must be positive"),
            (([], 0.1), "Every candidate needs"),
            (([0.5, 0.1], 0.1, [1]), "Every candidate needs"),
        ):
            with pytest.raises(ValueError, match=message):
                log_partition(*arguments)
