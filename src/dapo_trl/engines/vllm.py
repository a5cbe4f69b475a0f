"""
Sampling in process with vLLM.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub.utils.sha import sha_fileobj
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dapo_trl.engines import Completion, OnCompletion, SamplingConfig, check_request, published_name, refuse_endless
from dapo_trl.tokenization import tokenizer_fingerprint


class VLLMEngine:
    """
    Samples with a vLLM model in this process; prefixes are computed once, however many completions they get.

    Written for vLLM's documented interface and tested against a stand-in for it, not in every release of vLLM. Where
    vLLM runs as a server, use [`~dapo_trl.engines.openai.OpenAIEngine`].

    Args:
        model (`str`):
            Name or path of the model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer. By default the one that comes with the model. Needs an `eos_token`.
        **engine_kwargs:
            Arguments of `vllm.LLM`, such as `tensor_parallel_size`, `gpu_memory_utilization` or `max_model_len`.

    Raises:
        ImportError: if vLLM is missing.
        ValueError: if the tokenizer has no end-of-sequence token.

    Example:

    ```python
    >>> from dapo_trl.engines import SamplingConfig, sample_seed
    >>> from dapo_trl.engines.vllm import VLLMEngine

    >>> engine = VLLMEngine("Qwen/Qwen2.5-Math-1.5B-Instruct", max_model_len=4096)  # doctest: +SKIP
    >>> prefixes = [engine.tokenizer("1 + 1 =").input_ids]  # doctest: +SKIP
    >>> samples = engine.generate(prefixes, [[sample_seed(0, 0)]], SamplingConfig())  # doctest: +SKIP

    ```
    """

    num_calls = 1

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase | None = None, **engine_kwargs: Any) -> None:
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            raise ImportError("`VLLMEngine` needs vLLM: pip install dapo-trl[vllm]") from error
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model) if tokenizer is None else tokenizer
        refuse_endless(self.tokenizer)
        self.name = published_name(model)
        self._model = model
        self._engine_kwargs = engine_kwargs

    @cached_property
    def llm(self) -> Any:
        """The model, loaded when it is first asked for completions: a finished stage needs only its description."""
        import vllm

        return vllm.LLM(model=self._model, **{"enable_prefix_caching": True, **self._engine_kwargs})

    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        on_completion: OnCompletion | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """
        Sample completions; see [`~dapo_trl.engines.Engine.generate`]. `on_completion` is called when all are done.

        Raises:
            ValueError: if `seeds` or `limits` has another length than `prefixes`.
            PrefixError: if a prefix is empty, or its limit is below 1.
            RuntimeError: if vLLM ends a completion in a way that is neither an end nor a cut.
        """
        limits = check_request(prefixes, seeds, sampling, limits)
        prompts = [{"prompt_token_ids": list(ids)} for ids, group in zip(prefixes, seeds, strict=True) for _ in group]
        if not prompts:
            return [[] for _ in prefixes]
        settings = [
            _sampling_params(replace(sampling, max_new_tokens=limit), seed)
            for group, limit in zip(seeds, limits, strict=True)
            for seed in group
        ]
        requests = iter(self.llm.generate(prompts, settings, use_tqdm=False))
        completions = [[self._completion(next(requests).outputs[0]) for _ in group] for group in seeds]
        for completion in (completion for group in completions for completion in group):
            if on_completion is not None:
                on_completion(completion)
        return completions

    def describe(self) -> dict[str, Any]:
        """Kind of engine, name of the model, and fingerprints; see [`~dapo_trl.engines.Engine`]."""
        described = {"engine": "vllm", "model": self.name, "tokenizer": tokenizer_fingerprint(self.tokenizer)}
        if files := sorted(Path(self._model).glob("*.safetensors")):  # a name on the Hub stands for itself
            digest = hashlib.sha256(b"".join(map(_sha256, files)))
            described["weights"] = digest.hexdigest()[:16]
        return described

    def take_counts(self) -> dict[str, int]:
        """Nothing to report: ids go in and come out, and nothing is repeated."""
        return {}

    def _completion(self, output: Any) -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(
                f"vLLM ended a completion with the reason {output.finish_reason!r} instead of 'stop' or 'length'. "
                "Its log may say more; start again."
            )
        ids = list(output.token_ids)
        # vLLM names the token that ended the completion if it is another one than the tokenizer's.
        ends = (self.tokenizer.eos_token_id, output.stop_reason)
        if output.finish_reason == "stop" and (not ids or ids[-1] not in ends):
            ids.append(self.tokenizer.eos_token_id)
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Completion(tuple(ids), text, output.finish_reason)


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return sha_fileobj(file)


def _sampling_params(sampling: SamplingConfig, seed: int) -> Any:
    import vllm

    return vllm.SamplingParams(
        n=1,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or -1,
        max_tokens=sampling.max_new_tokens,
        seed=seed,
        detokenize=False,
    )
