"""
The two sampling stages over a whole data set: on disk, in shards, over several processes, resumable.

    problems -> sample_stage -> solutions -> value_stage -> solution rows and state rows with values

A shard holds the problems of a fixed stretch of the data set, and every sample has a seed of its own, so that the rows
do not depend on interruptions or on the number of processes. Process r of w works on the shards whose number is r
modulo w; nobody computes a shard that is there.
"""

import hashlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset

from dapo_trl.engines import Completion, Engine, OnCompletion
from dapo_trl.files import POLL_SECONDS, wait_for
from dapo_trl.interrupts import raise_if_interrupted
from dapo_trl.judging import RewardFunction, name_of
from dapo_trl.progress import ShardBar
from dapo_trl.rollouts import (
    RolloutConfig,
    group_by_problem,
    has_signal,
    sample_solutions,
    value_solutions,
)
from dapo_trl.store import Shard, ShardStore
from dapo_trl.tables import problem_features, table_features, with_problem_ids


logger = logging.getLogger(__name__)

_PARTING_SECONDS = 2.0  # that calls in other threads get to notice that it is over
_SAMPLE_SETTINGS = ("num_solutions", "sampling", "separator", "seed", "overlong", "overlong_buffer")


def sample_stage(
    problems: Dataset,
    engine: Engine,
    reward_function: RewardFunction,
    config: RolloutConfig,
    folder: str | Path,
    shard_size: int = 16,
    num_problems: int | None = None,
) -> ShardStore:
    """
    Sample and judge solutions of all problems.

    Args:
        problems ([`~datasets.Dataset`]):
            Rows with `prompt` and the columns that the reward function takes.
        engine ([`~dapo_trl.engines.Engine`]):
            Sampling back end of the reference policy.
        reward_function (`Callable`):
            TRL reward function, see [`~dapo_trl.rollouts.collect_rollouts`].
        config ([`~dapo_trl.rollouts.RolloutConfig`]):
            Numbers of samples and how to draw them.
        folder (`str` or `Path`):
            Where the shards go. A run that was killed goes on there.
        shard_size (`int`, *optional*, defaults to `16`):
            Problems of a shard: what a kill can cost, and the largest batch.
        num_problems (`int`, *optional*):
            Stop when this many problems have solutions with different outcomes (dynamic sampling, arXiv 2503.14476);
            the others are counted. `None` samples all problems.

    Returns:
        [`~dapo_trl.store.ShardStore`]: the finished stage, with a table `sampled`: every solution, see
        [`~dapo_trl.tables.table_features`].

    Raises:
        ValueError: if a problem or a setting is bad, or `folder` holds results of other settings.
    """
    problems = with_problem_ids(problems)
    settings = {
        "stage": "sample",
        "problems": rows_fingerprint(problems),
        "engine": engine.describe(),
        "reward_function": name_of(reward_function),
        "rollouts": {name: value for name, value in config.describe().items() if name in _SAMPLE_SETTINGS},
        "shard_size": shard_size,
        "num_problems": num_problems,
    }
    features = {"sampled": table_features(problems.features)["sampled"]}
    store = ShardStore(folder, settings, features, -(-len(problems) // shard_size))

    def work(index: int, on_completion: OnCompletion) -> Shard:
        part = problems.select(range(index * shard_size, min((index + 1) * shard_size, len(problems))))
        rows, counts = sample_solutions(list(part), engine, reward_function, config, on_completion)
        counts["problems_with_signal"] = sum(map(has_signal, group_by_problem(rows)))
        return Shard({"sampled": rows}, counts)

    def size(index: int) -> int:
        return min(shard_size, len(problems) - index * shard_size)

    manifest = store.finish(run_shards(store, work, "Solutions", engine, size, num_problems))
    found = manifest["counts"]["problems_with_signal"]
    if num_problems is not None and found < num_problems:
        logger.warning(
            f"Only {found} of {len(problems)} problems have solutions with different outcomes; {num_problems} were "
            "asked for. Give more problems, or more solutions a problem."
        )
    return store


def value_stage(
    sampled: ShardStore,
    engine: Engine,
    reward_function: RewardFunction,
    config: RolloutConfig,
    folder: str | Path,
) -> ShardStore:
    """
    Keep some solutions of each problem, sample completions from all their states, and give every state its value.

    Args:
        sampled ([`~dapo_trl.store.ShardStore`]):
            What [`sample_stage`] gave.
        engine ([`~dapo_trl.engines.Engine`]):
            Sampling back end of the reference policy.
        reward_function (`Callable`):
            TRL reward function, see [`~dapo_trl.rollouts.collect_rollouts`].
        config ([`~dapo_trl.rollouts.RolloutConfig`]):
            Numbers of samples and how to draw them.
        folder (`str` or `Path`):
            Where the shards go. A run that was killed goes on there.

    Returns:
        [`~dapo_trl.store.ShardStore`]: the finished stage, with tables `solutions` and `states`, as of
        [`~dapo_trl.rollouts.Rollouts`].

    Raises:
        ValueError: if a setting is bad, or `folder` holds results of other settings.
    """
    manifest = sampled.manifest
    num_problems = manifest["config"]["num_problems"]
    num_shards = manifest["num_shards_used"]
    settings = {
        "stage": "values",
        "sampled": manifest["fingerprint"],
        "engine": engine.describe(),
        "reward_function": name_of(reward_function),
        "rollouts": config.describe(),
    }
    features = table_features(problem_features(sampled.features["sampled"]))
    store = ShardStore(folder, settings, {name: features[name] for name in ("solutions", "states")}, num_shards)
    num_before = [0]
    for index in range(num_shards):
        num_before.append(num_before[-1] + sampled.summary(index)["counts"]["problems_with_signal"])

    def work(index: int, on_completion: OnCompletion) -> Shard:
        rows = sampled.rows(index, "sampled")
        if num_problems is not None:  # what was drawn beyond the number that was asked for
            rows = _first_with_signal(rows, num_problems - num_before[index])
        tables, counts = value_solutions(rows, engine, reward_function, config, on_completion)
        return Shard(tables, counts)

    def size(index: int) -> int:
        return sampled.summary(index)["counts"]["problems_with_signal" if config.skip_uniform else "problems"]

    run_shards(store, work, "Completions", engine, size)
    store.finish()
    return store


def run_shards(
    store: ShardStore,
    work: Callable[[int, OnCompletion], Shard],
    desc: str,
    engine: Engine,
    size: Callable[[int], int],
    num_problems: int | None = None,
) -> int:
    """
    Compute the missing shards of a stage, this process its share, and wait for the others.

    Args:
        store ([`~dapo_trl.store.ShardStore`]):
            Where the shards go.
        work (`Callable[[int, OnCompletion], Shard]`):
            Computes the shard of a number.
        desc (`str`):
            Label of the progress bar.
        engine ([`~dapo_trl.engines.Engine`]):
            Sampling back end; says how many calls it takes at a time.
        size (`Callable[[int], int]`):
            Problems of the shard of a number, for the progress bar.
        num_problems (`int`, *optional*):
            Problems with signal after which no more shards are needed. `None` for all shards.

    Returns:
        `int`: shards that are needed, from the first. All of these are there; it waits for the other processes of the
        same command as long as they take, see [`~dapo_trl.files.wait_for`].

    Raises:
        Exception: what `work` raises; the calls under way in threads end, and nothing of theirs is written.
        ValueError: if a shard that is there is damaged.
        OSError: if the disk is full or the folder cannot be written to.
    """
    state = process_state()
    own = [index for index in range(store.num_shards) if index % state.num_processes == state.process_index]
    missing = set(store.missing())
    front = _Front(store, num_problems)
    is_over = threading.Event()
    writing = threading.Lock()

    def add(completion: Completion) -> None:
        if is_over.is_set():
            raise _OverError
        bar.add(completion)

    def compute(index: int) -> int:
        begun, start = time.time(), time.perf_counter()
        shard = work(index, add)
        with writing:
            if is_over.is_set():
                raise _OverError
            store.write(index, replace(shard, begun=begun, seconds=time.perf_counter() - start))
        return index

    def is_due(index: int) -> bool | None:
        if num_problems is None:
            return True
        front.move()
        if index >= front.num_needed:
            return False
        # not yet: do not run ahead of the shards that say how many are needed
        return True if front.num_done > index - state.num_processes * engine.num_calls else None

    todo = [index for index in own if index in missing]
    with ShardBar(desc, sum(map(size, own)), sum(size(index) for index in own if index not in missing)) as bar:
        try:
            for index in _in_flight(compute, todo, is_due, engine.num_calls, front.describe, is_over):
                bar.finish(size(index))
        except BaseException as error:
            is_over.set()
            if not isinstance(error, Exception):  # an interrupt waits for nobody
                raise
            with writing:  # what is being written, nobody writes anything from here on
                pass
            done = store.num_shards - len(store.missing())
            logger.error(f"{store.folder}: {done} of {store.num_shards} shards are done, and need not be done again.")
            raise
    wait_for(front.is_complete, front.describe)
    return front.num_needed


class _Front:
    """
    How far a stage is: shards that are there without a gap, and those that are needed, as far as these can tell.

    Args:
        store ([`~dapo_trl.store.ShardStore`]):
            The shards.
        num_problems (`int`, *optional*):
            Problems with signal after which no more shards are needed.
    """

    def __init__(self, store: ShardStore, num_problems: int | None) -> None:
        self.num_done = 0
        self.num_needed = store.num_shards  # as long as nobody knows
        self._store = store
        self._num_problems = num_problems
        self._found = 0

    def move(self) -> None:
        """Read what the shards that are there now say."""
        while self.num_done < self.num_needed and self._store.has(self.num_done):
            if self._num_problems is not None:
                self._found += self._store.summary(self.num_done)["counts"]["problems_with_signal"]
                if self._found >= self._num_problems:
                    self.num_needed = self.num_done + 1
            self.num_done += 1

    def is_complete(self) -> bool:
        """Whether all shards that are needed are there."""
        self.move()
        return self.num_done >= self.num_needed

    def describe(self) -> str:
        """What comes next."""
        return f"shard {self.num_done} of {self._store.folder}"


def process_state() -> PartialState:
    """
    Which process of how many this is.

    [`~accelerate.PartialState`] takes several processes without a GPU for one each unless it is told of the CPU.

    Returns:
        [`~accelerate.PartialState`].
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


class _OverError(Exception):
    """Another shard has failed, or somebody has stopped the program: a call in a thread ends."""


def _in_flight(
    compute: Callable[[int], int],
    todo: Iterable[int],
    is_due: Callable[[int], bool | None],
    num_calls: int,
    what: Callable[[], str],
    is_over: threading.Event,
) -> Iterator[int]:
    """
    Numbers of shards as they are done, several at a time if the engine takes that.

    Args:
        compute (`Callable[[int], int]`):
            Computes the shard of a number, and returns the number.
        todo (iterable of `int`):
            Numbers, in order.
        is_due (`Callable[[int], bool | None]`):
            Whether to begin with the next one; `None` for not yet, `False` for neither this one nor those after it.
        num_calls (`int`):
            How many at a time.
        what (`Callable[[], str]`):
            Says what is waited for while none is due.
        is_over (`threading.Event`):
            Set when a call has failed, for the others to end.
    """
    waiting = deque(todo)
    running: set[Future[int]] = set()
    while waiting or running:
        raise_if_interrupted()
        due = is_due(waiting[0]) if waiting and len(running) < num_calls else None
        if due is False:
            waiting.clear()
        elif due and num_calls == 1:
            yield compute(waiting.popleft())
        elif due:
            running.add(_in_thread(compute, waiting.popleft()))
        elif not running:
            wait_for(lambda: is_due(waiting[0]) is not None, what)
        else:  # one that waits may be due soon
            timeout = POLL_SECONDS if waiting and len(running) < num_calls else None
            done, running = wait(running, timeout, FIRST_COMPLETED)
            for future in sorted(done, key=lambda future: future.exception() is not None):  # an error comes last
                if future.exception():
                    is_over.set()
                    wait(running, _PARTING_SECONDS)
                yield future.result()


def _in_thread(compute: Callable[[int], int], index: int) -> "Future[int]":
    """A call in a thread that nobody waits for when the program is interrupted, unlike those of an executor."""
    future: Future[int] = Future()

    def run() -> None:
        try:
            future.set_result(compute(index))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _first_with_signal(rows: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for group in group_by_problem(rows):
        if has_signal(group):
            if number == 0:
                return kept
            number -= 1
        kept += group
    return kept


def rows_fingerprint(rows: Dataset) -> str:
    """
    Short hash of what rows hold.

    Args:
        rows ([`~datasets.Dataset`]):
            Rows.

    Returns:
        `str`: 16 hexadecimal digits of a SHA-256.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
