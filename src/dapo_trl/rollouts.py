"""
Solutions of each problem, and completions from every state of those that are kept: the data behind all step values.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from dapo_trl.engines import Completion, Engine, SamplingConfig
from dapo_trl.steps import split_step_ids, step_texts
from dapo_trl.tokenization import Prompt, encode_prompt, tokenizer_fingerprint
from dapo_trl.values import Counts, Sample, State, prefix_counts


RewardFunction = Callable[..., list[float | None]]


@dataclass(frozen=True)
class RolloutConfig:
    """
    How many samples are drawn, and where. The defaults are the paper's (arXiv 2412.18279, data for the critic).

    Args:
        num_solutions (`int`, *optional*, defaults to `32`):
            Solutions sampled per problem.
        num_kept (`int`, *optional*, defaults to `6`):
            Solutions kept per problem, correct and wrong as balanced as possible, without duplicates.
        num_completions (`int`, *optional*, defaults to `16`):
            Completions sampled from every state of the kept solutions, the bare prompt included.
        sampling ([`~dapo_trl.engines.SamplingConfig`], *optional*):
            How to sample. `max_new_tokens` bounds a solution, and a completion from any of its states.
        separator (`str`, *optional*, defaults to `"\\n"`):
            What ends a step.
        skip_uniform (`bool`, *optional*, defaults to `True`):
            Skip problems whose solutions are all correct or all wrong: hardly any choice matters there, and most of the
            tokens are spent on their completions. They are counted.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all sampling.

    Raises:
        ValueError: if a number is out of range.
    """

    num_solutions: int = 32
    num_kept: int = 6
    num_completions: int = 16
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    separator: str = "\n"
    skip_uniform: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_solutions", "num_kept", "num_completions"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_kept > self.num_solutions:
            raise ValueError(f"Cannot keep {self.num_kept} of {self.num_solutions} solutions. Lower `num_kept`.")
        if self.num_completions < 2:
            raise ValueError("`num_completions` must be at least 2: advantages compare the next steps of one state.")


@dataclass(frozen=True)
class Rollouts:
    """
    What [`collect_rollouts`] gives.

    Attributes:
        solutions ([`~datasets.Dataset`]):
            Solution rows with `values`, `mc_successes`, `mc_rollouts` for states 0..K.
        states ([`~datasets.Dataset`]):
            State rows with `candidates`, `counts`, Monte Carlo `values`, and `rewards` of candidates that end the
            solution.
        report (`dict[str, int]`):
            Counts of what was sampled, kept, left out and why.
    """

    solutions: Dataset
    states: Dataset
    report: dict[str, int]


@dataclass
class _Rollout:
    """A completion, judged and cut into steps."""

    steps_ids: list[tuple[int, ...]]
    steps: tuple[str, ...]
    reward: float
    truncated: bool

    @property
    def actions(self) -> State:
        """
        What tells the steps apart: their text, and for the last one that it ended the solution, or broke off.

        The same words followed by an end, by another step or by nothing are different actions.
        """
        return (*self.steps[:-1], (self.steps[-1], "cut off" if self.truncated else "end")) if self.steps else ()


@dataclass
class _Tree:
    """Everything sampled for one problem. States are tuples of step texts."""

    row: dict[str, Any]
    prompt_ids: list[int]
    solutions: list[_Rollout] = field(default_factory=list)
    kept: list[_Rollout] = field(default_factory=list)
    states: dict[State, list[tuple[int, ...]]] = field(default_factory=dict)  # state -> ids of its steps
    completions: dict[State, list[_Rollout]] = field(default_factory=dict)


def collect_rollouts(
    problems: Dataset, engine: Engine, reward_function: RewardFunction, config: RolloutConfig | None = None
) -> Rollouts:
    """
    Sample solutions, keep some, sample completions from every state of those, and turn them into rows with step values.

    A state that several solutions share is estimated once, and a completion counts for every state it passes through
    (see [`~dapo_trl.values.prefix_counts`]). A truncated completion counts as wrong; one that cannot be judged counts
    not at all. Both are in the report.

    Args:
        problems ([`~datasets.Dataset`]):
            Rows with `prompt` (text or messages) and whatever columns the reward function takes, such as `answer`.
        engine ([`~dapo_trl.engines.Engine`]):
            Sampling back end of the reference policy.
        reward_function (`Callable`):
            TRL reward function: takes `prompts`, `completions` and the problems' columns as lists, returns a `float` in
            [0, 1] for each completion, or `None` where it cannot judge.
        config ([`RolloutConfig`], *optional*):
            Numbers of samples and how to draw them.

    Returns:
        [`Rollouts`]: solution rows, state rows and the report.

    Raises:
        ValueError: if `problems` is empty, has no `prompt` column, or a prompt leaves no room for a solution.
    """
    config = config or RolloutConfig()
    _check_problems(problems)
    report: Counter[str] = Counter(problems=len(problems))
    trees = [_Tree(row, encode_prompt(row["prompt"], engine.tokenizer)) for row in problems]
    sampler = _Sampler(engine, reward_function, config, report)
    sampler.sample_solutions(trees)
    trees = _with_signal(trees, config, report)
    for tree in trees:
        tree.kept = select_balanced(tree.solutions, config.num_kept, random.Random(f"{config.seed}:{tree.prompt_ids}"))
        tree.states = _states_of(tree.kept)
    report["solutions_kept"] = sum(len(tree.kept) for tree in trees)
    report["states"] = sum(len(tree.states) for tree in trees)
    sampler.sample_completions(trees)
    return _to_rows(trees, engine, config, report)


def select_balanced(solutions: Sequence[Any], num_kept: int, rng: random.Random) -> list[Any]:
    """
    Choose solutions, correct (reward at least 1/2) and wrong as balanced as possible, without duplicates.

    Args:
        solutions (sequence):
            Objects with `steps` (tuple of `str`) and `reward` (`float`).
        num_kept (`int`):
            How many to keep.
        rng (`random.Random`):
            Source of the choice among equals.

    Returns:
        `list`: at most `num_kept` of them. If one side has too few, the other fills up.
    """
    unique = list({solution.steps: solution for solution in solutions if solution.steps}.values())
    rng.shuffle(unique)
    correct = [solution for solution in unique if solution.reward >= 0.5]
    wrong = [solution for solution in unique if solution.reward < 0.5]
    num_correct = min(len(correct), max((num_kept + 1) // 2, num_kept - len(wrong)))
    return correct[:num_correct] + wrong[: num_kept - num_correct]


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
        `list[float | None]` of length N.
    """
    if not problems:
        return []
    columns = {name: [problem[name] for problem in problems] for name in problems[0] if name != "prompt"}
    prompts: list[Prompt] = [problem["prompt"] for problem in problems]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return reward_function(prompts=prompts, completions=completions, **columns)


