"""
The row formats: which one a data set has, and whether its rows are sound.

| format | columns | one row is |
|---|---|---|
| `"solution"` | `prompt`, `completions`, `values` | one solution: K steps and the values of its K+1 states |
| `"state"` | `prompt`, `prefix`, `candidates` and `advantages`, or `values` with `counts` | one state, C next steps |
| `"preference"` | `prompt`, `chosen`, `rejected` | TRL's preference row, standard or conversational |
| `"stepwise"` | `prompt`, `completions`, `labels` | TRL's stepwise row: K steps and their K labels |

Readers for other formats are in `readers.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from reprlib import Repr
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict


# Required columns of each format. A format with two layouts is listed twice; the first layout that fits wins.
_LAYOUTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("solution", ("prompt", "completions", "values")),
    ("state", ("prompt", "prefix", "candidates", "advantages")),
    ("state", ("prompt", "prefix", "candidates", "values", "counts")),
    ("preference", ("prompt", "chosen", "rejected")),
    ("stepwise", ("prompt", "completions", "labels")),
)
# Optional columns that are checked where present. Others are the user's own.
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "solution": ("mc_successes", "mc_rollouts", "completion", "text", "prompt_ids", "completions_ids"),
    "state": (
        *("advantages", "reliabilities", "values", "counts", "rewards"),
        *("prompt_ids", "prefix_ids", "candidates_ids"),
    ),
    "preference": (),
    "stepwise": (),
}
_BATCH_SIZE = 1000

_repr = Repr()
_repr.maxlist = _repr.maxdict = 8
_repr.maxstring = _repr.maxother = 80

Rows: TypeAlias = Dataset | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class FormatReport:
    """
    What [`check_dataset`] found in a sound data set.

    Args:
        format (`str`):
            `"solution"`, `"state"`, `"preference"` or `"stepwise"`.
        num_rows (`int`):
            Rows.
        num_steps (`int`):
            Steps (solution, stepwise) or candidates (state) of all rows together; 0 for preference rows.
        conversational (`bool`):
            Whether the prompts are lists of messages.
    """

    format: str
    num_rows: int
    num_steps: int
    conversational: bool


class _BadRow(Exception):
    """A problem in one row; [`check_dataset`] adds the row's index."""

    def __init__(self, column: str, problem: str, value: Any, cure: str):
        super().__init__(f"column `{column}`: {problem}, got {_repr.repr(value)}. {cure}")


def detect_format(dataset: Rows | Iterable[str]) -> str:
    r"""
    Name of the row format, from the columns alone.

    Args:
        dataset (`Dataset`, `list[dict]` or iterable of `str`):
            Data set, rows, or the names of the columns.

    Returns:
        `str`: `"solution"`, `"state"`, `"preference"` or `"stepwise"`; the first of them when the columns fit several.

    Raises:
        TypeError: if `dataset` is a dictionary of splits or a stream without known columns.
        ValueError: if columns are missing or misspelt; the message names them, the columns present and close matches.

    Example:

    ```python
    >>> from dapo_trl.formats import detect_format

    >>> detect_format(["prompt", "completions", "values", "answer"])
    'solution'
    >>> detect_format(["prompt", "completion", "values"])
    Traceback (most recent call last):
    ...
    ValueError: Not a solution data set: column `completions` (did you mean `completion`?) is missing. Columns ...

    ```
    """
    return _detect(_column_names(dataset), None)


