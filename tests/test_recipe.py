"""
`recipe.py`: a run gives the same whether it is killed, shared by processes or taken stage by stage.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from datasets import Dataset
from safetensors.torch import load_file, save_file

from commands import ENVIRONMENT, TIMEOUT
from conftest import REPOSITORY, STUDENT, slow
from dapo_trl import StepCriticConfig, StepCriticTrainer
from dapo_trl.critics import mean_values, solution_metrics
from dapo_trl.earlier_outcomes import revalue
from dapo_trl.intervals import Estimate
from dapo_trl.iteration import Iteration
from dapo_trl.model_identity import identify
from dapo_trl.run_folder import critic_folders, held_out_problems
from written import done_work, records, results, rows, seconds


RECIPE = str(REPOSITORY / "examples" / "recipes" / "demo.yaml")
SMALL = (
    *("--num_train_problems", "24", "--num_test_problems", "16", "--shard_size", "4", "--eval_k", "2"),
    *("--critic.num_train_epochs", "1", "--policy.max_steps", "2"),
    *("--allow_unfit_critic", "true"),  # two held-out problems: what comes of the gate is left to test_critic_gate.py
)
TABLES = ("sampled", "solutions", "states")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts, started as a user starts it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "dapo_trl", "run", RECIPE, *SMALL, "--output_dir", str(folder)],
        **{"env": os.environ | ENVIRONMENT, "capture_output": True, "text": True, "timeout": TIMEOUT},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def again(tmp_path, whole):
    """A copy of the whole run, with the times of its files."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_killed_at_random_moments(commands, tmp_path, whole):
    """
    Started again with the same command after every kill: the same rows and results, and no finished work done twice.
    `benchmarks/kill.py` does it to the whole demo.
    """
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = ("run", RECIPE, *SMALL, "--output_dir", folder)
    rng = random.Random(5)
    done: dict[str, tuple[int, int]] = {}
    stopped = set()
    for _ in range(8):
        pid = commands.start(*arguments, output=log)
        time.sleep(rng.uniform(0.1, 0.5 + seconds(whole) / 3))
        if commands.kill(pid) != -signal.SIGKILL:
            break  # it had come to its end
        found = done_work(folder)
        assert done.items() <= found.items(), "finished work was done again or lost"
        done = found
        stopped.add(len(done))
    assert len(stopped) >= 2, "the kills met the run in different places"
    code, text = commands.run(*arguments, output=log)
    assert code == 0, text[-3000:]
    assert done.items() <= done_work(folder).items(), "finished work was done again or lost"
    assert rows(folder) == rows(whole)
    assert results(folder) == results(whole)


def test_what_is_done_is_skipped(commands, tmp_path, again, whole):
    """
    The second time no completion is sampled and no step is trained, also if the folder has been moved; what comes out
    is the same.
    """
    before = records(again)
    code, text = commands.run("run", RECIPE, *SMALL, "--output_dir", again, output=tmp_path / "log")
    assert code == 0, text[-3000:]
    assert records(again) == before
    assert "train_runtime" not in text
    assert "Evaluating" not in text
    assert results(again) == results(whole)


def test_the_same_command_twice(commands, tmp_path, whole):
    """At the same time: the second one is refused, with the process that works there; the first one goes on."""
    folder = tmp_path / "run"
    arguments = ("values", RECIPE, *SMALL, "--output_dir", folder)
    first = commands.start(*arguments, output=tmp_path / "first")
    while not (folder / ".lock").exists() or not (folder / ".lock").read_text():
        time.sleep(0.01)
    code, text = commands.run(*arguments, output=tmp_path / "second")
    assert code == 1
    assert f"dapo-trl: Another command works in {folder} already: process {first} on " in text
    assert commands.wait(first) == 0, (tmp_path / "first").read_text()[-3000:]
    expected = rows(whole)
    assert rows(folder) == {name: expected[name] for name in TABLES}


