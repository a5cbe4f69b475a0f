"""
`inspection.py`: what the terminal shows of a problem.
"""

import io
import shutil

import pytest
from datasets import Dataset
from rich.console import Console

from dapo_trl.cli import main
from dapo_trl.inspection import add_critic, build_tree, color, print_problem
from test_stages import PROBLEMS, SeededEngine, run


# Two kept solutions, "a b c" (right) and "a aa" (cut off, wrong); from the prompt "a" and an end were sampled too.
SOLUTIONS = [
    {
        "prompt": "What\nnow?",
        "answer": "7",
        "problem_id": "p",
        "completions": ["a\n", "b\n", "c"],
        "values": [0.5, 0.75, 1.0, 1.0],
        "mc_successes": [2.0, 3.0, 4.0, 5.0],
        "mc_rollouts": [4, 4, 4, 5],
        "truncated": False,
    },
    {
        "prompt": "What\nnow?",
        "answer": "7",
        "problem_id": "p",
        "completions": ["a\n", "aa"],
        "values": [0.5, 0.75, 0.0],
        "mc_successes": [2.0, 3.0, 0.0],
        "mc_rollouts": [4, 4, 1],
        "truncated": True,
    },
]
STATES = [
    {
        "prompt": "What\nnow?",
        "answer": "7",
        "problem_id": "p",
        "prefix": [],
        "candidates": ["z" * 150, "a\n"],
        "values": [0.0, 0.75],
        "mc_successes": [0.0, 3.0],
        "mc_rollouts": [1, 4],
        "rewards": [0.0, None],
    }
]
DRAWN = f"""\
0.50 (2/4) ● What⏎now?
├╴0.75 (3/4) ● a⏎
│ ├╴1.00 (4/4) ● b⏎
│ │ └╴1.00 (5/5) ● ✔ c
│ └╴0.00 (0/1) ● ✂ aa
└╴0.00 (0/1)   ✘ {"z" * 99}…
"""


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(folder, SeededEngine())
    return folder


def shown(path, problem_id=None, **console):
    file = io.StringIO()
    print_problem(path, problem_id, Console(file=file, **{"width": 150} | console))
    return file.getvalue()


def write(path, states=STATES, solutions=SOLUTIONS):
    """A run with one problem."""
    shards = path / "values" / "shards"
    shards.mkdir(parents=True)
    Dataset.from_list(states).to_parquet(shards / "00000-states.parquet")
    Dataset.from_list(solutions).to_parquet(shards / "00000-solutions.parquet")
    return path


def test_a_tree_by_hand(tmp_path):
    """Siblings in the order of their values; steps of kept solutions, ends and cuts marked; long steps shortened."""
    title, legend, *tree = shown(write(tmp_path / "runs")).splitlines(keepends=True)
    assert title == "runs, problem p, answer 7\n"
    assert legend.startswith("value (right/completions)")
    assert "".join(tree) == DRAWN


def test_values_of_the_critic(tmp_path):
    """They stand beside those of the same steps, whatever ends the step."""
    folder = write(tmp_path)
    (folder / "data").mkdir()
    states = [row | {"critic_values": [0.25, 0.625]} for row in STATES]
    Dataset.from_list(states).to_parquet(folder / "data" / "states_critic.parquet")
    printed = shown(folder)
    assert "0.75 (3/4) critic 0.62 ● a⏎" in printed
    assert "0.00 (0/1) critic 0.25   ✘ zzz" in printed
    assert "1.00 (4/4) ● b⏎" in printed  # scored in solutions only
    solutions = [row | {"critic_values": [0.5] * len(row["values"])} for row in SOLUTIONS]
    Dataset.from_list(solutions).to_parquet(folder / "data" / "solutions_critic.parquet")
    assert "1.00 (4/4) critic 0.50 ● b⏎" in shown(folder)


def test_colors(tmp_path):
    """Red, yellow, green, and none where the output is no terminal."""
    assert [color(value).color.triplet for value in (0, 0.5, 1)] == [(215, 48, 39), (190, 150, 0), (26, 152, 80)]
    assert color(0.25).color.triplet == (202, 99, 20)
    folder = write(tmp_path)
    assert "\x1b" not in shown(folder)
    assert "38;2;26;152;80" in shown(folder, force_terminal=True, color_system="truecolor")


def test_narrow_terminal(tmp_path):
    """A state has one line."""
    tree = shown(write(tmp_path), width=24).splitlines()[2:]
    assert len(tree) == 6
    assert max(map(len, tree)) <= 24
    assert tree[-1].endswith("…")


