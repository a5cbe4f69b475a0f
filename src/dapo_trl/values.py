"""
Monte Carlo values of reasoning states.

The value of a state is the probability that the reference policy, continuing from it, ends correct: V(s). A state is
written as the tuple of steps taken so far, `()` being the bare prompt. A step may be any hashable thing that identifies
it: its text, or the tuple of its token ids.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
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


def check_table(
    values: object, successes: object, rollouts: object, name: str = "value"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Values of states beside the outcomes of their rollouts, as arrays.

    Args:
        values (sequence of `float`, length S):
            In [0, 1].
        successes (sequence of `float`, length S):
            Rollouts of each state that ended correct.
        rollouts (sequence of `int`, length S):
            Rollouts of each state, 0 or more.
        name (`str`, *optional*, defaults to `"value"`):
            What a value is called in messages.

    Returns:
        `tuple` of three `np.ndarray` of shape `(S,)`, float64, in the same order.

    Raises:
        ValueError: if lengths differ, or a number is out of range.
    """
    v_S, k_S, n_S = (np.asarray(given, dtype=np.float64) for given in (values, successes, rollouts))
    if not (v_S.ndim == 1 and v_S.shape == k_S.shape == n_S.shape):
        raise ValueError(f"Lengths differ: {k_S.shape} successes, {n_S.shape} rollouts, {v_S.shape} values.")
    for problem, is_bad in (
        (f"has a {name} that is not in [0, 1]", ~((v_S >= 0) & (v_S <= 1))),
        ("does not have from 0 to all of its rollouts as successes", ~((k_S >= 0) & (k_S <= n_S))),
    ):
        if is_bad.any():
            first = int(np.argmax(is_bad))
            raise ValueError(
                f"State {first} {problem}: value {v_S[first]:g}, {k_S[first]:g} successes, {n_S[first]:g} rollouts."
            )
    return v_S, k_S, n_S


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


