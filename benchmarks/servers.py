"""
Values from a server: they agree with those of the model in process, and a run survives what servers do.

    python benchmarks/servers.py [--problems 48] [--kills 5] [--seed 0] [--output_dir runs/servers]

The tiny student behind `transformers serve`. First its step values against those that the engine `transformers` gives
with the same problems and settings. Then `dapo-trl run` while the server is killed with SIGKILL and started again; the
server killed for good; and servers that answer errors, garbage or nothing. About ten minutes on a core that nobody else
uses. Writes `benchmarks/results/servers.json` and the tables between the marks of `benchmarks/README.md`.
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from recording import REPOSITORY, keep, origin, origin_in_words, write_between


sys.path.append(str(REPOSITORY / "tests"))
from commands import ENVIRONMENT
from http_servers import Behaviour, FakeServer, Student
from written import done_work, rows


PACKAGES = ("torch", "transformers", "trl", "openai", "fastapi", "uvicorn")
RECIPE = "examples/recipes/demo.yaml"
VALUED = ("--num_solutions", "16", "--num_completions", "8", "--num_test_problems", "4", "--shard_size", "8")
SMALL = (
    *("--num_train_problems", "24", "--num_test_problems", "8", "--shard_size", "4", "--eval_k", "2"),
    *("--critic.num_train_epochs", "1", "--policy.max_steps", "2", "--values", "critic"),
)
IMPATIENT = ("--server.timeout", "2", "--server.max_retries", "1", "--server.max_downtime", "3")
WORDS = ["4 - 7 = 7\n", "7 + 8 = 5\n", "5 max 2 = 5\n", "#### 4\n", "#### 5\n"]
FAULTS = {"errors": (500, {"error": "out of memory"}), "garbage": (200, b"<html>welcome</html>"), "silence": None}

Table = tuple[str, int, int, int, int]  # problem; successes and number of completions, in process and from the server


# ---- Agreement ----


def prompt_tables(folders: Sequence[Path]) -> list[Table]:
    """Of every problem how many solutions were right, with both engines."""
    counts = []
    for folder in folders:
        found: dict[str, list[float]] = {}
        for row in rows(folder)["sampled"]:
            found.setdefault(row["problem_id"], []).append(row["reward"])
        counts.append(found)
    ours, theirs = counts
    assert ours.keys() == theirs.keys()
    return [(name, int(sum(ours[name])), len(ours[name]), int(sum(theirs[name])), len(theirs[name])) for name in ours]


def state_tables(folders: Sequence[Path]) -> list[Table]:
    """The same of the completions of every state that both engines' kept solutions passed through."""
    counts = []
    for folder in folders:
        found = {}
        for row in rows(folder)["solutions"]:
            for depth in range(len(row["completions"])):  # not the end, which has its outcome
                state = row["problem_id"], tuple(row["completions"][:depth])
                found[state] = int(row["mc_successes"][depth]), row["mc_rollouts"][depth]
        counts.append(found)
    ours, theirs = counts
    return [(state[0], *ours[state], *theirs[state]) for state in ours if state in theirs]


def z_score(won: int, number: int, other_won: int, other_number: int) -> float:
    """
    Difference of two rates over its standard deviation, given how many of all were won: under one and the same rate
    its square has the mean 1 exactly, however few there are. All or none must not be won.
    """
    total = number + other_number
    rate = (won + other_won) / total
    variance = rate * (1 - rate) * (1 / number + 1 / other_number) * total / (total - 1)
    return (won / number - other_won / other_number) / math.sqrt(variance)


def share_expected(won: int, number: int, other_won: int, other_number: int) -> float:
    """Probability of |z| > 1.96 under one and the same rate, given how many of all were won (hypergeometric)."""
    total, all_won = number + other_number, won + other_won
    return sum(
        math.comb(number, k) * math.comb(other_number, all_won - k) / math.comb(total, all_won)
        for k in range(max(0, all_won - other_number), min(number, all_won) + 1)
        if abs(z_score(k, number, all_won - k, other_number)) > 1.96
    )


