"""
The text of a completion, whatever form TRL has it in.
"""

from collections.abc import Sequence
from typing import Any


def refuse_other_length(answer: Sequence[Any], number: int, what: str) -> None:
    """
    Refuse answers that are not one for each completion.

    Args:
        answer (sequence):
            What was passed.
        number (`int`):
            Completions.
        what (`str`):
            What a list of them holds, for the message.

    Raises:
        ValueError: If there are more or fewer, or one string.
    """
    if isinstance(answer, str) or len(answer) != number:
        given = "one string" if isinstance(answer, str) else f"{len(answer)} rows"
        raise ValueError(f"`answer` is {given} for {number} rows of `completions`; pass a list with {what}")


def completion_text(row: int, completion: Any) -> str:
    """
    Text of a completion: a string, or the content of the last message.

    Args:
        row (`int`):
            Its number, for messages.
        completion (`str` or `list[dict]`):
            Text, or messages.

    Returns:
        `str`.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(completion, str):
        return completion
    try:
        content = completion[-1]["content"]
    except (TypeError, KeyError, IndexError) as error:
        raise TypeError(
            f"`completions[{row}]` is {completion!r:.200}; pass a string or a list of messages with 'content'"
        ) from error
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(part.get("text") or "" for part in content)