def test_an_interrupted_training(commands, tmp_path, again):
    """Ctrl-C while a critic is made ends the run, wherever it is; the same command goes on."""
    for name in ("critic", "data", "policy", "policy_monte_carlo"):
        shutil.rmtree(again / name)
    arguments = ("critic", RECIPE, *SMALL, "--critic.num_train_epochs", "1000", "--output_dir", again)
    for delay in (0, 0.3, 0.6):
        pid = commands.start(*arguments, output=tmp_path / "log")
        while not (tmp_path / "log").exists() or "Critic" not in (tmp_path / "log").read_text():
            time.sleep(0.01)
        time.sleep(delay)
        commands.interrupt(pid)
        assert commands.wait(pid, timeout=30) == 130
        text = (tmp_path / "log").read_text()
        assert "stopped. The same command goes on where it was." in text
        assert not (again / "critic" / "stage.json").exists()


def test_stage_by_stage(commands, tmp_path, whole):
    """Each command adds its stage and nothing else; together they give what `run` gives."""
    folder = tmp_path / "run"
    new = {
        "sample": {"sampled"},
        "values": {"values"},
        "critic": {"critic"},
        "score": {"data", "values.png", "calibration.png"},
        "advantages": set(),
        "train": {"policy", "policy_monte_carlo", "before.json", "results.json"},
        "eval": {"evaluations"},
    }
    there: set[str] = set()
    for stage, added in new.items():
        code, text = commands.run(stage, RECIPE, *SMALL, "--output_dir", folder, output=tmp_path / "log")
        assert code == 0, (stage, text[-3000:])
        found = {path.name for path in folder.iterdir() if path.name != ".lock"}
        assert found - there == added, stage
        there = found
    assert rows(folder) == rows(whole)
    assert results(folder) == results(whole)
    (evaluation,) = (folder / "evaluations").glob("*.json")
    assert json.loads(evaluation.read_text())["results"] == results(whole)["before"]


def test_report(whole, tmp_path):
    """Of a run as it is: its accuracies, and the curves of all three models."""
    from dapo_trl.report import write_report

    text = write_report(whole, tmp_path / "report.html").read_text()
    found = results(whole)
    for name in ("before", "policy_critic", "policy_monte_carlo"):
        assert str(Estimate(**found[name]["greedy"])) in text
    for name in ("critic", "policy", "policy_monte_carlo"):
        logs = json.loads((whole / name / "trainer_state.json").read_text())["log_history"]
        assert "train_loss" in logs[-1] or "eval_loss" in logs[-1]
    assert "Nothing was kept of what was logged" not in text


def test_a_critic_measured_while_it_trains(commands, tmp_path, again):
    """Scoring needs no rows to measure with."""
    for name in ("critic", "data"):
        shutil.rmtree(again / name)
    settings = ("--critic.eval_strategy", "steps", "--critic.eval_steps", "1", "--critic.max_steps", "2")
    settings += ("--critic.save_strategy", "steps", "--critic.save_steps", "1")
    settings += ("--critic.load_best_model_at_end", "true")
    code, text = commands.run("score", RECIPE, *SMALL, *settings, "--output_dir", again, output=tmp_path / "log")
    assert code == 0, text[-3000:]
    logs = json.loads((again / "critic" / "trainer_state.json").read_text())["log_history"]
    assert len([row for row in logs if "eval_skill" in row]) >= 2
    assert "looks a little better than it is" in " ".join(text.split())
    assert (again / "data" / "states_critic.parquet").exists()


