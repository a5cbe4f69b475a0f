"""
The order in which rows are trained on: problems are shuffled, the rows of one problem stay together.

Rows of one prompt share their prefixes, but only rows of one batch can be laid out in one tree.
"""

from collections.abc import Iterator, Sequence
from itertools import repeat
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

    Which rows an optimizer step has depends on their number and the seed only, not on how the step is split into
    micro-batches or over processes. Groups that fit into what is left of the step are taken first, so that groups are
    seldom cut; the search looks at the next 256 of them. Within the step, those that fit into what is left of a
    micro-batch come first.

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
        step: list[Sequence[int]] = []
        room = self.step_size
        while waiting:
            group = self.groups[waiting.pop(self._choose(waiting, room))]
            while group:
                step.append(group[:room])
                room -= len(step[-1])
                group = group[len(step[-1]) :]
                if not room:
                    yield from self._arrange(step)
                    step, room = [], self.step_size
        yield from self._arrange(step)

    def _choose(self, waiting: list[int], room: int) -> int:
        """Index, from the end, of the first group that fits; of the first, if none does."""
        near = range(-1, -1 - min(self._LOOK_AHEAD, len(waiting)), -1)
        return next((index for index in near if len(self.groups[waiting[index]]) <= room), -1)

    def _arrange(self, parts: list[Sequence[int]]) -> Iterator[int]:
        """The rows of an optimizer step, so that few of its groups are cut between micro-batches."""
        room = self.batch_size
        while parts:
            part = parts.pop(next((index for index, part in enumerate(parts) if len(part) <= room), 0))
            room = self.batch_size - (self.batch_size - room + len(part)) % self.batch_size
            yield from part


class FilledSampler(Sampler[int]):
    """
    The order of another sampler, filled up at its end to full batches for all processes.

    Several processes need equally many batches. Left alone, accelerate repeats rows, which then count twice.

    Args:
        sampler (`Sampler`):
            Sampler.
        filler (`int`):
            Index of a row that counts nothing.
        multiple (`int`):
            Rows of one batch of every process together.

    Example:

    ```python
    >>> from dapo_trl.samplers import FilledSampler

    >>> list(FilledSampler([2, 0, 1], filler=3, multiple=2))
    [2, 0, 1, 3]

    ```
    """

    def __init__(self, sampler: Sampler[int], filler: int, multiple: int) -> None:
        self.sampler = sampler
        self.filler = filler
        self.multiple = multiple

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, for a sampler whose order depends on it."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        size = len(self.sampler)  # type: ignore[arg-type]  # torch declares no length, all samplers of rows have one
        return size + -size % self.multiple

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        size = len(self.sampler)  # type: ignore[arg-type]
        yield from repeat(self.filler, -size % self.multiple)