class _Sampler:
    """Runs the engine and the reward function over all problems at once, and counts what comes back."""

    def __init__(
        self, engine: Engine, reward_function: RewardFunction, config: RolloutConfig, report: Counter[str]
    ) -> None:
        self.engine = engine
        self.reward_function = reward_function
        self.config = config
        self.report = report
        self._steps_of: dict[tuple[int, ...], tuple[list[tuple[int, ...]], tuple[str, ...]]] = {}

    def sample_solutions(self, trees: list[_Tree]) -> None:
        requests: list[tuple[_Tree, State]] = [(tree, ()) for tree in trees]
        samples = self._sample(requests, self.config.num_solutions, self.config.seed, "Solutions")
        for tree, solutions in zip(trees, samples, strict=True):
            tree.solutions = solutions
            self.report["solutions"] += len(solutions)

    def sample_completions(self, trees: list[_Tree]) -> None:
        requests = [(tree, state) for tree in trees for state in tree.states]
        samples = self._sample(requests, self.config.num_completions, self.config.seed + 1, "Completions")
        for (tree, state), completions in zip(requests, samples, strict=True):
            tree.completions[state] = completions
            self.report["completions"] += len(completions)

    def _sample(self, requests: list[tuple[_Tree, State]], n: int, seed: int, desc: str) -> list[list[_Rollout]]:
        prefixes = [tree.prompt_ids + _flatten(tree.states.get(state, [])) for tree, state in requests]
        sampled = self.engine.generate(prefixes, n, self.config.sampling, seed, desc) if prefixes else []
        flat = [(request, completion) for request, group in zip(requests, sampled, strict=True) for completion in group]
        rewards = self._judge(flat)
        rollouts = iter([self._rollout(pair[1], reward) for pair, reward in zip(flat, rewards, strict=True)])
        self.report["tokens_generated"] += sum(len(completion.ids) for _, completion in flat)
        groups = [[next(rollouts) for _ in group] for group in sampled]
        return [[rollout for rollout in group if rollout is not None] for group in groups]

    def _judge(self, flat: list[tuple[tuple[_Tree, State], Completion]]) -> list[float | None]:
        texts = ["".join(map(str, state)) + completion.text for (_, state), completion in flat]
        return judge([tree.row for (tree, _), _ in flat], texts, self.reward_function)

    def _rollout(self, completion: Completion, reward: float | None) -> _Rollout | None:
        truncated = completion.finish_reason == "length"
        self.report["truncated"] += truncated
        if reward is None and not truncated:
            self.report["not_judged"] += 1
            return None
        steps_ids: list[tuple[int, ...]] = []
        steps: tuple[str, ...] = ()
        if completion.text:
            steps_ids, steps = self._split(completion.ids)
        else:
            self.report["empty"] += 1  # ended at once: there is no step that a row could hold
        return _Rollout(steps_ids, steps, 0.0 if truncated or reward is None else float(reward), truncated)

    def _split(self, ids: tuple[int, ...]) -> tuple[list[tuple[int, ...]], tuple[str, ...]]:
        if ids not in self._steps_of:
            steps_ids = split_step_ids(ids, self.engine.tokenizer, self.config.separator)
            texts = step_texts(steps_ids, self.engine.tokenizer)
            self._steps_of[ids] = [tuple(step) for step in steps_ids], tuple(texts)
        return self._steps_of[ids]


