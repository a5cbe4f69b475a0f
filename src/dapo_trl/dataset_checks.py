"""
What is refused of a data set before its rows are tokenized, what is said of it, and whether a model can read its rows.
"""

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dapo_trl.tokenization import end_written_by_template, template_arguments, tokenizer_fingerprint


logger = logging.getLogger(__name__)


def check_kind(dataset: Any, name: str) -> None:
    """
    Refuse what is no data set with rows.

    Args:
        dataset (`Any`):
            What was given.
        name (`str`):
            What it is called in messages.

    Raises:
        TypeError: if it is no [`~datasets.Dataset`].
    """
    if isinstance(dataset, dict):
        raise TypeError(
            f"`{name}_dataset` holds several splits: {list(dataset)}. Pass one, such as `dataset['train']`."
        )
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`{name}_dataset` must be a `datasets.Dataset`, got {type(dataset).__name__}. Rows are checked, filtered "
            "and counted before training starts, so a stream must be read first: `Dataset.from_list(list(stream))`."
        )


def refuse_values_without_advantages(dataset: Dataset, name: str) -> None:
    """
    Refuse state rows whose values have not become advantages yet.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows of any format.
        name (`str`):
            What the data set is called in messages.

    Raises:
        ValueError: if it has values of candidates, and neither advantages nor counts.
    """
    columns = set(dataset.column_names)
    has_advantages = "advantages" in columns or {"values", "counts"} <= columns
    values = [column for column in ("critic_values", "values") if column in columns]
    if {"prefix", "candidates"} <= columns and values and not has_advantages:
        raise ValueError(
            f"`{name}_dataset` has `{values[0]}`, but no `advantages`. Compute them first: "
            f'`add_advantages(dataset, "{values[0]}")`.'
        )


def refuse_missing_columns(dataset: Dataset, who: str, columns: Sequence[str], cure: str) -> None:
    """
    Refuse a data set that lacks columns.

    Args:
        dataset ([`~datasets.Dataset`]):
            Any rows.
        who (`str`):
            Who needs them, such as `"Shrinkage needs"`.
        columns (`Sequence[str]`):
            What must be there.
        cure (`str`):
            A sentence on where they come from.

    Raises:
        ValueError: if one is missing.
    """
    if missing := [name for name in columns if name not in dataset.column_names]:
        needed, absent = (", ".join(map(repr, names)) for names in (columns, missing))
        raise ValueError(f"{who} the columns {needed}; {absent} are not there. {cure}")


