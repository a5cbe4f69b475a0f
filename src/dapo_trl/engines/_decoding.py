"""
The parts of a decoding loop: what is to be drawn, the model's cache, and the draws themselves.
"""

import inspect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    DynamicCache,
    GenerationMixin,
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from dapo_trl.engines import SamplingConfig


# Shape legend: B sequences of a batch, T new tokens, V tokens of the vocabulary.


@dataclass(frozen=True)
class Draw:
    """A completion to be drawn: the number of its prefix and its own, how it starts, and its most tokens."""

    index: int
    number: int
    prefix: tuple[int, ...]
    seed: int
    limit: int


def batches(draws: Iterable[Draw], batch_size: int) -> Iterator[list[Draw]]:
    """
    Batches of draws in which equal prefixes stand together, as far as they fit into one batch.

    Long prefixes come first, so that what does not fit into memory fails at once.
    """
    groups: dict[tuple[int, ...], list[Draw]] = {}
    for draw in draws:
        groups.setdefault(draw.prefix, []).append(draw)
    batch: list[Draw] = []
    for group in sorted(groups.values(), key=lambda group: -len(group[0].prefix)):
        if batch and len(batch) + len(group) > batch_size:
            yield batch
            batch = []
        batch = batch + group
        while len(batch) >= batch_size:
            yield batch[:batch_size]
            batch = batch[batch_size:]
    if batch:
        yield batch


class Sequences:
    """
    The sequences of a batch as the model sees them: its cache, and the logits of what comes next.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model that reads the common inputs.
        batch (`list[Draw]`, length B):
            What to start from. Equal prefixes stand together, and are computed once.
        pad_token_id (`int`):
            Token that fills the space left of shorter prefixes.
        context (`int`):
            Most tokens of a sequence.

    Attributes:
        logits (`torch.Tensor` of shape `(B, V)`):
            Logits of each sequence's next token.
    """

    logits: torch.Tensor

    def __init__(self, model: Any, batch: list[Draw], pad_token_id: int, context: int) -> None:
        grouped = [(prefix, len(list(group))) for prefix, group in itertools.groupby(draw.prefix for draw in batch)]
        lengths = [len(prefix) for prefix, _ in grouped]
        self._model, self._context, self._length = model, context, max(lengths)
        input_ids = torch.tensor(
            [[pad_token_id] * (self._length - len(prefix)) + list(prefix) for prefix, _ in grouped], device=model.device
        )
        columns = torch.arange(self._length + max(draw.limit for draw in batch), device=model.device)
        padding = torch.tensor([self._length - length for length in lengths], device=model.device)
        mask = (columns >= padding[:, None]).long()
        # Batches without padding need no mask, and attention has faster kernels without one.
        self._mask = None if min(lengths) == max(lengths) else mask
        self._cache: Any = DynamicCache(config=model.config)
        plain = DynamicLayer  # and none of its subclasses, such as sliding windows
        self._cache.layers = [_RoomyLayer() if type(layer) is plain else layer for layer in self._cache.layers]
        positions = (mask[:, : self._length].cumsum(-1) - 1).clamp_(min=0)
        self._forward(input_ids, positions)
        self._positions = positions[:, -1:]
        if len(batch) > len(grouped):
            rows = np.repeat(np.arange(len(grouped)), [count for _, count in grouped])
            self.keep(torch.from_numpy(rows).to(model.device))

    def append(self, ids: torch.Tensor) -> None:
        """Add a token to each sequence; `ids` has shape `(B,)`."""
        self._length += 1
        # Sequences that have finished run on until they are left out, and may not leave the context meanwhile.
        self._positions = (self._positions + 1).clamp_(max=self._context - 1)
        self._forward(ids[:, None], self._positions)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep the sequences with these numbers, in this order and as often as they are named."""
        # Beam search depends on `reorder_cache`, so every cache has it; it takes any number of rows.
        self._cache.reorder_cache(rows)
        self.logits = self.logits[rows]
        self._positions = self._positions[rows]
        self._mask = None if self._mask is None else self._mask[rows]

    def _forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> None:
        output = self._model(
            input_ids=input_ids,
            attention_mask=None if self._mask is None else self._mask[:, : self._length],
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1]


class _RoomyLayer(DynamicLayer):
    """
    A layer of the cache with room to grow: where [`~transformers.cache_utils.DynamicLayer`] copies all keys and values
    for every token, this one does it now and then.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stores: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values, of shape `(B, heads, new tokens, size)` each; returns all there are."""
        start = self.get_seq_length()
        if start == 0:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        end = start + key_states.shape[-2]
        if not self._stores or end > self._stores[0].shape[-2]:
            # Much more room would slow attention down: it reads what is scattered over more memory.
            self._stores = [_enlarged(old, end + max(4, end // 8)) for old in (self.keys, self.values)]
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, start:end] = states
        self.keys, self.values = (store[:, :, :end] for store in self._stores)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the sequences with these numbers."""
        super().reorder_cache(beam_idx)
        self._stores = []


