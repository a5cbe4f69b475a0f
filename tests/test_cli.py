"""
`cli.py`: what is typed wrong is said at once, in one message; settings come from the recipe and the command line.
"""

import subprocess
import sys
import time

import pytest

from conftest import REPOSITORY
from dapo_trl._version import __version__
from dapo_trl.cli import COMMANDS, main
from dapo_trl.recipe_parsing import parse_recipe


RECIPE = str(REPOSITORY / "examples" / "recipes" / "demo.yaml")


def write(folder, text, name="recipe.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["env", "--help"], ["--version"], []])
def test_help_answers_at_once(arguments):
    """Within a second (the best of three on a busy machine), and without importing torch."""
    code = (
        "import sys, atexit; from dapo_trl.cli import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules); sys.exit(code)"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=REPOSITORY)
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1
    assert done.returncode == (0 if arguments else 2), done.stderr
    assert done.stdout


def test_help_says_all(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in COMMANDS)
    assert main(["values", "--help"]) == 0
    text = capsys.readouterr().out
    for name in ("--num_solutions (32)", "--output_dir", "--critic.learning_rate", "--dry-run", "ModelConfig"):
        assert name in text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_versions_for_bug_reports(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert f"- dapo-trl: {__version__}" in text
    for name in ("Python", "trl", "transformers", "torch", "vllm", "GPUs"):
        assert f"- {name}: " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum", RECIPE], "There is no command 'rum'; did you mean 'run'?"),
        (["xyz"], "There is no command 'xyz'. There are: run, sample,"),
        (["run"], "Name a recipe: dapo-trl run recipe.yaml"),
        (["run", "--seed", "1"], "Name a recipe"),
        (["run", "nowhere.yaml"], "There is no recipe 'nowhere.yaml'"),
        (["run", str(REPOSITORY)], "There is no recipe"),
        (["run", RECIPE, "stray"], "'stray' is no setting"),
        (["run", RECIPE, "--num_trian_problems", "3"], "no setting '--num_trian_problems'; did you mean 'num_train_pr"),
        (["run", RECIPE, "--num_train", "3"], "There is no setting '--num_train'; did you mean 'num_train_problems'?"),
        (["run", RECIPE, "--polcy.beta", "1"], "There is no setting '--polcy.beta'; did you mean"),
        (["run", RECIPE, "--seed"], "--seed: expected one argument"),
        (["run", RECIPE, "--seed", "one"], "--seed: invalid int value: 'one'"),
        (["run", RECIPE, "--values", "guesses"], "--values: invalid choice: 'guesses'"),
        (["run", RECIPE, "--num_solutions", "0"], "`num_solutions` must be at least 2, got 0. Right and wrong"),
        (["run", RECIPE, "--num_solutions", "1"], "`num_solutions` must be at least 2, got 1"),
        (["run", RECIPE, "--num_kept", "9"], "Cannot keep 9 of 8 solutions. Lower `num_kept`"),
        (["run", RECIPE, "--temperature", "0"], "`temperature` must be positive: greedy solutions"),
        (["run", RECIPE, "--seed", "-1"], "`seed` must be at least 0, got -1"),
        (["run", RECIPE, "--shard_size", "0"], "`shard_size` must be at least 1, got 0"),
        (["run", RECIPE, "--num_problems_with_signal", "0"], "`num_problems_with_signal` must be at least 1, got 0"),
        (["run", RECIPE, "--num_train_problems", "0"], "`num_train_problems` must be at least 1, got 0"),
        (["run", RECIPE, "--policy.beta", "0"], "`policy`: `beta` must be positive and finite, got 0.0"),
        (["run", RECIPE, "--policy.eval_strategy", "steps"], "`policy`: `eval_strategy` needs rows to evaluate on"),
        (["run", RECIPE, "--critic.per_device_train_batch_size", "0"], "`critic`: `per_device_train_batch_size` must"),
        (["run", RECIPE, "--policy.gradient_accumulation_steps", "0"], "`policy`: `gradient_accumulation_steps` mus"),
        (["run", RECIPE, "--critic.optim", "sgdd"], "`critic`: sgdd is not a valid OptimizerNames"),
        (["run", RECIPE, "--critic.seed", "-1"], "`critic`: `seed` must be from 0 to 4294967295, got -1"),
        (
            ["run", RECIPE, "--critic.seed", "4294967295", "--num_critics", "2"],
            "`critic`: `seed` must be from 0 to 4293967292, got 4294967295",
        ),
        (["run", RECIPE, "--num_critics", "0"], "`num_critics` must be at least 1, got 0"),
        (["run", RECIPE, "--report_to", "foo"], "`critic`: `report_to` is ['foo']: foo is not supported, only"),
        (["run", RECIPE, "--model_name_or_path", "./nowhere"], "`model_name_or_path` is './nowhere', but there is no"),
        (["run", RECIPE, "--model_name_or_path", "./docs"], "`model_name_or_path` is './docs', a folder without weig"),
        (["run", RECIPE, "--critic_model_name_or_path", "/nowhere"], "`critic_model_name_or_path` is '/nowhere', but"),
        (["critic", RECIPE, "--values", "monte_carlo"], "`dapo-trl critic` has nothing to do: with `values: monte_c"),
        (["score", RECIPE, "--values=monte_carlo"], "`dapo-trl score` has nothing to do"),
        (["run", RECIPE, "--policy.bta", "1"], "`policy` has no entry 'bta'; did you mean 'beta'?"),
        (["run", RECIPE, "--critic.beta", "1"], "`critic` has no entry 'beta'"),
        (["run", RECIPE, "--policy.beta", "high"], "`policy.beta` must be a number, got 'high'"),
        (["run", RECIPE, "--policy.max_steps", "1.5"], "`policy.max_steps` must be a whole number, got 1.5"),
        (["run", RECIPE, "--policy.beta"], "--policy.beta needs a value"),
        (["run", RECIPE, "--policy", "[1]"], "--policy must be a JSON object"),
        (["run", RECIPE, "--policy.output_dir", "x"], "`policy.output_dir` is a folder of `output_dir`"),
    ],
)
def test_wrong_command_lines(capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(REPOSITORY)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("dapo-trl: ")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2", "is no YAML: while parsing a flow sequence"),
        ("model_name_or_path: \tx", "is no YAML"),
        ("- a\n- b", "must hold settings, `name: value` a line, but holds a list"),
        ("# nothing", "but holds nothing"),
        ("modle_name_or_path: x", "no setting 'modle_name_or_path'; did you mean 'model_name_or_path'?"),
        ("12: x", "There is no setting 12"),
        ("num_solutions: many", "`num_solutions` must be a whole number, got 'many'"),
        ("num_solutions: 2.5", "`num_solutions` must be a whole number, got 2.5"),
        ("num_solutions: [2]", "`num_solutions` must be a whole number, got [2]"),
        ("num_solutions:", "`num_solutions` must be a whole number, got None"),
        ("trust_remote_code: 1", "`trust_remote_code` must be true or false, got 1"),
        ("server_urls: http://x", "`server_urls` must be a list, got 'http://x'"),
        ("critic: 3", "`critic` must be a section, got 3"),
        ("critic:\n  learning_rte: 1e-4", "`critic` has no entry 'learning_rte'; did you mean 'learning_rate'?"),
        ("policy:\n  beta: strong", "`policy.beta` must be a number, got 'strong'"),
        (
            "policy:\n  gradient_checkpointing: 3",
            "`policy.gradient_checkpointing` must be true or false, got 3",
        ),
        ("server:\n  timeout_: 3", "`server` has no entry 'timeout_'; did you mean 'timeout'?"),
        ("server:\n  timeout: 3", "`server` is about `engine=\"openai\"`, not 'transformers'"),
        ("seed: 1\nvalues: both\nseed: 1", "recipe.yaml, line 3: 'seed' is set already, in line 1"),
        ("critic:\n  seed: 1\n  seed: 2", "recipe.yaml, line 3: 'seed' is set already, in line 2"),
        ("env: 3", "`env` must hold variables"),
        ("iterations: 0", "`iterations` must be at least 1"),
    ],
)
def test_wrong_recipes(tmp_path, capsys, text, message):
    assert main(["run", write(tmp_path, text)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_recipe_that_is_no_text(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert main(["run", str(path)]) == 2
    assert "is no YAML" in capsys.readouterr().err


def test_command_line_goes_first(tmp_path):
    """Over the recipe, also in sections, of which the other entries stay; YAML's 1e-4, which is text, is a number."""
    path = write(tmp_path, "seed: 3\nnum_solutions: 8\nuse_peft: true\ncritic: {learning_rate: 1e-4, max_steps: 7}\n")
    recipe, model = parse_recipe(path, ["--seed", "5", "--num-kept=2"])
    assert (recipe.seed, recipe.num_solutions, recipe.num_kept, model.use_peft) == (5, 8, 2, True)
    assert recipe.critic == {"learning_rate": 1e-4, "max_steps": 7}
    assert recipe.policy == {}
    sections = ["--policy.beta", "0.1", "--critic.learning_rate=1e-3", "--critic", '{"warmup_steps": 4}']
    sections += ["--policy.gradient_checkpointing", "False", "--policy.lr_scheduler_type", "cosine"]
    recipe, _ = parse_recipe(path, sections)
    assert recipe.critic == {"learning_rate": 1e-3, "max_steps": 7, "warmup_steps": 4}
    assert recipe.policy == {"beta": 0.1, "gradient_checkpointing": False, "lr_scheduler_type": "cosine"}


def test_an_empty_section(tmp_path):
    assert parse_recipe(write(tmp_path, "critic:\npolicy: {}\n"))[0].critic == {}


def test_paths_are_relative_to_the_recipe(tmp_path, monkeypatch):
    """Those that begin with a dot, the run's folder too; names on the Hub and the command line's stay as they are."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "model").mkdir()
    write(tmp_path, "", "problems.py")
    text = "model_name_or_path: ../model\ndataset_name: ../problems.py:make\ncritic_model_name_or_path: org/critic\n"
    text += "output_dir: ./runs/mine\n"
    path = write(tmp_path / "recipes", text)
    recipe, model = parse_recipe(path)
    assert model.model_name_or_path == str(tmp_path / "model")
    assert recipe.dataset_name == f"{tmp_path / 'problems.py'}:make"
    assert recipe.critic_model_name_or_path == "org/critic"
    assert recipe.output_dir == str(tmp_path / "recipes" / "runs" / "mine")
    assert parse_recipe(path, ["--output_dir", "./runs"])[0].output_dir == "./runs"
    assert parse_recipe(write(tmp_path, "output_dir: runs/mine", "plain.yaml"))[0].output_dir == "runs/mine"
    monkeypatch.chdir(tmp_path)
    assert parse_recipe("recipes/recipe.yaml")[1].model_name_or_path == "model"
    assert parse_recipe(path, ["--model_name_or_path", "../other"])[1].model_name_or_path == "../other"
    (tmp_path / "model").rmdir()
    with pytest.raises(ValueError, match=r"`model_name_or_path` is '.*model', but there is no such file or folder"):
        parse_recipe("recipes/recipe.yaml")
    assert parse_recipe(path, ["--model_name_or_path", "other"])[1].model_name_or_path == "other"


def test_environment_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("DAPO_TRL_TEST", "old")
    parse_recipe(write(tmp_path, "env: {DAPO_TRL_TEST: 3}\n"))
    import os

    assert os.environ["DAPO_TRL_TEST"] == "3"


def test_environment_is_set_before_anything_reads_it(tmp_path):
    """Such as `HF_HOME`, which libraries read once, when they are imported."""
    path = write(tmp_path, f"env: {{HF_HOME: {tmp_path / 'cache'}}}\nmodel_name_or_path: {REPOSITORY}/nowhere\n")
    code = (
        "import sys; from dapo_trl.cli import main; code = main(sys.argv[1:]);"
        "from huggingface_hub.constants import HF_HOME; from datasets.config import HF_CACHE_HOME;"
        "print(HF_HOME, HF_CACHE_HOME); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, "run", path], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stdout.split() == [str(tmp_path / "cache")] * 2


def test_reports_that_nobody_receives(capsys, monkeypatch):
    """A service without a login."""
    pytest.importorskip("wandb")
    for name in ("WANDB_DISABLED", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    import wandb

    monkeypatch.setattr(type(wandb.api), "api_key", None)
    arguments = ["run", RECIPE, "--dry-run", "--report_to", "wandb"]
    assert main(arguments) == 2
    assert "`report_to` is 'wandb', but nobody is logged in" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(arguments) == 0


def test_traceback_on_request(tmp_path, capsys, monkeypatch):
    """Errors in the data are one message, unless the traceback is asked for; what nobody expected always has one."""
    import dapo_trl.recipe

    (tmp_path / "bad.py").write_text("def make(split, n, seed):\n    return 1 / 0")
    arguments = ["run", RECIPE, "--dataset_name", f"{tmp_path / 'bad.py'}:make"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "bad.py:make failed: ZeroDivisionError" in error
    assert "DAPO_TRL_TRACEBACK" not in error  # what the library says itself needs no place in the code
    monkeypatch.setenv("DAPO_TRL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        main(arguments)
    with pytest.raises(ValueError, match="shard_size"):
        main(["run", RECIPE, "--shard_size", "0"])
    monkeypatch.delenv("DAPO_TRL_TRACEBACK")

    def fail(*args):
        raise error

    monkeypatch.setattr(dapo_trl.recipe, "Recipe", fail)
    error = KeyError("a mistake")
    with pytest.raises(KeyError) as caught:
        main(arguments)
    assert "Please report it" in caught.value.__notes__[0]
    error = RuntimeError("of another library")
    assert main(arguments) == 1
    assert "DAPO_TRL_TRACEBACK=1" in capsys.readouterr().err
    error = KeyboardInterrupt()
    assert main(arguments) == 130
    assert "goes on where it was" in capsys.readouterr().err
