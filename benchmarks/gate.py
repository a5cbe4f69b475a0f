"""
The gate before the policy, over ten seeds of a task: which critics does it refuse, and how good are those that pass?

    python benchmarks/gate.py [--task arithmetic] [--seeds 0 1 2 3 4 5 6 7 8 9] [--output_dir runs/bench]

Each run is `dapo-trl score` with the task's recipe, `--values critic` and a seed; where `demo.py` has left a run of the
seed, it is taken. What is measured is kept in `gate.json` of the run, and is not measured again. Of each critic, broken
ones are made, and value the held-out rows with `predict_values`. Then all of them go through the gate, which stops
nothing here, so that a working critic that it refuses is counted as one:

- constant: head weights of 0, its bias the logit of the mean outcome of the training problems;
- inverted: the head negated;
- untrained: the student with a fresh head;
- fresh head: the trained backbone with a fresh head, of another seed than the run's: training moves a head so little,
  and features so much, that the head which the training began with is nearly as good as the one that it ended with.

Beside these stand three critics that begin with a larger model, whose mean value is taken: `RUN-larger` has the same
samples.

Then `dapo-trl diagnose ... --num_completions 64` draws 64 fresh completions of every held-out state and candidate, for
a better truth. On the demo's task, the first five seeds also have three larger critics of four times the problems, with
samples of their own (`RUN-more`), for what data are worth to a critic. Writes `benchmarks/results/gate.json` (of other
tasks `gate-TASK.json`) and the tables between the marks of `benchmarks/README.md`. Three hours on two CPU cores.
"""

import argparse
import json
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForTokenClassification, AutoTokenizer

from dapo_trl import StepCriticConfig, StepCriticTrainer
from dapo_trl.critic_gate import UnfitCriticError, refuse_unfit
from dapo_trl.diagnosing import diagnose_once, held_out_rows, record
from dapo_trl.diagnosis import diagnose
from dapo_trl.diagnostics import TOLD_APART
from dapo_trl.files import write_atomically
from dapo_trl.fresh_diagnosis import with_counts
from dapo_trl.run_folder import held_out_problems
from dapo_trl.values import Counts
from learning_jobs import TASKS, Task, larger_critics
from recording import REPOSITORY, interval, keep, origin, origin_in_words, write_between


PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")
NUM_COMPLETIONS = 64
LARGER = "three larger, their mean"
WORKING = {"working": "The working critics", LARGER: "The means of three critics that begin with a larger model"}
KINDS = (*WORKING, "constant", "inverted", "untrained", "fresh head")
MORE, NUM_SEEDS_MORE, NUM_PROBLEMS_MORE = 4, 5, 70  # times the problems; how many of the held-out ones are measured
KEPT = ("num_problems", "num_states", "num_pairs", "num_clear_pairs", "pairs_by_difference")
MEASURES = {
    "skill": "skill",
    "advantage_correlation": "correlation of advantages",
    "sibling_ranking": "next steps ordered right, 0.3 apart",
    "clear_ranking": "two standard errors apart",
    "calibration_error": "calibration error",
    "rank_correlation": "rank correlation",
}


def command(name: str, task: Task, seed: int, folder: Path, *options: str) -> None:
    """A command with the task's recipe, as a process. It goes on with any critic: the gate is asked later."""
    given = [*options, "--values", "critic", "--allow_unfit_critic", "true"]
    given += ["--seed", str(seed), "--output_dir", str(folder)]
    subprocess.run([sys.executable, "-m", "dapo_trl", name, str(task.recipe), *given], check=True)


def rows_of(folder: Path) -> dict[str, Dataset]:
    """The scored rows of the held-out problems."""
    tables = {
        name: Dataset.from_parquet(str(folder / "data" / f"{name}_critic.parquet")) for name in ("solutions", "states")
    }
    held_out = held_out_problems(tables["solutions"]["problem_id"])
    return {name: rows.filter(lambda row: row["problem_id"] in held_out) for name, rows in tables.items()}


