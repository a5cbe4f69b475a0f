"""
The demo of programs over several seeds.

    python benchmarks/code_demo.py [--seeds 0 1 2 3 4] [--output_dir runs/bench]

Each run is `examples/code.py --allow_execution true --seed n`: other training problems, samples, critic and policy; the
student and the 256 test problems are the same. A run whose `results.json` is there is not repeated. Writes
`benchmarks/results/code_demo.json` and the table in `benchmarks/README.md`.
"""

import argparse
from pathlib import Path

from demo import PACKAGES, percent, run
from recording import REPOSITORY, interval, keep, origin, origin_in_words, write_between


METRICS = {"greedy": "greedy", "mean_at_k": "mean@4"}


def rise(record: dict, metric: str) -> tuple[str, float]:
    """Mean over the seeds with its interval, and the lowest, in points."""
    rises = [found["after"][metric]["mean"] - found["before"][metric]["mean"] for found in record["runs"].values()]
    mean, half = interval(rises)
    return f"{mean:.1f} ± {half:.1f}", 100 * min(rises)


def details(record: dict) -> str:
    titles = [f"{title}: {when}" for title in METRICS.values() for when in ("before", "after")]
    lines = [f"| seed | {' | '.join(titles)} | minutes |", "|---" * (len(titles) + 2) + "|"]
    for seed, found in record["runs"].items():
        cells = [percent(found[when][metric]) for metric in METRICS for when in ("before", "after")]
        lines.append(f"| {seed} | {' | '.join(cells)} | {found['wall_seconds'] / 60:.1f} |")
    cells = []
    for metric in METRICS:
        mean, lowest = rise(record, metric)
        cells += ["", f"+{mean} (lowest {lowest:+.1f})"]
    lines.append(f"| rise | {' | '.join(cells)} | |")
    return f"{origin_in_words(record)} Isolation: `{record['isolation']}`.\n\n" + "\n".join(lines)


def main() -> None:
    from dapo_trl.execution.local import LocalExecutor

    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs" / "bench")
    given = parser.parse_args()
    runs = {}
    for seed in given.seeds:
        found = run(seed, given.output_dir / f"code-{seed}", "code.py", "--allow_execution", "true")
        names = {"before": "before", "after": "policy_critic", "critic": "critic", "dropped": "dropped"}
        runs[str(seed)] = {name: found[key] for name, key in names.items()} | {"wall_seconds": found["wall_seconds"]}
    record = {
        **origin("python benchmarks/code_demo.py --seeds " + " ".join(runs), PACKAGES),
        "isolation": LocalExecutor(allow_execution=True).isolation,
        "runs": runs,
    }
    keep(record, "code_demo")
    write_between(REPOSITORY / "benchmarks" / "README.md", "code demo", details(record))
    print(details(record))


if __name__ == "__main__":
    main()
