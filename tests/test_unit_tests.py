"""
Unit tests as values: formats of well-known data sets, JSON, output that counts as the same.
"""

import json

import pytest

from dapo_trl.execution import UnitTests
from dapo_trl.execution.unit_tests import same_output


def test_humaneval():
    row = {
        "prompt": "def f(x):\n",
        "test": "def check(f):\n    assert f(1) == 1",
        "entry_point": "f",
        "task_id": "HumanEval/0",
    }
    assert UnitTests.from_row(row) == UnitTests(entry_point="f", prompt=row["prompt"], test=row["test"], check="check")


def test_mbpp():
    """The full set has `text`, `code` and setup code, the sanitized one `prompt` and imports."""
    full = {
        "text": "Double.",
        "code": "...",
        "test_list": ["assert f(1) == 2", "assert f(2) == 4"],
        "test_setup_code": "y = 1",
    }
    assert UnitTests.from_row(full).test == "y = 1\nassert f(1) == 2\nassert f(2) == 4"
    sanitized = {"prompt": "Double.", "test_list": ["assert f(1) == 2"], "test_imports": ["import math"]}
    assert UnitTests.from_row(sanitized).test == "import math\nassert f(1) == 2"


def test_taco_and_apps():
    script = {
        "question": "Add.",
        "input_output": json.dumps({"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3\n", ["7"]]}),
    }
    assert UnitTests.from_row(script) == UnitTests(inputs=["1 2\n", "3\n4"], outputs=["3\n", "7"])
    function = json.dumps({"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]})
    tests = UnitTests.from_row({"input_output": function, "starter_code": "def add(a, b):\n"})
    assert tests == UnitTests(entry_point="add", prompt="def add(a, b):\n", cases=[[[1, 2], 3]])


def test_json_and_back():
    for tests in (
        UnitTests(entry_point="f", test="assert f(1) == 1"),
        UnitTests(entry_point="f", prompt="def f(x):\n", test="def check(f): pass", check="check"),
        UnitTests(entry_point="f", cases=[[[1, "é"], None]]),
        UnitTests(inputs=["1"], outputs=["2"]),
    ):
        assert UnitTests.from_json(tests.to_json()) == tests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Unit tests need one of `test`, `cases` and `inputs`, got none"),
        ({"test": "x", "inputs": ["1"], "outputs": ["2"]}, r"got \['test', 'inputs'\]"),
        ({"inputs": ["1"]}, "There are 1 `inputs` but 0 `outputs`"),
        ({"cases": [[[1], 2]]}, "`entry_point` is missing"),
        ({"test": "x", "check": "check"}, "`entry_point` is missing"),
    ],
)
def test_what_is_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        UnitTests(**arguments)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, r"A row with the columns \['prompt'\] is of no format that is known"),
        ({"test_list": []}, "got none"),
        ({"input_output": '{"inputs": [], "outputs": []}'}, "got none"),
        ({"input_output": '{"inputs": ["1"], "outputs": []}'}, "There are 1 `inputs` but 0 `outputs`"),
    ],
)
def test_rows_without_tests(row, message):
    with pytest.raises(ValueError, match=message):
        UnitTests.from_row(row)


@pytest.mark.parametrize("text", ["72", "{", '{"tests": "x"}', "[1]", "null"])
def test_text_that_is_no_tests(text):
    with pytest.raises(ValueError, match=r"no unit tests: .* Write them with `UnitTests\(...\).to_json\(\)`"):
        UnitTests.from_json(text)


@pytest.mark.parametrize(
    ("printed", "expected", "is_same"),
    [
        ("3\n", "3", True),
        ("1 2  3 \n\n", "1 2 3", True),
        ("1.50", "1.5", True),
        ("1e3", "1000", True),
        ("0.333", "0.3333", False),
        ("a\nb", "a b", False),
        ("\na", "a", False),
        ("", "0", False),
        ("YES", "yes", False),
        ("nan", "nan", True),
    ],
)
def test_same_output(printed, expected, is_same):
    assert same_output(printed, expected) is is_same