def _check_problems(problems: Dataset) -> None:
    if len(problems) == 0:
        raise ValueError("The data set of problems is empty.")
    if "prompt" not in problems.column_names:
        raise ValueError(
            f"The problems need a column `prompt`, found only {problems.column_names}. Rename yours to it."
        )


def _with_signal(trees: list[_Tree], config: RolloutConfig, report: Counter[str]) -> list[_Tree]:
    """Leave out problems without any solution that could be judged and, if asked to, those with only one outcome."""
    judged = [tree for tree in trees if any(solution.steps for solution in tree.solutions)]
    report["problems_not_judged"] = len(trees) - len(judged)
    for name, reward in (("problems_all_correct", 1.0), ("problems_all_wrong", 0.0)):
        report[name] = sum(all(solution.reward == reward for solution in tree.solutions) for tree in judged)
    if not config.skip_uniform:
        return judged
    return [tree for tree in judged if len({solution.reward for solution in tree.solutions}) > 1]


def _states_of(solutions: list[_Rollout]) -> dict[State, list[tuple[int, ...]]]:
    """Every state from which a step was taken, the bare prompt included, with the ids of the steps that lead there."""
    return {
        solution.steps[:depth]: solution.steps_ids[:depth]
        for solution in solutions
        for depth in range(len(solution.steps))
    }


