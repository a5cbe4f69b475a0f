"""
Sampling back ends behind one protocol: token ids in, token ids out.
"""

import hashlib
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SamplingConfig:
    """
    How completions are sampled.

    Args:
        max_new_tokens (`int`, *optional*, defaults to `1024`):
            Longest solution, in tokens. A completion that reaches it without an end is truncated. A completion of a
            state gets what the state's steps leave of it.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; 0 means greedy decoding. Step values are defined under the policy itself, which is
            temperature 1.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus sampling: keep the most likely tokens whose probabilities sum to this.
        top_k (`int`, *optional*, defaults to `0`):
            Keep the k most likely tokens; 0 keeps all.

    Raises:
        ValueError: if a value is out of range.
    """

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}.")
        if self.temperature < 0:
            raise ValueError(f"`temperature` must be 0 (greedy) or positive, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must lie in (0, 1], got {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"`top_k` must be 0 (off) or positive, got {self.top_k}.")


@dataclass(frozen=True)
class Completion:
    """
    One sampled continuation.

    Attributes:
        ids (`tuple[int, ...]`):
            Sampled token ids. They end with the end-of-sequence token if and only if `finish_reason` is `"stop"`.
        text (`str`):
            The ids decoded without special tokens, as they read after the prefix: with the space that they begin with.
        finish_reason (`str`):
            `"stop"` if the policy ended the completion, `"length"` if it was cut at its limit.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: str


OnCompletion = Callable[[Completion], None]


class PrefixError(ValueError):
    """
    A prefix that cannot be continued.

    Args:
        index (`int`):
            Number of the prefix in the call of [`Engine.generate`].
        reason (`str`):
            What is wrong with it.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"Prefix {index} {reason}")
        self.index = index


class Engine(Protocol):
    """
    What a sampling back end offers: completions of prefixes of token ids, each drawn with a seed of its own.

    Attributes:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        name (`str`):
            Name of the model, published with the rows.
        num_calls (`int`):
            Calls of `generate` that may run at a time, in threads: 1 for a model in this process.
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    num_calls: int

    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        on_completion: OnCompletion | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """
        Sample completions.

        Args:
            prefixes (sequence of sequences of `int`, length N):
                Token ids to continue.
            seeds (sequence of sequences of `int`, length N):
                Seeds of the completions of each prefix, see [`sample_seed`]; as many as there shall be completions.
                The same call gives the same completions.
            sampling ([`SamplingConfig`]):
                How to sample.
            on_completion (`Callable[[Completion], None]`, *optional*):
                Called with every completion as it is done, in any order; for progress bars.
            limits (sequence of `int`, length N, *optional*):
                Most tokens of the completions of each prefix, in place of `sampling.max_new_tokens`.

        Returns:
            `list[list[Completion]]`: the completions of each prefix, in the order of `seeds`.

        Raises:
            PrefixError: if a prefix cannot be continued.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """
        What decides which completions come out, as JSON values: kind of engine, model and its fingerprint.

        Rows are not added to those that an engine with another description made.
        """
        ...

    def take_counts(self) -> dict[str, int]:
        """What is worth knowing about the completions since the last call, by name; such as `"retries"`."""
        ...


def refuse_endless(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Refuse a tokenizer that cannot say where a completion ends.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of an engine.

    Raises:
        ValueError: if it has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no `eos_token`, so it cannot be told where a completion ends. Set "
            "`tokenizer.eos_token` to the token that your model ends its answers with."
        )


def check_request(
    prefixes: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    limits: Sequence[int] | None,
) -> list[int]:
    """
    Refuse a request that no engine can do.

    Args:
        prefixes (sequence of sequences of `int`, length N):
            As of [`Engine.generate`], and so are the others.
        seeds (sequence of sequences of `int`, length N):
            Seeds of the completions of each prefix.
        sampling ([`SamplingConfig`]):
            How to sample.
        limits (sequence of `int`, length N, *optional*):
            Most tokens of the completions of each prefix, in place of `sampling.max_new_tokens`.

    Returns:
        `list[int]` of length N: most tokens of the completions of each prefix.

    Raises:
        ValueError: if lengths differ.
        PrefixError: if a prefix is empty, or its limit is below 1.
    """
    if len(seeds) != len(prefixes):
        raise ValueError(f"`seeds` needs one entry per prefix, got {len(seeds)} for {len(prefixes)} prefixes.")
    limits = [sampling.max_new_tokens] * len(prefixes) if limits is None else list(limits)
    if len(limits) != len(prefixes):
        raise ValueError(f"`limits` needs one entry per prefix, got {len(limits)} for {len(prefixes)} prefixes.")
    for index, (ids, limit) in enumerate(zip(prefixes, limits, strict=True)):
        if not len(ids):
            raise PrefixError(index, "is empty: there is nothing to continue.")
        if limit < 1:
            raise PrefixError(index, f"has the limit {limit}: a completion needs room for 1 token at least.")
    return limits


def published_name(model: str) -> str:
    """
    Name of a model as it may be published with rows: of a local folder, its name without the path.

    Args:
        model (`str`):
            Name or path.

    Returns:
        `str`.
    """
    return os.path.basename(os.path.normpath(model)) if os.path.isdir(model) else model


def sample_seed(*parts: Hashable) -> int:
    """
    Seed of one sample, derived from whatever identifies it, so that it depends on nothing else.

    Args:
        *parts:
            Such as the seed of the run, the problem, the state and the number of the sample. Only their `repr` counts.

    Returns:
        `int` in [0, 2^63).

    Example:

    ```python
    >>> from dapo_trl.engines import sample_seed

    >>> sample_seed(0, "problem 7", ("4 - 7 = 3",), 0) == sample_seed(0, "problem 7", ("4 - 7 = 3",), 1)
    False

    ```
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
