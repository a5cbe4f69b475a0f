"""
A mean and how sure it is.
"""

from dataclasses import dataclass


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

    def __str__(self) -> str:
        return f"{self.mean:.1%} [{self.low:.1%}, {self.high:.1%}]"
