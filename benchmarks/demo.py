"""
The demo over several seeds: the table of the README, and the record behind it.

    python benchmarks/demo.py [--seeds 0 1 2 3 4] [--output_dir runs/bench]

Each run is `examples/math.py --seed n`: other training problems, samples, critic and policy; the student and the
1,024 test problems are the same. A run whose `results.json` is there is not repeated. Writes
`benchmarks/results/demo.json`, the table between the marks of `benchmarks/README.md` and `README.md`, and the README's
figure.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from recording import REPOSITORY, keep, origin, origin_in_words, write_between


PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "math-verify")
SOURCES = ("critic", "monte_carlo")
# Arguments that say nothing of how the demo was run: they differ by run or machine, or are for other data and engines.
UNRECORDED = {"seed", "output_dir", "prompt_template", "dataset_name", "dataset_train_split", "dataset_test_split"}
UNRECORDED |= {"report_to", "max_concurrency", "precision", "estimate"}


def run(seed: int, output_dir: Path, example: str = "math.py", *arguments: str) -> dict:
    """One run of an example in a process of its own, with its wall-clock time."""
    results = output_dir / "results.json"
    if not results.exists():
        command = [sys.executable, str(REPOSITORY / "examples" / example), *arguments]
        start = time.perf_counter()
        subprocess.run([*command, "--seed", str(seed), "--output_dir", str(output_dir)], check=True)
        finished = json.loads(results.read_text()) | {"wall_seconds": time.perf_counter() - start}
        results.write_text(json.dumps(finished, indent=2))
    return json.loads(results.read_text())


def record(runs: dict[str, dict]) -> dict:
    """What is kept of the runs."""
    return {
        **origin("python benchmarks/demo.py --seeds " + " ".join(runs), PACKAGES),
        "arguments": {
            name: value
            for name, value in next(iter(runs.values()))["arguments"].items()
            if name not in UNRECORDED and value not in (None, False, [], {})
        },
        "runs": {
            seed: {name: results[name] for name in ("before", "critic", "policy_critic", "policy_monte_carlo")}
            | {"seconds": {name: row["seconds"] for name, row in results["stages"].items()}}
            | {"tokens": sum(row["tokens"] for row in results["stages"].values())}
            | {"wall_seconds": results["wall_seconds"], "dropped": results["dropped"]}
            for seed, results in runs.items()
        },
    }


def percent(estimate: dict) -> str:
    half = (estimate["high"] - estimate["low"]) / 2
    return f"{100 * estimate['mean']:.1f} ± {100 * half:.1f}"


def table(results: dict) -> str:
    """Accuracies before and after, a line a seed; then how much each rose, over the seeds."""
    after = ("critic values", "Monte Carlo values")
    titles = ("greedy: before", *after, "mean@4: before", *after)
    lines = [f"| seed | {' | '.join(titles)} | minutes |", "|---" * (len(titles) + 2) + "|"]
    rises: dict[tuple[str, str], list[float]] = {}
    for seed, run in results["runs"].items():
        cells = []
        for metric in ("greedy", "mean_at_k"):
            cells.append(percent(run["before"][metric]))
            for source in SOURCES:
                result = run[f"policy_{source}"][metric]
                rises.setdefault((metric, source), []).append(100 * (result["mean"] - run["before"][metric]["mean"]))
                cells.append(f"**{percent(result)}**" if source == "critic" else percent(result))
        lines.append(f"| {seed} | {' | '.join(cells)} | {run['wall_seconds'] / 60:.1f} |")
    cells = []
    for metric in ("greedy", "mean_at_k"):
        cells += ["", *(f"{np.mean(rises[metric, s]):+.1f} (lowest {min(rises[metric, s]):+.1f})" for s in SOURCES)]
    lines.append(f"| mean rise | {' | '.join(cells)} | |")
    return "\n".join(lines)


def critic_table(results: dict) -> str:
    names = {
        "eval_bce": "BCE",
        "eval_bce_constant": "best constant's BCE",
        "eval_skill": "skill",
        "eval_brier": "Brier",
        "eval_calibration_error": "calibration error",
        "eval_sibling_ranking": "siblings ordered alike (0.3 apart)",
    }
    lines = [f"| seed | {' | '.join(names.values())} |", "|---" * (len(names) + 1) + "|"]
    for seed, run in results["runs"].items():
        cells = [f"{run['critic'][name]:.3f}" for name in names]
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    return "\n".join(lines)


def details(results: dict) -> str:
    settings = ", ".join(f"`{name}` {value}" for name, value in results["arguments"].items())
    return (
        f"{origin_in_words(results)}\n\n"
        f"Arguments: {settings}.\n\n{table(results)}\n\nThe critic on problems held out from its training:\n\n"
        f"{critic_table(results)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs" / "bench")
    arguments = parser.parse_args()
    results = record({str(seed): run(seed, arguments.output_dir / f"demo-{seed}") for seed in arguments.seeds})
    keep(results, "demo")
    first = arguments.output_dir / f"demo-{arguments.seeds[0]}"
    shutil.copy(first / "values.png", REPOSITORY / "docs" / "images" / "values.png")
    write_between(REPOSITORY / "benchmarks" / "README.md", "demo", details(results))
    write_between(REPOSITORY / "README.md", "demo table", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