def mean_outcome(folder: Path) -> float:
    """Of the states of the problems that the critic was trained on."""
    rows = Dataset.from_parquet(str(folder / "data" / "solutions_critic.parquet"))
    held_out = held_out_problems(rows["problem_id"])
    rows = rows.filter(lambda row: row["problem_id"] not in held_out)
    successes, rollouts = (sum(map(sum, rows[name])) for name in ("mc_successes", "mc_rollouts"))
    return successes / rollouts


def make_critic(kind: str, student: Path, folder: Path, seed: int) -> torch.nn.Module:
    """A critic of a kind, from that of a run."""
    torch.manual_seed(1000 + seed)
    source = student if kind == "untrained" else folder / "critic"
    model = AutoModelForTokenClassification.from_pretrained(source, num_labels=1)
    head = model.score
    with torch.no_grad():
        if kind == "inverted":
            head.weight.neg_()
            head.bias.neg_()
        if kind == "constant":
            head.weight.zero_()
            head.bias.fill_(float(np.log(1 / (1 / mean_outcome(folder) - 1))))
        if kind == "fresh head":
            torch.nn.init.normal_(head.weight, std=model.config.initializer_range)
            head.bias.zero_()
    return model


def valued(model: torch.nn.Module, student: Path, rows: dict[str, Dataset]) -> tuple[list[dict], list[dict]]:
    """The rows with the critic's values."""
    args = StepCriticConfig("runs/gate", report_to="none", bf16=False, use_cpu=True, gradient_checkpointing=False)
    tokenizer = AutoTokenizer.from_pretrained(student)
    trainer = StepCriticTrainer(model=model, args=args, processing_class=tokenizer)
    solutions, states = (trainer.predict_values(rows[name]).to_list() for name in ("solutions", "states"))
    return solutions, states


def fresh_counts(folder: Path) -> dict[tuple, Counts]:
    """What `dapo-trl diagnose` has drawn."""
    place = folder / "diagnosis" / f"{NUM_COMPLETIONS}-completions" / "shards"
    rows = Dataset.from_parquet([str(path) for path in sorted(place.glob("*-counts.parquet"))])
    return {(row["problem_id"], tuple(row["state"])): Counts(row["mc_successes"], row["mc_rollouts"]) for row in rows}


def is_refused(found: dict, folder: Path) -> bool:
    try:
        refuse_unfit(found, folder)
    except UnfitCriticError:
        return True
    return False


def measure(task: Task, seed: int, folder: Path) -> dict:
    """All kinds of critics of a seed: whether they are refused, and how good they are."""
    command("score", task, seed, folder)
    command("diagnose", task, seed, folder, "--num_completions", str(NUM_COMPLETIONS))
    counts, rows = fresh_counts(folder), rows_of(folder)
    found = {}
    for kind in KINDS:
        if kind in WORKING:  # as the run itself has it
            data = (folder if kind == "working" else score_by_larger(task, seed, folder)) / "data"
            tables, own = held_out_rows(data, ("prefix", "candidates")), diagnose_once(data)
        else:
            tables = valued(make_critic(kind, task.student, folder, seed), task.student, rows)
            own = record(diagnose(*tables))
        afresh = record(diagnose(*with_counts(*tables, counts)))
        found[kind] = {"refused": is_refused(own, folder)} | {
            name: {part: each[part] for part in ("measures", *KEPT)} for name, each in (("run", own), ("fresh", afresh))
        }
        found[kind]["fresh"]["ranking_by_difference"] = afresh["ranking_by_difference"]
    return found


def score_by_larger(task: Task, seed: int, folder: Path) -> Path:
    """A run with the same samples, whose critics begin with a larger model."""
    larger = folder.with_name(f"{folder.name}-larger")
    for stage in ("sampled", "values"):
        shutil.copytree(folder / stage, larger / stage, dirs_exist_ok=True)
    command("score", task, seed, larger, *larger_critics(task))
    return larger


