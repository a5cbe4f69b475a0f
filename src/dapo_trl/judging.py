"""
Rewards of solutions from a TRL reward function, checked: everything after builds on outcomes in [0, 1].
"""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from dapo_trl.tokenization import Prompt


RewardFunction = Callable[..., list[float | None]]


def judge(
    problems: Sequence[dict[str, Any]], texts: Sequence[str], reward_function: RewardFunction
) -> list[float | None]:
    """
    Rewards of solutions, from a TRL reward function.

    Args:
        problems (sequence of `dict`, length N):
            The problem of each solution: `prompt`, and the columns that the reward function takes.
        texts (sequence of `str`, length N):
            Whole solutions.
        reward_function (`Callable`):
            TRL reward function. For a conversational prompt it gets messages, else text.

    Returns:
        `list[float | None]` of length N: outcomes in [0, 1], `None` where the function cannot judge.

    Raises:
        ValueError: if the function returns anything but a list of N such rewards; the message names the function and
            the problem.
    """
    if not problems:
        return []
    columns = {name: [problem[name] for problem in problems] for name in problems[0] if name != "prompt"}
    prompts: list[Prompt] = [problem["prompt"] for problem in problems]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    name = name_of(reward_function)
    rewards = reward_function(prompts=prompts, completions=completions, **columns)
    if not isinstance(rewards, list) or len(rewards) != len(problems):
        returned = f"{len(rewards)} rewards" if isinstance(rewards, list) else f"{rewards!r:.80}"
        raise ValueError(
            f"The reward function {name} returned {returned} for {len(problems)} solutions, the first of "
            f"{_title(problems[0])}. It must return a list with one reward for each."
        )
    return [_outcome(reward, problem, name) for reward, problem in zip(rewards, problems, strict=True)]


def name_of(function: RewardFunction) -> str:
    """
    Where a reward function is defined, or the class of an object that is called.

    Args:
        function (`Callable`):
            Reward function.

    Returns:
        `str`: module and name.
    """
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _outcome(reward: Any, problem: Mapping[str, Any], name: str) -> float | None:
    if reward is None:
        return None
    told = f"The reward function {name} returned {reward!r:.80} for a solution of {_title(problem)}."
    if not isinstance(reward, Real | np.bool_):
        raise ValueError(f"{told} A reward must be a number, or None where it cannot judge.")
    outcome = float(reward)
    if not 0 <= outcome <= 1:  # nor is NaN
        raise ValueError(
            f"{told} A reward is the outcome that values are the mean of, and must lie in [0, 1]. Map it there: "
            "(r + 1) / 2 makes rewards of -1 and 1 outcomes; None says that a solution cannot be judged."
        )
    return outcome


def _title(problem: Mapping[str, Any]) -> str:
    if problem.get("problem_id") is not None:
        return f"problem {problem['problem_id']!r}"
    return f"the problem {str(problem['prompt'])[:60]!r}"
