"""
Everything sampled from the states of one problem, and the rows that are made of it.

A state is the tuple of steps taken so far, as text. The states of a problem are those of the solutions that are kept of
it; they form a tree, whose root is the bare prompt.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from dapo_trl.values import (
    Counts,
    Sample,
    State,
    StoppingRule,
    candidate_value,
    prefix_counts,
    sequential_value,
)


@dataclass(frozen=True)
class Rollout:
    """
    A completion, judged and cut into steps.

    Attributes:
        steps (`tuple[str, ...]`):
            Text of its steps, none if it ended at once.
        steps_ids (`tuple[tuple[int, ...], ...]`):
            Their token ids.
        reward (`float` or `None`):
            Outcome in [0, 1], `None` if it cannot be judged.
        truncated (`bool`):
            Whether it broke off at the length limit.
        alters_state (`bool`, *optional*, defaults to `False`):
            Whether its beginning belongs to the last step of the state that it starts from.
    """

    steps: tuple[str, ...]
    steps_ids: tuple[tuple[int, ...], ...]
    reward: float | None
    truncated: bool
    alters_state: bool = False

    @cached_property
    def actions(self) -> State:
        """
        What tells the steps apart: their text, and for the last one that it ended the solution, or broke off.

        The same words followed by an end, by another step or by nothing are different actions.
        """
        return (*self.steps[:-1], (self.steps[-1], "cut off" if self.truncated else "end")) if self.steps else ()

    def passage(self, depth: int) -> "Passage":
        """The step after the first `depth` ones."""
        if not self.steps:
            return Passage(None, "", (), None, self.reward)
        ending = ("cut off" if self.truncated else "end") if depth == len(self.steps) - 1 else None
        return Passage(self.actions[depth], self.steps[depth], self.steps_ids[depth], ending, self.reward)

    @property
    def states(self) -> dict[State, tuple[tuple[int, ...], ...]]:
        """Every state from which a step was taken, the start included, with the ids of the steps that lead there."""
        return {self.steps[:depth]: self.steps_ids[:depth] for depth in range(len(self.steps))}


class Passage(NamedTuple):
    """
    What a completion did in a state from which it starts or through which it passes.

    Attributes:
        action (`Hashable`):
            What tells its next step apart, see [`Rollout.actions`]; `None` if it ended at once.
        step (`str`):
            Text of that step.
        ids (`tuple[int, ...]`):
            Its token ids.
        ending (`str` or `None`):
            "end" or "cut off" if that is its last step.
        reward (`float` or `None`):
            Outcome of the completion.
    """

    action: Hashable
    step: str
    ids: tuple[int, ...]
    ending: str | None
    reward: float | None


class StateTree:
    """
    The states of one problem.

    Completions of a state that pass through later ones count there too, from the prompt on: a state draws completions
    of its own only when the state before it has all of its. Of a completion only the steps up to the first one that
    leaves the tree are kept: nothing after that says anything about a state of the tree or its candidates.

    A step is an action together with its boundary: completions that pass through a state go on there with a new step.
    One that starts there may end at once instead, or go on with the last step, such as by another line break. Then it
    took another action one state earlier, and is no sample of this state. Without those, own and passing completions
    have one distribution, whose value is V(s') = E[outcome | the step to s' is complete, and another follows]; then
    V(s) is the sum of p(a) V(s ∘ a) over the actions of s. Such a completion has been drawn, as one that cannot be
    judged, and uses up the largest number of the rule.

    Args:
        kept (sequence of [`Rollout`]):
            Solutions whose states shall be valued.
        rule ([`~dapo_trl.values.StoppingRule`]):
            When a state has enough completions.
        reuse (`bool`, *optional*, defaults to `True`):
            Whether completions that pass through a state count towards its number.
    """

    def __init__(self, kept: Sequence[Rollout], rule: StoppingRule, reuse: bool = True) -> None:
        self.kept = kept
        self.rule = rule
        self.reuse = reuse
        states = {state: ids for solution in kept for state, ids in solution.states.items()}
        self.states = dict(sorted(states.items(), key=lambda item: len(item[0])))  # parents first
        self._passages: dict[State, list[Passage]] = {state: [] for state in self.states}
        self._own: dict[State, list[Sample]] = {state: [] for state in self.states}
        self._num_own: Counter[State] = Counter()
        self._num_altered: Counter[State] = Counter()

    # ---- Sampling ----

    def wanted(self) -> list[tuple[State, range]]:
        """
        What to draw next.

        Returns:
            `list[tuple[State, range]]`: states that can go on, each with the numbers of the completions that it needs
            up to its next look. Empty when all have enough.
        """
        requests = []
        settled: set[State] = set()
        for state in self.states:
            if self.reuse and state and state[:-1] not in settled:
                continue
            missing = self._num_missing(state)
            if missing:
                first = self._num_own[state]
                requests.append((state, range(first, first + missing)))
            else:
                settled.add(state)
        return requests

    def add(self, state: State, rollout: Rollout) -> None:
        """
        Note a completion, where it starts and at the states on its way.

        Args:
            state (`tuple`):
                Where it starts.
            rollout ([`Rollout`]):
                The completion. One that cannot be judged has been drawn, but says nothing; nor does one that makes
                another state of the one that it starts from.
        """
        self._num_own[state] += 1
        if state and (rollout.alters_state or not rollout.steps):
            self._num_altered[state] += 1
            return
        actions = rollout.actions
        self._passages[state].append(rollout.passage(0))
        depth = min(len(actions), 1)
        while (reached := state + actions[:depth]) in self.states and depth:
            if self.reuse:
                self._passages[reached].append(rollout.passage(depth))
            depth += 1
        if rollout.reward is not None:
            self._own[state].append(Sample(state, actions[:depth], rollout.reward))

    def counts(self) -> dict[State, Counts]:
        """
        Outcomes so far.

        Returns:
            `dict`: state -> [`~dapo_trl.values.Counts`], of the states of the tree that have any.
        """
        counts = self._count_outcomes(())
        return {state: counts[state] for state in self.states if state in counts}

    def _num_missing(self, state: State) -> int:
        rewards = self._rewards(state)
        if self.rule.stopping_time(rewards) is not None:
            return 0
        next_look = next(look for look in self.rule.looks if look > len(rewards))
        num_drawn = len(self._passages[state]) + self._num_altered[state]
        return min(next_look - len(rewards), max(self.rule.maximum - num_drawn, 0))

    def _judged(self, state: State) -> list[Passage]:
        return [passage for passage in self._passages[state] if passage.reward is not None]

    def _rewards(self, state: State) -> list[float]:
        return [passage.reward for passage in self._passages[state] if passage.reward is not None]

    # ---- Rows ----

    def rows(self, prompt_outcomes: Sequence[float] = ()) -> tuple[list[dict], list[dict], Counter[str]]:
        """
        Solution rows and state rows.

        Args:
            prompt_outcomes (sequence of `float`, *optional*):
                More outcomes of the bare prompt, drawn freely and not chosen by what they are.

        Returns:
            `tuple[list[dict], list[dict], Counter]`: solution rows with values, state rows with at least two
            candidates, and counts of what was left out:

            - `solutions_without_value`: kept solutions with a state that has no outcome at all;
            - `states_with_one_candidate`: states whose completions all took the same step;
            - `candidates_cut_off`: completions that broke off within the next step of a state;
            - `completions_altering_state`: completions that ended at once, or went on with the last step of the state
              that they started from.
        """
        left_out: Counter[str] = Counter(completions_altering_state=self._num_altered.total())
        counts = self._count_outcomes(prompt_outcomes)
        values = {state: self._value(state, counts[state]) for state in self.states if state in counts}
        valued = [solution for solution in self.kept if solution.states.keys() <= values.keys()]
        left_out["solutions_without_value"] = len(self.kept) - len(valued)
        solutions = [_solution_row(solution, counts, values) for solution in valued]
        states = [self._state_row(state, counts, values, left_out) for state in self.states]
        with_siblings = [row for row in states if len(row["candidates"]) > 1]
        left_out["states_with_one_candidate"] = len(states) - len(with_siblings)
        return solutions, with_siblings, left_out

    def _count_outcomes(self, prompt_outcomes: Sequence[float]) -> dict[State, Counts]:
        samples = [Sample((), (), reward) for reward in prompt_outcomes]
        return prefix_counts([*samples, *(sample for own in self._own.values() for sample in own)])

    def _value(self, state: State, counts: Counts) -> float:
        """
        Mean outcome; where outcomes decided the number of completions, what is unbiased under that rule.

        A state whose own completions say nothing has at most outcomes that others brought, and takes their mean.
        """
        stopped = self._at_stop(state)
        if self.rule.minimum == self.rule.maximum or not stopped:
            return counts.value
        return sequential_value(*_count(stopped), self.rule)

    def _at_stop(self, state: State) -> list[Passage]:
        """What decided that a state has enough: its judged completions up to the stop."""
        return self._judged(state)[: self.rule.stopping_time(self._rewards(state))]

    def _candidate_values(
        self, state: State, actions: Iterable[Hashable], counts: dict[State, Counts], values: dict[State, float]
    ) -> list[float]:
        """A state of the tree has its own value; what leads out of the tree depends on when its state had enough."""
        stopped = self._at_stop(state)
        later = self._judged(state)[len(stopped) :]

        def value(action: Hashable) -> float:
            reached = (*state, action)
            if reached in values or self.rule.minimum == self.rule.maximum:
                return values.get(reached, counts[reached].value)
            first, others = (_count([p for p in part if p.action == action]) for part in (stopped, later))
            return candidate_value(first, others, _count(stopped), self.rule)

        return [value(action) for action in actions]

    def _state_row(
        self, state: State, counts: dict[State, Counts], values: dict[State, float], left_out: Counter[str]
    ) -> dict[str, Any]:
        """Candidates are the next steps of what was sampled from a state; one that breaks off is no candidate."""
        taken = [passage for passage in self._judged(state) if passage.action is not None]
        whole = [passage for passage in taken if passage.ending != "cut off"]
        left_out["candidates_cut_off"] += len(taken) - len(whole)
        first = {passage.action: passage for passage in reversed(whole)}
        number = Counter(passage.action for passage in whole)  # in the order of their first
        reached = [(*state, action) for action in number]
        sampled = [first[action] for action in number]
        return {
            "prefix": list(state),
            "candidates": [passage.step for passage in sampled],
            "counts": list(number.values()),
            "values": self._candidate_values(state, number, counts, values),
            "mc_successes": [counts[candidate].successes for candidate in reached],
            "mc_rollouts": [counts[candidate].rollouts for candidate in reached],
            "rewards": [passage.reward if passage.ending else None for passage in sampled],
            "prefix_ids": [list(ids) for ids in self.states[state]],
            "candidates_ids": [list(passage.ids) for passage in sampled],
        }


def _count(passages: Sequence[Passage]) -> Counts:
    return Counts(sum(passage.reward or 0.0 for passage in passages), len(passages))


def _solution_row(solution: Rollout, counts: dict[State, Counts], values: dict[State, float]) -> dict[str, Any]:
    # The end of a solution has one outcome, seen as often as completions ended there, and in the solution itself.
    successes, rollouts = counts.get(solution.actions, Counts(0.0, 0))
    reward = solution.reward or 0.0
    end = Counts(successes + reward, rollouts + 1)
    observed = [*(counts[state] for state in solution.states), end]
    return {
        "completions": list(solution.steps),
        "values": [*(values[state] for state in solution.states), end.value],
        "mc_successes": [count.successes for count in observed],
        "mc_rollouts": [count.rollouts for count in observed],
        "reward": reward,
        "truncated": solution.truncated,
        "completions_ids": [list(ids) for ids in solution.steps_ids],
    }
