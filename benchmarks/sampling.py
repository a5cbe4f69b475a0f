"""
How fast completions are sampled: the library's engine, its value stage, and a plain loop of `model.generate`.

    python benchmarks/sampling.py [--num_problems 40] [--repeats 5] [--threads 2]

All sides work on the states of the solutions that are kept of the demo's problems. The plain loop calls
`model.generate` with `num_return_sequences=16` for one state after the other; the engine gets all states at once, 16
seeds each; the value stage is `value_solutions` as a user runs it, judging included, which counts completions for every
state they pass through. The sides are timed in turn in one process, and a ratio is that of medians. Writes
`benchmarks/results/sampling.json` and the table in `benchmarks/README.md`.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dapo_trl import TransformersEngine, math_reward
from dapo_trl.engines import SamplingConfig, sample_seed
from dapo_trl.rollouts import RolloutConfig, sample_solutions, value_solutions
from recording import REPOSITORY, command_line, keep, origin, origin_in_words, write_between


STUDENT = REPOSITORY / "examples" / "student"
sys.path.append(str(STUDENT))
from arithmetic import make_problems  # noqa: E402


PACKAGES = ("torch", "transformers", "trl")
NUM_COMPLETIONS = 16  # of a state, on every side
TARGET = 6.0
CONFIG = RolloutConfig(
    num_solutions=8, num_kept=4, num_completions=NUM_COMPLETIONS, sampling=SamplingConfig(max_new_tokens=64)
)
Row = dict[str, Any]
Work = dict[str, float]  # states, completions, tokens


# ---- The sides ----


def plain_loop(model: Any, prefixes: list[tuple[int, ...]], eos_token_id: int) -> Work:
    """Completions of one state after the other."""
    tokens = 0
    for prefix in prefixes:
        output = model.generate(
            input_ids=torch.tensor([prefix]),
            attention_mask=torch.ones(1, len(prefix), dtype=torch.long),
            num_return_sequences=NUM_COMPLETIONS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=CONFIG.sampling.max_new_tokens,
        )
        tokens += count_tokens(output[:, len(prefix) :], eos_token_id)
    return {"states": len(prefixes), "completions": len(prefixes) * NUM_COMPLETIONS, "tokens": tokens}


def count_tokens(ids: torch.Tensor, eos_token_id: int) -> int:
    """Tokens up to the first end of each sequence, the end included."""
    ended_before = (ids == eos_token_id).cumsum(-1) - (ids == eos_token_id).long() > 0
    return int((~ended_before).sum())


def engine_call(engine: TransformersEngine, prefixes: list[tuple[int, ...]], repeat: int) -> Work:
    """Completions of all states in one call."""
    seeds = [[sample_seed(repeat, prefix, number) for number in range(NUM_COMPLETIONS)] for prefix in prefixes]
    groups = engine.generate(prefixes, seeds, CONFIG.sampling)
    tokens = sum(len(completion.ids) for group in groups for completion in group)
    return {"states": len(prefixes), "completions": sum(map(len, groups)), "tokens": tokens}


def value_stage(engine: TransformersEngine, rows: list[Row]) -> Work:
    """Values of all states."""
    _, counts = value_solutions(rows, engine, math_reward, CONFIG)
    return {
        "states": counts["states"],
        "completions": counts["completions"],
        "tokens": counts["tokens_generated"],
    }


# ---- Measuring ----


def make_states(engine: TransformersEngine, num_problems: int, seed: int) -> tuple[list[Row], list[tuple[int, ...]]]:
    """Solutions of the demo's problems, and the token ids of the states of those that are kept."""
    problems = make_problems("train", num_problems, seed)
    rows, _ = sample_solutions(problems, engine, math_reward, CONFIG)
    tables, _ = value_solutions(rows, engine, math_reward, CONFIG)
    prefixes: dict[tuple[int, ...], None] = {}
    for row in tables["solutions"]:
        ids = tuple(row["prompt_ids"])
        prefixes[ids] = None
        for step in row["completions_ids"][:-1]:
            ids = (*ids, *step)
            prefixes[ids] = None
    return rows, list(prefixes)


