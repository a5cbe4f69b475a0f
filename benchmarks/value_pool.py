"""
A pool of completions of the student's states, and an engine that draws from it instead of the model.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

from dapo_trl import TransformersEngine, math_reward
from dapo_trl.engines import Completion, SamplingConfig, sample_seed
from dapo_trl.judging import judge
from dapo_trl.rollouts import RolloutConfig, sample_solutions, value_solutions
from recording import REPOSITORY


STUDENT = REPOSITORY / "examples" / "student"
sys.path.append(str(STUDENT))
from arithmetic import make_problems  # noqa: E402


# Shape legend: S states of the kept solutions, N completions of each in the pool.

NUM_DRAWS = 64  # completions of a state that a run may draw; the others are its truth
SAMPLING = SamplingConfig(max_new_tokens=64)
PROBLEM_SEED = 4242  # of the problems; the demo and the student's training use small numbers
Row = dict[str, Any]


@dataclass
class Pool:
    """
    Completions of every state of the kept solutions.

    Attributes:
        rows (`list[dict]`):
            All sampled solutions, as of [`sample_solutions`].
        solutions (`list[dict]`):
            Those that are kept.
        prefixes (`list[tuple[int, ...]]`, length S):
            Token ids of the states, prompts included.
        problems (`list[str]`, length S):
            `problem_id` of each state.
        completions (`list[Completion]`):
            Different completions.
        numbers_SN (`np.ndarray`):
            Which of them were drawn.
        rewards_SN (`np.ndarray`):
            Their outcomes.
    """

    rows: list[Row]
    solutions: list[Row]
    prefixes: list[tuple[int, ...]]
    problems: list[str]
    completions: list[Completion]
    numbers_SN: np.ndarray
    rewards_SN: np.ndarray


def load_engine() -> TransformersEngine:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(STUDENT), AutoTokenizer.from_pretrained(STUDENT)
    return TransformersEngine(model, tokenizer, batch_size=512)


def rollout_config(**numbers: Any) -> RolloutConfig:
    """Solutions as in the demo; the other numbers are the scheme's."""
    return RolloutConfig(num_solutions=8, num_kept=4, sampling=SAMPLING, **numbers)


def state_prefixes(row: Row) -> list[tuple[int, ...]]:
    """Token ids of the states of a solution, the prompt first; the solution's end is none."""
    prefixes = [tuple(row["prompt_ids"])]
    for step in row["completions_ids"][:-1]:
        prefixes.append((*prefixes[-1], *step))
    return prefixes


def sample_pool(engine: TransformersEngine, num_problems: int, num_truth: int) -> Pool:
    """Solutions, and completions of every state of those that are kept."""
    config = rollout_config(num_completions=2)
    rows, _ = sample_solutions(make_problems("validation", num_problems, PROBLEM_SEED), engine, math_reward, config)
    tables, _ = value_solutions(rows, engine, math_reward, config)
    solutions = tables["solutions"]
    states = {
        prefix: (row, "".join(row["completions"][:depth]))
        for row in solutions
        for depth, prefix in enumerate(state_prefixes(row))
    }
    completions: dict[Completion, int] = {}
    numbers, rewards = [], []
    for prefix, (row, text) in states.items():
        seeds = [sample_seed("pool", prefix, number) for number in range(num_truth)]
        room = SAMPLING.max_new_tokens - (len(prefix) - len(row["prompt_ids"]))
        drawn = engine.generate([prefix], [seeds], SAMPLING, limits=[room])[0]
        numbers.append([completions.setdefault(completion, len(completions)) for completion in drawn])
        problem = {name: row[name] for name in ("prompt", "answer")}
        judged = judge([problem] * num_truth, [text + completion.text for completion in drawn], math_reward)
        rewards.append([0.0 if c.finish_reason == "length" else r for c, r in zip(drawn, judged, strict=True)])
        if len(numbers) % 100 == 0:
            print(f"pool: {len(numbers):,} of {len(states):,} states", flush=True)
    problems = [row["problem_id"] for row, _ in states.values()]
    return Pool(rows, solutions, list(states), problems, list(completions), np.array(numbers), np.array(rewards))


def load_pool(arguments: argparse.Namespace) -> Pool:
    """The pool, sampled if it is not there yet."""
    path = arguments.output_dir / f"pool-{arguments.num_problems}-{arguments.num_truth}"
    if not path.with_suffix(".npz").exists():
        start = time.perf_counter()
        pool = sample_pool(load_engine(), arguments.num_problems, arguments.num_truth)
        print(f"pool: {pool.numbers_SN.size:,} completions in {time.perf_counter() - start:.0f} s", flush=True)
        save_pool(pool, path)
    record, arrays = json.loads(path.with_suffix(".json").read_text()), np.load(path.with_suffix(".npz"))
    record["prefixes"] = [tuple(ids) for ids in record["prefixes"]]
    record["completions"] = [Completion(tuple(ids), text, reason) for ids, text, reason in record["completions"]]
    return Pool(**record, **arrays)


def save_pool(pool: Pool, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {name: getattr(pool, name) for name in ("rows", "solutions", "prefixes", "problems")}
    record["completions"] = [(c.ids, c.text, c.finish_reason) for c in pool.completions]
    path.with_suffix(".json").write_text(json.dumps(record))
    np.savez_compressed(path.with_suffix(".npz"), numbers_SN=pool.numbers_SN, rewards_SN=pool.rewards_SN)


class PoolEngine:
    """
    An [`~dapo_trl.engines.Engine`] that takes completions from a pool: of each state the next not given yet.

    Args:
        pool ([`Pool`]):
            The completions.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model that sampled them.
        order_SN (`np.ndarray`):
            In which order those of each state come.

    Attributes:
        tokens_S (`np.ndarray`):
            Tokens given so far.
    """

    name = "pool"
    num_calls = 1

    def __init__(self, pool: Pool, tokenizer: Any, order_SN: np.ndarray) -> None:
        self.tokenizer = tokenizer
        self.tokens_S = np.zeros(len(pool.prefixes))
        self._completions = pool.completions
        self._numbers_SN = np.take_along_axis(pool.numbers_SN, order_SN[:, :NUM_DRAWS], axis=1)
        self._rows = {prefix: row for row, prefix in enumerate(pool.prefixes)}
        self._num_given_S = np.zeros(len(pool.prefixes), dtype=int)

    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Any,
        on_completion: Any = None,
        limits: Any = None,
    ) -> list[list[Completion]]:
        """Completions of each prefix, one for each seed; whose value does not matter. The pool keeps to the limits."""
        return [
            self._take(self._rows[tuple(prefix)], len(group)) for prefix, group in zip(prefixes, seeds, strict=True)
        ]

    def _take(self, row: int, number: int) -> list[Completion]:
        start = self._num_given_S[row]
        if start + number > NUM_DRAWS:
            raise RuntimeError(f"A state asks for more than {NUM_DRAWS} completions.")
        self._num_given_S[row] += number
        taken = [self._completions[index] for index in self._numbers_SN[row, start : start + number]]
        self.tokens_S[row] += sum(len(completion.ids) for completion in taken)
        return taken

    def describe(self) -> dict[str, Any]:
        """Nothing: no rows are stored."""
        return {}

    def take_counts(self) -> dict[str, int]:
        """Nothing."""
        return {}
