"""
Accuracy of a policy: greedy, mean@k and pass@k, with 95% intervals by bootstrap over problems.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from datasets import Dataset

from dapo_trl.engines import Engine, SamplingConfig, sample_seed
from dapo_trl.intervals import Estimate
from dapo_trl.judging import judge
from dapo_trl.progress import CompletionBar
from dapo_trl.tokenization import encode_prompt, template_arguments


@dataclass(frozen=True)
class Evaluation:
    """
    Accuracy of a policy on a set of problems.

    Attributes:
        greedy ([`Estimate`]):
            Share of problems solved by greedy decoding.
        mean_at_k ([`Estimate`]):
            Mean share of correct samples: the accuracy of one sample.
        pass_at_k ([`Estimate`]):
            Probability that at least one of k samples is correct (unbiased).
        k (`int`):
            Samples per problem.
        num_problems (`int`):
            Problems.
        truncated (`int`):
            Samples cut at the longest length; they count as wrong.
        not_judged (`int`):
            Samples that the verifier could not judge; they count as wrong here and are reported.
        tokens (`int`):
            Tokens generated.
        pass_at (`dict[str, Estimate]`):
            The same for other k, by name, from the k samples (unbiased).
    """

    greedy: Estimate
    mean_at_k: Estimate
    pass_at_k: Estimate
    k: int
    num_problems: int
    truncated: int
    not_judged: int
    tokens: int
    pass_at: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcomes:
    """
    What a policy made of N problems.

    Attributes:
        greedy (`list[bool]`, length N, or 0 without greedy decoding):
            Whether greedy decoding solved each problem.
        sampled (`list[list[bool]]`, N lists of length k):
            Whether each sample of each problem is correct.
        truncated (`int`), not_judged (`int`), tokens (`int`):
            As of [`Evaluation`].
    """

    greedy: list[bool]
    sampled: list[list[bool]]
    truncated: int
    not_judged: int
    tokens: int

    @classmethod
    def merge(cls, parts: Sequence["Outcomes"]) -> "Outcomes":
        """
        Outcomes of several sets of problems as those of one.

        Args:
            parts (sequence of [`Outcomes`]):
                Outcomes with the same k.

        Returns:
            [`Outcomes`].
        """
        return cls(
            greedy=[is_right for part in parts for is_right in part.greedy],
            sampled=[group for part in parts for group in part.sampled],
            truncated=sum(part.truncated for part in parts),
            not_judged=sum(part.not_judged for part in parts),
            tokens=sum(part.tokens for part in parts),
        )


def evaluate_policy(
    problems: Dataset,
    engine: Engine,
    reward_function: Callable[..., list[float | None]],
    sampling: SamplingConfig | None = None,
    k: int = 4,
    seed: int = 0,
    pass_k: Sequence[int] = (),
) -> Evaluation:
    """
    Measure a policy on held-out problems: once greedily, and k times with `sampling`.

    Args:
        problems ([`~datasets.Dataset`]):
            Rows with `prompt` and the columns that the reward function takes. `tools` and `chat_template_kwargs` go to
            the chat template.
        engine ([`~dapo_trl.engines.Engine`]):
            Sampling back end of the policy.
        reward_function (`Callable`):
            TRL reward function; a reward of at least 1/2 counts as correct.
        sampling ([`~dapo_trl.engines.SamplingConfig`], *optional*):
            How to sample. `None` takes the defaults: temperature 1, up to 1,024 tokens.
        k (`int`, *optional*, defaults to `4`):
            Samples per problem.
        seed (`int`, *optional*, defaults to `0`):
            Seed of sampling and bootstrap.
        pass_k (sequence of `int`, *optional*):
            Other numbers of samples, from 1 to `k`, whose pass@k is estimated from the k samples of each problem.

    Returns:
        [`Evaluation`].

    Raises:
        ValueError: if there is no problem, `k` is below 1, or one of `pass_k` is not from 1 to `k`.
    """
    if len(problems) == 0:
        raise ValueError("There is no problem to evaluate on: the data set is empty.")
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    if wrong := [each for each in pass_k if not 1 <= each <= k]:
        raise ValueError(f"`pass_k` must be from 1 to `k`, which is {k}, got {wrong[0]}.")
    outcomes = attempt_problems(problems, engine, reward_function, sampling, k, seed)
    return Evaluation(
        greedy=bootstrap_mean(outcomes.greedy, seed),
        mean_at_k=bootstrap_mean(np.mean(outcomes.sampled, axis=1), seed),
        pass_at_k=bootstrap_mean([pass_at_k(k, sum(group), k) for group in outcomes.sampled], seed),
        pass_at={
            str(each): bootstrap_mean([pass_at_k(k, sum(group), each) for group in outcomes.sampled], seed)
            for each in pass_k
        },
        k=k,
        num_problems=len(problems),
        truncated=outcomes.truncated,
        not_judged=outcomes.not_judged,
        tokens=outcomes.tokens,
    )


def attempt_problems(
    problems: Dataset,
    engine: Engine,
    reward_function: Callable[..., list[float | None]],
    sampling: SamplingConfig | None = None,
    k: int = 4,
    seed: int = 0,
    is_greedy: bool = True,
    indices: Sequence[int] | None = None,
    show_progress: bool = True,
) -> Outcomes:
    """
    Let a policy attempt problems, and judge what comes out.

    Args:
        problems ([`~datasets.Dataset`] of N rows):
            Rows with `prompt` and the columns that the reward function takes.
        engine ([`~dapo_trl.engines.Engine`]):
            Sampling back end of the policy.
        reward_function (`Callable`):
            TRL reward function; a reward of at least 1/2 counts as correct.
        sampling ([`~dapo_trl.engines.SamplingConfig`], *optional*):
            How to sample. `None` takes the defaults: temperature 1, up to 1,024 tokens.
        k (`int`, *optional*, defaults to `4`):
            Samples per problem; 0 for none.
        seed (`int`, *optional*, defaults to `0`):
            Seed of sampling.
        is_greedy (`bool`, *optional*, defaults to `True`):
            Whether to decode greedily too.
        indices (sequence of `int`, length N, *optional*):
            Numbers of the problems, from which the seeds of their samples are derived. `None` counts from 0. With their
            numbers in the whole set, the parts of a set are sampled like the whole.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Returns:
        [`Outcomes`].
    """
    sampling = sampling or SamplingConfig()
    rows = list(problems)
    prefixes = [encode_prompt(row["prompt"], engine.tokenizer, **template_arguments(row)) for row in rows]
    seeds = [[sample_seed(seed, index, number) for number in range(max(k, 1))] for index in indices or range(len(rows))]

    def attempt(title: str, n: int, config: SamplingConfig) -> Outcomes:
        with CompletionBar(len(rows) * n, f"Evaluating ({title})", not show_progress) as bar:
            found = engine.generate(prefixes, [group[:n] for group in seeds], config, bar.add)
        flat = [completion for completions in found for completion in completions]
        rewards = judge([row for row in rows for _ in range(n)], [each.text for each in flat], reward_function)
        judged = [
            each.finish_reason == "stop" and reward is not None and reward >= 0.5
            for each, reward in zip(flat, rewards, strict=True)
        ]
        return Outcomes(
            greedy=[],
            sampled=[judged[start : start + n] for start in range(0, len(judged), n)],
            truncated=sum(each.finish_reason == "length" for each in flat),
            not_judged=sum(reward is None for reward in rewards),
            tokens=sum(len(each.ids) for each in flat),
        )

    parts = []
    if is_greedy:
        greedy = attempt("greedy", 1, replace(sampling, temperature=0.0))
        parts.append(replace(greedy, greedy=[group[0] for group in greedy.sampled], sampled=[]))
    if k:
        parts.append(attempt(f"mean@{k}", k, sampling))
    return Outcomes.merge(parts)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    r"""
    Unbiased estimate of the probability that at least one of k samples is correct.

    $1 - \binom{n - c}{k} / \binom{n}{k}$ for c correct among n samples (Chen et al. 2021, arXiv 2107.03374).

    Args:
        num_samples (`int`):
            n, samples drawn.
        num_correct (`int`):
            c, correct among them.
        k (`int`):
            Samples allowed, at most n.

    Returns:
        `float` in [0, 1].

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.

    Example:

    ```python
    >>> from dapo_trl.evaluation import pass_at_k

    >>> pass_at_k(num_samples=4, num_correct=1, k=2)
    0.5

    ```
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            f"Expected 0 <= num_correct <= num_samples and 1 <= k <= num_samples, got {num_correct=}, {num_samples=}, "
            f"{k=}."
        )
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int = 0, num_resamples: int = 2000) -> Estimate:
    """
    Mean over problems with a 95% percentile bootstrap interval.

    Args:
        values (sequence of `float`, length N):
            One number per problem.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.
        num_resamples (`int`, *optional*, defaults to `2000`):
            Bootstrap resamples.

    Returns:
        [`Estimate`].

    Raises:
        ValueError: if there is no value.

    Example:

    ```python
    >>> from dapo_trl.evaluation import bootstrap_mean

    >>> bootstrap_mean([1.0, 1.0, 1.0])
    Estimate(mean=1.0, low=1.0, high=1.0)

    ```
    """
    x_N = np.asarray(values, dtype=np.float64)
    if x_N.size == 0:
        raise ValueError("There is no value to take a mean of.")
    rng = np.random.default_rng(seed)
    means = [x_N[rng.integers(x_N.size, size=x_N.size)].mean() for _ in range(num_resamples)]
    return Estimate.from_draws(x_N.mean(), means)
