"""
What `learning.py` and `ablations.py` have in common: tasks, data of equal cost, trainings, and their results on disk.

A job is one training and its evaluation; its result is kept in a file of its own, so that a benchmark that was killed
goes on where it was, and in a line of `benchmarks/results/jobs.jsonl`, with date and versions, so that it also goes on
elsewhere. Jobs run in as many processes as there are cores, one thread each.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset

from dapo_trl.files import write_atomically
from recording import REPOSITORY, origin


STUDENTS = REPOSITORY / "examples" / "student"
sys.path.append(str(STUDENTS))
KEPT = REPOSITORY / "benchmarks" / "results" / "jobs.jsonl"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "math-verify")
NUM_TEST, NUM_VALIDATION, K = 1024, 512, 8
PROBLEM_SEED = 77  # of the problems that policies are evaluated on: the same for all
SAMPLE_SEED = 99  # of their samples
CRITIC_SHARE = "--critic_share"  # argument of data, of no command: of how many of the problems the critic learns


@dataclass(frozen=True)
class Task:
    """
    A kind of problems, with a student that half knows it.

    Attributes:
        name (`str`):
            Module of `examples/student` that makes the problems.
        student (`Path`):
            The model.
        recipe (`Path`):
            How this method is run on it.
        larger (`Path`):
            A larger model that was taught the same, for critics.
    """

    name: str
    student: Path
    recipe: Path
    larger: Path

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(self.name)

    def problems(self, split: str, number: int, seed: int) -> Dataset:
        return Dataset.from_list(self.module.make_problems(split, number, seed))

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the recipe."""
        import yaml

        return yaml.safe_load(self.recipe.read_text())


RECIPES = REPOSITORY / "examples" / "recipes"
TASKS = {
    "arithmetic": Task("arithmetic", STUDENTS, RECIPES / "demo.yaml", STUDENTS / "larger"),
    "word_problems": Task(
        "word_problems",
        STUDENTS / "word_problems",
        RECIPES / "word-problems.yaml",
        STUDENTS / "word_problems" / "larger",
    ),
}


def larger_critics(task: Task) -> tuple[str, ...]:
    """Arguments of a run whose advantages are those of three critics that begin with the larger model."""
    return ("--critic_model_name_or_path", str(task.larger), "--num_critics", "3")


# ---- Data ----


