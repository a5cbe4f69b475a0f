"""
Step-labelled data sets of others, read as solution rows or state rows.

PRM800K, Math-Shepherd, ProcessBench and TRL's stepwise format label *steps* (is this step right?), while the row
formats hold *values* of states (how likely is a correct answer from here?). Taking one for the other is an
approximation: right steps may still lead to a wrong answer, and a wrong step can be repaired. It gives a critic
something to start from; values sampled from the policy that is going to be trained are better. K labels also say
nothing about the bare prompt: V(s_0) is `initial_value`, by default the mean last label of all rows, which is the best
constant guess.

The readers return `(dataset, counts)`. `counts` is a `Counter` with the entries `"read"`, `"kept"` and, for each
reason, `"dropped: <reason>"`, which add up: what is read is kept or dropped.
"""

import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset

from dapo_trl.formats import Rows, check_dataset


Source: TypeAlias = str | os.PathLike[str] | Rows

# Math-Shepherd's tag at the end of a step, an otherwise unused token of its tokenizer.
_SHEPHERD_TAG = "ки"
_FIRST_STEP = re.compile(r"[Ss]tep 1:")


class _Dropped(Exception):
    """A row that cannot be used, with the reason under which it is counted."""


def from_stepwise(dataset: Rows, initial_value: float | str | None = None, step_separator: str = "\n") -> Dataset:
    r"""
    TRL's stepwise rows (`prompt`, `completions`, `labels`) as solution rows.

    Args:
        dataset (`Dataset` or `list[dict]`):
            Stepwise rows. Labels are booleans or numbers in [0, 1]; soft labels stay as they are.
        initial_value (`float` or `str`, *optional*):
            V(s_0), the value of the bare prompt: a number, or the name of a column that holds it. `None` takes the mean
            of the last labels of all rows.
        step_separator (`str`, *optional*, defaults to `"\n"`):
            Text between the steps, which TRL keeps outside of them: appended to every step but the last. `""` if the
            steps are exact already.

    Returns:
        `Dataset`: Columns `prompt`, `completions` (K steps), `values` (K+1 numbers) and all others but `labels`.

    Raises:
        ValueError: if a row is bad (see [`check_dataset`]) or `initial_value` is no column and not in [0, 1].

    Example:

    ```python
    >>> from dapo_trl.readers import from_stepwise

    >>> row = {"prompt": "2+2*3?", "completions": ["2*3=6", "so 8"], "labels": [0.75, True]}
    >>> from_stepwise([row], initial_value=0.5)[0]
    {'prompt': '2+2*3?', 'completions': ['2*3=6\n', 'so 8'], 'values': [0.5, 0.75, 1.0]}

    ```
    """
    check_dataset(dataset, "stepwise")
    rows = [dict(row) for row in _plain(dataset)]
    for row in rows:
        steps, labels = row["completions"], row.pop("labels")
        row["completions"] = [*(step + step_separator for step in steps[:-1]), steps[-1]]
        row["values"] = [float(label) for label in labels]
    return Dataset.from_list(_with_initial_value(rows, initial_value))


def to_stepwise(dataset: Rows, threshold: float | None = None, step_separator: str = "\n") -> Dataset:
    r"""
    Solution rows as TRL's stepwise rows; the inverse of [`from_stepwise`], V(s_0) is lost.

    Args:
        dataset (`Dataset` or `list[dict]`):
            Solution rows.
        threshold (`float`, *optional*):
            Labels are `value >= threshold` (booleans). By default they are the values themselves (soft labels).
        step_separator (`str`, *optional*, defaults to `"\n"`):
            Text that the reader of the rows will put between the steps: taken off the end of every step but the last.
            `""` leaves the steps as they are.

    Returns:
        `Dataset`: Columns `prompt`, `completions`, `labels` (K each) and all others but `values` and the counts.

    Raises:
        ValueError: if a row is bad (see [`check_dataset`]) or a step does not end with `step_separator`.

    Example:

    ```python
    >>> from dapo_trl.readers import to_stepwise

    >>> row = {"prompt": "2+2*3?", "completions": ["2*3=6\n", "so 8"], "values": [0.5, 0.75, 1.0]}
    >>> to_stepwise([row])[0]
    {'prompt': '2+2*3?', 'completions': ['2*3=6', 'so 8'], 'labels': [0.75, 1.0]}

    ```
    """
    check_dataset(dataset, "solution")
    rows = [dict(row) for row in _plain(dataset)]
    for index, row in enumerate(rows):
        steps, values = row["completions"], row.pop("values")[1:]
        for step in steps[:-1]:
            if not step.endswith(step_separator):
                raise ValueError(
                    f"Row {index}, column `completions`: the step {step!r:.80} does not end with `step_separator` "
                    f'{step_separator!r}. Name the separator of this data set, or "" to leave the steps as they are'
                )
        row["completions"] = [*(step.removesuffix(step_separator) for step in steps[:-1]), steps[-1]]
        row["labels"] = values if threshold is None else [value >= threshold for value in values]
        row.pop("mc_successes", None)
        row.pop("mc_rollouts", None)
    return Dataset.from_list(rows)


