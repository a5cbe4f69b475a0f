"""
Monte Carlo values of reasoning states.

The value of a state is the probability that the reference policy, continuing from it, ends correct: V(s). A state is
written as the tuple of steps taken so far, `()` being the bare prompt. A step may be any hashable thing that identifies
it: its text, or the tuple of its token ids.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np


State = tuple[Hashable, ...]


class Sample(NamedTuple):
    """
    One completion: where it started, the steps it took from there, and how it ended.

    Attributes:
        state (`tuple`):
            Steps that were given, `()` for the bare prompt.
        steps (`tuple`):
            Steps that were sampled from there.
        reward (`float`):
            Outcome in [0, 1]: 1 for a correct answer, else 0.
    """

    state: State
    steps: State
    reward: float


class Counts(NamedTuple):
    """
    Outcomes seen from a state.

    Attributes:
        successes (`float`):
            Sum of the outcomes.
        rollouts (`int`):
            Number of outcomes.
    """

    successes: float
    rollouts: int

    @property
    def value(self) -> float:
        """Monte Carlo value: mean outcome, in [0, 1]."""
        return self.successes / self.rollouts


def monte_carlo_values(successes: Sequence[float], rollouts: Sequence[int]) -> np.ndarray:
    """
    Monte Carlo values: mean outcome of the rollouts of each state (arXiv 2412.18279, critic targets).

    Args:
        successes (sequence of `float`, length S):
            Rollouts of each state that ended correct.
        rollouts (sequence of `int`, length S):
            Rollouts of each state, positive.

    Returns:
        `np.ndarray` of shape `(S,)`, float64, in [0, 1].

    Raises:
        ValueError: if a state has no rollout, or more successes than rollouts.

    Example:

    ```python
    >>> from dapo_trl.values import monte_carlo_values

    >>> monte_carlo_values([0, 4, 16], [16, 16, 16]).tolist()
    [0.0, 0.25, 1.0]

    ```
    """
    k_S, n_S = np.asarray(successes, dtype=np.float64), np.asarray(rollouts, dtype=np.float64)
    if k_S.shape != n_S.shape:
        raise ValueError(f"`successes` and `rollouts` must have the same length, got {k_S.shape} and {n_S.shape}.")
    if not (n_S > 0).all():
        raise ValueError(f"State {int(np.argmax(~(n_S > 0)))} has no rollout, so it has no Monte Carlo value.")
    in_range = (k_S >= 0) & (k_S <= n_S)
    if not in_range.all():
        bad = int(np.argmin(in_range))
        raise ValueError(
            f"State {bad} has {k_S[bad]:g} successes in {n_S[bad]:g} rollouts: expected 0 to {n_S[bad]:g}."
        )
    return k_S / n_S


def prefix_counts(samples: Iterable[Sample]) -> dict[State, Counts]:
    """
    Count, for every state that some completion passes through, the outcomes of all completions that pass through it.

    A completion sampled from a state s whose steps lead through s' is also an unbiased sample of the value of s',
    because given that it passes there, the rest of it was drawn from the same policy. This holds for completions that
    were drawn freely. It does not hold for a solution that was *kept because of its outcome*, nor for the solutions of
    a problem that was kept because of theirs: leave those out, except for states chosen without looking at outcomes.

    Args:
        samples (iterable of [`Sample`]):
            Freely drawn completions of one problem.

    Returns:
        `dict`: state -> [`Counts`], for the starting states and every state the completions reach, the last one
        included.

    Example:

    ```python
    >>> from dapo_trl.values import Sample, prefix_counts

    >>> counts = prefix_counts([Sample((), ("a", "b"), 1.0), Sample((), ("a", "c"), 0.0), Sample(("a",), ("c",), 0.0)])
    >>> counts[()], counts[("a",)], counts[("a", "b")]
    (Counts(successes=1.0, rollouts=2), Counts(successes=1.0, rollouts=3), Counts(successes=1.0, rollouts=1))

    ```
    """
    totals: dict[State, list[float]] = {}
    for sample in samples:
        path = sample.state + sample.steps
        for depth in range(len(sample.state), len(path) + 1):
            total = totals.setdefault(path[:depth], [0.0, 0])
            total[0] += sample.reward
            total[1] += 1
    return {state: Counts(float(successes), int(rollouts)) for state, (successes, rollouts) in totals.items()}
