"""
The process that starts programs: a Python of its own that has loaded what they need, and forks.
"""

import json
import os
import socket
import subprocess
import threading
from typing import Any


_PATIENCE = 10.0  # seconds that it has to end
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class MonitorServer:
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
                    env=ENVIRONMENT,
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
                    process.wait(_PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
