"""
Sampling in process: one loop over tokens for a whole batch, with a seed for each completion.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from dapo_trl.engines import Completion, OnCompletion, SamplingConfig, check_request, published_name, refuse_endless
from dapo_trl.engines._completions import check_room, describe_text, end_tokens, to_completion
from dapo_trl.engines._decoding import Draw, Picker, Sequences, batches, check_tokens, reads_common_inputs
from dapo_trl.ref_logps import model_fingerprint


# Settings of `generate` that change the distribution, at the values where they do not.
_NEUTRAL = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_new_tokens": 0,
    "min_length": 0,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
}

# The cache is copied to leave finished sequences out, which pays once this share of them has finished.
_COMPACT_SHARE = 0.25


class TransformersEngine:
    """
    Samples with a transformers model in this process, in length-sorted batches.

    Completions of one prefix share its forward pass, and finished ones leave their batch. A completion depends on the
    model, its prefix, its seed and the [`~dapo_trl.engines.SamplingConfig`]; the model's own generation settings, such
    as a repetition penalty, do not apply, because values belong to the policy itself. What else is in the batch changes
    the last bits of the logits only. That changes a token when a draw falls within these bits of the border between
    two tokens: rare in float32, less so in bfloat16. The same call gives the same completions on the same machine,
    which is why the library samples in work units of fixed composition.

    A few architectures (Mamba, Bloom, Phi-3, ...) need inputs or caches of their own. They run through
    `model.generate`, more slowly, with the same draws.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, on the device where it shall run.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. Needs an `eos_token`; without a `pad_token`, the `eos_token` pads.
        batch_size (`int`, *optional*, defaults to `64`):
            Sequences generated at a time.

    Raises:
        ValueError: if the tokenizer has no end-of-sequence token, or `batch_size` is below 1.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from dapo_trl import TransformersEngine
    >>> from dapo_trl.engines import SamplingConfig

    >>> path = "examples/student"
    >>> engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path))
    >>> prefixes = [engine.tokenizer("4 - 7 + 8 max 2 min 9 - 1\\n").input_ids]
    >>> samples = engine.generate(prefixes, seeds=[[0, 1]], sampling=SamplingConfig(max_new_tokens=64))
    >>> len(samples[0]), samples[0][0].finish_reason
    (2, 'stop')

    ```
    """

    num_calls = 1

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64) -> None:
        refuse_endless(tokenizer)
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.model: Any = model  # transformers declares `generate` on a mix-in only
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.name = published_name(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        self.eos_token_ids = end_tokens(tokenizer, model.generation_config)
        self._context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        on_completion: OnCompletion | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """
        Sample one completion per seed; see [`~dapo_trl.engines.Engine.generate`].

        Raises:
            ValueError: if `seeds` or `limits` has another length than `prefixes`, or the model's predictions are not
                numbers.
            PrefixError: if a prefix is empty or leaves no room in the model's context, or its limit is below 1.
        """
        limits = check_request(prefixes, seeds, sampling, limits)
        check_room(prefixes, self._context)
        completions: list[list[Any]] = [[None] * len(group) for group in seeds]
        sample_batch = self._decode if reads_common_inputs(self.model) else self._delegate
        with _inference(self.model):
            for batch in batches(self._draws(prefixes, seeds, limits), self.batch_size):
                for draw, ids in sample_batch(batch, sampling):
                    completion = to_completion(self.tokenizer, draw.prefix, ids, "length", self.eos_token_ids)
                    completions[draw.index][draw.number] = completion
                    if on_completion is not None:
                        on_completion(completion)
        return completions

    def describe(self) -> dict[str, Any]:
        """Kind of engine, fingerprints of model and tokenizer, end tokens, and precision; see [`Engine`]."""
        return {
            "engine": "transformers",
            "model": model_fingerprint(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **describe_text(self.tokenizer, self.eos_token_ids),
        }

    def take_counts(self) -> dict[str, int]:
        """Nothing happens in this engine that its completions do not tell."""
        return {}

    def _draws(
        self, prefixes: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], limits: Sequence[int]
    ) -> Iterator[Draw]:
        for index, (prefix, group, limit) in enumerate(zip(prefixes, seeds, limits, strict=True)):
            limit = min(limit, self._context - len(prefix))
            for number, seed in enumerate(group):
                yield Draw(index, number, tuple(prefix), seed, limit)

    def _decode(self, batch: list[Draw], sampling: SamplingConfig) -> Iterator[tuple[Draw, list[int]]]:
        """Draws and their tokens, each as soon as it has ended."""
        limits = np.array([draw.limit for draw in batch])
        tokens = np.zeros((len(batch), max(limits)), dtype=np.int64)
        sequences = Sequences(self.model, batch, self.pad_token_id, self._context)
        picker = Picker(batch, sampling, sequences.logits.device)
        rows = np.arange(len(batch))  # row of the cache -> number in the batch
        running = np.ones(len(batch), dtype=bool)  # by row of the cache
        for step in range(max(limits)):
            picked = picker.pick(sequences.logits, step)
            chosen = picked.cpu().numpy()  # the only wait for the device
            check_tokens(chosen, sequences.logits.shape[-1])
            tokens[rows, step] = chosen
            ending = running & (np.isin(chosen, self.eos_token_ids) | (limits[rows] == step + 1))
            for row in rows[ending]:
                yield batch[row], tokens[row, : step + 1].tolist()
            running &= ~ending
            if not running.any():
                return
            if np.mean(running) <= 1 - _COMPACT_SHARE:
                kept = torch.from_numpy(np.flatnonzero(running)).to(picked.device)
                sequences.keep(kept)
                picker.keep(kept)
                picked, rows, running = picked[kept], rows[running], running[running]
            sequences.append(picked)

    def _delegate(self, batch: list[Draw], sampling: SamplingConfig) -> Iterator[tuple[Draw, list[int]]]:
        """The same with `model.generate`, which knows what any model needs; by length, as not all models can pad."""
        for length, group in itertools.groupby(batch, key=lambda draw: len(draw.prefix)):
            draws = list(group)
            input_ids = torch.tensor([draw.prefix for draw in draws], device=self.model.device)
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                logits_processor=LogitsProcessorList([Picker(draws, sampling, self.model.device, start=length)]),
                generation_config=self._generation_config(max(draw.limit for draw in draws)),
            )
            for draw, row in zip(draws, output[:, length:].tolist(), strict=True):
                ids = row[: draw.limit]
                ends = [position for position, token in enumerate(ids) if token in self.eos_token_ids]
                yield draw, ids[: ends[0] + 1] if ends else ids

    def _generation_config(self, max_new_tokens: int) -> GenerationConfig:
        # `generate` fills whatever is unset from the model's own generation defaults (Qwen declares a repetition
        # penalty, a top_k, ...); only what is declared is neutralised, because an explicit neutral setting costs time.
        declared = self.model.generation_config
        neutral = {name: value for name, value in _NEUTRAL.items() if getattr(declared, name, None) is not None}
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
            bos_token_id=self.model.config.get_text_config().bos_token_id,
            **neutral,
        )


@contextlib.contextmanager
def _inference(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; leaves each module in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
