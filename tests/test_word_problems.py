"""
`examples/student/word_problems.py`, the second task: its answers, its errors and its splits.
"""

import random
import sys

import pytest
from transformers import AutoTokenizer

from conftest import REPOSITORY
from dapo_trl import math_reward


STUDENT = REPOSITORY / "examples" / "student"
sys.path.append(str(STUDENT))
import word_problems as task  # noqa: E402


@pytest.fixture(scope="module")
def problems() -> list[dict[str, str]]:
    return task.make_problems("train", 300, seed=0)


def answer_in_words(prompt: str) -> int:
    """The answer, worked out from the words without the module's own reader."""
    sentences = prompt.strip().removesuffix(" How many?").rstrip(".").split(". ")
    owner, value = sentences[0].split()[0], int(sentences[0].split()[2])
    for sentence in sentences[1:]:
        words = sentence.split()
        numbers = [int(word) for word in words if word.isdigit()]
        if words[0] in task.NAMES and words[0] != owner:
            continue
        if "buys" in words or "finds" in words:
            value += numbers[0]
        elif "bags" in words:
            value += numbers[0] * numbers[1]
        elif "each" in words:
            value -= numbers[0] * numbers[1]
        elif "sells" in words or "loses" in words:
            value -= numbers[0]
        elif "fit" in words:
            value = min(value, numbers[0])
        elif "tops" in words:
            value = max(value, numbers[0])
        else:
            raise AssertionError(f"Nobody knows what {sentence!r} does.")
        assert 0 <= value <= task.LARGEST
    return value


def test_answers(problems):
    """Answers follow from the words, right solutions end in them, and every line of these is true."""
    for problem in problems:
        assert problem["answer"] == str(answer_in_words(problem["prompt"]))
        solution = task.correct_solution(problem)
        assert task.is_correct(problem, solution) and all(task.proofread(problem, solution))
        for line in solution.splitlines()[:-1]:
            calculation, _, result = line.partition(" = ")
            left, operator, right = calculation.split()
            known = {"min": min, "max": max, "+": int.__add__, "-": int.__sub__, "*": int.__mul__}
            assert known[operator](int(left), int(right)) == int(result)
    solutions = [task.correct_solution(problem) for problem in problems]
    prompts, answers = ([problem[name] for problem in problems] for name in ("prompt", "answer"))
    assert math_reward(prompts=prompts, completions=solutions, answer=answers) == [1.0] * len(problems)


def test_pupils_err_as_described(problems):
    """Each misconception alone changes some solutions, and slips others; without any, solutions are right."""
    nobody = dict.fromkeys(task.MISCONCEPTIONS, 0.0)
    for name in task.MISCONCEPTIONS:
        rng = random.Random(0)
        solutions = [task.demonstration(problem, rng, nobody | {name: 1.0}, slip_rate=0.0) for problem in problems]
        wrong = [not task.is_correct(p, s) for p, s in zip(problems, solutions, strict=True)]
        assert 0.05 < sum(wrong) / len(wrong) < 0.8, name
    rng = random.Random(0)
    slips = [task.demonstration(problem, rng, nobody, slip_rate=1.0) for problem in problems]
    assert not any(task.proofread(p, s)[0] for p, s in zip(problems, slips, strict=True))


def test_errors_by_hand():
    """34 + 28 without the carry is 52; 62 - 15 column by column is 53; 4 to each of 3 friends taken for 4."""
    always = dict.fromkeys(task.MISCONCEPTIONS, 1.0)
    prompt = "Mia has 34 pens. She buys 28. Tom has 5 cups. She gives 4 to each of 3 friends. She sells 19. How many?\n"
    written = task.demonstration({"prompt": prompt}, random.Random(0), always, slip_rate=0.0)
    assert written == "34 + 28 = 52\n52 + 5 = 57\n57 - 4 = 53\n53 - 19 = 46\n#### 46"
    assert task.correct_solution({"prompt": prompt}) == "34 + 28 = 62\n3 * 4 = 12\n62 - 12 = 50\n50 - 19 = 31\n#### 31"


def test_an_error_can_be_absorbed(problems):
    """Some wrong solutions end right: outcomes are noisy labels of steps."""
    rng = random.Random(0)
    lucky = 0
    for problem in problems:
        written = task.demonstration(problem, rng)
        lucky += task.is_correct(problem, written) and not all(task.proofread(problem, written))
    assert lucky > 0


def test_splits_share_no_problem():
    prompts = {
        split: {row["prompt"] for seed in range(3) for row in task.make_problems(split, 300, seed)}
        for split in task.SPLITS
    }
    for split, own in prompts.items():
        for other, theirs in prompts.items():
            assert split == other or not own & theirs
    with pytest.raises(ValueError, match="`split` is 'exam'"):
        task.make_problems("exam", 1, 0)


def test_tokenizer_reads_all_of_it(problems):
    """Nothing is unknown, encoding and decoding are inverse, and all fits."""
    tokenizer = AutoTokenizer.from_pretrained(STUDENT / "word_problems")
    for problem in problems:
        text = problem["prompt"] + task.demonstration(problem, random.Random(0))
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
        assert len(ids) < task.MAX_TOKENS
