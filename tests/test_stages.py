"""
`stages.py`: what the two stages leave on disk does not depend on interruptions, portions or threads.
"""

import functools
import json
import queue
import random
import shutil
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from datasets import Dataset

from conftest import ScriptedEngine, answer_reward, make_tokenizer, shortened
from dapo_trl import check_dataset, collect_rollouts, stages
from dapo_trl.engines import Completion, SamplingConfig
from dapo_trl.rollouts import RolloutConfig
from dapo_trl.stages import sample_stage, value_stage
from dapo_trl.store import ShardStore


class SeededEngine:
    """Draws steps that depend on the seed of the completion alone; counts calls, and can be told to fail at one."""

    name = "seeded"

    def __init__(self, num_calls=1, fails_at=None):
        self.tokenizer = make_tokenizer()
        self.num_calls = num_calls
        self.fails_at = fails_at
        self.calls = 0
        self.seeds: list[int] = []

    def generate(self, prefixes, seeds, sampling, on_completion=None, limits=None):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("killed")
        self.seeds += [seed for own in seeds for seed in own]
        texts = [self.tokenizer.decode(prefix) for prefix in prefixes]
        limits = limits or [sampling.max_new_tokens] * len(texts)
        return [
            [shortened(self.draw(text, seed), limit, self.tokenizer) for seed in own]
            for text, own, limit in zip(texts, seeds, limits, strict=True)
        ]

    def draw(self, prefix, seed):
        rng = random.Random(seed)
        text = "".join(f"{rng.choice('ab')}\n" for _ in range(3 - prefix.count("\n") + 1)) + rng.choice("01")
        return Completion((*self.tokenizer(text).input_ids, self.tokenizer.eos_token_id), text, "stop")

    def describe(self):
        return {"engine": "seeded"}

    def take_counts(self):
        return {"calls": 1}


PROBLEMS = Dataset.from_list([{"prompt": f"{number}\n", "answer": "1", "level": number} for number in range(10)])
CONFIG = RolloutConfig(num_solutions=3, num_kept=2, num_completions=4)


def run(folder, engine, shard_size=3, config=CONFIG, num_problems=None, problems=PROBLEMS):
    sampled = sample_stage(problems, engine, answer_reward, config, folder / "sampled", shard_size, num_problems)
    return sampled, value_stage(sampled, engine, answer_reward, config, folder / "values")


def rows(stores):
    sampled, values = stores
    return [sampled.table("sampled").to_list()] + [values.table(name).to_list() for name in ("solutions", "states")]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return rows(run(tmp_path_factory.mktemp("expected"), SeededEngine()))


def test_the_same_rows_as_in_memory(tmp_path, expected):
    rollouts = collect_rollouts(PROBLEMS, SeededEngine(), answer_reward, CONFIG)
    assert rollouts.solutions.to_list() == expected[1]
    assert rollouts.states.to_list() == expected[2]
    assert check_dataset(rollouts.solutions).format == "solution"
    assert check_dataset(rollouts.states).format == "state"


@pytest.mark.parametrize(("shard_size", "num_calls"), [(1, 1), (4, 1), (100, 1), (2, 3)])
def test_portions_and_threads_do_not_matter(tmp_path, expected, shard_size, num_calls):
    assert rows(run(tmp_path, SeededEngine(num_calls), shard_size)) == expected


def test_killed_again_and_again(tmp_path, expected):
    """Started again with the same command after each failure, wherever it happened: the same rows."""
    failures = 0
    while True:
        engine = SeededEngine(fails_at=6 + failures % 5)
        try:
            stores = run(tmp_path, engine, shard_size=1)
            break
        except RuntimeError:
            failures += 1
    assert failures > 3
    assert rows(stores) == expected
    done = SeededEngine()
    assert rows(run(tmp_path, done, shard_size=1)) == expected
    assert done.calls == 0


class BlockingEngine(SeededEngine):
    """Two calls at a time: one fails once the other has begun, which waits for `release` and may report then."""

    def __init__(self, reports):
        super().__init__(num_calls=2)
        self.reports = reports
        self.begun, self.release, self.ended = threading.Event(), threading.Event(), threading.Event()

    def generate(self, prefixes, seeds, sampling, on_completion=None, limits=None):
        if self.tokenizer.decode(prefixes[0]).startswith("0"):
            assert self.begun.wait(10)
            raise RuntimeError("broken")
        self.begun.set()
        assert self.release.wait(10)
        samples = super().generate(prefixes, seeds, sampling)
        try:
            if self.reports:
                on_completion(samples[0][0])
        finally:
            self.ended.set()
        return samples