def measure_once(task: Task, seed: int, folder: Path) -> dict:
    """The same, kept in the folder of the run."""
    path = folder / "gate.json"
    if not path.exists() or set(json.loads(path.read_text())) != set(KINDS):
        write_atomically(path, json.dumps(measure(task, seed, folder), indent=2))
    return json.loads(path.read_text())


def measure_more(task: Task, seed: int, folder: Path) -> dict:
    """Three larger critics of more problems, against fresh completions."""
    more = folder.with_name(f"{folder.name}-more")
    found = more / "diagnosis" / f"{NUM_COMPLETIONS}-completions-{NUM_PROBLEMS_MORE}-problems" / "diagnosis.json"
    if not found.exists():
        options = ("--num_train_problems", str(MORE * task.settings["num_train_problems"]), *larger_critics(task))
        command("score", task, seed, more, *options)
        measured = ("--num_completions", str(NUM_COMPLETIONS), "--max_problems", str(NUM_PROBLEMS_MORE))
        command("diagnose", task, seed, more, *measured, *options)
    known = json.loads(found.read_text())
    return {"more": {"fresh": {name: known[name] for name in ("measures", *KEPT)}}}


def by_frequency(folders: list[Path]) -> dict[str, dict]:
    """
    Pairs of next steps that fresh completions tell 0.3 apart, and the share that the working critics order right: where
    the run itself has drawn both four times at least, and where it has not.
    """
    found = {"frequent": [0, 0.0], "rare": [0, 0.0]}
    for folder in folders:
        solutions, own = held_out_rows(folder / "data", ("prefix", "candidates"))
        states = with_counts(solutions, own, fresh_counts(folder))[1]
        for before, row in zip(own, states, strict=True):
            known = [i for i, reward in enumerate(row["rewards"]) if reward is None and row["mc_rollouts"][i] >= 4]
            for i, j in combinations(known, 2):
                truth = [row["mc_successes"][k] / row["mc_rollouts"][k] for k in (i, j)]
                if abs(truth[0] - truth[1]) < TOLD_APART - 1e-9:
                    continue
                is_right = (truth[0] - truth[1]) * (row["critic_values"][i] - row["critic_values"][j]) > 0
                kind = found["frequent" if min(before["mc_rollouts"][i], before["mc_rollouts"][j]) >= 4 else "rare"]
                kind[0] += 1
                kind[1] += is_right
    return {name: {"pairs": pairs, "ranking": right / pairs} for name, (pairs, right) in found.items()}


def over_seeds(runs: dict[str, dict], kind: str, place: str, name: str) -> tuple[float, float]:
    """Mean over the seeds, and the half-width of its 95% interval (Student's t)."""
    mean, half = interval([run[kind][place]["measures"][name]["mean"] for run in runs.values()])
    return mean / 100, half / 100


def refused_table(runs: dict[str, dict]) -> str:
    """How many of each kind are refused; and how those order next steps that are not."""
    lines = [
        "| critic | refused | skill, lowest to highest | correlation of advantages, lowest to highest | "
        "next steps ordered right by those that pass, lowest to highest |",
        "|---" * 5 + "|",
    ]
    for kind in KINDS:
        found = [run[kind] for run in runs.values()]
        passed = [each["fresh"]["measures"]["sibling_ranking"]["mean"] for each in found if not each["refused"]]
        cells = [f"{sum(each['refused'] for each in found)} of {len(found)}"]
        for name in ("skill", "advantage_correlation"):
            cells.append(span([each["run"]["measures"][name]["mean"] for each in found]))
        lines.append(f"| {kind} | {' | '.join([*cells, span(passed)])} |")
    return "\n".join(lines)


def span(values: list[float]) -> str:
    return f"{100 * min(values):.1f} to {100 * max(values):.1f}" if values else ""


