"""
Sampling from servers that speak the OpenAI completions protocol: vLLM, SGLang, llama.cpp, `transformers serve`.
"""

import contextlib
import copy
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property, partial
from typing import Any
from urllib.parse import urlsplit

from transformers import PreTrainedTokenizerBase

from dapo_trl.continuations import continuation_ids, continuation_text, decoder
from dapo_trl.engines import Completion, OnCompletion, SamplingConfig, check_request, published_name, refuse_endless
from dapo_trl.engines._completions import check_room, describe_text, to_completion
from dapo_trl.engines._pool import Pool
from dapo_trl.engines._probing import Probe
from dapo_trl.engines._servers import (
    Capabilities,
    Patience,
    Server,
    Transport,
    agreed,
    extra_fields,
    gather_all,
    run_async,
)


logger = logging.getLogger(__name__)

_COUNTS = (
    "retries",
    "server_errors",
    "ids_rebuilt",
    "ids_not_round_trip",
    "prompts_as_text",
    "prompts_not_round_trip",
    "not_repeatable",
    "settings_unsaid",
)
_GARBAGE_RETRIES, _PROBE_RETRIES = 3, 4
_DOWNTIME, _FIRST_DOWNTIME = 600.0, 30.0

_caller: ContextVar[int] = ContextVar("_caller", default=0)  # thread that called `generate`; 0 in a pool's own


class _Prompt:
    """A prefix as token ids, and as the text that a server turns into these ids, as far as there is one."""

    def __init__(self, ids: Sequence[int], tokenizer: Any, on_mismatch: Callable[[], None]) -> None:
        self.ids = list(ids)
        self._tokenizer = tokenizer
        self._on_mismatch = on_mismatch

    @cached_property
    def text(self) -> str:
        # Servers put the tokenizer's own special tokens in front of a text, so one that is there already has to go.
        decode = decoder(self._tokenizer, skip_special_tokens=False)
        text, has_bos = decode(self.ids), self.ids[0] == self._tokenizer.bos_token_id
        for candidate in (text, decode(self.ids[has_bos:])):
            if list(self._tokenizer(candidate).input_ids) == self.ids:
                return candidate
        self._on_mismatch()
        return text


