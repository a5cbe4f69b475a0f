"""
Tests of the mathematics verifier: where answers are found, which are equal, and that nothing hangs or stays behind.

The tests on GSM8K read `gsm8k-train.jsonl` and `gsm8k-test.jsonl` from the folder `DAPO_TRL_DATA`, by default
`../shared/data` beside the repository, and are skipped without them.
"""

import inspect
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from dapo_trl.verifiers import (
    MathVerifier,
    _worker_pool,
    check_answers,
    default_verifier,
    extract_answer,
    math_reward,
)


DATA = Path(os.environ.get("DAPO_TRL_DATA") or Path(__file__).resolve().parents[1].parent / "shared" / "data")
# Reading it is quick; comparing it with a number makes SymPy evaluate a power tower.
HANGS = r"9^{9^{9^{9}}}"
posix = pytest.mark.skipif(os.name != "posix", reason="signals and forks of POSIX")


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier(timeout=20.0, num_workers=1) as verifier:
        yield verifier


@pytest.fixture(scope="module")
def gsm8k() -> list[str]:
    files = [DATA / f"gsm8k-{split}.jsonl" for split in ("train", "test")]
    if not all(file.exists() for file in files):
        pytest.skip(f"no GSM8K in {DATA}; set DAPO_TRL_DATA")
    return [json.loads(line)["answer"] for file in files for line in file.read_text("utf-8").splitlines()]


def judge(verifier: MathVerifier, stated: str, gold) -> float | None:
    return verifier(["?"], [rf"So it is \boxed{{{stated}}}."], [gold])[0]


