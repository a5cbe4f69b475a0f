"""
Accuracy of a policy: greedy, mean@k and pass@k, with 95% intervals by bootstrap over problems.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset

from dapo_trl.engines import Engine, SamplingConfig, sample_seed
from dapo_trl.progress import CompletionBar
from dapo_trl.rollouts import judge
from dapo_trl.tokenization import encode_prompt, template_arguments


@dataclass(frozen=True)
class Estimate:
    """
    A mean over problems and its 95% interval.

    Attributes:
        mean (`float`):
            The estimate, in [0, 1].
        low (`float`), high (`float`):
            Ends of the 95% percentile bootstrap interval.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1%} [{self.low:.1%}, {self.high:.1%}]"


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
    """

    greedy: Estimate
    mean_at_k: Estimate
    pass_at_k: Estimate
    k: int
    num_problems: int
    truncated: int
    not_judged: int
    tokens: int


def evaluate_policy(
    problems: Dataset,
    engine: Engine,
    reward_function: Callable[..., list[float | None]],
    sampling: SamplingConfig | None = None,
    k: int = 4,
    seed: int = 0,
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

    Returns:
        [`Evaluation`].

    Raises:
        ValueError: if there is no problem, or `k` is below 1.
    """
    sampling = sampling or SamplingConfig()
    if len(problems) == 0:
        raise ValueError("There is no problem to evaluate on: the data set is empty.")
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    prefixes = [encode_prompt(row["prompt"], engine.tokenizer, **template_arguments(row)) for row in problems]
    seeds = [[sample_seed(seed, index, number) for number in range(k)] for index in range(len(prefixes))]
    with CompletionBar(len(prefixes), "Evaluating (greedy)") as bar:
        greedy = engine.generate(prefixes, [group[:1] for group in seeds], replace(sampling, temperature=0.0), bar.add)
    with CompletionBar(len(prefixes) * k, f"Evaluating (mean@{k})") as bar:
        sampled = engine.generate(prefixes, seeds, sampling, bar.add)
    rows = list(problems)
    correct, not_judged = [], 0
    for group, n in ((greedy, 1), (sampled, k)):
        flat = [completion for completions in group for completion in completions]
        repeated = [row for row in rows for _ in range(n)]
        rewards = judge(repeated, [completion.text for completion in flat], reward_function)
        judged = [
            c.finish_reason == "stop" and reward is not None and reward >= 0.5
            for c, reward in zip(flat, rewards, strict=True)
        ]
        not_judged += sum(reward is None for reward in rewards)
        correct.append(np.array(judged, dtype=np.float64).reshape(len(problems), n))
    completions = [c for group in (greedy, sampled) for completions in group for c in completions]
    return Evaluation(
        greedy=bootstrap_mean(correct[0].mean(axis=1), seed),
        mean_at_k=bootstrap_mean(correct[1].mean(axis=1), seed),
        pass_at_k=bootstrap_mean([pass_at_k(k, int(row.sum()), k) for row in correct[1]], seed),
        k=k,
        num_problems=len(problems),
        truncated=sum(c.finish_reason == "length" for c in completions),
        not_judged=not_judged,
        tokens=sum(len(c.ids) for c in completions),
    )


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
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(x_N.mean()), float(low), float(high))