def percent(estimate: dict) -> str:
    return f"{100 * estimate['mean']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def working_table(runs: dict[str, dict], kind: str, place: str) -> str:
    """The measures of critics that are not broken, a line a seed; then their means."""
    lines = [f"| seed | problems, pairs | {' | '.join(MEASURES.values())} |", "|---" * (len(MEASURES) + 2) + "|"]
    for seed, run in runs.items():
        found = run[kind][place]
        cells = [percent(found["measures"][name]) for name in MEASURES]
        lines.append(f"| {seed} | {found['num_problems']}, {found['num_pairs']} | {' | '.join(cells)} |")
    means = [over_seeds(runs, kind, place, name) for name in MEASURES]
    cells = [f"**{100 * mean:.1f} ± {100 * half:.1f}**" for mean, half in means]
    return "\n".join([*lines, f"| mean | | {' | '.join(cells)} |"])


def difference_table(runs: dict[str, dict]) -> str:
    """Share of pairs that the working critics order right, by how far apart they are, all seeds together."""
    found = [run["working"]["fresh"] for run in runs.values()]
    names = list(dict.fromkeys(name for each in found for name in each["pairs_by_difference"]))
    cells = []
    for name in names:
        pairs = np.array([each["pairs_by_difference"].get(name, 0) for each in found])
        ranking = np.array([each["ranking_by_difference"].get(name, {"mean": 0.0})["mean"] for each in found])
        cells.append(f"{100 * (pairs @ ranking) / pairs.sum():.1f} ({pairs.sum():,})")
    titles = " | ".join(f"{name} apart" for name in names)
    return f"| {titles} |\n{'|---' * len(names)}|\n| {' | '.join(cells)} |"


def details(results: dict) -> str:
    runs = results["runs"]
    frequent, rare = (results["by_frequency"][name] for name in ("frequent", "rare"))
    text = f"{origin_in_words(results)} Numbers in percent.\n\n{refused_table(runs)}\n\n"
    for kind, title in WORKING.items():
        text += (
            f"{title} by the run's own completions, which the gate decides by, with 95% intervals over problems; "
            f"the mean with that over seeds:\n\n{working_table(runs, kind, 'run')}\n\nThe same by "
            f"{NUM_COMPLETIONS} fresh completions of every state and candidate:\n\n"
            f"{working_table(runs, kind, 'fresh')}\n\n"
        )
    if more := results.get("more"):
        text += (
            f"The means of three critics that begin with a larger model, of {MORE} times the problems, by "
            f"{NUM_COMPLETIONS} fresh completions of the states and candidates of {NUM_PROBLEMS_MORE} of the held-out "
            f"ones:\n\n{working_table(more, 'more', 'fresh')}\n\n"
        )
    return (
        f"{text}Of these pairs, all seeds together, the run has drawn both next steps four times at least in "
        f"{frequent['pairs']:,}, of which {frequent['ranking']:.0%} are ordered right by the working critics; of the "
        f"{rare['pairs']:,} others it is {rare['ranking']:.0%}.\n\nNext steps that they order right by the distance of "
        f"the mean outcomes of {NUM_COMPLETIONS} completions, all seeds (pairs):\n\n{difference_table(runs)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="arithmetic")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs" / "bench")
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    suffix, given = ("", []) if task.name == "arithmetic" else (f"-{task.name}", ["--task", task.name])
    folders = {str(seed): arguments.output_dir / f"{task.recipe.stem}-{seed}" for seed in arguments.seeds}
    results = {
        **origin(" ".join(["python benchmarks/gate.py", *given, "--seeds", *folders]), PACKAGES),
        "runs": {seed: measure_once(task, int(seed), folder) for seed, folder in folders.items()},
        "by_frequency": by_frequency(list(folders.values())),
    }
    if not suffix:
        few = list(folders.items())[:NUM_SEEDS_MORE]
        results["more"] = {seed: measure_more(task, int(seed), folder) for seed, folder in few}
    keep(results, f"gate{suffix}")
    write_between(REPOSITORY / "benchmarks" / "README.md", f"gate{suffix}", details(results))
    print(details(results))


if __name__ == "__main__":
    main()