def is_running(process_id: int) -> bool:
    """Whether a process runs, zombies aside."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        pass
    try:
        os.kill(process_id, 0)
    except OSError:
        return False
    return not Path("/proc").exists()


def wait_until_gone(process_ids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(map(is_running, process_ids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(is_running, process_ids))


# Where an answer is found ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # boxes
        (r"It is \boxed{72}.", "72"),
        (r"\boxed{\frac{1}{2}} of it", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {5}", "5"),
        (r"\boxed 5", "5"),
        (r"\fbox{3}", "3"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{5} and \boxed{}", "5"),
        (r"\boxed{72", None),
        (r"\boxed{5} and \boxed{72", "5"),
        (r"f(x) = { open, \boxed{5}", "5"),
        # tags
        ("<think>5?</think> <answer> 72 </answer>", "72"),
        # GSM8K
        ("48 + 24 = 72\n#### 72", "72"),
        ("####72", "72"),
        ("#### $1,080.", "$1,080"),
        ("#### -3\n", "-3"),
        ("#### Monday", "Monday"),
        ("#### 72\n\n#### Check of the result\nfine", "72"),
        ("#### 2. Compute the total\nhm", None),
        ("##### 5", None),
        # sentences
        ("The answer is 72.", "72"),
        ("THE ANSWER IS 72", "72"),
        ("So the final answer is: $72$. I hope it is correct.", "$72$"),
        ("The answer is $72. She has $5 left.", "$72"),
        ("The answer is 3.5 hours. Done", "3.5 hours"),
        ("Final answer: **1,000 clips**.", "1,000 clips"),
        ("**Answer:** 72", "72"),
        ("**Final Answer**\n\n72", "72"),
        ("## Answer\n72", "72"),
        ("Thus, the answer is:\n\\[\n\\frac{1}{2}\n\\]\nas wanted.", "\\[\n\\frac{1}{2}\n\\]"),
        ("The answer to the question is therefore 5 apples, because 2 + 3 = 5.", "5 apples"),
        ("The answer (in dollars) is 5", "5"),
        ("The answer, in dollars, is 5.", "5"),
        ("The answer should be -5!", "-5"),
        ("The answers are 2 and 3.", "2 and 3"),
        ("The answer is Monday.", "Monday"),
        ("The answer is B.", "B"),
        ("The answer is that Natalia sold 72 clips.", "72"),
        ("The answer is 5. No, the answer is 6.", "6"),
        # between them, the last one counts; remarks and words do not displace a marked one
        (r"\boxed{5}. Wait: the answer is 6.", "6"),
        ("The answer is 6.\n#### 5", "5"),
        (r"#### 5 or \boxed{6}", "6"),
        (r"\boxed{5}. The answer is correct.", "5"),
        (r"\boxed{5}. The answer is a prime number.", "5"),
        ("The answer is 5. The answer is correct.", "5"),
        # none
        ("", None),
        ("48 + 24 = 72, and then", None),
        ("To answer this question: 5 + 3", None),
        ("The answer is", None),
        ("The answer is not 5.", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "unit",
    [
        *(
            "\\boxed{",
            "the answer is ",
            "answer to ",
            "#### ",
            "answer" + " " * 50,
            "#",
            "$a",
            "{",
            "(",
            "answer *",
            "\n",
        ),
        *("1,", "# ", "\\text{", "~", "sqrt(", "9", "^(", "<answer>", " \n", "answer,", "answer ("),
    ],
)
def test_hostile_text_takes_no_longer_than_its_length(unit):
    text = "The answer is $" + unit * (50_000 // len(unit)) + "\n#### 5 " + unit * (50_000 // len(unit))
    start = time.perf_counter()
    assert math_reward(None, [text], ["5"]) in ([0.0], [1.0])
    assert time.perf_counter() - start < 2


# Which answers are equal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "gold"),
    [
        # integers and separators
        ("72", "72"),
        ("72.", "72"),
        ("072", "72"),
        ("+72", 72),
        ("1,000", "1000"),
        ("1{,}000", "1000"),
        (r"1,\!000,\!000", "1000000"),
        (r"10\,000", "10,000"),
        ("100 000", "100,000"),
        ("−5", "-5"),
        ("five", "5"),
        (r"\approx 5", "5"),
        ("approximately 5", "5"),
        ("12345678901234567890123", "12345678901234567890123"),
        # decimals
        ("18.00", "18"),
        (".5", "0.5"),
        ("0.1", 0.1),
        ("1e-07", 1e-7),
        (r"3 \times 10^{5}", "300,000"),
        (r"1.5 \cdot 10^3", 1500),
        # fractions and mixed numbers
        ("1/2", "0.5"),
        (r"\frac12", r"\dfrac{1}{2}"),
        (r"\frac{2}{4}", "1/2"),
        (r"\frac{-1}{2}", r"-\frac{1}{2}"),
        (r"1\frac{1}{2}", "1.5"),
        ("1 1/2", r"\frac{3}{2}"),
        ("-1 1/2", "-1.5"),
        ("1½", "1.5"),
        (r"0.\overline{3}", "1/3"),
        (r"-1.1\overline{6}", r"-\frac{7}{6}"),
        # percent and magnitudes
        ("50%", "50%"),
        (r"50\%", "50 percent"),
        ("50%", "0.5"),
        ("50", "50%"),
        ("75 percent of them", "75%"),
        (r"\frac{1}{2}", "50%"),
        ("5 million", "5,000,000"),
        ("5 million dollars", "5"),
        # units and currencies
        ("$72", "72"),
        (r"\$72", "72 dollars"),
        ("-$3.50", "-3.5"),
        ("€72", "72"),
        ("72 clips", "72"),
        ("72 clips per day", "72"),
        (r"5\text{ cm}", "5"),
        ("5 cm", "5 centimeters"),
        (r"5\,\mathrm{cm}^2", "5 cm²"),
        ("60 km/h", "60"),
        (r"90^\circ", "90"),
        ("90°", "90 degrees"),
        ("3 p.m.", "3"),
        # text
        ("Monday", r"\text{Monday}"),
        ("monday", "Monday"),
        (r"\textbf{Yes}", "yes"),
        ("(B)", "B"),
        (r"\text{(B)}", "B"),
        ("the red car", "Red car"),
        ("red, green", r"\text{red, green}"),
        # the rest is up to math-verify
        ("(x+1)^2", "x^2+2x+1"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        ("2sqrt(2)", r"\sqrt{8}"),
        ("√8", r"2\sqrt{2}"),
        (r"\frac{\sqrt3}{3}", r"\frac{1}{\sqrt{3}}"),
        ("x=3", "3"),
        ("3", "x = 3"),
        ("48/2 = 24", "24"),
        ("10!", "3628800"),
        ("5 to 1", "5:1"),
        ("2π", r"2\pi"),
        ("2pi", r"2\pi"),
        ("infinity", r"\infty"),
        (r"\varnothing", r"\emptyset"),
        ("3i+5", "5 + 3i"),
        (r"\{1,2,3\}", r"\{3,2,1\}"),
        ("1 and 2", "1, 2"),
        ("x = 1 or x = 2", r"\{1, 2\}"),
        (r"\pm 2", "-2, 2"),
        ("(1, 2)", r"\left(1,2\right)"),
        (r"(3,\pi/2)", r"\left(3,\frac{\pi}{2}\right)"),
        (r"[1,\infty)", r"\left[1,\infty\right)"),
        (r"(2,\infty)\cup(-\infty,1)", r"(-\infty,1)\cup(2,\infty)"),
        (r"\begin{bmatrix}1\\2\end{bmatrix}", r"\begin{pmatrix}1\\ 2\end{pmatrix}"),
        (r"\frac{x}{2}", r"0.5x"),
    ],
)
def test_equal(verifier, stated, gold):
    assert judge(verifier, stated, gold) == 1.0


@pytest.mark.parametrize(
    ("stated", "gold"),
    [
        ("73", "72"),
        ("-72", "72"),
        ("1000", "1,001"),
        ("12345678901234567890124", "12345678901234567890123"),  # equal as floats
        ("0.30000000000000004", "0.3"),
        ("0.333", "1/3"),
        (r"0.\overline{3}", "0.3"),
        ("18.01", "18"),
        ("1 1/2", "11/2"),
        (r"1\frac{1}{2}", "0.5"),
        ("11/2", "1.5"),
        ("50%", "0.5%"),
        ("5%", "0.5"),
        ("5 million", "5 thousand"),
        ("7.2 clips", "72"),
        ("5 and a half", "5"),
        ("5x", "5"),
        ("5", "5x"),
        ("1", "1, 2"),
        ("Monday", "Tuesday"),
        ("Monday", "5"),
        ("on", "no"),
        ("A", "B"),
        ("six", "5"),
        ("(x+1)^2", "x^2+1"),
        (r"\sqrt{8}", r"2\sqrt{3}"),
        ("x=3", "x=4"),
        ("x=3", "y=3"),
        ("12+60=71", "72"),
        (r"\{1,2\}", r"\{1,3\}"),
        (r"\{1,2\}", r"\{1,2,3\}"),
        ("(1,2)", "(2,1)"),
        ("[1,2]", "[1,2)"),
        (r"(1,\infty)", r"(2,\infty)"),
        (r"-\infty", r"\infty"),
        ("5+3i", "5-3i"),
        ("2π", "6.28"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
        (r"\frac{", "72x"),
    ],
)
def test_not_equal(verifier, stated, gold):
    assert judge(verifier, stated, gold) == 0.0


@pytest.mark.parametrize("gold", [72, 72.0, np.int64(72), np.float32(72), Decimal("72.0"), Fraction(72)])
def test_gold_answers_may_be_numbers(gold):
    assert math_reward(None, ["The answer is 72.", "The answer is 7."], [gold] * 2) == [1.0, 0.0]


# GSM8K ----------------------------------------------------------------------------------------------------------------


def test_gsm8k_in_time(gsm8k, capsys):
    """All worked solutions are right by their own answers; all with an answer off by one are wrong; in seconds."""
    values = [solution.rpartition("####")[2].strip() for solution in gsm8k]
    wrong = [
        f"{solution.rpartition('####')[0]}#### {int(value.replace(',', '')) + 1:{',' if ',' in value else ''}}"
        for solution, value in zip(gsm8k, values, strict=True)
    ]
    start = time.perf_counter()
    with MathVerifier() as verifier:
        assert verifier(None, gsm8k, values) == [1.0] * 8792
        assert verifier(None, gsm8k, gsm8k) == [1.0] * 8792
        assert verifier(None, wrong, values) == [0.0] * 8792
        assert verifier(None, wrong, gsm8k) == [0.0] * 8792
        assert verifier.worker_process_ids == []
    seconds = time.perf_counter() - start
    with capsys.disabled():
        print(f"\n4 x 8,792 GSM8K solutions judged in {seconds:.1f} s")
    assert seconds < 120


@pytest.mark.parametrize(
    "rendering",
    [
        r"Therefore \boxed{{{0}}}.",
        r"Therefore $\boxed{{{1:,}\text{{ clips}}}}$.",
        "The answer is {0}.",
        "The answer is {1:,} clips.",
        "The final answer is ${1}.00.",
        "**Final answer:** ${1}$",
        "#### {1:,} dollars",
    ],
)
def test_gsm8k_renderings(gsm8k, rendering):
    values = [solution.rpartition("####")[2].strip() for solution in gsm8k]
    numbers = [int(value.replace(",", "")) for value in values]
    right = [rendering.format(value, number) for value, number in zip(values, numbers, strict=True)]
    wrong = [rendering.format(number + 1, number + 1) for number in numbers]
    assert math_reward(None, right, values) == [1.0] * 8792
    assert math_reward(None, wrong, values) == [0.0] * 8792


def test_many_short_completions_take_seconds_and_no_process():
    completions = [f"Adding up gives {i}.\n#### {i % 50}" for i in range(100_000)]
    answers = [str(i % 25) for i in range(100_000)]
    start = time.perf_counter()
    with MathVerifier() as verifier:
        assert sum(verifier(None, completions, answers)) == 50_000
        assert verifier.worker_process_ids == []
    assert time.perf_counter() - start < 10  # 1 s on an idle core


# What cannot be judged ------------------------------------------------------------------------------------------------


def test_a_hanging_answer_leaves_its_neighbours_alone():
    with MathVerifier(timeout=2.0, num_workers=2) as verifier:
        completions = [r"\boxed{\sqrt{8}}", rf"\boxed{{{HANGS}}}", r"\boxed{\sqrt{9}}", "The answer is 6.", "?"]
        expected = [1.0, None, 0.0, 0.0, 0.0]
        start = time.perf_counter()
        assert verifier(None, completions, [r"2\sqrt{2}"] * 5) == expected
        assert time.perf_counter() - start < 30  # the limit, and two process starts
        assert verifier.counts == {"equal": 1, "different": 2, "timeout": 1, "no_answer": 1}
        assert judge(verifier, r"\sqrt{18}", r"3\sqrt{2}") == 1.0


def test_hanging_answers_are_judged_once_per_call():
    with MathVerifier(timeout=2.0, num_workers=1) as verifier:
        judge(verifier, r"\sqrt{8}", r"2\sqrt{2}")  # start the worker
        start = time.perf_counter()
        assert verifier(None, [rf"\boxed{{{HANGS}}}"] * 20, ["6"] * 20) == [None] * 20
        assert time.perf_counter() - start < 10
        assert verifier.counts["timeout"] == 20


def test_off_the_main_thread_and_from_several():
    results = []
    with MathVerifier(timeout=2.0, num_workers=2) as verifier:

        def work(root: int) -> None:
            stated = [rf"\boxed{{\sqrt{{{root * root * 2}}}}}", rf"\boxed{{{HANGS}}}"]
            results.append(verifier(None, stated, [rf"{root}\sqrt{{2}}"] * 2))

        threads = [threading.Thread(target=work, args=(root,)) for root in (2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [[1.0, None]] * 2
        assert sum(verifier.counts.values()) == 4


@posix
def test_a_killed_worker_is_replaced():
    with MathVerifier(timeout=20.0, num_workers=1) as verifier:
        assert judge(verifier, r"\sqrt{8}", r"2\sqrt{2}") == 1.0
        (process_id,) = verifier.worker_process_ids
        os.kill(process_id, signal.SIGKILL)
        assert judge(verifier, r"\sqrt{18}", r"3\sqrt{2}") == 1.0
        assert verifier.worker_process_ids != [process_id]


@posix
def test_a_question_whose_worker_was_killed_is_asked_again(monkeypatch):
    ask, killed = _worker_pool._Worker.ask, []

    def ask_and_be_killed_once(worker, question):
        if not killed:
            killed.append(os.kill(worker.process.pid, signal.SIGKILL))
        return ask(worker, question)

    monkeypatch.setattr(_worker_pool._Worker, "ask", ask_and_be_killed_once)
    with MathVerifier(timeout=20.0, num_workers=1) as verifier:
        assert judge(verifier, r"\sqrt{8}", r"2\sqrt{2}") == 1.0
    assert killed


@posix
def test_a_worker_that_always_dies_is_not_judged(monkeypatch):
    """Killed in the middle of each of the two attempts, a question gets None instead of a wrong 0 or a hang."""
    ask = _worker_pool._Worker.ask

    def ask_and_be_killed(worker, question):
        threading.Timer(0.3, os.kill, (worker.process.pid, signal.SIGKILL)).start()
        return ask(worker, question)

    with MathVerifier(timeout=60.0, num_workers=1) as verifier:
        with monkeypatch.context() as patch:
            patch.setattr(_worker_pool._Worker, "ask", ask_and_be_killed)
            assert judge(verifier, HANGS, "6") is None
        assert verifier.counts == {"crash": 1}
        assert judge(verifier, r"\sqrt{8}", r"2\sqrt{2}") == 1.0


@pytest.mark.parametrize(
    "gold",
    [
        "",
        "???",
        None,
        float("nan"),
        r"\frac{",
        "x+",
        "he then gave the rest of all of his marbles to his little sister",
    ],
)
def test_a_gold_answer_that_cannot_be_parsed_is_not_judged(verifier, gold):
    assert verifier(None, ["The answer is 72.", "?"], [gold] * 2) == [None, None]


def test_unparsable_gold_answers_are_reported_once_and_counted(caplog):
    with MathVerifier() as verifier, caplog.at_level(logging.WARNING):
        assert verifier(None, ["#### 1", "#### 2"], ["1", "???"]) == [1.0, None]
        verifier(None, ["#### 1", "#### 2"], ["!!!", "???"])
    assert [record.getMessage() for record in caplog.records] == [
        "math_reward returns None for 1 of 2 completions, the first at index 1 (gold answer '???', stated '2'): the "
        "gold answer cannot be parsed; correct it or drop the row. Said once; the verifier's `counts` has totals, "
        "`check_answers` finds bad gold answers."
    ]
    assert verifier.counts == {"equal": 1, "unparsable_gold": 3}


def test_check_answers():
    check_answers(["72", "2 + 2 = 4\n#### 4", 0.5, "Monday", r"\sqrt{2}"])
    with pytest.raises(ValueError, match=r"`answers\[1\]` is '\?\?\?': the gold answer cannot .* 2 of 3 rows are like"):
        check_answers(["72", "???", None])
    with pytest.raises(ValueError, match=r"`answers\[2\]` is '\\\\frac\{'"):
        check_answers(["72", r"\sqrt{2}", r"\frac{"])
    default_verifier.close()


def test_without_math_verify_the_error_says_so(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('not here')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with MathVerifier() as verifier, pytest.raises(ImportError, match="pip install math-verify"):
        judge(verifier, r"\sqrt{8}", r"2\sqrt{2}")


# As a reward function -------------------------------------------------------------------------------------------------


def test_conversations():
    texts = [[{"type": "text", "text": "The answer "}, {"type": "text", "text": "is 72."}], "#### 71", None]
    completions = [[{"role": "tool", "content": "#### 1"}, {"role": "assistant", "content": text}] for text in texts]
    assert math_reward([[{"role": "user", "content": "?"}]] * 3, completions, ["72"] * 3) == [1.0, 0.0, 0.0]


def test_what_trl_passes_is_accepted():
    extra = {}
    rewards = math_reward(
        prompts=["?", "?"],
        completions=["#### 72", "?"],
        completion_ids=[[1], [2]],
        answer=["72", "72"],
        question=["?", "?"],
        trainer_state=object(),
        log_extra=extra.__setitem__,
        log_metric=lambda name, value: None,
    )
    assert rewards == [1.0, 0.0] and all(isinstance(reward, float) for reward in rewards)
    assert extra == {"extracted_answer": ["72", ""]}


def test_a_grpo_trainer_takes_it(tmp_path):
    """One step of a tiny model, which cannot but state no answer: the reward arrives under its name."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    characters = Tokenizer(models.WordLevel({char: i for i, char in enumerate("_$012+=")}, unk_token="_"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="_", eos_token="$", padding_side="left")
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    trainer = GRPOTrainer(
        model=Qwen2ForCausalLM(Qwen2Config(vocab_size=7, num_hidden_layers=1, **shape)),
        reward_funcs=math_reward,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=4,
            bf16=False,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=Dataset.from_list([{"prompt": "1+1=", "answer": "2"}] * 2),
        processing_class=tokenizer,
    )
    before = default_verifier.counts["no_answer"]
    trainer.train()
    assert trainer.state.log_history[0]["rewards/math_reward/mean"] == 0.0
    assert default_verifier.counts["no_answer"] == before + 2


