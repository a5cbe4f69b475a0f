"""
Bad input to a run: one message on stderr that names what is wrong and the cure, exit code 1, no traceback.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import REPOSITORY, STUDENT, make_policy, make_tokenizer


RECIPE = str(REPOSITORY / "examples" / "recipes" / "demo.yaml")
SMALL = (
    *("--num_train_problems", "6", "--num_test_problems", "4", "--shard_size", "3", "--eval_k", "1"),
    *("--num_solutions", "4", "--num_kept", "2", "--num_completions", "4"),
    *("--critic.num_train_epochs", "1", "--policy.max_steps", "1", "--values", "critic"),
    *("--allow_unfit_critic", "true"),  # one held-out problem
)


@pytest.fixture(scope="session")
def run(commands, tmp_path_factory):
    """Runs the recipe in a folder; exit code and what was written."""
    log = tmp_path_factory.mktemp("log") / "log"

    def run(folder, *arguments, command="run", **kwargs):
        return commands.run(command, RECIPE, *SMALL, "--output_dir", folder, *arguments, output=log, **kwargs)

    return run


def complaint(outcome: tuple[int, str]) -> str:
    """What was said, if it was said well: one message, and how to learn more."""
    code, text = outcome
    assert code == 1, text[-2000:]
    assert "Traceback (most" not in text
    assert text.count("dapo-trl: ") == 1
    return text.partition("dapo-trl: ")[2]


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


GOOD = {"question": "1 + 2", "answer": "3"}
OTHER = {"question": "2 + 2", "answer": "4"}
MAKE = "def make(split, n, seed): return [{{'prompt': f'{{split}} {{i}}', 'answer': '1', {}}} for i in range(n)]"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("column.jsonl", lines({"a": 1, "answer": "2"}, {"a": 2, "answer": "3"}), "needs a column named 'question' or"),
        ("column.jsonl", lines({"question": "1"}, {"question": "2"}), "needs a column named 'answer' or"),
        ("empty.jsonl", "", "cannot be read: it is empty"),
        ("header.csv", "question,answer\n", "header.csv cannot be read: "),
        ("one.jsonl", lines(GOOD), "has no problem to evaluate on"),
        ("same.jsonl", lines(GOOD, GOOD), "all 1 test problems are also in training"),
        ("broken.jsonl", lines(GOOD) + '{"question"', "broken.jsonl cannot be read: JSON parse error"),
        ("broken.parquet", "PAR1", "broken.parquet cannot be read: "),
        (
            "answer.jsonl",
            lines(GOOD | {"answer": "???"}, OTHER | {"answer": "???"}),
            "'???': the gold answer cannot be",
        ),
        (
            "null.jsonl",
            lines(*[OTHER] * 4, GOOD | {"answer": None}, *[OTHER] * 4),
            "have no answer, the first is row 5.",
        ),
        ("null.jsonl", lines(GOOD | {"question": None}, OTHER), "1 of 1 rows have no question, the first is row 1."),
        ("blank.jsonl", lines(GOOD | {"question": " "}, OTHER), "1 of 1 rows have no question, the first is row 1."),
        (
            "numbers.jsonl",
            lines({"question": 7, "answer": 7}, {"question": 7, "answer": 7}),
            "`question` must hold text",
        ),
        ("long.jsonl", lines(GOOD | {"question": "1 + " * 900}, OTHER), "leaves no room in the model's context of 64"),
        ("broken.py", "def make(:", "broken.py cannot be imported: SyntaxError"),
        ("none.py", "", "none.py has no function 'make'"),
        ("fails.py", "def make(split, n, seed): return [][n]", "fails.py:make failed: IndexError"),
        ("column.py", "def make(split, n, seed): return [{'q': '1'}] * n", "needs a column named 'prompt'"),
        ("empty.py", "def make(split, n, seed): return []", "has no problem to train on"),
        ("null.py", "def make(split, n, seed): return None", "null.py:make must return a list of rows, each a dict"),
        ("text.py", "def make(split, n, seed): return ['1']", "must return a list of rows, each a dict, not ['1']."),
        ("long.py", MAKE.format("'prompt': '1 + ' * (split == 'test') * 90 + split"), "prompt of problem 0, '1 + "),
        ("same.py", MAKE.format("'problem_id': 'x'"), "Rows 0 and 1 of the problems have the same `problem_id` 'x'"),
        ("taken.py", MAKE.format("'reward': 1.0"), "The problems have columns 'reward', which sampling adds"),
    ],
)
def test_problems(tmp_path, run, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    dataset = f"{path}:make" if path.suffix == ".py" else str(path)
    # a template of its own: the student's words, and braces that are no field
    template = ("--prompt_template", "{question} \\boxed{}\n")
    assert message in complaint(run(tmp_path / "run", "--dataset_name", dataset, *template))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_name_or_path", "nobody/nothing"], "`model_name_or_path` is 'nobody/nothing', which cannot be load"),
        (["--dataset_name", "nowhere.jsonl"], "`dataset_name` is 'nowhere.jsonl', but there is no such file"),
        (["--dataset_name", "x.txt"], "'x.txt', which is none of the files that can be read: .json, .jsonl, .parquet"),
        (["--dataset_name", "make.py"], "`dataset_name` is 'make.py'. Name the function that makes the problems: mak"),
        (
            ["--use_peft", "--lora_target_modules", "nope"],
            "student': `peft_config` does not fit `model`: Target",
        ),
        (["--critic.push_to_hub", "true"], "`critic.push_to_hub`: cannot log in to the Hub. Call `hf auth login`"),
    ],
)
def test_settings(tmp_path, run, arguments, message):
    """What the command line alone does not tell (the rest: `test_cli.py`)."""
    code, text = run(tmp_path / "run", *arguments)
    assert message in text
    assert code == (1 if "nobody" in message else 2)
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["/proc/nowhere", "{}/file/run"])
@pytest.mark.parametrize("command", ["run", "sample"])
def test_a_folder_that_cannot_be_written_to(tmp_path, run, place, command):
    """Found out before anything is computed."""
    (tmp_path / "file").write_text("")
    folder = place.format(tmp_path)
    outcome = run(folder, command=command)
    assert complaint(outcome).startswith(f"{folder} cannot be written to")
    assert "Choose another `output_dir`" in outcome[1]
    assert "Evaluating" not in outcome[1]
    assert "Loading" not in outcome[1]


def test_no_signal(tmp_path, run):
    """A model that knows nothing solves nothing; sampling is kept, nothing is trained."""
    make_policy(max_position_embeddings=256).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    few = ("--model_name_or_path", str(tmp_path / "model"), "--max_new_tokens", "4")
    message = complaint(run(tmp_path / "run", *few))
    assert message.startswith("No problem carries signal")
    assert "Use more or easier problems, a stronger model" in message
    counts = json.loads((tmp_path / "run" / "sampled" / "manifest.json").read_text())["counts"]
    assert counts["problems_all_wrong"] == 6
    assert not (tmp_path / "run" / "policy").exists()
    code, text = run(tmp_path / "run", *few, command="sample")
    assert code == 0
    assert "No problem has right and wrong solutions: there is nothing to learn" in text


@pytest.mark.parametrize(
    ("shard_size", "num_solutions", "reason"),
    [("1", "4", "Only one problem has right and wrong solutions"), ("6", "8", "`num_problems_with_signal` is 1")],
)
def test_one_problem_with_signal(tmp_path, run, shard_size, num_solutions, reason):
    """
    It cannot both train a critic and measure it, also if its shard has more of them; said before its completions are
    drawn.
    """
    sizes = ("--shard_size", shard_size, "--num_solutions", num_solutions)
    message = complaint(run(tmp_path / "run", "--num_problems_with_signal", "1", *sizes))
    assert message.startswith(f"{reason}. A critic needs two")
    assert "`values: monte_carlo`" in message
    assert not (tmp_path / "run" / "values").exists()


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json"])
def test_a_folder_without_all_of_a_model(tmp_path, run, missing):
    folder = Path(shutil.copytree(STUDENT, tmp_path / "model"))
    (folder / missing).unlink()
    message = complaint(run(tmp_path / "run", "--model_name_or_path", folder))
    assert message.startswith(f"`model_name_or_path` is '{folder}', which cannot be loaded (Auto")


# ---- What was written before ----


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run(folder)[0] == 0
    return folder


@pytest.mark.parametrize(
    ("damaged", "cure"),
    [
        ("sampled/manifest.json", "Delete it, and go on with the settings of this folder"),
        ("sampled/shards/00001.json", "Delete it to compute the shard again"),
        ("sampled/shards/00001-sampled.parquet", "Delete {}/sampled/shards/00001.json to compute the shard again"),
        ("values/shards/00000-solutions.parquet", "Delete {}/values/shards/00000.json to compute the shard again"),
        ("before.json", "Delete it to do this step again"),
        ("critic/stage.json", "Delete it to do this step again"),
        ("data/scored.json", "Delete it to score the rows again"),
        ("data/states_critic.parquet", "Delete {}/data/scored.json to score the rows again"),
        ("policy/accuracy.json", "Delete it to do this step again"),
    ],
)
def test_damaged_files(tmp_path, run, trained, damaged, cure):
    """Cut in the middle: named, with a cure; which helps, at the price of that piece of work alone."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    path = folder / damaged
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if damaged == "sampled/shards/00001-sampled.parquet":  # read only where there is work left
        shutil.rmtree(folder / "values")
    message = complaint(run(folder))
    assert f"{path} is damaged" in message
    assert cure.format(folder) in message
    told = message.partition("Delete ")[2].split()[0]
    (path if told.startswith("it") else Path(told)).unlink()
    assert run(folder)[0] == 0
    assert json.loads((folder / "results.json").read_text())["before"]["num_problems"] == 4


def test_a_damaged_file_that_is_json(tmp_path, run, trained):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    (folder / "before.json").write_text("[]")
    assert "before.json is damaged: it does not hold 'config', 'results'" in complaint(run(folder))


# ---- A full disk ----


@pytest.mark.parametrize(("size", "last"), [(3_000, "before.json"), (300_000, "values")])
def test_a_file_that_cannot_be_written(tmp_path, run, size, last):
    """At the first shard, and at the first model; with room again, the same command goes on."""
    folder = tmp_path / "run"
    assert "File too large" in complaint(run(folder, file_limit=size))
    assert not [path for path in folder.rglob("*.tmp") if "data" not in path.parts]
    assert (folder / last).exists()
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*/shards/*.json")}
    assert run(folder)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_a_full_disk(tmp_path, run):
    """A real one, where the tests may mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        message = complaint(run(disk / "run"))
        files = [path.name for path in disk.rglob("*")]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert "No space left on device" in message
    assert not [name for name in files if name.endswith(".tmp")]
