"""
Tokenized rows -> padded tensors.

A tokenized row holds the ids of a state (`context_ids`) and its `branches`: chains of steps that follow it. Candidate
steps of one state are branches of one step each; a solution is one branch of K steps. Shapes: B sequences (one per
branch), T tokens, P pairs (state, action), S states.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.data.data_collator import DataCollatorMixin
from trl.trainer.utils import pad


@dataclass
class DataCollatorForStepPolicy(DataCollatorMixin):
    """
    Collates tokenized rows for [`DAPOTrainer`]: one padded sequence per branch, and which token belongs to which pair.

    Each example holds `"context_ids"` (list of int), `"branches"` (list of chains of steps, each a list of int),
    `"advantages"` and `"weights"` (one float per step, in the order of the branches) and optionally `"ref_logps"`.

    The batch holds:

    - `"input_ids"`, `"attention_mask"` of shape `(B, T)`, padded on the right;
    - `"pair_index"` of shape `(B, T)`: the pair that a token's log-probability counts for, -1 for none;
    - `"state_index"` of shape `(P,)`: the example of each pair;
    - `"advantages"`, `"weights"` and, if given, `"ref_logps"` of shape `(P,)`, float32.

    Args:
        pad_token_id (`int`):
            Token id for padding.
        pad_to_multiple_of (`int`, *optional*):
            Pad sequences to a multiple of this length.

    Example:

    ```python
    >>> from dapo_trl.collators import DataCollatorForStepPolicy

    >>> collator = DataCollatorForStepPolicy(pad_token_id=0)
    >>> row = {"context_ids": [1, 2], "branches": [[[3]], [[4, 5]]], "advantages": [0.5, -0.5], "weights": [1.0, 1.0]}
    >>> batch = collator([row])
    >>> batch["input_ids"].tolist(), batch["pair_index"].tolist()
    ([[1, 2, 3, 0], [1, 2, 4, 5]], [[-1, -1, 0, -1], [-1, -1, 1, 1]])

    ```
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences, pair_index, num_pairs = [], [], 0
        for example in examples:
            for context_ids, steps_ids in _sequences(example):
                sequences.append(context_ids + [token for step in steps_ids for token in step])
                marks = [num_pairs + number for number, step in enumerate(steps_ids) for _ in step]
                pair_index.append([-1] * len(context_ids) + marks)
                num_pairs += len(steps_ids)
        batch = _pad_sequences(sequences, self.pad_token_id, self.pad_to_multiple_of)
        batch["pair_index"] = _pad(pair_index, -1, self.pad_to_multiple_of)
        sizes = [len(example["advantages"]) for example in examples]
        batch["state_index"] = torch.arange(len(examples)).repeat_interleave(torch.tensor(sizes))
        for name in ("advantages", "weights", "ref_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([value for example in examples for value in example[name]]).float()
        return batch


@dataclass
class DataCollatorForStepCritic(DataCollatorMixin):
    """
    Collates tokenized rows for [`StepCriticTrainer`]: one padded sequence per branch, and where each state ends.

    Each example holds `"context_ids"` and `"branches"` as for [`DataCollatorForStepPolicy`], and optionally
    `"successes"` and `"rollouts"`, one number per state. The states of a row are, in this order: the context itself,
    unless the example says `"context_is_state": False`; then the state after each step, branch by branch.

    The batch holds:

    - `"input_ids"`, `"attention_mask"` of shape `(B, T)`, padded on the right;
    - `"state_rows"`, `"state_columns"` of shape `(S,)`: the sequence and position of the last token of each state;
    - `"successes"`, `"rollouts"` of shape `(S,)`, float32, if given.

    Args:
        pad_token_id (`int`):
            Token id for padding.
        pad_to_multiple_of (`int`, *optional*):
            Pad sequences to a multiple of this length.

    Example:

    ```python
    >>> from dapo_trl.collators import DataCollatorForStepCritic

    >>> batch = DataCollatorForStepCritic(pad_token_id=0)([{"context_ids": [1, 2], "branches": [[[3], [4, 5]]]}])
    >>> batch["input_ids"].tolist(), batch["state_columns"].tolist()
    ([[1, 2, 3, 4, 5]], [1, 2, 4])

    ```
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences: list[list[int]] = []
        state_rows: list[int] = []
        state_columns: list[int] = []
        for example in examples:
            ends = [len(example["context_ids"])] if example.get("context_is_state", True) else []
            for context_ids, steps_ids in _sequences(example):
                sequence = list(context_ids)
                for step in steps_ids:
                    sequence += step
                    ends.append(len(sequence))
                state_rows += [len(sequences)] * len(ends)
                state_columns += [end - 1 for end in ends]
                sequences.append(sequence)
                ends = []
        batch = _pad_sequences(sequences, self.pad_token_id, self.pad_to_multiple_of)
        batch["state_rows"], batch["state_columns"] = torch.tensor(state_rows), torch.tensor(state_columns)
        for name in ("successes", "rollouts"):
            if name in examples[0]:
                batch[name] = torch.tensor([value for example in examples for value in example[name]]).float()
        return batch


def _sequences(example: dict[str, Any]) -> Iterator[tuple[list[int], list[list[int]]]]:
    for steps_ids in example["branches"]:
        yield example["context_ids"], steps_ids


def _pad_sequences(
    sequences: list[list[int]], pad_token_id: int, pad_to_multiple_of: int | None
) -> dict[str, torch.Tensor]:
    return {
        "input_ids": _pad(sequences, pad_token_id, pad_to_multiple_of),
        "attention_mask": _pad([[1] * len(sequence) for sequence in sequences], 0, pad_to_multiple_of),
    }


def _pad(sequences: list[list[int]], value: int, pad_to_multiple_of: int | None) -> torch.Tensor:
    tensors = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return pad(tensors, padding_value=value, padding_side="right", pad_to_multiple_of=pad_to_multiple_of)
