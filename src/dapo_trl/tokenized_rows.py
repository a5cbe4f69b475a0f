"""
One row of any format -> token ids.

A tokenized row has `context_ids` (ids of the state) and `branches` (chains of steps that follow it), see
`collators.py`, and a number per step or per state beside them.
"""

import hashlib
import json
from itertools import accumulate
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dapo_trl.advantages import sibling_advantages, step_advantages, with_true_rewards
from dapo_trl.ref_logps import read_ref_logps
from dapo_trl.tokenization import encode_preference, encode_solution, encode_state, template_arguments


# what a tokenized row of the policy may have for each of its steps
PER_PAIR = (
    "advantages",
    "weights",
    "reliabilities",
    "ref_logps",
    "source_rows",
    "source_steps",
    "source_fingerprints",
    "values",
    "counts",
)


def tokenize_policy_row(
    row: dict[str, Any],
    row_format: str,
    tokenizer: PreTrainedTokenizerBase,
    duplicate_weights: str = "uniform",
    reliability_weights: bool = False,
) -> dict[str, Any]:
    """
    Tokenized row for [`~dapo_trl.DAPOTrainer`].

    Args:
        row (`dict`):
            A state row, solution row or TRL preference row that has passed [`~dapo_trl.formats.check_dataset`].
        row_format (`str`):
            `"state"`, `"solution"` or `"preference"`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        duplicate_weights (`str`, *optional*, defaults to `"uniform"`):
            Weight of a pair: `"uniform"` for 1, `"counts"` for how often the candidate was sampled.
        reliability_weights (`bool`, *optional*, defaults to `False`):
            Whether the weight is multiplied by the candidate's entry of `reliabilities`.

    Returns:
        `dict` with `context_ids`, `branches`, `advantages` and `weights`; and, if the row has them, its
        `reliabilities`, and its `ref_logps`, NaN where there is none.

    Raises:
        ValueError: if `ref_logps` belong to other tokens.
    """
    tokens = tokenize_row(row, row_format, tokenizer)
    advantages = _advantages(row, row_format)
    counts = row.get("counts")
    weights = counts if duplicate_weights == "counts" and counts is not None else [1.0] * len(advantages)
    pairs = {"advantages": advantages, "weights": [float(weight) for weight in weights]}
    if row_format == "state" and row.get("reliabilities") is not None:
        pairs["reliabilities"] = list(row["reliabilities"])
        if reliability_weights:
            pairs["weights"] = [w * r for w, r in zip(pairs["weights"], pairs["reliabilities"], strict=True)]
    if "ref_logps" in row:
        pairs["ref_logps"] = read_ref_logps(row, tokens)
    return tokens | pairs


def tokenize_critic_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """
    Tokenized row for [`~dapo_trl.StepCriticTrainer`].

    Args:
        row (`dict`):
            A solution row. Without counts, each value is taken as one rollout with that (soft) outcome.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the critic.

    Returns:
        `dict` with `context_ids`, `branches`, `successes` and `rollouts`.
    """
    tokens = tokenize_row(row, "solution", tokenizer)
    if row.get("mc_rollouts") is None:
        return tokens | {"successes": list(row["values"]), "rollouts": [1] * len(row["values"])}
    return tokens | {"successes": list(row["mc_successes"]), "rollouts": list(row["mc_rollouts"])}


