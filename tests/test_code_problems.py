"""
Programming problems from files in well-known formats, and the commands that use them.
"""

import json

import pytest
from datasets import Dataset

from conftest import REPOSITORY, make_policy, make_tokenizer
from dapo_trl.cli import main
from dapo_trl.code_problems import read_code_problems
from dapo_trl.evaluation import evaluate_policy
from dapo_trl.execution import UnitTests
from dapo_trl.problems import load_problems, load_test_problems
from dapo_trl.recipe_arguments import RecipeArguments
from dapo_trl.settings import SettingsError


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def double(x):\n",
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to double a number.",
    "code": "...",
    "test_list": ["assert double(2) == 4", "assert double(3) == 6", "assert double(4) == 8", "assert double(5) == 10"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
APPS = {
    "problem_id": 7,
    "question": "Add two numbers.",
    "starter_code": "",
    "input_output": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]}),
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_questions():
    (row,) = read_code_problems(Dataset.from_list([HUMANEVAL]), "file")
    assert (row["question"], row["problem_id"]) == (HUMANEVAL["prompt"], "HumanEval/0")
    (row,) = read_code_problems(Dataset.from_list([MBPP]), "file")
    shown = "\n".join(MBPP["test_list"][:3])
    assert row["question"] == f"{MBPP['text']}\nYour code should pass these tests:\n\n{shown}\n"
    assert UnitTests.from_json(row["answer"]).test == "\n".join(MBPP["test_list"])
    (row,) = read_code_problems(Dataset.from_list([APPS]), "file")
    assert (row["question"], row["problem_id"]) == ("Add two numbers.\n", "7")
    started = APPS | {
        "starter_code": "def add(a, b):\n",
        "input_output": json.dumps({"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}),
    }
    (row,) = read_code_problems(Dataset.from_list([started]), "file")
    assert row["question"] == "Add two numbers.\n\nBegin with:\n\ndef add(a, b):\n\n"
    own = Dataset.from_list([{"question": "x", "answer": "y"}])
    assert read_code_problems(own, "file") is own


def test_rows_without_tests_are_named(tmp_path, tokenizer):
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (MBPP, MBPP | {"test_list": []})))
    with pytest.raises(ValueError, match=r"mbpp.jsonl: row 2: Unit tests need one of"):
        load_test_problems(str(path), tokenizer, verifier="code")
    path.write_text(json.dumps({"question": "Double.", "answer": "72"}) + "\n")
    with pytest.raises(ValueError, match=r"`answer\[0\]`: '72' are no unit tests"):
        load_test_problems(str(path), tokenizer, verifier="code")


def test_files_of_humaneval(tmp_path, tokenizer, data_dir):
    """Gzipped, as it comes; all problems to evaluate on; or split for training too."""
    path = str(data_dir / "HumanEval.jsonl.gz")
    problems = load_test_problems(path, tokenizer, verifier="code")
    assert len(problems) == 164 and set(problems.column_names) == {"prompt", "answer", "problem_id"}
    assert problems[0]["problem_id"] == "HumanEval/0" and problems[0]["prompt"].startswith("from typing import List")
    parts = load_problems(path, tokenizer, num_test=50, verifier="code")
    assert (len(parts["train"]), len(parts["test"])) == (114, 50)


