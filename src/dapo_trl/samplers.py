"""
The order in which rows are trained on: problems are shuffled, the rows of one problem stay together.

Rows of one prompt share their prefixes, but only rows of one batch can be laid out in one tree.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler


def group_rows(dataset: Dataset) -> list[list[int]]:
    """
    Indices of rows, grouped by prompt; within a group neighbours share the most.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenized rows, with a column `prompt_key`.

    Returns:
        `list[list[int]]`: groups in the order of their first rows.
    """
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(dataset["prompt_key"]):
        groups.setdefault(key, []).append(index)
    return [_sort_group(dataset, indices) if len(indices) > 2 else indices for indices in groups.values()]


def _sort_group(dataset: Dataset, indices: list[int]) -> list[int]:
    rows: dict[str, Any] = dataset[indices]
    keys = [context + branches[0][0] for context, branches in zip(rows["context_ids"], rows["branches"], strict=True)]
    return [indices[number] for number in sorted(range(len(indices)), key=keys.__getitem__)]


class PromptGroupSampler(Sampler[int]):
    """
    Samples groups of rows at random, each with all its rows in their order.

    A group that fits into what is left of a micro-batch is taken first, then one that fits into what is left of the
    optimizer step, so that groups are seldom cut; the search looks at the next 256 groups.

    Args:
        groups (`Sequence[Sequence[int]]`):
            Indices of rows, see [`group_rows`].
        batch_size (`int`):
            Rows of a micro-batch.
        step_size (`int`):
            Rows of an optimizer step: over its micro-batches and all processes.
        seed (`int`):
            Seed. Every epoch has another order, every process the same.

    Example:

    ```python
    >>> from dapo_trl.samplers import PromptGroupSampler

    >>> list(PromptGroupSampler([[0, 1, 2], [3], [4, 5]], batch_size=4, step_size=4, seed=0))
    [4, 5, 3, 0, 1, 2]

    ```
    """

    _LOOK_AHEAD = 256

    def __init__(self, groups: Sequence[Sequence[int]], batch_size: int, step_size: int, seed: int) -> None:
        self.groups = groups
        self.batch_size = batch_size
        self.step_size = step_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        waiting = torch.randperm(len(self.groups), generator=generator).tolist()[::-1]
        position = 0
        while waiting:
            group = self.groups[waiting.pop(self._choose(waiting, position))]
            position += len(group)
            yield from group

    def _choose(self, waiting: list[int], position: int) -> int:
        """Index, from the end, of the first group that fits."""
        near = range(-1, -1 - min(self._LOOK_AHEAD, len(waiting)), -1)
        for size in (self.batch_size, self.step_size):
            room = size - position % size
            for index in near:
                if len(self.groups[waiting[index]]) <= room:
                    return index
        return -1
