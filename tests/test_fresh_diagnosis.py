"""
`fresh_diagnosis.py`: a critic against completions that no run has drawn.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import REPOSITORY, ScriptedEngine, answer_reward
from dapo_trl.engines import sample_seed
from dapo_trl.fresh_diagnosis import _generator, count_afresh, fresh_config, plant, spread_out, with_counts
from dapo_trl.rollouts import RolloutConfig
from dapo_trl.values import Counts


RECIPE = str(REPOSITORY / "examples" / "recipes" / "demo.yaml")
SMALL = (
    *("--num_train_problems", "40", "--num_test_problems", "4", "--critic.max_steps", "1", "--values", "critic"),
    *("--allow_unfit_critic", "true"),
)


def ids(engine, *steps):
    return [list(engine.tokenizer(step).input_ids) for step in steps]


@pytest.fixture
def engine():
    """After "a" half of all completions are right, after "b" none."""
    script = {"Q": ["a\nx\n1", "b\n0"], "Qa\n": ["x\n1", "y\n0"], "Qb\n": ["0"], "Qa\nx\n": ["1"], "Qa\ny\n": ["0"]}
    return ScriptedEngine(script)


@pytest.fixture
def rows(engine):
    """One solution, and the candidates of its first two states; one of them ends the solution."""
    problem = {"problem_id": "p", "prompt": "Q", "answer": "1", "prompt_ids": ids(engine, "Q")[0]}
    counted = {"mc_successes": [1.0, 1.0, 1.0, 1.0], "mc_rollouts": [2, 1, 1, 1]}
    steps = ["a\n", "x\n", "1"]
    solution = problem | counted | {"completions": steps, "completions_ids": ids(engine, *steps)}
    counted = {"mc_successes": [1.0, 0.0], "mc_rollouts": [1, 1]}
    first = {"prefix": [], "prefix_ids": [], "candidates": ["a\n", "b\n"], "candidates_ids": ids(engine, "a\n", "b\n")}
    second = {"prefix": ["a\n"], "prefix_ids": ids(engine, "a\n"), "candidates": ["x\n", "0"]}
    second |= {"candidates_ids": ids(engine, "x\n", "0"), "rewards": [None, 0.0]}
    return [solution], [problem | counted | first | {"rewards": [None, None]}, problem | counted | second]


def test_every_state_and_candidate(engine, rows, tmp_path):
    """A state that only a candidate leads to gets its own; what ends a solution is known, and gets none."""
    config = RolloutConfig(num_completions=4)
    assert set(plant(*rows, config).states) == {(), ("a\n",), ("a\n", "x\n"), ("b\n",)}
    counts = count_afresh(*rows, engine, answer_reward, config, tmp_path)
    expected = {(): (2, 4), ("a\n",): (3, 4), ("a\n", "x\n"): (4, 4), ("b\n",): (0, 4)}
    assert counts == {("p", state): Counts(*each) for state, each in expected.items()}
    (solution,), states = with_counts(*rows, counts)
    assert solution["mc_successes"] == [2.0, 3.0, 4.0, 1.0]
    assert solution["mc_rollouts"] == [4, 4, 4, 1]
    assert [row["mc_successes"] for row in states] == [[3.0, 0.0], [4.0, 0.0]]
    assert [row["mc_rollouts"] for row in states] == [[4, 4], [4, 1]]
    drawn = len(engine.requests)
    assert count_afresh(*rows, engine, answer_reward, config, tmp_path) == counts
    assert len(engine.requests) == drawn  # they are there
    with pytest.raises(ValueError, match=r"`rollouts.num_completions` was 4, is now 8"):
        count_afresh(*rows, engine, answer_reward, RolloutConfig(num_completions=8), tmp_path)


def test_a_state_without_completions_is_left_out(rows):
    (solution,), states = with_counts(*rows, {})
    assert solution["mc_rollouts"] == [0, 0, 0, 1]
    assert [row["mc_rollouts"] for row in states] == [[0, 0], [0, 1]]


def test_other_seeds():
    """Than any run has; all else is as in the run."""
    rollouts = {"num_solutions": 8, "num_kept": 4, "num_completions": 8, "seed": 3, "reuse": False}
    rollouts |= {"min_completions": 4, "separator": ".", "sampling": {"max_new_tokens": 9, "temperature": 0.7}}
    config = fresh_config(rollouts, 64)
    assert config.seed < 0
    assert (config.num_completions, config.min_completions, config.reuse) == (64, None, True)
    assert (config.separator, config.sampling.temperature, config.sampling.max_new_tokens) == (".", 0.7, 9)
    assert fresh_config(rollouts | {"seed": 4}, 64).seed != config.seed
    assert sample_seed(config.seed, "p", (), 0) != sample_seed(3, "p", (), 0)


def test_the_generator_of_an_iteration(tmp_path):
    """Of the first the recipe's model, of later ones the policy before; also where the first has its own folder."""
    recipe = SimpleNamespace(folder=tmp_path, model="model", arguments=SimpleNamespace(values="shrinkage"))
    first, second, third = tmp_path / "iteration-1", tmp_path / "iteration-2", tmp_path / "iteration-3"
    for folder in (second, third):
        folder.mkdir()
    assert _generator(recipe, tmp_path) == "model"
    assert _generator(recipe, second) == str(tmp_path / "policy_shrinkage")
    assert _generator(recipe, third) == str(second / "policy_shrinkage")
    first.mkdir()
    assert _generator(recipe, first) == "model"
    assert _generator(recipe, second) == str(first / "policy_shrinkage")


