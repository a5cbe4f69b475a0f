"""
What prefix trees save: training steps in the tree layout, in the padded layout, and of TRL's `DPOTrainer`.

    python benchmarks/prefix_tree.py [--repeats 5] [--only speed dpo critic memory] [--num_problems 1]

Every side is a real trainer: a step is collating its batches, forward, backward and the optimizer. The sides are timed
in turn in one process, and a ratio is that of their median times. The padded side gets micro-batches of 16 sequences
sorted by length. Writes `benchmarks/results/prefix_tree.json` and the table in `benchmarks/README.md`.

On a machine with a CUDA GPU, FlexAttention in bf16 with random weights of Qwen2-0.5B's shape:

    python benchmarks/prefix_tree.py --gpu --max_tokens_per_row 4096 8192 16384 32768
"""

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from trl import DPOConfig, DPOTrainer

from dapo_trl import DAPOConfig, DAPOTrainer, StepCriticConfig, StepCriticTrainer
from recording import REPOSITORY, command_line, keep, origin, origin_in_words, write_between


PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")
# prompt tokens x steps x tokens of a step x candidates of each state, and the ratio that was aimed at
SHAPES = {
    "200 x 20 x 30 x 8": ((200, 20, 30, 8), 14.0),
    "100 x 10 x 30 x 8": ((100, 10, 30, 8), 8.0),
    "100 x 6 x 20 x 4": ((100, 6, 20, 4), 7.0),
}
FIRST = "200 x 20 x 30 x 8"
NO_SHARING = {"no sharing, 64 pairs": 64, "no sharing, 160 pairs": 160}
SEQUENCES = 16  # of a padded micro-batch
VOCABULARY = 1000