def check_dataset(dataset: Rows, format: str | None = None) -> FormatReport:
    r"""
    Check every row of a data set, and explain the first problem.

    Args:
        dataset (`Dataset` or `list[dict]`):
            Rows. Streams are refused: a check that reads the rows would use them up.
        format (`str`, *optional*):
            `"solution"`, `"state"`, `"preference"` or `"stepwise"`. By default it is detected from the columns.

    Returns:
        [`FormatReport`]: the format, and the number of rows and steps.

    Raises:
        TypeError: if `dataset` is a stream or a dictionary of splits.
        ValueError: if the data set is empty, a column is missing, or a row is bad. The message names the first bad row,
            its column, its value and the cure, and says how many rows are bad.

    Example:

    ```python
    >>> from dapo_trl.formats import check_dataset

    >>> row = {"prompt": "2+2*3?", "completions": ["2*3=6\n", "so 8"], "values": [0.5, 0.75, 1.0]}
    >>> check_dataset([row])
    FormatReport(format='solution', num_rows=1, num_steps=2, conversational=False)
    >>> check_dataset([row, {**row, "values": [0.75, 1.0]}])
    Traceback (most recent call last):
    ...
    ValueError: Row 1, column `values`: expected 3 numbers, one for each of the 3 states (the prompt and 2 steps), ...

    ```
    """
    if not isinstance(dataset, Dataset) and not isinstance(dataset, list | tuple):
        _refuse(dataset)
    columns = _column_names(dataset)
    format = _detect(columns, format)
    check = _CHECKS[format]
    num_steps, num_bad, first = 0, 0, ""
    kinds: set[type] = set()
    for index, row in enumerate(_rows(dataset, format, columns)):
        try:
            num_steps += check(row)
            kinds.add(_check_kind(row["prompt"], kinds))
        except _BadRow as error:
            num_bad += 1
            first = first or f"Row {index}, {error}"
    if num_bad:
        raise ValueError(f"{first} ({num_bad} of {index + 1} rows have a problem.)")
    return FormatReport(format, index + 1, num_steps, conversational=kinds == {list})


def _refuse(dataset: Any) -> None:
    """Refuse what is not a finite list of rows, with the cure."""
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        raise TypeError(
            f"`dataset` holds the splits {list(dataset)}: pass one of them, e.g. dataset[{next(iter(dataset))!r}]"
        )
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            "`dataset` is a stream (`IterableDataset`), and reading its rows would use them up. Check a sample of it, "
            "`Dataset.from_list(list(dataset.take(1000)))`, or load it with `streaming=False`"
        )
    raise TypeError(f"`dataset` must be a `datasets.Dataset` or a list of rows (dict), got {type(dataset).__name__}")


def _column_names(dataset: Rows | Iterable[str]) -> list[str]:
    """Columns of a data set, of its first row, or the names themselves."""
    if isinstance(dataset, DatasetDict | IterableDatasetDict | str | Mapping):
        _refuse(dataset)
    if isinstance(dataset, Dataset | IterableDataset):
        if dataset.column_names is None:
            _refuse(dataset)
        columns = list(dataset.column_names)
        empty = isinstance(dataset, Dataset) and not len(dataset)
    else:
        entries = list(dataset)
        empty = not entries
        columns = list(entries[0]) if entries and isinstance(entries[0], Mapping) else entries
    if empty:
        raise ValueError("`dataset` is empty: it has no rows. Look for a filter that dropped all of them")
    if not all(isinstance(column, str) for column in columns):
        raise TypeError(f"`dataset` must hold rows (dict) or column names (str), got {_repr.repr(columns[0])}")
    return columns


def _detect(columns: list[str], format: str | None) -> str:
    layouts = [layout for layout in _LAYOUTS if format in (None, layout[0])]
    if not layouts:
        raise ValueError(f"`format` {format!r} is unknown: choose one of {', '.join(map(repr, _CHECKS))}")
    for name, required in layouts:
        if set(required) <= set(columns):
            return name
    raise ValueError(_explain_missing(columns, layouts))


def _explain_missing(columns: list[str], layouts: list[tuple[str, tuple[str, ...]]]) -> str:
    """Say which columns are missing, against the layout that the data set comes closest to."""

    def close(column: str, required: tuple[str, ...]) -> list[str]:
        return get_close_matches(column.lower(), [c for c in columns if c not in required], n=1)

    def distance(layout: tuple[str, tuple[str, ...]]) -> tuple[int, int]:
        missing = [column for column in layout[1] if column not in columns]
        return sum(not close(column, layout[1]) for column in missing), len(missing) - len(layout[1])

    name, required = min(layouts, key=distance)
    present = f"Columns present: {', '.join(columns) or 'none'}."
    if len(layouts) == len(_LAYOUTS) and not distance((name, required))[1]:
        expected = "; ".join(f"{name}: {', '.join(required)}" for name, required in layouts)
        return f"No known row format. {present} Columns expected: {expected}."
    missing = [(column, close(column, required)) for column in required if column not in columns]
    hints = [f"`{column}`" + (f" (did you mean `{hint[0]}`?)" if hint else "") for column, hint in missing]
    verb = "column {} is" if len(hints) == 1 else "columns {} are"
    return f"Not a {name} data set: {verb.format(', '.join(hints))} missing. {present}"


def _rows(dataset: Rows, format: str, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    """Rows with the columns that are checked; a data set is read in batches, which is much faster than by row."""
    if not isinstance(dataset, Dataset):
        required = next(req for name, req in _LAYOUTS if name == format and set(req) <= set(columns))
        yield from (_complete(row, required) for row in dataset)
        return
    wanted = {c for name, required in _LAYOUTS if name == format for c in required} | set(_OPTIONAL[format])
    checked = [column for column in columns if column in wanted]
    for batch in dataset.select_columns(checked).with_format(None).iter(batch_size=_BATCH_SIZE):
        yield from (dict(zip(checked, row, strict=True)) for row in zip(*batch.values(), strict=True))


def _complete(row: Mapping[str, Any], required: tuple[str, ...]) -> Mapping[str, Any]:
    """A row of a list, with None for the required columns that it lacks."""
    return row if all(column in row for column in required) else {**dict.fromkeys(required), **row}


def _check_solution(row: Mapping[str, Any]) -> int:
    steps = row["completions"]
    _check_prompt(row["prompt"], "prompt")
    _check_steps(steps, "completions", at_least=1)
    states = f"one for each of the {len(steps) + 1} states (the prompt and {len(steps)} steps)"
    _check_numbers(row["values"], "values", len(steps) + 1, states)
    if row.get("mc_successes") is not None or row.get("mc_rollouts") is not None:
        _check_monte_carlo(row, len(steps) + 1, states)
    _check_text(row, steps)
    _check_ids(row, "completions", len(steps), with_column="prompt_ids")
    return len(steps)


def _check_state(row: Mapping[str, Any]) -> int:
    candidates = row["candidates"]
    _check_prompt(row["prompt"], "prompt")
    _check_steps(row["prefix"], "prefix", at_least=0)
    _check_steps(candidates, "candidates", at_least=1)
    # the same words may both end the solution and go on: these are two actions
    if row.get("rewards") is not None:
        _check_rewards(row["rewards"], len(candidates), f"one for each of the {len(candidates)} candidates")
    ends = [reward is not None for reward in row.get("rewards") or [None] * len(candidates)]
    actions = list(zip(candidates, ends, strict=False))
    if len(set(actions)) < len(actions):
        twice = next(action[0] for i, action in enumerate(actions) if action in actions[:i])
        raise _BadRow("candidates", "the same candidate twice", twice, "Keep one and add up their `counts`.")
    each = f"one for each of the {len(candidates)} candidates"
    if row.get("advantages") is not None:
        _check_numbers(row["advantages"], "advantages", len(candidates), each, bounded=False)
    elif len(candidates) < 2:
        cure = "An advantage compares candidates: drop the state or sample more of them."
        raise _BadRow("candidates", "a single candidate, and no `advantages`", candidates, cure)
    if row.get("reliabilities") is not None:
        _check_numbers(row["reliabilities"], "reliabilities", len(candidates), each)
    if row.get("advantages") is None or row.get("values") is not None:
        _check_numbers(row.get("values"), "values", len(candidates), each)
    if row.get("advantages") is None or row.get("counts") is not None:
        _check_counts(row.get("counts"), "counts", len(candidates), each, at_least=1)
    _check_ids(row, "prefix", len(row["prefix"]), with_column="prompt_ids")
    _check_ids(row, "candidates", len(candidates), with_column="prefix_ids")
    return len(candidates)


def _check_preference(row: Mapping[str, Any]) -> int:
    for column in ("prompt", "chosen", "rejected"):
        _check_prompt(row[column], column)
        if isinstance(row[column], str) != isinstance(row["prompt"], str):
            cure = "Write `prompt`, `chosen` and `rejected` all as text or all as messages."
            raise _BadRow(column, f"not of the same kind as `prompt` ({_kind(row['prompt'])})", row[column], cure)
    return 0


def _check_stepwise(row: Mapping[str, Any]) -> int:
    steps = row["completions"]
    _check_prompt(row["prompt"], "prompt")
    _check_steps(steps, "completions", at_least=1)
    each = f"one for each of the {len(steps)} steps"
    labels = row["labels"]
    if isinstance(labels, list | tuple):
        labels = [float(label) if isinstance(label, bool) else label for label in labels]
    _check_numbers(labels, "labels", len(steps), each)
    return len(steps)


_CHECKS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "solution": _check_solution,
    "state": _check_state,
    "preference": _check_preference,
    "stepwise": _check_stepwise,
}