def test_two_iterations(commands, tmp_path):
    """The first policy samples for the second one and is its start and reference; the critic goes on learning."""
    folder = tmp_path / "run"
    small = ("--num_train_problems", "8", "--num_test_problems", "4", "--eval_k", "1", "--num_solutions", "4")
    arguments = (*SMALL, *small, "--values", "critic", "--iterations", "2", "--policy.min_advantage_gap", "0")
    arguments += ("--num_critics", "2")
    code, text = commands.run("run", RECIPE, *arguments, "--output_dir", folder, output=tmp_path / "log")
    assert code == 0, text[-3000:]
    first, second = folder, folder / "iteration-2"

    def read(path):
        return json.loads(path.read_text())["config"]

    engines = [read(part / "sampled" / "manifest.json")["engine"] for part in (first, second)]
    assert engines[0]["model"] != engines[1]["model"]
    assert engines[0]["tokenizer"] == engines[1]["tokenizer"]
    seeds = [read(part / "sampled" / "manifest.json")["rollouts"]["seed"] for part in (first, second)]
    assert seeds[0] != seeds[1]
    for name in ("policy", "critic", "critic-2"):
        assert read(second / name / "stage.json")["model"] == identify(str(first / name))
    held_out, problems = [], []
    for part in (first, second):
        problems.append({row["problem_id"] for row in rows(part)["solutions"]})
        for place in ("critic/stage.json", "critic-2/stage.json", "data/scored.json"):
            held_out.append(set(json.loads((part / place).read_text())["results"]["held_out"]))
    assert held_out[0] == held_out[1] == held_out[2] and held_out[3] == held_out[4] == held_out[5]
    new = problems[1] - (problems[0] - held_out[0])  # what no critic was trained on
    assert held_out[3] <= new or not new
    heads = [load_file(part / "critic" / "model.safetensors")["score.weight"].flatten() for part in (first, second)]
    assert heads[0] @ heads[1] > 0.9 * heads[0].norm() * heads[1].norm()  # a new head would be at a right angle
    both = json.loads((folder / "results.json").read_text())
    assert [sorted(part) for part in both["iterations"]] == [["critic", "dropped", "policy_critic"]] * 2
    assert both["before"]["num_problems"] == 4
    assert "iteration 2, after, critic values" in text
    assert {"before", "sampled", "policy/accuracy", "iteration-2/sampled"} < set(both["stages"])


def test_outcomes_of_earlier_iterations(commands, tmp_path):
    """They count for states that recur, from the second iteration on; the counts of the rows stay its own."""
    small = ("--num_train_problems", "8", "--num_test_problems", "4", "--eval_k", "1", "--num_solutions", "4")
    arguments = (*SMALL, *small, "--values", "monte_carlo", "--iterations", "2", "--policy.min_advantage_gap", "0")
    folder = tmp_path / "run"
    command = ("run", RECIPE, *arguments, "--kernel_bandwidth", "1.0", "--output_dir", folder)
    code, text = commands.run(*command, output=tmp_path / "log")
    assert code == 0, text[-3000:]
    first, second = (
        Dataset.from_parquet(str(part / "data" / "states_monte_carlo.parquet"), cache_dir=str(tmp_path / "cache"))
        for part in (folder, folder / "iteration-2")
    )
    assert "effective_rollouts" not in first.column_names
    more = [
        effective > own
        for row in second
        for effective, own in zip(row["effective_rollouts"], row["mc_rollouts"], strict=True)
    ]
    assert any(more) and not all(more)
    stage = json.loads((folder / "iteration-2" / "policy_monte_carlo" / "stage.json").read_text())["config"]
    assert stage["kernel_bandwidth"] == 1.0 and len(stage["earlier"]) == 1


