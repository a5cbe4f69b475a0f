"""
Metrics that are right however the data is split over micro-batches and processes.
"""

from collections import defaultdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.operations import recursively_apply


class RatioMetrics:
    """
    Collects metrics as sums of numerators and denominators, so that what is logged is a mean over pairs or states, not
    a mean of means over batches of different size.

    Example:

    ```python
    >>> import torch
    >>> from accelerate import Accelerator
    >>> from dapo_trl.metrics import RatioMetrics

    >>> metrics = RatioMetrics()
    >>> metrics.add("sign_accuracy", torch.tensor(3.0), torch.tensor(4.0))
    >>> metrics.add("sign_accuracy", torch.tensor(0.0), torch.tensor(1.0))
    >>> metrics.pop(Accelerator(cpu=True))
    {'sign_accuracy': 0.6}

    ```
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, name: str, numerator: torch.Tensor, denominator: torch.Tensor) -> None:
        """Add to a metric. Both arguments are scalars of this process; they are summed over processes when logged."""
        # float64, where a device has it; counts may come from the CPU while the rest is on a device
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        terms = [term.detach().to(numerator.device, dtype) for term in (numerator, denominator)]
        self._sums[name].append(torch.stack(terms))

    def clear(self) -> None:
        """Forget what was added since the last call of `pop`."""
        self._sums.clear()

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Ratios since the last call, over all processes; a metric whose denominator is zero is left out."""
        if not self._sums:
            return {}
        sums = torch.stack([torch.stack(terms).sum(0).to(accelerator.device) for terms in self._sums.values()])
        totals = accelerator.reduce(sums, reduction="sum").tolist()
        names = list(self._sums)
        self._sums.clear()
        return {name: top / bottom for name, (top, bottom) in zip(names, totals, strict=True) if bottom}


def gather_uneven(accelerator: Accelerator, tensors: Any) -> Any:
    """
    Gather tensors whose first dimension differs between processes: rows hold different numbers of pairs and states.

    `Accelerator.gather_for_metrics` takes the first dimension of the last batch for its number of rows and cuts off the
    rest.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.
        tensors (`torch.Tensor` or a list, tuple or dict of them):
            This process's part.

    Returns:
        The parts of all processes, concatenated along the first dimension.
    """
    if accelerator.num_processes == 1:
        return tensors

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        sizes = accelerator.gather(torch.tensor([len(tensor)], device=accelerator.device)).tolist()
        parts = accelerator.gather(accelerator.pad_across_processes(tensor, dim=0)).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return recursively_apply(gather, tensors)