@pytest.mark.parametrize("reward", [math_reward, MathVerifier()])
def test_the_signature_is_that_of_trl(reward):
    parameters = inspect.signature(reward).parameters
    assert list(parameters)[:3] == ["prompts", "completions", "answer"]
    assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
    assert reward.__name__ == "math_reward"
    assert pickle.loads(pickle.dumps(reward))(None, ["#### 72"], ["72"]) == [1.0]


def test_a_wrong_call_names_the_argument():
    with pytest.raises(ValueError, match="`answer` is 1 rows for 2 rows of `completions`"):
        math_reward(None, ["#### 1", "#### 2"], ["1"])
    with pytest.raises(ValueError, match="`answer` is one string"):
        math_reward(None, ["#### 1", "#### 2"], "12")
    with pytest.raises(TypeError, match=r"`answer\[1\]` is a list"):
        math_reward(None, ["#### 1", "#### 2"], ["1", ["2"]])
    with pytest.raises(TypeError, match=r"`completions\[0\]` is 5; pass a string or a list of messages"):
        math_reward(None, [5], ["1"])
    with pytest.raises(ValueError, match="`timeout` is 0"):
        MathVerifier(timeout=0)
    with pytest.raises(ValueError, match="`num_workers` is 0"):
        MathVerifier(num_workers=0)
    assert math_reward([], [], []) == []


