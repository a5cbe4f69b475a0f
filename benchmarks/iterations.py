"""
The iterative method over several seeds: is the second policy at least as good as the first?

    python benchmarks/iterations.py [--seeds 0 1 2 3 4] [--output_dir runs/iterations]

Each run is `dapo-trl run examples/recipes/demo.yaml` with two iterations on the critic's values: the first policy
samples the second round's data and is its reference, and the critic goes on from the first one's. Iterations take
smaller steps than the demo does at once: `STEPS`. A run that is there goes on where it was. Writes
`benchmarks/results/iterations.json` and the table between the marks of `benchmarks/README.md`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from recording import REPOSITORY, interval, keep, origin, origin_in_words, write_between


PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "math-verify")
STEPS = {"beta": 0.1, "learning_rate": 4e-4, "max_steps": 80}  # of the policy
METRICS = {"greedy": "greedy", "mean@4": "mean_at_k"}


def run(seed: int, output_dir: Path) -> list[dict]:
    """Accuracies before training and after each iteration."""
    recipe = REPOSITORY / "examples" / "recipes" / "demo.yaml"
    command = [sys.executable, "-m", "dapo_trl", "run", str(recipe), "--iterations", "2", "--values", "critic"]
    command += ["--anchor_states", "false"]  # as they were measured
    command += [word for name, value in STEPS.items() for word in (f"--policy.{name}", str(value))]
    subprocess.run([*command, "--seed", str(seed), "--output_dir", str(output_dir)], check=True)
    results = json.loads((output_dir / "results.json").read_text())
    return [results["before"], *(iteration["policy_critic"] for iteration in results["iterations"])]


def percent(estimate: dict) -> str:
    return f"{100 * estimate['mean']:.1f} ± {50 * (estimate['high'] - estimate['low']):.1f}"


def table(runs: dict[str, list[dict]]) -> str:
    """Accuracies, a line a seed; then what the second iteration adds, over the seeds."""
    stages = ("before", "iteration 1", "iteration 2")
    lines = [
        f"| seed | {' | '.join(f'{metric}: {stage}' for metric in METRICS for stage in stages)} |",
        "|---" * 7 + "|",
    ]
    for seed, evaluations in runs.items():
        cells = [percent(evaluation[name]) for name in METRICS.values() for evaluation in evaluations]
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    cells = []
    for metric in METRICS:
        cells += ["", "", f"{rise(runs, metric)} on the first"]
    return "\n".join([*lines, f"| mean | {' | '.join(cells)} |"])


def rise(runs: dict[str, list[dict]], metric: str) -> str:
    """What the second iteration adds to the first, in points."""
    name = METRICS[metric]
    mean, half = interval([second[name]["mean"] - first[name]["mean"] for _, first, second in runs.values()])
    return f"{mean:+.1f} ± {half:.1f}"


def details(record: dict) -> str:
    return f"{origin_in_words(record)}\n\n{table(record['runs'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs" / "iterations")
    arguments = parser.parse_args()
    record = {
        **origin("python benchmarks/iterations.py --seeds " + " ".join(map(str, arguments.seeds)), PACKAGES),
        "runs": {str(seed): run(seed, arguments.output_dir / f"seed-{seed}") for seed in arguments.seeds},
    }
    keep(record, "iterations")
    write_between(REPOSITORY / "benchmarks" / "README.md", "iterations", details(record))
    print(table(record["runs"]))


if __name__ == "__main__":
    main()