def test_problems_are_spread_out():
    solutions = [{"problem_id": str(number // 2)} for number in range(20)]
    states = [{"problem_id": str(number)} for number in range(10)]
    for most, expected in ((None, 10), (3, 3), (99, 10)):
        chosen = spread_out(solutions, states, most)
        assert len({row["problem_id"] for row in chosen[0]}) == len(chosen[1]) == expected
        assert len(chosen[0]) == 2 * expected
    assert [row["problem_id"] for row in spread_out(solutions, states, 2)[1]] == ["0", "5"]


# ---- Of a run ----


@pytest.fixture(scope="module")
def scored(commands, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored") / "run"
    code, text = commands.run("score", RECIPE, *SMALL, "--output_dir", folder, output=folder.parent / "log")
    assert code == 0, text[-3000:]
    return folder


def test_of_a_run(commands, tmp_path, scored):
    """By its recipe; kept beside it, apart from the gate's own, and not drawn again."""
    folder = Path(shutil.copytree(scored, tmp_path / "run"))
    gate, figure = ((folder / name).read_bytes() for name in ("data/diagnosis.json", "calibration.png"))
    command = ("diagnose", RECIPE, *SMALL, "--output_dir", folder, "--num_completions", "32")
    code, text = commands.run(*command, output=tmp_path / "log")
    assert code == 0, text[-3000:]
    place = folder / "diagnosis" / "32-completions"
    found = json.loads((place / "diagnosis.json").read_text())
    assert 30 * found["num_states"] < found["num_rollouts"] <= 40 * found["num_states"]
    assert found["num_problems"] == json.loads(gate)["num_problems"]
    assert found["num_pairs"] > json.loads(gate)["num_pairs"]  # more can be told apart
    assert (folder / "data" / "diagnosis.json").read_bytes() == gate
    assert (folder / "calibration.png").read_bytes() == figure != (place / "calibration.png").read_bytes()
    done = {path: path.stat().st_mtime_ns for path in place.glob("shards/*")}
    assert commands.run(*command, output=tmp_path / "log")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in place.glob("shards/*")} == done
    code, text = commands.run(*command, "--max_problems", "2", output=tmp_path / "log")
    assert code == 0, text[-3000:]
    assert "of 2 held-out problems" in text
    assert commands.run("diagnose", RECIPE, *SMALL, "--output_dir", folder, output=tmp_path / "log")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["{run}", "--num_completions", "8"],
            2,
            "dapo-trl diagnose recipe.yaml --output_dir {run} --num_completions 8",
        ),
        (["{run}", "--seed", "1"], 2, "There is no setting '--seed'"),
        ([RECIPE, "--num_completions", "1"], 2, "`--num_completions` must be at least 2, got 1."),
        ([RECIPE, "--max_problems", "5"], 2, "`--max_problems` is about fresh completions"),
        ([RECIPE, "--sed", "1"], 2, "There is no setting '--sed'; did you mean 'seed'?"),
        (["nowhere"], 2, "There is no recipe 'nowhere'"),
        ([RECIPE, "--output_dir", "{run}/nothing"], 1, "{run}/nothing has no values by a critic"),
        (
            [RECIPE, "--output_dir", "{run}", "--num_completions", "8", "--dtype", "bfloat16"],
            1,
            "`dtype` was 'float32'",
        ),
    ],
)
def test_wrong_command_lines(commands, tmp_path, scored, arguments, code, message):
    """Another model than that of the run, too: completions of it say nothing about the states of this one."""
    given = [argument.format(run=scored) for argument in arguments]
    found, text = commands.run("diagnose", *given, output=tmp_path / "log")
    assert found == code, text[-2000:]
    assert message.format(run=scored) in text
    assert "Traceback" not in text