@dataclass(frozen=True)
class Data:
    """
    What the methods may learn from: for each seed the same problems, and as many generated tokens.

    Args:
        task ([`Task`]):
            Task.
        seed (`int`):
            Seed of problems, sampling, critic and training.
        folder (`Path`):
            Where it is kept.
        arguments (`tuple[str, ...]`, *optional*):
            Command line arguments for `dapo-trl score`, of the ablations; or `--critic_share` and a number.
    """

    task: Task
    seed: int
    folder: Path
    arguments: tuple[str, ...] = ()

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def plain(self) -> "Data":
        """Those of the recipe as it is."""
        return replace(self, folder=self.folder.with_name(f"seed-{self.seed}"), arguments=())

    @property
    def has_own_samples(self) -> bool:
        """Whether more than the critic differs from the recipe."""
        return not all(name.startswith(("--critic", "--num_critics")) for name in self.arguments[::2])

    def make(self) -> None:
        """Sample what is not there yet. What a weak critic is worth is measured, not refused."""
        if self.arguments and not self.has_own_samples:
            for stage in ("sampled", "values"):
                shutil.copytree(self.plain.run / stage, self.run / stage, dirs_exist_ok=True)
        if self.arguments[:1] == (CRITIC_SHARE,):
            self._score_by_less(float(self.arguments[1]))
            return
        given = ("--values", "critic", "--allow_unfit_critic", "true", *self.arguments)
        dapo_trl("score", self.task, self.seed, self.run, *given)

    def _score_by_less(self, share: float) -> None:
        """The same rows, with the values of a critic that has learned from a share of the problems."""
        from dapo_trl.diagnosing import record
        from dapo_trl.diagnosis import diagnose
        from dapo_trl.run_folder import held_out_problems

        if (self.run / "data" / "diagnosis.json").exists():
            return
        tables = {"solutions": self.plain.kept_solutions(), "states": self.plain.states()}
        held_out = held_out_problems(tables["solutions"]["problem_id"])
        seen = list(dict.fromkeys(each for each in tables["solutions"]["problem_id"] if each not in held_out))
        chosen = set(seen[: round(share * len(seen))])
        rows = tables["solutions"].filter(lambda row: row["problem_id"] in chosen)
        trainer = train_critic(rows, self.task, self.run / "critic", self.seed)
        (self.run / "data").mkdir(exist_ok=True)
        for name, table in tables.items():
            tables[name] = trainer.predict_values(table)
            tables[name].to_parquet(str(self.run / "data" / f"{name}_critic.parquet"))
        unseen = [table.filter(lambda row: row["problem_id"] in held_out) for table in tables.values()]
        write_atomically(self.run / "data" / "diagnosis.json", json.dumps(record(diagnose(*unseen))))

    @property
    def tokens(self) -> int:
        """Generated tokens of this method's data: solutions and completions."""
        return tokens_of_runs(self.run)

    @property
    def tokens_per_solution(self) -> float:
        """Mean length of the sampled solutions."""
        sampled = json.loads((self.run / "sampled" / "manifest.json").read_text())
        return sampled["counts"]["tokens_generated"] / sampled["rows"]["sampled"]

    def states(self) -> Dataset:
        """State rows with counts and the critic's values."""
        return Dataset.from_parquet(str(self.run / "data" / "states_critic.parquet"), cache_dir=self._cache)

    def kept_solutions(self) -> Dataset:
        """The solutions whose states these are."""
        return Dataset.from_parquet(str(self.run / "data" / "solutions_critic.parquet"), cache_dir=self._cache)

    def problem_ids(self) -> list[str]:
        """Problems of the solution rows: every tenth of them is held out from the critic. A few have no state rows."""
        return self.kept_solutions()["problem_id"][:]

    @property
    def _cache(self) -> str:
        return str(self.folder / ".cache" / str(os.getpid()))

    def solutions(self) -> list[dict[str, Any]]:
        """Solutions for the methods that learn from whole ones: as many tokens as this method's data have."""
        from dapo_trl import math_reward
        from dapo_trl.engines import SamplingConfig
        from dapo_trl.rollouts import RolloutConfig
        from dapo_trl.stages import sample_stage

        settings = self.task.settings
        problems = self.task.problems("train", settings["num_train_problems"], self.seed)
        config = RolloutConfig(
            num_solutions=round(self.tokens / len(problems) / self.tokens_per_solution),
            sampling=SamplingConfig(max_new_tokens=settings["max_new_tokens"]),
            seed=self.seed + 7_000_003,
        )
        engine = make_engine(self.task.student)
        store = sample_stage(problems, engine, math_reward, config, self.folder / "solutions", settings["shard_size"])
        return list(store.table("sampled"))


def tokens_of_runs(*folders: Path) -> int:
    """Tokens that were generated in some runs: solutions and completions."""
    return sum(
        json.loads((folder / part / "manifest.json").read_text())["counts"]["tokens_generated"]
        for folder in folders
        for part in ("sampled", "values")
    )


def train_critic(rows: Dataset, task: Task, folder: Path, seed: int = 42) -> Any:
    """A critic of the task's recipe that begins with the student, trained on these solution rows."""
    from transformers import AutoTokenizer

    from dapo_trl import StepCriticConfig, StepCriticTrainer

    settings = task.settings["critic"] | {"use_cpu": True, "bf16": False, "report_to": "none", "seed": seed}
    trainer = StepCriticTrainer(
        model=str(task.student),
        args=StepCriticConfig(str(folder), **settings, save_strategy="no", max_length=None),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(task.student),
    )
    trainer.train()
    return trainer


def dapo_trl(command: str, task: Task, seed: int, folder: Path, *arguments: str) -> None:
    """Run a command of the library in a process of its own."""
    words = [sys.executable, "-m", "dapo_trl", command, str(task.recipe)]
    words += ["--seed", str(seed), "--output_dir", str(folder), *arguments]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log:
        subprocess.run(words, check=True, stdout=log, stderr=subprocess.STDOUT)