# Processes ------------------------------------------------------------------------------------------------------------


def test_workers_start_late_are_reused_and_end_with_close():
    verifier = MathVerifier(num_workers=1)
    assert verifier.worker_process_ids == []
    judge(verifier, r"\sqrt{8}", r"2\sqrt{2}")
    process_ids = verifier.worker_process_ids
    judge(verifier, r"\sqrt{18}", r"3\sqrt{2}")
    assert verifier.worker_process_ids == process_ids and len(process_ids) == 1
    verifier.close()
    assert wait_until_gone(process_ids, 5)
    assert judge(verifier, r"\sqrt{8}", r"2\sqrt{2}") == 1.0  # starts another
    process_ids = verifier.worker_process_ids
    del verifier
    assert wait_until_gone(process_ids, 5)


def _run_script(tmp_path: Path, script: str) -> subprocess.Popen:
    """A script without a `__main__` guard, in a folder where a `math.py` lies about."""
    (tmp_path / "math.py").write_text("raise ImportError('this is not the math module')")
    (tmp_path / "script.py").write_text("import sys; sys.path.pop(0)\n" + textwrap.dedent(script))
    paths = [str(Path(__file__).resolve().parents[1] / "src"), os.environ.get("PYTHONPATH")]
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )


def test_a_script_needs_no_guard_and_leaves_nothing_behind(tmp_path):
    script = r"""
        from dapo_trl.verifiers import default_verifier, math_reward
        print(math_reward(None, [r"\boxed{\sqrt{8}}"], [r"2\sqrt{2}"]), *default_verifier.worker_process_ids)
    """
    output, _ = _run_script(tmp_path, script).communicate(timeout=60)
    reward, *process_ids = output.split()
    assert reward == "[1.0]" and process_ids
    assert wait_until_gone([int(process_id) for process_id in process_ids], 5)