def _enlarged(states: Any, length: int) -> torch.Tensor:
    store = states.new_empty(*states.shape[:2], length, states.shape[3])
    store[:, :, : states.shape[2]] = states
    return store


class Picker(LogitsProcessor):
    """
    Picks the next token of each sequence by the inverse of its cumulative distribution.

    Token t of a completion comes from number t of the random stream that the completion's seed starts, whatever else
    is sampled. As a logits processor it leaves `generate`, which takes the most likely token, no other choice.

    Args:
        batch (`list[Draw]`, length B):
            Draws of the batch.
        sampling ([`~dapo_trl.engines.SamplingConfig`]):
            How to sample.
        device (`torch.device`):
            Where the logits are.
        start (`int`, *optional*, defaults to `0`):
            Length of the prefixes, for use as a logits processor.
    """

    def __init__(self, batch: list[Draw], sampling: SamplingConfig, device: torch.device, start: int = 0) -> None:
        self._start = start
        self._warpers = _warpers(sampling)
        self._uniforms_TB: torch.Tensor | None = None
        if sampling.temperature > 0:
            room = max(draw.limit for draw in batch)
            streams = [np.random.Generator(np.random.Philox(key=int(draw.seed))).random(room) for draw in batch]
            self._uniforms_TB = torch.from_numpy(np.stack(streams, axis=1)).to(device)

    def pick(self, logits_BV: torch.Tensor, step: int) -> torch.Tensor:
        """Tokens of shape `(B,)`; V stands where the logits are not numbers."""
        if self._uniforms_TB is None:
            highest, ids = logits_BV.max(dim=-1)
            return ids.masked_fill(highest.isnan(), logits_BV.shape[-1])
        scores = logits_BV.float()
        for warper in self._warpers:
            scores = warper(None, scores)
        return inverse_cdf(scores.softmax(dim=-1), self._uniforms_TB[step])

    def keep(self, rows: torch.Tensor) -> None:
        """Keep the sequences with these numbers."""
        if self._uniforms_TB is not None:
            self._uniforms_TB = self._uniforms_TB[:, rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores that are finite for the picked tokens only."""
        picked = self.pick(scores, input_ids.shape[1] - self._start)
        check_tokens(picked.cpu().numpy(), scores.shape[-1])
        return torch.full_like(scores, -torch.inf).scatter_(1, picked[:, None], 0.0)


def inverse_cdf(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """
    The first token whose cumulative probability exceeds a uniform number.

    Probabilities are counted in whole units of 2^-52, so their sums are exact in whatever order a device adds them up,
    and a token of probability zero is never drawn.

    Args:
        probs (`torch.Tensor` of shape `(B, V)`):
            Probabilities of the tokens.
        uniforms (`torch.Tensor` of shape `(B,)` and type `torch.float64`):
            Numbers in [0, 1).

    Returns:
        `torch.Tensor` of shape `(B,)`: token numbers; V where `probs` are not numbers.

    Example:

    ```python
    >>> import torch
    >>> from dapo_trl.engines._decoding import inverse_cdf

    >>> probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).expand(4, 5)
    >>> inverse_cdf(probs, torch.tensor([0.0, 0.2499, 0.25, 0.9999], dtype=torch.float64)).tolist()
    [1, 1, 3, 3]

    ```
    """
    cumulative = (probs * 2.0**52).long().cumsum_(dim=-1)
    # Below the total: an integer below 2^53 times the largest float64 below 1 is not rounded up to that integer.
    targets = (uniforms[:, None] * cumulative[:, -1:]).long()
    ids = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
    return ids.masked_fill_(probs[:, 0].isnan(), probs.shape[1])


def _warpers(sampling: SamplingConfig) -> list[Any]:
    """What changes the policy's distribution, in the order of `generate`; nothing at the default settings."""
    warpers: list[Any] = []
    if sampling.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    """Raise a `ValueError` if a token is missing because the logits were not numbers."""
    if tokens.max() >= vocab_size:
        raise ValueError(
            "The model's predictions are not numbers (NaN), so nothing can be sampled. If it runs in float16, load it "
            "in bfloat16 or float32; else check its weights."
        )


def reads_common_inputs(model: Any) -> bool:
    """Whether the model takes its inputs and a `DynamicCache` as most architectures do, so that [`Sequences`] fits."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # the model inside PEFT's
    adapter = getattr(model, "active_peft_config", None)
    common = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
    return (
        common <= set(inspect.signature(type(base).forward).parameters)
        and getattr(type(base), "prepare_inputs_for_generation", None) is GenerationMixin.prepare_inputs_for_generation
        and not getattr(adapter, "is_prompt_learning", False)
        # Where transformers keeps the list of architectures that insist on a cache class of their own.
        and base._supports_default_dynamic_cache()
    )
