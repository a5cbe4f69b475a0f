"""
Progress that a person can use: what is done of how much, how fast, and how long it will take.
"""

import threading
from typing import Any

from tqdm.auto import tqdm

from dapo_trl.engines import Completion


class CompletionBar:
    """
    Progress bar over completions; a context manager.

    Args:
        total (`int`, *optional*):
            Completions to come, `None` if nobody knows.
        desc (`str`):
            Label.
        is_hidden (`bool`, *optional*, defaults to `False`):
            Whether to count without showing anything.
    """

    def __init__(self, total: int | None, desc: str, is_hidden: bool = False) -> None:
        self.tokens = 0
        self._bar = tqdm(
            total=total, desc=desc, unit=" completions", smoothing=0.05, mininterval=0.5, disable=is_hidden
        )

    def __enter__(self) -> "CompletionBar":
        return self

    def __exit__(self, *args: Any) -> None:
        self._show()
        self._bar.close()

    def add(self, completion: Completion) -> None:
        """Count a completion that is done."""
        self.tokens += len(completion.ids)
        if self._bar.update():
            self._show()

    def _show(self) -> None:
        elapsed = self._bar.format_dict["elapsed"]
        self._bar.set_postfix_str(f"{self.tokens:,} tokens, {self.tokens / max(elapsed, 1e-9):,.0f}/s", refresh=False)


class ShardBar:
    """
    Progress bar over the problems of a stage, that knows what earlier runs have done; a context manager.

    Completions may be added from several threads.

    Args:
        desc (`str`):
            Label.
        total (`int`):
            Problems of the stage.
        initial (`int`):
            Problems that are done already; they do not count for the rate.
    """

    def __init__(self, desc: str, total: int, initial: int) -> None:
        self._tokens = 0
        self._completions = 0
        self._lock = threading.Lock()
        self._bar = tqdm(total=total, initial=initial, desc=desc, unit=" problems", smoothing=0, mininterval=0.5)

    def __enter__(self) -> "ShardBar":
        return self

    def __exit__(self, *args: Any) -> None:
        self._bar.close()

    def add(self, completion: Completion) -> None:
        """Count a completion that is done."""
        with self._lock:
            self._tokens += len(completion.ids)
            self._completions += 1
            if self._completions % 64 == 0:
                self._show()

    def finish(self, problems: int) -> None:
        """Count the problems of a shard that is done."""
        with self._lock:
            self._bar.update(problems)
            self._show()

    def _show(self) -> None:
        elapsed = max(self._bar.format_dict["elapsed"], 1e-9)
        text = f"{self._completions:,} completions, {self._tokens:,} tokens, {self._tokens / elapsed:,.0f}/s"
        self._bar.set_postfix_str(text, refresh=False)