def _kind(prompt: Any) -> str:
    return "text" if isinstance(prompt, str) else "messages"


def _check_kind(prompt: Any, kinds: set[type]) -> type:
    """Prompts are all text or all messages; returns which."""
    kind = str if isinstance(prompt, str) else list
    if kinds and kind not in kinds:
        cure = "Write all prompts as text or all as messages."
        raise _BadRow("prompt", f"{_kind(prompt)}, while the rows before hold the other kind", prompt, cure)
    return kind


def _check_prompt(prompt: Any, column: str) -> None:
    """A non-empty string, or a non-empty list of messages with `role` and `content`."""
    if isinstance(prompt, str) and prompt:
        return
    if not isinstance(prompt, list | tuple) or not prompt:
        raise _BadRow(column, "expected a non-empty text or list of messages", prompt, "Fill it or drop the row.")
    for message in prompt:
        if not isinstance(message, Mapping) or not message.get("role") or "content" not in message:
            cure = 'Write messages as {"role": "user", "content": "..."}.'
            raise _BadRow(column, "a message needs `role` and `content`", message, cure)


def _check_steps(steps: Any, column: str, at_least: int) -> None:
    if not isinstance(steps, list | tuple) or any(not isinstance(step, str) for step in steps):
        raise _BadRow(column, "expected a list of strings", steps, "One string per step, see `split_steps`.")
    if len(steps) < at_least:
        raise _BadRow(column, "no step", steps, "Drop the row.")
    if "" in steps:
        cure = "Every step needs text: drop it, and its value with it."
        raise _BadRow(column, f"step {steps.index('')} is empty", steps, cure)


def _check_numbers(values: Any, column: str, length: int, each: str, bounded: bool = True) -> None:
    """`length` finite numbers, in [0, 1] if `bounded`."""
    if not isinstance(values, list | tuple) or len(values) != length:
        raise _BadRow(column, f"expected {length} numbers, {each}", values, "Add or drop the entries that differ.")
    low, high = (0.0, 1.0) if bounded else (-float("inf"), float("inf"))
    for i, value in enumerate(values):
        kind = type(value)
        if kind is not float and (not issubclass(kind, Real) or kind is bool):
            raise _BadRow(column, f"entry {i} is not a number", values, "Fill it in or drop the row.")
        if not low <= value <= high or value - value != 0:
            problem = f"entry {i} is not {'in [0, 1]' if bounded else 'finite'}"
            raise _BadRow(column, problem, values, "Rescale the numbers." if value - value == 0 else "Drop the row.")


