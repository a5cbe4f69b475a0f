"""
Tokenized rows -> tensors, in one of two layouts.

A tokenized row holds the ids of a state (`context_ids`) and its `branches`: chains of steps that follow it. Candidate
steps of one state are branches of one step each; a solution is one branch of K steps. Layout `"tree"` puts every shared
token once, see `prefix_tree.py`; layout `"padded"` one padded sequence per branch. What is read from the model is the
same: places in its output, flattened over rows.

Shapes: R rows, T tokens of the longest row, P pairs (state, action), N distinct action tokens, M action tokens of all
pairs, S states.
"""

from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from transformers.data.data_collator import DataCollatorMixin
from trl.trainer.utils import pad

from dapo_trl.prefix_tree import PrefixTree, lay_out
from dapo_trl.tree_attention import FLEX_BLOCK_SIZE


@dataclass
class _StepCollator(DataCollatorMixin):
    pad_token_id: int
    pad_to_multiple_of: int | None = None
    layout: str = "tree"
    max_tokens_per_row: int | None = None
    max_repeat: int | None = None
    flex_rows: bool = False
    return_tensors: str = "pt"

    def _pad_rows(self, rows: list[list[int]], value: int, length: int | None = None) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        multiple = length or self.pad_to_multiple_of
        return pad(tensors, padding_value=value, padding_side="right", pad_to_multiple_of=multiple)

    def _padded_batch(self, sequences: list[list[int]]) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self._pad_rows(sequences, self.pad_token_id),
            "attention_mask": self._pad_rows([[1] * len(sequence) for sequence in sequences], 0),
        }

    def _tree_batch(self, tree: PrefixTree, ends: list[int]) -> tuple[dict[str, torch.Tensor], Any]:
        rows = lay_out(tree, ends, self.max_tokens_per_row, self.max_repeat)
        multiple = lcm(self.pad_to_multiple_of or 1, FLEX_BLOCK_SIZE if self.flex_rows else 1)
        length = max(map(len, rows.input_ids))
        if self.flex_rows:  # few different lengths: at most eight between a power of two and the next
            multiple = lcm(multiple, 1 << max(length.bit_length() - 4, 0))
        length += -length % multiple
        batch = {
            "input_ids": self._pad_rows(rows.input_ids, self.pad_token_id, length),
            "position_ids": self._pad_rows(rows.position_ids, 0, length),
            "subtree_end": self._pad_rows(rows.subtree_end, length, length),
            "row_lengths": torch.tensor([length if self.flex_rows else len(row) for row in rows.input_ids]),
        }
        return batch, rows


