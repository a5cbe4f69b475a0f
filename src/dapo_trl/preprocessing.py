"""
Rows of any format -> the tokenized data sets of the two trainers; what is left out is counted.

Beside what `tokenized_rows.py` makes of it, a row has `prompt_key` (rows of one prompt have the same), `length` (its
longest sequence), and for the policy `source_rows`, `source_steps` and `source_fingerprints`: the row and step that
each pair comes from, and the fingerprint of that row.
"""

import logging
from collections.abc import Callable
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl.data_utils import extract_prompt

from dapo_trl.advantages import advantage_gap, sibling_advantages, with_true_rewards
from dapo_trl.dataset_checks import (
    check_columns_are_used,
    check_fingerprint,
    check_kind,
    refuse_values_without_advantages,
    refuse_without_candidates,
    refuse_without_reliabilities,
    refuse_without_values,
    warn_of_another_end,
)
from dapo_trl.formats import check_dataset
from dapo_trl.ref_logps import check_ref_logps_are_complete, check_ref_tokenizer, row_fingerprint
from dapo_trl.targets import gaussian_excess
from dapo_trl.targets import log_partition as log_partition_of
from dapo_trl.tokenized_rows import (
    PER_PAIR,
    keep_reliable,
    prompt_key,
    row_length,
    state_keys,
    tokenize_critic_row,
    tokenize_policy_row,
    truncate_row,
)


logger = logging.getLogger(__name__)

_SAMPLED = ("sampled_advantages", "sampled_counts")  # of all candidates of a state, for its log-partition
_IMPOSSIBLE_SHARE = 0.05  # of the states; more Gaussian log-partitions are worth a warning
_ROUNDING = 1e-9  # nats

_TOKEN_FEATURES = {
    "context_ids": List(Value("int64")),
    "branches": List(List(List(Value("int64")))),
    "prompt_key": Value("string"),
    "length": Value("int64"),
}
_PAIR_FEATURES = {
    "advantages": List(Value("float64")),
    "weights": List(Value("float64")),
    "source_rows": List(Value("int64")),
    "source_steps": List(Value("int64")),
    "source_fingerprints": List(Value("string")),
}
# how a row came out of tokenization; gone when the data set is ready
_FATE_FEATURES = {
    "index": Value("int64"),
    "num_branches": Value("int64"),
    "removed": Value("int64"),
    "unreliable": Value("int64"),
    "steps": Value("int64"),
}


