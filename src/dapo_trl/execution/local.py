"""
Programs in sandboxes on this machine.

Each program gets processes of its own, which end with it: a monitor (`inside/monitor.py`) that stays outside, and
inside of the sandbox the program. They are forks of one process that has loaded what they need (`inside/server.py`).
Tests that call functions are in a second sandbox with a second monitor; they and the program have a socket between them
and nothing else, so that the program neither sees the tests nor writes the verdict.
"""

import json
import logging
import os
import selectors
import socket
import stat
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import IO, Any

from dapo_trl.execution import Limits, Outcome, Program
from dapo_trl.execution import allow_execution as refuse_unless_allowed
from dapo_trl.execution.isolation import BARE, KINDS, Isolation
from dapo_trl.execution.unit_tests import UnitTests, job_of, same_output, script_outcome


logger = logging.getLogger(__name__)

_GRACE = 10.0  # seconds that a monitor gets beyond the program's
_MOST_KEPT = 2000  # characters of what a script writes to standard error
_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


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
        self._isolation, self._server = self._choose(isolation, python)
        weakref.finalize(self, self._server.close)

    def _choose(self, name: str, python: str | None) -> tuple[Isolation, "_Server"]:
        """The isolation that was asked for, or the best one that works, and where it is made."""
        reasons: list[str] = []
        for kind in KINDS if name == "auto" else (name,):
            isolation = Isolation(kind, python)
            reason = isolation.missing() or self._reason_against(isolation)
            if reason is None:
                if reasons:
                    logger.warning(
                        "Programs run with isolation %r: %s. %s", kind, isolation.in_words(), " ".join(reasons)
                    )
                return isolation, self._server
            reasons.append(f"{kind}: {reason}.")
        raise RuntimeError(
            f"`isolation` {name!r} does not work here: {' '.join(reasons)} Install bubblewrap, or allow user "
            "namespaces; `isolation='process'` has limits only, see docs/code.md."
        )

    def _reason_against(self, isolation: Isolation) -> str | None:
        """Why a sandbox cannot be used, found out by using it."""
        self._isolation, self._server = isolation, _Server(isolation.command)
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

    def _run_script(self, program: Program, count_tests: bool, stop: threading.Event) -> Outcome:
        """Once for each input."""

        def run_once(text: str, expected: str) -> Outcome:
            with ExitStack() as stack:
                run = _Run(self, stack, "program", {"source": program.source, "stdin": text}, keeps_output=True)
                _watch([run], self.limits.wall + _GRACE, stop)
            is_right = run.code == 0 and same_output(run.printed, expected)
            return run.outcome() or Outcome("passed" if is_right else "failed", run.why())

        return script_outcome(program.tests, run_once, count_tests)

    def _run_functions(self, program: Program, count_tests: bool, stop: threading.Event) -> Outcome:
        """The program in one sandbox, the tests in another."""
        with ExitStack() as stack:
            ends = [stack.enter_context(end) for end in socket.socketpair()]
            run = _Run(self, stack, "program", {"source": program.source}, rpc=ends[0])
            isolation = self._bare if program.tests.cases else None
            job = job_of(program.tests, count_tests)
            tester = _Run(self, stack, "tester", job, rpc=ends[1], isolation=isolation)
            for end in ends:
                end.close()  # or the tests would wait for a program that has ended
            _watch([tester, run], self.limits.wall + _GRACE, stop)
        if tester.reason == "setup" or run.reason == "setup":
            return tester.outcome() or run.outcome() or Outcome("setup")
        found = tester.verdict
        if found is None:  # what the program returns was too much for the tests
            return run.outcome() or tester.outcome() or Outcome("failed", "the tests ended without a verdict")
        outcome, ended = Outcome.of_verdict(found), run.outcome()
        is_over = ended is not None and (outcome.verdict == "failed" or ended.verdict == "output")
        return replace(ended, share=outcome.share) if is_over and ended is not None else outcome


