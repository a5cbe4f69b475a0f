"""
The tables that sampling writes: their columns, and what it asks of the problems that it reads.
"""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features, List, Value

from dapo_trl.tokenization import TEMPLATE_COLUMNS


# columns of a problem that its solution rows and state rows have too
PROBLEM_COLUMNS = ("prompt", *TEMPLATE_COLUMNS, "answer", "problem_id")

# what a sampled solution adds to the columns of its problem
_SAMPLED = {
    "prompt_ids": List(Value("int32")),
    "generator": Value("string"),
    "tokenizer_fingerprint": Value("string"),
    "completions": List(Value("string")),
    "completions_ids": List(List(Value("int32"))),
    "reward": Value("float64"),
    "truncated": Value("bool"),
    "sample": Value("int32"),
}
_COUNTED = {
    "values": List(Value("float64")),
    "mc_successes": List(Value("float64")),
    "mc_rollouts": List(Value("int32")),
}
_LINEAGE = ("prompt_ids", "generator", "tokenizer_fingerprint")
_SOLUTION = ("completions", "completions_ids", "reward", "truncated")


def table_features(problem_features: Features) -> dict[str, Features]:
    """
    Columns of the tables of both sampling stages.

    Args:
        problem_features ([`~datasets.Features`]):
            Columns of the problems.

    Returns:
        `dict[str, Features]`: of `sampled` (every solution, with all columns of its problem), `solutions` (solution
        rows with values) and `states` (state rows), see `docs/formats.md`.

    Raises:
        ValueError: if the problems have a column that sampling adds.
    """
    if taken := sorted(set(problem_features) & set(_SAMPLED)):
        raise ValueError(
            f"The problems have columns {', '.join(map(repr, taken))}, which sampling adds. Remove or rename them."
        )
    kept = {name: problem_features[name] for name in PROBLEM_COLUMNS if name in problem_features}
    lineage = {name: _SAMPLED[name] for name in _LINEAGE}
    states = {
        "prefix": List(Value("string")),
        "candidates": List(Value("string")),
        "counts": List(Value("int32")),
        **_COUNTED,
        "rewards": List(Value("float64")),
        "prefix_ids": List(List(Value("int32"))),
        "candidates_ids": List(List(Value("int32"))),
    }
    return {
        "sampled": Features({**problem_features, **_SAMPLED}),
        "solutions": Features(kept | lineage | {name: _SAMPLED[name] for name in _SOLUTION} | _COUNTED),
        "states": Features(kept | lineage | states),
    }


def problem_features(sampled: Features) -> Features:
    """
    Columns of the problems, from those of the table `sampled`.

    Args:
        sampled ([`~datasets.Features`]):
            Columns of the table.

    Returns:
        [`~datasets.Features`].
    """
    return Features({name: feature for name, feature in sampled.items() if name not in _SAMPLED})


def problem_row(sampled: dict[str, Any]) -> dict[str, Any]:
    """
    A problem, as it was given, from one of its sampled solutions.

    Args:
        sampled (`dict`):
            Row of the table `sampled`.

    Returns:
        `dict`.
    """
    return {name: value for name, value in sampled.items() if name not in _SAMPLED}


def with_problem_ids(problems: Dataset) -> Dataset:
    """
    Problems that can be told apart by `problem_id`: the number of the row, unless they have one.

    Args:
        problems ([`~datasets.Dataset`]):
            Rows with `prompt`.

    Returns:
        [`~datasets.Dataset`]: the same rows, `problem_id` a string.

    Raises:
        ValueError: if there is no problem or no prompt, or two problems have the same `problem_id`.
    """
    if len(problems) == 0:
        raise ValueError("The data set of problems is empty.")
    if "prompt" not in problems.column_names:
        raise ValueError(
            f"The problems need a column `prompt`, found only {problems.column_names}. Rename yours to it."
        )
    if "problem_id" not in problems.column_names:
        return problems.add_column("problem_id", list(map(str, range(len(problems)))))
    ids = list(map(str, problems["problem_id"]))
    _refuse_duplicates(ids)
    return problems.remove_columns("problem_id").add_column("problem_id", ids)


def _refuse_duplicates(ids: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for index, problem_id in enumerate(ids):
        if problem_id in first:
            raise ValueError(
                f"Rows {first[problem_id]} and {index} of the problems have the same `problem_id` {problem_id!r}. "
                "Make it unique, or remove the column to number the rows."
            )
        first[problem_id] = index


def to_dataset(rows: Sequence[dict[str, Any]], features: Features) -> Dataset:
    """
    Rows as a data set, also if there is none.

    Args:
        rows (sequence of `dict`):
            Rows. A column that a row lacks is null.
        features ([`~datasets.Features`]):
            Columns.

    Returns:
        [`~datasets.Dataset`].
    """
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in features}, features=features)


def with_columns(dataset: Dataset, columns: dict[str, list]) -> Dataset:
    """
    Rows with columns that take the place of old ones of these names.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows.
        columns (`dict[str, list]`):
            Cells of each column, one per row.

    Returns:
        [`~datasets.Dataset`].
    """
    dataset = dataset.remove_columns([name for name in columns if name in dataset.column_names])
    for name, column in columns.items():
        dataset = dataset.add_column(name, column)
    return dataset