class OpenAIEngine:
    """
    Samples from servers that speak the OpenAI completions protocol (`/v1/completions`), all requests at once.

    Before the first completion, each server is probed with the first prefix: a dozen short requests find out its
    [`~dapo_trl.engines.openai.Capabilities`], which `capabilities` then shows. A server that does not answer then is
    probed again behind the work of the others, now and then, and takes part from the next call on.

    - vLLM and SGLang take and return token ids, so nothing is ever tokenised twice. llama.cpp takes them.
    - Otherwise the prefix is sent as text, or the ids are rebuilt from the completion's text. Both are counted, and so
      is what does not survive it (see `take_counts`). A server that strips its texts takes the space from a completion
      that begins with one.
    - Settings of the servers' own, such as a `top_k` from the model's generation config, are switched off.
    - Where seeds are honoured, each completion is a request of its own with its own seed: the prefix cache of the
      server makes that cheap, and a completion depends on nothing but its seed. Where they are not, one request asks
      for all completions of a prefix, without a seed; where the server cannot do that either, each one is asked for
      by itself.
    - `transformers serve` takes and returns text only, one completion per request. Its seed is global: completions
      repeat with `max_concurrency=1`, which costs little because it works on one request at a time anyway. Do not use
      its `--continuous-batching`, where the first request's sampling settings stay for good. A completion that ends
      exactly at `max_new_tokens` counts as cut there.
    - A server that fails is left alone for a while, longer each time, and others take over its requests. If none is
      left, the call waits for up to `max_downtime`: servers may be restarted at any time.

    Args:
        base_urls (`str` or sequence of `str`):
            Where the servers are, such as `"http://localhost:8000/v1"`. They must serve the same model.
        model (`str`):
            Name of the model at the servers.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer. Needs an `eos_token`.
        api_key (`str`, *optional*):
            Key of the servers. By default the environment variable `OPENAI_API_KEY`, if there is one.
        max_concurrency (`int`, *optional*, defaults to `64`):
            Requests under way at a time, over all servers.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds within which a request must be answered.
        max_retries (`int`, *optional*, defaults to `8`):
            How often a request is repeated after errors of the server (408, 409, 429, 5xx), lost connections and
            timeouts. Answers that cannot be read are repeated at most 3 times.
        max_context (`int`, *optional*):
            The model's context in tokens; completions are bounded by it. By default what the servers declare, if
            they do.
        max_downtime (`float`, *optional*):
            Seconds that a request waits for a server that can be reached. By default 600, but 30 as long as no server
            has ever answered.
        num_calls (`int`, *optional*, defaults to `1`):
            Calls of `generate` that may run at a time, in threads, each with its own `max_concurrency` requests. With 2
            or more, the stages work on several shards, so that the last completions of one leave no server idle.

    Raises:
        ImportError: if the package `openai` is missing.
        ValueError: if an argument is out of range, or the tokenizer has no end-of-sequence token.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from dapo_trl.engines import SamplingConfig, sample_seed
    >>> from dapo_trl.engines.openai import OpenAIEngine

    >>> tokenizer = AutoTokenizer.from_pretrained("examples/student")
    >>> engine = OpenAIEngine("http://localhost:8000/v1", "examples/student", tokenizer)
    >>> prefixes = [tokenizer("4 - 7 + 8 max 2 min 9 - 1\\n").input_ids]
    >>> seeds = [[sample_seed(0, "4 - 7", number) for number in range(2)]]
    >>> samples = engine.generate(prefixes, seeds, SamplingConfig(max_new_tokens=64))  # doctest: +SKIP

    ```
    """

    def __init__(
        self,
        base_urls: str | Sequence[str],
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        api_key: str | None = None,
        max_concurrency: int = 64,
        timeout: float = 600.0,
        max_retries: int = 8,
        max_context: int | None = None,
        max_downtime: float | None = None,
        num_calls: int = 1,
    ) -> None:
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise ImportError("`OpenAIEngine` needs the package `openai`: pip install dapo-trl[openai]") from error
        refuse_endless(tokenizer)
        for name, value, least in (
            ("max_concurrency", max_concurrency, 1),
            ("max_retries", max_retries, 0),
            ("max_downtime", max_downtime or 0, 0),
            ("num_calls", num_calls, 1),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if timeout <= 0:
            raise ValueError(f"`timeout` must be positive, got {timeout}.")
        self.base_urls = [_with_path(url) for url in ([base_urls] if isinstance(base_urls, str) else base_urls)]
        if not self.base_urls:
            raise ValueError('`base_urls` is empty. Name at least one server, such as "http://localhost:8000/v1".')
        self.model = model
        self.tokenizer: Any = tokenizer
        self._text_tokenizer: Any = copy.deepcopy(tokenizer)  # to split special tokens is a state of the tokenizer
        self.name = published_name(model)
        self.max_concurrency = max_concurrency
        self.max_context = max_context
        self.num_calls = num_calls
        self._transport = Transport(api_key or os.environ.get("OPENAI_API_KEY") or "none", timeout, self._count)
        downtime = _DOWNTIME if max_downtime is None else max_downtime
        first_downtime = _FIRST_DOWNTIME if max_downtime is None else max_downtime
        self._patience = Patience(max_retries, max_retries, _GARBAGE_RETRIES, max_retries, downtime)
        few = min(_PROBE_RETRIES, max_retries)
        self._probe_patience = Patience(max_retries, few, few, timeouts=0, downtime=0.0)
        self._pool = Pool(self.base_urls, self._transport, self._find_out, first_downtime, downtime)
        self._counts: dict[int, Counter[str]] = {}  # by the thread that called `generate`
        self._lock = threading.Lock()

    @property
    def capabilities(self) -> Capabilities | None:
        """What all servers that answered so far can do; None before the first call of `generate`."""
        return self._pool.capabilities

    def describe(self) -> dict[str, Any]:
        """
        Kind of engine, the model's name at the servers, fingerprints of the tokenizer and its chat template, and the
        end token; see [`~dapo_trl.engines.Engine`]. Servers do not say which weights are behind a name.
        """
        return {"engine": "openai", "model": self.model, **describe_text(self.tokenizer, [self.tokenizer.eos_token_id])}

    def take_counts(self) -> dict[str, int]:
        """
        Counts of this thread's calls of `generate` since the last time.

        Returns:
            `dict[str, int]`: `retries` (requests sent again), `server_errors` (answers that were errors or could not
            be read), and what the servers could not do: `ids_rebuilt` (completions whose ids come from their text),
            `ids_not_round_trip` (those among them whose ids give another text; that text is kept), `prompts_as_text`
            (completions whose prefix was sent as text), `prompts_not_round_trip` (prefixes sent as a text that gives
            other ids), `not_repeatable` (completions from a server that does not honour seeds) and `settings_unsaid`
            (from one that takes none but the protocol's own settings).
        """
        with self._lock:
            counts = self._counts.pop(threading.get_ident(), Counter())
        return {name: counts[name] for name in _COUNTS}

    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        on_completion: OnCompletion | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """
        Sample completions; see [`~dapo_trl.engines.Engine.generate`].

        Raises:
            ValueError: if `seeds` or `limits` has another length than `prefixes`, a server does not serve the model, or
                cannot do what `sampling` asks for.
            PrefixError: if a prefix is empty or leaves no room in the model's context, or its limit is below 1.
            RuntimeError: if a server refuses a request, or keeps on failing.
            TimeoutError: if requests keep on being unanswered, or the servers busy.
            ConnectionError: if no server could be reached for `max_downtime` seconds.
        """
        limits = check_request(prefixes, seeds, sampling, limits)
        mismatch = partial(self._count, "prompts_not_round_trip")
        prompts = [_Prompt(ids, self.tokenizer, mismatch) for ids in prefixes]
        if not any(seeds):
            return [[] for _ in prefixes]
        _caller.set(threading.get_ident())
        return run_async(self._generate(prompts, seeds, sampling, limits, on_completion))

    async def _generate(
        self,
        prompts: list[_Prompt],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        limits: Sequence[int],
        on_completion: OnCompletion | None,
    ) -> list[list[Completion]]:
        done: list[dict[int, Completion]] = [{} for _ in prompts]
        async with contextlib.AsyncExitStack() as stack:
            servers = await self._pool.ready(stack, prompts[0])
            capabilities = agreed([server.capabilities for server in servers])
            self._check(capabilities, sampling)
            check_room([prompt.ids for prompt in prompts], self.max_context)
            jobs = _jobs(capabilities, seeds)  # one iterator for all workers: each takes the next job

            async def work() -> None:
                for index, first, job in jobs:
                    seed, bounded = job[0] if len(job) == 1 else None, replace(sampling, max_new_tokens=limits[index])
                    body = partial(self._body, prompt=prompts[index], sampling=bounded, seed=seed, n=len(job))
                    choices, able = await self._transport.ask(servers, body, self._patience)
                    self._count_unable(able, seed, len(choices))
                    for number, choice in enumerate(choices, first):
                        done[index][number] = self._completion(prompts[index].ids, choice)
                        if on_completion is not None:
                            on_completion(done[index][number])

            await gather_all(work() for _ in range(min(self.max_concurrency, sum(map(len, seeds)))))
        return [[group[number] for number in sorted(group)] for group in done]

    def _check(self, capabilities: Capabilities, sampling: SamplingConfig) -> None:
        if sampling.top_k > 0 and not capabilities.top_k:
            raise ValueError(f"The server ignores `top_k`. Use 0 instead of {sampling.top_k}, or another server.")
        if sampling.temperature > 0 and not capabilities.varied:
            raise RuntimeError(
                "The server gives the same random completion whatever the seed, so values cannot be estimated from its "
                "completions. Start it without deterministic inference, or update it."
            )

    def _body(
        self, capabilities: Capabilities, prompt: _Prompt, sampling: SamplingConfig, seed: int | None = None, n: int = 1
    ) -> dict[str, Any]:
        room = sampling.max_new_tokens if self.max_context is None else self.max_context - len(prompt.ids)
        body = {
            "model": self.model,
            "prompt": prompt.ids if capabilities.token_prompts else prompt.text,
            "max_tokens": max(1, min(sampling.max_new_tokens, room)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "extra_body": extra_fields(capabilities.fields, sampling),
        }
        body |= {"n": n} if n > 1 else {}
        if seed is None or capabilities.fields == "unseeded":
            return body
        return body | {"seed": seed % 2**31}  # llama.cpp's seeds have 32 bits

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts.setdefault(_caller.get(), Counter())[name] += number

    def _count_unable(self, capabilities: Capabilities, seed: int | None, number: int) -> None:
        self._count("prompts_as_text", number * (not capabilities.token_prompts))
        self._count("not_repeatable", number * (seed is None or not capabilities.seeds))
        self._count("settings_unsaid", number * (capabilities.fields in ("standard", "unseeded")))

    # Completions

    def _completion(self, prefix: list[int], choice: dict[str, Any]) -> Completion:
        ids = choice.get("token_ids")
        if ids is None:
            ids, is_same = continuation_ids(self._text_tokenizer, prefix, choice["text"])
            self._count("ids_rebuilt")
            self._count("ids_not_round_trip", not is_same)
        # vLLM and SGLang name the token that ended the completion if it is another one than the tokenizer's.
        ends = (self.tokenizer.eos_token_id, choice.get("stop_reason"), choice.get("matched_stop"))
        return to_completion(self.tokenizer, prefix, ids, choice["finish_reason"], ends)

    # Probing

    async def _find_out(self, server: Server, prompt: _Prompt) -> None:
        """Finds out what the server can do. Raises ConnectionError at once if it cannot be reached."""
        models = await self._transport.list_models(server)
        server.models = [str(model["id"]) for model in models]
        declared = next((model.get("max_model_len") for model in models if model["id"] == self.model), None)
        self.max_context = min(filter(None, (self.max_context, declared)), default=None)
        check_room([prompt.ids], self.max_context)
        probe = Probe(
            server,
            self._transport,
            self._probe_patience,
            partial(self._body, prompt=prompt),
            len(prompt.ids),
            partial(continuation_text, self.tokenizer, prompt.ids),
            self.max_concurrency,
        )
        greedy = await probe.find_form()
        # `transformers serve` lists what lies in its cache, whatever it serves.
        if models and self.model not in server.models and server.capabilities.fields != "generation_config":
            raise ValueError(f"{server.url} serves {server.models}, not `model`={self.model!r}.")
        await probe.find_abilities(greedy)


def _jobs(capabilities: Capabilities, seeds: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, Sequence[int]]]:
    """Requests as (number of the prefix, number of the first completion, seeds of the completions)."""
    together = capabilities.n and not capabilities.seeds
    for index, group in enumerate(seeds):
        size = max(1, len(group)) if together else 1
        yield from ((index, first, group[first : first + size]) for first in range(0, len(group), size))


def _with_path(url: str) -> str:
    return url.rstrip("/") if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"