def warn_of_another_end(dataset: Dataset, row_format: str, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """
    Say so when answers would be taught to end otherwise than the chat template ends them.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows.
        row_format (`str`):
            Their format.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        name (`str`):
            What the data set is called in messages.
    """
    if row_format == "preference" or {"candidates_ids", "completions_ids"} & set(dataset.column_names):
        return  # the template, or the sampler, has written the end
    end = None
    with contextlib.suppress(ValueError):  # a bad row is refused by its number when it is tokenized
        end = end_written_by_template(dataset[0]["prompt"], tokenizer, **template_arguments(dataset[0]))
    if end is not None:
        logger.warning(
            f"`{name}_dataset`: after an answer the chat template writes {end!r}, but a solution is taught to end with "
            f"the tokenizer's `eos_token`, {tokenizer.eos_token!r}. Set `tokenizer.eos_token` to the token that your "
            "model ends its answers with."
        )


def check_columns_are_used(dataset: Dataset, row_format: str, duplicate_weights: str, name: str) -> None:
    """
    Say so when a column that the user counts on is missing, or is there and not used.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows.
        row_format (`str`):
            Their format.
        duplicate_weights (`str`):
            `"uniform"` or `"counts"`.
        name (`str`):
            What the data set is called in messages.

    Raises:
        ValueError: if `counts` are missing, or solution rows have advantages.
    """
    columns = set(dataset.column_names)
    if row_format == "state" and duplicate_weights == "counts" and "counts" not in columns:
        raise ValueError(
            f'`duplicate_weights="counts"` needs a column `counts`, which `{name}_dataset` has not. Add it, or '
            'use `duplicate_weights="uniform"`.'
        )
    if row_format == "solution" and "advantages" in columns:
        raise ValueError(
            f"`{name}_dataset` has solution rows with a column `advantages`, which are not used: a step's advantage is "
            "the difference of its `values`. Remove the column, or give state rows."
        )
    if "critic_values" in columns and "advantages" not in columns:
        logger.warning(
            f"`{name}_dataset` has a column `critic_values`, but advantages are computed from `values`. To train on "
            'what the critic says, pass `add_advantages(dataset, "critic_values")`; of solution rows, rename it.'
        )


def refuse_without_reliabilities(dataset: Dataset, row_format: str, name: str, min_reliability: float) -> None:
    """
    Refuse rows that do not say how far their advantages can be relied on.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows.
        row_format (`str`):
            Their format.
        name (`str`):
            What the data set is called in messages.
        min_reliability (`float`):
            Smallest reliability that is asked for; 0 if they are weights only.

    Raises:
        ValueError: if they are no state rows, or there are no `reliabilities`.
    """
    option = f"min_reliability={min_reliability}" if min_reliability > 0 else "reliability_weights=True"
    if row_format != "state":
        raise ValueError(
            f"`{option}` is about the candidates of states, but `{name}_dataset` has the {row_format} format. Give "
            "state rows, or leave the option out."
        )
    if "reliabilities" not in dataset.column_names:
        raise ValueError(
            f"`{option}` needs a column `reliabilities`, which `{name}_dataset` has not. "
            '`add_advantages(dataset, "values", errors="value_errors")` writes it, with standard errors of the values '
            "from `dapo_trl.shrinkage`; or leave the option out."
        )
    rows = dataset["reliabilities"]
    if None in rows:
        raise ValueError(
            f"Row {rows.index(None)} of `{name}_dataset` has no `reliabilities`, which `{option}` needs. Fill them in, "
            "or drop the row."
        )


def refuse_without_values(dataset: Dataset, row_format: str, name: str) -> None:
    """
    Refuse rows whose candidates have no values, which a listwise loss compares.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows.
        row_format (`str`):
            Their format.
        name (`str`):
            What the data set is called in messages.

    Raises:
        ValueError: if they are no state rows, or there are no `values`.
    """
    if row_format != "state":
        raise ValueError(
            f'`loss_type="listwise"` compares the candidates of states, but `{name}_dataset` has the {row_format} '
            'format. Give state rows, or use `loss_type="squared"`.'
        )
    cure = "those of a critic are put there by `dataset.rename_column('critic_values', 'values')`."
    if "values" not in dataset.column_names:
        raise ValueError(
            f'`loss_type="listwise"` needs a column `values`, which `{name}_dataset` has not. Add it; {cure}'
        )
    rows = dataset["values"]
    if None in rows:
        raise ValueError(
            f'Row {rows.index(None)} of `{name}_dataset` has no `values`, which `loss_type="listwise"` needs. Fill '
            "them in, or drop the row."
        )
    others = [column for column in ("critic_values", "shrinkage_values") if column in dataset.column_names]
    if others:
        logger.warning(
            f"`{name}_dataset` has `{others[0]}`, but a listwise loss compares `values`. To train on the others, "
            "`dapo_trl.value_sources.with_values_of` puts them there."
        )


def refuse_without_candidates(row_format: str, name: str, log_partition: str) -> None:
    """
    Refuse rows that have one sample of each state, from which no log-partition can be had.

    Args:
        row_format (`str`):
            Their format.
        name (`str`):
            What the data set is called in messages.
        log_partition (`str`):
            What was asked for.

    Raises:
        ValueError: if they are solution rows.
    """
    if row_format == "solution":
        raise ValueError(
            f"`log_partition={log_partition!r}` is a mean over the candidates of a state, but `{name}_dataset` has "
            "solution rows, with one step from each. Give state rows, or leave it out."
        )


def check_fingerprint(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Refuse token ids that another tokenizer made.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows, with or without ids.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model that shall read them.

    Raises:
        ValueError: if the rows carry ids whose `tokenizer_fingerprint` is not this tokenizer's.
    """
    if not {"candidates_ids", "completions_ids"} & set(dataset.column_names):
        return
    if "tokenizer_fingerprint" not in dataset.column_names:
        logger.warning(
            "The rows carry token ids, but no `tokenizer_fingerprint` that says whose. They are used as they are: make "
            "sure that they come from this model's tokenizer, or remove the columns that end in `_ids`."
        )
        return
    own = tokenizer_fingerprint(tokenizer)
    for index, fingerprint in enumerate(dataset["tokenizer_fingerprint"]):
        if fingerprint != own:
            raise ValueError(
                f"Row {index}: its token ids come from a tokenizer with fingerprint {fingerprint!r}, this model's "
                f"tokenizer has {own!r}. Use the tokenizer of the model that sampled the data, or remove the columns "
                "that end in `_ids` to tokenize the text again."
            )


def check_rows_fit_model(prepared: Dataset, config: PretrainedConfig, name: str) -> None:
    """
    Refuse token ids that the model has no embedding for; warn of sequences longer than it was made for.

    Args:
        prepared ([`~datasets.Dataset`]):
            Tokenized rows.
        config ([`~transformers.PretrainedConfig`]):
            Configuration of the model.
        name (`str`):
            What the data set is called in messages.

    Raises:
        ValueError: if an id is out of the model's vocabulary.
    """
    text_config = config.get_text_config()
    vocab_size = getattr(text_config, "vocab_size", None)
    largest = max(_largest_id(prepared, column) for column in ("context_ids", "branches"))
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"`{name}_dataset` has the token id {largest}, but the model embeds only {vocab_size} tokens (0 to "
            f"{vocab_size - 1}). Use the model's own tokenizer, or `model.resize_token_embeddings` if you added tokens."
        )
    positions = getattr(text_config, "max_position_embeddings", None)
    longest = max(prepared["length"])
    if positions is not None and longest > positions:
        logger.warning(
            f"`{name}_dataset` has sequences of up to {longest} tokens, but the model was made for {positions} "
            f"(`max_position_embeddings`). Set `max_length={positions}` to cut them by whole steps."
        )


def _largest_id(prepared: Dataset, column: str) -> int:
    largest = 0
    for batch in prepared.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        ids = batch[column]
        while pa.types.is_list(ids.type):
            ids = pc.list_flatten(ids)
        largest = max(largest, pc.max(ids).as_py() or 0)
    return largest