def race(sides: dict[str, Callable[[int], Work]], repeats: int) -> dict[str, list[Work]]:
    """Work and seconds of each side, taken in turn."""
    runs: dict[str, list[Work]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            work = side(repeat)
            runs[name].append(work | {"seconds": time.perf_counter() - start})
        print(
            f"repeat {repeat}: " + ", ".join(f"{name} {runs[name][-1]['seconds']:.1f} s" for name in sides), flush=True
        )
    return runs


def compare(runs: dict[str, list[Work]], side: str, unit: str) -> dict[str, float]:
    """Units per second of a side over those of the plain loop: of medians, and the range of single repeats."""
    speeds = {name: [run[unit] / run["seconds"] for run in runs[name]] for name in ("plain loop", side)}
    ratios = [fast / slow for slow, fast in zip(*speeds.values(), strict=True)]
    medians = [statistics.median(speed) for speed in speeds.values()]
    return {"ratio": medians[1] / medians[0], "lowest": min(ratios), "highest": max(ratios)}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    model = AutoModelForCausalLM.from_pretrained(STUDENT).eval()
    engine = TransformersEngine(model, tokenizer, batch_size=512)
    rows, prefixes = make_states(engine, arguments.num_problems, arguments.seed)
    print(f"{len(prefixes):,} states", flush=True)
    plain_loop(model, prefixes[:8], tokenizer.eos_token_id)  # warm-up
    load_before = os.getloadavg()[0]
    sides = {
        "plain loop": lambda repeat: plain_loop(model, prefixes, tokenizer.eos_token_id),
        "engine": lambda repeat: engine_call(engine, prefixes, repeat),
        "value stage": lambda repeat: value_stage(engine, rows),
    }
    runs = race(sides, arguments.repeats)
    return {
        "runs": runs,
        "load_before": load_before,
        "engine": {unit: compare(runs, "engine", unit) for unit in ("completions", "tokens")} | {"target": TARGET},
        "value_stage": {"states": compare(runs, "value stage", "states")},
    }


# ---- Reporting ----


def table(record: dict[str, Any]) -> str:
    results, lines = record["results"], ["| side | completions/s | tokens/s | ms per state |", "|---|---|---|---|"]
    for name, runs in results["runs"].items():
        speeds = [statistics.median(run[unit] / run["seconds"] for run in runs) for unit in ("completions", "tokens")]
        each = 1000 * statistics.median(run["seconds"] / run["states"] for run in runs)
        lines.append(f"| {name} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {each:.1f} |")
    lines += ["", "| claim | target | measured | range |", "|---|---|---|---|"]
    claims = {
        "completions per second, engine over plain loop": (f"{TARGET:g}x", results["engine"]["completions"]),
        "tokens per second, engine over plain loop": ("", results["engine"]["tokens"]),
        "states per second, value stage over plain loop": ("", results["value_stage"]["states"]),
    }
    for claim, (target, result) in claims.items():
        range_of = f"{result['lowest']:.1f}-{result['highest']:.1f}"
        lines.append(f"| {claim} | {target} | **{result['ratio']:.1f}x** | {range_of} |")
    return "\n".join(lines)


def details(record: dict[str, Any]) -> str:
    work = record["results"]["runs"]["engine"][0]
    return (
        f"{origin_in_words(record, ', {threads} threads'.format(**record))} Seed {record['seed']}, {record['repeats']} "
        f"repeats, {work['states']:,.0f} states.\n\n"
        f"{table(record)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--num_problems", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record = {
        **origin(command_line(), PACKAGES),
        "threads": torch.get_num_threads(),
        "seed": arguments.seed,
        "repeats": arguments.repeats,
        "results": measure(arguments),
    }
    keep(record, "sampling")
    write_between(REPOSITORY / "benchmarks" / "README.md", "sampling", details(record))
    print(table(record))


if __name__ == "__main__":
    main()