@posix
@pytest.mark.parametrize("stated", [r"\sqrt{8}", HANGS], ids=["idle", "busy"])
def test_no_orphans_after_sigkill(tmp_path, stated):
    """An idle worker ends with its pipe. One in the middle of a computation does by its alarm, 2 s after the limit."""
    script = rf"""
        import threading, time
        from dapo_trl.verifiers import MathVerifier
        verifier = MathVerifier(timeout=3.0, num_workers=1)
        verifier(None, [r"\boxed{{\sqrt{{8}}}}"], [r"2\sqrt{{2}}"])
        threading.Thread(target=verifier, args=(None, [r"\boxed{{{stated}}}"], [r"2\sqrt{{2}}"])).start()
        time.sleep(0.5)
        print(*verifier.worker_process_ids, flush=True)
        time.sleep(60)
    """
    parent = _run_script(tmp_path, script)
    process_ids = [int(process_id) for process_id in parent.stdout.readline().split()]
    assert len(process_ids) == 1 and is_running(process_ids[0])
    parent.kill()
    parent.communicate()
    assert wait_until_gone(process_ids, 15)


@posix
def test_a_fork_starts_workers_of_its_own():
    with MathVerifier(num_workers=1) as verifier:
        judge(verifier, r"\sqrt{8}", r"2\sqrt{2}")
        before = verifier.worker_process_ids
        child = os.fork()
        if child == 0:
            fine = judge(verifier, r"\sqrt{18}", r"3\sqrt{2}") == 1.0 and verifier.worker_process_ids != before
            verifier.close()
            os._exit(0 if fine else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert verifier.worker_process_ids == before
        assert judge(verifier, r"\sqrt{32}", r"4\sqrt{2}") == 1.0