@pytest.mark.parametrize("kind", ["shift", "batch"])
def test_critics_of_the_first_iteration(commands, tmp_path, kind):
    """The second iteration trains none: its rows have the first ones' values, moved to its own outcomes."""
    small = ("--num_train_problems", "8", "--num_test_problems", "4", "--eval_k", "1", "--num_solutions", "4")
    arguments = (*SMALL, *small, "--values", "shrinkage", "--iterations", "2", "--policy.min_advantage_gap", "0")
    arguments += ("--num_critics", "2", "--later_critics", kind)
    folder = tmp_path / "run"
    code, text = commands.run("run", RECIPE, *arguments, "--output_dir", folder, output=tmp_path / "log")
    assert code == 0, text[-3000:]
    second = folder / "iteration-2"
    assert not list(second.glob("critic*"))
    assert critic_folders(second) == critic_folders(folder) == [folder / "critic", folder / "critic-2"]
    scored = json.loads((second / "data" / "scored.json").read_text())
    assert scored["config"]["later_critics"] == kind
    found = json.loads((folder / "results.json").read_text())["iterations"][1]["critic"]
    assert found["shift"] == scored["results"]["shift"]
    assert f"their log-odds shifted by {found['shift']:+.2f}," in " ".join(text.split())
    config = StepCriticConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    tables = {
        name: Dataset.from_parquet(str(second / "data" / f"{name}_critic.parquet"), cache_dir=str(tmp_path / "cache"))
        for name in ("solutions", "states")
    }
    critics = [StepCriticTrainer(str(path), config) for path in critic_folders(folder)]
    raw = {
        name: mean_values([critic.predict_values(table.remove_columns("critic_values")) for critic in critics])
        for name, table in tables.items()
    }
    expected = revalue(**raw, with_ratio=kind == "batch")
    for table, wanted in ((tables["solutions"], expected.solutions), (tables["states"], expected.states)):
        for values, others in zip(table["critic_values"], wanted["critic_values"], strict=True):
            assert values == pytest.approx(others, abs=1e-4)
    before = done_work(folder)
    code, text = commands.run("run", RECIPE, *arguments, "--output_dir", folder, output=tmp_path / "log")
    assert code == 0, text[-3000:]
    assert done_work(folder) == before
    arguments = (*arguments[:-1], "train")
    code, text = commands.run("run", RECIPE, *arguments, "--output_dir", folder, output=tmp_path / "log")
    assert code == 1
    assert f"have the values of `num_critics: 2`, `later_critics: {kind}`, which is now `num_critics: 2`. " in text
    assert not list(second.glob("critic*"))


@pytest.mark.parametrize(
    ("valued_by", "problems", "expected"),
    [
        (None, ["a", "b", "c", "new", "newer"], {"b", "new"}),
        (Path("run"), ["a", "b", "c", "new", "newer"], {"b", "new", "newer"}),  # nothing is trained: all that is new
        (None, ["a", "c"], {"a"}),
        (Path("run"), ["c", "a"], {"c"}),
    ],
)
def test_what_a_later_critic_is_measured_on(monkeypatch, valued_by, problems, expected):
    """Problems that no critic before was trained on; if there is none, one of those, and a warning."""
    warnings = []
    monkeypatch.setattr("dapo_trl.iteration.warn", warnings.append)
    iteration = Iteration.__new__(Iteration)
    iteration.valued_by, iteration._is_main = valued_by, True
    iteration.earlier = [SimpleNamespace(held_out={"b"}, trained={"a"}), SimpleNamespace(held_out=set(), trained={"c"})]
    assert iteration._choose_held_out(problems) == expected
    assert len(warnings) == (len(problems) == 2)
    iteration.earlier = ()
    assert iteration._choose_held_out(problems) == (set(problems) if valued_by else {problems[0]})


def test_a_second_iteration_later(commands, tmp_path):
    """
    A finished run goes on with another iteration: the first is not done again. Asked for one again, it has one; so it
    is with a folder whose first iteration lies where that of several once lay.
    """
    folder, log = tmp_path / "run", tmp_path / "log"
    small = ("--num_train_problems", "8", "--num_test_problems", "4", "--eval_k", "1", "--num_solutions", "4")
    command = ("run", RECIPE, *SMALL, *small, "--values", "critic", "--policy.min_advantage_gap", "0")
    command += ("--policy.max_steps", "1")
    one = commands.run(*command, "--output_dir", folder, output=log)
    assert one[0] == 0, one[1][-3000:]
    begun, stages = records(folder), set(json.loads((folder / "results.json").read_text())["stages"])
    code, text = commands.run(*command, "--iterations", "2", "--output_dir", folder, output=log)
    assert code == 0, text[-3000:]
    assert begun.items() < records(folder).items()
    assert not (folder / "iteration-1").exists()
    both = json.loads((folder / "results.json").read_text())
    assert len(both["iterations"]) == 2
    assert set(both["stages"]) - stages == {f"iteration-2/{name}" for name in stages - {"before"}}
    done = records(folder)
    assert commands.run(*command, "--output_dir", folder, output=log)[0] == 0
    assert records(folder) == done
    assert set(json.loads((folder / "results.json").read_text())["stages"]) == stages
    (folder / "iteration-1").mkdir()
    for name in ("sampled", "values", "critic", "data", "policy"):
        (folder / name).rename(folder / "iteration-1" / name)
    done = records(folder)
    code, text = commands.run(*command, "--iterations", "2", "--output_dir", folder, output=log)
    assert code == 0, text[-3000:]
    assert records(folder) == done


