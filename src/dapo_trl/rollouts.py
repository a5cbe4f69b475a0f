"""
Solutions of each problem, and completions from every state of those that are kept: the data behind all step values.

Two stages: [`sample_solutions`], then [`value_solutions`]. Each takes some problems, and what it gives for one problem
does not depend on the others, so that `stages.py` can work through a data set in any portions, on disk and resumable.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.rewards import get_soft_overlong_punishment

from dapo_trl.code_steps import STATEMENTS, statement_ends
from dapo_trl.continuations import text_context
from dapo_trl.engines import Completion, Engine, OnCompletion, PrefixError, SamplingConfig, sample_seed
from dapo_trl.judging import RewardFunction, judge
from dapo_trl.progress import CompletionBar
from dapo_trl.state_tree import Rollout, StateTree
from dapo_trl.steps import Separator, first_step_ids, split_ids
from dapo_trl.tables import PROBLEM_COLUMNS, problem_row, table_features, to_dataset, with_problem_ids
from dapo_trl.tokenization import encode_prompt, template_arguments, tokenizer_fingerprint
from dapo_trl.values import State, StoppingRule


Row = dict[str, Any]

OVERLONG = ("wrong", "drop", "soft")
_NUM_REMEMBERED = 1024  # completions whose steps are kept at hand


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
            Completions of every state of the kept solutions, the bare prompt included.
        sampling ([`~dapo_trl.engines.SamplingConfig`], *optional*):
            How to sample. `max_new_tokens` bounds a whole solution: a completion of a state gets what the state's steps
            leave of it, as much as one that passes there.
        separator (`str`, *optional*, defaults to `"\\n"`):
            Text that ends a step; or `"<statements>"`, for the statements of Python code, see
            [`~dapo_trl.code_steps.statement_ends`].
        skip_uniform (`bool`, *optional*, defaults to `True`):
            Skip problems whose solutions are all correct or all wrong: hardly any choice matters there, and most of the
            tokens are spent on their completions. They are counted.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all sampling.
        min_completions (`int`, *optional*):
            Completions after which, and after every further multiple of which, a state whose value is known to
            `precision` gets no more, see [`~dapo_trl.values.StoppingRule`]. `None` gives every state
            `num_completions`, as the paper does.
        precision (`float`, *optional*, defaults to `0.08`):
            Posterior standard deviation of a value that is enough. Only used with `min_completions`.
        reuse (`bool`, *optional*, defaults to `True`):
            Whether completions of a state that pass through a later one count towards that one's number: they are as
            good as its own. `False` draws `num_completions` from every state, as the paper does.
        overlong (`str`, *optional*, defaults to `"wrong"`):
            What becomes of samples that reach `max_new_tokens`. `"wrong"` counts them as wrong, `"drop"` in no mean
            that they would enter, as if they could not be judged. `"soft"` counts them as wrong too, and the outcomes
            of others that come near are lowered, by the soft overlong punishment of arXiv 2503.14476 (equation 13) and
            not below 0: a right solution of the last `overlong_buffer` tokens is worth the less, the longer it is.
        overlong_buffer (`int`, *optional*):
            Tokens over which `"soft"` lowers them. `None` takes a fifth of `max_new_tokens`, as that paper does (4,096
            of 20,480).

    Raises:
        ValueError: if a number is out of range, the separator is no text or empty, or an option is unknown.
    """

    num_solutions: int = 32
    num_kept: int = 6
    num_completions: int = 16
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    separator: str = "\n"
    skip_uniform: bool = True
    seed: int = 0
    min_completions: int | None = None
    precision: float = 0.08
    reuse: bool = True
    overlong: str = "wrong"
    overlong_buffer: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_solutions", "num_kept", "num_completions"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_kept > self.num_solutions:
            raise ValueError(f"Cannot keep {self.num_kept} of {self.num_solutions} solutions. Lower `num_kept`.")
        if self.num_completions < 2:
            raise ValueError("`num_completions` must be at least 2: advantages compare the next steps of one state.")
        if not isinstance(self.separator, str) or not self.separator:
            raise ValueError(
                f'`separator` must be a text that is not empty, such as "\\n", got {self.separator!r:.80}. Patterns '
                "and functions are for `split_steps` only: the settings of a run are kept as JSON."
            )
        if self.overlong not in OVERLONG:
            raise ValueError(f"`overlong` must be 'wrong', 'drop' or 'soft', got {self.overlong!r}.")
        most, buffer = self.sampling.max_new_tokens, self.overlong_buffer
        if buffer is not None and (self.overlong != "soft" or not 1 <= buffer <= most):
            raise ValueError(
                f'`overlong_buffer` is about `overlong="soft"`, and from 1 to `max_new_tokens`, which is {most}; got '
                f"{buffer} with `overlong={self.overlong!r}`."
            )
        if self.overlong == "soft" and self.min_completions is not None:
            raise ValueError(
                '`min_completions` stops by outcomes that are right or wrong, and `overlong="soft"` makes others. '
                "Remove one of them."
            )
        self.stopping_rule  # noqa: B018 (checks its numbers)

    def describe(self) -> dict[str, Any]:
        """What results depend on, to be compared with later; without options that were added since, where not used."""
        settings = asdict(self)
        if self.overlong == "wrong":
            del settings["overlong"]
        if self.overlong_buffer is None:
            del settings["overlong_buffer"]
        return settings

    @property
    def stopping_rule(self) -> StoppingRule:
        """When a state has enough completions."""
        minimum = self.num_completions if self.min_completions is None else self.min_completions
        return StoppingRule(minimum, self.num_completions, self.precision)


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


