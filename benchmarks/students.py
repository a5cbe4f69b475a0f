"""
What the students and the larger models of the critics can do, on validation problems.

    python benchmarks/students.py [--num_problems 1024] [--seed 0]

Each solves the problems greedily and with 4 samples at temperature 1; "no wrong line" is the share of these samples
that are the right solution, word for word. As they were taught, they then proofread a demonstration of each problem:
`<right>` or `<wrong>` at the end of every line, whichever is more probable. Demonstrations are also counted themselves.

Writes `benchmarks/results/students.json` and the table in `examples/student/README.md`. Two minutes on two CPU cores.
"""

import argparse
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from dapo_trl import SamplingConfig, math_reward
from dapo_trl.evaluation import bootstrap_mean, evaluate_policy
from dapo_trl.intervals import Estimate
from learning_jobs import TASKS, Task, make_engine  # and the folder of the tasks on the path
from pretrain import IGNORED, proofreading_batch
from recording import REPOSITORY, command_line, keep, origin, origin_in_words, write_between


PACKAGES = ("torch", "transformers", "datasets", "math-verify")
README = REPOSITORY / "examples" / "student" / "README.md"
K = 4
BATCH = 256
MEASURES = {
    "greedy": "greedy",
    "sampled": f"mean@{K}",
    "no_wrong_line": "no wrong line",
    "proofread": "lines proofread right",
}


def measure(task: Task, model: Path, problems: list[dict[str, str]], seed: int) -> dict[str, Any]:
    """All measures of one model."""
    judged: list[list[str]] = []  # greedy solutions, then K samples of each problem

    def reward(completions: list[str], **kwargs: Any) -> list[float | None]:
        judged.append(completions)
        return math_reward(completions=completions, **kwargs)

    sampling = SamplingConfig(max_new_tokens=task.settings["max_new_tokens"])
    found = evaluate_policy(Dataset.from_list(problems), make_engine(model), reward, sampling, K, seed)
    samples = [judged[-1][start : start + K] for start in range(0, len(judged[-1]), K)]
    return {
        "parameters": AutoModelForCausalLM.from_pretrained(model).num_parameters(),
        "greedy": asdict(found.greedy),
        "sampled": asdict(found.mean_at_k),
        "no_wrong_line": no_wrong_line(task, problems, samples, seed),
        "proofread": asdict(bootstrap_mean(proofread(task, model, problems, seed), seed)),
    }


def measure_demonstrations(task: Task, problems: list[dict[str, str]], seed: int) -> dict[str, Any]:
    """How many of what the student was taught are right."""
    rng, module = random.Random(seed), task.module
    solutions = [[module.demonstration(problem, rng) for _ in range(K)] for problem in problems]
    right = [
        np.mean([module.is_correct(problem, each) for each in group])
        for problem, group in zip(problems, solutions, strict=True)
    ]
    faultless = no_wrong_line(task, problems, solutions, seed)
    return {"sampled": asdict(bootstrap_mean(right, seed)), "no_wrong_line": faultless}


def no_wrong_line(
    task: Task, problems: list[dict[str, str]], solutions: list[list[str]], seed: int
) -> dict[str, float]:
    """Share of each problem's solutions that are the right one, word for word."""
    shares = [
        np.mean([each == task.module.correct_solution(problem) for each in group])
        for problem, group in zip(problems, solutions, strict=True)
    ]
    return asdict(bootstrap_mean(shares, seed))


@torch.no_grad()
def proofread(task: Task, model: Path, problems: list[dict[str, str]], seed: int) -> list[float]:
    """Of each problem's demonstration, the share of the lines of which the more probable verdict is the right one."""
    tokenizer, rng = AutoTokenizer.from_pretrained(model), random.Random(seed)
    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    verdicts = tokenizer.convert_tokens_to_ids(["<right>", "<wrong>"])
    shares = []
    for start in range(0, len(problems), BATCH):
        input_ids, labels = proofreading_batch(task.module, problems[start : start + BATCH], rng, tokenizer)
        logits = policy(input_ids=input_ids, use_cache=False).logits[:, :, verdicts]
        given = torch.tensor(verdicts)[logits.argmax(-1)]
        is_line = labels != IGNORED
        shares += (((given == labels) & is_line).sum(1) / is_line.sum(1)).tolist()
    return shares


# ---- Report ----


def details(record: dict[str, Any]) -> str:
    lines = [f"| | parameters | {' | '.join(MEASURES.values())} |", "|---" * (len(MEASURES) + 2) + "|"]
    for title, found in record["results"].items():
        parameters = f"{found['parameters']:,}" if "parameters" in found else ""
        cells = [str(Estimate(**found[name])) if name in found else "" for name in MEASURES]
        lines.append(f"| {title} | {parameters} | {' | '.join(cells)} |")
    return (
        f"{origin_in_words(record)} {record['problems']:,} validation problems, seed {record['seed']}, 95% intervals "
        "over problems.\n\n" + "\n".join(lines)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--num_problems", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    results = {}
    for name, task in TASKS.items():
        problems = task.module.make_problems("validation", given.num_problems, given.seed)
        title = name.replace("_", " ")
        results[f"{title}: demonstrations"] = measure_demonstrations(task, problems, given.seed)
        results[f"{title}: student"] = measure(task, task.student, problems, given.seed)
        results[f"{title}: larger"] = measure(task, task.larger, problems, given.seed)
    record = {
        **origin(command_line(), PACKAGES),
        "problems": given.num_problems,
        "seed": given.seed,
        "results": results,
    }
    keep(record, "students")
    write_between(README, "students", details(record))
    print(details(record))


if __name__ == "__main__":
    main()
