"""
Is this better than what people do today? The same student, problems and number of generated tokens; other methods.

    python benchmarks/learning.py [--tasks arithmetic word_problems] [--seeds 0 1 ... 9] [--no-siblings]
        [--output_dir runs/learning]

Every method is tuned in the same way, on validation problems with the data of seeds that are not reported. On the first
of them: five learning rates (`FIRST`), and from the best of them step by step to better neighbours on the grid of its
settings (`AXES`: learning rate, beta, how long it trains). The best four go on to the other seeds, and the best of
them over all is taken: a setting that is good once may fail the next time. Later tasks, whose solutions are more and
longer, begin with the settings of the first and search the learning rate, on the first of the seeds.
Then each seed has problems, samples, critic and training of its own, and is evaluated on the same 1,024 test problems,
none of which anything was trained on: greedily, and 8 samples a problem at temperature 1. Intervals are Student's t
over seeds; differences are paired: of the same seed. Sibling methods (docs/siblings) have the first five of the seeds.
So have later tasks, which have one iteration, and no sibling methods.

A benchmark that was killed goes on where it was, also from `benchmarks/results/jobs.jsonl` of an earlier one: delete
that and `runs/learning` to measure everything again. Writes `benchmarks/results/learning.json`, the tables in
`benchmarks/README.md` and `README.md`, and `docs/images/learning.png`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from learning_jobs import NUM_TEST, NUM_VALIDATION, PACKAGES, TASKS, Job, K, dates_of, larger_critics, restore, run_jobs
from learning_report import NUM_SEEDS_SIBLINGS, SIBLINGS, TITLES, details, draw, short, table
from recording import REPOSITORY, command_line, keep, origin, write_between


TUNING_SEEDS = (100, 101, 102)  # of the data with which settings are chosen; the search is on the first
NUM_FINALISTS = 4  # settings that are tried on all of them
NUM_SEEDS_LATER = 5
RATES = (1.6e-5, 4e-5, 1e-4, 2.5e-4, 6e-4, 1.5e-3, 3.7e-3)
FIRST = RATES[1:-1]  # tried with the defaults of the other settings, before the search goes on from the best


Settings = dict[str, Any]


class Axis(NamedTuple):
    """A setting, its values in their order, and its default."""

    name: str
    values: tuple[float, ...]
    default: float


BETA = Axis("beta", (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 1.0, 3.0), 0.1)
PASSES = Axis("num_train_epochs", (1, 2, 3, 5, 8), 1)
STATES = PASSES._replace(default=3)  # states are more and shorter than solutions
RATE = Axis("learning_rate", RATES, FIRST[2])
AXES: dict[str, tuple[Axis, ...]] = {
    "rft": (RATE, PASSES),
    "dpo": (RATE, BETA, PASSES),
    "step_dpo": (RATE, BETA, PASSES._replace(default=2)),
    "kto": (RATE, BETA, PASSES),
    "grpo": (RATE, Axis("num_iterations", (1, 2, 4), 1)),
    "larger_critics": (RATE, BETA, STATES),
    "critic": (RATE, BETA, STATES),
    "paper": (RATE, BETA, STATES),
    "shrinkage": (RATE, BETA, STATES),
    "monte_carlo": (RATE, BETA, STATES),
}
AXES |= {  # of the sibling methods, on the first task
    "log_partition_sample": (RATE, BETA, STATES),
    "log_partition_gaussian": (RATE, BETA._replace(default=0.3), STATES),
    "listwise": (RATE, Axis("value_power", (0.5, 1.0, 2.0, 4.0, 8.0), 1.0), STATES),
    "hard_negatives": (RATE, BETA, PASSES._replace(default=2)),
    "worst_negatives": (RATE, BETA, PASSES._replace(default=2)),
}
AXES_LATER = {method: (RATE,) for method in AXES if method not in SIBLINGS}  # what is chosen anew on later tasks
MAX_ROUNDS = 6  # of the search
TWICE = {"critic_2": "critic", "shrinkage_2": "shrinkage", "monte_carlo_2": "monte_carlo"}  # settings of the first
# With which two iterations of half the problems generate as many tokens as one of all: a policy that solves nearly all
# problems leaves few that have right and wrong solutions, and so needs few completions.
SOLUTIONS_OF_TWICE = {"num_solutions": 13}


def first_of(axes: tuple[Axis, ...]) -> list[Settings]:
    """Five learning rates, with the defaults of the other settings."""
    defaults = {axis.name: axis.default for axis in axes}
    return [defaults | {"learning_rate": rate} for rate in FIRST]


def job_of(task: str, seed: int, method: str, split: str, settings: Settings) -> Job:
    data = larger_critics(TASKS[task]) if method == "larger_critics" else ()
    return Job(task, seed, method, split, settings, data)


class Search(NamedTuple):
    """What the search of each method starts from, the axes that it may move along, and on how many seeds it ends."""

    starts: dict[str, list[Settings]]
    axes: dict[str, tuple[Axis, ...]]
    seeds: tuple[int, ...]


def tune(task: str, search: Search, folder: Path, num_processes: int) -> dict[str, dict[str, Any]]:
    """
    Settings of each method, by the mean@8 of validation problems; with all that was tried.

    From the best of its starts, the search goes on to the neighbours on the grid, which differ in one setting, as long
    as one of these is better.
    """
    groups = [
        [job_of(task, search.seeds[0], method, "validation", start) for start in starts]
        for method, starts in search.starts.items()
    ]
    run_jobs([job for group in groups for job in group], folder, num_processes)
    for _ in range(MAX_ROUNDS):
        for group in groups:
            group += _neighbours(group, search.axes[group[0].method], folder)
        run_jobs([job for group in groups for job in group], folder, num_processes)
    finals = [_finals(group, search.seeds, folder) for group in groups]
    run_jobs([job for jobs in finals for job in jobs], folder, num_processes)
    return {
        group[0].method: {
            "chosen": _most_reliable(jobs, folder),
            "tried": [_kept(result) for result in run_jobs(group, folder, num_processes)],
            "finals": [_kept(result) | {"seed": result["seed"]} for result in run_jobs(jobs, folder, num_processes)],
        }
        for group, jobs in zip(groups, finals, strict=True)
    }


def _score(job: Job, folder: Path) -> float:
    return json.loads(job.path(folder).read_text())[f"mean@{K}"]


def _finals(group: list[Job], seeds: tuple[int, ...], folder: Path) -> list[Job]:
    """The best settings of a search, on all tuning seeds."""
    finalists = sorted(group, key=lambda job: _score(job, folder), reverse=True)[:NUM_FINALISTS]
    return [replace(job, seed=seed) for job in finalists for seed in seeds]


def _most_reliable(jobs: list[Job], folder: Path) -> Settings:
    """The settings with the best mean over the tuning seeds."""
    scores = [(job.settings, _score(job, folder)) for job in jobs]
    return max((job.settings for job in jobs), key=lambda given: sum(s for settings, s in scores if settings == given))


def _neighbours(group: list[Job], axes: tuple[Axis, ...], folder: Path) -> list[Job]:
    """The settings next to the best ones that were not tried."""
    best = max(group, key=lambda job: _score(job, folder)).settings
    tried = [job.settings for job in group]
    near = [
        best | {axis.name: axis.values[place]}
        for axis in axes
        for place in (axis.values.index(best[axis.name]) - 1, axis.values.index(best[axis.name]) + 1)
        if 0 <= place < len(axis.values)
    ]
    return [replace(group[0], settings=each) for each in near if each not in tried]


def _kept(result: dict[str, Any]) -> dict[str, Any]:
    names = ("settings", "greedy", f"mean@{K}", f"pass@{K}", "tokens", "training_seconds")
    return {name: result[name] for name in names}


def compare(
    task: str, search: Search, twice: dict[str, str], seeds: Sequence[int], folder: Path, num_processes: int
) -> dict[str, Any]:
    """Tune on the tuning seeds, report the others."""
    tuned = tune(task, search, folder, num_processes)
    settings = {"student": {}} | {method: found["chosen"] for method, found in tuned.items()}
    settings |= {method: tuned[like]["chosen"] | SOLUTIONS_OF_TWICE for method, like in twice.items()}
    if "listwise" in tuned:  # with the other sibling methods
        rate = {"grpo_learning_rate": tuned["grpo"]["chosen"]["learning_rate"]}
        settings["warm_up"] = tuned["critic"]["chosen"] | rate
    jobs = [
        job_of(task, seed, method, "test", given)
        for method, given in settings.items()
        for seed in (seeds[:NUM_SEEDS_SIBLINGS] if method in SIBLINGS else seeds)
    ]
    results = run_jobs(jobs, folder, num_processes)
    by_method: dict[str, dict[str, Any]] = {method: {} for method in TITLES if method in settings}
    for job, result in zip(jobs, results, strict=True):
        by_method[job.method][str(job.seed)] = _kept(result)
    tokens = {seed: run["tokens"] for seed, run in by_method["critic"].items()}
    return {"tokens": tokens, "settings": settings, "tuning": tuned, "results": by_method}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--siblings", action=argparse.BooleanOptionalAction, default=True, help="See docs/siblings.")
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs" / "learning")
    parser.add_argument("--num_processes", type=int, default=2, help="Trainings at a time, one core each.")
    given = parser.parse_args()
    if given.tasks != list(TASKS)[: len(given.tasks)]:
        parser.error(f"--tasks begins with the first of {', '.join(TASKS)}: later ones begin with its settings.")
    restore(given.output_dir)
    record = {
        **origin(command_line(), PACKAGES),
        "seeds": given.seeds,
        "problems": {"test": NUM_TEST, "validation": NUM_VALIDATION},
        "tasks": {},
    }
    methods = [method for method in AXES if given.siblings or method not in SIBLINGS]
    search = Search({method: first_of(AXES[method]) for method in methods}, AXES, TUNING_SEEDS)
    seeds, twice = given.seeds, TWICE
    for task in given.tasks:
        record["tasks"][task] = compare(task, search, twice, seeds, given.output_dir, given.num_processes)
        record["tasks"][task]["trained"] = dates_of(task)
        found = record["tasks"][task]["tuning"]
        chosen = {method: [found[method]["chosen"]] for method in AXES_LATER}
        search = Search(chosen, AXES_LATER, TUNING_SEEDS[:1])
        seeds, twice = given.seeds[:NUM_SEEDS_LATER], {}
        print(table(record["tasks"][task]))
        keep(record, "learning")
    write_between(REPOSITORY / "benchmarks" / "README.md", "learning", details(record))
    write_between(REPOSITORY / "README.md", "learning table", short(record))
    draw(record, REPOSITORY / "docs" / "images" / "learning.png")


if __name__ == "__main__":
    main()
