"""
Ctrl-C that is not lost.

Python raises `KeyboardInterrupt` wherever the program is, and libraries have places that swallow any exception. So the
handler also notes it, and whoever begins or ends a piece of work asks.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


_came = threading.Event()


@contextlib.contextmanager
def noted_interrupts() -> Iterator[None]:
    """
    Note an interrupt, besides raising it, so that [`raise_if_interrupted`] raises it again if it was swallowed. A
    second interrupt ends the program at once.

    Where interrupts are ignored, or somebody else heeds them, nothing changes.
    """
    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    _came.clear()
    signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        _came.clear()


def raise_if_interrupted() -> None:
    """
    Raise an interrupt again that was swallowed.

    Raises:
        KeyboardInterrupt: if there was one.
    """
    if _came.is_set():
        raise KeyboardInterrupt


def _note(*_: Any) -> None:
    _came.set()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt
