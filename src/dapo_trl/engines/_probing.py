"""
What a server can do, found out by a dozen short requests.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dapo_trl.engines import SamplingConfig
from dapo_trl.engines._servers import FIELDS, Capabilities, Patience, Refusal, Server, Transport, gather_all


logger = logging.getLogger(__name__)

# How a server may be asked, best first. The last is the plainest.
FORMS = [Capabilities(token_prompts=ids, fields=fields) for ids in (True, False) for fields in FIELDS]

_TOKENS, _SEEDS, _TEMPERATURE = 32, (11, 12, 13, 14), 2.0

Choice = dict[str, Any]


@dataclass
class Probe:
    """
    The requests to one server.

    Args:
        server ([`~dapo_trl.engines._servers.Server`]):
            The server; it gets the capabilities that are found.
        transport ([`~dapo_trl.engines._servers.Transport`]):
            Sends requests.
        patience ([`~dapo_trl.engines._servers.Patience`]):
            When to give up a request.
        body (`Callable[..., dict]`):
            Arguments of a request with the prefix, from `capabilities`, `sampling`, `seed` and `n`.
        num_ids (`int`):
            Tokens of the prefix.
        decode (`Callable[[list[int]], str]`):
            Text of ids that follow the prefix.
        max_concurrency (`int`):
            Requests under way at a time.
    """

    server: Server
    transport: Transport
    patience: Patience
    body: Callable[..., dict[str, Any]]
    num_ids: int
    decode: Callable[[list[int]], str]
    max_concurrency: int

    async def find_form(self) -> str:
        """
        Find out which forms of prompts and settings the server takes.

        Returns:
            `str`: its greedy completion.

        Raises:
            RuntimeError, TimeoutError, ConnectionError: if it takes none, or fails.
        """
        for form in FORMS:
            choice = await self._unless_unable(partial(self._greedy, form), partial(self._greedy, FORMS[-1]))
            if choice is not None and (not form.token_prompts or self._num_read(choice) == self.num_ids):
                break
        else:
            choice = await self._greedy(FORMS[-1])  # raises what is wrong
        ids, text = choice.get("token_ids"), choice["text"]
        if self._num_read(choice) != self.num_ids or (ids is not None and self.decode(ids).strip() != text.strip()):
            logger.warning(
                f"{self.server.url} reads or writes text with other tokens: {self._num_read(choice)} instead of "
                f"{self.num_ids} in the prompt, {text!r} for {ids}. Check that the tokenizer is the model's."
            )
        self.server.capabilities = replace(self.server.capabilities, token_ids=ids is not None)
        return text

    async def find_abilities(self, greedy: str) -> None:
        """
        Find out the rest.

        Args:
            greedy (`str`):
                What [`find_form`] gave.
        """
        sampled, seeds = await self._find_seeds()
        is_constant = len(set(sampled)) == 1 and sampled[0] is not None
        capabilities = self.server.capabilities = replace(
            self.server.capabilities,
            seeds=seeds,
            varied=not is_constant or sampled[0] == greedy,
            n=await self._hot(n=2) is not None,
            top_k=await self._hot(top_k=1) == greedy and self.server.capabilities.fields != "standard",
        )
        for note in notes(capabilities, is_constant):
            logger.warning(f"{self.server.url} {note}")

    async def _find_seeds(self) -> tuple[list[str | None], bool]:
        """Completions, and whether they depend on their seed and on nothing but it: not on other requests either."""
        alone = [await self._hot(seed=seed) for seed in _SEEDS]
        at_once = asyncio.Semaphore(self.max_concurrency)

        async def beside_others(seed: int) -> str | None:
            async with at_once:
                return await self._hot(seed=seed)

        together = await gather_all(beside_others(seed) for seed in reversed(_SEEDS))
        return alone + together, alone == together[::-1] and len(set(alone)) > 1

    async def _unless_unable(
        self, ask: Callable[[], Awaitable[Choice]], control: Callable[[], Awaitable[Choice]]
    ) -> Choice | None:
        """
        An answer, or None if the server cannot give it: it refuses, or fails on it again, though not on the control in
        between. Some servers fail on what they do not know; but any may fail for a while. Raises what the control does.
        """
        try:
            return await ask()
        except Refusal:
            return None
        except RuntimeError:
            await control()
        try:
            return await ask()
        except RuntimeError:
            return None

    async def _greedy(self, form: Capabilities) -> Choice:
        self.server.capabilities = form
        return await self._ask(form, SamplingConfig(_TOKENS, temperature=0.0), seed=0)

    async def _hot(self, seed: int | None = None, n: int = 1, top_k: int = 0) -> str | None:
        """Text of a short, hot completion, or None if the server cannot."""
        form, sampling = self.server.capabilities, SamplingConfig(_TOKENS, _TEMPERATURE, top_k=top_k)
        ask = partial(self._ask, form, sampling, seed=seed, n=n)
        choice = await self._unless_unable(ask, partial(self._greedy, form))
        return None if choice is None else choice["text"]

    async def _ask(self, form: Capabilities, sampling: SamplingConfig, seed: int | None, n: int = 1) -> Choice:
        self.server.failures, self.server.rests_until = 0, 0.0  # what was given up needs no rest
        body = partial(self.body, sampling=sampling, seed=seed, n=n)
        choices, _ = await self.transport.ask([self.server], body, self.patience)
        return choices[0]

    def _num_read(self, choice: Choice) -> int:
        return choice.get("prompt_tokens") or self.num_ids


def notes(capabilities: Capabilities, is_constant: bool) -> Iterator[str]:
    """
    What somebody who samples from a server should know about it.

    Args:
        capabilities ([`~dapo_trl.engines._servers.Capabilities`]):
            What it can do.
        is_constant (`bool`):
            Whether all its completions were the same.

    Yields:
        `str`: ends of sentences that begin with the server.
    """
    if is_constant:
        yield (
            f"gives the same completion at temperature {_TEMPERATURE:g}, whatever the seed. Unless the model is "
            "as sure of itself as that, the server ignores the temperature, as `transformers serve` does with "
            "`--continuous-batching`."
        )
    if not capabilities.token_prompts or not capabilities.token_ids:
        yield "does not both take and return token ids: they pass through text, which `take_counts` reports on."
    if not capabilities.seeds:
        yield "does not honour seeds at this `max_concurrency`: completions will not repeat."
    if capabilities.fields in ("standard", "unseeded"):
        yield "takes no settings but the protocol's own: a `top_k` or penalties of its own may be at work."