def _to_rows(trees: list[_Tree], engine: Engine, config: RolloutConfig, report: Counter[str]) -> Rollouts:
    lineage = {"generator": engine.name, "tokenizer_fingerprint": tokenizer_fingerprint(engine.tokenizer)}
    solutions: list[dict[str, Any]] = []
    states: list[dict[str, Any]] = []
    for tree in trees:
        counts = _count_outcomes(tree, config)
        source: dict[str, Any] = {
            name: tree.row[name] for name in ("prompt", "answer", "problem_id") if name in tree.row
        }
        source |= {"prompt_ids": tree.prompt_ids} | lineage
        valued = [solution for solution in tree.kept if all(state in counts for state in _states_of([solution]))]
        report["solutions_without_value"] += len(tree.kept) - len(valued)
        solutions += [source | _solution_row(solution, counts) for solution in valued]
        states += [source | _state_row(tree, state, counts, report) for state in tree.states]
    with_siblings = [row for row in states if len(row["candidates"]) > 1]
    report["states_with_one_candidate"] = len(states) - len(with_siblings)
    report["pairs"] = sum(len(row["candidates"]) for row in with_siblings)
    return Rollouts(Dataset.from_list(solutions), Dataset.from_list(with_siblings), dict(report))


def _count_outcomes(tree: _Tree, config: RolloutConfig) -> dict[State, Counts]:
    """
    Outcomes by state. The solutions themselves count for the prompt at most, because which of them were kept, and so
    which further states there are, was decided by their outcomes; and not even there when problems are kept for having
    both outcomes.
    """
    completions = [(state, rollout) for state, rollouts in tree.completions.items() for rollout in rollouts]
    samples = [Sample(state, rollout.actions, rollout.reward) for state, rollout in completions]
    if not config.skip_uniform:
        samples += [Sample((), (), solution.reward) for solution in tree.solutions]
    return prefix_counts(samples)


def _solution_row(solution: _Rollout, counts: dict[State, Counts]) -> dict[str, Any]:
    # The end of a solution has one outcome, seen as often as completions ended there, and in the solution itself.
    successes, rollouts = counts.get(solution.actions, Counts(0.0, 0))
    end = Counts(successes + solution.reward, rollouts + 1)
    observed = [*(counts[state] for state in _states_of([solution])), end]
    return {
        "completions": list(solution.steps),
        "values": [count.value for count in observed],
        "mc_successes": [count.successes for count in observed],
        "mc_rollouts": [count.rollouts for count in observed],
        "reward": solution.reward,
        "truncated": solution.truncated,
        "completions_ids": [list(ids) for ids in solution.steps_ids],
    }


def _state_row(tree: _Tree, state: State, counts: dict[State, Counts], report: Counter[str]) -> dict[str, Any]:
    """Candidates are the first steps of the completions from this state; one that breaks off is no candidate."""
    taken = [rollout for rollout in tree.completions[state] if rollout.steps]
    whole = [rollout for rollout in taken if not (rollout.truncated and len(rollout.steps) == 1)]
    report["candidates_cut_off"] += len(taken) - len(whole)
    first = {rollout.actions[0]: rollout for rollout in reversed(whole)}  # of equal actions, the one sampled first
    multiplicity = Counter(rollout.actions[0] for rollout in whole)
    observed = [counts[(*state, action)] for action in multiplicity]
    rollouts = [first[action] for action in multiplicity]
    return {
        "prefix": list(state),
        "candidates": [rollout.steps[0] for rollout in rollouts],
        "counts": list(multiplicity.values()),
        "values": [count.value for count in observed],
        "mc_successes": [count.successes for count in observed],
        "mc_rollouts": [count.rollouts for count in observed],
        "rewards": [rollout.reward if len(rollout.steps) == 1 else None for rollout in rollouts],
        "prefix_ids": [list(ids) for ids in tree.states[state]],
        "candidates_ids": [list(rollout.steps_ids[0]) for rollout in rollouts],
    }


def _flatten(steps_ids: Sequence[Sequence[int]]) -> list[int]:
    return [token for step in steps_ids for token in step]
