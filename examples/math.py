# Copyright 2026 The dapo-trl team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Direct Advantage Policy Optimization on mathematics, from problems to a better policy:

    problems -> solutions -> step values -> critic -> advantages -> policy -> accuracy

By default the tiny student of `examples/student` learns last-digit arithmetic, in a few minutes on two CPU cores:

    accelerate launch --num_processes 1 examples/math.py

With your own model and data (a name on the Hub, or a local json or parquet file with questions and answers):

    accelerate launch --num_processes 1 examples/math.py \
        --model_name_or_path Qwen/Qwen2.5-Math-1.5B-Instruct \
        --dataset_name openai/gsm8k --dataset_config main \
        --max_new_tokens 512 --output_dir runs/gsm8k

All arguments: `python examples/math.py --help`. Numbers that are not given are the paper's for your own model, and
settings that suit the student for the demo.
"""

# ruff: noqa: E402  (imports below code: see next comment)
# This file is called like a module of the standard library. Python puts the folder of a script on the module path, so
# without the next lines `import math`, anywhere, would find this file.
import os
import sys


HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != HERE]

import contextlib
import dataclasses
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, load_dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from dapo_trl import (
    DAPOConfig,
    DAPOTrainer,
    StepCriticConfig,
    StepCriticTrainer,
    TransformersEngine,
    add_advantages,
    collect_rollouts,
    evaluate_policy,
    math_reward,
)
from dapo_trl.diagnostics import sibling_ranking
from dapo_trl.engines import SamplingConfig
from dapo_trl.evaluation import Evaluation
from dapo_trl.modeling import load_policy
from dapo_trl.rollouts import RolloutConfig, Rollouts
from dapo_trl.verifiers import check_answers


STUDENT = str(Path(HERE) / "student")

# What an argument that is not given stands for: the paper's numbers, and what suits a model of 0.25M parameters.
PAPER = {
    "num_train_problems": None,
    "num_test_problems": 1000,
    "num_solutions": 32,
    "num_kept": 6,
    "num_completions": 16,
    "max_new_tokens": 1024,
    "generation_batch_size": 64,
    "critic_learning_rate": 5e-6,
    "critic_epochs": 1.0,
    "critic_warmup_steps": 0,
    "critic_batch_size": 8,
    "critic_accumulation_steps": 8,
    "gradient_checkpointing": True,
    "beta": 0.01,
    "duplicate_weights": "uniform",
    "policy_learning_rate": 5e-7,
    "policy_epochs": 1.0,
    "policy_max_steps": -1,
    "policy_warmup_steps": 0,
    "policy_batch_size": 8,
    "policy_accumulation_steps": 64,
    "values": "critic",
}
DEMO = PAPER | {
    "num_train_problems": 700,
    "num_test_problems": 1024,
    "num_solutions": 8,
    "num_kept": 4,
    "num_completions": 8,
    "max_new_tokens": 64,
    "generation_batch_size": 512,
    "critic_learning_rate": 5e-4,
    "critic_epochs": 6.0,
    "critic_warmup_steps": 40,
    "critic_batch_size": 32,
    "critic_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "beta": 0.1,
    "duplicate_weights": "counts",
    "policy_learning_rate": 4e-4,
    "policy_max_steps": 80,
    "policy_warmup_steps": 20,
    "policy_batch_size": 64,
    "policy_accumulation_steps": 1,
    "values": "both",
}

NO_SIGNAL = (
    "No problem carries signal: there is no state whose next steps could be compared. Nothing was trained. Use easier "
    "problems, a stronger model, more solutions per problem, or a larger --max_new_tokens if many were truncated."
)

console = Console(width=110)


@dataclass
class MathArguments:
    """
    Arguments of the example, besides TRL's `ModelConfig`. Those without a default are the paper's, or the demo's.
    """

    output_dir: str = field(default="runs/math", metadata={"help": "Where models, data sets, cards and figures go."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub name or local json/jsonl/parquet file. Default: generated arithmetic."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on. If there is none, problems are held out."}
    )
    prompt_template: str = field(
        default="Question: {question}\nAnswer, step by step, one step a line, and end with '#### <result>'.\n",
        metadata={"help": "How a question is put, for models without a chat template too."},
    )
    num_train_problems: int | None = field(default=None, metadata={"help": "Problems to train on. Demo: 700."})
    num_test_problems: int | None = field(default=None, metadata={"help": "Problems to evaluate on. Demo: 1024."})
    num_solutions: int | None = field(default=None, metadata={"help": "Solutions per problem. Paper: 32."})
    num_kept: int | None = field(default=None, metadata={"help": "Solutions kept per problem. Paper: 6."})
    num_completions: int | None = field(default=None, metadata={"help": "Completions per state. Paper: 16."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest completion in tokens."})
    generation_batch_size: int | None = field(default=None, metadata={"help": "Sequences generated at a time."})
    values: str | None = field(
        default=None,
        metadata={
            "help": "Where advantages come from: 'critic' (paper), 'monte_carlo' or 'both' (two policies).",
            "choices": ["critic", "monte_carlo", "both"],
        },
    )
    critic_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Backbone of the critic. Default: the policy's model."}
    )
    critic_learning_rate: float | None = field(default=None, metadata={"help": "Paper: 5e-6."})
    critic_epochs: float | None = field(default=None, metadata={"help": "Paper: 1."})
    critic_warmup_steps: int | None = field(default=None, metadata={"help": "Warm-up steps. Paper: not stated."})
    critic_batch_size: int | None = field(default=None, metadata={"help": "Solutions per micro-batch."})
    critic_accumulation_steps: int | None = field(default=None, metadata={"help": "Micro-batches per step."})
    beta: float | None = field(default=None, metadata={"help": "Scale of the target A/beta. Paper: 0.01."})
    duplicate_weights: str | None = field(
        default=None, metadata={"help": "Weight of a candidate: 'uniform' (paper) or 'counts' (demo)."}
    )
    policy_learning_rate: float | None = field(default=None, metadata={"help": "Paper: 5e-7."})
    policy_epochs: float | None = field(default=None, metadata={"help": "Passes over the states."})
    policy_max_steps: int | None = field(default=None, metadata={"help": "Optimizer steps; -1 goes by epochs."})
    policy_warmup_steps: int | None = field(default=None, metadata={"help": "Warm-up steps. Paper: 0."})
    policy_batch_size: int | None = field(default=None, metadata={"help": "States per micro-batch."})
    policy_accumulation_steps: int | None = field(default=None, metadata={"help": "Micro-batches per step."})
    layout: str = field(
        default="tree",
        metadata={
            "help": "'tree' computes what sequences have in common once, 'padded' anew.",
            "choices": ["tree", "padded"],
        },
    )
    eval_k: int = field(default=4, metadata={"help": "Samples per test problem, for mean@k and pass@k."})
    eval_split: str = field(
        default="test", metadata={"help": "Generated problems to evaluate on: 'test', or 'validation' while tuning."}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Trade time for memory. On for your own model, off in the demo."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow models with Python code of their own."})
    report_to: str = field(default="none", metadata={"help": "Where metrics go: 'none', 'wandb', 'tensorboard', ..."})
    seed: int = field(default=0, metadata={"help": "Seed of problems, sampling and training."})

    def resolved(self, is_demo: bool) -> "MathArguments":
        """The arguments with every number filled in."""
        preset = DEMO if is_demo else PAPER
        given = {name: value for name in preset if (value := getattr(self, name)) is not None}
        arguments = dataclasses.replace(self, **(preset | given))
        if "num_kept" not in given:
            arguments.num_kept = min(arguments.num_kept, arguments.num_solutions)
        if arguments.values not in ("critic", "monte_carlo", "both"):
            raise ValueError(f"`values` must be 'critic', 'monte_carlo' or 'both', got {arguments.values!r}.")
        if "{question}" not in arguments.prompt_template:
            raise ValueError(f"`prompt_template` must contain {{question}}, got {arguments.prompt_template!r}.")
        arguments.rollout_config()  # refuses numbers that do not fit before anything is loaded
        return arguments

    def rollout_config(self) -> RolloutConfig:
        return RolloutConfig(
            num_solutions=self.num_solutions,
            num_kept=self.num_kept,
            num_completions=self.num_completions,
            sampling=SamplingConfig(max_new_tokens=self.max_new_tokens),
            seed=self.seed,
        )


class Stages:
    """Time and tokens of each stage."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[dict[str, float]]:
        console.rule(f"[bold]{name}")
        self.rows[name] = {"seconds": 0.0, "tokens": 0}
        start = time.perf_counter()
        yield self.rows[name]
        self.rows[name]["seconds"] = time.perf_counter() - start

    def print(self) -> None:
        table = Table("stage", "seconds", "tokens", title="Time and tokens per stage")
        for name, row in self.rows.items():
            table.add_row(name, f"{row['seconds']:.1f}", f"{row['tokens']:,.0f}" if row["tokens"] else "")
        table.add_row("total", f"{sum(row['seconds'] for row in self.rows.values()):.1f}", "")
        console.print(table)


