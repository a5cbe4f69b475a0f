"""
`critic_gate.py`, and how a run goes through it: a critic without skill is refused, whatever was done before.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

import dapo_trl.diagnosing
from conftest import REPOSITORY
from dapo_trl.critic_gate import UnfitCriticError, refuse_unfit
from dapo_trl.diagnosing import describe, diagnose_once, record
from dapo_trl.diagnosis import diagnose
from dapo_trl.shrinkage import fit_strength, shrinkage_values, with_mean_prior
from test_diagnosis import constant, inverted, noisy, random_head, world
from written import records


RECIPE = str(REPOSITORY / "examples" / "recipes" / "demo.yaml")
SMALL = (
    *("--num_train_problems", "24", "--num_test_problems", "8", "--shard_size", "12", "--eval_k", "1"),
    *("--critic.max_steps", "1", "--policy.max_steps", "1", "--values", "critic"),
)
ALLOWED = ("--allow_unfit_critic", "true")


@pytest.fixture(scope="module")
def scored(commands, tmp_path_factory):
    """A run whose critic was trained for one step, up to its scores; and what was said."""
    folder = tmp_path_factory.mktemp("scored") / "run"
    outcome = commands.run("score", RECIPE, *SMALL, "--output_dir", folder, output=folder.parent / "log")
    return folder, outcome


@pytest.fixture
def again(tmp_path, scored):
    return Path(shutil.copytree(scored[0], tmp_path / "run"))


def diagnosis(folder):
    return json.loads((folder / "data" / "diagnosis.json").read_text())


def test_an_unfit_critic_is_refused(scored):
    """After its scores are written: with the numbers, and all that can be tried."""
    folder, (code, text) = scored
    assert code == 1
    message = text.partition("dapo-trl: ")[2]
    assert message.startswith(f"The critic in {folder / 'critic'} is refused. ")
    found = diagnosis(folder)
    assert not found["is_fit"]
    for part in (found["verdict"], describe(found), "do not use it", "skill above 5%"):
        assert part in message, part
    for cure in ("num_train_problems", "critic_model_name_or_path", "learning_rate", "monte_carlo", "shrinkage"):
        assert cure in message, cure
    assert "every tenth of the problems that have right and wrong solutions" in message
    assert "Traceback" not in text
    assert found["verdict"] in " ".join(text.partition("dapo-trl: ")[0].split())  # said where it was measured, too
    assert (folder / "calibration.png").stat().st_size > 5_000
    assert not (folder / "policy").exists()


def test_several_unfit_critics_are_refused(scored, tmp_path):
    """The message says whose mean it is, and names all folders that a new training has to do without."""
    folder = tmp_path / "run"
    for name in ("critic", "critic-2"):
        (folder / name).mkdir(parents=True)
    with pytest.raises(UnfitCriticError) as refused:
        refuse_unfit(diagnosis(scored[0]), folder)
    assert str(refused.value).startswith(f"The mean of 2 critics in {folder} is refused. ")
    assert "after deleting `critic`, `critic-2` and `data`, here" in str(refused.value)


def test_values_of_the_first_iterations_critic_are_refused(scored, tmp_path):
    """Not by advice to train that critic anew, which would undo the first iteration."""
    folder = tmp_path / "run" / "iteration-2"
    with pytest.raises(UnfitCriticError) as refused:
        refuse_unfit(diagnosis(scored[0]), folder, is_shifted=True)
    message = str(refused.value)
    assert message.startswith(f"What the first iteration's critic says in {folder} is refused. ")
    assert f"`later_critics: train`, after deleting {folder / 'data'}." in message
    assert "deleting `critic`" not in message


def test_refused_again_and_allowed(commands, tmp_path, again):
    """
    A second time without scoring anew; allowed, the run goes on at once; finished, it is refused without that. Nothing
    is done twice.
    """
    log, command = tmp_path / "log", ("run", RECIPE, *SMALL, "--output_dir", again)
    before = records(again)
    code, text = commands.run(*command, output=log)
    assert code == 1
    assert "is refused" in text
    assert "Critic values:" not in text
    assert before.items() <= records(again).items()
    code, text = commands.run(*command, *ALLOWED, output=log)
    assert code == 0, text[-3000:]
    assert "Critic values:" not in text
    assert before.items() <= records(again).items()
    results = json.loads((again / "results.json").read_text())
    assert results["arguments"]["allow_unfit_critic"]
    known = diagnosis(again)
    assert results["critic"]["diagnosis"] | {name: known[name] for name in ("scored", "rules")} == known
    done = records(again)
    assert commands.run(*command, output=log)[0] == 1
    assert commands.run(*command, *ALLOWED, output=log)[0] == 0
    assert records(again) == done


def test_shrinkage_without_the_critic(commands, tmp_path, again):
    """It is not refused, but towards the mean outcome; the critic's values stay in the rows. Allowed, it is used."""
    log, command = tmp_path / "log", ("advantages", RECIPE, *SMALL, "--values", "shrinkage", "--output_dir", again)
    code, text = commands.run(*command, output=log)
    assert code == 0, text[-3000:]
    assert "The critic is not used: values are shrunk towards the mean outcome" in text
    scored = Dataset.from_parquet(str(again / "data" / "states_critic.parquet"))
    held_out = set(list(dict.fromkeys(scored["problem_id"]))[::10])
    solutions = Dataset.from_parquet(str(again / "data" / "solutions_critic.parquet"))
    held_out = set(list(dict.fromkeys(solutions["problem_id"]))[::10])
    unseen = scored.filter(lambda row: row["problem_id"] in held_out)
    mean = sum(map(sum, unseen["mc_successes"])) / sum(map(sum, unseen["mc_rollouts"]))
    prior = with_mean_prior(scored, unseen)
    strength = fit_strength(prior.filter(lambda row: row["problem_id"] in held_out))
    rows = Dataset.from_parquet(str(again / "data" / "states_shrinkage.parquet"))
    for row, old in zip(rows, scored, strict=True):
        k, n = row["mc_successes"], row["mc_rollouts"]
        expected = shrinkage_values(k, n, [mean] * len(k), strength).values
        np.testing.assert_allclose(row["shrinkage_values"], expected)
        assert row["critic_values"] == old["critic_values"]
    code, text = commands.run(*command, *ALLOWED, output=log)
    assert code == 0, text[-3000:]
    assert "the critic is worth" in text