def wilson(count: int, number: int) -> tuple[float, float]:
    """95% interval of a share."""
    z2 = 1.96**2
    centre = (count + z2 / 2) / (number + z2)
    half = 1.96 / (number + z2) * math.sqrt(count * (number - count) / number + z2 / 4)
    return round(max(0.0, centre - half), 4), round(min(1.0, centre + half), 4)


def clustered_mean(values: Sequence[float], clusters: Sequence[str]) -> tuple[float, float, float]:
    """Mean and its 95% interval, where values of one cluster depend on each other."""
    mean = sum(values) / len(values)
    sums: dict[str, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    number = len(sums)
    half = 1.96 * math.sqrt(number / (number - 1) * sum(part**2 for part in sums.values())) / len(values)
    return round(mean, 4), round(mean - half, 4), round(mean + half, 4)


def agreement(tables: list[Table]) -> dict:
    """How far both engines' rates are apart, against what chance makes of equal rates."""
    names = [name for name, *_ in tables]
    told = [table for table in tables if 0 < table[1] + table[3] < table[2] + table[4]]
    squares = [z_score(*counts) ** 2 for _, *counts in told]
    outside = sum(square > 1.96**2 for square in squares)
    chi_square = sum(squares)
    p_value = torch.special.gammaincc(torch.tensor(len(told) / 2.0), torch.tensor(chi_square / 2)).item()
    return {
        "compared": len(tables),
        "same_outcome_throughout": len(tables) - len(told),
        "completions": [sum(table[2] for table in tables), sum(table[4] for table in tables)],
        "rates": [round(sum(table[i] / table[i + 1] for table in tables) / len(tables), 4) for i in (1, 3)],
        "difference": clustered_mean([won / n - other / m for _, won, n, other, m in tables], names),
        "outside": outside,
        "share_outside": [round(outside / len(told), 4), *wilson(outside, len(told))],
        "share_expected": round(sum(share_expected(*counts) for _, *counts in told) / len(told), 4),
        "chi_square": round(chi_square, 1),
        "degrees_of_freedom": len(told),
        "p_value": round(p_value, 4),
        "mean_square": clustered_mean(squares, [name for name, *_ in told]),
    }


# ---- Runs ----


def start(command: str, folder: Path, *arguments: str) -> subprocess.Popen:
    """The command on the demo; its output goes to a file beside the folder."""
    with folder.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dapo_trl", command, RECIPE, "--output_dir", str(folder), *arguments],
            **{"env": os.environ | ENVIRONMENT, "stdout": log, "stderr": log, "cwd": REPOSITORY},
        )


def finish(command: str, folder: Path, *arguments: str) -> int:
    return start(command, folder, *arguments).wait()


def manifest(folder: Path, stage: str) -> dict:
    return json.loads((folder / stage / "manifest.json").read_text())


def num_shards(folder: Path) -> int:
    return len(list(folder.glob("*/shards/*.json")))


def message(folder: Path) -> str:
    """What a run said at its end."""
    found = [line for line in folder.with_suffix(".log").read_text().splitlines() if line.startswith("dapo-trl: ")]
    return found[-1].removeprefix("dapo-trl: ") if found else ""


def tally(folder: Path) -> dict:
    """Whether everything that was asked for is there, once."""
    sampled, values = manifest(folder, "sampled")["counts"], manifest(folder, "values")["counts"]
    tables = rows(folder)
    numbers: dict[str, set[int]] = {}
    for row in tables["sampled"]:
        numbers.setdefault(row["problem_id"], set()).add(row["sample"])
    per_problem = manifest(folder, "sampled")["config"]["rollouts"]["num_solutions"]
    least = manifest(folder, "values")["config"]["rollouts"]["num_completions"]
    complete = (
        len(tables["sampled"]) == sampled["solutions"] == sampled["ids_rebuilt"] == sampled["problems"] * per_problem
        and len(numbers) == sampled["problems"]
        and all(found == set(range(per_problem)) for found in numbers.values())
        and values["completions"] == values["ids_rebuilt"]
        and values["problems_kept"] == sampled["problems_with_signal"]
        and all(min(row["mc_rollouts"][:-1]) >= least for row in tables["solutions"])
    )
    return {
        "problems": sampled["problems"],
        "solutions": sampled["solutions"],
        "completions": values["completions"],
        "retries": sampled["retries"] + values["retries"],
        "complete": complete,
    }


