"""
Sampling from servers that speak the OpenAI completions protocol: vLLM, SGLang, llama.cpp, `transformers serve`.
"""

import asyncio
import contextlib
import copy
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property, partial
from typing import Any
from urllib.parse import urlsplit

from transformers import PreTrainedTokenizerBase

from dapo_trl.engines import (
    Completion,
    OnCompletion,
    PrefixError,
    SamplingConfig,
    check_request,
    published_name,
    refuse_endless,
)
from dapo_trl.engines._servers import (
    FIELDS,
    PROBE_TEMPERATURE,
    Capabilities,
    Patience,
    Server,
    Transport,
    agreed,
    extra_fields,
    gather_all,
    next_server,
    notes,
    run_async,
)
from dapo_trl.tokenization import tokenizer_fingerprint


logger = logging.getLogger(__name__)

_COUNTS = ("retries", "server_errors", "ids_rebuilt", "ids_not_round_trip", "prompts_not_round_trip")
_GARBAGE_RETRIES = 3
_PROBE_TOKENS, _PROBE_SEEDS = 32, (11, 12, 13, 14)
_POLL_SECONDS = 0.05

_caller: ContextVar[int] = ContextVar("_caller")  # thread that called `generate`


class _Prompt:
    """A prefix as token ids, and as the text that a server turns into these ids, as far as there is one."""

    def __init__(self, index: int, ids: Sequence[int], tokenizer: Any, on_mismatch: Callable[[], None]) -> None:
        self.index = index
        self.ids = list(ids)
        self._tokenizer = tokenizer
        self._on_mismatch = on_mismatch

    def check_room(self, context: int | None) -> None:
        if context is not None and len(self.ids) >= context:
            raise PrefixError(
                self.index,
                f"has {len(self.ids)} tokens and leaves no room in the model's context of {context}. Leave the problem "
                "out, or use a model with a longer context.",
            )

    @cached_property
    def text(self) -> str:
        # Servers put the tokenizer's own special tokens in front of a text, so one that is there already has to go.
        text = self._tokenizer.decode(self.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for candidate in (text, text.removeprefix(self._tokenizer.bos_token or "")):
            if list(self._tokenizer(candidate).input_ids) == self.ids:
                return candidate
        self._on_mismatch()
        return text


class OpenAIEngine:
    """
    Samples from servers that speak the OpenAI completions protocol (`/v1/completions`), all requests at once.

    Before the first completion, each server is probed with the first prefix: a dozen short requests find out its
    [`~dapo_trl.engines.openai.Capabilities`], which `capabilities` then shows.

    - vLLM and SGLang take and return token ids, so nothing is ever tokenised twice. llama.cpp takes them.
    - Otherwise the prefix is sent as text, or the ids are rebuilt from the completion's text. Both are counted, and so
      is what does not survive it (see `take_counts`).
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
        max_downtime (`float`, *optional*, defaults to `600.0`):
            Seconds that a request waits for a server that can be reached.
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
        max_downtime: float = 600.0,
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
            ("max_downtime", max_downtime, 0),
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
        self._patience = Patience(max_retries, max_retries, _GARBAGE_RETRIES, max_downtime)
        self._probe_patience = Patience(max_retries, min(2, max_retries), min(2, max_retries), 0.0)
        self._known: dict[str, tuple[Capabilities, list[str]]] = {}  # and the models that it lists
        self._counts: dict[int, Counter[str]] = {}  # by the thread that called `generate`
        self._lock = threading.Lock()
        self._probing = threading.Lock()
        self._failed_probes: list[Exception] = []

    @property
    def capabilities(self) -> Capabilities | None:
        """What all servers that answered so far can do; None before the first call of `generate`."""
        return agreed([capabilities for capabilities, _ in self._known.values()]) if self._known else None

    def describe(self) -> dict[str, Any]:
        """
        Kind of engine, the model's name at the servers and the tokenizer's fingerprint; see
        [`~dapo_trl.engines.Engine`]. Servers do not say which weights are behind a name.
        """
        return {"engine": "openai", "model": self.model, "tokenizer": tokenizer_fingerprint(self.tokenizer)}

    def take_counts(self) -> dict[str, int]:
        """
        Counts of this thread's calls of `generate` since the last time.

        Returns:
            `dict[str, int]`: `retries` (requests sent again), `server_errors` (answers that were errors or could not
            be read), `ids_rebuilt` (completions whose ids come from their text), `ids_not_round_trip` (those among
            them whose ids give another text; that text is kept) and `prompts_not_round_trip` (prefixes sent as a text
            that gives other ids).
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
        prompts = [_Prompt(index, ids, self.tokenizer, mismatch) for index, ids in enumerate(prefixes)]
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
            servers = []
            for url in self.base_urls:
                servers.append(Server(url, await stack.enter_async_context(self._transport.client(url))))
            deadline = time.monotonic() + self._patience.downtime
            async with self._probed_by_one():
                servers = await self._ready(servers, prompts[0], deadline)
            self._check(prompts, sampling)
            jobs = self._jobs(seeds)  # one iterator for all workers: each takes the next job

            async def work() -> None:
                for index, first, job in jobs:
                    seed, bounded = job[0] if len(job) == 1 else None, replace(sampling, max_new_tokens=limits[index])
                    body = partial(self._body, prompt=prompts[index], sampling=bounded, seed=seed, n=len(job))
                    choices = await self._transport.ask(servers, body, self._patience)
                    for number, choice in enumerate(choices, first):
                        done[index][number] = self._completion(choice)
                        if on_completion is not None:
                            on_completion(done[index][number])

            await gather_all(work() for _ in range(min(self.max_concurrency, sum(map(len, seeds)))))
        return [[group[number] for number in sorted(group)] for group in done]

    def _jobs(self, seeds: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, Sequence[int]]]:
        """Requests as (number of the prefix, number of the first completion, seeds of the completions)."""
        capabilities = self.capabilities or Capabilities()
        together = capabilities.n and not capabilities.seeds
        for index, group in enumerate(seeds):
            size = max(1, len(group)) if together else 1
            yield from ((index, first, group[first : first + size]) for first in range(0, len(group), size))

    def _check(self, prompts: list[_Prompt], sampling: SamplingConfig) -> None:
        capabilities = self.capabilities or Capabilities()
        if sampling.top_k > 0 and not capabilities.top_k:
            raise ValueError(f"The server ignores `top_k`. Use 0 instead of {sampling.top_k}, or another server.")
        if sampling.temperature > 0 and not capabilities.varied:
            raise RuntimeError(
                "The server gives the same random completion whatever the seed, so values cannot be estimated from its "
                "completions. Start it without deterministic inference, or update it."
            )
        for prompt in prompts:
            prompt.check_room(self.max_context)

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

    # Completions

    def _completion(self, choice: dict[str, Any]) -> Completion:
        finish_reason, ids = choice["finish_reason"], choice.get("token_ids")
        if ids is None:
            ids = self._rebuild(choice["text"])
            return self._finished(ids + [self.tokenizer.eos_token_id] * (finish_reason == "stop"), finish_reason)
        # vLLM and SGLang name the token that ended the completion if it is another one than the tokenizer's.
        ends = (self.tokenizer.eos_token_id, choice.get("stop_reason"), choice.get("matched_stop"))
        end = next((position for position, token in enumerate(ids) if token in ends), None)
        if end is not None:
            return self._finished(ids[: end + 1], "stop")
        if finish_reason == "stop" and (not ids or ids[-1] not in self.tokenizer.all_special_ids):
            ids = [*ids, self.tokenizer.eos_token_id]
        return self._finished(ids, finish_reason)

    def _rebuild(self, text: str) -> list[int]:
        """Ids of a text, in which nothing stands for a special token: servers leave those out."""
        ids = list(self._text_tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)
        ids = [token for token in ids if token != self.tokenizer.eos_token_id]
        self._count("ids_rebuilt")
        self._count("ids_not_round_trip", self._decode(ids) != text)
        return ids

    def _finished(self, ids: Sequence[int], finish_reason: str) -> Completion:
        return Completion(tuple(ids), self._decode(ids), finish_reason)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # Probing

    @contextlib.asynccontextmanager
    async def _probed_by_one(self) -> AsyncIterator[None]:
        """
        Calls in other threads wait: their probes would find out the same, and disturb each other's seeds. If the
        servers fail meanwhile, they need not find out that either.
        """
        number = len(self._failed_probes)
        while not self._probing.acquire(blocking=False):
            await asyncio.sleep(_POLL_SECONDS)
        try:
            if len(self._failed_probes) > number:
                raise self._failed_probes[-1]
            yield
        except (ConnectionError, TimeoutError, RuntimeError) as error:
            self._failed_probes.append(error)
            raise
        finally:
            self._probing.release()

    async def _ready(self, servers: list[Server], prompt: _Prompt, deadline: float) -> list[Server]:
        """The servers whose capabilities are known, after probing the others; at least one."""
        while True:
            unknown = [server for server in servers if server.url not in self._known]
            outcomes = await asyncio.gather(*(self._probe(s, prompt) for s in unknown), return_exceptions=True)
            failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
            for failure in failures:
                if not isinstance(failure, ConnectionError | TimeoutError):
                    raise failure
            ready = [server for server in servers if server.url in self._known]
            if ready:
                break
            for failure in failures:
                if isinstance(failure, TimeoutError) or time.monotonic() >= deadline:
                    raise failure
        if failures:
            logger.warning(f"Going on with {len(ready)} of {len(servers)} servers for now.")
        for server in ready:
            server.capabilities, server.models = self._known[server.url]
        return ready

    async def _probe(self, server: Server, prompt: _Prompt) -> None:
        """Finds out what the server can do. Raises ConnectionError at once if it cannot be reached."""
        await next_server([server])
        models = await self._transport.list_models(server)
        server.models = [str(model["id"]) for model in models]
        declared = next((model.get("max_model_len") for model in models if model["id"] == self.model), None)
        self.max_context = min(filter(None, (self.max_context, declared)), default=None)
        prompt.check_room(self.max_context)
        greedy = await self._probe_fields(server, prompt)
        # `transformers serve` lists what lies in its cache, whatever it serves.
        if models and self.model not in server.models and server.capabilities.fields != "generation_config":
            raise ValueError(f"{server.url} serves {server.models}, not `model`={self.model!r}.")
        sampled, seeds = await self._probe_seeds(server, prompt)
        is_constant = len(set(sampled)) == 1 and sampled[0] is not None
        capabilities = server.capabilities = replace(
            server.capabilities,
            seeds=seeds,
            varied=not is_constant or sampled[0] == greedy,
            n=await self._try(server, prompt, n=2) is not None,
            top_k=await self._try(server, prompt, top_k=1) == greedy and server.capabilities.fields != "standard",
        )
        for note in notes(capabilities, is_constant):
            logger.warning(f"{server.url} {note}")
        self._known[server.url] = capabilities, server.models

    async def _probe_fields(self, server: Server, prompt: _Prompt) -> str:
        """Finds out which forms of prompts and settings the server takes. Gives its greedy completion."""
        forms = [Capabilities(token_prompts=ids, fields=fields) for ids in (True, False) for fields in FIELDS]
        for form in forms:
            try:
                choice = await self._ask_in_form(form, server, prompt)
            except RuntimeError:
                if form == forms[0]:
                    await self._ask_in_form(forms[-1], server, prompt)  # or it is not about the form
                if form == forms[-1]:
                    raise
                continue
            read = choice.get("prompt_tokens") or len(prompt.ids)
            if read == len(prompt.ids) or not form.token_prompts:
                break
        ids, text = choice.get("token_ids"), choice["text"]
        if read != len(prompt.ids) or (ids is not None and self._decode(ids).strip() != text.strip()):
            logger.warning(
                f"{server.url} reads or writes text with other tokens: {read} instead of {len(prompt.ids)} in the "
                f"prompt, {text!r} for {ids}. Check that the tokenizer is the model's."
            )
        server.capabilities = replace(server.capabilities, token_ids=ids is not None)
        return text

    async def _ask_in_form(self, form: Capabilities, server: Server, prompt: _Prompt) -> dict[str, Any]:
        """The greedy completion, asked for as of a server with these capabilities. A form that failed needs no rest."""
        server.capabilities, server.failures, server.rests_until = form, 0, 0.0
        body = partial(self._body, prompt=prompt, sampling=SamplingConfig(_PROBE_TOKENS, temperature=0.0), seed=0)
        return (await self._transport.ask([server], body, self._probe_patience))[0]

    async def _probe_seeds(self, server: Server, prompt: _Prompt) -> tuple[list[str | None], bool]:
        """Completions, and whether they depend on their seed and on nothing but it: not on other requests either."""
        alone = [await self._try(server, prompt, seed=seed) for seed in _PROBE_SEEDS]
        at_once = asyncio.Semaphore(self.max_concurrency)

        async def beside_others(seed: int) -> str | None:
            async with at_once:
                return await self._try(server, prompt, seed=seed)

        together = await gather_all(beside_others(seed) for seed in reversed(_PROBE_SEEDS))
        return alone + together, alone == together[::-1] and len(set(alone)) > 1

    async def _try(
        self, server: Server, prompt: _Prompt, seed: int | None = None, n: int = 1, top_k: int = 0
    ) -> str | None:
        """Text of a short, hot completion, or None if the server refuses."""
        sampling = SamplingConfig(_PROBE_TOKENS, PROBE_TEMPERATURE, top_k=top_k)
        body = partial(self._body, prompt=prompt, sampling=sampling, seed=seed, n=n)
        try:
            return (await self._transport.ask([server], body, self._probe_patience))[0]["text"]
        except RuntimeError:
            return None


def _with_path(url: str) -> str:
    return url.rstrip("/") if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"
