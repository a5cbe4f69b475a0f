"""
A mean and how sure it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """
    A mean over problems and its 95% interval.

    Attributes:
        mean (`float`):
            The estimate, in [0, 1] for shares.
        low (`float`), high (`float`):
            Ends of the 95% percentile bootstrap interval.

    Example:

    ```python
    >>> from dapo_trl.intervals import Estimate

    >>> str(Estimate(mean=0.5, low=0.45, high=0.552))
    '50.0% [45.0%, 55.2%]'

    ```
    """

    mean: float
    low: float
    high: float

    @classmethod
    def from_draws(cls, mean: float, draws: Sequence[float] | np.ndarray) -> "Estimate":
        """
        A mean with the percentile interval of its bootstrap draws.

        Args:
            mean (`float`):
                The estimate.
            draws (sequence of `float`):
                What resamples give. Those in which it cannot be measured, NaN, do not count; without any, the interval
                is the estimate itself.

        Returns:
            [`Estimate`].
        """
        x = np.asarray(draws, dtype=np.float64)
        finite = x[np.isfinite(x)]
        low, high = np.quantile(finite, [0.025, 0.975]) if finite.size else (mean, mean)
        return cls(float(mean), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.mean:.1%} [{self.low:.1%}, {self.high:.1%}]"
