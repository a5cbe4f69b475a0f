"""
Unit tests of a programming problem, of three kinds, as one value that a column of a data set can hold.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from dapo_trl.execution import Outcome


@dataclass(frozen=True)
class UnitTests:
    """
    Tests of one problem. What is set says of which kind they are:

    - `test`: code that is run against the program: a function `check` that is called with the program's
      `entry_point`, as in HumanEval; or `assert` statements that call its functions by name, as in MBPP;
    - `cases`: arguments of `entry_point` and its result, as in the problems of TACO and APPS that have a `fn_name`;
    - `inputs` and `outputs`: what the program reads from standard input and what it prints, as in their others.

    Args:
        entry_point (`str`, *optional*, defaults to `""`):
            Name of the function that is asked for, if there is one.
        prompt (`str`, *optional*, defaults to `""`):
            Code that the problem begins with: imports, helpers, and the head of `entry_point`. A completion may go on
            from it; the tests see what it defines.
        test (`str`, *optional*, defaults to `""`):
            Code of the tests.
        check (`str`, *optional*, defaults to `""`):
            Function of `test` that takes the program's.
        cases (`list[list]`, *optional*):
            Pairs of a list of arguments and a result, as JSON has them: tuples are lists.
        inputs, outputs (`list[str]`, *optional*):
            Of a script.

    Raises:
        ValueError: If it is none of the kinds, or what belongs together does not.
    """

    entry_point: str = ""
    prompt: str = ""
    test: str = ""
    check: str = ""
    cases: list[Any] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        kinds = [name for name in ("test", "cases", "inputs") if getattr(self, name)]
        if len(kinds) != 1:
            raise ValueError(
                f"Unit tests need one of `test`, `cases` and `inputs`, got {kinds or 'none'}. An empty list tests "
                "nothing: leave such problems out."
            )
        if len(self.inputs) != len(self.outputs):
            raise ValueError(f"There are {len(self.inputs)} `inputs` but {len(self.outputs)} `outputs`.")
        if (self.cases or self.check) and not self.entry_point:
            raise ValueError("`entry_point` is missing: name the function that the tests call.")

    @property
    def is_script(self) -> bool:
        """Whether the program reads and prints, and is not called."""
        return bool(self.inputs)

    def to_json(self) -> str:
        """
        The tests as the text of a column, such as `answer`.

        Example:

        ```python
        >>> from dapo_trl.execution import UnitTests

        >>> UnitTests(entry_point="double", cases=[[[1], 2]]).to_json()
        '{"entry_point": "double", "cases": [[[1], 2]]}'

        ```
        """
        return json.dumps({name: value for name, value in asdict(self).items() if value})

    @classmethod
    def from_json(cls, text: str) -> "UnitTests":
        """
        Tests from the text that [`UnitTests.to_json`] gave.

        Raises:
            ValueError: If it is no such text.
        """
        try:
            entries = json.loads(text)
            return cls(**entries)
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{text!r:.80} are no unit tests: {error}. Write them with `UnitTests(...).to_json()`, or have rows of "
                "HumanEval, MBPP, TACO and APPS read by `UnitTests.from_row`."
            ) from error

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "UnitTests":
        """
        Tests of a row in the format of a well-known data set.

        Args:
            row (mapping):
                HumanEval: `prompt`, `test`, `entry_point`. MBPP: `test_list`, and `test_setup_code` or `test_imports`
                where there is one (`challenge_test_list` is not used). TACO and APPS: `input_output`, JSON with
                `inputs`, `outputs` and, for a function, `fn_name`; and `starter_code`.

        Returns:
            [`UnitTests`].

        Raises:
            ValueError: If the row is of none of these formats, or has no test.

        Example:

        ```python
        >>> from dapo_trl.execution import UnitTests

        >>> UnitTests.from_row({"test_list": ["assert double(1) == 2"], "test_setup_code": ""}).test
        'assert double(1) == 2'

        ```
        """
        if row.get("test") is not None and row.get("entry_point"):
            return cls(entry_point=row["entry_point"], prompt=row.get("prompt") or "", test=row["test"], check="check")
        if row.get("test_list") is not None:
            setup = [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]
            return cls(test="\n".join([*filter(None, setup), *row["test_list"]]))
        if row.get("input_output") is not None:
            return _from_input_output(row["input_output"], row.get("starter_code") or "")
        raise ValueError(
            f"A row with the columns {list(row)} is of no format that is known: HumanEval has `test` and "
            "`entry_point`, MBPP `test_list`, TACO and APPS `input_output`. Write `UnitTests(...).to_json()` into a "
            "column `answer`."
        )


def _from_input_output(given: Any, starter_code: str) -> UnitTests:
    """TACO's and APPS's tests: of a function if it has a name, else of a script."""
    tests = json.loads(given) if isinstance(given, str) else given
    inputs, outputs = tests["inputs"], tests["outputs"]
    if len(inputs) != len(outputs):
        raise ValueError(f"There are {len(inputs)} `inputs` but {len(outputs)} `outputs`.")
    if name := tests.get("fn_name"):
        return UnitTests(
            entry_point=name, prompt=starter_code, cases=[list(case) for case in zip(inputs, outputs, strict=True)]
        )
    return UnitTests(inputs=[_lines(each) for each in inputs], outputs=[_lines(each) for each in outputs])


def _lines(text: str | Sequence[Any]) -> str:
    """A text, which some rows have as a list of lines."""
    return text if isinstance(text, str) else "\n".join(map(str, text))


def job_of(tests: UnitTests, count_tests: bool) -> dict[str, Any]:
    """
    What the process of the tests reads, see `inside/tester.py`.

    Args:
        tests ([`UnitTests`]):
            Tests that call functions.
        count_tests (`bool`):
            Whether each counts by itself.

    Returns:
        `dict`.
    """
    job: dict[str, Any] = {"entry_point": tests.entry_point, "count": count_tests}
    if tests.cases:
        return job | {"cases": tests.cases}
    return job | {"setup": tests.prompt, "test": tests.test, "check": tests.check}


def script_outcome(tests: UnitTests, run: Callable[[str, str], "Outcome"], count_tests: bool) -> "Outcome":
    """
    What comes of a script: it is run for one input after the other, until one goes wrong or all are counted.

    Args:
        tests ([`UnitTests`]):
            Tests of a script.
        run (`Callable[[str, str], Outcome]`):
            Runs it for an input, and compares with the output.
        count_tests (`bool`):
            Whether each counts by itself.

    Returns:
        [`Outcome`].
    """
    outcomes = []
    for text, expected in zip(tests.inputs, tests.outputs, strict=True):
        outcomes.append(run(text, expected))
        is_over = outcomes[-1].verdict == "setup" or not count_tests
        if outcomes[-1].verdict != "passed" and is_over:
            break
    failed = [outcome for outcome in outcomes if outcome.verdict != "passed"]
    passed = len(outcomes) - len(failed)
    if not failed:
        return replace(outcomes[0], message="", share=1.0)
    first = failed[-1] if failed[-1].verdict == "setup" else failed[0]
    return replace(first, share=passed / len(tests.inputs) if count_tests else 0.0)


def same_output(printed: str, expected: str) -> bool:
    """
    Whether a program printed what it should: the same words on the same lines. White space at the ends of lines and of
    the text does not count; numbers are compared as numbers, exactly.

    Example:

    ```python
    >>> from dapo_trl.execution.unit_tests import same_output

    >>> same_output("1 2.50\\n", "1 2.5")
    True
    >>> same_output("1\\n2", "1 2")
    False

    ```
    """
    mine, other = (text.rstrip().split("\n") for text in (printed, expected))
    return len(mine) == len(other) and all(map(_same_line, mine, other))


def _same_line(printed: str, expected: str) -> bool:
    mine, other = printed.split(), expected.split()
    return len(mine) == len(other) and all(map(_same_word, mine, other))


def _same_word(printed: str, expected: str) -> bool:
    if printed == expected:
        return True
    try:
        return Decimal(printed) == Decimal(expected)
    except InvalidOperation:
        return False


def shown_answer(answer: str) -> str:
    """
    An answer as a person wants to see it: unit tests only by name.

    Args:
        answer (`str`):
            Cell of a column `answer`.

    Returns:
        `str`.

    Example:

    ```python
    >>> from dapo_trl.execution.unit_tests import shown_answer

    >>> shown_answer("72"), shown_answer('{"test": "assert double(1) == 2"}')
    ('72', 'unit tests')

    ```
    """
    try:
        UnitTests.from_json(answer)
    except ValueError:
        return answer
    return "unit tests"