def read_prm800k(
    source: Source,
    rows: str = "solution",
    neutral: float = 1.0,
    initial_value: float | None = None,
    step_separator: str = "\n",
) -> tuple[Dataset, Counter[str]]:
    r"""
    PRM800K (Lightman et al., 2023), human ratings of the steps of solutions to MATH problems.

    Ratings become values as +1 -> 1, 0 -> `neutral`, -1 -> 0; a step written by a labeler counts as +1. A solution row
    follows the steps that the labelers chose. Where labelling stopped at the first error (`"found_error"`, phase 2),
    the first step rated -1 ends the row with value 0: such a row is the beginning of a solution. Solutions which
    labelers gave up on (`"give_up"`, `"bad_problem"`) are dropped. A state row holds the rated alternatives of one
    step, of any solution; alternatives with the same text are one candidate, their values averaged.

    Args:
        source (`str`, `os.PathLike`, `Dataset` or `list[dict]`):
            Path of a `.jsonl` (or `.jsonl.gz`) file, or its rows.
        rows (`str`, *optional*, defaults to `"solution"`):
            `"solution"` or `"state"`.
        neutral (`float`, *optional*, defaults to `1.0`):
            Value of rating 0, "not wrong, but no progress". The default, neutral as positive, is the authors' choice.
        initial_value (`float`, *optional*):
            V(s_0) of solution rows; `None` takes the mean last value.
        step_separator (`str`, *optional*, defaults to `"\n"`):
            Appended to every step which does not end a solution (its text has no `# Answer`).

    Returns:
        `tuple[Dataset, Counter]`: Solution rows (`prompt`, `completions`, `values`, `finish_reason`, `answer`) or state
        rows (`prompt`, `prefix`, `candidates`, `values`, `counts`, `answer`), and counts of solutions, or of steps.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not PRM800K, or no row could be kept.
    """
    if rows not in ("solution", "state"):
        raise ValueError(f'`rows` must be "solution" or "state", got {rows!r}')
    if not 0 <= neutral <= 1:
        raise ValueError(f"`neutral` is a value and must be in [0, 1], got {neutral}")
    values = {1: 1.0, 0: float(neutral), -1: 0.0}
    read = _prm800k_solution if rows == "solution" else _prm800k_states
    kept: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for line in _records(source, ("question", "label")):
        steps = [_prm800k_step(step, values, step_separator) for step in line["label"]["steps"]]
        shared = {"prompt": line["question"]["problem"]}
        lineage = {"answer": line["question"].get("ground_truth_answer")}
        for row in read(steps, line["label"]["finish_reason"], counts):
            kept.append({**shared, **row, **lineage})
    return _finish(kept, counts, source, initial_value if rows == "solution" else False)


def read_math_shepherd(source: Source, initial_value: float | None = None) -> tuple[Dataset, Counter[str]]:
    r"""
    Math-Shepherd (Wang et al., 2024), solutions to GSM8K and MATH problems with sampled step labels.

    `input` is the question and the solution with the tag " ки" after each step, `label` the same with + or - in place
    of the tag. A step is + when at least one completion sampled after it was correct: the label says that the value is
    not 0, so values are biased upwards. The tags are taken out; the newline after a tag ends its step.

    Args:
        source (`str`, `os.PathLike`, `Dataset` or `list[dict]`):
            Path of a `.jsonl` (or `.jsonl.gz`) file, or its rows, such as the data set on the Hub.
        initial_value (`float`, *optional*):
            V(s_0); `None` takes the mean last value.

    Returns:
        `tuple[Dataset, Counter]`: Solution rows (`prompt`, `completions`, `values`, `task`) and the counts. Rows are
        dropped when the tags of `input` and `label` do not match or the first step cannot be told from the question.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not Math-Shepherd, or no row could be kept.

    Example:

    ```python
    >>> from dapo_trl.readers import read_math_shepherd

    >>> text = "2+2*3? Step 1: 2*3=5. {}\nStep 2: The answer is: 7 {}"
    >>> row = {"input": text.format("ки", "ки"), "label": text.format("+", "-"), "task": "GSM8K"}
    >>> dataset, counts = read_math_shepherd([row])
    >>> dataset[0]["completions"], dataset[0]["values"]
    (['Step 1: 2*3=5.\n', 'Step 2: The answer is: 7'], [0.0, 1.0, 0.0])

    ```
    """
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for record in _records(source, ("input", "label")):
        counts["read"] += 1
        try:
            rows.append({**_shepherd_row(record["input"], record["label"]), "task": record.get("task")})
        except _Dropped as reason:
            counts[f"dropped: {reason}"] += 1
    return _finish(rows, counts, source, initial_value)