@pytest.mark.parametrize(
    ("arguments", "place", "difference"),
    [
        (["--num_solutions", "6"], "sampled", "`rollouts.num_solutions` was 8, is now 6"),
        (["--num_completions", "6"], "values", "`rollouts.num_completions` was 8, is now 6"),
        (["--critic.learning_rate", "1e-3"], "critic", "`arguments.learning_rate` was 0.0005, is now 0.001"),
        (["--lora_r", "4"], "critic", "`model_config.lora_r` was None, is now 4"),
        (["--policy.beta", "0.2"], "policy", "`arguments.beta` was 0.03, is now 0.2"),
        (["--eval_k", "1"], "before.json", "`k` was 2, is now 1"),
        (["--dtype", "bfloat16"], "before.json", "`loading.dtype` was 'float32', is now 'bfloat16'"),
    ],
    ids=lambda value: value if isinstance(value, str) and "`" not in value else "",
)
def test_changed_settings_are_refused(commands, tmp_path, again, arguments, place, difference):
    """With what differs; nothing is touched. Deleting what the message names is the cure."""
    before = records(again)
    command = ("run", RECIPE, *SMALL, *arguments, "--output_dir", again)
    code, text = commands.run(*command, output=tmp_path / "log")
    assert code == 1
    assert f"{again / place} holds results of another configuration: {difference}" in text
    assert "delete this one to start anew" in text
    assert "Traceback" not in text
    assert records(again) == before


def test_the_same_model_by_another_path(commands, tmp_path, again, monkeypatch):
    """Weights say which model it is: another path of the same goes on, other weights at the same path do not."""
    before = records(again)
    model = Path(shutil.copytree(STUDENT, tmp_path / "model"))
    command = ("run", RECIPE, *SMALL, "--model_name_or_path", model, "--output_dir", again)
    code, text = commands.run(*command, output=tmp_path / "log")
    assert code == 0, text[-3000:]
    assert records(again) == before
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, model / "model.safetensors")
    code, text = commands.run(*command, output=tmp_path / "log")
    assert code == 1
    assert "before.json holds results of another configuration: `model.weights` was " in text
    command = ("critic", RECIPE, *SMALL, "--critic_model_name_or_path", model, "--output_dir", again)
    code, text = commands.run(*command, output=tmp_path / "log")
    assert code == 1
    assert "critic holds results of another configuration: `model.weights` was " in text
    assert records(again) == before


def test_the_cure_for_changed_settings(commands, tmp_path, again):
    """A policy of other settings, and its accuracy, after the old one's folder is gone; all else is kept."""
    shutil.rmtree(again / "policy")
    before = records(again)
    command = ("run", RECIPE, *SMALL, "--policy.beta", "0.2", "--values", "critic", "--output_dir", again)
    code, text = commands.run(*command, output=tmp_path / "log")
    assert code == 0, text[-3000:]
    assert before.items() <= records(again).items()
    assert json.loads((again / "policy" / "stage.json").read_text())["config"]["arguments"]["beta"] == 0.2
    assert (again / "policy" / "accuracy.json").exists()