def tokenize_row(row: dict[str, Any], row_format: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """
    Token ids of a row: the sampler's own where the row has them, else its text tokenized in context.

    Args:
        row (`dict`):
            A state row, solution row or TRL preference row.
        row_format (`str`):
            `"state"`, `"solution"` or `"preference"`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model that reads the ids.

    Returns:
        `dict` with `context_ids` (`list[int]`) and `branches` (`list[list[list[int]]]`).
    """
    template_kwargs = template_arguments(row)
    if row_format == "state":
        candidates_ids = row.get("candidates_ids")
        if candidates_ids is None:
            ended = [reward is not None for reward in row.get("rewards") or [None] * len(row["candidates"])]
            context_ids, candidates_ids = encode_state(
                row["prompt"], row["prefix"], row["candidates"], ended, tokenizer, **template_kwargs
            )
        else:
            context_ids = row["prompt_ids"] + [token for step in row["prefix_ids"] for token in step]
        return {"context_ids": context_ids, "branches": [[ids] for ids in candidates_ids]}
    if row_format == "preference":
        context_ids, candidates_ids = encode_preference(row, tokenizer, **template_kwargs)
        return {"context_ids": context_ids, "branches": [[ids] for ids in candidates_ids]}
    if row.get("completions_ids") is not None:
        return {"context_ids": row["prompt_ids"], "branches": [row["completions_ids"]]}
    context_ids, steps_ids = encode_solution(
        row["prompt"], row["completions"], tokenizer, ended=not row.get("truncated"), **template_kwargs
    )
    return {"context_ids": context_ids, "branches": [steps_ids]}


def prompt_key(row: dict[str, Any]) -> str:
    """
    Short hash of a row's prompt: rows with the same one are trained on together.

    Args:
        row (`dict`):
            Row of any format.

    Returns:
        `str`: 16 hexadecimal digits of a SHA-256.
    """
    return hashlib.sha256(json.dumps(row["prompt"], sort_keys=True, default=str).encode()).hexdigest()[:16]


def state_keys(tokens: dict[str, Any]) -> list[list[int]]:
    """
    What tells the states of a row from those of others: hashes of the tokens that lead there.

    Args:
        tokens (`dict`):
            Tokenized row.

    Returns:
        `list[list[int]]`, one for each state: the hash of the state before it, 0 for the context, and its own. States
        with the same first hash are siblings.
    """
    context = hashlib.blake2b(np.array(tokens["context_ids"], dtype=np.int64).tobytes(), digest_size=8)
    keys = [[0, _key(context)]]
    for branch in tokens["branches"]:
        path = context.copy()
        for step in branch:
            before = _key(path)
            path.update(np.array(step, dtype=np.int64).tobytes())
            keys.append([before, _key(path)])
    return keys


def _key(path: Any) -> int:
    return int.from_bytes(path.digest(), "big") >> 1


def row_length(row: dict[str, Any]) -> int:
    """
    Longest sequence of a tokenized row.

    Args:
        row (`dict`):
            Tokenized row.

    Returns:
        `int`: tokens, context included.
    """
    return len(row["context_ids"]) + max((sum(map(len, branch)) for branch in row["branches"]), default=0)


def truncate_row(row: dict[str, Any], max_length: int | None) -> tuple[dict[str, Any], int]:
    """
    Remove whole steps until no sequence of the row exceeds `max_length` tokens.

    A chain of steps loses its tail; a candidate that does not fit is removed. Columns with a number per step or per
    state lose the same entries.

    Args:
        row (`dict`):
            Tokenized row.
        max_length (`int` or `None`):
            Longest sequence, context included; `None` for no limit.

    Returns:
        `tuple[dict, int]`: the row, and how many steps were removed.
    """
    if max_length is None:
        return row, 0
    branches: list[list[list[int]]] = []
    kept: list[int] = []
    position = 0
    for branch in row["branches"]:
        ends = accumulate(map(len, branch), initial=len(row["context_ids"]))
        fitting = sum(end <= max_length for end in ends) - 1
        kept += range(position, position + max(fitting, 0))
        position += len(branch)
        if fitting > 0:
            branches.append(branch[:fitting])
    shorter = {**row, "branches": branches}
    for name in PER_PAIR:
        if name in row:
            shorter[name] = [row[name][index] for index in kept]
    for name in ("successes", "rollouts"):  # of a single chain, whose first state is the context
        if name in row:
            shorter[name] = row[name][: len(kept) + 1]
    return shorter, position - len(kept)


def keep_reliable(row: dict[str, Any], min_reliability: float) -> tuple[dict[str, Any], int]:
    """
    Remove the candidates of a state whose advantages cannot be relied on.

    Args:
        row (`dict`):
            Tokenized state row with `reliabilities`.
        min_reliability (`float`):
            Smallest reliability of a candidate that stays.

    Returns:
        `tuple[dict, int]`: the row, in which the other candidates are as they were, and how many were removed.
    """
    # A reliability of 0.8 - 0.5 must not fail 0.3 by its last bit.
    kept = [index for index, number in enumerate(row["reliabilities"]) if number >= min_reliability - 1e-9]
    columns = [name for name in ("branches", *PER_PAIR) if name in row]
    return row | {name: [row[name][index] for index in kept] for name in columns}, len(row["branches"]) - len(kept)


def _advantages(row: dict[str, Any], row_format: str) -> list[float]:
    if row_format == "preference":
        return sibling_advantages([1.0, 0.0]).tolist()
    if row_format == "solution":
        return step_advantages(row["values"]).tolist()
    if row.get("advantages") is not None:
        return list(row["advantages"])
    return sibling_advantages(with_true_rewards(row["values"], row.get("rewards")), row.get("counts")).tolist()