def main(arguments: MathArguments, model_config: ModelConfig) -> dict[str, Any]:
    """Run all stages; returns what is also written to `results.json`."""
    if PartialState().num_processes > 1:
        raise SystemExit(
            "This example samples in one process. Start it with `accelerate launch --num_processes 1 examples/math.py`."
        )
    is_demo = model_config.model_name_or_path is None
    if is_demo and arguments.dataset_name is not None:
        raise SystemExit(
            "`--dataset_name` needs `--model_name_or_path`: the demo's student knows only the demo's task."
        )
    model_config.model_name_or_path = model_config.model_name_or_path or STUDENT
    arguments = arguments.resolved(is_demo)
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    stages = Stages()
    tokenizer = AutoTokenizer.from_pretrained(
        model_config.model_name_or_path, trust_remote_code=arguments.trust_remote_code
    )
    problems = load_problems(arguments, tokenizer)
    console.print(f"{len(problems['train']):,} problems to train on, {len(problems['test']):,} held out.")
    policy = load_reference(arguments, model_config)
    engine = TransformersEngine(policy, tokenizer, arguments.generation_batch_size)

    with stages("Accuracy before training") as stage:
        before = evaluate(problems["test"], engine, arguments)
        stage["tokens"] = before.tokens
        print_accuracy(before)
    with stages("Solutions and completions") as stage:
        rollouts = sample(problems["train"], engine, arguments)
        stage["tokens"] = rollouts.report["tokens_generated"]
    if len(rollouts.states) == 0:
        print_dropped({"rollouts": rollouts.report})
        stages.print()
        save_results({"before": dataclasses.asdict(before), "dropped": {"rollouts": rollouts.report}}, output_dir)
        raise SystemExit(NO_SIGNAL)
    save_rollouts(rollouts, output_dir)
    del engine, policy
    free_memory()

    results: dict[str, Any] = {"before": dataclasses.asdict(before), "dropped": {"rollouts": rollouts.report}}
    accuracies = {"before": before}
    states = {}
    if arguments.values in ("critic", "both"):
        with stages("Critic"):
            critic, solutions, states["critic"], metrics = train_critic(rollouts, tokenizer, arguments, model_config)
            results |= {"critic": metrics}
            results["dropped"]["critic"] = critic.preprocessing_report
            draw_values(solutions, output_dir / "values.png")
        del critic
        free_memory()
    if arguments.values in ("monte_carlo", "both"):
        states["monte_carlo"] = add_advantages(rollouts.states, "values")
    for source, rows in states.items():
        title = source.replace("_", " ")
        rows.to_parquet(output_dir / "data" / f"states_{source}.parquet")
        with stages(f"Policy, {title} values"):
            trainer = train_policy(rows, tokenizer, arguments, model_config, source)
            results["dropped"][f"policy_{source}"] = trainer.preprocessing_report
        with stages(f"Accuracy, {title} values") as stage:
            engine = TransformersEngine(trainer.model, tokenizer, arguments.generation_batch_size)
            accuracies[source] = after = evaluate(problems["test"], engine, arguments)
            stage["tokens"] = after.tokens
            print_accuracy(after)
            results[f"policy_{source}"] = dataclasses.asdict(after)
        results["dropped"][f"accuracy_{source}"] = {"truncated": after.truncated, "not_judged": after.not_judged}
        finish_policy(trainer, arguments, before, after)
        del trainer, engine
        free_memory()

    print_accuracies(accuracies)
    print_dropped(results["dropped"])
    stages.print()
    results |= {"stages": stages.rows, "arguments": dataclasses.asdict(arguments)}
    results["model"] = {name: getattr(model_config, name) for name in ("model_name_or_path", "dtype", "use_peft")}
    save_results(results, output_dir)
    console.print(f"Models, data sets, cards and figures: {output_dir.resolve()}")
    return results