def make_engine(model: Any) -> Any:
    """Engine of a model, or of the one in a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dapo_trl import TransformersEngine

    if isinstance(model, Path):
        tokenizer = AutoTokenizer.from_pretrained(model)
        return TransformersEngine(AutoModelForCausalLM.from_pretrained(model), tokenizer, batch_size=512)
    policy, tokenizer = model
    return TransformersEngine(policy.eval(), tokenizer, batch_size=512)


# ---- Jobs ----


@dataclass(frozen=True)
class Job:
    """
    One training, and its evaluation.

    Attributes:
        task (`str`), seed (`int`), method (`str`):
            What is trained on, and how.
        split (`str`):
            `"validation"` to choose settings, `"test"` to report.
        settings (`dict`):
            Settings of the method.
        data (`tuple[str, ...]`):
            Arguments of the data, of the ablations.
    """

    task: str
    seed: int
    method: str
    split: str
    settings: dict[str, Any] = field(default_factory=dict)
    data: tuple[str, ...] = ()

    def path(self, folder: Path) -> Path:
        """Where its result is."""
        words = [f"{name}={value}" for name, value in sorted(self.settings.items())]
        name = "-".join([self.method, *words, self.split]).replace("/", "_")
        return data_of(self, folder).folder / "results" / f"{name}.json"

    @property
    def key(self) -> str:
        """The same below any folder: no two jobs have one key."""
        return self.path(Path()).as_posix()


def data_of(job: Job, folder: Path) -> Data:
    place = "-".join([f"seed-{job.seed}", *(word.strip("-").rpartition("/")[2] for word in job.data)])
    return Data(TASKS[job.task], job.seed, folder / job.task / place, job.data)


def restore(folder: Path) -> None:
    """Put the results of `jobs.jsonl` into the folder, where they are not run again."""
    for line in KEPT.read_text().splitlines() if KEPT.exists() else ():
        result = json.loads(line)
        path = folder / result["job"]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(result, indent=2))


def dates_of(task: str) -> str:
    """When the jobs of a task were run, from the first to the last."""
    results = map(json.loads, KEPT.read_text().splitlines())
    dates = sorted({result["date"] for result in results if result["task"] == task})
    return " to ".join(dict.fromkeys((dates[0], dates[-1])))


def run_jobs(jobs: Iterable[Job], folder: Path, num_processes: int) -> list[dict[str, Any]]:
    """Results of all jobs, in their order; those that are there are not run again."""
    jobs = list(jobs)
    missing = list({job.path(folder): job for job in jobs if not job.path(folder).exists()}.values())
    sample_data(missing, folder, num_processes)
    run_in_processes(run_job, [(job, folder) for job in missing], num_processes)
    return [json.loads(job.path(folder).read_text()) for job in jobs]


def sample_data(jobs: Iterable[Job], folder: Path, num_processes: int) -> None:
    """What these jobs learn from."""
    data = dict.fromkeys(data_of(job, folder) for job in jobs)
    sampled = {each if each.has_own_samples else each.plain: None for each in data}
    run_in_processes(make_data, [(each,) for each in sampled], num_processes)
    run_in_processes(make_data, [(each,) for each in data if each not in sampled], num_processes)


def make_data(data: Data) -> None:
    data.make()


def run_job(job: Job, folder: Path) -> None:
    """Train, evaluate, and keep the result."""
    from learning_methods import METHODS

    start = time.perf_counter()
    trained = METHODS[job.method](data_of(job, folder), dict(job.settings))
    seconds = time.perf_counter() - start
    result = {
        **asdict(job),
        "training_seconds": round(seconds, 1),
        "tokens": trained.tokens,
        **evaluate(TASKS[job.task], trained.engine, job.split),
    }
    path = job.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, indent=2))
    when = {name: given for name, given in origin("", PACKAGES).items() if name in ("date", "versions")}
    del result["data"]  # paths of this machine; the key tells them
    with KEPT.open("a") as lines:
        lines.write(json.dumps({"job": job.key} | when | result) + "\n")
    print(
        f"{path.parent.parent.name} {path.stem}: greedy {result['greedy']:.3f}, mean@8 {result['mean@8']:.3f}",
        flush=True,
    )


def evaluate(task: Task, engine: Any, split: str) -> dict[str, float]:
    """Accuracy on problems of a split, of which nothing was trained on."""
    from dapo_trl import math_reward
    from dapo_trl.engines import SamplingConfig
    from dapo_trl.evaluation import evaluate_policy

    problems = held_out(task, split)
    sampling = SamplingConfig(max_new_tokens=task.settings["max_new_tokens"])
    found = evaluate_policy(problems, engine, math_reward, sampling, K, SAMPLE_SEED)
    return {"greedy": found.greedy.mean, f"mean@{K}": found.mean_at_k.mean, f"pass@{K}": found.pass_at_k.mean}


@lru_cache
def held_out(task: Task, split: str) -> Dataset:
    return task.problems(split, NUM_TEST if split == "test" else NUM_VALIDATION, PROBLEM_SEED)


def run_in_processes(function: Callable[..., Any], arguments: list[tuple[Any, ...]], num_processes: int) -> None:
    """Call a function with each of several arguments, in so many processes of one thread each."""
    if not arguments:
        return
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.update(variables | {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"})
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(function, *each) for each in arguments]:
            future.result()
