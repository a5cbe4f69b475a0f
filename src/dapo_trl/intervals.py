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
            Ends of the 95% bootstrap interval.

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

    @classmethod
    def from_biased_draws(cls, mean: float, draws: Sequence[float] | np.ndarray) -> "Estimate":
        """
        The same of a mean of distances, which noise only ever makes larger: of a resample it is too large once more, by
        as much as the estimate itself is. Draws are mirrored at the estimate (basic bootstrap), so that this is taken
        off, and cut off at 0.

        Args:
            mean (`float`):
                The estimate, 0 or more.
            draws (sequence of `float`):
                What resamples give, see [`from_draws`][Estimate.from_draws].

        Returns:
            [`Estimate`].
        """
        mirrored = 2 * mean - np.asarray(draws, dtype=np.float64)
        finite = mirrored[np.isfinite(mirrored)]
        found = cls.from_draws(finite.mean() if finite.size else mean, finite)
        return cls(max(found.mean, 0.0), max(found.low, 0.0), max(found.high, 0.0))

    def __str__(self) -> str:
        return f"{self.mean:.1%} [{self.low:.1%}, {self.high:.1%}]"