def test_shrinkage(commands, tmp_path, again):
    """A third source of values, from what is there; what the critic is worth is among the results."""
    before = records(again)
    command = ("run", RECIPE, *SMALL, "--values", "shrinkage", "--output_dir", again)
    code, text = commands.run(*command, output=tmp_path / "log")
    assert code == 0, text[-3000:]
    assert before.items() <= records(again).items()
    results = json.loads((again / "results.json").read_text())
    assert f"the critic is worth {results['critic']['prior_strength']:.1f} rollouts" in text
    assert results["policy_shrinkage"]["num_problems"] == 16
    assert (again / "policy_shrinkage" / "model.safetensors").exists()
    rows = Dataset.from_parquet(str(again / "data" / "states_shrinkage.parquet"))
    assert {"shrinkage_values", "shrinkage_errors", "critic_values", "values"} <= set(rows.column_names)


def test_critic_of_candidates(commands, tmp_path, again):
    """It learns from more rows, those that no kept solution takes too; a critic of other states is not taken for it."""
    command = ("score", RECIPE, *SMALL, "--critic_states", "candidates", "--output_dir", again)
    code, text = commands.run(*command, output=tmp_path / "log")
    assert code != 0
    assert "is now 'candidates'" in text
    solutions = json.loads((again / "critic" / "stage.json").read_text())["results"]["dropped"]["train"]["rows"]
    for name in ("critic", "data"):
        shutil.rmtree(again / name)
    code, text = commands.run(*command, output=tmp_path / "log")
    assert code == 0, text[-3000:]
    assert json.loads((again / "critic" / "stage.json").read_text())["results"]["dropped"]["train"]["rows"] > solutions


def test_several_critics(commands, tmp_path, again):
    """
    The first is that of a run with one; the others differ from it. Rows have the mean of their values, which is
    measured, and is not taken for the value of one.
    """
    single, before = load_file(again / "critic" / "model.safetensors"), records(again)
    command = ("score", RECIPE, *SMALL, "--num_critics", "3", "--output_dir", again)
    code, text = commands.run(*command, output=tmp_path / "log")
    assert code != 0
    assert "have the values of `num_critics: 1`, which is now `num_critics: 3`" in text and records(again) == before
    shutil.rmtree(again / "data")
    two = ("critic", RECIPE, *SMALL, "--num_critics", "2", "--output_dir", again)
    assert commands.run(*two, output=tmp_path / "log")[0] == 0
    before = done_work(again)
    code, text = commands.run(*command, output=tmp_path / "log")
    assert code == 0, text[-3000:]
    assert before.items() < done_work(again).items()  # the first two are not trained again
    assert "The mean of 3 critics on" in text
    folders = [again / name for name in ("critic", "critic-2", "critic-3")]
    heads = [load_file(folder / "model.safetensors")["score.weight"] for folder in folders]
    assert heads[0].equal(single["score.weight"])
    assert not heads[0].equal(heads[1]) and not heads[1].equal(heads[2])

    rows = Dataset.from_parquet(str(again / "data" / "states_critic.parquet"))
    config = StepCriticConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    values = [
        StepCriticTrainer(str(folder), config).predict_values(rows.remove_columns("critic_values"))["critic_values"][:]
        for folder in folders
    ]
    for found, each in zip(rows["critic_values"], zip(*values, strict=True), strict=True):
        assert found == pytest.approx([sum(critics) / 3 for critics in zip(*each, strict=True)], abs=1e-5)

    unseen = held_out_problems(rows["problem_id"])
    solutions = Dataset.from_parquet(str(again / "data" / "solutions_critic.parquet"))
    skill = solution_metrics(solutions.filter(lambda row: row["problem_id"] in unseen))["skill"]
    assert f"skill {skill:.1%}" in text
    for folder in folders:
        own = json.loads((folder / "stage.json").read_text())["results"]["metrics"]["eval_skill"]
        card = (folder / "README.md").read_text()
        assert "mean value of 3 critics" in card
        assert f"{own:.4g}" in card and f"{skill:.4g}" in card
    shutil.rmtree(again / "data")
    code, text = commands.run("score", RECIPE, *SMALL, "--output_dir", again, output=tmp_path / "log")
    assert code == 0, text[-3000:]
    assert critic_folders(again) == folders[:1]  # those of before are there, and not used


