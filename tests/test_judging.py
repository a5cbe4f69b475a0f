"""
`judging.py`: rewards are outcomes, or the message says whose they are and what to do.
"""

import math

import numpy as np
import pytest

from dapo_trl.judging import judge, name_of


PROBLEMS = [{"prompt": "1+1?", "problem_id": "p-1"}, {"prompt": "2+2?", "problem_id": "p-2"}]


def returning(rewards):
    def own_reward(prompts, completions, **columns):
        return rewards

    return own_reward


def test_what_the_reward_function_gets():
    """Text for a text, messages for a conversation, and every other column."""
    seen = {}

    def watch(**columns):
        seen.update(columns)
        return [1.0, None]

    conversation = [{"role": "user", "content": "1+1?"}]
    problems = [{"prompt": "1+1?", "answer": "2"}, {"prompt": conversation, "answer": "3"}]
    assert judge(problems, ["a", "b"], watch) == [1.0, None]
    assert seen["completions"] == ["a", [{"role": "assistant", "content": "b"}]]
    assert seen["answer"] == ["2", "3"]
    assert judge([], [], watch) == []


@pytest.mark.parametrize("rewards", [[True, False], [1, 0], [np.float32(1), np.float64(0)], [np.True_, np.int64(0)]])
def test_any_number_is_an_outcome(rewards):
    judged = judge(PROBLEMS, ["a", "b"], returning(rewards))
    assert judged == [1.0, 0.0]
    assert {type(reward) for reward in judged} == {float}


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (None, "returned None for 2 solutions, the first of problem 'p-1'. It must return a list"),
        (np.zeros(2), "returned array.* for 2 solutions, .* must return a list"),
        ([1.0], "returned 1 rewards for 2 solutions, the first of problem 'p-1'"),
        ([1.0, "1"], "returned '1' for a solution of problem 'p-2'. A reward must be a number"),
        ([1.0, -1.0], r"returned -1.0 for a solution of problem 'p-2'.*\(r \+ 1\) / 2"),
        ([2, 0.0], r"returned 2 for a solution of problem 'p-1'.*must lie in \[0, 1\]"),
        ([0.0, math.nan], "returned nan for a solution of problem 'p-2'"),
        ([0.0, math.inf], "returned inf for a solution of problem 'p-2'"),
    ],
)
def test_refuses_what_is_no_outcome(rewards, message):
    function = returning(rewards)
    with pytest.raises(ValueError, match=rf"The reward function .*own_reward {message}"):
        judge(PROBLEMS, ["a", "b"], function)


def test_problems_without_an_id_are_named_by_their_prompt():
    with pytest.raises(ValueError, match=r"for a solution of the problem '3\+3\?'"):
        judge([{"prompt": "3+3?"}], ["a"], returning([5.0]))


def test_names():
    assert name_of(returning([])).endswith("returning.<locals>.own_reward")
    assert name_of(np.vectorize(len)).endswith("vectorize")