@dataclass
class DataCollatorForStepPolicy(_StepCollator):
    """
    Collates tokenized rows for [`DAPOTrainer`]: tokens, and where the log-probability of each pair is gathered.

    Each example holds `"context_ids"` (list of int), `"branches"` (list of chains of steps, each a list of int),
    `"advantages"` and `"weights"` (one float per step, in the order of the branches) and optionally `"ref_logps"` and
    `"values"`.

    The batch holds:

    - `"input_ids"` of shape `(R, T)`, padded on the right, with `"attention_mask"` in the padded layout and
      `"position_ids"` and `"subtree_end"` in the tree layout, all of the same shape, and there `"row_lengths"` of shape
      `(R,)` and `"pair_rows"` of shape `(P,)`, the row that each pair is in;
    - `"parent_index"`, `"child_ids"` of shape `(N,)`: the place (row * T + position) whose output predicts a token, and
      that token;
    - `"token_index"`, `"pair_index"` of shape `(M,)`: which of the N tokens count for which pair;
    - `"state_index"` of shape `(P,)`: the example of each pair;
    - `"advantages"`, `"weights"` and, if given, `"ref_logps"` and `"values"` of shape `(P,)`, float32;
    - `"num_tokens"`, `"num_pair_tokens"`: scalars, tokens of the batch without padding, and of one sequence per pair.

    Args:
        pad_token_id (`int`):
            Token id for padding.
        pad_to_multiple_of (`int`, *optional*):
            Pad rows to a multiple of this length.
        layout (`str`, *optional*, defaults to `"tree"`):
            `"tree"` or `"padded"`.
        max_tokens_per_row (`int`, *optional*):
            Token budget of a row of trees. `None` puts a batch into one row.
        max_repeat (`int`, *optional*):
            Longest path that may be repeated to cut a tree, see [`~dapo_trl.prefix_tree.lay_out`].
        flex_rows (`bool`, *optional*, defaults to `False`):
            Whether to pad rows of trees to lengths that suit FlexAttention.

    Example:

    ```python
    >>> from dapo_trl.collators import DataCollatorForStepPolicy

    >>> row = {"context_ids": [1, 2], "branches": [[[3]], [[4, 5]]], "advantages": [0.5, -0.5], "weights": [1.0, 1.0]}
    >>> batch = DataCollatorForStepPolicy(pad_token_id=0)([row])
    >>> batch["input_ids"].tolist(), batch["subtree_end"].tolist()  # the last token of a branch predicts nothing
    ([[1, 2, 4]], [[3, 3, 3]])
    >>> batch["parent_index"].tolist(), batch["child_ids"].tolist(), batch["pair_index"].tolist()
    ([1, 1, 2], [3, 4, 5], [0, 1, 1])

    ```
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self._tree(examples) if self.layout == "tree" else self._padded(examples)
        sizes = [len(example["advantages"]) for example in examples]
        batch["state_index"] = torch.arange(len(examples)).repeat_interleave(torch.tensor(sizes))
        batch |= _concatenated(examples, "advantages", "weights", "ref_logps", "values")
        batch["num_pair_tokens"] = torch.tensor(sum(map(num_pair_tokens, examples)))
        return batch

    def _tree(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tree = PrefixTree()
        pairs: list[list[int]] = []  # nodes of each pair's action
        for example in examples:
            context = tree.add(example["context_ids"])
            for branch in example["branches"]:
                last = context[-1] if context else -1
                for step in branch:
                    pairs.append(tree.add(step, after=last))
                    last = pairs[-1][-1]
        # A token's log-probability is read at its parent. Without context nothing predicts the first token.
        ends = [parent if (parent := tree.parents[nodes[-1]]) >= 0 else nodes[-1] for nodes in pairs]
        batch, rows = self._tree_batch(tree, ends)
        length = batch["input_ids"].shape[1]
        tokens: dict[tuple[int, int], int] = {}
        token_index, pair_index, parent_index, child_ids = [], [], [], []
        for pair, (nodes, (row, _)) in enumerate(zip(pairs, rows.places, strict=True)):
            for node in nodes:
                parent = tree.parents[node]
                if parent < 0:
                    continue
                if (row, node) not in tokens:
                    tokens[row, node] = len(tokens)
                    parent_index.append(row * length + rows.positions[row][parent])
                    child_ids.append(tree.tokens[node])
                token_index.append(tokens[row, node])
                pair_index.append(pair)
        batch |= _indices(parent_index, child_ids, token_index, pair_index)
        batch["pair_rows"] = torch.tensor([row for row, _ in rows.places])
        batch["num_tokens"] = torch.tensor(rows.num_tokens)
        return batch

    def _padded(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences: list[list[int]] = []
        places: list[tuple[int, int]] = []
        pair_index: list[int] = []
        num_pairs = 0
        for example in examples:
            for branch in example["branches"]:
                sequence = list(example["context_ids"])
                for step in branch:
                    first = max(len(sequence), 1)  # without context nothing predicts the first token
                    sequence += step
                    places += [(len(sequences), position) for position in range(first, len(sequence))]
                    pair_index += [num_pairs] * (len(sequence) - first)
                    num_pairs += 1
                sequences.append(sequence)
        batch = self._padded_batch(sequences)
        length = batch["input_ids"].shape[1]
        parent_index = [row * length + position - 1 for row, position in places]
        child_ids = [sequences[row][position] for row, position in places]
        batch |= _indices(parent_index, child_ids, list(range(len(places))), pair_index)
        batch["num_tokens"] = torch.tensor(sum(map(len, sequences)))
        return batch


@dataclass
class DataCollatorForStepCritic(_StepCollator):
    """
    Collates tokenized rows for [`StepCriticTrainer`]: tokens, and where each state ends.

    Each example holds `"context_ids"` and `"branches"` as for [`DataCollatorForStepPolicy`], and optionally
    `"successes"` and `"rollouts"`, one number per state, and `"state_keys"`, two. The states of a row are, in this
    order: the context itself, unless the example says `"context_is_state": False`; then the state after each step,
    branch by branch.

    The batch holds:

    - `"input_ids"` and what goes with it, as for [`DataCollatorForStepPolicy`];
    - `"state_places"` of shape `(S,)`: the place (row * T + position) of the last token of each state;
    - `"successes"`, `"rollouts"` of shape `(S,)`, float32, if given;
    - `"state_keys"` of shape `(S, 2)`, int64, if given, see [`~dapo_trl.tokenized_rows.state_keys`];
    - `"num_tokens"`, `"num_pair_tokens"`: scalars, tokens of the batch without padding, and of one sequence per state.

    Args:
        pad_token_id (`int`):
            Token id for padding.
        pad_to_multiple_of (`int`, *optional*):
            Pad rows to a multiple of this length.
        layout (`str`, *optional*, defaults to `"tree"`):
            `"tree"` or `"padded"`.
        max_tokens_per_row (`int`, *optional*):
            Token budget of a row of trees. `None` puts a batch into one row.
        max_repeat (`int`, *optional*):
            Longest path that may be repeated to cut a tree, see [`~dapo_trl.prefix_tree.lay_out`].
        flex_rows (`bool`, *optional*, defaults to `False`):
            Whether to pad rows of trees to lengths that suit FlexAttention.

    Example:

    ```python
    >>> from dapo_trl.collators import DataCollatorForStepCritic

    >>> rows = [{"context_ids": [1, 2], "branches": [[[3], [4, 5]]]}, {"context_ids": [1, 2], "branches": [[[3], [6]]]}]
    >>> batch = DataCollatorForStepCritic(pad_token_id=0)(rows)
    >>> batch["input_ids"].tolist(), batch["state_places"].tolist()
    ([[1, 2, 3, 4, 5, 6]], [1, 2, 4, 1, 2, 5])

    ```
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self._tree(examples) if self.layout == "tree" else self._padded(examples)
        batch |= _concatenated(examples, "successes", "rollouts")
        if "state_keys" in examples[0]:
            batch["state_keys"] = torch.tensor([keys for example in examples for keys in example["state_keys"]])
        batch["num_pair_tokens"] = torch.tensor(sum(map(num_state_tokens, examples)))
        return batch

    def _tree(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tree = PrefixTree()
        states: list[int] = []
        for example in examples:
            context = tree.add(example["context_ids"])
            if _has_context_state(example):
                states.append(context[-1])
            for branch in example["branches"]:
                last = context[-1] if context else -1
                for step in branch:
                    last = tree.add(step, after=last)[-1]
                    states.append(last)
        batch, rows = self._tree_batch(tree, states)
        length = batch["input_ids"].shape[1]
        batch["state_places"] = torch.tensor([row * length + position for row, position in rows.places])
        batch["num_tokens"] = torch.tensor(rows.num_tokens)
        return batch

    def _padded(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences: list[list[int]] = []
        places: list[tuple[int, int]] = []
        for example in examples:
            ends = [len(example["context_ids"])] if _has_context_state(example) else []
            for branch in example["branches"]:
                sequence = list(example["context_ids"])
                for step in branch:
                    sequence += step
                    ends.append(len(sequence))
                places += [(len(sequences), end - 1) for end in ends]
                sequences.append(sequence)
                ends = []
        batch = self._padded_batch(sequences)
        length = batch["input_ids"].shape[1]
        batch["state_places"] = torch.tensor([row * length + position for row, position in places])
        batch["num_tokens"] = torch.tensor(sum(map(len, sequences)))
        return batch


def split_rows(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """
    A batch of trees as one batch per row. Pairs and states keep their order within a row.

    Args:
        batch (`dict[str, torch.Tensor]`):
            Batch of [`DataCollatorForStepPolicy`] or [`DataCollatorForStepCritic`].

    Returns:
        `list[dict[str, torch.Tensor]]`: batches without padding; a padded batch or a single row as it is.
    """
    if "row_lengths" not in batch or len(batch["row_lengths"]) == 1:
        return [batch]
    rows = zip(batch["row_lengths"].tolist(), items_by_row(batch), strict=True)
    return [_take_row(batch, row, length, items) for row, (length, items) in enumerate(rows)]


def items_by_row(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """
    The pairs, or states, of each row of a batch of trees.

    Args:
        batch (`dict[str, torch.Tensor]`):
            Batch.

    Returns:
        `list[torch.Tensor]`: indices, row by row: concatenated, the order in which [`split_rows`] has them.
    """
    rows = batch["pair_rows"] if "pair_rows" in batch else batch["state_places"] // batch["input_ids"].shape[1]
    return [(rows == row).nonzero().flatten() for row in range(len(batch["row_lengths"]))]


def _take_row(batch: dict[str, torch.Tensor], row: int, length: int, items: torch.Tensor) -> dict[str, torch.Tensor]:
    width = batch["input_ids"].shape[1]
    part = {name: batch[name][row : row + 1, :length] for name in ("input_ids", "position_ids")}
    part["subtree_end"] = batch["subtree_end"][row : row + 1, :length].clamp(max=length)
    part["row_lengths"] = batch["row_lengths"][row : row + 1]
    if "state_places" in batch:
        part["state_places"] = batch["state_places"][items] - row * width
    else:
        new_pair = torch.full_like(batch["pair_rows"], -1)
        new_pair[items] = torch.arange(len(items), device=items.device)
        tokens = (batch["parent_index"] // width == row).nonzero().flatten()
        new_token = torch.full_like(batch["parent_index"], -1)
        new_token[tokens] = torch.arange(len(tokens), device=tokens.device)
        counted = new_pair[batch["pair_index"]] >= 0
        part |= {"parent_index": batch["parent_index"][tokens] - row * width, "child_ids": batch["child_ids"][tokens]}
        part |= {"token_index": new_token[batch["token_index"][counted]]}
        part |= {"pair_index": new_pair[batch["pair_index"][counted]], "pair_rows": torch.zeros_like(items)}
    for name in ("state_index", "advantages", "weights", "ref_logps", "values", "successes", "rollouts"):
        if name in batch:
            part[name] = batch[name][items]
    return part


def num_pair_tokens(example: dict[str, Any]) -> int:
    """
    Tokens of one sequence per pair (state, action): what a layout without sharing computes.

    Args:
        example (`dict`):
            Tokenized row.

    Returns:
        `int`.
    """
    total = 0
    for branch in example["branches"]:
        length = len(example["context_ids"])
        for step in branch:
            length += len(step)
            total += length
    return total


def num_state_tokens(example: dict[str, Any]) -> int:
    """
    Tokens of one sequence per state.

    Args:
        example (`dict`):
            Tokenized row.

    Returns:
        `int`.
    """
    context = len(example["context_ids"]) if example.get("context_is_state", True) else 0
    return context + num_pair_tokens(example)


def _concatenated(examples: list[dict[str, Any]], *names: str) -> dict[str, torch.Tensor]:
    """Numbers per pair or state of all examples, of the columns that they have."""
    return {
        name: torch.tensor([value for example in examples for value in example[name]]).float()
        for name in names
        if name in examples[0]
    }


def _has_context_state(example: dict[str, Any]) -> bool:
    if not example.get("context_is_state", True):
        return False
    if not example["context_ids"]:
        raise ValueError("A row has no context, so the state before its first step has no token to be read at.")
    return True


def _indices(
    parent_index: list[int], child_ids: list[int], token_index: list[int], pair_index: list[int]
) -> dict[str, torch.Tensor]:
    lists = {
        "parent_index": parent_index,
        "child_ids": child_ids,
        "token_index": token_index,
        "pair_index": pair_index,
    }
    return {name: torch.tensor(values, dtype=torch.long) for name, values in lists.items()}
