"""
The examples, started as a user starts them.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub import ModelCard

from conftest import REPOSITORY, STUDENT, make_policy, make_tokenizer


def launch(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    """`accelerate launch examples/math.py ...`, as the README has it."""
    accelerate = Path(sys.executable).with_name("accelerate")
    command = [str(accelerate), "launch", str(REPOSITORY / "examples" / "math.py"), *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # one process, also where GPUs are
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """`examples/math.py`, imported."""
    spec = importlib.util.spec_from_file_location("example_of_mathematics", REPOSITORY / "examples" / "math.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo_in_small(tmp_path):
    """All stages of the demo with few problems: what it writes is there and loads with plain transformers."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

    done = launch(
        *("--output_dir", str(tmp_path / "run"), "--num_train_problems", "30", "--num_test_problems", "16"),
        *("--policy.max_steps", "3", "--critic.num_train_epochs", "1", "--eval_k", "2", "--allow_unfit_critic", "true"),
        cwd=tmp_path,  # the demo does not depend on where it is started
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for text in ("Accuracy on 16 held-out problems", "skill", "Time and tokens per stage", "critic values", "left out"):
        assert text in done.stdout, text
    run = tmp_path / "run"
    assert f"dapo-trl inspect {run}\n" in done.stdout  # what to look at next
    assert f"{run / 'values.png'}\n" in done.stdout.rpartition("dapo-trl inspect")[2]
    results = json.loads((run / "results.json").read_text())
    assert 0 <= results["before"]["greedy"]["low"] <= results["before"]["greedy"]["mean"] <= 1
    assert results["stages"]["sampled"]["tokens"] > 0
    for policy in ("policy", "policy_monte_carlo"):
        assert AutoModelForCausalLM.from_pretrained(run / policy).num_parameters() > 0
        AutoTokenizer.from_pretrained(run / policy)
        card = ModelCard.load(run / policy / "README.md")
        assert "| greedy, 16 held-out problems |" in card.text
        assert "2412.18279" in card.text
    assert AutoModelForTokenClassification.from_pretrained(run / "critic").config.num_labels == 1
    assert "| skill |" in ModelCard.load(run / "critic" / "README.md").text
    assert (run / "values.png").stat().st_size > 10_000
    assert {path.name for path in (run / "data").glob("*.parquet")} == {
        "solutions_critic.parquet", "states_critic.parquet", "states_monte_carlo.parquet"
    }  # fmt: skip


def test_published_rows_train_again(tmp_path):
    """The rows that the demo writes are what a user loads and trains on, without any of the code that made them."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dapo_trl import DAPOConfig, DAPOTrainer, TransformersEngine, add_advantages, collect_rollouts, math_reward
    from dapo_trl.engines import SamplingConfig
    from dapo_trl.rollouts import RolloutConfig

    sys.path.append(str(STUDENT))
    from arithmetic import make_problems

    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(STUDENT), tokenizer, 256)
    config = RolloutConfig(8, 4, 4, SamplingConfig(max_new_tokens=64))
    rollouts = collect_rollouts(Dataset.from_list(make_problems("train", 8, 0)), engine, math_reward, config)
    add_advantages(rollouts.states).to_parquet(tmp_path / "states.parquet")
    rollouts.solutions.to_parquet(tmp_path / "solutions.parquet")
    args = DAPOConfig(
        str(tmp_path / "out"), max_steps=2, bf16=False, use_cpu=True, report_to="none", save_strategy="no", beta=0.1
    )
    for name in ("states", "solutions"):
        data = Dataset.from_parquet(str(tmp_path / f"{name}.parquet"))
        trainer = DAPOTrainer(str(STUDENT), args=args, train_dataset=data)
        assert trainer.train().global_step == 2
        assert trainer.preprocessing_report["train"]["rows_kept"] > 0
        assert all(math.isfinite(logps) for row in trainer.train_dataset["ref_logps"] for logps in row)


@pytest.fixture
def random_model(tmp_path) -> Path:
    """A model that knows nothing, with a tokenizer that can write anything."""
    path = tmp_path / "random-model"
    make_policy(max_position_embeddings=4096).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def test_gsm8k_without_signal(tmp_path, data_dir, random_model):
    """Real questions and a model that cannot answer any: every stage runs, then it says so and trains on nothing."""
    done = launch(
        *("--model_name_or_path", str(random_model), "--dataset_name", str(data_dir / "gsm8k-train.jsonl")),
        *("--num_train_problems", "4", "--num_test_problems", "4", "--num_solutions", "3", "--num_kept", "2"),
        *("--num_completions", "2", "--max_new_tokens", "8", "--output_dir", str(tmp_path / "run")),
    )
    assert done.returncode != 0
    assert "No problem carries signal" in done.stderr
    assert "4 problems to train on, 4 held out" in done.stdout
    assert "problems all wrong" in done.stdout
    assert "Traceback" not in done.stderr.split("subprocess.CalledProcessError")[0].split("Traceback (most recent")[0]
    assert not (tmp_path / "run" / "policy").exists()
    assert json.loads((tmp_path / "run" / "sampled" / "manifest.json").read_text())["counts"]["problems_all_wrong"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "nowhere.jsonl", "--model_name_or_path", str(STUDENT)], "there is no such file"),
        (["--model_name_or_path", "./nowhere", "--dataset_name", "some.jsonl"], "nowhere"),
        (["--dataset-name", "nowhere.jsonl", "--model-name-or-path=nowhere/model"], "'nowhere/model', which cannot be"),
        (["--model_name_or_path", str(STUDENT)], "`dataset_name` is missing"),
        (["--prompt_template", "Q:"], "`prompt_template` must contain {question}"),
        (["--num_completions", "1"], "`num_completions` must be at least 2"),
    ],
)
def test_bad_arguments(tmp_path, commands, example, arguments, message):
    """As the example calls the command, without a start of its own for each."""
    few = ("--output_dir", tmp_path / "run", "--num_test_problems", "2", "--eval_k", "1")
    code, text = commands.run("run", example.choose_recipe(arguments), *arguments, *few, output=tmp_path / "log")
    assert code != 0
    assert message in text


def test_a_bad_argument_of_the_example(tmp_path):
    done = launch("--values", "guesses", "--output_dir", str(tmp_path / "run"))
    assert done.returncode != 0
    assert "invalid choice: 'guesses'" in done.stderr


def test_problems_of_ones_own_need_a_model(example):
    with pytest.raises(SystemExit, match="`--dataset_name` needs `--model_name_or_path`"):
        example.choose_recipe(["--dataset_name", "some.jsonl"])


def test_splits_of_the_demo_share_no_problem():
    """Training, validation, test and the student's pretraining are disjoint, whatever the seed."""
    sys.path.append(str(STUDENT))
    from arithmetic import make_problems

    prompts = {
        split: {row["prompt"] for seed in range(3) for row in make_problems(split, 300, seed)}
        for split in ("pretrain", "train", "validation", "test")
    }
    for split, own in prompts.items():
        for other, theirs in prompts.items():
            assert split == other or not own & theirs
