"""
Programs in sandboxes on this machine.

Each program gets processes of its own, which end with it: a monitor (`inside/monitor.py`) that stays outside, and
inside of the sandbox the program. They are forks of one process that has loaded what they need (`inside/server.py`).
Tests that call functions are in a second sandbox with a second monitor; they and the program have a socket between them
and nothing else, so that the program neither sees the tests nor writes the verdict.
"""

import logging
import os
import socket
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from dapo_trl.execution import Limits, Outcome, Program
from dapo_trl.execution import allow_execution as refuse_unless_allowed
from dapo_trl.execution.isolation import BARE, KINDS, Isolation
from dapo_trl.execution.monitor_server import MonitorServer
from dapo_trl.execution.sandboxed_process import GRACE, SandboxedProcess, watch
from dapo_trl.execution.unit_tests import UnitTests, job_of, same_output, script_outcome


logger = logging.getLogger(__name__)


class LocalExecutor:
    """
    Runs programs on this machine, each in a sandbox of its own.

    What the sandbox protects from depends on the machine, and [`LocalExecutor.protections`] says it; docs/code.md
    explains it. Programs get an empty folder, an empty environment, and no network.

    Args:
        allow_execution (`bool`, *optional*):
            Whether programs may be run at all. `None` asks the environment variable `HF_ALLOW_CODE_EVAL`.
        limits ([`Limits`], *optional*):
            What each run may use. `None` takes the defaults.
        isolation (`str`, *optional*, defaults to `"auto"`):
            `"bubblewrap"` (the program `bwrap`), `"namespaces"` (those of Linux, without it), `"process"` (neither:
            limits only), or `"auto"`: the first of these that works here. With one of the first two nothing is run
            where it does not work.
        num_workers (`int`, *optional*):
            Programs at a time. `None` takes the number of CPU cores.
        python (`str`, *optional*):
            Interpreter of the programs, 3.11 or newer, with the packages that it has. `None` takes this one, without
            packages: programs get the standard library.

    Raises:
        ExecutionNotAllowedError: If nobody has allowed it.
        ValueError: If an argument is out of range.
        RuntimeError: If the isolation does not work here; the message says what is missing.

    Example:

    ```python
    >>> from dapo_trl.execution import Program, UnitTests
    >>> from dapo_trl.execution.local import LocalExecutor

    >>> executor = LocalExecutor(allow_execution=True)
    >>> tests = UnitTests(entry_point="double", test="assert double(2) == 4")
    >>> right, wrong = (Program(f"def double(x): return {body}", tests) for body in ("2 * x", "x"))
    >>> [outcome.verdict for outcome in executor.run([right, wrong])]
    ['passed', 'failed']

    ```
    """

    def __init__(
        self,
        allow_execution: bool | None = None,
        limits: Limits | None = None,
        isolation: str = "auto",
        num_workers: int | None = None,
        python: str | None = None,
    ) -> None:
        refuse_unless_allowed(allow_execution)
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"`num_workers` must be at least 1, or None for a default, got {num_workers}.")
        if isolation not in ("auto", *KINDS):
            raise ValueError(f"`isolation` must be 'auto' or one of {', '.join(map(repr, KINDS))}, got {isolation!r}.")
        self.limits = limits or Limits()
        self.num_workers = num_workers or os.cpu_count() or 1
        # Of tests that are arguments and results: data, no code of others in the process that compares them.
        self._bare = Isolation(BARE)
        self._isolation: Isolation
        self._server: MonitorServer
        self._choose(isolation, python)
        weakref.finalize(self, self._server.close)

    def _choose(self, name: str, python: str | None) -> None:
        """Take the isolation that was asked for, or the best one that works."""
        reasons: list[str] = []
        for kind in KINDS if name == "auto" else (name,):
            isolation = Isolation(kind, python)
            reason = isolation.missing() or self._reason_against(isolation)
            if reason is None:
                if reasons:
                    logger.warning(
                        "Programs run with isolation %r: %s. %s", kind, isolation.in_words(), " ".join(reasons)
                    )
                return
            reasons.append(f"{kind}: {reason}.")
        raise RuntimeError(
            f"`isolation` {name!r} does not work here: {' '.join(reasons)} Install bubblewrap, or allow user "
            "namespaces; `isolation='process'` has limits only, see docs/code.md."
        )

    def _reason_against(self, isolation: Isolation) -> str | None:
        """Take an isolation, and say why it cannot be used, found out by using it."""
        self._isolation, self._server = isolation, MonitorServer(isolation.command)
        tests = UnitTests(inputs=[""], outputs=["ok"])
        outcome = self._run_one(Program("import random, json\nprint('ok')", tests), False)
        if outcome.verdict == "passed":
            return None
        self._server.close()
        return f"{outcome.verdict} ({outcome.message})"

    @property
    def isolation(self) -> str:
        """The kind of sandbox that is used: `"bubblewrap"`, `"namespaces"` or `"process"`."""
        return self._isolation.kind

    @property
    def protections(self) -> dict[str, bool]:
        """What programs are kept from here, and what not."""
        return self._isolation.protections()

    def close(self) -> None:
        """End the process that starts programs. It starts again when it is needed; at exit this happens by itself."""
        self._server.close()

    def run(self, programs: Sequence[Program], count_tests: bool = False) -> list[Outcome]:
        """
        Run programs against their tests, several at a time.

        Args:
            programs (sequence of [`Program`], length N):
                What to run.
            count_tests (`bool`, *optional*, defaults to `False`):
                Whether to go on after a test that fails, and tell the share of those that pass.

        Returns:
            `list[Outcome]` of length N, in the order of the programs.
        """
        if not programs:
            return []
        threads = ThreadPoolExecutor(min(self.num_workers, len(programs)), thread_name_prefix="executor")
        stop = threading.Event()
        try:
            return list(threads.map(lambda program: self._run_one(program, count_tests, stop), programs))
        except BaseException:  # an interrupt must not wait for the programs that are left
            stop.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            threads.shutdown()

    def _run_one(self, program: Program, count_tests: bool, stop: threading.Event | None = None) -> Outcome:
        stop = stop or threading.Event()
        try:
            if program.tests.is_script:
                return self._run_script(program, count_tests, stop)
            return self._run_functions(program, count_tests, stop)
        except Exception as error:  # no processes, descriptors or memory left for one more
            return Outcome("setup", f"{type(error).__name__}: {error}")

    def _start(
        self, stack: ExitStack, role: str, job: dict[str, Any], isolation: Isolation, **given: Any
    ) -> SandboxedProcess:
        return SandboxedProcess(self._server, isolation, self.limits, stack, role, job, **given)

    def _run_script(self, program: Program, count_tests: bool, stop: threading.Event) -> Outcome:
        """Once for each input."""

        def run_once(text: str, expected: str) -> Outcome:
            with ExitStack() as stack:
                job = {"source": program.source, "stdin": text}
                run = self._start(stack, "program", job, self._isolation, keeps_output=True)
                watch([run], self.limits.wall + GRACE, stop)
            is_right = run.code == 0 and same_output(run.printed, expected)
            return run.outcome() or Outcome("passed" if is_right else "failed", run.why())

        return script_outcome(program.tests, run_once, count_tests)

    def _run_functions(self, program: Program, count_tests: bool, stop: threading.Event) -> Outcome:
        """The program in one sandbox, the tests in another."""
        with ExitStack() as stack:
            ends = [stack.enter_context(end) for end in socket.socketpair()]
            run = self._start(stack, "program", {"source": program.source}, self._isolation, rpc=ends[0])
            isolation = self._bare if program.tests.cases else self._isolation
            job = job_of(program.tests, count_tests)
            tester = self._start(stack, "tester", job, isolation, rpc=ends[1])
            for end in ends:
                end.close()  # or the tests would wait for a program that has ended
            watch([tester, run], self.limits.wall + GRACE, stop)
        if tester.reason == "setup" or run.reason == "setup":
            return tester.outcome() or run.outcome() or Outcome("setup")
        found = tester.verdict
        if found is None:  # what the program returns was too much for the tests
            return run.outcome() or tester.outcome() or Outcome("failed", "the tests ended without a verdict")
        outcome, ended = Outcome.of_verdict(found), run.outcome()
        is_over = ended is not None and (outcome.verdict == "failed" or ended.verdict == "output")
        return replace(ended, share=outcome.share) if is_over and ended is not None else outcome
