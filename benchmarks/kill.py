"""
The demo, killed again and again: what comes out is what an uninterrupted run gives, and no finished work is done twice.

    python benchmarks/kill.py [--kills 20] [--longest 60] [--seed 0] [--output_dir runs/kill]

Each start is killed with SIGKILL, with all processes that it has started, after a random time of up to `--longest`
seconds, and started again with the same command. A run that comes to its end is compared with the uninterrupted one,
row for row, and another run begins, until there were enough kills; the last one may finish. About ten minutes on two
CPU cores. Writes `benchmarks/results/kill.json` and the paragraph between the marks of `benchmarks/README.md`.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from recording import REPOSITORY, keep, origin, origin_in_words, write_between


sys.path.append(str(REPOSITORY / "tests"))
from commands import ENVIRONMENT
from written import done_work, results, rows


PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")
RECIPE = REPOSITORY / "examples" / "recipes" / "demo.yaml"


def start(folder: Path) -> subprocess.Popen:
    """The demo in a process group of its own; its output goes to a file beside the folder."""
    command = [sys.executable, "-m", "dapo_trl", "run", str(RECIPE), "--output_dir", str(folder)]
    with folder.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log, start_new_session=True, cwd=REPOSITORY
        )


def place(folder: Path) -> str:
    """Where a kill met the run: the last stage that has begun to leave something."""
    stages = {"policy_monte_carlo": "second policy", "policy": "policy", "data": "scores", "critic": "critic"}
    stages |= {"values": "values", "sampled": "solutions", "before.json": "first evaluation done"}
    return next((stage for name, stage in stages.items() if (folder / name).exists()), "nothing there yet")


def kill_once(folder: Path, seconds: float) -> dict | None:
    """Start the run and kill it; what was found then, or nothing if it came to its end before."""
    before = done_work(folder)
    run = start(folder)
    try:
        code = run.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        after = done_work(folder)
        repeated = sum(after.get(name) != state for name, state in before.items())
        return {"after": round(seconds, 1), "in": place(folder), "done": len(after), "repeated": repeated}
    if code:
        raise SystemExit(f"The run failed: see {folder.with_suffix('.log')}")
    return None


def record(arguments: argparse.Namespace) -> dict:
    """Kill runs until there were enough kills; compare each that ends with the uninterrupted one."""
    rng = random.Random(arguments.seed)
    begin = time.perf_counter()
    whole = arguments.output_dir / "whole"
    if start(whole).wait():
        raise SystemExit(f"The run failed: see {whole.with_suffix('.log')}")
    uninterrupted = time.perf_counter() - begin
    kills: list[dict] = []
    finished = []
    while len(kills) < arguments.kills or len(finished) == 0 or kills[-1]["run"] == len(finished):
        folder = arguments.output_dir / f"killed-{len(finished)}"
        seconds = rng.uniform(0, arguments.longest) if len(kills) < arguments.kills else 3600
        killed = kill_once(folder, seconds)
        if killed is not None:
            kills.append({"run": len(finished)} | killed)
            continue
        same_rows, same_results = rows(folder) == rows(whole), results(folder) == results(whole)
        finished.append({"same_rows": same_rows, "same_results": same_results})
    return {
        **origin(f"python benchmarks/kill.py --kills {arguments.kills} --seed {arguments.seed}", PACKAGES),
        "seconds_uninterrupted": round(uninterrupted, 1),
        "rows": {name: len(table) for name, table in rows(whole).items()},
        "kills": kills,
        "runs": finished,
    }


def details(results: dict) -> str:
    kills, runs = results["kills"], results["runs"]
    places = sorted({kill["in"] for kill in kills})
    same = sum(run["same_rows"] and run["same_results"] for run in runs)
    repeated = sum(kill["repeated"] for kill in kills)
    return (
        f"{origin_in_words(results, '; one thread')} "
        f"{len(kills)} kills after 0 to {max(kill['after'] for kill in kills):.0f} seconds, in these places: "
        f"{', '.join(places)}. Runs that came to their end: {len(runs)}; of these, {same} have the same rows in all "
        f"tables ({sum(results['rows'].values()):,}) and the same results as the uninterrupted run, which took "
        f"{results['seconds_uninterrupted']:.0f} seconds. Finished pieces of work that were done again: {repeated}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs" / "kill")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output_dir, ignore_errors=True)
    arguments.output_dir.mkdir(parents=True)
    found = record(arguments)
    keep(found, "kill")
    write_between(REPOSITORY / "benchmarks" / "README.md", "kill", details(found))
    print(details(found))


if __name__ == "__main__":
    main()