def wait_until(condition: Callable[[], bool], run: subprocess.Popen) -> bool:
    """Whether it came true before the run ended."""
    while run.poll() is None:
        if condition():
            return True
        time.sleep(0.02)
    return False


def at_server(student: Student) -> tuple[str, ...]:
    return ("--engine", "openai", "--server_urls", student.url, "--max_concurrency", "8")


def compare_values(student: Student, arguments: argparse.Namespace) -> dict:
    """Values of the same problems with both engines."""
    folders, seconds = [], []
    for engine, own in (("transformers", ()), ("openai", at_server(student))):
        folder, begin = arguments.output_dir / engine, time.perf_counter()
        problems = ("--num_train_problems", str(arguments.problems), "--seed", str(arguments.seed))
        if finish("values", folder, *VALUED, *problems, *own):
            raise SystemExit(f"The run failed: see {folder.with_suffix('.log')}")
        folders.append(folder)
        seconds.append(round(time.perf_counter() - begin, 1))
    return {
        "problems": arguments.problems,
        "seconds": seconds,
        "complete": tally(folders[1])["complete"],
        "prompts": agreement(prompt_tables(folders)),
        "states": agreement(state_tables(folders)),
    }


def restarted(student: Student, arguments: argparse.Namespace) -> dict:
    """A whole run, during which the server is killed and started again."""
    rng, folder, kills = random.Random(arguments.seed), arguments.output_dir / "restarted", []
    run = start("run", folder, *SMALL, *at_server(student))
    while len(kills) < arguments.kills:
        target = student.num_requests + rng.randrange(20, 220)
        if not wait_until(lambda target=target: student.num_requests >= target, run):
            break
        student.kill()
        kills.append({"shards_done": num_shards(folder)})
        time.sleep(rng.uniform(0, 2))
        student.start()
    done = tally(folder) if (code := run.wait()) == 0 else {}
    return {"kills": kills, "exit_code": code, "has_results": (folder / "results.json").exists()} | done


def gone(student: Student, arguments: argparse.Namespace) -> dict:
    """The server is killed for good in each stage; it is back when the command is given again."""
    folder, stops = arguments.output_dir / "gone", []
    command = ("values", folder, *SMALL, *at_server(student), "--server.max_downtime", "3")
    done: dict[str, tuple[int, int]] = {}
    for shards in (2, 8):
        run = start(*command)
        wait_until(lambda shards=shards: num_shards(folder) >= shards, run)
        student.kill()
        begin, code = time.perf_counter(), run.wait()
        after = done_work(folder)
        repeated = sum(after.get(name) != state for name, state in done.items())
        stop = {"exit_code": code, "seconds_to_exit": round(time.perf_counter() - begin, 1), "message": message(folder)}
        stops.append(stop | {"shards_done": num_shards(folder), "repeated": repeated})
        done = after
        student.start()
        student.wait()
    code, after = finish(*command), done_work(folder)
    repeated = sum(after.get(name) != state for name, state in done.items())
    return {"stops": stops, "exit_code": code, "repeated": repeated} | tally(folder)


def faulty(name: str, arguments: argparse.Namespace) -> dict:
    """A server that begins to fail after two shards, and works again when the command is given once more."""
    folder, tokenizer = arguments.output_dir / name, AutoTokenizer.from_pretrained(REPOSITORY / "examples" / "student")
    server, fault = FakeServer(Behaviour(models=None), tokenizer=tokenizer, words=WORDS), FAULTS[name]

    def answer(body: dict, number: int) -> tuple | None:
        if num_shards(folder) < 2:
            return None
        if fault is None:
            time.sleep(5)
        return fault

    server.answer = answer
    command = ("sample", folder, *SMALL, *IMPATIENT, "--engine", "openai", "--server_urls", server.url)
    begin, code = time.perf_counter(), finish(*command)
    done = done_work(folder)
    found = {"exit_code": code, "seconds_to_exit": round(time.perf_counter() - begin, 1), "message": message(folder)}
    found["shards_done"] = num_shards(folder)
    server.answer = lambda body, number: None
    code, after = finish(*command), done_work(folder)
    server.stop()
    repeated = sum(after.get(name) != state for name, state in done.items())
    problems = manifest(folder, "sampled")["counts"]["problems"]
    return found | {"exit_code_after": code, "repeated": repeated, "problems": problems}


