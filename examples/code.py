"""
Train a model on programs, step by step.

Without a model, this is the demo: a tiny student, which this project trained itself, writes small functions and learns
to write better ones. What it writes is run against unit tests, in sandboxes, and so you have to allow it:

    HF_ALLOW_CODE_EVAL=1 accelerate launch --num_processes 1 examples/code.py

With your own model and data (a name on the Hub, or a local json or parquet file with questions and unit tests, in the
format of HumanEval, MBPP, TACO or APPS; see docs/code.md):

    HF_ALLOW_CODE_EVAL=1 accelerate launch --num_processes 1 examples/code.py \
        --model_name_or_path Qwen/Qwen2.5-Coder-1.5B-Instruct \
        --dataset_name google-research-datasets/mbpp --dataset_config sanitized \
        --max_new_tokens 512 --output_dir runs/mbpp

This is `dapo-trl run` with `examples/recipes/code-demo.yaml`, or with `examples/recipes/code.yaml` for your model.
Killed at any moment, it goes on with the same command. All settings: `dapo-trl run --help`.
"""

# ruff: noqa: E402  (imports below code: see next comment)
# This file is called like a module of the standard library, which the debugger needs. Python puts the folder of a
# script on the module path, so without the next lines `import code`, anywhere, would find this file.
import os
import sys


HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != HERE]

from dapo_trl.cli import main


def choose_recipe(arguments: list[str]) -> str:
    """The demo's recipe, or the paper's settings for a model that is given."""
    names = {"--" + argument.partition("=")[0].lstrip("-").replace("-", "_") for argument in arguments}
    if "--model_name_or_path" in names:
        return os.path.join(HERE, "recipes", "code.yaml")
    if "--dataset_name" in names:
        raise SystemExit(
            "`--dataset_name` needs `--model_name_or_path`: the demo's student knows only the demo's task."
        )
    return os.path.join(HERE, "recipes", "code-demo.yaml")


if __name__ == "__main__":
    sys.exit(main(["run", choose_recipe(sys.argv[1:]), *sys.argv[1:]]))
