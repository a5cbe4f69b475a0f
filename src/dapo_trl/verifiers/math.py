"""
Rewards for answers of mathematics problems: 1 for the right final answer, 0 for another or none, None if nobody knows.

Three stages, the cheap ones first: the final answer is found by regular expressions (`_extraction.py`); numbers and
words are compared exactly in this process (`_answers.py`); only other expressions go to math-verify, in child processes
that can be killed (`_worker_pool.py`). GSM8K's answers, all of them numbers, rarely start one.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from fractions import Fraction
from os import cpu_count
from threading import Lock
from typing import Any

from dapo_trl.verifiers._answers import Kind, read_answer, same
from dapo_trl.verifiers._extraction import extract_answer
from dapo_trl.verifiers._texts import completion_text, refuse_other_length
from dapo_trl.verifiers._worker_pool import Question, WorkerPool


__all__ = ["MathVerifier", "check_answers", "default_verifier", "extract_answer", "math_reward"]

logger = logging.getLogger(__name__)

_REWARDS = {"equal": 1.0, "different": 0.0, "no_answer": 0.0, "unparsable_answer": 0.0}  # of all else: None
_NOT_JUDGED = {
    "unparsable_gold": "the gold answer cannot be parsed; correct it or drop the row",
    "timeout": "comparing took longer than `timeout`; raise it if the gold answer is as meant",
    "error": "math-verify failed on it; write the gold answer in a simpler form if it is at fault",
    "crash": "a worker died over it twice, perhaps of too little memory",
}


class MathVerifier:
    r"""
    Compares final answers with gold answers, as a reward function.

    The final answer of a completion is what [`extract_answer`] finds. A gold answer is a bare value (`"72"`, `72`,
    `r"\frac{1}{2}"`, `"50%"`) or a worked solution that states one (GSM8K's `#### 72`, `\boxed{72}`).

    - Numbers are compared exactly, as fractions: 0.333 is not 1/3. Units, currencies and thousands separators do not
      count.
    - 50% equals 0.5 and 50, but not 0.5%, as in math-verify; "2 million" is treated alike.
    - Answers in words are compared without regard to case. A gold answer of more than eight words cannot be judged.
    - Everything else (expressions, sets, tuples, intervals, matrices, equations) is up to math-verify, in child
      processes that start when first needed. One that takes too long is killed; the others go on.

    Args:
        timeout (`float`, *optional*, defaults to `5.0`):
            Seconds that math-verify may spend on one pair of answers.
        num_workers (`int`, *optional*):
            Most child processes at a time. Defaults to the number of CPU cores, at most 4.

    Attributes:
        counts (`collections.Counter`):
            Completions so far by outcome: `"equal"`, `"different"`, `"no_answer"` (the completion states none) and
            `"unparsable_answer"` were judged; `"unparsable_gold"`, `"timeout"`, `"error"` and `"crash"` were not.

    Raises:
        ValueError: If `timeout` or `num_workers` is not positive.

    Example:

    ```python
    >>> from dapo_trl.verifiers import MathVerifier

    >>> with MathVerifier(timeout=10.0) as verifier:
    ...     verifier(None, [r"It is \boxed{\sqrt{8}}.", "The answer is 3.", "I do not know."], [r"2\sqrt{2}"] * 3)
    [1.0, 0.0, 0.0]
    >>> verifier.counts["no_answer"]
    1

    ```
    """

    def __init__(self, timeout: float = 5.0, num_workers: int | None = None):
        num_workers = min(4, cpu_count() or 1) if num_workers is None else num_workers
        if not timeout > 0:
            raise ValueError(f"`timeout` is {timeout}; pass seconds above 0")
        if num_workers < 1:
            raise ValueError(f"`num_workers` is {num_workers}; pass 1 or more, or None for a default")
        self.__name__ = "math_reward"  # under which TRL logs it
        self.counts: Counter[str] = Counter()
        self._pool = WorkerPool(num_workers, timeout)
        self._warned: set[str] = set()
        self._lock = Lock()

    def __call__(
        self,
        prompts: Sequence[Any] | None,
        completions: Sequence[Any],
        answer: Sequence[Any],
        log_extra: Callable[[str, list], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """
        Rewards of completions; see [`math_reward`].
        """
        refuse_other_length(answer, len(completions), "one gold answer per completion")
        golds = [_gold_text(row, gold) for row, gold in enumerate(answer)]
        stated = [extract_answer(completion_text(row, completion)) for row, completion in enumerate(completions)]
        verdicts = self._judge(list(zip(golds, stated, strict=True)))
        self._report(verdicts, golds, stated)
        if log_extra is not None:
            log_extra("extracted_answer", [text or "" for text in stated])
        return [_REWARDS.get(verdict) for verdict in verdicts]

    def check_answers(self, answers: Iterable[Any]) -> None:
        """
        Make sure that all gold answers can be judged; see the function [`check_answers`].
        """
        golds = [_gold_text(row, answer) for row, answer in enumerate(answers)]
        verdicts = self._judge([(gold, None) for gold in golds])
        bad = [row for row, verdict in enumerate(verdicts) if verdict in _NOT_JUDGED]
        if bad:
            raise ValueError(
                f"`answers[{bad[0]}]` is {golds[bad[0]]!r}: {_NOT_JUDGED[verdicts[bad[0]]]}. "
                f"{len(bad)} of {len(golds)} rows are like this."
            )

    def _judge(self, pairs: Sequence[tuple[str, str | None]]) -> list[str]:
        """Verdicts on (gold, stated) pairs: each distinct pair once, and by math-verify only what is left over."""
        verdicts = {pair: _judge_here(*pair) for pair in dict.fromkeys(pairs)}
        left = [pair for pair, verdict in verdicts.items() if verdict is None]
        questions = [
            Question(read_answer(gold).latex, None if stated is None else read_answer(stated).latex)
            for gold, stated in left
        ]
        verdicts.update(zip(left, self._pool.ask(questions), strict=True))
        return [verdicts[pair] or "error" for pair in pairs]

    def _report(self, verdicts: Sequence[str], golds: Sequence[str], stated: Sequence[str | None]) -> None:
        """Count all; warn of the first of each kind that was not judged."""
        with self._lock:
            self.counts.update(verdicts)
            new = [kind for kind in dict.fromkeys(verdicts) if kind in _NOT_JUDGED and kind not in self._warned]
            self._warned.update(new)
        for kind in new:
            row = verdicts.index(kind)
            logger.warning(
                "math_reward returns None for %d of %d completions, the first at index %d (gold answer %.200r, stated "
                "%.200r): %s. Said once; the verifier's `counts` has totals, `check_answers` finds bad gold answers.",
                verdicts.count(kind), len(verdicts), row, golds[row], stated[row], _NOT_JUDGED[kind],
            )  # fmt: skip

    @property
    def worker_process_ids(self) -> list[int]:
        """Of the child processes that are running now."""
        return self._pool.process_ids

    def close(self) -> None:
        """End the child processes. They start again when they are needed; at exit this happens by itself."""
        self._pool.close()

    def __enter__(self) -> "MathVerifier":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type["MathVerifier"], tuple[float, int]]:
        return type(self), (self._pool.timeout, self._pool.num_workers)  # TRL may send reward functions to a process


def _judge_here(gold: str, stated: str | None) -> str | None:
    """Verdict without math-verify, None if it takes that."""
    gold_answer = read_answer(gold)
    if gold_answer.kind is Kind.UNREADABLE:
        return "unparsable_gold"
    if stated is None:
        return None if gold_answer.kind is Kind.EXPRESSION else "no_answer"
    equal = same(gold_answer, read_answer(stated))
    return None if equal is None else "equal" if equal else "different"


def _gold_text(row: int, gold: Any) -> str:
    """The gold answer as text: what a solution states, or the value itself."""
    if isinstance(gold, str):
        return extract_answer(gold) or gold.strip()
    if hasattr(gold, "item"):  # a numpy or torch scalar
        gold = gold.item()
    if gold is None or isinstance(gold, int | float | Decimal | Fraction):
        return "" if gold is None or gold != gold else str(gold)
    raise TypeError(f"`answer[{row}]` is a {type(gold).__name__}; pass a string or a number")


default_verifier = MathVerifier()
"""The verifier behind [`math_reward`]: for its `counts`, and to `close` it."""


def math_reward(
    prompts: Sequence[Any] | None, completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any
) -> list[float | None]:
    r"""
    Reward of a mathematics problem: whether the final answer of each completion equals the gold answer.

    A function of [`default_verifier`]; for other limits, use a [`MathVerifier`] in its place.

    Args:
        prompts (`list`):
            Not used; part of TRL's signature.
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Texts or messages. Of messages, the last one is read.
        answer (`list[str]` or `list[float]`):
            Gold answers, one per completion: bare values or worked solutions. A column of the data set.
        **kwargs:
            What TRL passes besides. Only `log_extra` is used, for a column `extracted_answer`.

    Returns:
        `list[float | None]`:
            1.0 for the gold answer; 0.0 for another one or none; `None` where this cannot be judged, because the gold
            answer cannot be parsed, or the comparison failed or took too long.

    Raises:
        ValueError: If there is not one gold answer per completion.
        TypeError: If a completion or a gold answer is of another type.
        ImportError: If an expression is to be compared and math-verify is not installed.

    Example:

    ```python
    >>> from dapo_trl.verifiers import math_reward

    >>> completions = ["2 * 36 = 72\n#### 72", r"So we get \boxed{\frac{144}{2}}.", "The answer is 70 clips."]
    >>> math_reward(["..."] * 3, completions, answer=["72", "So she sold 72.\n#### 72", 72])
    [1.0, 1.0, 0.0]

    ```
    """
    return default_verifier(prompts, completions, answer, **kwargs)


def check_answers(answers: Iterable[Any]) -> None:
    r"""
    Make sure that all gold answers can be judged, before hours of sampling.

    Args:
        answers (`Iterable[str | float]`):
            Gold answers, as for [`math_reward`].

    Raises:
        ValueError: If one cannot be parsed; it names the first such row, its value and the cure.
        TypeError: If one is neither text nor a number.

    Example:

    ```python
    >>> from dapo_trl.verifiers import check_answers

    >>> check_answers(["72", "It is twice as much.\n#### 1,080"])
    >>> check_answers(["72", "???"])
    Traceback (most recent call last):
    ...
    ValueError: `answers[1]` is '???': the gold answer cannot be parsed; correct it or drop the row...

    ```
    """
    default_verifier.check_answers(answers)