@pytest.mark.parametrize("reports", [True, False])
def test_an_error_ends_calls_in_other_threads(tmp_path, monkeypatch, reports):
    """It does not wait for them, and what they give afterwards is not written; they end with their next completion."""
    monkeypatch.setattr(stages, "_PARTING_SECONDS", 0.05)
    engine, written = BlockingEngine(reports), []
    monkeypatch.setattr(ShardStore, "write", lambda store, index, shard: written.append(index))
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="broken"):
        run(tmp_path, engine)
    assert time.monotonic() - begin < 5
    engine.release.set()
    assert engine.ended.wait(5)
    time.sleep(0.1)
    assert not written
    assert engine.calls == 1


def test_finished_shards_are_not_computed_again(tmp_path):
    """The second shard fails; afterwards only its completions and those of later shards are drawn."""
    first = SeededEngine(fails_at=2)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, first)
    second = SeededEngine()
    run(tmp_path, second)
    assert not set(first.seeds) & set(second.seeds)


def test_dynamic_sampling(tmp_path):
    """
    Sampling stops with the shard in which the third problem with both outcomes is found; the values are those of the
    first three such problems, whatever the size of shards.
    """
    kept = {}
    for shard_size in (1, 2, 5):
        sampled, values = run(tmp_path / str(shard_size), SeededEngine(), shard_size, num_problems=3)
        counts = sampled.manifest["counts"]
        assert counts["problems_with_signal"] >= 3
        assert counts["problems"] < 10
        assert values.manifest["counts"]["problems_kept"] == 3
        kept[shard_size] = values.table("states").to_list()
    assert kept[1] == kept[2] == kept[5]


def within(seconds, function):
    """What a function returns or raises; fails if it takes longer."""
    outcome = queue.Queue()

    def call():
        try:
            outcome.put((function(), None))
        except Exception as error:
            outcome.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        pytest.fail(f"it did not end within {seconds} seconds")
    if error is not None:
        raise error
    return result


def test_a_shard_that_fails_while_others_wait_for_it(tmp_path):
    """
    With dynamic sampling the third shard waits until the first one says whether it is needed. That one fails after the
    second one is done: the error ends the stage, and the second one is kept.
    """

    class Failing(SeededEngine):
        def generate(self, prefixes, *args, **kwargs):
            if self.tokenizer.decode(prefixes[0]) == "0\n":
                time.sleep(1)
                raise RuntimeError("killed")
            return super().generate(prefixes, *args, **kwargs)

    with pytest.raises(RuntimeError, match="killed"):
        within(20, lambda: run(tmp_path, Failing(num_calls=2), 1, num_problems=8))
    assert [path.stem for path in (tmp_path / "sampled" / "shards").glob("*.json")] == ["00001"]


def test_fewer_processes_go_on(tmp_path, monkeypatch):
    """
    Eight processes of a dynamic sampling left shards beyond the needed ones, with gaps that nobody will fill. Two go
    on: they end, with the rows of one process.
    """
    expected, _ = run(tmp_path / "expected", SeededEngine(), 1, num_problems=2)
    num_needed = expected.manifest["num_shards_used"]
    assert 2 <= num_needed <= 4
    everything = sample_stage(PROBLEMS, SeededEngine(), answer_reward, CONFIG, tmp_path / "everything", 1)
    folder = tmp_path / "run" / "sampled"
    shutil.copytree(everything.folder, folder)
    begun = {name: expected.manifest[name] for name in ("config", "num_shards", "versions")}
    (folder / "manifest.json").write_text(json.dumps(begun))
    for index in (0, num_needed + 1, 8, 9):
        (folder / "shards" / f"{index:05}.json").unlink()
    rank = threading.local()
    monkeypatch.setattr(stages, "process_state", lambda: rank.state)

    def work(index):
        rank.state = SimpleNamespace(num_processes=2, process_index=index)
        engine = SeededEngine()
        store = sample_stage(PROBLEMS, engine, answer_reward, CONFIG, folder, 1, 2)
        return store.table("sampled").to_list(), engine.calls

    second = []
    thread = threading.Thread(target=lambda: second.append(work(1)), daemon=True)
    thread.start()
    rows, calls = within(20, lambda: work(0))
    thread.join(20)
    assert rows == expected.table("sampled").to_list()
    assert second == [(rows, 0)]
    assert calls == 1


