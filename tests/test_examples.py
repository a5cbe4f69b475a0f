"""
The examples, started as a user starts them.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

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


# ---- Programs ----


CODE = REPOSITORY / "examples" / "code.py"


def test_programs_in_small(tmp_path, commands):
    """All stages of the demo of programs with few problems; its student is right about half of the time."""
    few = ("--num_train_problems", "16", "--num_test_problems", "16", "--eval_k", "2", "--critic.num_train_epochs", "1")
    few += ("--policy.max_steps", "3", "--allow_unfit_critic", "true", "--eval_pass_k", "1")
    recipe = REPOSITORY / "examples" / "recipes" / "code-demo.yaml"
    folder, log = tmp_path / "run", tmp_path / "log"
    code, text = commands.run("run", recipe, *few, "--output_dir", folder, "--allow_execution", "true", output=log)
    assert code == 0, text[-3000:]
    results = json.loads((folder / "results.json").read_text())
    assert 0.1 < results["before"]["mean_at_k"]["mean"] < 0.9 and results["before"]["not_judged"] == 0
    assert set(results["policy_critic"]["pass_at"]) == {"1"}
    manifest = json.loads((folder / "sampled" / "manifest.json").read_text())
    assert manifest["counts"]["problems_with_signal"] > 0 and manifest["counts"]["not_judged"] == 0
    code, text = commands.run("inspect", folder, output=tmp_path / "shown")
    assert code == 0 and "unit tests" in text and '"cases"' not in text


def test_programs_are_run_only_if_that_is_allowed(tmp_path):
    """The example as it stands says what to do, and has started nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_ALLOW_CODE_EVAL"}
    words = [sys.executable, str(CODE), "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 2 and "set HF_ALLOW_CODE_EVAL=1 to allow it" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_example_does_not_hide_the_debuggers_module():
    """`import code`, anywhere, finds the standard library's, from which `pdb` starts its console."""
    check = "import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv[2]); "
    check += "import code, pdb; assert code.InteractiveConsole and sys.argv[1] not in sys.path"
    subprocess.run([sys.executable, "-c", check, str(CODE.parent), str(CODE)], check=True, timeout=300)


def test_recipes_of_the_example_of_programs():
    spec = importlib.util.spec_from_file_location("example_of_programs", CODE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.choose_recipe([]).endswith("code-demo.yaml")
    assert module.choose_recipe(["--model-name-or-path=x"]).endswith("code.yaml")
    with pytest.raises(SystemExit, match="`--dataset_name` needs `--model_name_or_path`"):
        module.choose_recipe(["--dataset_name", "some.jsonl"])


def test_online_first(tmp_path):
    """Problems that are solved sometimes, one step of GRPO, and a run from the warm model; again, only the run."""
    script = REPOSITORY / "examples" / "grpo_warmup.py"
    words = [sys.executable, str(script), "--max_steps", "1", "--num_train_problems", "24", "--num_test_problems", "8"]
    words += ["--num_generations", "4", "--per_device_train_batch_size", "8", "--output_dir", str(tmp_path), "--"]
    words += ["--values", "monte_carlo", "--num_solutions", "4", "--num_completions", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    kept = int(re.search(r"(\d+) of 24 problems are solved sometimes", done.stdout)[1])
    assert 0 < kept < 24
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["policy_monte_carlo"]["mean_at_k"]["mean"] > 0
    weights = [load_file(folder / "model.safetensors") for folder in (STUDENT, tmp_path / "warm")]
    assert any((weights[0][name] != tensor).any() for name, tensor in weights[1].items())
    warm = (tmp_path / "warm" / "model.safetensors").stat().st_mtime_ns
    other = subprocess.run([*words[:2], "--seed", "1", *words[2:]], capture_output=True, text=True, timeout=600)
    assert other.returncode == 1 and "was made with other arguments" in other.stderr
    twice = subprocess.run([*words, "--seed", "1"], capture_output=True, text=True, timeout=600)
    assert twice.returncode == 1 and "`--seed` is for both parts: give it before `--`" in twice.stderr
    again = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and (tmp_path / "warm" / "model.safetensors").stat().st_mtime_ns == warm


def test_the_task_of_programs():
    """Right solutions pass their own tests, and what the task calls right is what an executor passes."""
    sys.path.append(str(STUDENT))
    import random

    import programs
    from dapo_trl.execution import Program, UnitTests
    from dapo_trl.execution.local import LocalExecutor

    rng, problems = random.Random(0), programs.make_problems("validation", 60, 0)
    splits = {name: {row["prompt"] for row in programs.make_problems(name, 200, 0)} for name in programs.SPLITS}
    assert sum(map(len, splits.values())) == len(set().union(*splits.values()))
    solutions = [programs.correct_solution(row) for row in problems]
    assert all(map(programs.is_correct, problems, solutions))
    solutions = [programs.demonstration(row, rng) for row in problems] + solutions[:5]
    rows = [*problems, *problems[:5]]
    outcomes = LocalExecutor(True).run(
        [
            Program(row["prompt"] + text, UnitTests.from_json(row["answer"]))
            for row, text in zip(rows, solutions, strict=True)
        ]
    )
    assert [outcome.verdict == "passed" for outcome in outcomes] == list(map(programs.is_correct, rows, solutions))
    assert not programs.is_correct(problems[0], "    x = eval(x)\n    return x")
    assert not programs.is_correct(problems[0], "")