def test_policy_without_anchors(commands, tmp_path, again):
    """The demo's policy has learned from states with nothing to compare; one that has not is another policy."""
    command = ("train", RECIPE, *SMALL, "--anchor_states", "false", "--output_dir", again)
    code, text = commands.run(*command, output=tmp_path / "log")
    assert code != 0
    assert "anchor_states" in text
    stage = again / "policy" / "stage.json"
    anchored = json.loads(stage.read_text())["results"]["dropped"]["train"]["rows"]
    for name in ("policy", "policy_monte_carlo"):
        shutil.rmtree(again / name)
    code, text = commands.run(*command, output=tmp_path / "log")
    assert code == 0, text[-3000:]
    compared = json.loads(stage.read_text())["results"]["dropped"]["train"]["rows"]
    assert anchored > compared == len(Dataset.from_parquet(str(again / "data" / "states_critic.parquet")))


def test_reliability(commands, tmp_path, again):
    """All sources of values say how far their advantages can be relied on, and policies are trained with that."""
    for name in ("policy", "policy_monte_carlo"):
        shutil.rmtree(again / name)
    errors = {"critic": "critic_errors", "monte_carlo": "value_errors", "shrinkage": "shrinkage_errors"}
    for values, least, sources in (("both", 0, ("critic", "monte_carlo")), ("shrinkage", 0.5, ("shrinkage",))):
        options = ("--policy.reliability_weights", "true", "--policy.min_reliability", least, "--values", values)
        code, text = commands.run("run", RECIPE, *SMALL, *options, "--output_dir", again, output=tmp_path / "log")
        assert code == 0, text[-3000:]
        for source in sources:
            rows = Dataset.from_parquet(str(again / "data" / f"states_{source}.parquet"))
            assert {errors[source], "advantage_errors", "reliabilities"} <= set(rows.column_names)
            numbers = [number for row in rows["reliabilities"] for number in row]
            stage = again / ("policy" if source == "critic" else f"policy_{source}") / "stage.json"
            dropped = json.loads(stage.read_text())["results"]["dropped"]["train"]
            assert dropped["steps_unreliable"] == sum(number < least for number in numbers) < len(numbers)


def test_checkpoints_of_other_settings_are_refused(commands, tmp_path, again):
    """A critic that was killed after a checkpoint goes on with its own settings only, and from where it was."""
    for name in ("critic", "data", "policy", "policy_monte_carlo"):
        shutil.rmtree(again / name)
    saving = ("--critic.save_strategy", "steps", "--critic.save_steps", "1")
    command = ("critic", RECIPE, *SMALL, *saving, "--output_dir", again)
    code, text = commands.run(*command, output=tmp_path / "log")
    assert code == 0, text[-3000:]
    last = max((again / "critic").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    (again / "critic" / "stage.json").unlink()  # as if killed before the end
    (last / "trainer_state.json").write_text('{"epoch": 0.')  # and while this was written
    code, text = commands.run(*command, "--critic.learning_rate", "1e-3", output=tmp_path / "log")
    assert code == 1
    assert "critic holds results of another configuration: `arguments.learning_rate` was 0.0005" in text
    code, text = commands.run(*command, output=tmp_path / "log")
    assert code == 0, text[-3000:]
    assert f"{int(last.name.partition('-')[2]) - 1}/" in text  # the progress bar begins there


ZERO2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "DS_ACCELERATOR": "cpu",
}


