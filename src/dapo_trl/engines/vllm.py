"""
Sampling in process with vLLM.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from dapo_trl.engines import Completion, OnCompletion, SamplingConfig, check_request, published_name, refuse_endless
from dapo_trl.engines._completions import check_room, describe_text, end_tokens, to_completion
from dapo_trl.model_identity import weights_hash


_DECISIVE = ("dtype", "revision")  # of vLLM's arguments: they decide which completions come out


class VLLMEngine:
    """
    Samples with a vLLM model in this process; prefixes are computed once, however many completions they get.

    Written for vLLM's documented interface and tested against a stand-in for it, not in every release of vLLM. Where
    vLLM runs as a server, use [`~dapo_trl.engines.openai.OpenAIEngine`].

    Args:
        model (`str`):
            Name or path of the model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`, *optional*):
            Its tokenizer, or the name or path of one. By default the one that comes with the model. Needs an
            `eos_token`.
        **engine_kwargs:
            Arguments of `vllm.LLM`, such as `tensor_parallel_size`, `gpu_memory_utilization` or `max_model_len`. The
            tokenizer is loaded with `revision`, `tokenizer_revision` and `trust_remote_code` if they are given.

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

    def __init__(
        self, model: str, tokenizer: PreTrainedTokenizerBase | str | None = None, **engine_kwargs: Any
    ) -> None:
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            raise ImportError("`VLLMEngine` needs vLLM: pip install dapo-trl[vllm]") from error
        if isinstance(tokenizer, str):
            engine_kwargs["tokenizer"] = tokenizer
        self.tokenizer: Any = tokenizer
        if tokenizer is None or isinstance(tokenizer, str):
            self.tokenizer = _load_tokenizer(model, **engine_kwargs)
        refuse_endless(self.tokenizer)
        self.name = published_name(model)
        self._model = model
        self._engine_kwargs = engine_kwargs
        self.eos_token_ids = end_tokens(self.tokenizer, _generation_config(model, engine_kwargs.get("revision")))

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
            PrefixError: if a prefix is empty or leaves no room in the model's context, or its limit is below 1.
            RuntimeError: if vLLM ends a completion in a way that is neither an end nor a cut.
        """
        limits = check_request(prefixes, seeds, sampling, limits)
        prompts = [{"prompt_token_ids": list(ids)} for ids, group in zip(prefixes, seeds, strict=True) for _ in group]
        if not prompts:
            return [[] for _ in prefixes]
        check_room(prefixes, self._context)
        settings = [
            _sampling_params(replace(sampling, max_new_tokens=limit), seed, self.eos_token_ids)
            for group, limit in zip(seeds, limits, strict=True)
            for seed in group
        ]
        requests = iter(self.llm.generate(prompts, settings, use_tqdm=False))
        completions = [
            [self._completion(ids, next(requests).outputs[0]) for _ in group]
            for ids, group in zip(prefixes, seeds, strict=True)
        ]
        for completion in (completion for group in completions for completion in group):
            if on_completion is not None:
                on_completion(completion)
        return completions

    def describe(self) -> dict[str, Any]:
        """Kind of engine, name of the model, fingerprints and end tokens; see [`~dapo_trl.engines.Engine`]."""
        described = {"engine": "vllm", "model": self.name, **describe_text(self.tokenizer, self.eos_token_ids)}
        if weights := weights_hash(self._model):  # a name on the Hub stands for itself
            described["weights"] = weights
        return described | {name: self._engine_kwargs[name] for name in _DECISIVE if name in self._engine_kwargs}

    def take_counts(self) -> dict[str, int]:
        """Nothing to report: ids go in and come out, and nothing is repeated."""
        return {}

    @property
    def _context(self) -> int | None:
        """Most tokens of a sequence, as given or as vLLM found out; None if it does not tell."""
        config = getattr(getattr(self.llm, "llm_engine", None), "model_config", None)
        context = getattr(config, "max_model_len", self._engine_kwargs.get("max_model_len"))
        return context if isinstance(context, int) else None

    def _completion(self, prefix: Sequence[int], output: Any) -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(
                f"vLLM ended a completion with the reason {output.finish_reason!r} instead of 'stop' or 'length'. "
                "Its log may say more; start again."
            )
        # vLLM names the token that ended the completion if it is another one than the tokenizer's.
        ends = (*self.eos_token_ids, output.stop_reason)
        return to_completion(self.tokenizer, prefix, output.token_ids, output.finish_reason, ends)


def _load_tokenizer(
    model: str,
    tokenizer: str | None = None,
    revision: str | None = None,
    tokenizer_revision: str | None = None,
    trust_remote_code: bool = False,
    **_: Any,
) -> Any:
    """The tokenizer that vLLM takes with these arguments."""
    revision = tokenizer_revision or (revision if tokenizer is None else None)
    return AutoTokenizer.from_pretrained(tokenizer or model, revision=revision, trust_remote_code=trust_remote_code)


def _generation_config(model: str, revision: str | None) -> GenerationConfig | None:
    """The model's generation config, if it has one."""
    try:
        return GenerationConfig.from_pretrained(model, revision=revision or "main")
    except OSError:
        return None


def _sampling_params(sampling: SamplingConfig, seed: int, ends: list[int]) -> Any:
    import vllm

    return vllm.SamplingParams(
        n=1,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or -1,
        max_tokens=sampling.max_new_tokens,
        seed=seed,
        stop_token_ids=ends,
        detokenize=False,
    )
