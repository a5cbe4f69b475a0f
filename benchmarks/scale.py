"""
A run of the real size, simulated: what sampling costs beside the model and the verifier, in time, memory and start-up.

    python benchmarks/scale.py [--num_problems 64 256] [--only cost restart]

`sample_stage` and `value_stage` run with their stores on disk, over problems of about 120 states with 16 completions
each. The engine strings ready-made steps of token ids together, and the verifier looks at the last character; their
time is measured and taken off. Each run is a process of its own:

- cost: time and peak memory, at several numbers of problems;
- restart: a run of 7,500 problems whose first shards are done (one was computed, the others are links to it), killed
  in the middle of a shard and started again; then its table of states is read back.

Writes `benchmarks/results/scale.json` and the table in `benchmarks/README.md`. Needs about 12 GB of disk in the
folder for temporary files.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dapo_trl.engines import Completion, OnCompletion, SamplingConfig
from dapo_trl.rollouts import RolloutConfig
from dapo_trl.stages import sample_stage, value_stage
from dapo_trl.store import ShardStore
from recording import REPOSITORY, command_line, keep, origin, origin_in_words, write_between


PACKAGES = ("torch", "transformers", "datasets", "pyarrow", "tokenizers")
NUM_PROBLEMS = 7500  # of the run that is simulated
SHARD_SIZE = 64
NUM_SHARDS = -(-NUM_PROBLEMS // SHARD_SIZE)
VOCABULARY = 32_000
STEP_TOKENS = (20, 40)  # shortest and longest step
SOLUTION_STEPS = (16, 26)
NUM_STEPS = 4096  # ready-made steps
LIKELY = 0.3  # share of steps, in solutions and completions, that are the likely one at their place
MIX = 6364136223846793005  # of a linear congruential generator: the next random number in one multiplication
FIRST = "first completion"
CONFIG = RolloutConfig(num_solutions=32, num_kept=6, num_completions=16)


# ---- Engine, verifier and problems that cost next to nothing ----


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokens: two special ones, a newline, and words with a space before them."""
    rng = random.Random(0)
    vocabulary = {"<pad>": 0, "<eos>": 1, "Ċ": 2, "0": 3, "1": 4}
    while len(vocabulary) < VOCABULARY:
        word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=rng.randint(1, 6)))
        vocabulary.setdefault(f"Ġ{word}", len(vocabulary))
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def clock() -> np.ndarray:
    """Seconds, on the wall and of this process."""
    return np.array([time.perf_counter(), time.process_time()])


class InstantEngine:
    """
    Strings ready-made steps together, chosen by the seed, and counts its own seconds.

    Every place in a solution has a likely step, so that some completions pass through states of other solutions. Ids
    and texts are new objects for each completion, as those of a real engine are.
    """

    name = "instant"
    num_calls = 1

    def __init__(self) -> None:
        self.tokenizer = make_tokenizer()
        self.seconds = np.zeros(2)
        self.completions = 0
        rng = random.Random(1)
        self._steps = [self._make_step(rng) for _ in range(NUM_STEPS)]

    def _make_step(self, rng: random.Random) -> tuple[np.ndarray, str]:
        ids = [rng.randrange(5, VOCABULARY) for _ in range(rng.randint(*STEP_TOKENS) - 1)] + [2]
        return np.array(ids), self.tokenizer.decode(ids)

    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        on_completion: OnCompletion | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        start = clock()
        depths = [list(prefix).count(2) for prefix in prefixes]
        sampled = [[self._draw(depth, seed) for seed in own] for depth, own in zip(depths, seeds, strict=True)]
        self.seconds += clock() - start
        if not self.completions:
            print(FIRST, flush=True)
        self.completions += sum(map(len, sampled))
        if on_completion is not None:
            for completion in itertools.chain.from_iterable(sampled):
                on_completion(completion)
        return sampled

    def _draw(self, depth: int, seed: int) -> Completion:
        shortest, longest = SOLUTION_STEPS
        end = max(shortest + seed % (longest - shortest + 1), depth + 1)
        steps = []
        for place in range(depth, end - 1):
            seed = (seed * MIX + 1) & 0xFFFFFFFFFFFFFFFF
            likely = (seed >> 32) % 1000 < 1000 * LIKELY
            steps.append(self._steps[place if likely else (seed >> 42) % NUM_STEPS])
        answer = (seed >> 33) & 1
        ids = np.concatenate([*(ids for ids, _ in steps), (3 + answer, 1)]).tolist()
        return Completion(tuple(ids), "".join([*(text for _, text in steps), str(answer)]), "stop")

    def describe(self) -> dict[str, Any]:
        return {"engine": "instant"}

    def take_counts(self) -> dict[str, int]:
        return {}


class InstantReward:
    """1 if the text ends with the answer; counts its own seconds."""

    def __init__(self) -> None:
        self.seconds = np.zeros(2)
        self.__qualname__ = type(self).__qualname__  # a stage's manifest names its reward function

    def __call__(self, prompts: Any, completions: list[str], answer: list[str], **columns: Any) -> list[float | None]:
        start = clock()
        rewards: list[float | None] = [
            float(text.endswith(right)) for text, right in zip(completions, answer, strict=True)
        ]
        self.seconds += clock() - start
        return rewards


