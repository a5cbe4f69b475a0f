"""
Programs at a service that runs code: one that speaks the interface of SandboxFusion (`POST /run_code`).

How safe that is, is the service's matter. Tests that call functions are sent as one script, which starts the program in
a process of its own and speaks to it as on this machine: only plain data comes back, and the verdict stands behind a
word that the program does not know.
"""

import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from dapo_trl.execution import Limits, Outcome, Program
from dapo_trl.execution.unit_tests import job_of, same_output, script_outcome


_INSIDE = Path(__file__).parent / "inside"
_PAUSE = 1.0  # seconds before the first request that is sent again; then twice as long each time
_GRACE = 10.0  # seconds that the service gets beyond the program's
_BAD_STATUS = {"TimeLimitExceeded": "wall", "MemoryLimitExceeded": "memory", "OutputLimitExceeded": "output"}

# What the service runs for tests that call functions. Names in braces are filled in.
_SCRIPT = """
import json, os, socket, subprocess, sys, tempfile
try:
    os.unlink(os.path.abspath(__file__))  # the program is not to find the tests
except (NameError, OSError):
    pass
folder = tempfile.mkdtemp()
os.mkdir(os.path.join(folder, "inside"))
for name, text in {modules!r}.items():
    with open(os.path.join(folder, "inside", name), "w") as file:
        file.write(text)
sys.path.insert(0, folder)
from inside.sandbox import hide
from inside.tester import judge
from inside.wire import Connection
mine, other = socket.socketpair()
start = "import sys; sys.path.insert(0, %r); from inside import program, sandbox; "
start += "sandbox.die_with_parent(); program.run(dict(rpc=%d))"
words = [sys.executable, "-s", "-c", start % (folder, other.fileno())]
program = subprocess.Popen(
    words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[other.fileno()]
)
other.close()
hide()
program.stdin.write(json.dumps({program!r}).encode())
program.stdin.close()
found = judge({job!r}, Connection(mine.fileno()))
program.kill()
print({word!r} + json.dumps(found))
"""


class RemoteExecutor:
    """
    Runs programs at a service.

    Args:
        url (`str`):
            Address of the service, such as `http://localhost:8080`; `/run_code` is added.
        limits ([`Limits`], *optional*):
            Of these, `wall` and `memory` are asked for; the others are the service's.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Requests at a time.
        max_retries (`int`, *optional*, defaults to `4`):
            How often a request is sent again that failed.

    Raises:
        ValueError: If `url` is no address, or a number is out of range.
    """

    def __init__(self, url: str, limits: Limits | None = None, max_concurrency: int = 16, max_retries: int = 4) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"`url` must begin with http:// or https://, got {url!r}.")
        if max_concurrency < 1 or max_retries < 0:
            raise ValueError(
                f"`max_concurrency` must be at least 1 and `max_retries` at least 0, got {max_concurrency} and "
                f"{max_retries}."
            )
        self.url = url.rstrip("/")
        self.limits = limits or Limits()
        self.max_concurrency = max_concurrency
        self.max_retries = max_retries

    def run(self, programs: Sequence[Program], count_tests: bool = False) -> list[Outcome]:
        """
        Run programs against their tests at the service.

        Args:
            programs (sequence of [`Program`], length N):
                What to run.
            count_tests (`bool`, *optional*, defaults to `False`):
                Whether to go on after a test that fails, and tell the share of those that pass.

        Returns:
            `list[Outcome]` of length N, in the order of the programs.

        Raises:
            RuntimeError: If the service does not answer, or not as it should, again and again.
        """
        if not programs:
            return []
        with ThreadPoolExecutor(min(self.max_concurrency, len(programs))) as threads:
            return list(threads.map(lambda program: self._run_one(program, count_tests), programs))

    def _run_one(self, program: Program, count_tests: bool) -> Outcome:
        if not program.tests.is_script:
            return self._run_functions(program, count_tests)

        def run(text: str, expected: str) -> Outcome:
            found = self._ask(program.source, text)
            outcome = _ended(found)
            if outcome is not None:
                return outcome
            is_right = found["return_code"] == 0 and same_output(found["stdout"] or "", expected)
            return Outcome("passed" if is_right else "failed", str(found.get("stderr") or "")[-2000:])

        return script_outcome(program.tests, run, count_tests)

    def _run_functions(self, program: Program, count_tests: bool) -> Outcome:
        word = secrets.token_hex(16)
        parts = {
            "modules": _modules(),
            "program": {"source": program.source},
            "job": job_of(program.tests, count_tests),
            "word": word,
        }
        found = self._ask(_SCRIPT.format(**parts), "")
        outcome = _ended(found)
        if outcome is not None:
            return outcome
        _, _, verdict = (found["stdout"] or "").rpartition(word)
        if not verdict:
            return Outcome("failed", f"the tests ended without a verdict: {str(found.get('stderr') or '')[-2000:]}")
        return Outcome.of_verdict(json.JSONDecoder().raw_decode(verdict)[0])

    def _ask(self, code: str, stdin: str) -> dict[str, Any]:
        """What the service says of a run."""
        request: dict[str, Any] = {"code": code, "language": "python", "stdin": stdin}
        request |= {"run_timeout": self.limits.wall, "memory_limit_MB": self.limits.memory // 2**20}
        reason, pause = "", _PAUSE
        for attempt in range(self.max_retries + 1):
            if attempt:
                time.sleep(pause)
                pause *= 2
            try:
                answer = self._post(request)
            except (OSError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            run = answer.get("run_result") if isinstance(answer, dict) else None
            if isinstance(run, dict) and answer.get("status") != "SandboxError":
                return {"stdout": "", "stderr": "", "return_code": None, "status": ""} | run
            reason = f"not a result of a run, but {json.dumps(answer)[:300]}"
        raise RuntimeError(
            f"Gave up on {self.url}/run_code after {self.max_retries + 1} attempts: {reason}. Check `url`, and that "
            "the service runs."
        )

    def _post(self, request: dict[str, Any]) -> Any:
        data = json.dumps(request).encode()
        message = urllib.request.Request(f"{self.url}/run_code", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(message, timeout=self.limits.wall + _GRACE) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise OSError(f"status {error.code}, {error.read()[:300].decode(errors='replace')}") from error


def _ended(found: dict[str, Any]) -> Outcome | None:
    """What the end of a run alone says; nothing if it ended by itself."""
    verdict = _BAD_STATUS.get(found["status"])
    return None if verdict is None else Outcome(verdict, f"the service says {found['status']}")


@lru_cache
def _modules() -> dict[str, str]:
    """Our code that the script needs."""
    return {name: (_INSIDE / name).read_text() for name in ("sandbox.py", "wire.py", "program.py", "tester.py")}