def test_summaries_are_read_once(tmp_path, monkeypatch):
    """However many shards there are, and however often it is asked what is needed."""
    read = Counter()
    summary = ShardStore.summary

    def count(store, index):
        read[index] += 1
        return summary(store, index)

    monkeypatch.setattr(ShardStore, "summary", count)
    sample_stage(PROBLEMS, SeededEngine(), answer_reward, CONFIG, tmp_path, 1, 11)
    assert set(read.values()) == {2}  # while it runs, and to add them up


def test_time_of_shards_in_flight(tmp_path):
    """Five shards at a time that sleep 0.2 seconds each: the time of the stage is not their sum."""

    class Slow(SeededEngine):
        def generate(self, *args, **kwargs):
            time.sleep(0.2)
            return super().generate(*args, **kwargs)

    begin = time.perf_counter()
    sampled = sample_stage(PROBLEMS, Slow(num_calls=5), answer_reward, CONFIG, tmp_path, 2)
    passed = time.perf_counter() - begin
    each = [sampled.summary(index)["seconds"] for index in range(5)]
    assert min(each) >= 0.2
    assert max(each) <= sampled.manifest["seconds"] <= passed < sum(each)


def test_too_few_problems_with_signal(tmp_path, caplog):
    sampled, _ = run(tmp_path, SeededEngine(), num_problems=11)
    assert "of 10 problems have solutions with different outcomes; 11 were asked for" in caplog.text
    assert sampled.manifest["counts"]["problems"] == 10


def test_manifests(tmp_path):
    """They say what was asked for and what came of it."""
    sampled, values = run(tmp_path, SeededEngine())
    manifest = sampled.manifest
    assert manifest["config"]["engine"] == {"engine": "seeded"}
    assert manifest["config"]["rollouts"]["num_solutions"] == 3
    assert manifest["config"]["reward_function"] == "conftest.answer_reward"
    assert manifest["counts"]["solutions"] == manifest["rows"]["sampled"] == 30
    assert manifest["counts"]["tokens_generated"] > 0
    assert manifest["counts"]["calls"] == 4
    assert values.manifest["config"]["sampled"] == manifest["fingerprint"]
    assert values.manifest["counts"]["states"] > 0
    assert sampled.table("sampled")[0]["level"] == 0


def test_any_callable_judges(tmp_path):
    """A partial function, too, which has no name of its own."""
    reward = functools.partial(answer_reward)
    sampled = sample_stage(PROBLEMS, SeededEngine(), reward, CONFIG, tmp_path)
    assert sampled.manifest["config"]["reward_function"] == "functools.partial"


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"config": RolloutConfig(num_solutions=4, num_kept=2, num_completions=4)}, "num_solutions` was 3, is now 4"),
        ({"problems": PROBLEMS.select(range(9, -1, -1))}, "`problems` was"),
        ({"shard_size": 2}, "`shard_size` was 3, is now 2"),
        ({"num_problems": 2}, "`num_problems` was None, is now 2"),
        ({"engine": ScriptedEngine({})}, "`engine.engine` was 'seeded', is now 'script'"),
    ],
)
def test_another_configuration_is_refused(tmp_path, change, difference):
    run(tmp_path, SeededEngine())
    with pytest.raises(ValueError, match=f"another configuration: .*{difference}"):
        run(tmp_path, **({"engine": SeededEngine()} | change))


def test_values_of_other_solutions_are_refused(tmp_path):
    sampled, _ = run(tmp_path, SeededEngine())
    config = RolloutConfig(num_solutions=3, num_kept=2, num_completions=4, sampling=SamplingConfig(max_new_tokens=9))
    with pytest.raises(ValueError, match=r"`rollouts.sampling.max_new_tokens` was 1024, is now 9"):
        value_stage(sampled, SeededEngine(), answer_reward, config, tmp_path / "values")


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        (Dataset.from_list([]), "The data set of problems is empty"),
        (PROBLEMS.rename_column("prompt", "question"), "need a column `prompt`, found only"),
        (PROBLEMS.add_column("reward", [0.0] * 10), "have columns 'reward', which sampling adds"),
        (PROBLEMS.add_column("problem_id", [*range(9), 3]), "Rows 3 and 9 .* the same `problem_id` '3'"),
    ],
)
def test_bad_problems(tmp_path, problems, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, SeededEngine(), problems=problems)
