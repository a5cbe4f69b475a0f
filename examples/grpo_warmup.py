"""
Online first, then offline: a model is warmed up with TRL's `GRPOTrainer`, and what comes out is trained step by step.

    problems -> those that the model solves sometimes -> GRPO -> solutions -> step values -> critic -> policy

The warm-up is the *other* DAPO (ByteDance's, arXiv 2503.14476): clipping at 0.2 and 0.28, the mean over tokens,
truncated completions masked, no KL term. Its dynamic sampling, which TRL leaves out, is done once before: problems
whose solutions are all right or all wrong are left out. The reward function is this package's verifier.

By default the tiny student of `examples/student` learns last-digit arithmetic, in about three minutes on two CPU cores:

    accelerate launch --num_processes 1 examples/grpo_warmup.py

With your own model and data:

    accelerate launch --num_processes 1 examples/grpo_warmup.py \
        --model_name_or_path Qwen/Qwen2.5-Math-1.5B-Instruct --dataset_name openai/gsm8k --dataset_config main \
        --max_new_tokens 512 --per_device_train_batch_size 16 --gradient_accumulation_steps 16 \
        --learning_rate 1e-6 --max_steps 100 --output_dir runs/warm

The second part is `dapo-trl run` with the warm model; what follows `--` goes to it, such as another recipe's path. Run
again, the command goes on after the last part that was done.
"""

# ruff: noqa: E402  (imports below code: see next comment)
# Python puts the folder of a script on the module path, where `import math`, anywhere, would find the example of that
# name.
import os
import sys


HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != HERE]

import argparse
import json
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from dapo_trl import RolloutConfig, SamplingConfig, TransformersEngine, math_reward, sample_stage
from dapo_trl.cli import main as dapo_trl
from dapo_trl.problems import load_problems
from dapo_trl.recipe_arguments import TEMPLATES
from dapo_trl.rollouts import group_by_problem, has_signal


STUDENT = os.path.join(HERE, "student")
DEMO = os.path.join(STUDENT, "arithmetic.py:make_problems")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model_name_or_path", default=STUDENT)
    parser.add_argument("--dataset_name", default=DEMO, help="As of `dapo-trl run`.")
    parser.add_argument("--dataset_config")
    parser.add_argument("--num_train_problems", type=int, default=700, help="Of both parts.")
    parser.add_argument("--num_test_problems", type=int, default=1024, help="That neither part trains on.")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--num_generations", type=int, default=8, help="Solutions of a problem, also to filter by.")
    parser.add_argument("--per_device_train_batch_size", type=int, default=256, help="Completions at a time.")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--max_steps", type=int, default=15, help="Optimizer steps of the warm-up.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/grpo-warmup"))
    parser.add_argument("rest", nargs="*", metavar="-- ARGUMENT", help="Arguments of `dapo-trl run`.")
    return parser.parse_args(arguments)


def solved_sometimes(problems: Dataset, given: argparse.Namespace) -> Dataset:
    """Problems with right and wrong solutions, of a few: the pass rate lies between 0 and 1."""
    tokenizer = AutoTokenizer.from_pretrained(given.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(given.model_name_or_path, dtype="auto")
    device = PartialState(cpu=not torch.cuda.is_available()).device
    engine = TransformersEngine(model.to(device), tokenizer, batch_size=given.per_device_train_batch_size)
    config = RolloutConfig(
        num_solutions=given.num_generations,
        num_kept=1,
        sampling=SamplingConfig(max_new_tokens=given.max_new_tokens),
        seed=given.seed,
    )
    store = sample_stage(problems, engine, math_reward, config, given.output_dir / "filter", shard_size=128)
    groups = group_by_problem(list(store.table("sampled")))
    kept = {group[0]["problem_id"] for group in groups if has_signal(group)}
    if not kept:
        raise SystemExit("No problem is solved sometimes: easier problems, a stronger model, or more generations.")
    print(f"{len(kept)} of {len(problems)} problems are solved sometimes; the others teach nothing.")
    return problems.filter(lambda row: row["problem_id"] in kept)


def warm_up(given: argparse.Namespace) -> Path:
    """GRPO with the loss of ByteDance's DAPO; the folder of the model."""
    folder, done = given.output_dir / "warm", given.output_dir / "warm.json"
    settings = {name: str(getattr(given, name)) for name in vars(given) if name not in ("output_dir", "rest")}
    if done.exists():  # written when the weights were
        if json.loads(done.read_text()) != settings:
            raise SystemExit(f"{folder} was made with other arguments, see {done}. Choose another `--output_dir`.")
        return folder
    tokenizer = AutoTokenizer.from_pretrained(given.model_name_or_path)
    splits = load_problems(
        given.dataset_name,
        tokenizer,
        given.dataset_config,
        num_train=given.num_train_problems,
        num_test=given.num_test_problems,  # evaluated on later; where there is no test split, taken from the others
        prompt_template=TEMPLATES["math"],
        seed=given.seed,
    )
    problems = solved_sometimes(splits["train"], given)
    on_cpu = not torch.cuda.is_available()
    args = GRPOConfig(
        str(folder),
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        mask_truncated_completions=True,
        num_generations=given.num_generations,
        max_completion_length=given.max_new_tokens,
        per_device_train_batch_size=given.per_device_train_batch_size,
        gradient_accumulation_steps=given.gradient_accumulation_steps,
        learning_rate=given.learning_rate,
        max_steps=given.max_steps,
        warmup_steps=min(5, given.max_steps // 2),
        gradient_checkpointing=not on_cpu,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        save_strategy="no",
        report_to="none",
        logging_steps=5,
        seed=given.seed,
    )
    trainer = GRPOTrainer(
        given.model_name_or_path,
        reward_funcs=math_reward,
        args=args,
        train_dataset=problems,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    if PartialState().is_main_process:
        done.write_text(json.dumps(settings))
    PartialState().wait_for_everyone()
    return folder


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    warm = warm_up(given)
    is_demo = given.dataset_name == DEMO
    recipe = given.rest[:1] if given.rest and given.rest[0].endswith((".yaml", ".yml")) else []
    rest = given.rest[len(recipe) :]
    recipe = recipe or [os.path.join(HERE, "recipes", "demo.yaml" if is_demo else "paper.yaml")]
    shared = ("max_new_tokens", "seed", "num_train_problems", "num_test_problems", "output_dir")
    if named := [name for name in shared if any(word.partition("=")[0] == f"--{name}" for word in rest)]:
        raise SystemExit(f"`--{named[0]}` is for both parts: give it before `--`.")
    settings = ["--model_name_or_path", str(warm), "--output_dir", str(given.output_dir / "run")]
    for name in shared[:-1]:
        settings += [f"--{name}", str(getattr(given, name))]
    if not is_demo:
        settings += ["--dataset_name", given.dataset_name]
        settings += ["--dataset_config", given.dataset_config] if given.dataset_config else []
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return dapo_trl(["run", *recipe, *settings, *rest])


if __name__ == "__main__":
    sys.exit(main())
