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

By default the tiny student of `examples/student` learns last-digit arithmetic, in about two minutes on two CPU cores:

    accelerate launch --num_processes 1 examples/math.py

With your own model and data (a name on the Hub, or a local json or parquet file with questions and answers):

    accelerate launch --num_processes 1 examples/math.py \
        --model_name_or_path Qwen/Qwen2.5-Math-1.5B-Instruct \
        --dataset_name openai/gsm8k --dataset_config main \
        --max_new_tokens 512 --output_dir runs/gsm8k

This is `dapo-trl run` with `examples/recipes/demo.yaml`, or with `examples/recipes/paper.yaml` for a model of yours.
Killed at any moment, it goes on with the same command. All settings: `dapo-trl run --help`.
"""

# ruff: noqa: E402  (imports below code: see next comment)
# This file is called like a module of the standard library. Python puts the folder of a script on the module path, so
# without the next lines `import math`, anywhere, would find this file.
import os
import sys


HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != HERE]

from dapo_trl.cli import main


def choose_recipe(arguments: list[str]) -> str:
    """The demo's recipe, or the paper's for a model that is given."""
    names = {"--" + argument.partition("=")[0].lstrip("-").replace("-", "_") for argument in arguments}
    if "--model_name_or_path" in names:
        return os.path.join(HERE, "recipes", "paper.yaml")
    if "--dataset_name" in names:
        raise SystemExit(
            "`--dataset_name` needs `--model_name_or_path`: the demo's student knows only the demo's task."
        )
    return os.path.join(HERE, "recipes", "demo.yaml")


if __name__ == "__main__":
    sys.exit(main(["run", choose_recipe(sys.argv[1:]), *sys.argv[1:]]))
