"""
`problems.py`: questions and answers from files and functions, as problems with prompts.
"""

import json

import pytest

from conftest import CHAT_TEMPLATE, STUDENT, make_tokenizer
from dapo_trl.problems import load_problems


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{i}+1?", "solution": f"#### {i + 1}"}) + "\n" for i in range(8)))
    return path


def test_splits_share_no_prompt(good):
    """Without a test split problems are held out; columns are found by their usual names."""
    parts = load_problems(str(good), make_tokenizer(), num_test=4, prompt_template="Q: {question}\n")
    assert (len(parts["train"]), len(parts["test"])) == (4, 4)
    assert not set(parts["train"]["prompt"]) & set(parts["test"]["prompt"])
    assert parts["train"].column_names == ["prompt", "answer", "problem_id"]
    assert all(prompt.startswith("Q: ") and prompt.endswith("+1?\n") for prompt in parts["train"]["prompt"])


def test_a_smaller_number_is_a_sample_of_all(good):
    """With the same seed, the first problems are the same."""
    few, many = (
        load_problems(str(good), make_tokenizer(), num_train=number, num_test=2)["train"]["prompt"][:]
        for number in (2, 5)
    )
    assert many[:2] == few
    assert load_problems(str(good), make_tokenizer(), num_test=2, seed=1)["train"]["prompt"][:5] != many


def test_a_chat_template_makes_conversations(good):
    prompt = load_problems(str(good), make_tokenizer(CHAT_TEMPLATE), num_test=4)["train"]["prompt"][0]
    assert [message["role"] for message in prompt] == ["user"]


def test_fewer_problems_than_asked_for(good, caplog):
    assert len(load_problems(str(good), make_tokenizer(), num_train=100, num_test=4)["train"]) == 4
    assert "good.jsonl has 4 problems to train on; `num_train_problems` asks for 100." in caplog.text


def test_problems_of_a_function():
    """The demo's, and its numbers and splits."""
    name = f"{STUDENT / 'arithmetic.py'}:make_problems"
    parts = load_problems(name, make_tokenizer(), num_train=5, num_test=3, test_split="validation", seed=7)
    assert (len(parts["train"]), len(parts["test"])) == (5, 3)
    assert (
        parts["train"]["prompt"][:] != load_problems(name, make_tokenizer(), num_train=5, num_test=3)["train"]["prompt"]
    )


def questions(first, last):
    return [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(first, last)]


def test_test_problems_are_none_of_training(tmp_path, caplog):
    """Six of twelve test problems are trained on. The others are enough where four are asked for, not for ten."""
    for name, rows in (("train", questions(0, 10)), ("test", questions(4, 16))):
        write(tmp_path / f"{name}.jsonl", *rows)
    for number, expected in ((4, 4), (10, 6)):
        parts = load_problems(str(tmp_path), make_tokenizer(), num_test=number)
        assert len(parts["test"]) == expected
        assert not set(parts["train"]["prompt"]) & set(parts["test"]["prompt"])
    assert caplog.text.count("6 test problems are also in training and were left out") == 2


def test_test_problems_of_a_function_are_none_of_training(tmp_path, caplog):
    path = tmp_path / "own.py"
    path.write_text("def make(split, n, seed):\n    return [{'prompt': f'{i}+1?', 'answer': '1'} for i in range(n)]\n")
    parts = load_problems(f"{path}:make", make_tokenizer(), num_train=3, num_test=5)
    assert parts["test"]["prompt"][:] == ["3+1?", "4+1?"]
    assert "3 test problems are also in training and were left out" in caplog.text
    with pytest.raises(ValueError, match="all 3 test problems are also in training, so there is none to evaluate on"):
        load_problems(f"{path}:make", make_tokenizer(), num_train=3, num_test=3)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_bad_files(tmp_path, good):
    tokenizer = make_tokenizer()
    bad = write(tmp_path / "bad.jsonl", {"question": "1+1?", "answer": "???"}, {"question": "b", "answer": "2"})
    with pytest.raises(ValueError, match=r"is '\?\?\?': the gold answer cannot be parsed"):
        load_problems(bad, tokenizer)
    missing = write(tmp_path / "missing.jsonl", {"ask": "1+1?", "tell": "2"}, {"ask": "1+2?", "tell": "3"})
    with pytest.raises(ValueError, match="needs a column named 'question' or 'problem' or 'prompt'"):
        load_problems(missing, tokenizer)
    with pytest.raises(ValueError, match="has no split 'validation'"):
        load_problems(str(good), tokenizer, train_split="validation")
    with pytest.raises(ValueError, match=r"is 'nowhere.jsonl', but there is no such file"):
        load_problems("nowhere.jsonl", tokenizer)


def test_bad_functions(tmp_path):
    with pytest.raises(ValueError, match="but there is no such file"):
        load_problems("nowhere.py:make", make_tokenizer(), num_train=1, num_test=1)
    path = tmp_path / "own.py"
    path.write_text("number = 3\n")
    with pytest.raises(ValueError, match="has no function 'make'"):
        load_problems(f"{path}:make", make_tokenizer(), num_train=1, num_test=1)
    with pytest.raises(ValueError, match="How many problems shall"):
        load_problems(f"{STUDENT / 'arithmetic.py'}:make_problems", make_tokenizer())
