"""
Running programs that nobody has read, and judging them by unit tests.

A program is code that a model wrote; its tests are a data set's. An [`Executor`] runs the one against the other and
tells what came out. Nothing is run before the user has said that it may be, see [`allow_execution`].
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dapo_trl.execution.unit_tests import UnitTests


__all__ = [
    "ExecutionNotAllowedError",
    "Executor",
    "Limits",
    "Outcome",
    "Program",
    "UnitTests",
    "allow_execution",
]

VARIABLE = "HF_ALLOW_CODE_EVAL"
_MIB = 2**20


class ExecutionNotAllowedError(RuntimeError):
    """Programs were to be run, and nobody has allowed it."""


def allow_execution(allowed: bool | None = None) -> None:
    """
    Make sure that the user has allowed running code that a model wrote.

    Args:
        allowed (`bool`, *optional*):
            What the user has said. `None` asks the environment variable `HF_ALLOW_CODE_EVAL`, which Hugging Face's
            metric `code_eval` asks too: `1` allows it.

    Raises:
        ExecutionNotAllowedError: If not.
    """
    if allowed is None:
        allowed = os.environ.get(VARIABLE) == "1"
    if not allowed:
        raise ExecutionNotAllowedError(
            "This would run code that a model wrote, which may do harm by accident or on purpose. Read docs/code.md on "
            f"what protects this machine, then pass `allow_execution=True` or set {VARIABLE}=1 to allow it."
        )


@dataclass(frozen=True)
class Limits:
    """
    What one run of a program may use. What uses more is ended, with all that it started, and counts as failed.

    Args:
        cpu (`float`, *optional*, defaults to `5.0`):
            Seconds of processor time, of all its processes together.
        wall (`float`, *optional*, defaults to `20.0`):
            Seconds by the clock. Well above `cpu`, so that a busy machine does not decide.
        memory (`int`, *optional*, defaults to 512 MiB):
            Bytes: address space of each process, resident memory of all together.
        processes (`int`, *optional*, defaults to `16`):
            Processes and threads at a time.
        file_size (`int`, *optional*, defaults to 16 MiB):
            Bytes of one file.
        disk (`int`, *optional*, defaults to 64 MiB):
            Bytes of all files together.
        output (`int`, *optional*, defaults to 1 MiB):
            Bytes printed.

    Raises:
        ValueError: If one is not positive.
    """

    cpu: float = 5.0
    wall: float = 20.0
    memory: int = 512 * _MIB
    processes: int = 16
    file_size: int = 16 * _MIB
    disk: int = 64 * _MIB
    output: int = 1 * _MIB

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"`{name}` of the limits must be above 0, got {value}.")


@dataclass(frozen=True)
class Program:
    """
    Code and the tests that judge it.

    Attributes:
        source (`str`):
            Python code.
        tests ([`UnitTests`]):
            Its tests.
    """

    source: str
    tests: UnitTests


@dataclass(frozen=True)
class Outcome:
    """
    What came of a program.

    Attributes:
        verdict (`str`):
            `"passed"` or `"failed"`; or what it used too much of: `"cpu"`, `"wall"`, `"memory"`, `"processes"`,
            `"disk"`, `"output"`. Not judged were those with `"bad_tests"`, whose tests do not work whatever the program
            does, and with `"setup"`, which could not be run.
        message (`str`):
            What failed first, in words.
        share (`float`):
            Share of the tests that passed, where the executor was asked to count; else 1 or 0.
    """

    verdict: str
    message: str = ""
    share: float = 0.0

    @classmethod
    def of_verdict(cls, found: Mapping[str, Any]) -> "Outcome":
        """From what the process of the tests has written, see `inside/tester.py`."""
        share = found["passed"] / found["total"] if found.get("total") else float(found["verdict"] == "passed")
        return cls(found["verdict"], found["message"], share)

    @property
    def is_judged(self) -> bool:
        """Whether the program is to blame, or to praise."""
        return self.verdict not in ("bad_tests", "setup")


class Executor(Protocol):
    """
    What runs programs: on this machine ([`LocalExecutor`]), or at a service ([`RemoteExecutor`]).
    """

    def run(self, programs: Sequence[Program], count_tests: bool = False) -> list[Outcome]:
        """
        Run programs against their tests.

        Args:
            programs (sequence of [`Program`], length N):
                What to run.
            count_tests (`bool`, *optional*, defaults to `False`):
                Whether to go on after a test that fails, and tell the share of those that pass.

        Returns:
            `list[Outcome]` of length N, in the order of the programs.
        """
        ...
