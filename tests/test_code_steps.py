"""
Steps of code: statements of the outermost block, lines where it does not parse.
"""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_trl.code_steps import STATEMENTS, statement_ends
from dapo_trl.rollouts import RolloutConfig
from dapo_trl.steps import split_steps


def split(text: str) -> list[str]:
    return split_steps(text, statement_ends)


LOOP = "    # add them up\n    for x in xs:\n        if x > 0:\n            total += x\n"
BODY = f"    total = 0\n\n{LOOP}    return total\n"
CASES = {
    "a body": (BODY, ["    total = 0\n\n", LOOP, "    return total\n"]),
    "a module": (
        "import os\n\n\ndef f(\n    a,\n    b,\n):\n    # c\n    x = 1\n    return x\n\n\nprint(f(1, 2))\n",
        [
            "import os\n\n\n",
            "def f(\n    a,\n    b,\n):\n",
            "    # c\n    x = 1\n",
            "    return x\n\n\n",
            "print(f(1, 2))\n",
        ],
    ),
    "a docstring": (
        'def f(x):\n    """D.\n\n    e"""\n    return x',
        ['def f(x):\n    """D.\n\n    e"""\n', "    return x"],
    ),
    "a docstring alone": ('def f(x):\n    """D."""\n', ['def f(x):\n    """D."""\n']),
    "a class": (
        "class A:\n    def f(self):\n        return 1\n\n    @property\n    def g(self):\n        return 2\n",
        [
            "class A:\n",
            "    def f(self):\n",
            "        return 1\n\n",
            "    @property\n    def g(self):\n",
            "        return 2\n",
        ],
    ),
    "conditions in one": (
        "if x:\n    y = 1\nelif z:\n    y = 2\nelse:\n    y = 3\nw = 4",
        ["if x:\n    y = 1\nelif z:\n    y = 2\nelse:\n    y = 3\n", "w = 4"],
    ),
    "statements on one line": ("x = 1; y = 2\nz = 3", ["x = 1; y = 2\n", "z = 3"]),
    "functions on one line": ("def f(x): return x\ny = f(1)", ["def f(x): return x\n", "y = f(1)"]),
    "a text of several lines": (
        'x = """\na\n\nb"""\ny = [\n    1,\n]\n',
        ['x = """\na\n\nb"""\n', "y = [\n    1,\n]\n"],
    ),
    "an error at the end": (
        "x = 1\nfor y in z:\n    x += y\nreturn = 3\nx =",
        ["x = 1\n", "for y in z:\n    x += y\n", "return = 3\n", "x ="],
    ),
    "no code at all": ("It is easy.\nAdd them.\n", ["It is easy.\n", "Add them.\n"]),
    "a body that ends": ("    return 1\n\nprint(2)\n", ["    return 1\n\n", "print(2)\n"]),
    "fenced": (
        "So:\n\n```python\nfor x in y:\n    z = x\nw = 1\n```\nDone.",
        ["So:\n\n", "```python\n", "for x in y:\n    z = x\n", "w = 1\n", "```\n", "Done."],
    ),
    "fenced, not closed": ("So:\n~~~py\nif x:\n    z = x\n", ["So:\n", "~~~py\n", "if x:\n    z = x\n"]),
    "the rest of a fence": (
        "for x in y:\n    z = x\n```\nThat is it.\n",
        ["for x in y:\n    z = x\n", "```\n", "That is it.\n"],
    ),
    "nothing": ("", []),
    "blank": ("\n \n", ["\n \n"]),
}


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name):
    text, steps = CASES[name]
    assert split(text) == steps


def test_lines_are_the_other_way():
    """The same body by lines, as in the paper: a loop is cut in the middle."""
    assert len(split_steps(BODY)) == 6 and len(split(BODY)) == 3


@given(st.text(alphabet="ab =:()[]\n\t #'\"`~", max_size=60))
def test_nothing_is_lost(text):
    steps = split(text)
    assert "".join(steps) == text and all(steps)


@given(
    st.lists(
        st.sampled_from(
            [*BODY.splitlines(keepends=True), "    x = (\n", "    if x:\n", "        y = 1\n", "x = 2\n", "    else:\n"]
        ),
        max_size=9,
    )
)
def test_what_comes_later_does_not_change_what_parsed(lines):
    """A statement that another one of its block follows ends there, whatever comes after, also what is no Python."""
    text = "    a = 1\n    b = 2\n" + "".join(lines)
    assert split(text)[0] == "    a = 1\n"


def test_canonical_solutions(data_dir):
    """All of HumanEval's: the steps of a body are those at the end of the whole program; half as many as lines."""
    with gzip.open(data_dir / "HumanEval.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        steps = [step.strip() for step in split(row["canonical_solution"])]
        whole = [step.strip() for step in split(row["prompt"] + row["canonical_solution"])]
        assert whole[-len(steps) :] == steps and row["entry_point"] in "".join(whole[: -len(steps)])
    numbers = [sum(len(cut(row["canonical_solution"])) for row in rows) for cut in (split, split_steps)]
    assert numbers == [531, 1033]  # as docs/code.md has it


def test_its_name_is_a_separator_of_settings():
    assert RolloutConfig(separator=STATEMENTS).separator == "<statements>"
