r"""
Which targets a policy could reach at all: advantage / beta is the log-ratio asked of a step; a probability ends at 1.
"""

from collections.abc import Sequence

import numpy as np


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
