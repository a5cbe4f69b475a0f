"""
A few child processes that can be killed: how math-verify is run under a time limit from any thread.

math-verify limits its time with `signal.alarm`, which fails outside of the main thread and cannot end a long
computation inside of C code. Here the limit is a kill, which hurts the hanging question only.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple


class Question(NamedTuple):
    """Two answers in LaTeX; without the second, the question is whether the first can be parsed."""

    gold: str
    answer: str | None


class WorkerTimeout(Exception):
    """A question took too long, and its worker was killed."""


class WorkerCrash(Exception):
    """A worker ended without a reply."""


_START_LIMIT = 120.0  # seconds for a worker to import math-verify
# The parent's import path as it is, as multiprocessing does, but without its __main__: scripts need no guard.
_BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv[2:]; from dapo_trl.verifiers._math_worker import main; main(float(sys.argv[1]))"
)


class _Worker:
    """One child process."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, str(timeout + 2.0), *map(str, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )

    def wait_until_ready(self) -> None:
        """
        Wait for the imports, which do not count against the time of the first question.

        Raises:
            ImportError: If math-verify is not installed.
            RuntimeError: If the process does not start.
        """
        try:
            greeting = self._reply(_START_LIMIT)
        except (WorkerTimeout, WorkerCrash) as error:
            raise RuntimeError(
                f"a math worker did not start ({error}); try `{sys.executable} -c 'import math_verify'`"
            ) from error
        if "error" in greeting:
            self.kill()
            raise ImportError(
                f"comparing expressions needs math-verify ({greeting['error']}); run `pip install math-verify`"
            )

    def ask(self, question: Question) -> str:
        """
        Verdict of the worker.

        Raises:
            WorkerTimeout: If there was none in time; the process is dead then.
            WorkerCrash: If the process ended by itself or by someone else's hand.
        """
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(question._asdict()) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            self.kill()
            raise WorkerCrash("the process was gone") from error
        return self._reply(self.timeout)["verdict"]

    def _reply(self, limit: float) -> dict[str, Any]:
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.process.kill()

        timer = threading.Timer(limit, expire)
        timer.daemon = True
        timer.start()
        try:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
            timer.join()  # after this it can no longer kill a worker that has gone on
        if line.endswith("\n") and not expired.is_set():
            return json.loads(line)
        self.kill()
        if expired.is_set():
            raise WorkerTimeout(f"no reply within {limit:g} s")
        raise WorkerCrash(f"exit code {self.process.returncode}")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # what was still buffered for a dead process
                pass


class WorkerPool:
    """
    Workers that start when they are first needed and are reused until [`WorkerPool.close`].

    Safe to use from several threads at once, and after a fork: the child starts workers of its own.

    Args:
        num_workers (`int`):
            Most processes at a time.
        timeout (`float`):
            Seconds per question.
    """

    def __init__(self, num_workers: int, timeout: float):
        self.num_workers = num_workers
        self.timeout = timeout
        self._reset()

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._workers: set[_Worker] = set()
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(self.num_workers):
            self._slots.put(None)
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, self._owner)  # at the latest at exit

    def ask(self, questions: Sequence[Question]) -> list[str]:
        """
        Verdicts on questions, in their order.

        Args:
            questions (`Sequence[Question]`):
                What to ask.

        Returns:
            `list[str]`:
                `"equal"`, `"different"`, `"no_answer"`, `"unparsable_gold"`, `"unparsable_answer"`, `"error"` where
                math-verify failed, `"timeout"`, or `"crash"` where a worker died twice over the question.

        Raises:
            ImportError: If math-verify is not installed.
            RuntimeError: If no worker can be started.
        """
        if not questions:
            return []
        if self._owner != os.getpid():
            self._reset()
        threads = ThreadPoolExecutor(min(self.num_workers, len(questions)), thread_name_prefix="math-verifier")
        try:
            return list(threads.map(self._ask, questions))
        except BaseException:  # an interrupt must not wait for the questions that are left
            threads.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            threads.shutdown()

    def _ask(self, question: Question) -> str:
        for _ in range(2):
            worker = self._slots.get()
            try:
                worker = worker if worker is not None and worker.alive else self._start()
                return worker.ask(question)
            except WorkerTimeout:
                return "timeout"
            except WorkerCrash:
                continue
            finally:
                if worker is not None and not worker.alive:
                    self._workers.discard(worker)
                    worker = None
                self._slots.put(worker)
        return "crash"

    def _start(self) -> _Worker:
        worker = _Worker(self.timeout)
        self._workers.add(worker)
        worker.wait_until_ready()
        return worker

    @property
    def process_ids(self) -> list[int]:
        """Of the workers that are running."""
        return [worker.process.pid for worker in list(self._workers) if worker.alive]

    def close(self) -> None:
        """End all workers. The pool can be used again: new ones start then."""
        _kill_all(self._workers, self._owner)


def _kill_all(workers: set[_Worker], owner: int) -> None:
    if owner != os.getpid():  # a fork: they are not ours
        return
    while workers:
        workers.pop().kill()