def make_problems(number: int, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    rng = random.Random(2)
    prompts = [[rng.randrange(5, VOCABULARY) for _ in range(100)] for _ in range(number)]
    return Dataset.from_dict(
        {"prompt": [tokenizer.decode(ids) for ids in prompts], "answer": ["1"] * number, "level": [3] * number}
    )


# ---- One run, in a process of its own ----


def run(folder: Path, num_problems: int) -> dict[str, Any]:
    """Both stages; a line of JSON for each."""
    engine, reward = InstantEngine(), InstantReward()
    problems = make_problems(num_problems, engine.tokenizer)
    results: dict[str, Any] = {"loaded": status("VmRSS")}
    with Watch(engine, reward) as watch:
        sampled = sample_stage(problems, engine, reward, CONFIG, folder / "sampled", SHARD_SIZE)
    results["sampled"] = watch.results
    with Watch(engine, reward) as watch:
        values = value_stage(sampled, engine, reward, CONFIG, folder / "values")
    results["values"] = watch.results
    results["counts"] = {name: store.manifest["counts"] for name, store in stores(sampled, values).items()}
    results["disk"] = {name: disk_use(store.folder) for name, store in stores(sampled, values).items()}
    return results


def stores(sampled: ShardStore, values: ShardStore) -> dict[str, ShardStore]:
    return {"sampled": sampled, "values": values}


class Watch:
    """Seconds, on the wall and of the process, and completions of what happens inside."""

    def __init__(self, engine: InstantEngine, reward: InstantReward) -> None:
        self._engine = engine
        self._reward = reward
        self.results: dict[str, Any] = {}

    def _now(self) -> dict[str, Any]:
        parts = {"engine": self._engine.seconds.copy(), "verifier": self._reward.seconds.copy()}
        return {"all": clock(), **parts, "completions": self._engine.completions}

    def __enter__(self) -> "Watch":
        self._before = self._now()
        return self

    def __exit__(self, *args: Any) -> None:
        after = self._now()
        spent = {name: after[name] - self._before[name] for name in after}
        completions = spent.pop("completions")
        own = (spent["all"] - spent["engine"] - spent["verifier"]) / max(completions, 1)
        self.results = {name: seconds.tolist() for name, seconds in spent.items()}
        self.results |= {"completions": completions, "own_ms": (1000 * own).tolist(), "peak": status("VmHWM")}


def read_back(folder: Path) -> dict[str, Any]:
    """The whole table of states: when it is first asked for, and again, and some of its rows."""
    engine, reward = InstantEngine(), InstantReward()
    problems = make_problems(NUM_PROBLEMS, engine.tokenizer)
    sampled = sample_stage(problems, engine, reward, CONFIG, folder / "sampled", SHARD_SIZE)
    values = value_stage(sampled, engine, reward, CONFIG, folder / "values")
    assert engine.completions == 0
    shards = disk_use(values.folder)
    results: dict[str, Any] = {"loaded": status("VmRSS"), "seconds": []}
    for _ in range(2):
        start = time.perf_counter()
        states = values.table("states")
        results["seconds"].append(time.perf_counter() - start)
    results |= {"rows": len(states), "peak": status("VmHWM")}
    rng = random.Random(0)
    start = time.perf_counter()
    for _ in range(1000):
        states[rng.randrange(len(states))]
    results["milliseconds_per_row"] = time.perf_counter() - start
    return results | {"disk": {"shards": shards, "cache": disk_use(values.folder) - shards}}


def status(name: str) -> int:
    """A figure of this process's memory in bytes, from Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def disk_use(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---- Measuring ----


def start_process(work: str, folder: Path, num_problems: int = NUM_PROBLEMS) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--work", work, "--folder", str(folder), "--num_problems", str(num_problems)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args} failed; run it by hand to see why.")
    return json.loads(output.splitlines()[-1])


def kill_once(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    while not condition():
        if process.poll() is not None:
            raise SystemExit(f"{process.args} ended before it could be killed.")
        time.sleep(0.1)
    process.kill()
    process.wait()


def measure_cost(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    results = {}
    for number in arguments.num_problems:
        results[str(number)] = result = result_of(start_process("run", folder / f"cost-{number}", number))
        print(f"{number} problems: {json.dumps(result)}", flush=True)
    return results


def measure_restart(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    folder = folder / "restart"
    sampled, values = folder / "sampled" / "shards", folder / "values" / "shards"
    kill_once(start_process("run", folder), (sampled / "00000.json").exists)
    link_shards(sampled, NUM_SHARDS - 1)
    kill_once(start_process("run", folder), (values / "00000.json").exists)
    link_shards(values, NUM_SHARDS - 3)
    process, last = start_process("run", folder), values / f"{NUM_SHARDS - 3:05}.json"
    kill_once(process, lambda: last.exists() and time.time() - last.stat().st_mtime > 5)
    before = shard_files(values)
    start = time.perf_counter()
    process = start_process("run", folder)
    assert process.stdout is not None and process.stdout.readline().strip() == FIRST
    results: dict[str, Any] = {"seconds_to_first_completion": time.perf_counter() - start}
    results |= result_of(process)
    after = shard_files(values)
    results["shards_before"] = sum(name.endswith(".json") for name in before)
    results["shards_changed"] = sum(after[name] != identity for name, identity in before.items())
    new = [json.loads((values / name).read_text())["counts"] for name in after.keys() - before if ".json" in name]
    results["completions_of_missing_shards"] = sum(counts["completions"] for counts in new)
    print(f"restart: {json.dumps(results)}", flush=True)
    results["table"] = result_of(start_process("table", folder))
    print(f"table: {json.dumps(results['table'])}", flush=True)
    return results


def link_shards(shards: Path, number: int) -> None:
    """Shards 0 to `number` - 1 shall be there: links to the first one."""
    for path in shards.glob("00000*"):
        for index in range(1, number):
            target = shards / path.name.replace("00000", f"{index:05}", 1)
            target.unlink(missing_ok=True)
            os.link(path, target)


def shard_files(shards: Path) -> dict[str, tuple[int, int]]:
    """Every file that belongs to a shard that is done, with what changes when it is written again."""
    done = {path.stem for path in shards.glob("*.json")}
    files = [path for path in shards.iterdir() if path.name[:5] in done]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


# ---- The record ----


def table(results: dict[str, Any]) -> str:
    """What was aimed at and what was reached, a line a claim."""
    lines = ["| claim | target | measured |", "|---" * 3 + "|"]
    for number, result in results.get("cost", {}).items():
        for stage, what in (("values", "completions"), ("sampled", "solutions")):
            wall, cpu = result[stage]["own_ms"]
            claim = f"{number} problems, {result[stage]['completions']:,} {what}: own time of each"
            lines.append(f"| {claim} | {'1 ms' if stage == 'values' else ''} | **{wall:.2f} ms** (CPU {cpu:.2f}) |")
        lines.append(f"| {number} problems: peak memory {memory(result['values'], result)}")
    if "cost" in results:
        number, result = list(results["cost"].items())[-1]
        completions = NUM_PROBLEMS / int(number) * result["values"]["completions"]
        hours = completions * result["values"]["own_ms"][0] / 3.6e6
        lines.append(
            f"| {NUM_PROBLEMS:,} problems, {completions / 1e6:.1f} million completions: own time in all, extrapolated "
            f"from {number} | | {hours:.1f} hours |"
        )
    if "restart" in results:
        result = results["restart"]
        lines.append(f"| {NUM_PROBLEMS:,} problems, most of them done: peak memory {memory(result['values'], result)}")
        lines.append(
            f"| {NUM_PROBLEMS:,} problems, {result['shards_before']} of {NUM_SHARDS} shards done, killed and started "
            f"again: first new completion after | 60 s | **{result['seconds_to_first_completion']:.0f} s** |"
        )
        drawn, missing = result["values"]["completions"], result["completions_of_missing_shards"]
        lines.append(
            f"| completions drawn then, and those of the shards that were missing | the same | {drawn:,} and "
            f"{missing:,}; {result['shards_changed']} old files changed |"
        )
        table = result["table"]
        disk = {name: size / 1e9 for name, size in table["disk"].items()}
        lines.append(
            f"| table of {table['rows']:,} states: first read, second read | | {table['seconds'][0]:.0f} s, "
            f"{table['seconds'][1]:.1f} s |"
        )
        lines.append(f"| the same: peak memory {memory(table, table)}")
        lines.append(f"| the same: shards, Arrow cache | | {disk['shards']:.1f} GB, {disk['cache']:.1f} GB |")
    return "\n".join(lines)


def memory(result: dict[str, Any], whole: dict[str, Any]) -> str:
    """The last columns of a line on memory."""
    return f"| 4 GB | **{result['peak'] / 1e9:.2f} GB** (libraries loaded: {whole['loaded'] / 1e9:.2f} GB) |"


def details(record: dict[str, Any]) -> str:
    return f"{origin_in_words(record)}\n\n{table(record['results'])}"


MEASURES = {"cost": measure_cost, "restart": measure_restart}
WORK = {"run": run, "table": lambda folder, num_problems: read_back(folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=list(MEASURES), help="measure these, and keep the record of the others"
    )
    parser.add_argument("--num_problems", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--work", choices=list(WORK), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments.work:
        print(json.dumps(WORK[arguments.work](arguments.folder, arguments.num_problems[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = {name: MEASURES[name](arguments, Path(folder)) for name in arguments.only or MEASURES}
    path = REPOSITORY / "benchmarks" / "results" / "scale.json"
    if arguments.only and path.exists():
        results = json.loads(path.read_text())["results"] | results
    record = {
        **origin(command_line(), PACKAGES),
        "results": results,
    }
    keep(record, "scale")
    write_between(REPOSITORY / "benchmarks" / "README.md", "scale", details(record))


if __name__ == "__main__":
    main()