# ---- Problems ----


def load_problems(arguments: MathArguments, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """Problems with `prompt`, `answer` and `problem_id`: `train`, and `test` that shares no problem with it."""
    if arguments.dataset_name is None:
        return generate_problems(arguments)
    parts = read_dataset(arguments)
    if arguments.dataset_test_split in parts:
        train, test = parts[arguments.dataset_train_split], parts[arguments.dataset_test_split]
    else:
        whole = parts[arguments.dataset_train_split].shuffle(seed=arguments.seed)
        size = min(arguments.num_test_problems, len(whole) // 2)
        test, train = whole.select(range(size)), whole.select(range(size, len(whole)))
    # Seeded, so that a smaller number of problems is a sample of all of them.
    train = first_rows(train.shuffle(seed=arguments.seed), arguments.num_train_problems)
    test = first_rows(test.shuffle(seed=arguments.seed), arguments.num_test_problems)
    problems = DatasetDict(train=as_problems(train, arguments, tokenizer), test=as_problems(test, arguments, tokenizer))
    seen = {json.dumps(prompt) for prompt in problems["train"]["prompt"]}
    return DatasetDict(
        train=problems["train"], test=problems["test"].filter(lambda row: json.dumps(row["prompt"]) not in seen)
    )


def generate_problems(arguments: MathArguments) -> DatasetDict:
    """Problems of the demo; its splits are disjoint by construction."""
    sys.path.append(STUDENT)
    from arithmetic import make_problems

    train = make_problems("train", arguments.num_train_problems, seed=arguments.seed)
    test = make_problems(arguments.eval_split, arguments.num_test_problems, seed=0)
    return DatasetDict(train=Dataset.from_list(train), test=Dataset.from_list(test))


def read_dataset(arguments: MathArguments) -> DatasetDict:
    """A data set from a local file or from the Hub, with a train split at least."""
    name = arguments.dataset_name
    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}.get(Path(name).suffix)
    if kind is not None and not Path(name).exists():
        raise SystemExit(f"`dataset_name` is {name!r}, but there is no such file. Check the path.")
    parts = load_dataset(kind, data_files=name) if kind is not None else load_dataset(name, arguments.dataset_config)
    if arguments.dataset_train_split not in parts:
        raise SystemExit(
            f"{name} has no split {arguments.dataset_train_split!r}, only {list(parts)}. Set `--dataset_train_split`."
        )
    return parts


def as_problems(rows: Dataset, arguments: MathArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rows with a question and an answer, as prompts: conversational if the tokenizer has a chat template."""
    question = find_column(rows, ("question", "problem", "prompt"))
    answer = find_column(rows, ("answer", "solution", "target"))

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        prompt = row[question]
        if isinstance(prompt, str):
            prompt = arguments.prompt_template.format(question=prompt)
            prompt = [{"role": "user", "content": prompt}] if tokenizer.chat_template else prompt
        return {"prompt": prompt, "answer": str(row[answer]), "problem_id": str(row.get("problem_id", index))}

    problems = rows.map(convert, with_indices=True, remove_columns=rows.column_names, desc="Reading problems")
    check_answers(problems["answer"])
    return problems


def find_column(rows: Dataset, names: tuple[str, ...]) -> str:
    """The first of the names that the rows have."""
    for name in names:
        if name in rows.column_names:
            return name
    raise SystemExit(f"The data set needs a column named {' or '.join(map(repr, names))}, it has {rows.column_names}.")


def first_rows(rows: Dataset, number: int | None) -> Dataset:
    return rows if number is None else rows.select(range(min(number, len(rows))))


# ---- Stages ----


def load_reference(arguments: MathArguments, model_config: ModelConfig) -> Any:
    """The policy before training, ready to sample."""
    config = DAPOConfig(arguments.output_dir, **shared_training_arguments(arguments, model_config))
    policy = load_policy(model_config.model_name_or_path, config, get_quantization_config(model_config))
    return policy.to(PartialState().device) if policy.device.type == "cpu" else policy


def model_init_kwargs(model_config: ModelConfig) -> dict[str, Any]:
    return {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
    }


def evaluate(problems: Dataset, engine: TransformersEngine, arguments: MathArguments) -> Evaluation:
    """Accuracy on the held-out problems, with the same seed for every policy."""
    sampling = arguments.rollout_config().sampling
    return evaluate_policy(problems, engine, math_reward, sampling, arguments.eval_k, seed=1234)


def sample(problems: Dataset, engine: TransformersEngine, arguments: MathArguments) -> Rollouts:
    """Solutions, completions from their states, and the values that follow."""
    return collect_rollouts(problems, engine, math_reward, arguments.rollout_config())


def save_rollouts(rollouts: Rollouts, output_dir: Path) -> None:
    (output_dir / "data").mkdir(exist_ok=True)
    rollouts.solutions.to_parquet(output_dir / "data" / "solutions.parquet")
    rollouts.states.to_parquet(output_dir / "data" / "states.parquet")


def train_critic(
    rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase, arguments: MathArguments, model_config: ModelConfig
) -> tuple[StepCriticTrainer, Dataset, Dataset, dict[str, float]]:
    """Train the critic on 90% of the problems, measure it on the others, and value all rows."""
    held_out = held_out_problems(rollouts.solutions)
    config = StepCriticConfig(
        output_dir=str(Path(arguments.output_dir) / "critic"),
        learning_rate=arguments.critic_learning_rate,
        num_train_epochs=arguments.critic_epochs,
        warmup_steps=arguments.critic_warmup_steps,
        per_device_train_batch_size=arguments.critic_batch_size,
        gradient_accumulation_steps=arguments.critic_accumulation_steps,
        **shared_training_arguments(arguments, model_config),
    )
    trainer = StepCriticTrainer(
        model=arguments.critic_model_name_or_path or model_config.model_name_or_path,
        args=config,
        train_dataset=rollouts.solutions.filter(lambda row: row["problem_id"] not in held_out),
        eval_dataset=rollouts.solutions.filter(lambda row: row["problem_id"] in held_out),
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_config),
        peft_config=get_peft_config(model_config),
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    solutions, states = trainer.predict_values(rollouts.solutions), trainer.predict_values(rollouts.states)
    unseen = states.filter(lambda row: row["problem_id"] in held_out)
    ranking, num_pairs = sibling_ranking(unseen["critic_values"], unseen["values"], min_difference=0.3)
    metrics |= {"eval_sibling_ranking": ranking, "eval_sibling_pairs": num_pairs}
    console.print(
        f"Critic on {len(held_out)} held-out problems: BCE {metrics['eval_bce']:.3f} (best constant "
        f"{metrics['eval_bce_constant']:.3f}), skill {metrics['eval_skill']:.1%}, Brier {metrics['eval_brier']:.3f}, "
        f"calibration error {metrics['eval_calibration_error']:.3f}; orders {ranking:.1%} of {num_pairs:,} pairs of "
        "sibling steps as their Monte Carlo values do, where these differ by 0.3 or more."
    )
    if metrics["eval_skill"] <= 0:
        console.print(
            "[bold red]The critic has no skill: it predicts no better than a constant. A policy trained on its values "
            "is not likely to improve. Use more problems, another learning rate, or --values monte_carlo."
        )
    names = {"eval_bce": "binary cross-entropy", "eval_bce_constant": "best constant's cross-entropy"}
    names |= {"eval_skill": "skill", "eval_brier": "Brier score", "eval_calibration_error": "calibration error"}
    names |= {"eval_sibling_ranking": "siblings ordered alike (0.3 apart)"}
    save(trainer, arguments, {title: {"held-out problems": metrics[name]} for name, title in names.items()})
    return trainer, solutions, add_advantages(states, "critic_values"), metrics


def held_out_problems(solutions: Dataset) -> set[str]:
    """Every tenth problem: the critic is measured on them and not trained on them."""
    return set(list(dict.fromkeys(solutions["problem_id"]))[::10])


def train_policy(
    states: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    arguments: MathArguments,
    model_config: ModelConfig,
    source: str,
) -> DAPOTrainer:
    """Train the policy on the advantages of the states' next steps."""
    config = DAPOConfig(
        output_dir=str(Path(arguments.output_dir) / ("policy" if source == "critic" else f"policy_{source}")),
        beta=arguments.beta,
        duplicate_weights=arguments.duplicate_weights,
        learning_rate=arguments.policy_learning_rate,
        num_train_epochs=arguments.policy_epochs,
        max_steps=arguments.policy_max_steps,
        warmup_steps=arguments.policy_warmup_steps,
        per_device_train_batch_size=arguments.policy_batch_size,
        gradient_accumulation_steps=arguments.policy_accumulation_steps,
        **shared_training_arguments(arguments, model_config),
    )
    trainer = DAPOTrainer(
        model=model_config.model_name_or_path,
        args=config,
        train_dataset=states,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_config),
        peft_config=get_peft_config(model_config),
    )
    trainer.train()
    return trainer


def shared_training_arguments(arguments: MathArguments, model_config: ModelConfig) -> dict[str, Any]:
    on_gpu = PartialState().device.type == "cuda"
    return {
        "model_init_kwargs": model_init_kwargs(model_config),
        "trust_remote_code": arguments.trust_remote_code,
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "layout": arguments.layout,
        "max_length": None,  # what was sampled fits; `max_new_tokens` is the limit
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "dataloader_pin_memory": on_gpu,
        "report_to": arguments.report_to,
        "save_strategy": "no",
        "seed": arguments.seed,
    }


def finish_policy(trainer: DAPOTrainer, arguments: MathArguments, before: Evaluation, after: Evaluation) -> None:
    rows = {"greedy": "greedy", f"mean@{after.k}": "mean_at_k", f"pass@{after.k}": "pass_at_k"}
    save(
        trainer,
        arguments,
        {
            f"{title}, {after.num_problems:,} held-out problems": {
                "before": str(getattr(before, name)),
                "after": str(getattr(after, name)),
            }
            for title, name in rows.items()
        },
    )


def save(
    trainer: DAPOTrainer | StepCriticTrainer, arguments: MathArguments, results: dict[str, dict[str, Any]]
) -> None:
    name = arguments.dataset_name
    dataset_name = None if name is None or Path(name).exists() else name  # a card links to the Hub
    trainer.save_model()
    trainer.create_model_card(Path(trainer.args.output_dir).name, dataset_name, results=results)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- What a person sees ----


def print_accuracy(result: Evaluation) -> None:
    console.print(
        f"greedy {result.greedy}, mean@{result.k} {result.mean_at_k}; {result.truncated:,} of "
        f"{result.num_problems * (result.k + 1):,} samples truncated, {result.not_judged:,} not judged"
    )


def save_results(results: dict[str, Any], output_dir: Path) -> None:
    (output_dir / "results.json").write_text(json.dumps(results, indent=2))


def print_accuracies(accuracies: dict[str, Evaluation]) -> None:
    first = accuracies["before"]
    table = Table("policy", "greedy", f"mean@{first.k}", f"pass@{first.k}")
    table.title = f"Accuracy on {first.num_problems:,} held-out problems, temperature 1, 95% intervals"
    for name, result in accuracies.items():
        label = name if name == "before" else f"after, {name.replace('_', ' ')} values"
        table.add_row(label, str(result.greedy), str(result.mean_at_k), str(result.pass_at_k))
    console.print(table)


def print_dropped(dropped: dict[str, Any]) -> None:
    """Every count of the reports, nested or not, a line each; zeros are left out."""
    table = Table("stage", "what", "how many", title="What was sampled, kept and left out")
    for stage, report in dropped.items():
        nested = isinstance(next(iter(report.values()), 0), dict)
        for part, counts in report.items() if nested else [("", report)]:
            for what, count in counts.items():
                if count:
                    table.add_row(f"{stage} {part}".strip().replace("_", " "), what.replace("_", " "), f"{count:,}")
        table.add_section()
    console.print(table)


def draw_values(solutions: Dataset, path: Path) -> None:
    """Values along some solutions of the same problems, correct and wrong."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_problem: dict[str, list[dict[str, Any]]] = {}
    for row in solutions:
        by_problem.setdefault(row["problem_id"], []).append(row)
    mixed = [rows for rows in by_problem.values() if len({row["reward"] for row in rows}) > 1][:4]
    if not mixed:
        return
    figure, axes = pyplot.subplots(
        1, len(mixed), figsize=(4 * len(mixed), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, rows in zip(axes[0], mixed, strict=True):
        for outcome, color in ((1.0, "#1b7837"), (0.0, "#c2410c")):
            row = next(row for row in rows if (row["reward"] >= 0.5) == bool(outcome))
            states = range(len(row["values"]))
            verdict = "correct" if outcome else "wrong"
            # at the end the method takes the true reward, not the critic's guess
            critic_values = [*row["critic_values"][:-1], row["reward"]]
            axis.plot(states, critic_values, color=color, marker="o", label=f"{verdict}, critic (at the end: outcome)")
            axis.plot(states, row["values"], color=color, linestyle=":", marker="x", label=f"{verdict}, Monte Carlo")
        axis.set_xlabel("steps taken")
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
        prompt = rows[0]["prompt"] if isinstance(rows[0]["prompt"], str) else rows[0]["prompt"][-1]["content"]
        axis.set_title(prompt.strip()[:40], fontsize=9)
    axes[0][0].set_ylabel("value: probability to end correct")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle("Values along solutions")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    console.print(f"Figure of values along some solutions: {path}")


if __name__ == "__main__":
    parser = TrlParser((MathArguments, ModelConfig))
    main(*parser.parse_args_and_config())
