"""
Programs in sandboxes: HumanEval both ways, programs a second for each kind of isolation, and ten thousand in a row.

    python benchmarks/execution.py [--data ../shared/data] [--number 10000] [--num_workers 2]

HumanEval's canonical solutions must all pass, and none of the programs whose body is `pass`. Speeds are measured in
turn, a round of all kinds after the other. Then one executor runs programs in a row, right, wrong, endless and fatal
ones, and memory, descriptors, processes and temporary files are counted before and after. Writes
`benchmarks/results/execution.json` and the table in `benchmarks/README.md`. Ten minutes on two CPU cores.
"""

import argparse
import gzip
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from dapo_trl.execution import Limits, Program, UnitTests
from dapo_trl.execution.isolation import KINDS
from dapo_trl.execution.local import LocalExecutor
from recording import REPOSITORY, command_line, keep, origin, origin_in_words, write_between


ROUNDS = 3
BODIES = {
    "right": ("    return 2 * x", "passed"),
    "wrong": ("    return x", "failed"),
    "raises": ("    return x / 0", "failed"),
    "leaves a file and a daemon": (
        "    import os, time\n    open('x', 'w').write('x' * 10**6)\n"
        "    if os.fork() == 0: time.sleep(100)\n    return 2 * x",
        "passed",
    ),
    "is killed": ("    import os\n    os.abort()", "failed"),
    "uses too much memory": ("    return bytearray(10**10)", "failed"),
}
ENDLESS = "    while True: pass"  # one in a hundred, because each takes a second


def humaneval(folder: Path) -> dict[str, list[Program]]:
    """Programs that must pass, and programs that must not."""
    with gzip.open(folder / "HumanEval.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    tests = [UnitTests.from_row(row) for row in rows]
    bodies = {"canonical": [row["canonical_solution"] for row in rows], "pass": ["    pass\n"] * len(rows)}
    return {
        name: [Program(each.prompt + body, each) for each, body in zip(tests, given, strict=True)]
        for name, given in bodies.items()
    }


def speeds(executors: dict[str, LocalExecutor], programs: dict[str, list[Program]]) -> dict[str, Any]:
    """Verdicts, and programs a second of each round."""
    found: dict[str, Any] = {kind: {"verdicts": {}, "per_second": []} for kind in executors}
    for _ in range(ROUNDS):
        for kind, executor in executors.items():
            for name, given in programs.items():
                start = time.perf_counter()
                outcomes = executor.run(given)
                found[kind]["per_second"].append(round(len(given) / (time.perf_counter() - start), 1))
                found[kind]["verdicts"][name] = Counter(outcome.verdict for outcome in outcomes)
    return found


def resources(executor: LocalExecutor) -> dict[str, int]:
    """What this process and the one that starts programs hold."""
    server = executor._server._process
    assert server is not None
    pids = {"executor": os.getpid(), "server": server.pid}
    held = {f"memory of the {name}, MB": _status(pid, "VmRSS") // 1024 for name, pid in pids.items()}
    held |= {f"descriptors of the {name}": len(os.listdir(f"/proc/{pid}/fd")) for name, pid in pids.items()}
    held["temporary files"] = len(os.listdir(tempfile.gettempdir()))
    held["processes"], held["zombies"] = _processes()
    return held


def _status(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _processes() -> tuple[int, int]:
    """Those of programs, and those of all that have ended and that nobody has asked about."""
    number = zombies = 0
    for place in Path("/proc").glob("[0-9]*"):
        try:
            number += b"inside.server" in (place / "cmdline").read_bytes()
            zombies += (place / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            pass
    return number, zombies


def in_a_row(number: int, num_workers: int, isolation: str) -> dict[str, Any]:
    """Programs of all kinds, one batch after the other."""
    executor = LocalExecutor(True, Limits(cpu=1, wall=5), isolation, num_workers)
    tests = UnitTests(entry_point="double", test="assert double(2) == 4\nassert double(5) == 10")
    kinds, wrong = list(BODIES.values()), 0
    executor.run([Program("def double(x): return 0", tests)])
    samples = []
    for start in range(0, number, 1000):
        batch = [
            kinds[i % len(kinds)] if i % 100 else (ENDLESS, "cpu") for i in range(start, min(start + 1000, number))
        ]
        outcomes = executor.run([Program(f"def double(x):\n{body}", tests) for body, _ in batch])
        wrong += sum(outcome.verdict != verdict for outcome, (_, verdict) in zip(outcomes, batch, strict=True))
        time.sleep(0.5)  # the last monitors end
        samples.append(resources(executor))
        print(f"{min(start + 1000, number)} programs: {samples[-1]}", flush=True)
    executor.close()
    return {"number": number, "isolation": executor.isolation, "other_verdicts": wrong, "samples": samples}


def details(record: dict[str, Any]) -> str:
    lines = ["| isolation | canonical solutions | body `pass` | programs a second | range |", "|---|---|---|---|---|"]
    for kind, found in record["speeds"].items():
        rate = found["per_second"]
        cells = [f"{found['verdicts'][name].get('passed', 0)} of 164 pass" for name in ("canonical", "pass")]
        lines.append(f"| {kind} | {' | '.join(cells)} | **{median(rate):.0f}** | {min(rate):.0f} to {max(rate):.0f} |")
    row = record["in_a_row"]
    lines += [
        "",
        f"{row['number']:,} programs in a row, isolation `{row['isolation']}`, of which {row['other_verdicts']} had ",
    ]
    lines[-1] += "another outcome than they should. Held after the first thousand and after the last:"
    lines += ["", "| | first | last |", "|---|---|---|"]
    first, last = row["samples"][0], row["samples"][-1]
    lines += [f"| {name} | {first[name]} | {last[name]} |" for name in first]
    how = f"; {record['num_workers']} programs at a time"
    return f"{origin_in_words(record, how)}\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--num_workers", type=int, default=2)
    given = parser.parse_args()
    executors = {}
    for kind in KINDS:
        try:
            python = "/usr/bin/python3" if kind == "process" and os.geteuid() == 0 else None
            executors[kind] = LocalExecutor(True, isolation=kind, num_workers=given.num_workers, python=python)
        except RuntimeError as error:
            print(error)
    record = {**origin(command_line(), ("torch",)), "num_workers": given.num_workers}
    record["speeds"] = speeds(executors, humaneval(given.data))
    for executor in executors.values():
        executor.close()
    isolation = "namespaces" if "namespaces" in executors else "auto"  # the fastest sandbox
    record["in_a_row"] = in_a_row(given.number, given.num_workers, isolation)
    keep(record, "execution")
    write_between(REPOSITORY / "benchmarks" / "README.md", "execution", details(record))
    print(details(record))


if __name__ == "__main__":
    main()
