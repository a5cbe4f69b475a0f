"""
Problems from a local file, from the Hub, or from a Python function: rows with `prompt`, `answer` and `problem_id`.
"""

import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from dapo_trl.code_problems import read_code_problems
from dapo_trl.settings import SettingsError
from dapo_trl.tokenization import TEMPLATE_COLUMNS, encode_prompt, template_arguments
from dapo_trl.verifiers import check_answers, check_tests


logger = logging.getLogger(__name__)

_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_QUESTION_COLUMNS = ("question", "problem", "prompt")
_ANSWER_COLUMNS = ("answer", "solution", "target")
_OTHER_FILES = (".txt", ".tsv", ".xlsx", ".arrow", ".yaml", ".yml", ".zip", ".gz")
_ROW = "__row__"  # where a row stands in its split, from 1


def load_problems(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    config: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    num_train: int | None = None,
    num_test: int | None = None,
    prompt_template: str = "{question}",
    seed: int = 0,
    verifier: str = "math",
) -> DatasetDict:
    """
    Problems to train on, and problems to evaluate on that share no prompt with them.

    Args:
        name (`str`):
            A json, jsonl (also gzipped), parquet or csv file; a data set on the Hub; or `"file.py:function"`, a
            function of `split`, `n` and `seed` that returns a list of rows with `prompt` and `answer`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model. With a chat template, questions become conversations.
        config (`str`, *optional*):
            Configuration of a data set on the Hub.
        train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on. If there is none, problems of the training split are held out.
        num_train (`int`, *optional*):
            Problems to train on, a sample of the split. `None` for all.
        num_test (`int`, *optional*):
            Problems to evaluate on. `None` for all, or for 1,000 held-out ones. Those whose prompt is trained on are
            left out before, with a warning.
        prompt_template (`str`, *optional*, defaults to `"{question}"`):
            How a question is put.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sample.
        verifier (`str`, *optional*, defaults to `"math"`):
            What answers are for: `"math"`, or `"code"`, of which they are unit tests; rows of HumanEval, MBPP, TACO and
            APPS are read too.

    Returns:
        [`~datasets.DatasetDict`]: `train` and `test`, with `prompt`, `answer` and `problem_id`, and with `tools` and
        `chat_template_kwargs` if the data set has them.

    Raises:
        ValueError: if there is no such file, function, split or column, no problem, none to evaluate on that is not
            trained on, or an answer cannot be parsed.
    """
    path, _, function = name.partition(":")
    if path.endswith(".py"):
        if not function:
            raise SettingsError(
                f"`dataset_name` is {name!r}. Name the function that makes the problems: {name}:function"
            )
        make_problems = _import_function(Path(path), function)
        if num_train is None or num_test is None:
            raise SettingsError(f"How many problems shall {name} make? Set their numbers for training and evaluation.")
        try:
            train, test = make_problems(train_split, num_train, seed), make_problems(test_split, num_test, 0)
        except Exception as error:
            raise ValueError(f"{name} failed: {type(error).__name__}: {error}") from error
        return _checked(_from_rows(train, name), _from_rows(test, name), num_test, name, verifier)
    parts = {split: _with_places(rows) for split, rows in _read(name, config).items()}
    if train_split not in parts:
        raise SettingsError(f"{name} has no split {train_split!r}, only {list(parts)}. Set `dataset_train_split`.")
    if test_split in parts:
        train, test = parts[train_split], parts[test_split]
    else:
        whole = parts[train_split].shuffle(seed=seed)
        size = min(num_test or 1000, len(whole) // 2)
        test, train = whole.select(range(size)), whole.select(range(size, len(whole)))
    # Seeded, so that a smaller number of problems is a sample of all of them.
    train, test = _first(train.shuffle(seed=seed), num_train), test.shuffle(seed=seed)
    _refuse_empty(train, test, name)
    if num_train is not None and len(train) < num_train:
        logger.warning(f"{name} has {len(train)} problems to train on; `num_train_problems` asks for {num_train}.")
    train, test = (_as_problems(part, prompt_template, tokenizer, name, verifier) for part in (train, test))
    return _checked(train, test, num_test, name, verifier)


def load_test_problems(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    split: str = "test",
    prompt_template: str = "{question}",
    verifier: str = "math",
) -> Dataset:
    """
    All problems of a data set, to evaluate on.

    Args:
        name (`str`):
            A file, or a data set on the Hub.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        split (`str`, *optional*, defaults to `"test"`):
            Split to take, if there are several.
        prompt_template (`str`, *optional*, defaults to `"{question}"`):
            How a question is put.
        verifier (`str`, *optional*, defaults to `"math"`):
            What answers are for, see [`load_problems`].

    Returns:
        [`~datasets.Dataset`]: rows with `prompt`, `answer` and `problem_id`.

    Raises:
        ValueError: as [`load_problems`].
    """
    parts = _read(name, None)
    if len(parts) > 1 and split not in parts:
        raise SettingsError(f"{name} has no split {split!r}, only {list(parts)}. Set `dataset_test_split`.")
    rows = _with_places(parts[split] if split in parts else next(iter(parts.values())))
    if not len(rows):
        raise ValueError(f"{name} has no problem to evaluate on. Check the file and the split.")
    problems = _as_problems(rows, prompt_template, tokenizer, name, verifier)
    _check_cells(problems, name, verifier)
    return problems


def _checked(train: Dataset, test: Dataset, num_test: int | None, name: str, verifier: str) -> DatasetDict:
    _refuse_empty(train, test, name)
    for problems in (train, test):
        for column in ("prompt", "answer"):
            _find_column(problems, (column,))
    parts = DatasetDict(train=train, test=_first(set_apart(train, test, name), num_test))
    for problems in parts.values():
        _check_cells(problems, name, verifier)
    return parts


def _check_cells(problems: Dataset, name: str, verifier: str) -> None:
    """Refuse rows without a prompt or an answer, and answers that cannot be read."""
    for column in ("prompt", "answer"):
        if empty := [row for row in problems if row[column] in (None, "", [])]:
            rows = f"{len(empty)} of {len(problems)} rows"
            raise ValueError(f"{name}: {rows} have no {column}, the first is {empty[0]}. Leave them out.")
    (check_tests if verifier == "code" else check_answers)(problems["answer"])


def set_apart(train: Dataset, test: Dataset, name: str) -> Dataset:
    """
    The test problems whose prompts are not among those of training.

    Args:
        train ([`~datasets.Dataset`]):
            Problems to train on.
        test ([`~datasets.Dataset`]):
            Problems to evaluate on.
        name (`str`):
            Of the data set, for messages.

    Returns:
        [`~datasets.Dataset`]: of the test problems those.

    Raises:
        ValueError: if none is left.
    """
    seen = {json.dumps(prompt) for prompt in train["prompt"]}
    apart = test.filter(lambda row: json.dumps(row["prompt"]) not in seen)
    num_shared = len(test) - len(apart)
    if not len(apart):
        raise ValueError(
            f"{name}: all {num_shared} test problems are also in training, so there is none to evaluate on. Give a "
            "test split of other problems, or fewer to train on."
        )
    if num_shared:
        logger.warning(f"{name}: {num_shared} test problems are also in training and were left out.")
    return apart


def _refuse_empty(train: Dataset, test: Dataset, name: str) -> None:
    for purpose, problems in (("train", train), ("evaluate", test)):
        if not len(problems):
            raise ValueError(f"{name} has no problem to {purpose} on. Check the file, the splits and the numbers.")


def refuse_long_prompts(problems: Dataset, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
    """
    Refuse prompts that leave no room for a solution, before hours of sampling.

    Args:
        problems ([`~datasets.Dataset`]):
            Rows with `prompt`, and `problem_id`, `tools` and `chat_template_kwargs` where they have them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        context (`int`):
            Longest sequence of the model, in tokens.

    Raises:
        ValueError: if there is one; the message names the first.
    """
    long = []
    for index, row in enumerate(problems):
        # A token has a byte at least, so that hardly any prompt has to be counted. The template may add some.
        given = [row[name] for name in ("prompt", *TEMPLATE_COLUMNS) if name in row]
        if len(json.dumps(given)) + 256 >= context:
            length = len(encode_prompt(row["prompt"], tokenizer, **template_arguments(row)))
            long += [(row.get("problem_id", index), row, length)] if length >= context else []
    if long:
        problem_id, row, length = long[0]
        raise ValueError(
            f"The prompt of problem {problem_id!r}, {str(row['prompt'])[:60]!r}..., has {length} tokens and "
            f"leaves no room in the model's context of {context}. So it is with {len(long)} of {len(problems)} "
            "problems. Leave them out, or use a model with a longer context."
        )


def _import_function(path: Path, name: str) -> Callable[..., list[dict[str, Any]]]:
    if not path.exists():
        raise SettingsError(f"The problems are to come from {path}, but there is no such file. Check the path.")
    spec = importlib.util.spec_from_file_location(f"dapo_trl_problems_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # any file that ends in .py has one
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{path} has no function {name!r}. Write `{path}:function`.")
    return getattr(module, name)


def _from_rows(rows: Any, name: str) -> Dataset:
    try:
        return Dataset.from_list(list(rows))
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{name} must return a list of rows, each a dict, not {rows!r:.80}.") from error


def _read(name: str, config: str | None) -> DatasetDict:
    suffix = Path(name.removesuffix(".gz")).suffix
    kind = _KINDS.get(suffix)
    if kind is None and (suffix in _OTHER_FILES or Path(name).is_file()):
        known = ", ".join(_KINDS)
        raise SettingsError(f"`dataset_name` is {name!r}, which is none of the files that can be read: {known}.")
    if kind is not None and not Path(name).exists():
        raise SettingsError(f"`dataset_name` is {name!r}, but there is no such file. Check the path.")
    try:
        parts = load_dataset(kind, data_files=name) if kind is not None else load_dataset(name, config)
    except Exception as error:
        reason = str(error.__cause__ or error) or "it is empty"
        raise ValueError(f"{name} cannot be read: {reason}. Check the file or the name.") from error
    return parts


def _with_places(rows: Dataset) -> Dataset:
    return rows.add_column(_ROW, range(1, len(rows) + 1))


def _refuse_bad_cells(rows: Dataset, column: str, name: str) -> None:
    """Refuse rows without a question or an answer, and questions that are no text."""
    cells = list(zip(rows[_ROW], rows[column], strict=True))
    empty = [row for row, cell in cells if cell in (None, [], "") or (isinstance(cell, str) and not cell.strip())]
    if empty:
        raise ValueError(
            f"{name}: {len(empty)} of {len(cells)} rows have no {column}, the first is row {empty[0]}. Leave them out."
        )
    for row, cell in cells:
        if column in _QUESTION_COLUMNS and not isinstance(cell, (str, list)):
            raise ValueError(f"{name}: `{column}` must hold text, or a list of messages; in row {row} it is {cell!r}.")


def _as_problems(
    rows: Dataset, prompt_template: str, tokenizer: PreTrainedTokenizerBase, name: str, verifier: str
) -> Dataset:
    """Rows with a question and an answer, as prompts: conversational if the tokenizer has a chat template."""
    if verifier == "code":
        rows = read_code_problems(rows, name)
    question, answer = _find_column(rows, _QUESTION_COLUMNS), _find_column(rows, _ANSWER_COLUMNS)
    dropped = [column for column in rows.column_names if column not in TEMPLATE_COLUMNS]
    for column in (question, answer):
        _refuse_bad_cells(rows, column, name)

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        prompt = row[question]
        if isinstance(prompt, str):
            prompt = prompt_template.replace("{question}", prompt)
            prompt = [{"role": "user", "content": prompt}] if tokenizer.chat_template else prompt
        return {"prompt": prompt, "answer": str(row[answer]), "problem_id": str(row.get("problem_id", index))}

    problems = rows.map(convert, with_indices=True, remove_columns=dropped, desc="Reading problems")
    return problems


def _find_column(rows: Dataset, names: tuple[str, ...]) -> str:
    for name in names:
        if name in rows.column_names:
            return name
    given = [column for column in rows.column_names if column != _ROW]
    raise ValueError(f"The data set needs a column named {' or '.join(map(repr, names))}, it has {given}.")


def _first(rows: Dataset, number: int | None) -> Dataset:
    return rows if number is None else rows.select(range(min(number, len(rows))))
