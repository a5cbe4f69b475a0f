"""
The text of a completion, whatever form TRL has it in.
"""

from typing import Any


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