def test_a_critic_that_cannot_be_measured(commands, tmp_path):
    """One held-out problem: said, with what would help; not a crash."""
    few = ("--num_train_problems", "6", "--num_solutions", "4", "--num_kept", "2", "--num_completions", "4")
    command = ("score", RECIPE, *SMALL, *few, "--output_dir", tmp_path / "run")
    code, text = commands.run(*command, output=tmp_path / "log")
    assert code == 1
    message = text.partition("dapo-trl: ")[2]
    assert "is refused. The critic could not be measured. A critic is measured on states of at least two" in message
    assert "every tenth" in message
    assert commands.run(*command, *ALLOWED, output=tmp_path / "log")[0] == 0


# ---- The decision ----


@pytest.mark.parametrize("critic", [constant, inverted, random_head])
def test_broken_critics_are_refused(critic, tmp_path):
    found = record(diagnose(*world(critic), num_resamples=100))
    with pytest.raises(
        UnfitCriticError, match=r"is refused\. The critic .* On 420 states of 60 held-out problems"
    ) as error:
        refuse_unfit(found, tmp_path)
    assert "every tenth" not in str(error.value)


def test_working_critics_pass(tmp_path):
    refuse_unfit(record(diagnose(*world(noisy), num_resamples=100)), tmp_path)


def test_measured_once(tmp_path, monkeypatch):
    """As long as the rows are the same ones."""
    calls = []
    monkeypatch.setattr(
        dapo_trl.diagnosing, "diagnose", lambda *rows: calls.append(1) or diagnose(*rows, num_resamples=20)
    )
    data = tmp_path / "data"
    data.mkdir()
    solutions, states = world(noisy, num_problems=30)
    Dataset.from_list(solutions).to_parquet(data / "solutions_critic.parquet")
    Dataset.from_list(states).to_parquet(data / "states_critic.parquet")
    (data / "scored.json").write_text(json.dumps({"config": {"weights": "a"}}))
    first = diagnose_once(data, is_main=False)
    assert not (data / "diagnosis.json").exists()
    assert json.loads(json.dumps(diagnose_once(data))) == diagnose_once(data) == json.loads(json.dumps(first))
    assert len(calls) == 2
    (data / "scored.json").write_text(json.dumps({"config": {"weights": "b"}}))
    diagnose_once(data)
    assert len(calls) == 3
    known = json.loads((data / "diagnosis.json").read_text())
    (data / "diagnosis.json").write_text(json.dumps({"measures": known["measures"]}))  # by an earlier version
    assert diagnose_once(data)["is_fit"]
    assert len(calls) == 4
    (data / "diagnosis.json").write_text("{")
    with pytest.raises(ValueError, match=r"diagnosis.json is damaged: .* Delete it to measure the critic again"):
        diagnose_once(data)


def test_why_shrinkage_needs_more_than_a_strength():
    """
    An inverted critic gets a small strength, so that values become no worse than Monte Carlo's; but next steps with one
    rollout and the same outcome are ordered wrong, and the mean is better by far.
    """
    rng = np.random.default_rng(0)
    truth = rng.beta(0.7, 0.7, 3000)
    n = rng.choice([1, 8], 3000)
    k = rng.binomial(n, truth).astype(float)
    columns = {"mc_successes": k, "mc_rollouts": n, "critic_values": 1 - truth}
    rows = Dataset.from_list([{name: [column[i].item()] for name, column in columns.items()} for i in range(3000)])

    def values(dataset):
        return shrinkage_values(k, n, np.concatenate(dataset["critic_values"]), fit_strength(dataset)).values

    def error(estimates):
        return np.mean((estimates - truth)[n == 1] ** 2)

    assert error(values(with_mean_prior(rows, rows))) < 0.6 * error(values(rows)) < error(values(rows)) < error(k / n)
    alike = (n == 1) & (k == 1)
    assert np.corrcoef(values(rows)[alike], truth[alike])[0, 1] < -0.9