def prepare_policy_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    name: str = "train",
    max_length: int | None = None,
    min_advantage_gap: float = 0.0,
    duplicate_weights: str = "uniform",
    reliability_weights: bool = False,
    min_reliability: float = 0.0,
    num_proc: int | None = None,
    limit_name: str = "max_length",
    log_partition: str | None = None,
    beta: float = 0.01,
    loss_type: str = "squared",
) -> tuple[Dataset, dict[str, int]]:
    """
    Check, tokenize, truncate and filter the rows that [`DAPOTrainer`] trains on.

    Args:
        dataset ([`~datasets.Dataset`]):
            State rows, solution rows or TRL preference rows.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        name (`str`, *optional*, defaults to `"train"`):
            What the data set is called in messages.
        max_length (`int`, *optional*):
            Longest sequence in tokens; what exceeds it is cut by whole steps.
        min_advantage_gap (`float`, *optional*, defaults to `0.0`):
            States whose candidates' advantages differ by less are left out.
        duplicate_weights (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"` or `"counts"`.
        reliability_weights (`bool`, *optional*, defaults to `False`):
            Whether weights are multiplied by the column `reliabilities`.
        min_reliability (`float`, *optional*, defaults to `0.0`):
            Candidates with a smaller one are left out, before gaps are looked at.
        num_proc (`int`, *optional*):
            Processes that tokenize.
        limit_name (`str`, *optional*, defaults to `"max_length"`):
            The argument that set `max_length`, for messages.
        log_partition (`str`, *optional*):
            `"sample"` or `"gaussian"`: advantages become those less beta times the state's log-partition.
        beta (`float`, *optional*, defaults to `0.01`):
            Scale of the target, for that.
        loss_type (`str`, *optional*, defaults to `"squared"`):
            With `"listwise"` rows keep the `values` of their candidates.

    Returns:
        `tuple[Dataset, dict[str, int]]`: tokenized rows, and counts: `rows`, `rows_kept`, `rows_merged` (joined another
        row of the same state), `steps`, `steps_truncated` (did not fit into `max_length`), `rows_too_long` (no step
        fitted), `rows_without_contrast` (gap too small), `steps_unreliable` (candidates below `min_reliability`) and
        `rows_unreliable` (no candidate above); listwise `rows_with_one_candidate`, and of Gaussian log-partitions
        `log_partitions_impossible`.

    Raises:
        TypeError: if `dataset` is no `Dataset`.
        ValueError: if a row is bad, or no row is left.
    """
    check_kind(dataset, name)
    if {"chosen", "rejected"} <= set(dataset.column_names) and "prompt" not in dataset.column_names:
        dataset = dataset.map(extract_prompt, desc=f"Extracting the prompts ({name})", num_proc=num_proc)
    row_format = _policy_format(dataset, name)
    check_fingerprint(dataset, tokenizer)
    warn_of_another_end(dataset, row_format, tokenizer, name)
    check_columns_are_used(dataset, row_format, duplicate_weights, name)
    if reliability_weights or min_reliability > 0:
        refuse_without_reliabilities(dataset, row_format, name, min_reliability)
    check_ref_tokenizer(dataset, tokenizer, name)
    from_values = row_format == "state" and "advantages" not in dataset.column_names
    is_listwise = loss_type == "listwise"
    if is_listwise:
        refuse_without_values(dataset, row_format, name)
    if log_partition is not None:
        refuse_without_candidates(row_format, name, log_partition)
    needed = {"values": from_values or is_listwise, "counts": from_values}

    def tokenize(row: dict[str, Any], index: int) -> tuple[dict[str, Any], int]:
        tokens = tokenize_policy_row(row, row_format, tokenizer, duplicate_weights, reliability_weights)
        num_steps = len(tokens["advantages"])
        if needed["values"]:
            tokens["values"] = with_true_rewards(row["values"], row.get("rewards"))
        counts = row.get("counts") or [1] * num_steps
        if needed["counts"]:
            tokens["counts"] = counts
        if log_partition is not None:  # of all samples, whatever is left of them
            tokens |= dict(zip(_SAMPLED, (tokens["advantages"], counts), strict=True))
        tokens |= {
            "source_rows": [index] * num_steps,
            "source_steps": list(range(num_steps)),
            "source_fingerprints": [row_fingerprint(tokens)] * num_steps,
        }
        tokens, removed = truncate_row(tokens, max_length)
        if min_reliability > 0:
            tokens, unreliable = keep_reliable(tokens, min_reliability)
            tokens["unreliable"] = unreliable
        return tokens, removed

    features = _TOKEN_FEATURES | _PAIR_FEATURES
    features = features | {column: List(Value("float64")) for column, is_needed in needed.items() if is_needed}
    if log_partition is not None:
        features = features | {column: List(Value("float64")) for column in _SAMPLED}
    if "ref_logps" in dataset.column_names:
        features = features | {"ref_logps": List(Value("float64"))}
    tokenized = _tokenize(dataset, tokenize, features, name, num_proc)
    num_merged = 0
    if row_format == "state":
        tokenized, num_merged = _merge_states(tokenized, from_values)
    done_with = {"values": not is_listwise, "counts": True}
    tokenized = tokenized.remove_columns([column for column in needed if needed[column] and done_with[column]])

    compared = tokenized.select_columns(["advantages", "num_branches", "unreliable"])
    fates = [_policy_fate(row, min_advantage_gap, is_listwise) for row in compared]
    limits = [f"{limit_name}={max_length}", f"{min_advantage_gap=}", f"{min_reliability=}"]
    prepared, report = _select(tokenized, fates, len(dataset), num_merged, name, limits)
    if log_partition is not None:
        prepared, num_impossible = _less_log_partition(prepared, beta, log_partition, name)
        if log_partition == "gaussian":
            report["log_partitions_impossible"] = num_impossible
    if "ref_logps" in prepared.column_names:
        check_ref_logps_are_complete(prepared, name)
    return prepared, report


def _policy_format(dataset: Dataset, name: str) -> str:
    """Format of the rows, if a policy learns from it."""
    refuse_values_without_advantages(dataset, name)
    row_format = check_dataset(dataset).format
    if row_format == "stepwise":
        raise ValueError(
            f"`{name}_dataset` has TRL's stepwise format, whose labels judge steps but not states. Convert it with "
            "`dapo_trl.readers.from_stepwise`, or train a step critic and use its values."
        )
    if row_format == "preference":
        logger.warning(
            f"`{name}_dataset` holds preference pairs: each is taken as one state, the prompt, with two whole "
            "solutions as its candidates (advantages 0.5 and -0.5). That works, but steps with values of their own "
            "teach more: see `docs/formats.md`."
        )
    return row_format


def _policy_fate(row: dict[str, Any], min_advantage_gap: float, is_listwise: bool) -> str:
    """Whether a tokenized row is kept, or why not."""
    if not row["advantages"]:
        return "unreliable" if row["unreliable"] else "too_long"
    # Candidates of a state are compared with each other; steps of a solution each have their own state. A gap of
    # 0.6 - 0.5 must not fail 0.1 by its last bit.
    is_compared = row["num_branches"] > 1
    no_contrast = is_compared and advantage_gap(row["advantages"]) < min_advantage_gap - 1e-9
    if is_listwise and len(row["advantages"]) < 2:
        return "alone"
    return "without_contrast" if no_contrast else "kept"


