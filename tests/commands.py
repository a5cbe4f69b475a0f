"""
The command `dapo-trl` in processes of its own, forked from one that has imported everything: a start takes no time.

As a program, this file is that process: it reads a request a line, and answers each with a line.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path


SOURCES = Path(__file__).resolve().parents[1] / "src"
ENVIRONMENT = {  # one thread and no GPU: the same numbers in every process
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(SOURCES), os.environ.get("PYTHONPATH", "")])),
    "TOKENIZERS_PARALLELISM": "false",
}
TIMEOUT = 300


class Commands:
    """Starts commands; a context manager."""

    def __enter__(self) -> "Commands":
        self._server = subprocess.Popen(
            [sys.executable, __file__], env=os.environ | ENVIRONMENT, stdin=-1, stdout=-1, text=True
        )
        return self

    def __exit__(self, *args) -> None:
        self._server.stdin.close()
        self._server.wait(30)

    def start(self, *arguments, output: Path, file_limit: int | None = None, **environment: str) -> int:
        """
        Start a command that writes to a file; its process id, which is that of its group too. With a limit, no other
        file may grow beyond it: what a full disk looks like to a program.
        """
        request = {"output": str(output), "file_limit": file_limit, "environment": environment}
        return self._ask(start=list(map(str, arguments)), **request)

    def wait(self, pid: int, timeout: float = TIMEOUT) -> int:
        """Exit code of a command, negative if a signal ended it."""
        code = self._ask(wait=pid, timeout=timeout)
        assert code is not None, f"the command did not end within {timeout} seconds"
        return code

    def kill(self, pid: int) -> int:
        """Kill a command and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return self.wait(pid)

    def interrupt(self, pid: int) -> None:
        """What Ctrl-C does."""
        os.killpg(pid, signal.SIGINT)

    def run(self, *arguments, output: Path, **kwargs) -> tuple[int, str]:
        """Exit code of a command, and what it wrote."""
        code = self.wait(self.start(*arguments, output=output, **kwargs))
        return code, output.read_text()

    def _ask(self, **request):
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def serve() -> None:
    import dapo_trl.recipe  # noqa: F401 (what takes long)

    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(start(request) if "start" in request else wait(**request)), flush=True)


def start(request: dict) -> int:
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # here too: whoever is first
        return pid
    code = 70
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
        os.environ.update(request["environment"])
        file = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        if request["file_limit"] is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
        for number, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, file), (2, file)):
            os.dup2(target, number)
        from dapo_trl.cli import main

        code = main(request["start"])
    except BaseException:
        traceback.print_exc()
    finally:  # whatever happens: this copy of the server must not go on
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(wait: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        pid, status = os.waitpid(wait, os.WNOHANG)
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(wait, signal.SIGKILL)  # workers that are left
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


if __name__ == "__main__":
    serve()
