"""
The reward of programs: what is taken for the program, what it is worth, and what cannot be judged.
"""

import logging
import time

import pytest
from datasets import Dataset

from dapo_trl.execution import ExecutionNotAllowedError, Outcome, UnitTests
from dapo_trl.verifiers import CodeVerifier, check_tests, code_reward, extract_code
from dapo_trl.verifiers.code import make_executor


PROMPT = (
    'from typing import List\n\n\ndef helper(x):\n    return x\n\n\ndef double(x: int) -> int:\n    """Twice x."""\n'
)
BEFORE = PROMPT.partition("\n\n\ndef double")[0]
CHECK = "def check(f):\n    assert f(2) == 4\n    assert f(5) == 10"
HUMANEVAL = UnitTests(entry_point="double", prompt=PROMPT, test=CHECK, check="check")
MBPP = UnitTests(test="assert double(2) == 4")
NAMED = UnitTests(entry_point="double", test="assert double(2) == 4")
SCRIPT = UnitTests(inputs=["2"], outputs=["4"])
RIGHT = "def double(x):\n    return 2 * x"

EXTRACTED = {
    "goes on from the prompt": ("    return 2 * x\n", HUMANEVAL, PROMPT + "    return 2 * x"),
    "goes on, then ends": ("    return 2 * x\n\nThis doubles it.\n", HUMANEVAL, PROMPT + "    return 2 * x"),
    "goes on, then more code": (
        "    return 2 * x\n\nprint(double(2))\n",
        HUMANEVAL,
        PROMPT + "    return 2 * x\n\nprint(double(2))",
    ),
    "the whole function": (RIGHT + "\n", HUMANEVAL, f"{BEFORE}\n\n\n{RIGHT}"),
    "fenced": (f"Sure:\n```python\n{RIGHT}\n```\nIt doubles.", HUMANEVAL, f"{BEFORE}\n\n\n{RIGHT}"),
    "fenced, without a language": (f"```\n{RIGHT}\n```", NAMED, RIGHT),
    "fenced, not closed": (f"```py\n{RIGHT}\n", NAMED, RIGHT),
    "fenced, indented fence": (f"1. So:\n   ```python\n{RIGHT}\n   ```", NAMED, RIGHT),
    "the block that defines it": (f"```python\n{RIGHT}\n```\nUse:\n```python\nprint(double(2))\n```", NAMED, RIGHT),
    "the last block": ("```python\nx = 1\n```\nBetter:\n```python\nprint(4)\n```", SCRIPT, "print(4)\n"),
    "not another language": (f"```bash\npip install x\n```\n```python\n{RIGHT}\n```", NAMED, RIGHT),
    "a fenced body": ("```python\n    return 2 * x\n```", HUMANEVAL, PROMPT + "    return 2 * x"),
    "amid prose": (f"Here you are:\n\n{RIGHT}\n\nIt doubles.", NAMED, RIGHT),
    "prose, then the whole function": (f"I think so.\n\n{RIGHT}\n", HUMANEVAL, f"{BEFORE}\n\n\n{RIGHT}"),
    "asserts name no function": (f"```python\n{RIGHT}\n```", MBPP, RIGHT),
    "a script": ("print(2 * int(input()))", SCRIPT, "print(2 * int(input()))"),
    "a method of Solution": (
        "class Solution:\n    def double(self, x):\n        return 2 * x",
        NAMED,
        "class Solution:\n    def double(self, x):\n        return 2 * x",
    ),
    "a lambda": ("double = lambda x: 2 * x", NAMED, "double = lambda x: 2 * x"),
    "prose only": ("I do not know.", NAMED, None),
    "a word only": ("No", SCRIPT, None),
    "nothing": ("", NAMED, None),
    "nothing to go on from": ("", HUMANEVAL, None),
    "too long to look at": (RIGHT + "\n#" * 100_000, NAMED, None),
    "null bytes": ("\0", NAMED, None),
    "nested beyond reason": ("(" * 5000, NAMED, None),
}


@pytest.mark.parametrize("name", EXTRACTED)
def test_extracted(name):
    completion, tests, expected = EXTRACTED[name]
    found = extract_code(completion, tests)
    assert (found and found.strip("\n")) == (expected and expected.strip("\n"))


REPEATED = ("@a\n" * 10_000, "import os\n" * 4000 + "import os as\n", "def f(\n" * 5000, "if x:\n" * 6000)


@pytest.mark.parametrize("text", REPEATED)
def test_repetition_takes_no_time(text):
    """What a policy that repeats itself writes, cut off: seconds at most, in this process."""
    start = time.process_time()
    for tests in (HUMANEVAL, NAMED):
        extract_code(text, tests)
    assert time.process_time() - start < 8


class Recorder:
    """An executor that runs nothing: the outcome of a program stands in its text."""

    def __init__(self):
        self.programs = []

    def run(self, programs, count_tests=False):
        self.programs += programs
        return [
            Outcome(verdict, "as it says", 0.5 if count_tests else float(verdict == "passed"))
            for program in programs
            for verdict in [program.source.rpartition("# ")[2]]
        ]


def completion(verdict: str) -> str:
    return f"def double(x): pass  # {verdict}"


@pytest.fixture
def verifier():
    return CodeVerifier(Recorder())


def test_rewards_by_outcome(verifier):
    verdicts = ["passed", "failed", "cpu", "memory", "output", "bad_tests", "setup"]
    rewards = verifier(None, [*map(completion, verdicts), "no"], answer=[NAMED.to_json()] * 8)
    assert rewards == [1.0, 0.0, 0.0, 0.0, 0.0, None, None, 0.0]
    assert verifier.counts == dict.fromkeys([*verdicts, "no_code"], 1)


