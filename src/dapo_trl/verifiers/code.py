"""
Rewards for programs: 1 if the unit tests of the problem pass, 0 if not, None if nobody knows.

The program is found in the completion (`_code_extraction.py`) and run by an executor (`dapo_trl.execution`). Nothing is
run before that was allowed.
"""

import hashlib
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any

from dapo_trl.execution import Executor, Limits, Outcome, Program, UnitTests
from dapo_trl.execution.local import LocalExecutor
from dapo_trl.verifiers._code_extraction import extract_code
from dapo_trl.verifiers._texts import completion_text, refuse_other_length


__all__ = ["CodeVerifier", "check_tests", "code_reward", "default_code_verifier", "extract_code"]

logger = logging.getLogger(__name__)

_NUM_REMEMBERED = 100_000  # programs whose outcome is kept
_NOT_JUDGED = {
    "bad_tests": "the tests do not work, whatever the program does; correct them or drop the row",
    "setup": "the program could not be run; see the message, and the executor's `protections`",
}
_NO_CODE = Outcome("no_code", "there is no code in the completion")
_TEST_COLUMNS = ("test", "entry_point", "test_list", "test_setup_code", "test_imports", "input_output", "starter_code")


class CodeVerifier:
    r"""
    Runs programs against unit tests, as a reward function.

    The tests of a problem stand in a column `answer`, as [`~dapo_trl.execution.UnitTests.to_json`] writes them; or in
    the columns of HumanEval, MBPP, TACO and APPS, see [`~dapo_trl.execution.UnitTests.from_row`]. A program that was
    run once is not run again: policies write the same over and over.

    Args:
        executor ([`~dapo_trl.execution.Executor`], *optional*):
            What runs programs. `None` takes a [`~dapo_trl.execution.local.LocalExecutor`], made when it is needed.
        allow_execution (`bool`, *optional*):
            Whether that one may run programs. `None` asks the environment variable `HF_ALLOW_CODE_EVAL`.
        is_fractional (`bool`, *optional*, defaults to `False`):
            Whether the reward is the share of tests that pass: of `assert` statements, cases or inputs. They count
            alike, and those after a program's end count as failed.

    Attributes:
        counts (`collections.Counter`):
            Completions so far by outcome: `"passed"`, `"failed"`, `"no_code"`, and what programs used too much of
            (`"cpu"`, `"wall"`, `"memory"`, `"processes"`, `"disk"`, `"output"`) were judged; `"bad_tests"` and
            `"setup"` were not.

    Example:

    ```python
    >>> from dapo_trl.execution import UnitTests
    >>> from dapo_trl.verifiers import CodeVerifier

    >>> verifier = CodeVerifier(allow_execution=True)
    >>> tests = UnitTests(entry_point="double", test="assert double(2) == 4\nassert double(5) == 10").to_json()
    >>> completions = ["def double(x):\n    return 2 * x", "def double(x):\n    return x + 2", "I do not know."]
    >>> verifier(None, completions, answer=[tests] * 3)
    [1.0, 0.0, 0.0]
    >>> verifier.counts["no_code"]
    1

    ```
    """

    def __init__(
        self, executor: Executor | None = None, allow_execution: bool | None = None, is_fractional: bool = False
    ) -> None:
        self.__name__ = "code_reward"  # under which TRL logs it
        self.counts: Counter[str] = Counter()
        self.is_fractional = is_fractional
        self._executor = executor
        self._allowed = allow_execution
        self._known: OrderedDict[bytes, Outcome] = OrderedDict()
        self._warned: set[str] = set()
        self._lock = Lock()

    @property
    def executor(self) -> Executor:
        """
        What runs the programs.

        Raises:
            ExecutionNotAllowedError: If it is made now, and nobody has allowed it.
        """
        with self._lock:
            if self._executor is None:
                self._executor = LocalExecutor(self._allowed)
            return self._executor

    def __call__(
        self,
        prompts: Sequence[Any] | None,
        completions: Sequence[Any],
        answer: Sequence[Any] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Rewards of completions; see [`code_reward`].
        """
        texts = [completion_text(row, completion) for row, completion in enumerate(completions)]
        tests = _tests_of(prompts, answer, columns, len(texts))
        codes = [extract_code(text, each) for text, each in zip(texts, tests, strict=True)]
        outcomes = self._judge(codes, tests)
        self._report(outcomes, texts)
        if log_extra is not None:
            log_extra("outcome", [outcome.verdict for outcome in outcomes])
            log_extra("message", [outcome.message for outcome in outcomes])
        return [self._reward(outcome) for outcome in outcomes]

    def _reward(self, outcome: Outcome) -> float | None:
        if not outcome.is_judged:
            return None
        return outcome.share if self.is_fractional else float(outcome.verdict == "passed")

    def _judge(self, codes: Sequence[str | None], tests: Sequence[UnitTests]) -> list[Outcome]:
        """Outcomes of programs: each distinct one is run once."""
        keys = [_key(code, each) for code, each in zip(codes, tests, strict=True)]
        programs = {
            key: Program(code, each) for key, code, each in zip(keys, codes, tests, strict=True) if code is not None
        }
        with self._lock:
            found = {key: self._known[key] for key in programs if key in self._known}
        left = {key: program for key, program in programs.items() if key not in found}
        if left:
            outcomes = self.executor.run(list(left.values()), self.is_fractional)
            found |= dict(zip(left, outcomes, strict=True))
        self._remember({key: found[key] for key in left if found[key].verdict != "setup"})
        return [found.get(key, _NO_CODE) for key in keys]

    def _remember(self, outcomes: dict[bytes, Outcome]) -> None:
        with self._lock:
            self._known.update(outcomes)
            while len(self._known) > _NUM_REMEMBERED:
                self._known.popitem(last=False)

    def _report(self, outcomes: Sequence[Outcome], texts: Sequence[str]) -> None:
        """Count all; warn of the first of each kind that was not judged."""
        verdicts = [outcome.verdict for outcome in outcomes]
        with self._lock:
            self.counts.update(verdicts)
            new = [kind for kind in dict.fromkeys(verdicts) if kind in _NOT_JUDGED and kind not in self._warned]
            self._warned.update(new)
        for kind in new:
            row = verdicts.index(kind)
            logger.warning(
                "code_reward returns None for %d of %d completions, the first at index %d (%.200r): %s. It says: %s. "
                "Said once; the verifier's `counts` has totals.",
                verdicts.count(kind), len(verdicts), row, texts[row], _NOT_JUDGED[kind], outcomes[row].message,
            )  # fmt: skip

    def __reduce__(self) -> tuple[type["CodeVerifier"], tuple[Executor | None, bool | None, bool]]:
        return type(self), (self._executor, self._allowed, self.is_fractional)  # TRL may send it to a process


def _key(code: str | None, tests: UnitTests) -> bytes:
    """A short name of a program and its tests."""
    return hashlib.blake2b(f"{code}\0{tests.to_json()}".encode(errors="surrogatepass"), digest_size=16).digest()


def _tests_of(prompts: Any, answer: Any, columns: dict[str, Any], number: int) -> list[UnitTests]:
    """Tests of each row."""
    if answer is not None:
        refuse_other_length(answer, number, "the tests of each completion")
        return [_read_tests(row, text) for row, text in enumerate(answer)]
    known: dict[str, Any] = {name: columns[name] for name in _TEST_COLUMNS if columns.get(name) is not None}
    if prompts is not None:
        known["prompt"] = [prompt if isinstance(prompt, str) else "" for prompt in prompts]
    rows = [{name: values[row] for name, values in known.items()} for row in range(number)]
    found = []
    for row, each in enumerate(rows):
        try:
            found.append(UnitTests.from_row(each))
        except (ValueError, KeyError) as error:
            raise ValueError(f"Row {row}: {error}") from error
    return found


def _read_tests(row: int, text: Any) -> UnitTests:
    if not isinstance(text, str):
        raise TypeError(f"`answer[{row}]` is a {type(text).__name__}; pass what `UnitTests(...).to_json()` gives")
    try:
        return _from_json(text)
    except ValueError as error:
        raise ValueError(f"`answer[{row}]`: {error}") from error


_from_json = lru_cache(4096)(UnitTests.from_json)


def make_executor(
    num_processes: int = 1,
    isolation: str = "auto",
    num_workers: int | None = None,
    python: str | None = None,
    url: str | None = None,
    **limits: Any,
) -> Executor:
    """
    An executor from plain settings, such as those of a recipe. That programs may be run is taken for granted.

    Args:
        num_processes (`int`, *optional*, defaults to `1`):
            Processes on this machine that each have one: they share its cores.
        isolation (`str`, *optional*, defaults to `"auto"`):
            As of a [`~dapo_trl.execution.local.LocalExecutor`].
        num_workers (`int`, *optional*):
            The same.
        python (`str`, *optional*):
            The same.
        url (`str`, *optional*):
            Service that runs the programs instead, see [`~dapo_trl.execution.remote.RemoteExecutor`].
        **limits:
            Of [`~dapo_trl.execution.Limits`].

    Returns:
        [`~dapo_trl.execution.Executor`].

    Raises:
        ValueError, RuntimeError: as those classes.
    """
    if url is not None:
        from dapo_trl.execution.remote import RemoteExecutor

        return RemoteExecutor(url, Limits(**limits), num_workers or 16)
    share = max(1, (os.cpu_count() or 1) // num_processes)
    return LocalExecutor(True, Limits(**limits), isolation, num_workers or share, python)


default_code_verifier = CodeVerifier()
"""The verifier behind [`code_reward`]: for its `counts`."""


def code_reward(
    prompts: Sequence[Any] | None, completions: Sequence[Any], answer: Sequence[Any] | None = None, **kwargs: Any
) -> list[float | None]:
    r"""
    Reward of a programming problem: whether the program in each completion passes its unit tests.

    A function of [`default_code_verifier`]; for another executor or shares of tests, use a [`CodeVerifier`] in its
    place. It runs code that a model wrote, and so raises an error until the environment variable `HF_ALLOW_CODE_EVAL`
    is 1: see docs/code.md.

    Args:
        prompts (`list`):
            Prompts. Where they are text and there is no `answer`, the code that the problems begin with.
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Texts or messages. Of messages, the last one is read.
        answer (`list[str]`, *optional*):
            Tests as [`~dapo_trl.execution.UnitTests.to_json`] writes them, a column of the data set. Without it, the
            columns of HumanEval, MBPP, TACO or APPS are read.
        **kwargs:
            What TRL passes besides: other columns, and `log_extra` for columns `outcome` and `message`.

    Returns:
        `list[float | None]`:
            1.0 if all tests pass; 0.0 if not, also where there is no code; `None` where this cannot be judged, because
            the tests do not work or the program could not be run.

    Raises:
        ExecutionNotAllowedError: If nobody has allowed it.
        ValueError: If the tests of a row are missing or cannot be read; the message names it.
        TypeError: If a completion is neither text nor messages.
    """
    return default_code_verifier(prompts, completions, answer, **kwargs)


def check_tests(answers: Iterable[Any]) -> None:
    """
    Make sure that all tests can be read, before hours of sampling. Nothing is run.

    Args:
        answers (`Iterable[str]`):
            Tests, as for [`code_reward`].

    Raises:
        ValueError: If some cannot be read, or are no Python; it names the first such row and the cure.
        TypeError: If some are not text.
    """
    for row, text in enumerate(answers):
        tests = _read_tests(row, text)
        try:
            compile(tests.test, "tests", "exec")
        except (SyntaxError, ValueError) as error:
            raise ValueError(
                f"`answer[{row}]`: the tests are no Python: {error}. Correct them or drop the row."
            ) from error
