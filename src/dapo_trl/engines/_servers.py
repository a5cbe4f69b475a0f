"""
Servers of the OpenAI completions protocol: what they can do, requests to them, repeated where that helps.
"""

import asyncio
import contextlib
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from dapo_trl.engines import SamplingConfig


logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds; doubled with every failure
_CONNECT_TIMEOUT = 10.0
_LIST_TIMEOUT = 10.0
_STARTING = {502, 503, 504}  # a proxy without its server, or a server that still loads its model
_BUSY = {408, 409, 429}

FIELDS = ("extended", "generation_config", "standard", "unseeded")  # see `Capabilities.fields`, best first

_jitter = random.Random()


@dataclass(frozen=True)
class Capabilities:
    """
    What a server turned out to do; with several servers, what all of them do.

    Attributes:
        token_prompts (`bool`):
            Takes prompts as token ids. Otherwise they are sent as text.
        token_ids (`bool`):
            Returns the sampled token ids. Otherwise they are rebuilt from the text.
        n (`bool`):
            Returns several completions per request.
        seeds (`bool`):
            A seed gives the same completion again, also with other requests under way.
        varied (`bool`):
            Completions with different seeds differ, or are the greedy one, as those of a model that is sure of itself.
        top_k (`bool`):
            Follows `top_k`.
        fields (`str`):
            How further settings are passed: `"extended"` (vLLM, SGLang, llama.cpp), `"generation_config"`
            (`transformers serve`), `"standard"`: not at all, so that settings of the server's own may be at work, or
            `"unseeded"`: not even the seed.
    """

    token_prompts: bool = False
    token_ids: bool = False
    n: bool = False
    seeds: bool = False
    varied: bool = False
    top_k: bool = False
    fields: str = "standard"


def agreed(capabilities: Sequence[Capabilities]) -> Capabilities:
    """What all of several servers can do."""
    settings = [asdict(one) for one in capabilities]
    common: dict[str, Any] = {name: all(setting[name] for setting in settings) for name in settings[0]}
    fields = {one.fields for one in capabilities}
    common["fields"] = fields.pop() if len(fields) == 1 else "standard"
    return Capabilities(**common)


