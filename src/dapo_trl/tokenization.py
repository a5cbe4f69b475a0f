"""
Rows -> token ids, such that a trainer's context is exactly what generation saw.

Where a row carries the sampler's own ids (columns ending in `_ids`) they are used as they are; otherwise text is
tokenized in its context and cut where the steps end.
"""

import contextlib
import hashlib
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template, common_prefix_length
from trl.trainer.utils import remove_none_values

from dapo_trl.steps import token_ends


Prompt = str | list[dict[str, Any]]

# columns that a chat template is given beside the prompt
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """
    What the chat template gets of a row beside its prompt.

    Args:
        row (`Mapping`):
            Problem or row of any format. Reads `tools` (list of schemas, or the same as JSON) and
            `chat_template_kwargs` (`dict`), both optional. Entries that are null do not count: a table fills them in
            where another row has such an entry.

    Returns:
        `dict[str, Any]`: keyword arguments of [`encode_prompt`] and its like.

    Raises:
        ValueError: if `tools` is text, but not JSON, or a column is of the wrong kind.

    Example:

    ```python
    >>> from dapo_trl.tokenization import template_arguments

    >>> template_arguments({"prompt": [], "tools": None, "chat_template_kwargs": {"enable_thinking": False}})
    {'enable_thinking': False}

    ```
    """
    tools, kwargs = row.get("tools"), row.get("chat_template_kwargs") or {}
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"column `tools`: not JSON ({error}), got {tools[:80]!r}. Give a list of schemas, or that as JSON."
            ) from error
    if not isinstance(tools or [], list) or not all(isinstance(tool, Mapping) for tool in tools or []):
        raise ValueError(f"column `tools`: expected a list of schemas, got {str(tools)[:80]}. Write one dict per tool.")
    if not isinstance(kwargs, Mapping):
        raise ValueError(
            f"column `chat_template_kwargs`: expected a dict, got {str(kwargs)[:80]!r}. Write names and values."
        )
    if "tools" in kwargs:
        raise ValueError("column `chat_template_kwargs`: `tools` has a column of its own. Move it there.")
    arguments: dict[str, Any] = dict(remove_none_values(dict(kwargs)))
    if tools:
        arguments["tools"] = remove_none_values(tools)
    return arguments


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, **template_kwargs: Any) -> list[int]:
    """
    Token ids of a prompt as generation sees it.

    Args:
        prompt (`str` or `list[dict]`):
            Plain text, tokenized with the tokenizer's special tokens; or messages, rendered with the chat template and
            its generation prompt.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        **template_kwargs:
            Passed to the chat template, for example `tools`.

    Returns:
        `list[int]`: token ids.

    Raises:
        ValueError: if messages are given and the tokenizer has no chat template, or the prompt has no token.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from dapo_trl.tokenization import encode_prompt

    >>> len(encode_prompt("4 - 7\\n", AutoTokenizer.from_pretrained("examples/student")))
    4

    ```
    """
    ids = _encode_text(*render_prompt(prompt, tokenizer, **template_kwargs), tokenizer)
    if not ids:
        raise ValueError(
            f"The prompt {prompt!r} has no token. Add a `bos_token` to the tokenizer or text to the prompt."
        )
    return ids


