"""
Sampling in process with `model.generate`.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dapo_trl.engines import Completion, SamplingConfig


# Settings that change the distribution, at the values where they do not.
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
}


class TransformersEngine:
    """
    Samples with a transformers model in this process, in length-sorted batches.

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
    >>> samples = engine.generate(prefixes, n=2, sampling=SamplingConfig(max_new_tokens=64), seed=0)
    >>> len(samples[0]), samples[0][0].finish_reason
    (2, 'stop')

    ```
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "The tokenizer has no `eos_token`, so it cannot be told where a completion ends. Set "
                "`tokenizer.eos_token` to the token that your model ends its answers with."
            )
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.model: Any = model  # transformers declares `generate` on a mix-in only
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        path = getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.name = os.path.basename(os.path.normpath(path)) if os.path.isdir(path) else path  # rows get published
        self.eos_token_ids = _eos_token_ids(model, tokenizer)
        self._context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def generate(
        self, prefixes: list[list[int]], n: int, sampling: SamplingConfig, seed: int, desc: str = "Sampling"
    ) -> list[list[Completion]]:
        """
        Sample `n` completions of each prefix; see [`~dapo_trl.engines.Engine.generate`].

        Raises:
            ValueError: if `n` is below 1, or a prefix is empty or leaves no room in the model's context.
        """
        if n < 1:
            raise ValueError(f"`n` must be at least 1, got {n}.")
        self._check_prefixes(prefixes)
        requests = sorted(
            (index for index in range(len(prefixes)) for _ in range(n)), key=lambda index: len(prefixes[index])
        )
        completions: list[list[Completion]] = [[] for _ in prefixes]
        with _inference(self.model), tqdm(total=len(requests), desc=desc, unit="sample") as progress:
            for start in range(0, len(requests), self.batch_size):
                batch = requests[start : start + self.batch_size]
                torch.manual_seed(_derive_seed(seed, start))
                for index, ids in zip(batch, self._generate_batch([prefixes[i] for i in batch], sampling), strict=True):
                    completions[index].append(self._completion(ids))
                progress.update(len(batch))
        return completions

    def _generate_batch(self, prefixes: list[list[int]], sampling: SamplingConfig) -> list[list[int]]:
        longest = max(map(len, prefixes))
        input_ids = [[self.pad_token_id] * (longest - len(ids)) + ids for ids in prefixes]
        attention_mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prefixes]
        output = self.model.generate(
            input_ids=torch.tensor(input_ids, device=self.model.device),
            attention_mask=torch.tensor(attention_mask, device=self.model.device),
            generation_config=self._generation_config(sampling, room=self._context - longest),
        )
        return output[:, longest:].tolist()

    def _generation_config(self, sampling: SamplingConfig, room: int) -> GenerationConfig:
        # `generate` fills whatever is unset from the model's own generation defaults (Qwen declares a repetition
        # penalty, a top_k, ...). Values belong to the policy itself, so these are neutralised; only what is declared,
        # because an explicit neutral setting still costs time in every step.
        declared = self.model.generation_config
        neutral = {name: value for name, value in _NEUTRAL.items() if getattr(declared, name, None) is not None}
        warpers = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}  # greedy: not used, and what raises no warning
        if sampling.temperature > 0:
            warpers = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        return GenerationConfig(
            do_sample=sampling.temperature > 0,
            max_new_tokens=min(sampling.max_new_tokens, room),
            eos_token_id=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
            bos_token_id=self.model.config.get_text_config().bos_token_id,
            **{**neutral, **warpers},
        )

    def _completion(self, ids: list[int]) -> Completion:
        ends = [position for position, token in enumerate(ids) if token in self.eos_token_ids]
        ids = ids[: ends[0] + 1] if ends else ids
        text: Any = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Completion(tuple(ids), text, "stop" if ends else "length")

    def _check_prefixes(self, prefixes: list[list[int]]) -> None:
        for index, ids in enumerate(prefixes):
            if not ids:
                raise ValueError(f"Prefix {index} is empty: there is nothing to continue.")
            if len(ids) >= self._context:
                raise ValueError(
                    f"Prefix {index} has {len(ids)} tokens and leaves no room in the model's context of "
                    f"{self._context}. Leave the problem out, or use a model with a longer context."
                )


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token and every one the model's generation config declares (chat models often have two)."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    declared = [] if declared is None else declared if isinstance(declared, list) else [declared]
    return sorted({tokenizer.eos_token_id, *declared})


def _derive_seed(seed: int, start: int) -> int:
    digest = hashlib.sha256(f"{seed}:{start}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextlib.contextmanager
def _inference(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; leaves the caller's random state and training mode as they were."""
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        model.train(was_training)