def read_processbench(
    source: Source, initial_value: float | None = None, step_separator: str = "\n\n"
) -> tuple[Dataset, Counter[str]]:
    r"""
    ProcessBench (Zheng et al., 2024), solutions with the index of their first wrong step.

    Values are 1 before the first wrong step (`label`, -1 if there is none) and 0 from it on, except that the last one
    is the outcome, `final_answer_correct`.

    Args:
        source (`str`, `os.PathLike`, `Dataset` or `list[dict]`):
            Path of a `.jsonl` (or `.jsonl.gz`) file, or its rows, such as one split of the data set on the Hub.
        initial_value (`float`, *optional*):
            V(s_0); `None` takes the mean outcome.
        step_separator (`str`, *optional*, defaults to `"\n\n"`):
            Appended to every step but the last.

    Returns:
        `tuple[Dataset, Counter]`: Solution rows (`prompt`, `completions`, `values`, `first_error`, `problem_id`,
        `generator`) and the counts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not ProcessBench, a label names no step, or no row could be kept.
    """
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for record in _records(source, ("problem", "steps", "final_answer_correct", "label")):
        counts["read"] += 1
        steps, error = record["steps"], record["label"]
        if not steps or "" in steps:
            counts["dropped: empty step"] += 1
            continue
        if not -1 <= error < len(steps):
            raise ValueError(
                f"Row {counts['read'] - 1}: `label` is {error}, but the solution has {len(steps)} steps: expected -1 "
                f"(all right) to {len(steps) - 1}."
            )
        values = [float(error < 0 or step < error) for step in range(len(steps) - 1)]
        rows.append(
            {
                "prompt": record["problem"],
                "completions": [*(step + step_separator for step in steps[:-1]), steps[-1]],
                "values": [*values, float(record["final_answer_correct"])],
                "first_error": error,
                "problem_id": record.get("id"),
                "generator": record.get("generator"),
            }
        )
    return _finish(rows, counts, source, initial_value)


def _prm800k_step(step: Mapping[str, Any], values: Mapping[int, float], separator: str) -> dict[str, Any]:
    """One labelled step: its alternatives as (text, value), and the one that was chosen, which may be the labeler's."""

    def read(completion: Mapping[str, Any], default: int | None = None) -> tuple[str, float | None]:
        text, rating = completion["text"], completion.get("rating")
        rating = default if rating is None else rating
        value = None if rating is None else values.get(rating)
        return text if "# Answer" in text or not text else text + separator, value

    completions = [read(completion) for completion in step["completions"] or []]
    chosen, human = step["chosen_completion"], step["human_completion"]
    if chosen is not None:
        return {"completions": completions, "chosen": completions[chosen]}
    return {"completions": completions, "chosen": read(human, default=1) if human else None}


def _prm800k_solution(steps: list[dict], finish_reason: str, counts: Counter) -> Iterator[dict[str, Any]]:
    """The chosen path of one labelled solution, if it is complete or ends with the first error."""
    counts["read"] += 1
    path = [step["chosen"] for step in steps]
    if path and path[-1] is None and finish_reason == "found_error":
        path[-1] = next((alternative for alternative in steps[-1]["completions"] if alternative[1] == 0.0), None)
    reasons = {
        finish_reason: finish_reason not in ("solution", "found_error"),
        "no steps": not path,
        "no chosen step": None in path,
        "empty step": any(step is not None and not step[0] for step in path),
        "unrated step": any(step is not None and step[1] is None for step in path),
    }
    reason = next((reason for reason, found in reasons.items() if found), None)
    if reason is not None:
        counts[f"dropped: {reason}"] += 1
        return
    text = [step for step, _ in path]
    yield {"completions": text, "values": [value for _, value in path], "finish_reason": finish_reason}


def _prm800k_states(steps: list[dict], finish_reason: str, counts: Counter) -> Iterator[dict[str, Any]]:
    """The states of one labelled solution: the rated alternatives at each step of the chosen path."""
    prefix: list[str] = []
    for position, step in enumerate(steps):
        counts["read"] += 1
        rated: dict[str, list[float]] = {}
        for text, value in step["completions"]:
            if text and value is not None:
                rated.setdefault(text, []).append(value)
        if len(rated) > 1:
            values = [sum(group) / len(group) for group in rated.values()]
            sizes = [len(group) for group in rated.values()]
            yield {"prefix": list(prefix), "candidates": list(rated), "values": values, "counts": sizes}
        else:
            counts["dropped: fewer than two rated candidates"] += 1
        if step["chosen"] is None or not step["chosen"][0]:
            remaining = len(steps) - position - 1
            counts.update({"read": remaining, "dropped: no chosen step before it": remaining} if remaining else {})
            return
        prefix.append(step["chosen"][0])


