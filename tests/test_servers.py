"""
`dapo-trl` with servers that are killed, come back, stay away, or answer nonsense: whatever is done is kept.

`benchmarks/servers.py` does it on a larger scale, and compares the values with those of the model itself.
"""

import json
import re
import threading
import time

import pytest
from transformers import AutoTokenizer

from conftest import REPOSITORY, STUDENT
from http_servers import Behaviour, FakeServer, Student
from test_recipe import ZERO2, ranks
from written import done_work, rows


RECIPE = str(REPOSITORY / "examples" / "recipes" / "demo.yaml")
SMALL = (
    *("--engine", "openai", "--num_train_problems", "6", "--num_test_problems", "2", "--shard_size", "2"),
    *("--num_solutions", "4", "--num_kept", "2", "--num_completions", "4"),
)
IMPATIENT = ("--server.timeout", "1", "--server.max_retries", "0")
WORDS = ["4 - 7 = 7\n", "7 + 8 = 5\n", "5 max 2 = 5\n", "#### 4\n", "#### 5\n"]


@pytest.fixture(scope="module")
def student_tokenizer():
    return AutoTokenizer.from_pretrained(STUDENT)


@pytest.fixture
def server(student_tokenizer):
    server = FakeServer(Behaviour(models=None), tokenizer=student_tokenizer, words=WORDS)
    yield server
    server.stop()


@pytest.fixture
def student(tmp_path):
    pytest.importorskip("fastapi")
    student = Student(tmp_path / "serve")
    yield student
    student.kill()


def counts(folder, stage):
    return json.loads((folder / stage / "manifest.json").read_text())["counts"]


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def shards(folder):
    return len(list(folder.glob("*/shards/*.json")))


def test_transformers_serve_killed(commands, tmp_path, student):
    """
    Killed and started again, a run does not notice. Killed for good, it ends with an error; the same command goes on
    from there when the server is back. Nothing is lost, nothing done twice, and the numbers add up.
    """
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = ("values", RECIPE, *SMALL, "--server_urls", student.url, "--max_concurrency", "4")
    arguments += ("--server.model", "examples/student", "--output_dir", folder, "--server.max_downtime")
    student.wait()
    pid = commands.start(*arguments, "60", output=log)
    wait_until(lambda: shards(folder) >= 1)
    student.kill()
    student.start()
    student.wait()
    wait_until(lambda: shards(folder) >= 2)
    commands.kill(pid)
    assert "Cannot reach" in log.read_text()
    done = done_work(folder)
    pid = commands.start(*arguments, "0.5", output=log)
    wait_until(lambda: shards(folder) >= 4)
    student.kill()
    assert commands.wait(pid) == 1
    text = log.read_text()
    assert f"dapo-trl: Gave up on {student.url} after" in text
    assert "Check `base_urls` (`server_urls` of a recipe), and that the server runs." in text
    assert "Traceback" not in text
    assert f"{shards(folder) - 3} of 3 shards are done, and need not be done again" in text
    assert done.items() <= done_work(folder).items()
    done = done_work(folder)
    student.start()
    code, text = commands.run(*arguments, "60", output=log)
    assert code == 0, text[-3000:]
    assert done.items() <= done_work(folder).items()
    sampled, values = counts(folder, "sampled"), counts(folder, "values")
    assert sampled["problems"] == 6
    assert sampled["solutions"] == sampled["ids_rebuilt"] == 24
    assert values["problems_kept"] == sampled["problems_with_signal"] > 0
    assert values["ids_rebuilt"] == values["completions"]
    tables = rows(folder)
    assert len({row["problem_id"] for row in tables["sampled"]}) == 6
    assert all(min(row["mc_rollouts"][:-1]) >= 4 for row in tables["solutions"])


FAULTS = {
    "errors": ((500, {"error": "out of memory"}), "after 1 attempts: status 500, .*out of memory"),
    "garbage": ((200, b"<html>welcome</html>"), "not a JSON object, but '<html>welcome</html>'"),
    "silence": (None, "no answer within 1 seconds. Raise `timeout`"),
}


@pytest.mark.parametrize(("answer", "message"), FAULTS.values(), ids=FAULTS)
def test_faulty_server(commands, tmp_path, server, answer, message):
    """From the third shard on, and then from the first request on: an error with a cure, and what is done is kept."""
    folder, log, done = tmp_path / "run", tmp_path / "log", {}

    def fail(body, number):
        if shards(folder) < 2:
            return None
        if answer is None:
            time.sleep(2)
        return answer

    server.answer = fail
    arguments = ("sample", RECIPE, *SMALL, *IMPATIENT, "--server_urls", server.url, "--output_dir", folder)
    arguments += ("--max_concurrency", "1")  # or the third shard may have its answers before the others are stored
    for _ in range(2):
        code, text = commands.run(*arguments, output=log)
        assert code == 1
        assert re.search(f"(?s)dapo-trl: .*{server.url}/v1 .*{message}", text), text
        assert text.count("dapo-trl: ") == 1
        assert "Traceback" not in text
        assert shards(folder) == 2
        assert "2 of 3 shards are done" in text
        assert done.items() <= done_work(folder).items()
        done = done_work(folder)
    server.answer = lambda body, number: None
    code, text = commands.run(*arguments, output=log)
    assert code == 0, text[-3000:]
    assert done.items() <= done_work(folder).items()
    assert counts(folder, "sampled")["solutions"] == 24


def test_weights_in_parts(commands, tmp_path, server):
    """
    Two processes under ZeRO-3, which sampling in process is refused with: servers sample, and the trained policy is
    evaluated by one process, which loads it whole.
    """
    folder = tmp_path / "run"
    zero3 = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}
    arguments = ("run", RECIPE, *SMALL, "--server_urls", server.url, "--eval_k", "1", "--values", "critic")
    arguments += ("--num_train_problems", "12", "--num_solutions", "12", "--critic.num_train_epochs", "1")
    arguments += ("--policy.max_steps", "1", "--policy.min_advantage_gap", "0", "--allow_unfit_critic", "true")
    codes, texts = ranks(commands, folder, *arguments, logs=tmp_path, **ZERO2 | zero3)
    assert codes == [0, 0], texts
    assert json.loads((folder / "policy" / "accuracy.json").read_text())["config"]["engine"] == "transformers"


def test_an_interrupt(commands, tmp_path, server):
    """Ctrl-C ends a run at once, though two calls wait for a server that does not answer."""
    folder, log = tmp_path / "run", tmp_path / "log"
    silent = threading.Event()

    def answer(body, number):
        if shards(folder) >= 2:
            silent.set()
            time.sleep(5)

    server.answer = answer
    many = ("--num_train_problems", "40")  # twenty shards: some are left when two are there
    arguments = ("sample", RECIPE, *SMALL, *many, "--server_urls", server.url, "--output_dir", folder)
    pid = commands.start(*arguments, output=log)
    assert silent.wait(60)
    begin = time.monotonic()
    commands.interrupt(pid)
    assert commands.wait(pid) == 130
    assert time.monotonic() - begin < 3
    assert "stopped. The same command goes on where it was." in log.read_text()
    assert shards(folder) >= 2