def test_folders_that_are_no_iterations(tmp_path):
    """A copy that somebody put aside is not looked at."""
    for name in ("iteration-1", "iteration-2.bak", "iteration-old"):
        write(tmp_path / name, states=STATES if name == "iteration-1" else [])
    assert "iteration 1 of 1" in shown(tmp_path).splitlines()[0]


@pytest.mark.parametrize("content", ["PAR1", ""])
@pytest.mark.parametrize("table", ["states", "solutions"])
def test_a_damaged_shard(tmp_path, table, content):
    """It is named, with the cure."""
    folder = write(tmp_path)
    (folder / "values" / "shards" / f"00000-{table}.parquet").write_text(content)
    with pytest.raises(
        ValueError, match=rf"00000-{table}.parquet is damaged or missing: .* Delete .*/00000.json to comp"
    ):
        shown(folder)


def test_damaged_values_of_the_critic(tmp_path):
    folder = write(tmp_path)
    (folder / "data").mkdir()
    for name, content in (("states_critic.parquet", "PAR1"), ("scored.json", "{}")):
        (folder / "data" / name).write_text(content)
    with pytest.raises(
        ValueError, match=r"states_critic.parquet is damaged or missing: .* Delete .*scored.json to score"
    ):
        shown(folder)


@pytest.mark.parametrize("place", ["", "values"])
def test_a_stage(values, place):
    """Each candidate is shown with its counts; the first problem is shown by default."""
    table = Dataset.from_parquet([str(path) for path in sorted((values / "values" / "shards").glob("*states*"))])
    problem_id = table[0]["problem_id"]
    printed = shown(values / place)
    assert printed.splitlines()[0] == f"{values.name}, problem {problem_id}, answer 1"
    assert printed == shown(values / place, problem_id)
    for row in table:
        if row["problem_id"] == problem_id:
            for number, step in enumerate(row["candidates"]):
                counts = f"({row['mc_successes'][number]:g}/{row['mc_rollouts'][number]})"
                assert any(counts in line and step.strip() in line for line in printed.splitlines())


def test_files(tmp_path):
    """State rows or solution rows, with or without counts and `problem_id`; conversations by their last message."""
    folder = write(tmp_path)
    assert "0.60 (3/5)   What⏎now?" in shown(folder / "values" / "shards" / "00000-states.parquet")  # all that is known
    assert "✔ c" in shown(folder / "values" / "shards" / "00000-solutions.parquet")
    messages = [{"role": "user", "content": "Why?"}]
    row = {"prompt": messages, "prefix": ["a\n"], "candidates": ["b"], "advantages": [0.25]}
    Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    printed = shown(tmp_path / "rows.parquet", "Why?")
    assert "problem Why?" in printed
    assert " -     b" in printed


def test_iterations(tmp_path):
    """The last one that has values."""
    for number in (1, 2, 10):
        write(tmp_path / f"iteration-{number}")
    (tmp_path / "iteration-11").mkdir()
    assert shown(tmp_path).startswith(f"{tmp_path.name}, iteration 10 of 11")
    shutil.rmtree(tmp_path / "iteration-10")
    assert "iteration 2 of" in shown(tmp_path)


def test_no_such_problem(values):
    with pytest.raises(
        ValueError, match=r"has no problem 'x' with values. There are \d+: '\d', .* and more\. Problems"
    ):
        print_problem(values, "x")
    assert len(PROBLEMS) == 10


@pytest.mark.parametrize("name", ["nowhere", "empty", "sampled", "text.txt", "other.parquet"])
def test_nothing_to_show(tmp_path, values, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("a text")
    Dataset.from_list([{"a": 1}]).to_parquet(tmp_path / "other.parquet")
    messages = {
        "nowhere": "There is no folder",
        "text.txt": "is no parquet file",
        "other.parquet": "is no parquet file",
    }
    path = values / name if name == "sampled" else tmp_path / name
    with pytest.raises(ValueError, match=messages.get(name, "has no values yet. Run `dapo-trl values`")):
        print_problem(path)


def test_rows_that_disagree_in_the_end():
    """The same words, once as an end and once not, are two nodes; the critic's values go to the right one."""
    row = {"prompt": "", "prefix": [], "candidates": ["a", "a"], "values": [0.5, 1.0], "rewards": [None, 1.0]}
    root = build_tree([row], [])
    add_critic(root, [row | {"critic_values": [0.25, 0.75]}], [])
    assert {key: node.critic_value for key, node in root.children.items()} == {("a", ""): 0.25, ("a", "end"): 0.75}


def test_command(values, capsys):
    assert main(["inspect", str(values)]) == 0
    assert "taken by a kept solution" in capsys.readouterr().out
    assert main(["inspect", str(values / "nowhere")]) == 1
    assert "There is no folder" in capsys.readouterr().err