def encode_solution(
    prompt: Prompt, steps: Sequence[str], tokenizer: PreTrainedTokenizerBase, ended: bool = True, **template_kwargs: Any
) -> tuple[list[int], list[list[int]]]:
    """
    Token ids of a prompt and of the steps that follow it.

    Args:
        prompt (`str` or `list[dict]`):
            The prompt, plain or conversational.
        steps (sequence of `str`, length K):
            Exact text of the steps, separators included.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        ended (`bool`, *optional*, defaults to `True`):
            Whether the policy ended its solution after the last step: its end-of-sequence token then belongs to that
            step.
        **template_kwargs:
            Passed to the chat template.

    Returns:
        `tuple[list[int], list[list[int]]]`: ids of the context, and of each of the K steps.

    Raises:
        ValueError: if two steps end within one token, so that one of them would have none.
    """
    text, is_rendered = render_prompt(prompt, tokenizer, **template_kwargs)
    prompt_ids = _encode_text(text, is_rendered, tokenizer)
    full_text = text + "".join(steps)
    full_ids = _encode_text(full_text, is_rendered, tokenizer)
    starts = _token_starts(full_text, full_ids, is_rendered, tokenizer)
    cuts = [common_prefix_length(prompt_ids, full_ids)]
    for step, end in zip(steps, accumulate(map(len, steps), initial=len(text)), strict=False):
        cuts.append(max(cuts[0], bisect_left(starts, end + len(step))))
        if cuts[-1] == cuts[-2]:
            raise ValueError(f"The step {step!r} has no token of its own: join it with a neighbour.")
    cuts[-1] = len(full_ids)
    steps_ids = [full_ids[start:end] for start, end in pairwise(cuts)]
    if ended:
        steps_ids[-1] = _with_eos(steps_ids[-1], tokenizer)
    return full_ids[: cuts[0]], steps_ids


def encode_state(
    prompt: Prompt,
    prefix: Sequence[str],
    candidates: Sequence[str],
    ended: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
    **template_kwargs: Any,
) -> tuple[list[int], list[list[int]]]:
    """
    Token ids of a state and of the candidate steps that may follow it.

    Args:
        prompt (`str` or `list[dict]`):
            The prompt, plain or conversational.
        prefix (sequence of `str`):
            Exact text of the steps taken so far.
        candidates (sequence of `str`, length C):
            Exact text of the candidate next steps.
        ended (sequence of `bool`, length C):
            Whether each candidate ends the solution, that is, is followed by the end-of-sequence token.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        **template_kwargs:
            Passed to the chat template.

    Returns:
        `tuple[list[int], list[list[int]]]`: ids of the state, and of each of the C candidates. Where a tokenizer merges
        characters across their boundary, the state is what all of them have in common.
    """
    text, is_rendered = render_prompt(prompt, tokenizer, **template_kwargs)
    text += "".join(prefix)
    state_ids = _encode_text(text, is_rendered, tokenizer)
    full_ids = [_encode_text(text + candidate, is_rendered, tokenizer) for candidate in candidates]
    start = min(common_prefix_length(state_ids, ids) for ids in full_ids)
    candidates_ids = [ids[start:] for ids in full_ids]
    return state_ids[:start], [
        _with_eos(ids, tokenizer) if end else ids for ids, end in zip(candidates_ids, ended, strict=True)
    ]


def encode_preference(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **template_kwargs: Any
) -> tuple[list[int], list[list[int]]]:
    """
    Token ids of a TRL preference row, as `DPOTrainer` encodes it: the prompt, and the chosen and rejected completions.

    Args:
        row (`dict`):
            `prompt`, `chosen` and `rejected`, all text or all messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        **template_kwargs:
            Passed to the chat template.

    Returns:
        `tuple[list[int], list[list[int]]]`: ids of the prompt, and of the two completions, each with its end token.
        What the chat template writes after an assistant message belongs to the completion.

    Raises:
        ValueError: if the chat template renders the prompt differently when an answer follows: the context would not be
            what generation sees.
    """
    if isinstance(row["prompt"], str):
        return encode_state(row["prompt"], [], [row["chosen"], row["rejected"]], [True, True], tokenizer)
    generated_from, _ = render_prompt(row["prompt"], tokenizer, **template_kwargs)
    messages = {name: _messages(row[name]) for name in ("prompt", "chosen", "rejected")}
    text = apply_chat_template(messages, tokenizer, **template_kwargs)
    if text["prompt"] != generated_from:  # TRL takes what they have in common
        size = len(text["prompt"])
        followed = next(
            text[name] for name in ("chosen", "rejected") if not text[name].startswith(generated_from[size:])
        )
        raise ValueError(
            "column `prompt`: the chat template renders it differently when an answer follows. After "
            f"{text['prompt'][-40:]!r} generation sees {generated_from[size:][:40]!r}, but with the answer it reads "
            f"{followed[:40]!r}. Use a chat template that keeps the prompt as it is, or give the rendered prompt and "
            "the answers as text."
        )
    prompt_ids = _encode_text(text["prompt"], True, tokenizer)
    full_ids = [_encode_text(text["prompt"] + text[name], True, tokenizer) for name in ("chosen", "rejected")]
    start = min(common_prefix_length(prompt_ids, ids) for ids in full_ids)
    return prompt_ids[:start], [ids[start:] for ids in full_ids]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Short hash of what a tokenizer maps to what: equal fingerprints mean that ids can be exchanged.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.

    Returns:
        `str`: 16 hexadecimal digits of the SHA-256 of its sorted vocabulary.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]