class _Server:
    """
    The process that makes monitors (`inside/server.py`). It starts when it is first needed, and again if it is gone.

    Args:
        command (`list[str]`):
            That of our code in a Python of its own.
    """

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._forget()

    def _forget(self) -> None:
        """Begin anew, also after a fork: the process is the parent's, and so is a lock that somebody holds."""
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None
        self._owner = os.getpid()

    def request(self, config: dict[str, Any], files: dict[str, int]) -> None:
        """Have a monitor made."""
        if self._owner != os.getpid():
            self._forget()
        message = json.dumps(config | {"files": list(files)}).encode()
        with self._lock:
            for _ in range(2):
                try:
                    socket.send_fds(self._ready(), [message], list(files.values()))
                    return
                except OSError as error:
                    reason = error
                    self.close()
        raise OSError(f"the process that starts programs does not work: {reason}")

    def _ready(self) -> socket.socket:
        if self._requests is None:
            mine, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with end:
                self._process = subprocess.Popen(
                    [*self._command, "serve", str(end.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[end.fileno()],
                    env=_ENVIRONMENT,
                    start_new_session=True,
                )
            self._requests = mine
        return self._requests

    def close(self) -> None:
        """End the process; programs that are running go on to their end."""
        if self._owner != os.getpid():
            return
        with self._lock:
            requests, process = self._requests, self._process
            self._requests = self._process = None
            if requests is not None:
                with requests:
                    try:
                        requests.shutdown(socket.SHUT_RDWR)  # a fork may have a copy
                    except OSError:  # it is gone already
                        pass
            if process is not None:
                try:
                    process.wait(_GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


class _Run:
    """
    One monitor and its process.

    Args:
        executor ([`LocalExecutor`]):
            Whose limits and isolation hold.
        stack (`ExitStack`):
            What ends it at the latest.
        role (`str`):
            `"program"` or `"tester"`.
        job (`dict`):
            What the process reads.
        rpc (`socket.socket`, *optional*):
            Its end of the socket between the two.
        keeps_output (`bool`, *optional*, defaults to `False`):
            Whether what it prints matters.
        isolation ([`~dapo_trl.execution.isolation.Isolation`], *optional*):
            What shuts it in. `None` takes the executor's.
    """

    def __init__(
        self,
        executor: LocalExecutor,
        stack: ExitStack,
        role: str,
        job: dict[str, Any],
        rpc: socket.socket | None = None,
        keeps_output: bool = False,
        isolation: Isolation | None = None,
    ) -> None:
        self.limits = executor.limits
        self.keeps_output = keeps_output
        self.report: dict[str, Any] | None = None
        self._parts: dict[str, list[bytes]] = {"status": [], "verdict": [], "stdout": [], "stderr": []}
        self._num_printed = 0
        config = {"role": role, "limits": asdict(self.limits)}
        config |= (isolation or executor._isolation).config(self.limits, stack)
        given = stack.enter_context(tempfile.TemporaryFile())
        given.write(json.dumps(job).encode())
        given.seek(0)
        self.pipes: dict[str, IO[bytes]] = {}
        with ExitStack() as ends:  # which are the monitor's: closed here once it has them
            files = {"stdin": given.fileno()}
            for name in ("stdout", "stderr", "status", *(["verdict"] if role == "tester" else [])):
                if role == "tester" and name.startswith("std"):
                    files[name] = ends.enter_context(open(os.devnull, "wb")).fileno()
                else:
                    self.pipes[name], end = _pipe(stack, ends)
                    files[name] = end.fileno()
            reader, self._stop = _pipe(ends, stack)
            files["stop"] = reader.fileno()
            if rpc is not None:
                files["rpc"] = rpc.fileno()
            executor._server.request(config, files)

    def take(self, name: str, data: bytes) -> None:
        """What came from one of the pipes."""
        if name in ("stdout", "stderr"):
            self._num_printed += len(data)
            if self._num_printed > self.limits.output:
                self.end("output")
                return
            if not self.keeps_output:
                return
        self._parts[name].append(data)

    def end(self, reason: str | None = None) -> None:
        """Have the program ended; its monitor cleans up, and reports, unless it is known already why it ended."""
        if self.report is None and reason is not None:
            self.report = {"reason": reason, "code": 0}
        if not self._stop.closed:
            try:
                self._stop.write(b"x")  # a fork may have a copy, so that closing alone ends nothing
            except OSError:  # it has ended
                pass
            self._stop.close()

    @property
    def _found(self) -> dict[str, Any]:
        if self.report is None:
            data = b"".join(self._parts["status"])
            told = {"reason": "setup", "code": 0, "message": "its monitor ended without a report"}
            self.report = json.loads(data) if data else told
        return self.report

    @property
    def reason(self) -> str:
        """Why it ended, see `inside/monitor.py`."""
        return self._found["reason"]

    @property
    def code(self) -> int:
        """Its exit code, negative for a signal."""
        return self._found["code"]

    @property
    def verdict(self) -> dict[str, Any] | None:
        """The verdict of the tests."""
        data = b"".join(self._parts["verdict"])
        return json.loads(data) if data else None

    @property
    def printed(self) -> str:
        """What it wrote to standard output."""
        return b"".join(self._parts["stdout"]).decode(errors="replace")

    def why(self) -> str:
        """How a script failed, in words."""
        written = b"".join(self._parts["stderr"]).decode(errors="replace")[-_MOST_KEPT:].strip()
        return "" if self.code == 0 and not written else f"exit code {self.code}: {written}"

    def outcome(self) -> Outcome | None:
        """What its end alone says; nothing if it ended by itself."""
        if self.reason in ("exit", "stopped"):
            return None
        return Outcome(self.reason, self._found.get("message", "") or f"ended: too much {self.reason}")


def _watch(runs: Sequence[_Run], seconds: float, stop: threading.Event) -> None:
    """Read what processes write until the first of them has reported, and the others have nothing left to say."""
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for run in runs:
            for name, stream in run.pipes.items():
                selector.register(stream, selectors.EVENT_READ, (run, name))
        while any(key.data[1] == "status" for key in selector.get_map().values()):
            if stop.is_set() or time.monotonic() > deadline:
                for run in runs:
                    run.end("setup" if stop.is_set() else "wall")
                if time.monotonic() > deadline + _GRACE:
                    raise OSError("a monitor does not end")
            for key, _ in selector.select(0.5):
                run, name = key.data
                data = os.read(key.fileobj.fileno(), 65536)  # type: ignore[union-attr]
                if data:
                    run.take(name, data)
                    continue
                selector.unregister(key.fileobj)
                if name == "verdict" and len(runs) > 1:  # the program has nothing more to do
                    runs[1].end()
        _drain(selector)


def _drain(selector: selectors.BaseSelector) -> None:
    """What is left in the pipes of processes that have ended."""
    for key in list(selector.get_map().values()):
        run, name = key.data
        os.set_blocking(key.fileobj.fileno(), False)  # type: ignore[union-attr]
        try:
            while data := os.read(key.fileobj.fileno(), 65536):  # type: ignore[union-attr]
                run.take(name, data)
        except BlockingIOError:
            pass


def _pipe(readers: ExitStack, writers: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    reader, writer = os.pipe()
    return readers.enter_context(open(reader, "rb", 0)), writers.enter_context(open(writer, "wb", 0))


@contextmanager
def work_folder(is_nobody: bool) -> Iterator[str]:
    """An empty folder that is gone afterwards, whatever a program made of it."""
    folder = tempfile.mkdtemp(prefix="dapo-trl-")
    try:
        if is_nobody:
            os.chown(folder, 65534, 65534)
        yield folder
    finally:
        _remove(folder)


def _remove(folder: str) -> None:
    """Remove a folder, also one whose folders are closed or deep; what cannot be removed stays."""
    try:
        os.chmod(folder, 0o700)
        for _, names, _, here in os.fwalk(folder):
            for name in names:
                if stat.S_ISDIR(os.stat(name, dir_fd=here, follow_symlinks=False).st_mode):
                    os.chmod(name, 0o700, dir_fd=here)
    except (OSError, RecursionError):
        pass
    subprocess.run(["rm", "-rf", "--", folder], stderr=subprocess.DEVNULL, check=False)