@dataclass(frozen=True)
class StoppingRule:
    """
    When a state has enough completions: looked at after every `minimum` of them, it gets no more once the posterior
    standard deviation of its value is `precision` or less, and never more than `maximum`.

    The posterior is Beta(s + 1, f + 1) for s successes and f failures, from a uniform prior. With `minimum` equal to
    `maximum` every state gets the same number.

    Args:
        minimum (`int`):
            Completions at the first look, and between looks.
        maximum (`int`):
            Most completions.
        precision (`float`):
            Posterior standard deviation that is enough.

    Raises:
        ValueError: if a number is out of range.

    Example:

    ```python
    >>> from dapo_trl.values import StoppingRule

    >>> rule = StoppingRule(minimum=4, maximum=16, precision=0.15)
    >>> rule.looks
    (4, 8, 12, 16)
    >>> rule.stopping_time([1.0, 1.0, 1.0, 1.0]), rule.stopping_time([1.0, 0.0, 1.0, 0.0])
    (4, None)

    ```
    """

    minimum: int
    maximum: int
    precision: float

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.maximum:
            raise ValueError(
                f"The smallest number of completions must lie between 1 and the largest, {self.maximum}, got "
                f"{self.minimum}."
            )
        if not 0 < self.precision < 1:
            raise ValueError(f"`precision` must lie in (0, 1), got {self.precision}.")

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of completions after which a state may have enough."""
        return (*range(self.minimum, self.maximum, self.minimum), self.maximum)

    def is_enough(self, successes: int, rollouts: int) -> bool:
        """Whether a state stops at a look with these outcomes."""
        if rollouts >= self.maximum:
            return True
        a, b = successes + 1, rollouts - successes + 1
        return sqrt(a * b / ((a + b) ** 2 * (a + b + 1))) <= self.precision

    def stopping_time(self, rewards: Sequence[float]) -> int | None:
        """
        Number of completions at which a state stops.

        Args:
            rewards (sequence of `float`):
                Outcomes in the order in which they were drawn.

        Returns:
            `int` or `None`: `None` if it needs more than there are.

        Raises:
            ValueError: if an outcome is neither 0 nor 1, unless every state gets the same number.
        """
        if self.minimum == self.maximum:
            return self.maximum if len(rewards) >= self.maximum else None
        if any(reward not in (0.0, 1.0) for reward in rewards):
            raise ValueError(
                "Outcomes between 0 and 1 have no stopping rule here. Leave `min_completions` out, or use a verifier "
                "that says 0 or 1."
            )
        looks = (look for look in self.looks if look <= len(rewards))
        return next((look for look in looks if self.is_enough(int(sum(rewards[:look])), look)), None)


def sequential_value(successes: float, rollouts: int, rule: StoppingRule) -> float:
    r"""
    Unbiased value of a state that stopped by a rule.

    The mean outcome is biased, since it decided when to stop: a state of value 0.1 that stops after four failures is
    taken for 0. The first outcome alone is unbiased; its expectation given where the state stopped has least variance
    (Girshick, Mosteller and Savage 1946): of the ways to come to s successes in n completions without stopping before,
    the share that begin with a success.

    Args:
        successes (`float`):
            s, successes when it stopped.
        rollouts (`int`):
            n, completions when it stopped, or when they came to an end for a reason that has nothing to do with their
            outcomes.
        rule ([`StoppingRule`]):
            The rule.

    Returns:
        `float` in [0, 1]; s / n if every state gets the same number.

    Raises:
        ValueError: if there are no completions, or a state would have stopped earlier.

    Example:

    ```python
    >>> from dapo_trl.values import StoppingRule, sequential_value

    >>> rule = StoppingRule(minimum=4, maximum=8, precision=0.15)  # four equal outcomes are enough
    >>> sequential_value(0, 4, rule), sequential_value(4, 8, rule)
    (0.0, 0.5)
    >>> sequential_value(1, 8, rule)  # its one success was among the first four, 1/8 would be too little
    0.25

    ```
    """
    if not rollouts:
        raise ValueError("A state without completions has no value.")
    if rule.minimum == rule.maximum:
        return successes / rollouts
    ways, ways_after_success = _count_ways(rule)
    place = (int(successes), rollouts)
    if not ways.get(place):
        raise ValueError(f"{successes:g} successes in {rollouts} completions cannot be: the state stops earlier.")
    return ways_after_success.get(place, 0) / ways[place]


def candidate_shares(candidate: Counts, state: Counts, rule: StoppingRule) -> tuple[float, float]:
    r"""
    How likely a completion of a state takes a candidate and ends correct, or takes it and ends wrong.

    $$
    \hat q^+(a) = \hat v \, \frac{s_a}{s}, \qquad \hat q^-(a) = (1 - \hat v) \, \frac{f_a}{f}
    $$

    with the state's s successes and f failures when it stopped, $s_a$ and $f_a$ of them by candidate a, and the
    unbiased value $\hat v$ of [`sequential_value`]. The rule sees outcomes only. So given s and f at the stop, any
    order of the candidates is as likely as another within the successes, and within the failures: the first completion
    is a success with probability $\hat v$, and then takes a with probability $s_a / s$. The first completion is drawn
    before anything is decided, so both shares are unbiased, for p(a) V(a) and p(a) (1 - V(a)): the argument of
    Girshick, Mosteller and Savage (1946), one step on.

    Args:
        candidate ([`Counts`]):
            Outcomes of the completions that took the candidate.
        state ([`Counts`]):
            Outcomes of all completions of the state up to the stop, those of the candidate among them.
        rule ([`StoppingRule`]):
            The rule by which the state stopped.

    Returns:
        `tuple[float, float]`: shares of successes and of failures, in [0, 1]. Over all candidates they sum to
        $\hat v$ and $1 - \hat v$.

    Raises:
        ValueError: if the state has no completions, or would have stopped earlier.

    Example:

    ```python
    >>> from dapo_trl.values import Counts, StoppingRule, candidate_shares

    >>> rule = StoppingRule(minimum=4, maximum=8, precision=0.15)
    >>> candidate_shares(Counts(1, 4), Counts(1, 8), rule)  # V = 1/4, all successes and 3 of 7 failures
    (0.25, 0.32142857142857145)

    ```
    """
    value = sequential_value(*state, rule)
    failures = state.rollouts - state.successes
    success_share = value * candidate.successes / state.successes if state.successes else 0.0
    failure_share = (1 - value) * (candidate.rollouts - candidate.successes) / failures if failures else 0.0
    return success_share, failure_share


def candidate_value(candidate: Counts, later: Counts, state: Counts, rule: StoppingRule) -> float:
    r"""
    Value of a candidate step whose number of completions was decided by the outcomes of the state that it leaves.

    $$
    \hat V(a) = \frac{n \hat q^+(a) + s'_a}{n (\hat q^+(a) + \hat q^-(a)) + s'_a + f'_a}
    $$

    with the shares of [`candidate_shares`], which weigh as much as the n completions up to the stop, and $s'_a$, $f'_a$
    successes and failures of those after it, which decided nothing. The plain mean is too low for a candidate that
    seldom succeeds: a state stops soon where all its completions fail. A ratio of two unbiased numbers is not quite
    unbiased itself, but nearly.

    Args:
        candidate ([`Counts`]):
            Outcomes of the candidate's completions up to the stop.
        later ([`Counts`]):
            Outcomes of its completions after the stop.
        state ([`Counts`]):
            Outcomes of all completions of the state up to the stop, n of them.
        rule ([`StoppingRule`]):
            The rule by which the state stopped.

    Returns:
        `float` in [0, 1]. The mean outcome if every state gets the same number.

    Raises:
        ValueError: if the candidate or the state has no completions, or the state would have stopped earlier.

    Example:

    ```python
    >>> from dapo_trl.values import Counts, StoppingRule, candidate_value

    >>> rule = StoppingRule(minimum=4, maximum=8, precision=0.15)
    >>> candidate_value(Counts(1, 4), Counts(0, 0), Counts(1, 8), rule)  # the plain mean is 1/4
    0.4375

    ```
    """
    rollouts = candidate.rollouts + later.rollouts
    if not rollouts:
        raise ValueError("A candidate without completions has no value.")
    if rule.minimum == rule.maximum:
        return (candidate.successes + later.successes) / rollouts
    successes, failures = (state.rollouts * share for share in candidate_shares(candidate, state, rule))
    successes += later.successes
    failures += later.rollouts - later.successes
    return successes / (successes + failures)  # not 0 / 0: where an outcome was seen, the share of its kind is positive


@lru_cache(maxsize=16)
def _count_ways(rule: StoppingRule) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """By (successes, rollouts): orders of outcomes that lead there without stopping before; those that begin with 1."""
    ways, ways_after_success = {(0, 1): 1, (1, 1): 1}, {(1, 1): 1}
    looks = set(rule.looks)
    for table in (ways, ways_after_success):
        for n in range(1, rule.maximum):
            for s in range(n + 1):
                number = table.get((s, n), 0)
                if number and not (n in looks and rule.is_enough(s, n)):
                    for outcome in (0, 1):
                        place = (s + outcome, n + 1)
                        table[place] = table.get(place, 0) + number
    return ways, ways_after_success