class _Request(NamedTuple):
    """Completions wanted of a state."""

    row: Row  # the problem
    prefix: State
    prefix_ids: list[int]
    seeds: list[int]
    limit: int  # tokens
    last_step: tuple[int, ...] = ()  # of the state


def sample_solutions(
    problems: Sequence[Row],
    engine: Engine,
    reward_function: RewardFunction,
    config: RolloutConfig,
    on_completion: OnCompletion | None = None,
) -> tuple[list[Row], dict[str, int]]:
    """
    Sample and judge solutions.

    Args:
        problems (sequence of `dict`):
            Rows with `prompt` (text or messages), `problem_id` and whatever columns the reward function takes. `tools`
            and `chat_template_kwargs` go to the chat template.
        engine ([`~dapo_trl.engines.Engine`]):
            Sampling back end of the reference policy.
        reward_function (`Callable`):
            TRL reward function, see [`collect_rollouts`].
        config ([`RolloutConfig`]):
            Numbers of samples and how to draw them.
        on_completion (`Callable`, *optional*):
            Called with every completion as it is done.

    Returns:
        `tuple[list[dict], dict[str, int]]`: `num_solutions` rows a problem with the problem's columns, `prompt_ids`,
        `completions` (the steps), `completions_ids`, `reward` (`None` if it counts not at all), `truncated`, `sample`
        (its number) and lineage; and counts of what was sampled.
    """
    sampler = _Sampler(engine, reward_function, config, on_completion)
    requests = []
    for problem in problems:
        seeds = [sample_seed(config.seed, problem["problem_id"], number) for number in range(config.num_solutions)]
        prompt_ids = encode_prompt(problem["prompt"], engine.tokenizer, **template_arguments(problem))
        requests.append(_Request(problem, (), prompt_ids, seeds, config.sampling.max_new_tokens))
    rows = []
    for request, rollouts in zip(requests, sampler.sample(requests), strict=True):
        for number, rollout in enumerate(rollouts):
            rows.append(request.row | _raw_row(rollout, number) | {"prompt_ids": request.prefix_ids} | sampler.lineage)
    sampler.counts.update(problems=len(problems), solutions=len(rows))
    _count_outcomes(rows, sampler.counts)
    return rows, dict(sampler.counts)


def group_by_problem(rows: Sequence[Row]) -> list[list[Row]]:
    """
    Rows of each problem.

    Args:
        rows (sequence of `dict`):
            Rows with `problem_id`, those of one problem together.

    Returns:
        `list[list[dict]]`: a list a problem.
    """
    return [list(group) for _, group in groupby(rows, key=lambda row: row["problem_id"])]


def has_signal(rows: Sequence[Row]) -> bool:
    """
    Whether the solutions of a problem differ in their outcome.

    Args:
        rows (sequence of `dict`):
            Solutions of one problem, as of [`sample_solutions`].

    Returns:
        `bool`: `False` too if none could be judged.
    """
    return len({row["reward"] for row in rows if row["reward"] is not None}) > 1


