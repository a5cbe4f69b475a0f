"""
`targets.py`: which targets exceed certainty, and what a trainer says of them.
"""

import logging
import math
import random

import numpy as np
import pytest
from datasets import Dataset

from conftest import make_policy, random_state_rows
from dapo_trl import DAPOTrainer
from dapo_trl.targets import excess_nats, reachable_beta
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
