r"""
What is asked of a step: its log-ratio is to become advantage / beta. Which of these targets a policy could reach at
all, as a probability ends at 1; and the log-partition, less which they are those of the soft-optimal policy.
"""

from collections.abc import Sequence

import numpy as np


LOG_PARTITIONS = ("sample", "gaussian")


def excess_nats(advantages: Sequence[float], ref_logps: Sequence[float], beta: float) -> np.ndarray:
    r"""
    By how much each target exceeds certainty.

    The target of a step is $\log \pi(a|s) = A / \beta + \log \pi_{ref}(a|s)$ (arXiv 2412.18279, the zero of its loss);
    a log-probability is at most 0.

    Args:
        advantages (sequence of `float`, length P):
            Advantages of the pairs.
        ref_logps (sequence of `float`, length P):
            Log-probabilities of their steps under the reference, in nats.
        beta (`float`):
            Scale of the target.

    Returns:
        `np.ndarray` of shape `(P,)`: in nats, 0 where the target can be reached.

    Example:

    ```python
    >>> from dapo_trl.targets import excess_nats

    >>> excess_nats([0.5, 0.5, -0.5], [-1.0, -6.0, -1.0], beta=0.1).tolist()
    [4.0, 0.0, 0.0]

    ```
    """
    return np.maximum(np.asarray(advantages, dtype=np.float64) / beta + np.asarray(ref_logps, dtype=np.float64), 0.0)


def reachable_beta(advantages: Sequence[float], ref_logps: Sequence[float], share: float = 0.05) -> float:
    r"""
    Smallest beta at which at most a given share of the targets exceeds certainty.

    The target of a pair exceeds it if and only if $\beta < A / (-\log \pi_{ref})$; the result is a quantile of these.

    Args:
        advantages (sequence of `float`, length P):
            Advantages of the pairs.
        ref_logps (sequence of `float`, length P):
            Log-probabilities of their steps under the reference, in nats.
        share (`float`, *optional*, defaults to `0.05`):
            Share of the pairs that may exceed it.

    Returns:
        `float`: infinite if more pairs than that are certain already.

    Example:

    ```python
    >>> from dapo_trl.targets import reachable_beta

    >>> reachable_beta([0.5, 0.5, -0.5], [-1.0, -5.0, -1.0], share=0.0)
    0.5

    ```
    """
    gains, nats = np.asarray(advantages, dtype=np.float64), 0.0 - np.asarray(ref_logps, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        limits = np.sort(np.where(gains > 0, gains / nats, 0.0))
    return float(limits[max(len(limits) - 1 - int(share * len(limits) + 1e-9), 0)])


def log_partition(
    advantages: Sequence[float], beta: float, counts: Sequence[int] | None = None, kind: str = "sample"
) -> float:
    r"""
    Log-partition of the soft-optimal policy of one state, from the candidates that the reference sampled there.

    $$
    \log Z = \log E_{a \sim \pi_{ref}} \exp(A(a) / \beta), \qquad
    \pi^* = \pi_{ref} \exp(A / \beta) / Z
    $$

    `"sample"` takes the mean over the samples; `"gaussian"` what the expectation is if advantages are normally
    distributed,

    $$
    \log Z = \frac{\mu}{\beta} + \frac{\sigma^2}{2 \beta^2}
    $$

    with the mean and variance of the samples, in closed form as in analytic energy-guided policy optimization (arXiv
    2505.01822, for diffusion policies; worked out for steps from its description).

    Args:
        advantages (sequence of `float`, length C):
            Advantages of the candidates of a state.
        beta (`float`):
            Scale of the target, positive.
        counts (sequence of `int`, length C, *optional*):
            How often each was sampled. `None` counts every candidate once.
        kind (`str`, *optional*, defaults to `"sample"`):
            `"sample"` or `"gaussian"`.

    Returns:
        `float`: in nats. That of `"sample"` lies between mean and largest advantage / beta, as the true one does; that
        of `"gaussian"` may exceed the largest, and is then of no use, see [`gaussian_excess`].

    Raises:
        ValueError: if lengths differ, there is no candidate, `beta` is not positive, or there is no such kind.

    Example:

    ```python
    >>> from dapo_trl.targets import log_partition

    >>> [round(log_partition([0.5, -0.5], b, kind=kind), 2) for kind in ("sample", "gaussian") for b in (1.0, 0.1)]
    [0.12, 4.31, 0.12, 12.5]

    ```
    """
    if kind not in LOG_PARTITIONS:
        raise ValueError(f"`kind` must be 'sample' or 'gaussian', got {kind!r}.")
    if not beta > 0:
        raise ValueError(f"`beta` must be positive, got {beta}.")
    t_C = np.asarray(advantages, dtype=np.float64) / beta
    n_C = np.ones_like(t_C) if counts is None else np.asarray(counts, dtype=np.float64)
    if t_C.ndim != 1 or t_C.size == 0 or t_C.shape != n_C.shape:
        raise ValueError(f"Every candidate needs an advantage and a count: got {t_C.shape} and {n_C.shape}.")
    w_C = n_C / n_C.sum()
    mean = float(w_C @ t_C)
    if kind == "gaussian":
        return mean + float(w_C @ (t_C - mean) ** 2) / 2
    most = float(t_C.max())
    return most + float(np.log(w_C @ np.exp(t_C - most)))


def gaussian_excess(advantages: Sequence[float], beta: float, counts: Sequence[int] | None = None) -> float:
    r"""
    By how much the Gaussian form of the log-partition exceeds what is possible: the log of a mean of exponentials is no
    larger than the largest exponent.

    Advantages are differences of probabilities, and so end where a normal distribution goes on: for small beta the
    Gaussian form answers for steps that do not exist. Of two equally frequent candidates it exceeds the largest target
    as soon as these are more than 2 nats from the mean: where beta is less than a quarter of the gap between them.

    Args:
        advantages (sequence of `float`, length C):
            Advantages of the candidates of a state.
        beta (`float`):
            Scale of the target, positive.
        counts (sequence of `int`, length C, *optional*):
            How often each was sampled.

    Returns:
        `float`: in nats, 0 where it is possible.

    Example:

    ```python
    >>> from dapo_trl.targets import gaussian_excess

    >>> gaussian_excess([0.5, -0.5], beta=0.25), gaussian_excess([0.5, -0.5], beta=0.125)
    (0.0, 4.0)

    ```
    """
    most = float(np.max(advantages)) / beta
    return max(log_partition(advantages, beta, counts, "gaussian") - most, 0.0)