def ranks(commands, folder, *arguments, logs, **environment):
    """Two processes that know of each other, without a launcher; their exit codes and output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    pids = [
        commands.start(
            *arguments, "--output_dir", folder, output=logs / f"log-{rank}", RANK=rank, LOCAL_RANK=rank, **shared
        )
        for rank in ("0", "1")
    ]
    return [commands.wait(pid) for pid in pids], [(logs / f"log-{rank}").read_text() for rank in (0, 1)]


def test_two_processes(commands, tmp_path, whole):
    """They share the shards, and write the rows that one process writes."""
    codes, texts = ranks(commands, tmp_path / "run", "values", RECIPE, *SMALL, logs=tmp_path)
    assert codes == [0, 0], texts
    assert "24 problems to train on, 16 held out; 2 processes" in texts[0]
    assert "problems to train on" not in texts[1]  # one of them speaks
    expected = rows(whole)
    assert rows(tmp_path / "run") == {name: expected[name] for name in TABLES}
    writers = [text.count("problems/s") > 0 for text in texts]
    assert writers == [True, True]


SERVED = ("--engine", "openai", "--server_urls", "http://nowhere:1")
ADAPTERS = ("--use_peft", "--lora_target_modules", "all-linear")


@pytest.mark.parametrize(
    ("environment", "options"),
    [
        pytest.param({}, (), id="ddp-full"),
        slow({}, ADAPTERS, id="ddp-adapters"),
        slow(ZERO2, (), id="zero2-full"),
        pytest.param(ZERO2, ADAPTERS, id="zero2-adapters"),
    ],
)
def test_two_processes_train(commands, tmp_path, again, environment, options):
    """From the values on, both find the same results. Adapters are merged for the stages that follow."""
    for name in ("critic", "data", "policy", "policy_monte_carlo"):
        shutil.rmtree(again / name)
    arguments = ("train", RECIPE, *SMALL, "--values", "critic", *options)
    codes, texts = ranks(commands, again, *arguments, logs=tmp_path, **environment)
    assert codes == [0, 0], texts
    assert json.loads((again / "results.json").read_text())["policy_critic"]["num_problems"] == 16
    for name in ("critic", "policy"):
        files = ("adapter_model.safetensors", "merged/model.safetensors") if options else ("model.safetensors",)
        assert all((again / name / file).exists() for file in files)


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        (ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, [], "DeepSpeed ZeRO-3 holds the model in parts, but `engi"),
        (ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ["--use_peft"], "DeepSpeed ZeRO-3 keeps the model in parts"),
        (ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, SERVED, "DeepSpeed ZeRO-3 would save models without the we"),
        ({"ACCELERATE_USE_FSDP": "true"}, [], "FSDP holds the model in parts, but `engine: transformers`"),
        ({"ACCELERATE_USE_FSDP": "true"}, ["--use_peft"], "FSDP keeps the model in parts, but the adapter of `use_pe"),
    ],
)
def test_models_in_parts_are_refused(commands, tmp_path, environment, arguments, message):
    """Before anything is sampled, with the cure."""
    command = ("run", RECIPE, *SMALL, "--output_dir", tmp_path / "run", *arguments)
    code, text = commands.run(*command, output=tmp_path / "log", **environment)
    assert code == 2, text
    assert f"dapo-trl: `critic`: {message}" in text
    assert "Use DeepSpeed ZeRO-2" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("victim", [slow(0), 1])
def test_one_of_two_processes_is_killed(commands, tmp_path, whole, victim):
    """The launch ends with an error, also if the other one waits; the same command finishes."""
    folder = tmp_path / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launch += ["-m", "dapo_trl", "values", RECIPE, *SMALL, "--output_dir", str(folder)]
    with (tmp_path / "log").open("w") as log:
        launched = subprocess.Popen(launch, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)
        end = time.monotonic() + TIMEOUT
        while not list(folder.glob("sampled/shards/*.json")) and launched.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        workers = [child for child in psutil.Process(launched.pid).children() if "dapo_trl" in child.cmdline()]
        (one,) = [worker for worker in workers if worker.environ()["RANK"] == str(victim)]
        one.kill()
        assert launched.wait(TIMEOUT) != 0
    text = (tmp_path / "log").read_text()
    assert "2 processes" in text
    assert "Signal 9" in text or "exitcode" in text
    codes, texts = ranks(commands, folder, "values", RECIPE, *SMALL, logs=tmp_path)
    assert codes == [0, 0], texts
    expected = rows(whole)
    assert rows(folder) == {name: expected[name] for name in TABLES}