def test_shares(verifier):
    verifier = CodeVerifier(Recorder(), is_fractional=True)
    assert verifier(None, [completion("failed"), completion("bad_tests"), "no"], [NAMED.to_json()] * 3) == [
        0.5,
        None,
        0.0,
    ]


def test_programs_are_run_once(verifier):
    texts = [completion("passed"), completion("failed"), completion("passed")]
    for _ in range(2):
        assert verifier(None, texts, [NAMED.to_json()] * 3) == [1.0, 0.0, 1.0]
    assert len(verifier.executor.programs) == 2
    assert verifier(None, texts[:1], [MBPP.to_json()]) == [1.0]  # other tests, another run
    assert len(verifier.executor.programs) == 3
    for _ in range(2):
        assert verifier(None, [completion("setup")], [NAMED.to_json()]) == [None]
    assert len(verifier.executor.programs) == 5  # what could not be run is tried again


def test_what_is_not_judged_is_said_once(verifier, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            verifier(None, [completion("passed"), completion("bad_tests")], [NAMED.to_json()] * 2)
    assert caplog.text.count("code_reward returns None for 1 of 2 completions, the first at index 1") == 1
    assert "the tests do not work, whatever the program does; correct them or drop the row" in caplog.text


def test_columns_of_data_sets(verifier):
    """As TRL passes them: HumanEval's prompt is the code to go on from; MBPP's is words."""
    rewards = verifier([PROMPT], ["    pass  # passed"], test=[HUMANEVAL.test], entry_point=["double"], task_id=["x"])
    assert rewards == [1.0] and verifier.executor.programs[0].source.startswith(PROMPT)
    assert verifier(["Double."], [completion("failed")], test_list=[["assert double(2) == 4"]]) == [0.0]
    inputs = ['{"inputs": ["2"], "outputs": ["4"]}']
    assert verifier(None, ["print(4)  # passed"], input_output=inputs) == [1.0]


def test_messages(verifier):
    logged = {}
    given = [{"role": "user", "content": "?"}, {"role": "assistant", "content": completion("passed")}]
    assert verifier(None, [given], [NAMED.to_json()], log_extra=logged.__setitem__) == [1.0]
    assert logged == {"outcome": ["passed"], "message": ["as it says"]}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"answer": NAMED.to_json()}, ValueError, "`answer` is one string for 1 rows of `completions`"),
        ({"answer": []}, ValueError, "`answer` is 0 rows for 1 rows"),
        ({"answer": [72]}, TypeError, r"`answer\[0\]` is a int; pass what `UnitTests"),
        ({"answer": ["72"]}, ValueError, r"`answer\[0\]`: '72' are no unit tests"),
        ({}, ValueError, r"Row 0: A row with the columns \[\] is of no format"),
        ({"test_list": [[]]}, ValueError, "Row 0: Unit tests need one of"),
    ],
)
def test_bad_rows(verifier, given, error, message):
    with pytest.raises(error, match=message):
        verifier(None, [completion("passed")], **given)


def test_tests_are_checked_before_anything_runs():
    check_tests([NAMED.to_json(), SCRIPT.to_json(), HUMANEVAL.to_json()])
    with pytest.raises(ValueError, match=r"`answer\[1\]`: the tests are no Python: .* Correct them or drop the row"):
        check_tests([NAMED.to_json(), UnitTests(test="assert f(").to_json()])
    with pytest.raises(ValueError, match=r"`answer\[0\]`: '#### 72' are no unit tests"):
        check_tests(["#### 72"])


def test_nothing_runs_unless_it_is_allowed(monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(ExecutionNotAllowedError):
        code_reward(None, [RIGHT], answer=[NAMED.to_json()])
    assert CodeVerifier()(None, ["no code here"], answer=[NAMED.to_json()]) == [0.0]  # nothing to run


def test_for_real(monkeypatch):
    """The function of the library, with TRL's signature: programs are run, in the order of the completions."""
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    completions = [
        [{"role": "assistant", "content": f"```python\n{RIGHT}\n```"}],
        [{"role": "assistant", "content": "    return x"}],
    ]
    assert code_reward(["?"] * 2, completions, answer=[HUMANEVAL.to_json()] * 2) == [1.0, 0.0]


def test_a_grpo_trainer_takes_it(monkeypatch, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    from conftest import make_policy, make_tokenizer

    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    rows = Dataset.from_list([{"prompt": "1", "answer": NAMED.to_json()}] * 4)
    args = GRPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=4, max_completion_length=4,
        report_to="none", use_cpu=True, bf16=False, save_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(
        make_policy(), reward_funcs=code_reward, args=args, train_dataset=rows, processing_class=make_tokenizer()
    )
    trainer.train()
    assert any("rewards/code_reward/mean" in entry for entry in trainer.state.log_history)


def test_executors_from_settings():
    executor = make_executor(num_processes=10**6, isolation="auto", cpu=1.5, memory=2**28)
    assert (executor.num_workers, executor.limits.cpu, executor.limits.memory) == (1, 1.5, 2**28)
    remote = make_executor(url="http://localhost:8080", wall=3.0)
    assert (remote.url, remote.limits.wall, remote.max_concurrency) == ("http://localhost:8080", 3.0, 16)
    with pytest.raises(TypeError):
        make_executor(unknown=1)
