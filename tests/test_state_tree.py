"""
`state_tree.py`: what is kept of a completion is all that its states and their candidates need.
"""

import random

import pytest

from dapo_trl.state_tree import Rollout, StateTree
from dapo_trl.values import Sample, StoppingRule, prefix_counts


def rollout(steps, reward=1.0, truncated=False):
    return Rollout(tuple(steps), tuple((ord(step),) for step in steps), reward, truncated)


def test_nothing_is_kept_beyond_the_tree():
    """
    The tree has the states (), "a" and "ab". "axyz" leaves it with "x", a candidate of "a": "y" and "z" are forgotten.
    """
    tree = StateTree([rollout("abc")], StoppingRule(2, 2, 0.15))
    tree.add((), rollout("axyz"))
    tree.add((), rollout(""))
    assert tree._own[()] == [Sample((), ("a", "x"), 1.0), Sample((), (), 1.0)]
    assert [passage.step for passage in tree._passages[("a",)]] == ["x"]
    assert tree._passages[("a",)][0].ending is None
    assert tree._passages[("a", "b")] == []


@pytest.mark.parametrize("reuse", [True, False])
def test_counts_are_those_of_whole_completions(reuse):
    """For every state of the tree, every candidate of one, and the ends of the solutions that are kept."""
    rng = random.Random(0)

    def draw(depth=0):
        reward = rng.choice([0.0, 1.0, None])
        return rollout(rng.choices("ab", k=rng.randint(0, 4 - depth)), reward, rng.random() < 0.2)

    kept = [rollout(steps, float(index % 2)) for index, steps in enumerate(("aab", "abba", "b"))]
    tree = StateTree(kept, StoppingRule(4, 4, 0.15), reuse)
    samples = []
    for state in tree.states:
        for _ in range(20):
            drawn = draw(len(state))
            tree.add(state, drawn)
            if drawn.reward is not None:
                samples.append(Sample(state, drawn.actions, drawn.reward))
    expected, counts = prefix_counts(samples), tree._count_outcomes(())
    needed = [path for path in expected if path in tree.states or path[:-1] in tree.states]
    assert len(needed) > len(tree.states)
    assert counts == {path: expected[path] for path in needed}
