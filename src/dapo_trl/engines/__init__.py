"""
Sampling back ends behind one protocol: token ids in, token ids out.
"""

from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SamplingConfig:
    """
    How completions are sampled.

    Args:
        max_new_tokens (`int`, *optional*, defaults to `1024`):
            Longest completion, in tokens. A completion that reaches it without an end is truncated.
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
            The ids decoded without special tokens.
        finish_reason (`str`):
            `"stop"` if the policy ended the completion, `"length"` if it was cut at `max_new_tokens`.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: str


class Engine(Protocol):
    """What a sampling back end offers: n completions of each prefix of token ids, the same for the same seed."""

    tokenizer: PreTrainedTokenizerBase
    name: str

    def generate(
        self, prefixes: list[list[int]], n: int, sampling: SamplingConfig, seed: int, desc: str = "Sampling"
    ) -> list[list[Completion]]:
        """
        Sample completions.

        Args:
            prefixes (`list[list[int]]`):
                Token ids to continue.
            n (`int`):
                Completions per prefix.
            sampling ([`SamplingConfig`]):
                How to sample.
            seed (`int`):
                Seed: the same call gives the same completions.
            desc (`str`, *optional*):
                Label of the progress bar.

        Returns:
            `list[list[Completion]]`: n completions for each prefix, in the order of `prefixes`.
        """
        ...