# ---- Data and models ----


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token: `w17` is the id 17."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{index}": index for index in range(2, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def words(number: int, rng: random.Random) -> str:
    return "".join(f"w{rng.randrange(2, VOCABULARY)} " for _ in range(number))


def make_states(shape: tuple[int, int, int, int], num_problems: int, rng: random.Random) -> list[dict[str, Any]]:
    """State rows: the first candidate of each state leads to the next."""
    prompt_length, num_steps, step_length, num_candidates = shape
    rows = []
    for _ in range(num_problems):
        prompt, prefix = words(prompt_length, rng), []
        for _ in range(num_steps):
            candidates = [words(step_length, rng) for _ in range(num_candidates)]
            advantages = [rng.uniform(-0.5, 0.5) for _ in candidates]
            rows.append({"prompt": prompt, "prefix": prefix, "candidates": candidates, "advantages": advantages})
            prefix = [*prefix, candidates[0]]
    return rows


def make_lone_states(number: int, rng: random.Random) -> list[dict[str, Any]]:
    """State rows that share nothing: one candidate, one state per prompt, 20 to 400 tokens."""
    rows = []
    for _ in range(number):
        length = rng.randint(20, 400)
        step_length = rng.randint(5, min(60, length - 5))
        step = words(step_length, rng)
        prompt = words(length - step_length, rng)
        rows.append({"prompt": prompt, "prefix": [], "candidates": [step], "advantages": [rng.uniform(-0.5, 0.5)]})
    return rows


def make_solutions(shape: tuple[int, int, int, int], rng: random.Random) -> list[dict[str, Any]]:
    """Solution rows of one problem: as many solutions as the shape has candidates."""
    prompt_length, num_steps, step_length, num_solutions = shape
    prompt = words(prompt_length, rng)
    return [
        {
            "prompt": prompt,
            "completions": [words(step_length, rng) for _ in range(num_steps)],
            "values": [rng.random() for _ in range(num_steps + 1)],
            "truncated": True,
        }
        for _ in range(num_solutions)
    ]


def make_preferences(states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sibling pairs for `DPOTrainer`: the state as prompt, every candidate in one pair, the better one chosen."""
    rows = []
    for state in states:
        prompt = state["prompt"] + "".join(state["prefix"])
        siblings = list(zip(state["candidates"], state["advantages"], strict=True))
        for pair in zip(siblings[::2], siblings[1::2], strict=True):
            rejected, chosen = sorted(pair, key=lambda sibling: sibling[1])
            rows.append({"prompt": prompt, "chosen": chosen[0], "rejected": rejected[0]})
    return rows


def make_model(auto_class: Any, arguments: argparse.Namespace) -> Any:
    """A Qwen2 with random weights: four layers of width 256, or the shape of Qwen2-0.5B."""
    torch.manual_seed(arguments.seed)
    shape = {
        "hidden_size": 256,
        "intermediate_size": arguments.intermediate_size,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
    }
    if arguments.gpu:
        shape = {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
        }
    config = Qwen2Config(**shape, max_position_embeddings=32_768, pad_token_id=0, eos_token_id=1, num_labels=1)
    return auto_class.from_config(config)


def shared_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "use_cpu": not arguments.gpu,
        "bf16": arguments.gpu,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": None,
        "dataloader_pin_memory": False,
    }


# ---- The sides ----


def micro_batches(rows: Any, size: int) -> list[list[dict[str, Any]]]:
    return [
        [rows[index] for index in range(start, min(start + size, len(rows)))] for start in range(0, len(rows), size)
    ]


def training_step(trainer: Any, batches: list[list[dict[str, Any]]]) -> Callable[[], None]:
    """One whole optimizer step of a trainer over micro-batches of its rows."""
    trainer.create_optimizer()
    trainer.model.to(trainer.args.device).train()
    trainer.current_gradient_accumulation_steps = len(batches)

    def step() -> None:
        inputs = [trainer.data_collator(batch) for batch in batches]
        inputs = [trainer._prepare_inputs(batch) for batch in inputs]
        num_items = trainer._get_num_items_in_batch(inputs, trainer.args.device)
        for batch in inputs:
            trainer.training_step(trainer.model, batch, num_items)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step


def policy_step(
    states: list[dict[str, Any]], layout: str, folder: str, arguments: argparse.Namespace, budget: int | None = None
) -> Callable[[], None]:
    """A step of `DAPOTrainer` on all the states: one tree batch, or micro-batches of 16 padded sequences."""
    num_candidates = len(states[0]["candidates"])
    args = DAPOConfig(
        folder,
        layout=layout,
        max_tokens_per_row=budget,
        min_advantage_gap=0.0,
        per_device_train_batch_size=len(states) if layout == "tree" else SEQUENCES // num_candidates,
        **shared_arguments(arguments),
    )
    trainer = DAPOTrainer(
        make_model(AutoModelForCausalLM, arguments),
        args=args,
        train_dataset=Dataset.from_list(states),
        processing_class=make_tokenizer(),
    )
    assert trainer.layout == layout, trainer.layout
    rows = trainer.train_dataset
    rows = rows.select(sorted(range(len(rows)), key=rows["length"].__getitem__))
    return training_step(trainer, micro_batches(rows, args.per_device_train_batch_size))


def dpo_step(states: list[dict[str, Any]], folder: str, arguments: argparse.Namespace) -> Callable[[], None]:
    """A step of TRL's `DPOTrainer` on all the states' candidates, its references precomputed."""
    args = DPOConfig(
        folder,
        precompute_ref_log_probs=True,
        per_device_train_batch_size=SEQUENCES // 2,
        **shared_arguments(arguments),
    )
    trainer = DPOTrainer(
        make_model(AutoModelForCausalLM, arguments),
        args=args,
        train_dataset=Dataset.from_list(make_preferences(states)),
        processing_class=make_tokenizer(),
    )
    rows = trainer.train_dataset
    lengths = [len(row["prompt_ids"]) for row in rows]
    rows = rows.select(sorted(range(len(rows)), key=lengths.__getitem__))
    return training_step(trainer, micro_batches(rows, SEQUENCES // 2))


def critic_step(
    solutions: list[dict[str, Any]], side: str, folder: str, arguments: argparse.Namespace
) -> Callable[[], None]:
    """A step of `StepCriticTrainer`: in one of its layouts, or with one padded sequence per state."""
    args = StepCriticConfig(folder, layout="tree" if side == "tree" else "padded", **shared_arguments(arguments))
    trainer = StepCriticTrainer(
        make_model(AutoModelForTokenClassification, arguments),
        args=args,
        train_dataset=Dataset.from_list(solutions),
        processing_class=make_tokenizer(),
    )
    rows = list(trainer.train_dataset)
    if side != "state":
        return training_step(trainer, [rows])
    states = [state for row in rows for state in single_states(row)]
    states.sort(key=lambda state: len(state["context_ids"]))
    return training_step(trainer, micro_batches(states, SEQUENCES))


def single_states(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of a solution as rows of their own, each a sequence without the other states."""
    steps = [row["context_ids"][-1:], *row["branches"][0]]
    context, states = row["context_ids"][:-1], []
    for step, won, tried in zip(steps, row["successes"], row["rollouts"], strict=True):
        one = {"successes": [won], "rollouts": [tried], "context_is_state": False}
        states.append({"context_ids": context, "branches": [[step]], **one})
        context = context + step
    return states


# ---- Measuring ----


def race(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, taken in turn after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, step in sides.items():
            gc.collect()
            start = time.perf_counter()
            step()
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(seconds: dict[str, list[float]], slow: str, fast: str) -> dict[str, Any]:
    """Ratio of the medians, and the range of the ratios of single repeats."""
    ratios = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    ratio = statistics.median(seconds[slow]) / statistics.median(seconds[fast])
    return {"ratio": ratio, "lowest": min(ratios), "highest": max(ratios), "seconds": seconds}


def measure_speed(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    results = {}
    for name in [*SHAPES, *NO_SHARING]:
        rng = random.Random(arguments.seed)
        if name in NO_SHARING:
            states, target = make_lone_states(NO_SHARING[name], rng), 1.2
        else:
            shape, target = SHAPES[name]
            states = make_states(shape, arguments.num_problems, rng)
        steps = {layout: policy_step(states, layout, folder, arguments) for layout in ("tree", "padded")}
        results[name] = compare(race(steps, arguments.repeats), "padded", "tree") | {"target": target}
        results[name] |= {"pairs": sum(len(state["candidates"]) for state in states)}
        results[name] |= {"token_ratio": token_ratio(states, folder, arguments)}
        print(f"{name}: {results[name]['ratio']:.2f}x, tokens {results[name]['token_ratio']:.2f}x", flush=True)
    return results


def token_ratio(states: list[dict[str, Any]], folder: str, arguments: argparse.Namespace) -> float:
    """Positions that the padded layout computes for each one of the tree layout, padding included."""
    num_candidates = len(states[0]["candidates"])
    sizes = {}
    for layout in ("tree", "padded"):
        args = DAPOConfig(folder, layout=layout, min_advantage_gap=0.0, **shared_arguments(arguments))
        data = Dataset.from_list(states)
        trainer = DAPOTrainer(
            make_model(AutoModelForCausalLM, arguments), None, args, None, data, None, make_tokenizer()
        )
        rows = trainer.train_dataset
        rows = rows.select(sorted(range(len(rows)), key=rows["length"].__getitem__))
        size = len(rows) if layout == "tree" else SEQUENCES // num_candidates
        batches = [trainer.data_collator(batch) for batch in micro_batches(rows, size)]
        # rows of trees go through the model one by one, without padding
        sizes[layout] = sum(
            int(batch["num_tokens"]) if layout == "tree" else batch["input_ids"].numel() for batch in batches
        )
    return sizes["padded"] / sizes["tree"]


def measure_dpo(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Candidates per second of `DAPOTrainer` for each one of `DPOTrainer`: both see every candidate once."""
    states = make_states(SHAPES[FIRST][0], 1, random.Random(arguments.seed))
    steps = {"tree": policy_step(states, "tree", folder, arguments), "DPOTrainer": dpo_step(states, folder, arguments)}
    result = compare(race(steps, arguments.repeats), "DPOTrainer", "tree") | {"target": 5.0}
    print(f"DPOTrainer: {result['ratio']:.2f}x", flush=True)
    return result


def measure_critic(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    solutions = make_solutions(SHAPES[FIRST][0], random.Random(arguments.seed))
    sides = {"tree": "tree", "one sequence per state": "state", "one sequence per solution": "solution"}
    seconds = race(
        {name: critic_step(solutions, side, folder, arguments) for name, side in sides.items()}, arguments.repeats
    )
    result = compare(seconds, "one sequence per state", "tree") | {"target": 8.0}
    result["over_solutions"] = compare(seconds, "one sequence per solution", "tree")["ratio"]
    print(f"critic: {result['ratio']:.2f}x, over whole solutions {result['over_solutions']:.2f}x", flush=True)
    return result


def measure_memory(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Peak memory of two steps beyond what the loaded trainer holds, each layout in a process of its own."""
    peaks = {}
    for layout in ("tree", "padded"):
        command = [sys.executable, __file__, "--peak_memory_of", layout, "--seed", str(arguments.seed)]
        command += ["--intermediate_size", str(arguments.intermediate_size)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[layout] = json.loads(output.splitlines()[-1])
    ratio = peaks["tree"]["step"] / peaks["padded"]["step"]
    print(f"memory: {ratio:.2f} of the padded layout's, {peaks}", flush=True)
    return {"ratio": ratio, "target": 0.5, "bytes": peaks}


def peak_memory(layout: str, arguments: argparse.Namespace, folder: str) -> dict[str, int]:
    states = make_states(SHAPES[FIRST][0], 1, random.Random(arguments.seed))
    step = policy_step(states, layout, folder, arguments)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    step()
    step()
    return {"step": status("VmHWM") - before, "process": status("VmHWM")}


def status(name: str) -> int:
    """A figure of this process's memory in bytes, from Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure_gpu(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    results = {}
    for name, (shape, _) in SHAPES.items():
        states = make_states(shape, 8, random.Random(arguments.seed))
        steps = {"padded": policy_step(states, "padded", folder, arguments)}
        for budget in arguments.max_tokens_per_row:
            steps[f"tree, {budget:,}"] = policy_step(states, "tree", folder, arguments, budget)
        seconds = race(steps, arguments.repeats)
        results[name] = {side: compare(seconds, "padded", side) for side in steps if side != "padded"}
        print(name, {side: round(result["ratio"], 2) for side, result in results[name].items()}, flush=True)
    return results


# ---- The record ----


def table(results: dict[str, Any]) -> str:
    """What was aimed at and what was reached, a line a claim."""
    lines = ["| claim | target | measured | range | tokens |", "|---" * 5 + "|"]

    def line(claim: str, result: dict[str, Any], tokens: str = "") -> None:
        ends = f"{result['lowest']:.1f}-{result['highest']:.1f}"
        lines.append(f"| {claim} | {result['target']:g}x | **{result['ratio']:.1f}x** | {ends} | {tokens} |")

    for name, result in results.get("speed", {}).items():
        line(f"policy step, {name}: tree over padded", result, f"{result['token_ratio']:.1f}x")
    if "dpo" in results:
        line(f"candidates per second, {FIRST}: `DAPOTrainer` over `DPOTrainer`", results["dpo"])
    if "critic" in results:
        line(f"critic step, {FIRST}: tree over one sequence per state", results["critic"])
    if "memory" in results:
        step = {layout: sizes["step"] / 2**20 for layout, sizes in results["memory"]["bytes"].items()}
        measured = f"**{results['memory']['ratio']:.2f}** ({step['tree']:,.0f} of {step['padded']:,.0f} MiB)"
        lines.append(f"| peak memory of a step, {FIRST}: tree of padded | at most 0.5 | {measured} | | |")
    return "\n".join(lines)


def details(results: dict[str, Any]) -> str:
    critic = results["results"].get("critic")
    extra = (
        f"\n\nThe critic's tree over one padded sequence per solution: {critic['over_solutions']:.2f}x."
        if critic
        else ""
    )
    return (
        f"{origin_in_words(results)} Seed "
        f"{results['seed']}, {results['repeats']} repeats.\n\n{table(results['results'])}{extra}"
    )


MEASURES = {"speed": measure_speed, "dpo": measure_dpo, "critic": measure_critic, "memory": measure_memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=list(MEASURES), help="measure these, and keep the record of the others"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_problems", type=int, default=1, help="problems in an optimizer step, for speed")
    # Qwen2's own proportion: 5.4 in Qwen2-0.5B, 5.3 in Qwen2-7B
    parser.add_argument("--intermediate_size", type=int, default=1376)
    parser.add_argument("--gpu", action="store_true", help="bf16, the shape of Qwen2-0.5B, FlexAttention")
    parser.add_argument("--max_tokens_per_row", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--peak_memory_of", choices=["tree", "padded"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.peak_memory_of:
            print(json.dumps(peak_memory(arguments.peak_memory_of, arguments, folder)))
            return
        if arguments.gpu:
            results = {"gpu": measure_gpu(arguments, folder)}
        else:
            chosen = arguments.only or list(MEASURES)
            results = {name: MEASURES[name](arguments, folder) for name in chosen}
    name = "prefix_tree_gpu" if arguments.gpu else "prefix_tree"
    path = REPOSITORY / "benchmarks" / "results" / f"{name}.json"
    if arguments.only and path.exists():
        results = json.loads(path.read_text())["results"] | results
    record = {
        **origin(command_line(), PACKAGES),
        "seed": arguments.seed,
        "repeats": arguments.repeats,
        "results": results,
    }
    keep(record, name)
    if not arguments.gpu:
        write_between(REPOSITORY / "benchmarks" / "README.md", "prefix tree", details(record))


if __name__ == "__main__":
    main()
