"""
What all engines do before and after sampling: prefixes are checked, and ids become completions.
"""

import hashlib
from collections.abc import Collection, Sequence
from typing import Any

from dapo_trl.continuations import continuation_text
from dapo_trl.engines import Completion, PrefixError
from dapo_trl.tokenization import tokenizer_fingerprint


def check_room(prefixes: Sequence[Sequence[int]], context: int | None) -> None:
    """
    Refuse prefixes that fill the model's context.

    Args:
        prefixes (sequence of sequences of `int`):
            Token ids to continue.
        context (`int` or `None`):
            Most tokens of a sequence; `None` if it is not known.

    Raises:
        PrefixError: if a prefix leaves no room.
    """
    for index, ids in enumerate(prefixes):
        if context is not None and len(ids) >= context:
            raise PrefixError(
                index,
                f"has {len(ids)} tokens and leaves no room in the model's context of {context}. Leave the problem "
                "out, or use a model with a longer context.",
            )


def to_completion(
    tokenizer: Any, prefix_ids: Sequence[int], ids: Sequence[int], finish_reason: str, ends: Collection[Any]
) -> Completion:
    """
    A completion that ends with an end token if and only if it stopped, whatever the back end says and leaves out.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        prefix_ids (sequence of `int`):
            What it continues.
        ids (sequence of `int`):
            Sampled ids; cut after the first end token. If there is none after a stop, the tokenizer's is added, unless
            another special token stands there.
        finish_reason (`str`):
            `"stop"` or `"length"`, as the back end says.
        ends (collection of `int`):
            End tokens; anything else in it is ignored.

    Returns:
        [`~dapo_trl.engines.Completion`].
    """
    ids = list(ids)
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    if end is not None:
        ids, finish_reason = ids[: end + 1], "stop"
    elif finish_reason == "stop" and (not ids or ids[-1] not in tokenizer.all_special_ids):
        ids.append(tokenizer.eos_token_id)
    return Completion(tuple(ids), continuation_text(tokenizer, prefix_ids, ids), finish_reason)


def end_tokens(tokenizer: Any, config: Any = None) -> list[int]:
    """
    The tokenizer's end token and every one the model's generation config declares: chat models often have two.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        config ([`~transformers.GenerationConfig`], *optional*):
            The model's generation config.

    Returns:
        `list[int]`.
    """
    declared = getattr(config, "eos_token_id", None)
    declared = [] if declared is None else declared if isinstance(declared, list) else [declared]
    return sorted({tokenizer.eos_token_id, *declared})


def describe_text(tokenizer: Any, ends: Collection[int]) -> dict[str, Any]:
    """
    What decides which ids a prompt has and where completions end, for [`~dapo_trl.engines.Engine.describe`].

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        ends (collection of `int`):
            End tokens.

    Returns:
        `dict`: fingerprints of the vocabulary (`tokenizer`) and of the `chat_template`, and the `end_tokens`.
    """
    template = getattr(tokenizer, "chat_template", None)
    return {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": template and hashlib.sha256(repr(template).encode()).hexdigest()[:16],
        "end_tokens": sorted(ends),
    }