def prepare_critic_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    name: str = "train",
    max_length: int | None = None,
    num_proc: int | None = None,
    limit_name: str = "max_length",
) -> tuple[Dataset, dict[str, int]]:
    """
    Check, tokenize and truncate the rows that [`StepCriticTrainer`] trains on.

    Args:
        dataset ([`~datasets.Dataset`]):
            Solution rows.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the critic.
        name (`str`, *optional*, defaults to `"train"`):
            What the data set is called in messages.
        max_length (`int`, *optional*):
            Longest sequence in tokens; what exceeds it is cut by whole steps.
        num_proc (`int`, *optional*):
            Processes that tokenize.
        limit_name (`str`, *optional*, defaults to `"max_length"`):
            The argument that set `max_length`, for messages.

    Returns:
        `tuple[Dataset, dict[str, int]]`: tokenized rows, and counts as of [`prepare_policy_dataset`].

    Raises:
        TypeError: if `dataset` is no `Dataset`.
        ValueError: if a row is bad, the rows are of another format, or no row is left.
    """
    check_kind(dataset, name)
    row_format = check_dataset(dataset).format
    if row_format != "solution":
        raise ValueError(
            f"A step critic learns from solution rows (`prompt`, `completions`, `values`), but `{name}_dataset` has "
            f"the {row_format} format."
            + (" `dapo_trl.readers.from_stepwise` converts it." if row_format == "stepwise" else "")
        )
    check_fingerprint(dataset, tokenizer)
    warn_of_another_end(dataset, row_format, tokenizer, name)

    def tokenize(row: dict[str, Any], index: int) -> tuple[dict[str, Any], int]:
        tokens, removed = truncate_row(tokenize_critic_row(row, tokenizer), max_length)
        return tokens | {"state_keys": state_keys(tokens)}, removed

    features = _TOKEN_FEATURES | {"successes": List(Value("float64")), "rollouts": List(Value("float64"))}
    features = features | {"state_keys": List(List(Value("int64")))}
    tokenized = _tokenize(dataset, tokenize, features, name, num_proc)
    fates = ["kept" if steps else "too_long" for steps in tokenized["steps"]]
    return _select(tokenized, fates, len(dataset), 0, name, [f"{limit_name}={max_length}"])


