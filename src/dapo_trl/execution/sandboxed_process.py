"""
One process in a sandbox, as the executor sees it: what it is given, what it writes, and why it ended.
"""

import json
import os
import selectors
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import IO, Any

from dapo_trl.execution import Limits, Outcome
from dapo_trl.execution.isolation import Isolation
from dapo_trl.execution.monitor_server import MonitorServer


GRACE = 10.0  # seconds that a monitor gets beyond the program's
_MOST_KEPT = 2000  # characters of what a script writes to standard error


class SandboxedProcess:
    """
    One monitor and its process.

    Args:
        server ([`MonitorServer`]):
            What starts it.
        isolation ([`Isolation`]):
            What shuts it in.
        limits ([`Limits`]):
            What it may use.
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
    """

    def __init__(
        self,
        server: MonitorServer,
        isolation: Isolation,
        limits: Limits,
        stack: ExitStack,
        role: str,
        job: dict[str, Any],
        rpc: socket.socket | None = None,
        keeps_output: bool = False,
    ) -> None:
        self.limits = limits
        self.keeps_output = keeps_output
        self.report: dict[str, Any] | None = None
        self._parts: dict[str, list[bytes]] = {"status": [], "verdict": [], "stdout": [], "stderr": []}
        self._num_printed = 0
        config = {"role": role, "limits": asdict(limits)} | isolation.config(limits, stack)
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
            server.request(config, files)

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


def watch(runs: Sequence[SandboxedProcess], seconds: float, stop: threading.Event) -> None:
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
                if time.monotonic() > deadline + GRACE:
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