def value_solutions(
    rows: Sequence[Row],
    engine: Engine,
    reward_function: RewardFunction,
    config: RolloutConfig,
    on_completion: OnCompletion | None = None,
) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """
    Keep some solutions of each problem, sample completions from all their states, and give every state its value.

    States are worked through from the prompt on, so that a state counts what has passed through it before it draws
    completions of its own. A state that several solutions share is estimated once. See [`StateTree`] for which
    completions count where, and [`StateTree.rows`] for the counts of what was left out.

    Args:
        rows (sequence of `dict`):
            Solutions as of [`sample_solutions`], those of one problem together.
        engine ([`~dapo_trl.engines.Engine`]):
            Sampling back end of the reference policy.
        reward_function (`Callable`):
            TRL reward function, see [`collect_rollouts`].
        config ([`RolloutConfig`]):
            Numbers of samples and how to draw them.
        on_completion (`Callable`, *optional*):
            Called with every completion as it is done.

    Returns:
        `tuple[dict[str, list[dict]], dict[str, int]]`: tables `solutions` and `states`, as of [`Rollouts`]; and counts.
    """
    sampler = _Sampler(engine, reward_function, config, on_completion)
    trees = [(group, tree) for group in group_by_problem(rows) if (tree := _plant(group, config)) is not None]
    _fill([(group[0], tree) for group, tree in trees], sampler)
    tables: dict[str, list[Row]] = {"solutions": [], "states": []}
    for group, tree in trees:
        _harvest(group, tree, config, sampler, tables)
    sampler.counts["pairs"] += sum(len(row["candidates"]) for row in tables["states"])
    return tables, dict(sampler.counts)


def fill_trees(
    trees: Sequence[tuple[Row, StateTree]],
    engine: Engine,
    reward_function: RewardFunction,
    config: RolloutConfig,
    on_completion: OnCompletion | None = None,
) -> dict[str, int]:
    """
    Sample completions until every state of some problems has enough.

    Args:
        trees (sequence of `tuple[dict, StateTree]`):
            A problem with `problem_id`, `prompt_ids` and the columns that the reward function takes, and its states.
        engine ([`~dapo_trl.engines.Engine`]):
            Sampling back end of the reference policy.
        reward_function (`Callable`):
            TRL reward function, see [`collect_rollouts`].
        config ([`RolloutConfig`]):
            How to draw them. How many is the trees' rule.
        on_completion (`Callable`, *optional*):
            Called with every completion as it is done.

    Returns:
        `dict[str, int]`: counts of what was sampled.
    """
    sampler = _Sampler(engine, reward_function, config, on_completion)
    _fill(trees, sampler)
    return dict(sampler.counts)


def collect_rollouts(
    problems: Dataset, engine: Engine, reward_function: RewardFunction, config: RolloutConfig | None = None
) -> Rollouts:
    """
    Sample solutions, keep some, sample completions from every state of those, and turn them into rows with step values.

    All in memory and in one go; `dapo-trl sample` and `dapo-trl values` do the same on disk, and go on after a kill.

    A state that several solutions share is estimated once, and a completion counts for every state it passes through
    (see [`~dapo_trl.values.prefix_counts`]). A truncated completion counts as wrong, unless `overlong` says otherwise,
    and is not shown to the reward function; one that cannot be judged counts not at all. Both are in the report.

    Args:
        problems ([`~datasets.Dataset`]):
            Rows with `prompt` (text or messages) and whatever columns the reward function takes, such as `answer`.
            `tools` and `chat_template_kwargs` go to the chat template, and stay with the rows.
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
        ValueError: if `problems` is empty, lacks a column or has one too many, or a prompt leaves no room for a
            solution; or the reward function returns anything but outcomes in [0, 1].
    """
    config = config or RolloutConfig()
    problems = with_problem_ids(problems)
    features = table_features(problems.features)
    counts: Counter[str] = Counter()
    with CompletionBar(len(problems) * config.num_solutions, "Solutions") as bar:
        rows, sampled = sample_solutions(list(problems), engine, reward_function, config, bar.add)
    with CompletionBar(None, "Completions") as bar:
        tables, valued = value_solutions(rows, engine, reward_function, config, bar.add)
    for part in (sampled, valued):
        counts.update(part)
    solutions, states = (to_dataset(tables[name], features[name]) for name in ("solutions", "states"))
    return Rollouts(solutions, states, dict(counts))