def _shepherd_row(text: str, label: str) -> dict[str, Any]:
    """Prompt, steps and values of one tagged solution."""
    pieces = text.split(_SHEPHERD_TAG)
    signs, position = [], 0
    for piece in pieces[:-1]:
        position += len(piece)
        signs.append(label[position : position + 1])
        position += 1
    untagged = "".join(piece + sign for piece, sign in zip(pieces, [*signs, ""], strict=True))
    if untagged != label or not set(signs) <= {"+", "-"} or not signs or pieces[-1].strip():
        raise _Dropped("tags do not match")
    prompt, first = _split_question(pieces[0])
    steps = [first, *pieces[1:-1]]
    # a tag stands after a space, and the newline behind it ends its step
    ends = [piece[: len(piece) - len(piece.lstrip())] for piece in steps[1:]]
    steps = [step.lstrip().removesuffix(" ") + end for step, end in zip(steps, [*ends, ""], strict=True)]
    if not all(step.strip() for step in steps):
        raise _Dropped("empty step")
    return {"prompt": prompt, "completions": steps, "values": [float(sign == "+") for sign in signs]}


def _split_question(text: str) -> tuple[str, str]:
    """Question and first step, told apart by "Step 1:", or else by the only question mark."""
    match = _FIRST_STEP.search(text)
    if match:
        prompt, first = text[: match.start()], text[match.start() :]
    elif text.count("?") == 1:
        prompt, first = text[: text.index("?") + 1], text[text.index("?") + 1 :]
    else:
        raise _Dropped("first step not found")
    if not prompt.strip() or not first.strip():
        raise _Dropped("first step not found")
    return prompt.strip(), first


def _records(source: Source, required: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    """Rows of a file or data set, each with the required fields."""
    rows = _lines(Path(source)) if isinstance(source, str | os.PathLike) else _plain(source)
    for index, row in enumerate(rows):
        missing = [field for field in required if field not in row]
        if missing:
            raise ValueError(
                f"Row {index} lacks `{missing[0]}` and has {', '.join(row) or 'nothing'}: this reader expects the data "
                "set as its authors published it"
            )
        yield row


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """Objects of a JSON-lines file, which may be compressed."""
    if not path.is_file():
        raise FileNotFoundError(f"`source` {str(path)!r} is not a file: pass the path of a .jsonl file, or its rows")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.startswith("version https://git-lfs"):
                raise ValueError(f"`source` {str(path)!r} is a Git LFS pointer: run `git lfs pull` to get the data")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"`source` {str(path)!r}, line {number} is not JSON ({error}): {line!r:.80}") from None
            if not isinstance(record, dict):
                raise ValueError(f"`source` {str(path)!r}, line {number} is not a JSON object: {line!r:.80}")
            yield record


def _plain(dataset: Rows) -> Iterable[Mapping[str, Any]]:
    """Rows as Python objects, whatever format is set on the data set."""
    return dataset.with_format(None) if isinstance(dataset, Dataset) else dataset


def _finish(
    rows: list[dict[str, Any]], counts: Counter[str], source: Source, initial_value: float | str | bool | None
) -> tuple[Dataset, Counter[str]]:
    """Data set and counts of a reader; `initial_value=False` for rows without V(s_0)."""
    counts["kept"] = len(rows)
    if not rows:
        name = repr(str(source)) if isinstance(source, str | os.PathLike) else type(source).__name__
        raise ValueError(f"`source` {name} has no row that could be kept: {dict(counts)}")
    return Dataset.from_list(rows if initial_value is False else _with_initial_value(rows, initial_value)), counts


def _with_initial_value(rows: list[dict[str, Any]], initial_value: float | str | None) -> list[dict[str, Any]]:
    """Put V(s_0) before the K values of every row."""
    if isinstance(initial_value, str):
        if initial_value not in rows[0]:
            raise ValueError(f"`initial_value` {initial_value!r} is not a column: {', '.join(rows[0])}")
        starts = [row[initial_value] for row in rows]
    else:
        mean = sum(row["values"][-1] for row in rows) / len(rows)
        starts = [mean if initial_value is None else initial_value] * len(rows)
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        if not isinstance(start, int | float) or not 0 <= start <= 1:
            raise ValueError(f"`initial_value` of row {index} must be a number in [0, 1], got {start!r}")
        row["values"] = [float(start), *row["values"]]
    return rows