def _check_counts(counts: Any, column: str, length: int, each: str, at_least: int = 0) -> None:
    if not isinstance(counts, list | tuple) or len(counts) != length:
        raise _BadRow(column, f"expected {length} counts, {each}", counts, "Add or drop the entries that differ.")
    for i, count in enumerate(counts):
        if not isinstance(count, Integral) or isinstance(count, bool) or count < at_least:
            raise _BadRow(
                column, f"entry {i} is not an integer of {at_least} or more", counts, "Count the samples again."
            )


def _check_rewards(rewards: Any, length: int, each: str) -> None:
    """True rewards of the candidates that end the solution, None for the others."""
    if not isinstance(rewards, list | tuple):
        raise _BadRow("rewards", "expected a list", rewards, "Give a reward or None per candidate.")
    _check_numbers([0.0 if reward is None else reward for reward in rewards], "rewards", length, each)


def _check_monte_carlo(row: Mapping[str, Any], length: int, each: str) -> None:
    successes: Any = row.get("mc_successes")
    rollouts: Any = row.get("mc_rollouts")
    for column, counts in (("mc_successes", successes), ("mc_rollouts", rollouts)):
        if counts is None:
            raise _BadRow(
                column, "missing, while its twin is given", counts, "Give both `mc_successes` and `mc_rollouts`."
            )
    _check_counts(rollouts, "mc_rollouts", length, each)
    if not any(rollouts):
        raise _BadRow("mc_rollouts", "no state has a rollout", rollouts, "Drop the row, or both columns of counts.")
    _check_numbers(successes, "mc_successes", length, each, bounded=False)  # a sum of rewards need not be whole
    for i, (won, tried) in enumerate(zip(successes, rollouts, strict=True)):
        if not 0 <= won <= tried:
            problem = f"entry {i}: {won} successes in {tried} rollouts"
            raise _BadRow("mc_successes", problem, successes, "Count the rollouts again.")


def _check_text(row: Mapping[str, Any], steps: list[str]) -> None:
    """The whole solution, where the row has it, must be the concatenation of its steps."""
    for column in ("completion", "text"):
        text = row.get(column)
        if isinstance(text, list) and len(text) == 1 and isinstance(text[0], Mapping):
            text = text[0].get("content")
        if text is not None and text != "".join(steps):
            cure = f'"".join(completions) must equal `{column}`: keep the separators in the steps, see `split_steps`.'
            raise _BadRow("completions", f"the steps do not concatenate to column `{column}`", steps, cure)


def _check_ids(row: Mapping[str, Any], column: str, length: int, with_column: str) -> None:
    """The sampler's token ids: a flat list for the prompt, one non-empty list for every step or candidate."""
    cure = f"One list of token ids per entry of `{column}`, see `split_step_ids`."
    ids = row.get(f"{column}_ids")
    if ids is not None:
        if not isinstance(ids, list | tuple) or len(ids) != length:
            raise _BadRow(f"{column}_ids", f"expected {length} lists of token ids", ids, cure)
        if any(not isinstance(step, list | tuple) or not step for step in ids):
            raise _BadRow(f"{column}_ids", "an entry is not a non-empty list", ids, cure)
        if row.get(with_column) is None:
            problem = f"given without `{with_column}`, which must come before them"
            raise _BadRow(f"{column}_ids", problem, ids, f"Add `{with_column}`, or drop the columns of ids.")
    prompt_ids = row.get("prompt_ids")
    if prompt_ids is not None and (not isinstance(prompt_ids, list | tuple) or not prompt_ids):
        raise _BadRow("prompt_ids", "expected a non-empty list of token ids", prompt_ids, "Fill it or drop the column.")