def extra_fields(fields: str, sampling: SamplingConfig) -> dict[str, Any]:
    """Settings that the protocol lacks, said in full: what is not said, servers fill from the model's configuration."""
    if fields == "extended":
        return {"top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
    if fields != "generation_config":
        return {}
    settings: dict[str, Any] = {"do_sample": sampling.temperature > 0, "repetition_penalty": 1.0}
    if sampling.temperature > 0:
        settings |= {"top_k": sampling.top_k, "min_p": 0.0, "typical_p": 1.0}
    return {"generation_config": json.dumps(settings)}


class Refusal(RuntimeError):
    """A server does not do what was asked for; another form of the request may do."""


class Failure(Exception):
    """
    An answer that did not come, or was of no use; another try may do better.

    Args:
        kind (`str`):
            `"unreachable"`, `"lost"` (the connection), `"timeout"`, `"busy"`, `"error"` or `"garbage"`.
        reason (`str`):
            What happened.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Patience:
    """
    When to give up a request.

    Args:
        retries (`int`):
            How often it is repeated because the server was busy or the connection was lost, and in all.
        errors (`int`):
            How often it is repeated after errors and timeouts.
        garbage (`int`):
            How often it is repeated after answers that cannot be read.
        timeouts (`int`):
            How often it is repeated after timeouts.
        downtime (`float`):
            Seconds for which it waits for servers that can be reached.
    """

    retries: int
    errors: int
    garbage: int
    timeouts: int
    downtime: float

    def is_over(self, failures: Counter[str], waited: float, is_reachable: bool) -> bool:
        """Whether to give up after failures of these kinds."""
        if not is_reachable:
            return waited >= self.downtime
        return (
            failures.total() - failures["unreachable"] > self.retries
            or failures["error"] + failures["timeout"] > self.errors
            or failures["garbage"] > self.garbage
            or failures["timeout"] > self.timeouts
        )


@dataclass
class Server:
    """One server, while a call of `generate` lasts."""

    url: str
    client: Any
    capabilities: Capabilities = field(default_factory=Capabilities)
    models: list[str] = field(default_factory=list)
    in_flight: int = 0
    failures: int = 0
    rests_until: float = 0.0
    is_down: bool = False
    has_answered: bool = False
    told: set[str] = field(default_factory=set)

    def rest(self, failure: Failure) -> None:
        """Leaves the server alone for a while, longer each time. Requests that fail together count once."""
        if time.monotonic() >= self.rests_until:
            self.rests_until = time.monotonic() + pause(self.failures)
            self.failures += 1
        if failure.kind == "unreachable" and not self.is_down:
            self.is_down = True
            hope = "until it is back" if self.has_answered else "for a while; check the address, and that it runs"
            logger.warning(f"Cannot reach {self.url} ({failure}). Trying again {hope}.")
        elif failure.kind in ("error", "garbage", "timeout") and failure.kind not in self.told:
            self.told.add(failure.kind)
            logger.warning(f"{self.url} fails: {failure}. Asking again a few times.")

    def recover(self) -> None:
        """It answered."""
        if self.is_down:
            logger.warning(f"{self.url} is back.")
        self.failures, self.is_down = 0, False


class Transport:
    """
    Sends requests.

    Args:
        api_key (`str`):
            Key of the servers.
        timeout (`float`):
            Seconds within which a request must be answered.
        count (`Callable[[str], None]`):
            Called with what is to be counted: `"retries"`, `"server_errors"`.
    """

    def __init__(self, api_key: str, timeout: float, count: Callable[[str], None]) -> None:
        self.api_key = api_key
        self.timeout = timeout
        self._count = count

    def client(self, url: str) -> Any:
        """A client, which belongs to the event loop that uses it first."""
        import openai

        timeout = openai.Timeout(self.timeout, connect=min(self.timeout, _CONNECT_TIMEOUT))
        return openai.AsyncOpenAI(base_url=url, api_key=self.api_key, timeout=timeout, max_retries=0)

    async def ask(
        self, servers: Sequence[Server], body: Callable[[Capabilities], dict[str, Any]], patience: Patience
    ) -> tuple[list[dict[str, Any]], Capabilities]:
        """
        Completions from the server with the least to do; tried again, at any server, until patience is at an end.

        Args:
            servers (sequence of [`Server`]):
                Where to ask.
            body (`Callable[[Capabilities], dict]`):
                Arguments of the request for a server with these capabilities.
            patience ([`Patience`]):
                When to give up.

        Returns:
            `tuple[list[dict], Capabilities]`: the choices, as many as asked for, each with the number of
            `prompt_tokens` if the server tells; and what the server that gave them can do.

        Raises:
            RuntimeError, TimeoutError, ConnectionError: see [`~dapo_trl.engines.openai.OpenAIEngine.generate`].
        """
        since, failures = None, Counter[str]()
        while True:
            server = await next_server(servers)
            request = body(server.capabilities)
            try:
                answer = await self._send(server, server.client.completions.with_raw_response.create, **request)
                choices = _read_choices(answer, request.get("n", 1))
            except Failure as failure:
                server.rest(failure)
                logger.info(f"{server.url}, {failure.kind}: {failure}")
                # How long nothing could be reached; what took its time before is another matter.
                since = (since or time.monotonic()) if failure.kind == "unreachable" else None
                failures[failure.kind] += 1
                if failure.kind in ("busy", "error", "garbage"):
                    self._count("server_errors")
                if patience.is_over(failures, time.monotonic() - (since or 0.0), since is None):
                    raise _given_up(server, failure, failures.total()) from failure
                self._count("retries")
                if failure.kind != "unreachable":
                    await asyncio.sleep(pause(failures.total() - failures["unreachable"] - 1))
            else:
                server.recover()
                return choices, server.capabilities

    async def list_models(self, server: Server) -> list[dict[str, Any]]:
        """What the server says about its models; nothing if it has no such endpoint."""
        try:
            answer = await self._send(server, server.client.models.with_raw_response.list, timeout=_LIST_TIMEOUT)
        except Failure as failure:
            if failure.kind == "unreachable":
                server.rest(failure)
                raise _given_up(server, failure, 1) from failure
            return []
        except RuntimeError:
            return []
        return [model for model in answer.get("data") or [] if isinstance(model, dict) and "id" in model]

    async def _send(
        self, server: Server, call: Callable[..., Awaitable[Any]], timeout: float | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """One request. Raises `Failure` where another try may help, RuntimeError where none will."""
        import openai

        server.in_flight += 1
        limit = min(self.timeout, timeout or self.timeout)
        try:
            async with asyncio.timeout(limit):  # the client's own limits each operation on the connection
                text = (await call(**kwargs)).http_response.text
        except openai.APIStatusError as error:
            server.has_answered = True
            raise _status_failure(server, error.status_code, error.response.text) from error
        except (openai.APITimeoutError, openai.APIConnectionError, TimeoutError) as error:
            cause = error.__cause__ or error
            if type(cause).__name__ in ("ConnectError", "ConnectTimeout"):
                raise Failure("unreachable", f"{type(cause).__name__}: {cause}") from error
            if isinstance(error, openai.APITimeoutError | TimeoutError):
                raise Failure("timeout", f"no answer within {limit:g} seconds") from error
            raise Failure("lost", f"the connection was lost ({type(cause).__name__}: {cause})") from error
        finally:
            server.in_flight -= 1
        server.has_answered = True
        with contextlib.suppress(ValueError):
            answer = json.loads(text)
            if isinstance(answer, dict):
                return answer
        raise Failure("garbage", f"not a JSON object, but {text[:200]!r}")


def _status_failure(server: Server, status: int, text: str) -> Exception:
    said = f"status {status}, {text[:500]}"
    if status in _STARTING:
        return Failure("unreachable", said)
    if status in _BUSY:
        return Failure("busy", said)
    if status >= 500:
        return Failure("error", said)
    cure = "Check `model` and the settings; if the prompt is too long, set `max_context`."
    if status in (401, 403):
        cure = "Check `api_key`, or the environment variable `OPENAI_API_KEY`."
    elif status in (404, 405):
        cure = f"Check `base_urls`, which usually end in /v1, and `model`; the server lists {server.models}."
    kind = RuntimeError if status in (401, 403, 404, 405) else Refusal
    return kind(f"{server.url} refuses a request: {said}. {cure}")


def _read_choices(answer: dict[str, Any], n: int) -> list[dict[str, Any]]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices:
        raise _garbage("no `choices`", answer)
    if len(choices) < n:
        raise Refusal(f"The server gives {len(choices)} completions where {n} were asked for.")
    for choice in choices:
        if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
            raise _garbage("a choice without `text`", choice)
        if choice.get("finish_reason") not in ("stop", "length"):
            raise _garbage('a `finish_reason` other than "stop" and "length"', choice)
        ids = choice.get("token_ids", [])
        if ids is not None and not (isinstance(ids, list) and all(isinstance(token, int) for token in ids)):
            raise _garbage("`token_ids` that are not a list of numbers", choice)
    usage = answer.get("usage")
    read = {"prompt_tokens": usage.get("prompt_tokens")} if isinstance(usage, dict) else {}
    return [choice | read for choice in choices[:n]]


def _garbage(what: str, answer: Any) -> Failure:
    return Failure("garbage", f"{what} in {json.dumps(answer)[:200]}")


def _given_up(server: Server, failure: Failure, attempts: int) -> Exception:
    error: type[Exception]
    error, cure = {
        "unreachable": (ConnectionError, "Check `base_urls` (`server_urls` of a recipe), and that the server runs."),
        "lost": (ConnectionError, "The server's log may say more."),
        "timeout": (TimeoutError, "Raise `timeout`, or lower `max_concurrency`."),
        "busy": (TimeoutError, "Raise `max_retries`, or lower `max_concurrency`."),
        "error": (RuntimeError, "The server's log may say more. If this passes by itself, raise `max_retries`."),
        "garbage": (
            RuntimeError,
            "Check that `base_urls` lead to the completions of a model server; they usually end in /v1.",
        ),
    }[failure.kind]
    return error(f"Gave up on {server.url} after {attempts} attempts: {failure}. {cure}")


def pause(failures: int) -> float:
    """Seconds to wait after so many failures before; doubled each time, and never the same for all."""
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(failures, 16)) * _jitter.uniform(0.5, 1.5)


async def next_server(servers: Sequence[Server]) -> Server:
    """The server with the fewest requests, of those that are not left alone; waits for one if need be."""
    while True:
        now = time.monotonic()
        ready = [server for server in servers if server.rests_until <= now]
        if ready:
            return min(ready, key=lambda server: server.in_flight)
        await asyncio.sleep(min(server.rests_until for server in servers) - now)


async def gather_all(coroutines: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Like `asyncio.gather`, but the first error ends the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run_async(main: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine to its end; where a loop is running already, as in a notebook, in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main)
    loop = asyncio.new_event_loop()
    task = loop.create_task(main)
    with contextlib.closing(loop), ThreadPoolExecutor(1) as executor:
        try:
            return executor.submit(loop.run_until_complete, task).result()
        except BaseException:  # an interrupt, too, must end it
            loop.call_soon_threadsafe(task.cancel)
            raise
