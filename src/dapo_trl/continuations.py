"""
What continues a prefix: the text of token ids and the ids of a text, as they are after what stands before them.

Tokenizers that come from SentencePiece put a space before every text and take it away again, so that ids decoded alone
lose their leading space, and text tokenized alone gains one. A byte-level token may be part of a character that the
prefix began.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from typing import Any


_FEW = 4  # tokens; a character has at most four bytes


def decoder(tokenizer: Any, skip_special_tokens: bool = True) -> Callable[[Sequence[int]], str]:
    """
    The function from ids to the exact text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        skip_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether special tokens have no text.

    Returns:
        `Callable[[Sequence[int]], str]`.
    """
    return partial(tokenizer.decode, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def text_context(tokenizer: Any, prefix_ids: Sequence[int], skip_special_tokens: bool = True) -> tuple[int, ...]:
    """
    The end of a prefix, as far as it decides how what follows is decoded.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that the ids come from.
        prefix_ids (sequence of `int`):
            Ids of the prefix.
        skip_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether special tokens have no text.

    Returns:
        `tuple[int, ...]`: a few ids; more where these are no text, or no whole characters.
    """
    size, decode = _FEW, decoder(tokenizer, skip_special_tokens)
    while size < len(prefix_ids) and (not (text := decode(list(prefix_ids[-size:]))) or "\ufffd" in text):
        size *= 4
    return tuple(prefix_ids[-size:])


def continuation_text(
    tokenizer: Any, prefix_ids: Sequence[int], ids: Sequence[int], skip_special_tokens: bool = True
) -> str:
    r"""
    Text of ids that follow a prefix: what they add to the text of the prefix.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that the ids come from.
        prefix_ids (sequence of `int`):
            Ids of the prefix; its [`text_context`] is enough.
        ids (sequence of `int`):
            Ids that follow.
        skip_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether special tokens have no text.

    Returns:
        `str`: the end of the text of all ids. A character that the prefix began and the ids complete belongs to them.

    Example:

    ```python
    >>> from tokenizers import Tokenizer, decoders, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> from dapo_trl.continuations import continuation_text

    >>> backend = Tokenizer(models.WordLevel({"▁if": 0, "▁a": 1, ":": 2}, unk_token=":"))
    >>> backend.decoder = decoders.Metaspace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    >>> tokenizer.decode([1, 2]), continuation_text(tokenizer, [0], [1, 2])
    ('a:', ' a:')

    ```
    """
    context = text_context(tokenizer, prefix_ids, skip_special_tokens)
    return following(decoder(tokenizer, skip_special_tokens), context, ids)


def following(decode: Callable[[Sequence[int]], str], context: Sequence[int], ids: Sequence[int]) -> str:
    """
    What ids add to the text of a context.

    Args:
        decode (`Callable[[Sequence[int]], str]`):
            See [`decoder`].
        context (sequence of `int`):
            Ids before them.
        ids (sequence of `int`):
            The ids.

    Returns:
        `str`.
    """
    whole = decode([*context, *ids])
    before = decode(list(context)) if context else ""
    if whole.startswith(before):
        return whole[len(before) :]
    # `before` ends with part of a character, where the whole has the character
    return whole[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))) :]


def continuation_ids(tokenizer: Any, prefix_ids: Sequence[int], text: str) -> tuple[list[int], bool]:
    """
    Ids that continue a prefix with a text, in which nothing stands for a special token.

    The text is tokenized alone, after the end of the prefix, and after the end of a line; the first ids that give the
    text again are taken.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of its own: to split special tokens is a state of the tokenizer.
        prefix_ids (sequence of `int`):
            Ids of the prefix.
        text (`str`):
            What follows it.

    Returns:
        `tuple[list[int], bool]`: the ids, and whether they are this text after the prefix.
    """
    context = text_context(tokenizer, prefix_ids)

    def encode(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return [token for token in ids if token != tokenizer.eos_token_id]

    ids: list[int] = []
    for before in ("", decoder(tokenizer)(list(context)), "\n"):
        start, whole = encode(before) if before else [], encode(before + text)
        if whole[: len(start)] != start:  # a token reaches over the border
            continue
        ids = whole[len(start) :]
        if continuation_text(tokenizer, context, ids) == text:
            return ids, True
    return ids, False