def end_written_by_template(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, **template_kwargs: Any) -> str | None:
    """
    What the chat template writes after an answer, where that is not the token that ends a solution here.

    Args:
        prompt (`str` or `list[dict]`):
            The prompt, plain or conversational.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        **template_kwargs:
            Passed to the chat template.

    Returns:
        `str` or `None`: the text, without the tokenizer's `eos_token`; `None` if that is in it, if it is blank, or if
        the template does not say.
    """
    if isinstance(prompt, str) or tokenizer.chat_template is None or prompt[-1]["role"] not in ("user", "tool"):
        return None
    answer = "So the answer is 7."
    messages = [*_messages(prompt), {"role": "assistant", "content": answer}]
    with contextlib.suppress(TemplateError):  # a template may object to such an answer
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs))
        _, found, end = text.rpartition(answer)
        return end if found and end.strip() and tokenizer.eos_token not in end else None
    return None


def render_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, **template_kwargs: Any) -> tuple[str, bool]:
    """
    Text of a prompt as generation sees it.

    Args:
        prompt (`str` or `list[dict]`):
            The prompt, plain or conversational.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        **template_kwargs:
            Passed to the chat template.

    Returns:
        `tuple[str, bool]`: the text, and whether a chat template made it: then it holds its special tokens already.

    Raises:
        ValueError: if the prompt is conversational and there is no chat template.
    """
    if isinstance(prompt, str):
        return prompt, False
    if tokenizer.chat_template is None:
        raise ValueError(
            "The prompt is conversational, but the tokenizer has no chat template. Set `tokenizer.chat_template`, or "
            "give the prompt as plain text."
        )
    return apply_chat_template({"prompt": _messages(prompt)}, tokenizer, **template_kwargs)["prompt"], True


def _messages(prompt: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages without the entries that a table filled in because another message has them."""
    filled = [remove_none_values(dict(message)) for message in prompt]
    return [
        {name: own.get(name) for name in message if name in own or name == "content"}
        for message, own in zip(prompt, filled, strict=True)
    ]


def _encode_text(text: str, is_rendered: bool, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = tokenizer(text, add_special_tokens=not is_rendered).input_ids
    # Some tokenizers close every text with their end token. Here the text goes on.
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token) else ids


def _token_starts(text: str, ids: list[int], is_rendered: bool, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Character at which each token starts, non-decreasing; a token that straddles the end of a step starts before it.
    """
    if tokenizer.is_fast:
        offsets = tokenizer(text, add_special_tokens=not is_rendered, return_offsets_mapping=True).offset_mapping
        return [start for start, _ in offsets[: len(ids)]]
    decoded, ends = token_ends(ids, tokenizer, skip_special_tokens=False)
    if decoded != text:
        raise ValueError(
            f"{type(tokenizer).__name__} reports no offsets and does not give back the text it encoded, so steps "
            "cannot be located in its tokens. Use a fast tokenizer, or give the sampler's ids (`prompt_ids`, "
            "`completions_ids`)."
        )
    return [0, *ends[:-1]]


def _with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
