"""
Programming problems from rows of HumanEval, MBPP, TACO and APPS: a question, and unit tests as its answer.
"""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from dapo_trl.execution import UnitTests


_NUM_SHOWN = 3  # tests that are part of an MBPP question, as its authors have it


def read_code_problems(rows: Dataset, name: str) -> Dataset:
    """
    Rows with a question and tests, whatever format they come in.

    Args:
        rows ([`~datasets.Dataset`]):
            Rows of HumanEval (`prompt`, `test`, `entry_point`), MBPP (`text` or `prompt`, `test_list`), TACO and APPS
            (`question`, `input_output`); or rows with a question and `answer`, written by
            [`~dapo_trl.execution.UnitTests.to_json`], which stay as they are.
        name (`str`):
            Of the data set, for errors.

    Returns:
        [`~datasets.Dataset`]: with `question`, `answer` and, where the rows have one, `problem_id`.

    Raises:
        ValueError: if a row has no tests; the message names it.
    """
    if not {"test", "test_list", "input_output"} & set(rows.column_names):
        return rows

    def convert(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        try:
            tests = UnitTests.from_row(row)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{name}: row {index + 1}: {error}") from error
        problem_id = row.get("task_id", row.get("problem_id", index))
        return {"question": _question(row, tests), "answer": tests.to_json(), "problem_id": str(problem_id)} | {
            column: row[column] for column in row if column.startswith("__")
        }

    return Dataset.from_list([convert(row, index) for index, row in enumerate(rows)])


def _question(row: Mapping[str, Any], tests: UnitTests) -> str:
    """What is asked: code to go on from; or words, with what the program is to be called."""
    if row.get("test_list") is not None:
        shown = "\n".join(row["test_list"][:_NUM_SHOWN])
        return f"{row.get('text') or row['prompt']}\nYour code should pass these tests:\n\n{shown}\n"
    if row.get("input_output") is not None:
        start = f"\n\nBegin with:\n\n{tests.prompt}" if tests.prompt else ""
        return f"{row['question']}{start}\n"
    return row["prompt"]