def record(arguments: argparse.Namespace) -> dict:
    begin = time.perf_counter()
    student = Student(arguments.output_dir / "serve")
    try:
        student.wait()
        found = {
            "values": compare_values(student, arguments),
            "restarted": restarted(student, arguments),
            "gone": gone(student, arguments),
        }
    finally:
        student.kill()
    found["faulty"] = {name: faulty(name, arguments) for name in FAULTS}
    given = f"--problems {arguments.problems} --kills {arguments.kills} --seed {arguments.seed}"
    return {
        **origin(f"python benchmarks/servers.py {given}", PACKAGES),
        "seconds": round(time.perf_counter() - begin, 1),
        **found,
    }


# ---- Text ----


def details(results: dict) -> str:
    values, restarts, stay = results["values"], results["restarted"], results["gone"]
    head = origin_in_words(results, f"; one thread, {results['seconds'] / 60:.0f} minutes")
    lines = ["| | value of every prompt | values of common states |", "|---|---|---|"]
    both = values["prompts"], values["states"]
    for title, cell in (
        ("compared", lambda one: f"{one['compared']:,}"),
        ("completions, in process and from the server", lambda one: "{:,} and {:,}".format(*one["completions"])),
        ("mean value", lambda one: "{:.3f} and {:.3f}".format(*one["rates"])),
        ("mean difference", lambda one: "**{:+.3f}** ({:+.3f} to {:+.3f})".format(*one["difference"])),
        ("outcomes all alike, no test", lambda one: f"{one['same_outcome_throughout']:,}"),
        ("z outside ±1.96", lambda one: "**{:.1%}** ({:.1%} to {:.1%})".format(*one["share_outside"])),
        ("... expected of equal values", lambda one: f"{one['share_expected']:.1%}"),
        ("mean z², 1 for equal values", lambda one: "**{:.2f}** ({:.2f} to {:.2f})".format(*one["mean_square"])),
    ):
        lines.append(f"| {title} | {' | '.join(map(cell, both))} |")
    prompts = values["prompts"]
    chi_square = (
        f"Sum of z² over prompts: {prompts['chi_square']} with {prompts['degrees_of_freedom']} degrees of freedom, "
        f"p = {prompts['p_value']:.2f}."
    )
    stops = [f"{stop['exit_code']} after {stop['seconds_to_exit']:.0f} seconds" for stop in stay["stops"]]
    runs = (
        f"Killed and started again {len(restarts['kills'])} times: exit code {restarts['exit_code']}, "
        f"{restarts['problems']} problems, {restarts['solutions']} solutions, {restarts['completions']:,} completions, "
        f"{restarts['retries']} requests sent again, {_complete(restarts)}. Killed for good, twice, with "
        f"`server.max_downtime` 3: exit codes {' and '.join(stops)}; with the server back, the same command ends with "
        f"{stay['exit_code']}, {_complete(stay)}. Finished pieces of work that were done again: "
        f"{sum(stop['repeated'] for stop in stay['stops']) + stay['repeated']}."
    )
    faults = [
        "| server | exit code | message | shards kept | exit code when it is back | shards done again |",
        "|---|---|---|---|---|---|",
    ]
    shown = {"killed for good": stay["stops"][0]} | results["faulty"]
    for name, fault in shown.items():
        after = fault.get("exit_code_after", stay["exit_code"])
        text = fault["message"].replace("|", "\\|")
        faults.append(
            f"| {name} | {fault['exit_code']} | {text} | {fault['shards_done']} | {after} | {fault['repeated']} |"
        )
    return "\n\n".join([head, "\n".join(lines), chi_square, runs, "\n".join(faults)])


def _complete(tallied: dict) -> str:
    return "everything there once" if tallied["complete"] else "**not everything there**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--problems", type=int, default=48)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs" / "servers")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output_dir, ignore_errors=True)
    arguments.output_dir.mkdir(parents=True)
    found = record(arguments)
    keep(found, "servers")
    write_between(REPOSITORY / "benchmarks" / "README.md", "servers", details(found))
    print(details(found))


if __name__ == "__main__":
    main()
