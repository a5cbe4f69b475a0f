"""
`value_sources.py`: one way from each estimator of values to advantages.
"""

import pytest
from datasets import Dataset

from dapo_trl import add_advantages
from dapo_trl.shrinkage import add_critic_errors, add_monte_carlo_errors, add_shrinkage_values
from dapo_trl.value_sources import advantages_from


STATE = {
    "prompt": "?",
    "prefix": [],
    "candidates": ["a", "b", "c"],
    "counts": [2, 1, 1],
    "values": [0.75, 0.5, 0.0],
    "mc_successes": [3.0, 1.0, 0.0],
    "mc_rollouts": [4, 2, 1],
    "rewards": [None, None, 0.0],
    "critic_values": [0.6, 0.7, 0.4],
}


@pytest.fixture
def states():
    return Dataset.from_list([STATE])


def test_by_hand(states):
    """The last candidate is an end: worth its reward. Means count each as often as it was drawn."""
    found = advantages_from("monte_carlo", states)["advantages"][0]
    assert found == pytest.approx([0.75 - 0.5, 0.5 - 0.5, 0.0 - 0.5])
    found = advantages_from("critic", states)["advantages"][0]
    assert found == pytest.approx([0.6 - 0.475, 0.7 - 0.475, 0.0 - 0.475])
    found = advantages_from("shrinkage", states, 2.0)["advantages"][0]
    shrunk = [(3 + 2 * 0.6) / 6, (1 + 2 * 0.7) / 4, 0.0]
    mean = (2 * shrunk[0] + shrunk[1] + shrunk[2]) / 4
    assert found == pytest.approx([value - mean for value in shrunk])


@pytest.mark.parametrize("source", ["critic", "monte_carlo", "shrinkage"])
def test_errors_and_reliabilities(states, source):
    """The same as of the functions one by one."""
    found = advantages_from(source, states, 2.0)
    one_by_one = {
        "critic": lambda: add_advantages(
            add_critic_errors(states, 2.0), "critic_values", "critic_errors", posterior=True
        ),
        "monte_carlo": lambda: add_advantages(add_monte_carlo_errors(states), "values", "value_errors"),
        "shrinkage": lambda: add_advantages(
            add_shrinkage_values(states, 2.0), "shrinkage_values", "shrinkage_errors", posterior=True
        ),
    }[source]()
    assert found.to_list() == one_by_one.to_list()
    assert "reliabilities" in found.column_names


def test_without_strength(states):
    """A critic's values are there, how far they can be relied on is not known; nothing can be shrunk."""
    assert "reliabilities" not in advantages_from("critic", states).column_names
    with pytest.raises(ValueError, match="`strength` is needed"):
        advantages_from("shrinkage", states)


def test_an_unknown_source(states):
    with pytest.raises(ValueError, match="`source` must be one of 'critic', 'monte_carlo', 'shrinkage', got 'mc'"):
        advantages_from("mc", states)