def _tokenize(
    dataset: Dataset,
    tokenize: Callable[[dict[str, Any], int], tuple[dict[str, Any], int]],
    features: dict[str, Any],
    name: str,
    num_proc: int | None,
) -> Dataset:
    """Tokenized rows; those too long have no branch left."""

    def tokenize_row_at(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            tokens, removed = tokenize(row, index)
        except ValueError as error:
            raise ValueError(f"Row {index} of `{name}_dataset`: {error}") from error
        num_steps = sum(map(len, tokens["branches"]))
        about = {
            "prompt_key": prompt_key(row),
            "length": row_length(tokens),
            "index": index,
            "num_branches": len(row["candidates"]) if "candidates" in row else 2 if "chosen" in row else 1,
            "removed": removed,
            "unreliable": tokens.get("unreliable", 0),
            "steps": num_steps,
        }
        return {column: value for column, value in (tokens | about).items() if column in features | _FATE_FEATURES}

    return dataset.map(
        tokenize_row_at,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features(features | _FATE_FEATURES),
        num_proc=num_proc,
        desc=f"Tokenizing ({name})",
    )


def _less_log_partition(prepared: Dataset, beta: float, kind: str, name: str) -> tuple[Dataset, int]:
    """
    Advantages less beta times the log-partition of their state, which the loss makes targets of; and in how many states
    the log-partition is impossible.
    """
    shifted, num_impossible = [], 0
    for row in prepared.select_columns(["advantages", *_SAMPLED]):
        a_C, n_C = (row[column] for column in _SAMPLED)
        if len(a_C) == 1 and a_C[0] != 0:
            raise ValueError(
                f"`log_partition={kind!r}` is a mean over the candidates of a state, but `{name}_dataset` has a state "
                f"with one candidate, of advantage {a_C[0]:g}. Give all of its candidates, or leave the option out."
            )
        num_impossible += kind == "gaussian" and gaussian_excess(a_C, beta, n_C) > _ROUNDING
        shift = beta * log_partition_of(a_C, beta, n_C, kind)
        shifted.append([advantage - shift for advantage in row["advantages"]])
    if num_impossible > _IMPOSSIBLE_SHARE * len(shifted):
        logger.warning(
            f'`{name}_dataset`: in {num_impossible} of {len(shifted)} states `log_partition="gaussian"` is larger '
            f"than any log-partition of these advantages can be at `beta={beta}`, and every candidate would be made "
            'less likely. Raise `beta`, or use `log_partition="sample"`.'
        )
    rest = prepared.remove_columns(["advantages", *_SAMPLED])
    return rest.add_column("advantages", shifted, feature=_PAIR_FEATURES["advantages"]), num_impossible


def _merge_states(tokenized: Dataset, from_values: bool) -> tuple[Dataset, int]:
    """Rows of the same state as one row with the candidates of all; how many rows that saves."""
    states: dict[tuple[int, ...], list[int]] = {}
    for index, ids in enumerate(tokenized["context_ids"]):
        states.setdefault(tuple(ids), []).append(index)
    if len(states) == len(tokenized):
        return tokenized, 0

    def merge(indices: list[int]) -> dict[str, Any]:
        rows = [tokenized[index] for index in indices]
        merged = dict(rows[0])
        for column in ("branches", *PER_PAIR, *_SAMPLED):
            if column in merged:
                merged[column] = [value for row in rows for value in row[column]]
        for column in ("num_branches", "removed", "unreliable", "steps"):
            merged[column] = sum(row[column] for row in rows)
        if from_values and len(merged["values"]) > 1:  # the mean is over the candidates of all rows
            merged["advantages"] = sibling_advantages(merged["values"], merged["counts"]).tolist()
            if _SAMPLED[0] in merged:
                merged |= dict(zip(_SAMPLED, (merged["advantages"], merged["counts"]), strict=True))
        return merged | {"length": max(row["length"] for row in rows)}

    alone = [indices[0] for indices in states.values() if len(indices) == 1]
    shared = [indices for indices in states.values() if len(indices) > 1]
    merged = Dataset.from_list([merge(indices) for indices in shared], features=tokenized.features)
    firsts = [*alone, *(indices[0] for indices in shared)]
    both = concatenate_datasets([tokenized.select(alone), merged])
    return both.select(sorted(range(len(firsts)), key=firsts.__getitem__)), len(tokenized) - len(firsts)


def _select(
    tokenized: Dataset,
    fates: list[str],
    num_rows: int,
    num_merged: int,
    name: str,
    limits: list[str],
) -> tuple[Dataset, dict[str, int]]:
    """The rows to train on, and the report; `limits` are the arguments behind it."""
    kept = [index for index, fate in enumerate(fates) if fate == "kept"]
    report = {
        "rows": num_rows,
        "rows_kept": len(kept),
        "rows_merged": num_merged,
        "steps_truncated": sum(tokenized["removed"]),
        "rows_too_long": fates.count("too_long"),
        "rows_without_contrast": fates.count("without_contrast"),
        "steps_unreliable": sum(tokenized["unreliable"]),
        "rows_unreliable": fates.count("unreliable"),
    }
    selected = tokenized.select(kept)
    if "alone" in fates:
        report["rows_with_one_candidate"] = fates.count("alone")
    report["steps"] = sum(selected["steps"])
    first_too_long = tokenized["index"][fates.index("too_long")] if report["rows_too_long"] else None
    _explain(report, first_too_long, name, limits)
    return selected.remove_columns(list(_FATE_FEATURES)), report


def _explain(report: dict[str, int], first_too_long: int | None, name: str, limits: list[str]) -> None:
    """Say what was left out and why; refuse to go on with nothing."""
    if report["rows_merged"]:
        logger.info(f"`{name}_dataset`: {report['rows_merged']} rows have joined others of the same state.")
    reasons = []
    if report["steps_truncated"]:
        first = "" if first_too_long is None else f"; row {first_too_long} is the first"
        reasons.append(
            f"{report['steps_truncated']} steps did not fit into `{limits[0]}`, which leaves "
            f"{report['rows_too_long']} rows with none{first}"
        )
    if report["rows_without_contrast"]:
        reasons.append(f"{report['rows_without_contrast']} states have an advantage gap below `{limits[1]}`")
    if report.get("rows_with_one_candidate"):
        reasons.append(f"{report['rows_with_one_candidate']} states have one candidate, which is compared with none")
    if report["steps_unreliable"]:
        reasons.append(
            f"{report['steps_unreliable']} candidates have a reliability below `{limits[2]}`, which leaves "
            f"{report['rows_unreliable']} rows with none"
        )
    if not report["rows_kept"]:
        lower = " or `min_reliability`" if report["steps_unreliable"] else ""
        raise ValueError(
            f"No row of `{name}_dataset` ({report['rows']} rows) can be trained on: {' and '.join(reasons)}. Raise "
            f"`{limits[0].partition('=')[0]}`, lower `min_advantage_gap`{lower}, or collect data with more contrast."
        )
    if reasons:
        logger.warning(
            f"`{name}_dataset`: kept {report['rows_kept']} of {report['rows']} rows: {' and '.join(reasons)}."
        )
