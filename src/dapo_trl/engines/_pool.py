"""
Servers that come and go: which of several are there, and what they can do.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from dapo_trl.engines._servers import Capabilities, Refusal, Server, Transport, agreed, next_server, pause


logger = logging.getLogger(__name__)

_GRACE = 10.0  # seconds that the first probe of a server may take longer than that of another one
_POLL_SECONDS = 0.05


class Pool:
    """
    Probes servers, each until that succeeds once: the first of them for the call that needs one, and as soon as some
    are known the others behind the work, now and then, so that no call waits for a server that hangs.

    Args:
        urls (sequence of `str`):
            Where the servers are.
        transport ([`~dapo_trl.engines._servers.Transport`]):
            Makes their clients.
        find_out (`Callable[[Server, Any], Awaitable[None]]`):
            Finds out the capabilities of a server with a prompt.
        first_downtime (`float`):
            Seconds to wait for a first answer.
        downtime (`float`):
            The same where servers have answered, but cannot work yet.
    """

    def __init__(
        self,
        urls: Sequence[str],
        transport: Transport,
        find_out: Callable[[Server, Any], Awaitable[None]],
        first_downtime: float,
        downtime: float,
    ) -> None:
        self._transport = transport
        self._find_out = find_out
        self._first_downtime = first_downtime
        self._downtime = downtime
        self._known: dict[str, tuple[Capabilities, list[str]]] = {}  # and the models that it lists
        self._unknown = {url: _Unknown() for url in urls}
        self._lock = threading.Lock()
        self._probing = threading.Lock()
        self._failed_probes: list[Exception] = []

    @property
    def capabilities(self) -> Capabilities | None:
        """What all servers that are known can do; None if there is none."""
        known = list(self._known.values())
        return agreed([capabilities for capabilities, _ in known]) if known else None

    async def ready(self, stack: contextlib.AsyncExitStack, prompt: Any) -> list[Server]:
        """
        The servers that are known; at least one.

        Args:
            stack (`contextlib.AsyncExitStack`):
                Closes their clients.
            prompt:
                What to probe with.

        Returns:
            `list[Server]`: they belong to the event loop of this call.

        Raises:
            ConnectionError, TimeoutError, RuntimeError, ValueError: if there is none, or one is not what it should be.
        """
        servers = []
        for url in self._unknown:
            servers.append(Server(url, await stack.enter_async_context(self._transport.client(url))))
        if not self._known:
            async with self._probed_by_one():
                if not self._known:
                    await self._wait_for_one(servers, prompt)
        ready = [server for server in servers if server.url in self._known]
        self._probe_others(prompt)
        for server in ready:
            server.capabilities, server.models = self._known[server.url]
            server.has_answered = True
        return ready

    # For the call that needs a server

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

    async def _wait_for_one(self, servers: list[Server], prompt: Any) -> None:
        begin = time.monotonic()
        while True:
            failures = await self._probe_all(servers, prompt)
            for failure in failures:
                may_pass = isinstance(failure, ConnectionError) or self._known
                if isinstance(failure, ValueError | Refusal) or not may_pass:
                    raise failure
            if self._known:
                break
            has_answered = any(server.has_answered for server in servers)
            patience = self._downtime if has_answered else self._first_downtime
            if time.monotonic() - begin >= patience:
                raise ConnectionError(
                    f"{failures[0]} No server has answered for {patience:g} seconds; set `max_downtime` to wait longer "
                    "for one that is starting."
                )
            for server in servers:
                server.rests_until = min(server.rests_until, begin + patience)
        if len(self._known) < len(servers):
            logger.warning(f"Going on with {len(self._known)} of {len(servers)} servers for now.")

    async def _probe_all(self, servers: list[Server], prompt: Any) -> list[BaseException]:
        """Probes servers until all are known or have failed, or some are known and the others take much longer."""
        begin, until = time.monotonic(), None
        pending = {asyncio.ensure_future(self._probe(server, prompt)) for server in servers}
        failures: list[BaseException] = []
        try:
            while pending:
                left = None if until is None else until - time.monotonic()
                done, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    break
                failures += [error for task in done if (error := task.exception()) is not None]
                if until is None and self._known:
                    until = time.monotonic() + max(_GRACE, time.monotonic() - begin)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        return failures

    async def _probe(self, server: Server, prompt: Any) -> None:
        try:
            await next_server([server])
            await self._find_out(server, prompt)
            self._known[server.url] = server.capabilities, server.models
        except BaseException:
            self._unknown[server.url].rest(server.is_down)
            raise

    # Behind the work

    def _probe_others(self, prompt: Any) -> None:
        """Probes servers that are not known in threads of their own, each after a rest. Nobody waits for these."""
        with self._lock:
            for url, unknown in self._unknown.items():
                if url not in self._known and unknown.may_be_probed():
                    probe = partial(self._probe_alone, url, prompt)
                    unknown.prober = threading.Thread(target=probe, name=f"probe of {url}", daemon=True)
                    unknown.prober.start()

    def _probe_alone(self, url: str, prompt: Any) -> None:
        async def probe() -> None:
            async with self._transport.client(url) as client:
                await self._probe(Server(url, client, is_down=self._unknown[url].is_down), prompt)

        try:
            asyncio.run(probe())
            logger.warning(f"{url} takes part from the next call on.")
        except ConnectionError as error:
            logger.info(f"{url} is left alone for now: {error}")
        except (ValueError, RuntimeError, TimeoutError) as error:
            logger.warning(f"{url} is left alone for now: {error}")


class _Unknown:
    """A server that was not probed with success so far."""

    def __init__(self) -> None:
        self.is_down = False
        self.prober: threading.Thread | None = None
        self._failures = 0
        self._rests_until = 0.0

    def rest(self, is_down: bool) -> None:
        """Leaves it alone for a while, longer each time."""
        self.is_down = is_down
        self._rests_until = time.monotonic() + pause(self._failures)
        self._failures += 1

    def may_be_probed(self) -> bool:
        """Whether it has rested, and nobody probes it."""
        return self._rests_until <= time.monotonic() and (self.prober is None or not self.prober.is_alive())