def select_balanced(solutions: Sequence[Any], num_kept: int, rng: random.Random) -> list[Any]:
    """
    Choose solutions, correct (reward at least 1/2) and wrong as balanced as possible, without duplicates.

    Solutions of the same words are different if one was ended and the other broke off.

    Args:
        solutions (sequence):
            Objects with `actions` (tuple, see [`~dapo_trl.state_tree.Rollout`]) and `reward` (`float`). Those
            without actions are left out.
        num_kept (`int`):
            How many to keep.
        rng (`random.Random`):
            Source of the choice among equals.

    Returns:
        `list`: at most `num_kept` of them. If one side has too few, the other fills up.
    """
    first: dict[Any, Any] = {}
    for solution in solutions:
        if solution.actions:
            first.setdefault(solution.actions, solution)
    unique = list(first.values())
    rng.shuffle(unique)
    correct = [solution for solution in unique if solution.reward >= 0.5]
    wrong = [solution for solution in unique if solution.reward < 0.5]
    num_correct = min(len(correct), max((num_kept + 1) // 2, num_kept - len(wrong)))
    return correct[:num_correct] + wrong[: num_kept - num_correct]


class _Sampler:
    """Runs the engine and the reward function, and counts what comes back."""

    def __init__(
        self,
        engine: Engine,
        reward_function: RewardFunction,
        config: RolloutConfig,
        on_completion: OnCompletion | None = None,
    ) -> None:
        self.engine = engine
        self.reward_function = reward_function
        self.config = config
        self.on_completion = on_completion
        self.counts: Counter[str] = Counter(not_judged=0)
        self._punish = None
        if config.overlong == "soft":
            most = config.sampling.max_new_tokens
            self._punish = get_soft_overlong_punishment(most, config.overlong_buffer or max(most // 5, 1))
        self.lineage = {"generator": engine.name, "tokenizer_fingerprint": tokenizer_fingerprint(engine.tokenizer)}
        separator = statement_ends if config.separator == STATEMENTS else config.separator
        # a policy that is sure of itself says the same again and again
        self._split = lru_cache(_NUM_REMEMBERED)(partial(_split, engine.tokenizer, separator))
        self._alters = lru_cache(_NUM_REMEMBERED)(partial(_alters, engine.tokenizer, separator))

    def sample(self, requests: Sequence[_Request]) -> list[list[Rollout]]:
        """Judged completions of each request, in the order of its seeds."""
        sampled = self._generate(requests)
        flat = [(request, completion) for request, group in zip(requests, sampled, strict=True) for completion in group]
        whole = [(request, completion) for request, completion in flat if completion.finish_reason != "length"]
        texts = ["".join(map(str, request.prefix)) + completion.text for request, completion in whole]
        rewards = iter(judge([request.row for request, _ in whole], texts, self.reward_function))
        rollouts = iter(
            [
                self._rollout(request, completion, self._outcome(request, completion, rewards))
                for request, completion in flat
            ]
        )
        return [[next(rollouts) for _ in group] for group in sampled]

    def _outcome(self, request: _Request, completion: Completion, rewards: Iterator[float | None]) -> float | None:
        """Outcome of a completion: of a whole one the next reward, less what its length takes from it."""
        if completion.finish_reason == "length":
            return None if self.config.overlong == "drop" else 0.0
        reward = next(rewards)
        self.counts["not_judged"] += reward is None
        if reward is None or self._punish is None:
            return reward
        num_before = self.config.sampling.max_new_tokens - request.limit  # tokens of the state's steps
        (punishment,) = self._punish(completion_ids=[range(num_before + len(completion.ids))])
        return max(reward + punishment, 0.0)

    def _generate(self, requests: Sequence[_Request]) -> list[list[Completion]]:
        prefixes, seeds = [request.prefix_ids for request in requests], [request.seeds for request in requests]
        limits = [request.limit for request in requests]
        try:
            sampled = self.engine.generate(prefixes, seeds, self.config.sampling, self.on_completion, limits)
        except PrefixError as error:
            row, state = requests[error.index][:2]
            raise ValueError(f"Problem {row['problem_id']!r}, after {len(state)} steps: {error}") from error
        self.counts.update(self.engine.take_counts())
        return sampled

    def _rollout(self, request: _Request, completion: Completion, reward: float | None) -> Rollout:
        truncated = completion.finish_reason == "length"
        context = text_context(self.engine.tokenizer, request.prefix_ids)
        steps_ids, steps = self._split(context, completion.ids) if completion.text else ((), ())
        self.counts["tokens_generated"] += len(completion.ids)
        self.counts["truncated"] += truncated
        self.counts["empty"] += not steps  # ended at once: there is no step that a row could hold
        alters_state = bool(request.last_step) and self._alters(request.last_step, completion.ids)
        return Rollout(steps, steps_ids, reward, truncated, alters_state)


def _split(
    tokenizer: PreTrainedTokenizerBase, separator: Separator, context: tuple[int, ...], ids: tuple[int, ...]
) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
    steps_ids, texts = split_ids(list(ids), tokenizer, separator, context)
    return tuple(map(tuple, steps_ids)), tuple(texts)


def _alters(
    tokenizer: PreTrainedTokenizerBase, separator: Separator, last_step: tuple[int, ...], ids: tuple[int, ...]
) -> bool:
    return first_step_ids([*last_step, *ids], tokenizer, separator) != list(last_step)


def _plant(rows: list[Row], config: RolloutConfig) -> StateTree | None:
    """The states of the solutions that are kept of a problem; nothing if it carries no signal."""
    solutions = [
        Rollout(tuple(row["completions"]), tuple(map(tuple, row["completions_ids"])), row["reward"], row["truncated"])
        for row in rows
    ]
    judged = [solution for solution in solutions if solution.steps and solution.reward is not None]
    if not judged or (config.skip_uniform and not has_signal(rows)):
        return None
    # seeded by the problem alone, so that it does not matter which others are worked on
    rng = random.Random(sample_seed(config.seed, rows[0]["problem_id"], "kept"))
    return StateTree(select_balanced(judged, config.num_kept, rng), config.stopping_rule, config.reuse)


def _fill(trees: Sequence[tuple[Row, StateTree]], sampler: _Sampler) -> None:
    """Draw what the states of all problems want, again and again, until they want no more."""
    while wanted := [(row, tree, *request) for row, tree in trees for request in tree.wanted()]:
        requests = [
            _completion_request(row, tree, state, numbers, sampler.config) for row, tree, state, numbers in wanted
        ]
        for (_, tree, state, _), rollouts in zip(wanted, sampler.sample(requests), strict=True):
            sampler.counts["completions"] += len(rollouts)
            for rollout in rollouts:
                tree.add(state, rollout)


def _completion_request(row: Row, tree: StateTree, state: State, numbers: range, config: RolloutConfig) -> _Request:
    steps_ids = tree.states[state]
    ids = [token for step in steps_ids for token in step]
    seeds = [sample_seed(config.seed, row["problem_id"], state, number) for number in numbers]
    # A solution made of text that was tokenised anew may have used up its tokens before its last state: one is left.
    limit = max(1, config.sampling.max_new_tokens - len(ids))
    last_step = steps_ids[-1] if steps_ids else ()
    return _Request(problem_row(row), state, [*row["prompt_ids"], *ids], seeds, limit, last_step)


def _harvest(
    rows: list[Row], tree: StateTree, config: RolloutConfig, sampler: _Sampler, tables: dict[str, list[Row]]
) -> None:
    """
    Rows of a problem of which everything was sampled.

    The solutions themselves count for the prompt at most, because which of them were kept, and so which further states
    there are, was decided by their outcomes; and not even there when problems are kept for having both outcomes.
    """
    outcomes = [] if config.skip_uniform else [row["reward"] for row in rows if row["reward"] is not None]
    solutions, states, left_out = tree.rows(outcomes)
    source: Row = {name: rows[0][name] for name in PROBLEM_COLUMNS if name in rows[0]}
    source |= {"prompt_ids": list(rows[0]["prompt_ids"])} | sampler.lineage
    tables["solutions"] += [source | row for row in solutions]
    tables["states"] += [source | row for row in states]
    sampler.counts.update(left_out)
    sampler.counts.update(problems_kept=1, solutions_kept=len(tree.kept), states=len(tree.states))


def _raw_row(rollout: Rollout, number: int) -> Row:
    return {
        "completions": list(rollout.steps),
        "completions_ids": [list(ids) for ids in rollout.steps_ids],
        "reward": rollout.reward,
        "truncated": rollout.truncated,
        "sample": number,
    }


def _count_outcomes(rows: list[Row], counts: Counter[str]) -> None:
    for group in group_by_problem(rows):
        rewards = {row["reward"] for row in group}
        counts["problems_not_judged"] += rewards == {None}
        counts["problems_all_correct"] += rewards - {None} == {1.0}
        counts["problems_all_wrong"] += rewards - {None} == {0.0}
