"""
`state_tree.py`: what is kept of a completion is all that its states and their candidates need; what values estimate.
"""

import random

import numpy as np
import pytest

from dapo_trl.state_tree import Rollout, StateTree
from dapo_trl.values import Sample, StoppingRule, prefix_counts


FIXED, ADAPTIVE = StoppingRule(16, 16, 0.15), StoppingRule(4, 16, 0.15)


def rollout(steps, reward=1.0, truncated=False, alters_state=False):
    return Rollout(tuple(steps), tuple((ord(step),) for step in steps), reward, truncated, alters_state)


def grow(kept, rule, reuse, draw) -> StateTree:
    """A tree that has drawn all it wants; `draw` gives a completion of a state."""
    tree = StateTree(kept, rule, reuse)
    while wanted := tree.wanted():
        for state, numbers in wanted:
            for _ in numbers:
                tree.add(state, draw(state))
    return tree


def assert_near(estimates, expected, slack=0.0):
    """The mean of independent estimates is what it should be, to within 4 standard errors and the slack."""
    error = abs(np.mean(estimates) - expected)
    assert error < slack + 4 * np.std(estimates) / np.sqrt(len(estimates)), np.mean(estimates)


# ---- What is kept of a completion ----


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
    """
    For every state of the tree, every candidate of one, and the ends of the solutions that are kept. What ends at once
    is an outcome of the prompt, and of no other state.
    """
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
            if drawn.reward is not None and (drawn.steps or not state):
                samples.append(Sample(state, drawn.actions, drawn.reward))
    expected, counts = prefix_counts(samples), tree._count_outcomes(())
    needed = [path for path in expected if path in tree.states or path[:-1] in tree.states]
    assert len(needed) > len(tree.states)
    assert counts == {path: expected[path] for path in needed}


def test_actions_are_made_once():
    """They are asked for at every state that a completion passes."""
    drawn = rollout("abc")
    assert drawn.actions == ("a", "b", ("c", "end"))
    assert drawn.actions is drawn.actions


# ---- What values estimate ----

# Of the prompt, "b" is wrong; after the tokens of "a" the policy ends (right), makes the step longer (right), or goes
# on with "c", which is right one time in five. The state "a" is the last of the three.
NEXT = {"end": 0.3, "longer": 0.2, "c": 0.5}
VALUE_OF_A = 0.2


def draw_after_a(rng, is_own: bool) -> Rollout:
    [follows] = rng.choices(list(NEXT), NEXT.values())
    if follows == "end":
        return rollout("" if is_own else "a")
    if follows == "longer":
        return rollout("x" if is_own else "A", alters_state=is_own)
    return rollout("c" if is_own else "ac", float(rng.random() < VALUE_OF_A))


@pytest.mark.parametrize("rule", [FIXED, ADAPTIVE])
@pytest.mark.parametrize("reuse", [True, False])
def test_own_and_passing_completions_are_alike(rule, reuse):
    """
    The value of "a" is that of going on there, wherever its completions began. The prompt's is the sum over its
    actions: 1/2 * (0.3 * 1 + 0.2 * 1 + 0.5 * 0.2) = 0.3.
    """
    kept, values = [rollout("ac"), rollout("b", 0.0)], []
    for seed in range(2000):
        rng = random.Random(seed)

        def draw(state, rng=rng):
            return draw_after_a(rng, bool(state)) if state or rng.random() < 0.5 else rollout("b", 0.0)

        [solution, _], _, left_out = grow(kept, rule, reuse, draw).rows()
        values.append(solution["values"][:2])
        assert left_out["completions_altering_state"] <= rule.maximum
    of_prompt, of_a = zip(*values, strict=True)
    assert_near(of_prompt, 0.3)
    assert_near(of_a, VALUE_OF_A)


def test_completions_that_say_nothing_come_to_an_end():
    """They use up the largest number: a state that only ever ends at once has no value, its solution is left out."""
    drawn = []

    def draw(state):
        drawn.append(state)
        return rollout("") if state else rollout("b", 0.0)

    solutions, _, left_out = grow([rollout("ac"), rollout("b", 0.0)], FIXED, True, draw).rows()
    assert drawn.count(("a",)) == 16
    assert [row["completions"] for row in solutions] == [["b"]]
    assert (left_out["solutions_without_value"], left_out["completions_altering_state"]) == (1, 16)


@pytest.mark.parametrize("rule", [FIXED, ADAPTIVE])
def test_a_state_without_outcomes_of_its_own_has_those_that_pass(rule):
    """No own completion of "a" can be judged; the prompt's all pass there, and are right."""
    solutions, _, _ = grow(
        [rollout("ac")], rule, False, lambda state: rollout("c", None) if state else rollout("ac")
    ).rows()
    assert solutions[0]["values"] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("policy", "slack", "biased"),
    [
        ([(0.5, 0.1), (0.5, 0.1)], 0.0, 0),
        ([(0.5, 0.2), (0.5, 0.05)], 0.0, 0),
        ([(0.8, 0.05), (0.2, 0.5)], 0.015, 1),  # a ratio is not quite unbiased
    ],
)
def test_a_rule_does_not_bias_candidates(policy, slack, biased):
    """
    Candidates of the prompt by (probability, value): none is a state of the tree, and the prompt's outcomes decide how
    many of them there are. Plain means are too low: 0.076 instead of 0.1 for the first.
    """
    kept, found, plain = [rollout("z")], [[], []], [[], []]
    for seed in range(3000):
        rng = random.Random(seed)

        def draw(state, rng=rng):
            [index] = rng.choices(range(2), [probability for probability, _ in policy])
            return rollout("01"[index] + "x", float(rng.random() < policy[index][1]))

        tree = grow(kept, ADAPTIVE, True, draw)
        _, states, _ = tree.rows()
        for row in states:
            columns = (row[name] for name in ("candidates", "values", "mc_successes", "mc_rollouts"))
            for step, value, successes, rollouts in zip(*columns, strict=True):
                found[int(step)].append(value)
                plain[int(step)].append(successes / rollouts)
    for index, (_, value) in enumerate(policy):
        assert_near(found[index], value, slack)
    with pytest.raises(AssertionError):
        assert_near(plain[biased], policy[biased][1])


def test_a_fixed_number_leaves_candidates_their_mean():
    rng = random.Random(0)
    tree = grow([rollout("z")], FIXED, True, lambda state: rollout(rng.choice("01") + "x", rng.random()))
    [row] = tree.rows()[1]
    means = np.array(row["mc_successes"]) / row["mc_rollouts"]
    assert row["values"] == means.tolist()