def test_splits_of_test_problems(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match=r"cannot be read|no problem to evaluate on"):
        load_test_problems(str(path), tokenizer)
    with pytest.raises(SettingsError, match="there is no such file"):
        load_test_problems(str(tmp_path / "nowhere.jsonl"), tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"executor": {"cpu": 1.0}}, "`executor` is about `verifier=\"code\"`, not 'math'"),
        ({"verifier": "tests"}, "`verifier` must be 'math' or 'code', got 'tests'"),
        ({"verifier": "code", "executor": {"cpus": 1}}, "`executor` has no entry 'cpus'; did you mean 'cpu'"),
        ({"verifier": "code", "step_separator": ""}, "`separator` must be a text that is not empty"),
        ({"eval_pass_k": [8]}, "`eval_pass_k` must be from 1 to `eval_k`, which is 4, got 8"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        RecipeArguments(**settings)


def test_settings_of_code():
    arguments = RecipeArguments(verifier="code", step_separator="<statements>", executor={"cpu": "2"})
    assert arguments.prompt_template == "{question}" and arguments.executor == {"cpu": 2.0}
    assert arguments.rollout_config(0).separator == "<statements>"
    assert RecipeArguments(step_separator="\\n\\n").rollout_config(0).separator == "\n\n"
    assert RecipeArguments().rollout_config(0).separator == "\n"
    assert RecipeArguments().prompt_template.startswith("Question: {question}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_policy(max_position_embeddings=2048).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def recipe(folder, model, **settings):
    given = {"output_dir": str(folder / "run"), "model_name_or_path": str(model), "verifier": "code"} | settings
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(given))
    return str(path)


def test_programs_are_not_run_unless_allowed(tmp_path, model, monkeypatch, capsys):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    path = tmp_path / "humaneval.jsonl"
    path.write_text(json.dumps(HUMANEVAL) + "\n")
    assert main(["eval", recipe(tmp_path, model, eval_dataset_name=str(path))]) == 2
    assert "`verifier: code`: This would run code that a model wrote" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_executor_that_does_not_work_is_said_at_once(tmp_path, model, capsys):
    given = {"dataset_name": f"{REPOSITORY / 'examples/student/programs.py'}:make_problems", "allow_execution": True}
    given |= {"executor": {"python": "/nowhere/python"}, "num_train_problems": 2, "num_test_problems": 2}
    assert main(["sample", recipe(tmp_path, model, **given)]) == 2
    assert "`executor`: `isolation` 'auto' does not work here" in capsys.readouterr().err


def test_eval_of_files(tmp_path, model, data_dir, capsys):
    """`dapo-trl eval` on HumanEval's own file and on one in MBPP's format, without problems to train on."""
    files = {"humaneval": data_dir / "HumanEval.jsonl.gz", "mbpp": tmp_path / "mbpp.jsonl"}
    files["mbpp"].write_text("".join(json.dumps(MBPP | {"task_id": i}) + "\n" for i in range(3)))
    for name, file in files.items():
        folder = tmp_path / name
        folder.mkdir()
        given = {"allow_execution": True, "max_new_tokens": 2, "eval_k": 3, "eval_pass_k": [2]}
        assert main(["eval", recipe(folder, model, eval_dataset_name=str(file), **given)]) == 0, capsys.readouterr().err
        (results,) = (folder / "run" / "evaluations").glob("*.json")
        found = json.loads(results.read_text())
        found = found.get("results", found)
        assert found["num_problems"] == {"humaneval": 164, "mbpp": 3}[name] and found["not_judged"] == 0
        assert set(found["pass_at"]) == {"2"}
        text = capsys.readouterr().out
        assert "pass@2" in text and "pass@3" in text
    assert main(["run", recipe(tmp_path, model, eval_dataset_name=str(files["mbpp"]), allow_execution=True)]) == 2
    assert "`dataset_name` is missing" in capsys.readouterr().err


def test_pass_at_smaller_k_is_unbiased():
    """By hand: 1 and 3 of 4 samples right: pass@2 is the mean of 1 - C(3,2)/C(4,2) = 1/2 and 1 - 0 = 1."""

    class Engine:
        tokenizer = make_tokenizer()

        def generate(self, prefixes, seeds, sampling, on_completion=None, limits=None):
            from dapo_trl.engines import Completion

            return [[Completion((), str(number), "stop") for number in range(len(group))] for group in seeds]

    def reward(prompts, completions, limit, **_):
        return [float(int(text) < number) for text, number in zip(completions, limit, strict=True)]

    rows = Dataset.from_list([{"prompt": "1", "limit": 1}, {"prompt": "2", "limit": 3}])
    found = evaluate_policy(rows, Engine(), reward, k=4, pass_k=[1, 2])
    assert found.pass_at["2"].mean == pytest.approx(0.75) and found.pass_at["1"].mean == pytest.approx(
        found.mean_at_k.mean
    )
    with pytest.raises(ValueError, match="`pass_k` must be from 1 to `k`, which is 4, got 5"):
        evaluate_policy(rows, Engine(), reward, k=4, pass_k=[5])
