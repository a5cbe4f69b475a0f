"""
The child process that runs math-verify: one question per line on stdin, one verdict per line on stdout.

It ends when stdin does, that is with its parent. A question that hangs is the parent's to end; should the parent be
gone, an alarm of the operating system ends the process, which needs no help from a blocked interpreter.
"""

import json
import os
import signal
import sys
from typing import IO, Any


_MEMORY_LIMIT = 8 * 2**30  # bytes of address space: a power tower must not take the machine down


def main(limit: float) -> None:
    """
    Answer questions until stdin ends.

    Args:
        limit (`float`):
            Seconds after which a question ends the process. The parent's own limit is shorter; this one is for orphans.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may get between the replies
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    _limit_memory()
    try:
        judge = _judge_function()
    except ImportError as error:
        _send(replies, {"error": str(error)})
        return
    _send(replies, {"ready": True})
    for line in sys.stdin:
        question = json.loads(line)
        _set_alarm(limit)
        verdict = judge(question["gold"], question["answer"])
        _set_alarm(0)
        _send(replies, {"verdict": verdict})


def _judge_function() -> Any:
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)  # it warns that its own time limits, which need signals, are off
    config = [LatexExtractionConfig()]

    def read(latex: str) -> list[Any]:
        return parse(f"${latex}$", config, fallback_mode="no_fallback", parsing_timeout=None)

    def judge(gold: str, answer: str | None) -> str:
        try:
            if not (gold_parsed := read(gold)):
                return "unparsable_gold"
            if answer is None:
                return "no_answer"
            if not (answer_parsed := read(answer)):
                return "unparsable_answer"
            equal = verify(gold_parsed, answer_parsed, timeout_seconds=None, raise_on_error=True)
            return "equal" if equal else "different"
        except Exception:  # of sympy, of any kind; what could not be compared is not judged
            return "error"

    return judge


def _send(replies: IO[str], message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _set_alarm(seconds: float) -> None:
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _limit_memory() -> None:
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = _MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(hard, _MEMORY_LIMIT)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ImportError, ValueError, OSError):  # Windows, macOS
        pass
