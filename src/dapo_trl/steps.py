"""
A solution cut into steps, as exact text spans and as token spans.

The step-level MDP takes one reasoning step as one action. Both forms keep every character and every token: the steps
of a text concatenate to the text, the steps of a list of token ids concatenate to the ids. Nothing is stripped and
nothing is tokenized again.

Rules, the same for text and tokens:

- a *run* of separators ends a step and belongs to it, so `"a\\n\\nb"` is `["a\\n\\n", "b"]`;
- no step is white space only: such a piece joins the step before it, at the beginning of the text the step after it
  (a text which is white space throughout is one step);
- a step of tokens ends with the token that *completes* its run of separators. If that token also holds the beginning of
  the next step, the earlier step keeps the whole token;
- special tokens have no text: they never make a step, and those at the end (EOS) belong to the last step.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, repeat
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from dapo_trl.continuations import decoder, following, text_context


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Separator = str | re.Pattern[str] | Callable[[str], Sequence[int]]

# Tokens in a window from which on it is decoded at powers of two only: bounds the work on ids that are no valid text.
_LONG_WINDOW = 16
# Tokens whose known texts are compared with the text in one go.
_RUN = 32
# tokenizer -> {skip_special_tokens: {token: its text after another token}}
_PIECES: WeakKeyDictionary[Any, dict[bool, dict[int, str]]] = WeakKeyDictionary()
# Tokens that `first_step_ids` looks at before it looks at twice as many.
_FIRST_CHUNK = 64


def step_ends(text: str, separator: Separator = "\n") -> list[int]:
    r"""
    Exclusive character offsets at which the steps of a text end.

    Args:
        text (`str`):
            Text to cut.
        separator (`str`, `re.Pattern` or `Callable[[str], Sequence[int]]`, *optional*, defaults to `"\n"`):
            What ends a step. A string or a compiled pattern is searched in the text; matches that touch form one run. A
            callable receives the text and returns the exclusive ends of the steps: strictly increasing integers from 1
            to `len(text)`, of which the last, `len(text)`, may be left out. Pieces of white space are joined to their
            neighbours afterwards in all three cases.

    Returns:
        `list[int]`:
            Increasing offsets, one per step, the last one `len(text)`. Empty for the empty text.

    Raises:
        TypeError: if `text` is not a string or `separator` is none of the three kinds.
        ValueError: if the separator is empty, matches the empty string, or returns ends out of order or out of range.

    Example:

    ```python
    >>> from dapo_trl.steps import step_ends
    >>> step_ends("2+2=4\n\nso 4")
    [7, 11]

    ```
    """
    if not isinstance(text, str):
        raise TypeError(f"`text` must be a string, got {type(text).__name__}: {text!r:.80}")
    ends = _raw_ends(text, separator)
    if text and (not ends or ends[-1] != len(text)):
        ends.append(len(text))
    return _join_blank(text, ends)


def split_steps(text: str, separator: Separator = "\n") -> list[str]:
    r"""
    Cut a text into its steps, separators included: `"".join(steps) == text`.

    Args:
        text (`str`):
            Text to cut.
        separator (`str`, `re.Pattern` or `Callable[[str], Sequence[int]]`, *optional*, defaults to `"\n"`):
            What ends a step, see [`step_ends`].

    Returns:
        `list[str]`:
            The K steps. `[]` for the empty text, `[text]` for a text of white space only.

    Raises:
        TypeError, ValueError: as [`step_ends`].

    Example:

    ```python
    >>> from dapo_trl.steps import split_steps
    >>> split_steps("2+2=4\n\n4*3=12\n#### 12")
    ['2+2=4\n\n', '4*3=12\n', '#### 12']
    >>> import re
    >>> split_steps("Step 1: add.\nso 4.\nStep 2: done.", re.compile(r"\n(?=Step)"))
    ['Step 1: add.\nso 4.\n', 'Step 2: done.']

    ```
    """
    return _slices(text, step_ends(text, separator))


def split_step_ids(
    ids: Iterable[int], tokenizer: "PreTrainedTokenizerBase", separator: Separator = "\n"
) -> list[list[int]]:
    r"""
    Cut token ids into steps without tokenizing anything again: the steps concatenate to `ids`.

    The ids are decoded and the text is cut as in [`split_steps`]; each end then moves to the end of the token that
    completes the separator, see [`token_ends`]. Two ends inside one token merge their steps. The work is linear in the
    number of tokens.

    Args:
        ids (`Iterable[int]`):
            Ids of one completion, shape `(T,)`. A one-dimensional tensor or array will do. Padding should be gone.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that the ids come from.
        separator (`str`, `re.Pattern` or `Callable[[str], Sequence[int]]`, *optional*, defaults to `"\n"`):
            What ends a step, see [`step_ends`]. It sees the text without special tokens.

    Returns:
        `list[list[int]]`:
            The K steps, none of them empty. `[]` when there are no ids, one step when the ids are special tokens only.

    Raises:
        TypeError, ValueError: as [`step_ends`]; TypeError also when `ids` is not a flat list of integers.

    Example:

    ```python
    >>> from tokenizers import Tokenizer, decoders, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> from dapo_trl.steps import split_step_ids
    >>> vocab = {"2+2=4": 0, ".ĊĊ": 1, "So": 2, "Ġ4.": 3, "<eos>": 4}  # Ċ is a newline, Ġ a space
    >>> backend = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    >>> backend.decoder = decoders.ByteLevel()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    >>> split_step_ids([0, 1, 2, 3, 4], tokenizer)
    [[0, 1], [2, 3, 4]]

    ```
    """
    return split_ids(ids, tokenizer, separator)[0]


def split_ids(
    ids: Iterable[int],
    tokenizer: "PreTrainedTokenizerBase",
    separator: Separator = "\n",
    prefix_ids: Sequence[int] = (),
) -> tuple[list[list[int]], list[str]]:
    r"""
    Cut token ids into steps, and give the steps' texts with them: [`split_step_ids`] and [`step_texts`] in one go.

    Args:
        ids (`Iterable[int]`):
            Ids of one completion, shape `(T,)`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that the ids come from.
        separator (`str`, `re.Pattern` or `Callable[[str], Sequence[int]]`, *optional*, defaults to `"\n"`):
            What ends a step, see [`step_ends`].
        prefix_ids (`Sequence[int]`, *optional*, defaults to `()`):
            What stands before the ids, see [`token_ends`].

    Returns:
        `tuple[list[list[int]], list[str]]`:
            Ids and texts of the K steps, texts without special tokens.

    Raises:
        TypeError, ValueError: as [`split_step_ids`].
    """
    ids = _as_list(ids)
    cuts = _token_cuts(ids, tokenizer, separator, prefix_ids)
    return _slices(ids, [cut for cut, _ in cuts]), [text for _, text in cuts]


def first_step_ids(ids: Iterable[int], tokenizer: "PreTrainedTokenizerBase", separator: Separator = "\n") -> list[int]:
    r"""
    First step of a completion: the candidate action which that completion contributes.

    Equal to `split_step_ids(ids, tokenizer, separator)[0]`. With a string as separator only as many tokens are decoded
    as it takes to see the second step begin; a pattern may look ahead and a callable may do anything, so both see the
    whole completion.

    Args:
        ids (`Iterable[int]`):
            Ids of one completion, shape `(T,)`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that the ids come from.
        separator (`str`, `re.Pattern` or `Callable[[str], Sequence[int]]`, *optional*, defaults to `"\n"`):
            What ends a step, see [`step_ends`].

    Returns:
        `list[int]`:
            Ids of the first step, `[]` when there are no ids. As long as `ids` when the completion has only one step:
            then the action is terminal if the completion is.

    Raises:
        TypeError, ValueError: as [`split_step_ids`].
    """
    ids = _as_list(ids)
    size = _FIRST_CHUNK if isinstance(separator, str) else len(ids)
    while size < len(ids):
        cuts = _token_cuts(ids[:size], tokenizer, separator)
        # a character cut by the chunk decodes to U+FFFD and might turn out to be white space
        if len(cuts) > 1 and cuts[1][1].replace("\ufffd", "").strip():
            return ids[: cuts[0][0]]
        size *= 2
    return ids[: _token_cuts(ids, tokenizer, separator)[0][0]] if ids else []


def step_texts(
    step_ids: Iterable[Iterable[int]], tokenizer: "PreTrainedTokenizerBase", skip_special_tokens: bool = True
) -> list[str]:
    r"""
    Text of each step of [`split_step_ids`], such that the texts concatenate to the text of all ids.

    Decoding steps one by one would lose the leading space of a step with SentencePiece tokenizers, and break a
    character whose bytes are spread over two steps. Here all ids are decoded together and the text is cut at the token
    boundaries; a character belongs to the step that completes it.

    Args:
        step_ids (`Iterable[Iterable[int]]`):
            Ids of the K steps.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that the ids come from.
        skip_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether special tokens are left out of the texts, as they are in the columns of a data set.

    Returns:
        `list[str]`:
            K texts with `"".join(texts) == tokenizer.decode(ids, skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False)`, where `ids` is the concatenation of `step_ids`.
    """
    steps = [_as_list(ids) for ids in step_ids]
    text, ends = token_ends([token for ids in steps for token in ids], tokenizer, skip_special_tokens)
    starts, position = [0, *ends], 0
    texts = []
    for ids in steps:
        texts.append(text[starts[position] : starts[position + len(ids)]])
        position += len(ids)
    return texts


def token_ends(
    ids: Iterable[int],
    tokenizer: "PreTrainedTokenizerBase",
    skip_special_tokens: bool = True,
    prefix_ids: Sequence[int] = (),
) -> tuple[str, list[int]]:
    r"""
    Decode ids and say where in the text every token ends.

    A window slides over the ids. It is decoded after some context, because SentencePiece tokenizers drop a leading
    space, and grows until its text equals the text of all ids at that place, because byte-level tokens may be part of a
    character; usually it is one token wide. Tokens that do not complete a character end where that character starts,
    special tokens where the token before them ends. The number of decoded tokens is linear in T. The text of single
    tokens is remembered for as long as the tokenizer lives, and used only where it fits, for runs of tokens at once.

    Args:
        ids (`Iterable[int]`):
            Token ids, shape `(T,)`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that the ids come from.
        skip_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether special tokens have no text.
        prefix_ids (`Sequence[int]`, *optional*, defaults to `()`):
            What stands before the ids: their text is then that which follows it, see
            [`~dapo_trl.continuations.continuation_text`]. Its last few ids are enough.

    Returns:
        `tuple[str, list[int]]`:
            The text, and T exclusive character ends: non-decreasing, the last one `len(text)`.

    Raises:
        TypeError: if `ids` is not a flat list of integers.
    """
    ids = _as_list(ids)
    if not ids:
        return "", []
    window = _Window(ids, tokenizer, skip_special_tokens, prefix_ids)
    for start in range(0, len(ids), _RUN):
        run = ids[start : start + _RUN]
        if not window.pass_over(run):
            for token in run:
                window.add(token)
    return window.text, [*window.ends[:-1], len(window.text)]


class _Window:
    """The window of [`token_ends`]: the text of all ids, and the ends of those that it has come past."""

    def __init__(
        self,
        ids: list[int],
        tokenizer: "PreTrainedTokenizerBase",
        skip_special_tokens: bool,
        prefix_ids: Sequence[int],
    ) -> None:
        self._decode = decoder(tokenizer, skip_special_tokens)
        self._silent = set(tokenizer.all_special_ids) if skip_special_tokens else set()
        self._pieces = _PIECES.setdefault(tokenizer, {True: {}, False: {}})[skip_special_tokens]
        context = list(text_context(tokenizer, prefix_ids, skip_special_tokens))
        self.text = following(self._decode, context, ids)
        self.ends: list[int] = []
        self._end = 0
        # tokens just before the window; none that have no text, after which the next one is the first of a text
        self._context: list[int] = context if context and self._decode(context) else []
        self._window: list[int] = []  # tokens whose text is incomplete
        self._position = 0  # where in `text` the window starts

    def pass_over(self, run: list[int]) -> bool:
        """Take tokens at once, if all have a known text and these are what comes next."""
        if self._window or not self._context:
            return False
        pieces = list(map(self._pieces.get, run, repeat("")))
        if not all(pieces) or not self.text.startswith("".join(pieces), self._position):
            return False
        ends = accumulate(map(len, pieces), initial=self._position)
        self.ends += list(ends)[1:]
        self._context, self._end, self._position = run[-1:], self.ends[-1], self.ends[-1]
        return True

    def add(self, token: int) -> None:
        """Take one token."""
        if self._context and not self._window and self._is_next(piece := _piece(token, self._decode, self._pieces)):
            self._context, self._end = [token], self._position + len(piece)
            self._position = self._end
        elif token not in self._silent:
            self._window.append(token)
            if len(self._window) <= _LONG_WINDOW or len(self._window).bit_count() == 1:
                self._try_to_close()
        self.ends.append(self._end)

    def _is_next(self, piece: str) -> bool:
        return bool(piece) and self.text.startswith(piece, self._position)

    def _try_to_close(self) -> None:
        new = following(self._decode, self._context, self._window)
        self._end = max(self._end, self._position + _shared_prefix(new, self.text, self._position))
        if new and self._end == self._position + len(new):
            self._context, self._window, self._position = self._window, [], self._end


def _piece(token: int, decode: Callable[[Sequence[int]], str], pieces: dict[int, str]) -> str:
    """Text of a token after another one; "" if it has none, or part of a character."""
    if token not in pieces:
        piece = decode([token, token])[len(decode([token])) :]
        pieces[token] = "" if "\ufffd" in piece else piece
    return pieces[token]


def _shared_prefix(new: str, text: str, position: int) -> int:
    """Number of leading characters of `new` which `text` has at `position`."""
    if text.startswith(new, position):
        return len(new)
    return next(i for i, char in enumerate(new) if not text.startswith(char, position + i))


def _token_cuts(
    ids: list[int], tokenizer: "PreTrainedTokenizerBase", separator: Separator, prefix_ids: Sequence[int] = ()
) -> list[tuple[int, str]]:
    """Exclusive token end and text of every step."""
    text, ends = token_ends(ids, tokenizer, prefix_ids=prefix_ids)
    # an end in characters moves right to the end of its token; this may leave white space between two ends
    moved = sorted({ends[bisect_left(ends, end)] for end in step_ends(text, separator)})
    moved = _join_blank(text, moved) or [0] * bool(ids)
    cuts = [bisect_left(ends, end) + 1 for end in moved]
    return list(zip([*cuts[:-1], len(ids)], _slices(text, moved), strict=True)) if ids else []


def _raw_ends(text: str, separator: Separator) -> list[int]:
    """Ends found by the separator alone, before white space is joined; the end of the text may be missing."""
    if isinstance(separator, str):
        if not separator:
            raise ValueError('`separator` is the empty string "": name the text that ends a step, for example "\\n"')
        return _run_ends(text, re.compile(re.escape(separator)))
    if isinstance(separator, re.Pattern):
        if not isinstance(separator.pattern, str):
            raise TypeError(f"`separator` must be a pattern for text, got one for bytes: {separator.pattern!r}")
        return _run_ends(text, separator)
    if callable(separator):
        return _checked_ends(text, separator)
    raise TypeError(
        f"`separator` must be a string, a compiled `re.Pattern` or a callable that returns the ends of the steps, got "
        f"{type(separator).__name__}: {separator!r:.80}"
    )


def _run_ends(text: str, pattern: re.Pattern[str]) -> list[int]:
    """Ends of the runs of matches: matches that touch are one run."""
    if pattern.match(""):
        raise ValueError(_zero_width(pattern))
    ends: list[int] = []
    for match in pattern.finditer(text):
        if match.start() == match.end():
            raise ValueError(_zero_width(pattern))
        if ends and match.start() == ends[-1]:
            ends[-1] = match.end()
        else:
            ends.append(match.end())
    return ends


def _zero_width(pattern: re.Pattern[str]) -> str:
    return (
        f"`separator` {pattern.pattern!r} matches the empty string: a separator must consume at least one character, "
        'for example "\\n+" instead of "\\n*"'
    )


def _checked_ends(text: str, separator: Callable[[str], Sequence[int]]) -> list[int]:
    """Ends returned by a callable separator, refused unless they are increasing offsets within the text."""
    ends = list(separator(text))
    valid = all(hasattr(end, "__index__") and not isinstance(end, bool) for end in ends)
    if not valid or any(a >= b for a, b in zip([0, *ends], [*ends, len(text) + 1], strict=True)):
        raise ValueError(
            f"`separator` {getattr(separator, '__name__', separator)!r} returned {ends!r:.200} for a text of "
            f"{len(text)} characters: it must return the exclusive ends of the steps, strictly increasing integers "
            f"from 1 to {len(text)}"
        )
    return [int(end) for end in ends]


def _join_blank(text: str, ends: list[int]) -> list[int]:
    """Drop ends so that no step is white space only: a blank piece joins the step before, the first the one after."""
    kept: list[int] = []
    for end in ends:
        if not text[kept[-1] if kept else 0 : end].isspace():
            kept.append(end)
        elif kept:
            kept[-1] = end
    return kept or ends[-1:]


def _slices(sequence: Any, ends: list[int]) -> list[Any]:
    return [sequence[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _as_list(ids: Iterable[int]) -> list[int]:
    """Ids as a list of integers; tensors and arrays have `tolist`."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids if isinstance(ids, list) else list(ids)
    if ids and not isinstance(ids[0], int):
        raise TypeError(f"`ids` must be a flat list of token ids, got {type(ids[0]).__name__} in it: {ids!r:.80}")
    return ids
