"""
What the comparison with other methods rests on: what each of them is trained on, and the statistics of its tables.
"""

import importlib
import json
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

from conftest import REPOSITORY


sys.path.append(str(REPOSITORY / "benchmarks"))
import learning_jobs
import learning_methods as methods
import learning_report as report


END = 1
MARKS = {  # in the documents, of the scripts that have written between them
    "students": "students",
    "prefix tree": "prefix_tree",
    "scale": "scale",
    "sampling": "sampling",
    "values": "value_report",
    "demo": "demo",
    "ablations": "ablations",
    "gate": "gate",
    "iterations": "iterations",
    "second_iteration": "second_iteration",
    "learning": "learning",
    "estimators": "estimators",
    "kill": "kill",
    "servers": "servers",
    "gate-word_problems": "gate",
    "execution": "execution",
    "code demo": "code_demo",
}
RECORDS = {"values": "values", "gate-word_problems": "gate-word_problems"}  # of marks, if not called as the script


@pytest.mark.parametrize("mark", MARKS)
def test_documents_say_what_was_measured(mark):
    """The tables are what the scripts make of the records that are kept."""
    module = importlib.import_module(MARKS[mark])
    name = RECORDS.get(mark, MARKS[mark])
    record = json.loads((REPOSITORY / "benchmarks" / "results" / f"{name}.json").read_text())
    place = REPOSITORY / ("examples/student" if mark == "students" else "benchmarks") / "README.md"
    text = place.read_text()
    assert f"<!-- {mark} -->\n\n{module.details(record)}\n\n<!-- /{mark} -->" in text


def test_readme_says_what_was_measured():
    import code_demo
    import demo
    import iterations

    text = " ".join((REPOSITORY / "README.md").read_text().split())
    paths = (REPOSITORY / "benchmarks" / "results").glob("*.json")
    records = {path.stem: json.loads(path.read_text()) for path in paths}
    assert " ".join(demo.table(records["demo"]).split()) in text
    assert " ".join(report.short(records["learning"]).split()) in text
    assert f"by another {iterations.rise(records['iterations']['runs'], 'mean@4').lstrip('+')} points" in text
    rise, lowest = code_demo.rise(records["code_demo"], "mean_at_k")
    assert f"raises the mean of four samples on test problems by {rise} points" in text and lowest >= 10
    minutes = [found["wall_seconds"] / 60 for found in records["code_demo"]["runs"].values()]
    assert "in one to six minutes" in text and 1 <= min(minutes) and round(max(minutes)) <= 6
    measured = records["prefix_tree"]["results"]
    long, short = (measured["speed"][name]["ratio"] for name in ("200 x 20 x 30 x 8", "100 x 6 x 20 x 4"))
    assert f"1/{long:.0f} of the time of padded sequences and {measured['memory']['ratio']:.0%} of their memory" in text
    assert f"{measured['dpo']['ratio']:.0f} times as many candidates a second" in text
    assert f"on shorter problems it took 1/{short:.0f} of the time" in text


def solution(problem: str, sample: int, reward: float, truncated: bool = False) -> dict:
    steps = [[10, sample], [11, END]]
    texts = [f"step {sample}\n", "#### 1"]
    row = {"problem_id": problem, "prompt": f"{problem}?\n", "prompt_ids": [7], "completions": texts}
    return row | {"completions_ids": steps, "reward": reward, "truncated": truncated}


@pytest.fixture
def rows() -> list[dict]:
    """A problem that is solved at times, one always, one never; one solution is cut off."""
    found = [solution("at times", number, float(number % 2)) for number in range(20)]
    found += [solution("always", number, 1.0) for number in range(3)]
    found += [solution("never", number, 0.0) for number in range(3)]
    return [*found, solution("at times", 99, 0.0, truncated=True)]


def test_rejection_fine_tuning_sees_right_solutions_only(rows):
    chosen = methods.right_solutions(rows, seed=0)
    assert {row["prompt"] for row in chosen} == {"at times?\n", "always?\n"}
    assert len(chosen) == 13  # 10 and 3, below the most of a problem
    assert all(int(row["completion"].split()[1]) % 2 for row in chosen if row["prompt"] == "at times?\n")
    assert methods.right_solutions(rows, seed=0) == chosen


def test_pairs_are_of_one_problem_and_the_sampled_tokens(rows):
    pairs = methods.solution_pairs(rows, seed=0)
    assert len(pairs) == methods.MAX_PAIRS  # the other problems have no pair
    for pair in pairs:
        assert pair["chosen_ids"][1] % 2 == 1 and pair["rejected_ids"][1] % 2 == 0
        assert pair["chosen_ids"][-1] == pair["rejected_ids"][-1] == END
        assert 99 not in pair["rejected_ids"]


def test_labels(rows):
    chosen = methods.labelled_solutions(rows, seed=0)
    assert len(chosen) == methods.MAX_SOLUTIONS
    assert all(row["label"] == (int(row["completion"].split()[1]) % 2 == 1) for row in chosen)


def test_labelled_solutions_of_a_problem_are_apart():
    """`KTOTrainer` does not shuffle, and pairs each prompt with the solution before: it must be of another problem."""
    rows = [solution(str(problem), number, float(number % 2)) for problem in range(20) for number in range(16)]
    chosen = methods.labelled_solutions(rows, seed=0)
    neighbours = [one["prompt"] == other["prompt"] for one, other in pairwise(chosen)]
    assert len(chosen) == 320 and sum(neighbours) < 40  # 300 in the order of the problems


def test_shrinkage_is_fitted_on_problems_that_the_critic_has_not_seen(tmp_path, monkeypatch):
    """Every tenth problem of the solutions, also where the first has no state rows, so that theirs begin later."""
    data = learning_jobs.Data(learning_jobs.TASKS["arithmetic"], 0, tmp_path)
    (data.run / "data").mkdir(parents=True)
    problems = [str(number) for number in range(30)]
    state = {"values": [0.5, 0.0], "mc_successes": [1.0, 0.0], "mc_rollouts": [2, 2], "critic_values": [0.6, 0.2]}
    states = [state | {"problem_id": problem, "counts": [1, 1]} for problem in problems[1:]]
    Dataset.from_dict({"problem_id": problems}).to_parquet(data.run / "data" / "solutions_critic.parquet")
    Dataset.from_list(states).to_parquet(data.run / "data" / "states_critic.parquet")
    seen = []
    monkeypatch.setattr(methods, "fit_strength", lambda rows: seen.extend(rows["problem_id"]) or 4.0)
    methods.states_by("shrinkage", data)
    assert seen == ["10", "20"]


def test_equal_weights_of_states():
    """Two candidates weigh as much together as three."""
    weights = [methods.weigh_alike({"counts": [1] * number})["counts"] for number in (2, 3)]
    assert weights == [[2520, 2520], [1680, 1680, 1680]]


def test_states_with_nothing_to_compare_weigh_as_much_as_others(tmp_path, monkeypatch):
    """`anchor_states` says 1 for each, where others have 8 samples: by states they are to be alike."""
    seen = []
    state = {"problem_id": "1", "prefix": [], "candidates": ["a", "b"], "counts": [6, 2], "advantages": [0.1, -0.3]}
    anchor = state | {"prefix": ["a"], "candidates": ["c"], "counts": [1], "advantages": [0.0]}
    monkeypatch.setattr(methods, "states_by", lambda *_, **__: Dataset.from_list([state]))
    monkeypatch.setattr(methods, "anchor_states", lambda *_: Dataset.from_list([anchor]))
    monkeypatch.setattr(methods, "train", lambda *arguments, **_: seen.append(arguments[3]["counts"][:]))
    monkeypatch.setattr(learning_jobs.Data, "kept_solutions", lambda _: None)
    monkeypatch.setattr(learning_jobs.Data, "tokens", 0)
    data = learning_jobs.Data(learning_jobs.TASKS["arithmetic"], 0, tmp_path)
    for reduction in ("samples", "states"):
        methods.train_policy("critic", data, {"reduction": reduction})
    assert seen == [[[6, 2], [1]], [[2520, 2520], [5040]]]


def test_what_the_critic_alone_changes_is_not_sampled_again(tmp_path, monkeypatch):
    """Data of another critic begin with the samples of the recipe as it is; those of other samples do not."""
    commands = []
    monkeypatch.setattr(learning_jobs, "dapo_trl", lambda *arguments: commands.append(arguments))
    base = learning_jobs.Job("arithmetic", 3, "critic", "test")
    plain = learning_jobs.data_of(base, tmp_path)
    for stage in ("sampled", "values"):
        (plain.run / stage).mkdir(parents=True)
        (plain.run / stage / "manifest.json").write_text(stage)
    for arguments, is_copied in (
        (("--critic_model_name_or_path", "some/larger", "--num_critics", "3"), True),
        (("--critic.learning_rate", "1e-3"), True),
        (("--num_kept", "2"), False),
        (("--critic_states", "candidates", "--num_kept", "2"), False),
    ):
        data = learning_jobs.data_of(replace(base, data=arguments), tmp_path)
        assert data.plain == plain
        data.make()
        assert (data.run / "values" / "manifest.json").exists() == is_copied
        assert data.has_own_samples != is_copied
        assert commands[-1][-len(arguments) :] == arguments
    assert plain.plain == plain


def test_ablations_change_one_setting(tmp_path):
    """The demo as it is stands in every one, as the same job; what only the critic sees has the demo's samples."""
    import ablations

    plain = ablations.ABLATIONS[0].job(ablations.POLICY["beta"], 0)
    own_samples = set()
    for ablation in ablations.ABLATIONS:
        jobs = dict(ablations.jobs_of(ablation, [0], tmp_path))
        assert jobs.pop(ablation.default) == plain, ablation.name
        for value, job in jobs.items():
            path = job.path(tmp_path)
            assert path != plain.path(tmp_path), (ablation.name, value)
            changed = {name for name in job.settings if job.settings[name] != plain.settings.get(name)}
            assert changed | {name.strip("-") for name in job.data[::2]} == {ablation.name}
            own_samples |= {ablation.name} if learning_jobs.data_of(job, tmp_path).has_own_samples else set()
    assert own_samples == {"num_completions", "num_kept", "num_train_problems"}


@pytest.fixture
def critic_run(tmp_path):
    """A run with a critic, whose problems have 6 right of 8 completions where they are not held out, and a student."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=16, num_labels=1, **size)
    LlamaForTokenClassification(config).save_pretrained(tmp_path / "critic")
    LlamaForCausalLM(config).save_pretrained(tmp_path / "student")
    (tmp_path / "data").mkdir()
    rows = [
        {"problem_id": str(n), "mc_successes": [0.0, 0.0] if n == 0 else [2.0, 4.0], "mc_rollouts": [4, 4]}
        for n in range(10)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "solutions_critic.parquet")
    return tmp_path


def test_broken_critics_are_made_of_the_working_one(critic_run):
    """The constant is the mean outcome of the problems that the critic was trained on: 6 of 8."""
    import gate

    made = {kind: gate.make_critic(kind, critic_run / "student", critic_run, 0) for kind in gate.KINDS[2:]}
    ids = torch.arange(6)[None]
    with torch.no_grad():
        logits = {kind: model.eval()(input_ids=ids).logits[0, :, 0] for kind, model in made.items()}
        working = LlamaForTokenClassification.from_pretrained(critic_run / "critic").eval()
        known = working(input_ids=ids).logits[0, :, 0]
    torch.testing.assert_close(logits["constant"].sigmoid(), torch.full((6,), 0.75))
    torch.testing.assert_close(logits["inverted"], -known)
    assert not torch.allclose(logits["fresh head"], known)
    backbone = working.model.layers[0].mlp.up_proj.weight
    assert torch.equal(made["fresh head"].model.layers[0].mlp.up_proj.weight, backbone)
    assert not torch.equal(made["untrained"].model.layers[0].mlp.up_proj.weight, backbone)


def test_frequent_and_rare_pairs_by_hand(tmp_path, monkeypatch):
    """
    The run has drawn the first two next steps five times, the third once. Fresh completions put the first ahead of the
    second, as the critic does, and of the third, as it does not; the second and the third are too near each other.
    """
    import gate

    own = {"mc_rollouts": [5, 5, 1], "rewards": [None, None, None], "critic_values": [0.6, 0.4, 0.7]}
    fresh = own | {"mc_successes": [9, 4, 3], "mc_rollouts": [10, 10, 10]}
    monkeypatch.setattr(gate, "held_out_rows", lambda *_: ([], [own]))
    monkeypatch.setattr(gate, "fresh_counts", lambda folder: {})
    monkeypatch.setattr(gate, "with_counts", lambda *_: ([], [fresh]))
    found = gate.by_frequency([tmp_path])
    assert found == {"frequent": {"pairs": 1, "ranking": 1.0}, "rare": {"pairs": 1, "ranking": 0.0}}


def test_a_working_critic_that_is_refused_is_counted(tmp_path, monkeypatch):
    """Runs of the benchmark go on with it; what the gate says is asked afterwards."""
    import gate

    said = []
    monkeypatch.setattr(gate.subprocess, "run", lambda words, check: said.append(words))
    monkeypatch.setattr(gate.shutil, "copytree", lambda *args, **kwargs: None)
    gate.score_by_larger(learning_jobs.TASKS["arithmetic"], 0, tmp_path)
    assert said[0][3] == "score" and said[0][said[0].index("--allow_unfit_critic") + 1] == "true"
    assert gate.is_refused({"is_fit": False, "verdict": "Do not use it.", "measures": {}}, tmp_path)
    assert not gate.is_refused({"is_fit": True}, tmp_path)


def test_tokens_needed_by_hand():
    """Half way between two points in the logarithms; where the curve rises again; where it never comes down so far."""
    from estimators import tokens_needed

    assert tokens_needed(0.02, [10, 40], [0.04, 0.01]) == pytest.approx(20)
    assert tokens_needed(0.01, [10, 40], [0.04, 0.01]) == pytest.approx(40)
    assert tokens_needed(0.02, [10, 40, 80, 160], [0.04, 0.01, 0.03, 0.01]) == pytest.approx(20)
    assert tokens_needed(0.005, [10, 40], [0.04, 0.01]) is None
    assert tokens_needed(0.05, [10, 40], [0.04, 0.01]) == 10


def test_tokens_saved_by_hand(monkeypatch):
    """
    Shrinkage is at 10 tokens where Monte Carlo is at 20, which saves half; at 40 its error is one that Monte Carlo does
    not come to. In a second draw Monte Carlo does not come to the first error either: 10 of 40 at most.
    """
    import estimators

    monkeypatch.setattr(estimators, "NUMBERS", (2, 8))
    curves = {"monte_carlo": [[0.04, 0.04], [0.01, 0.03]], "shrinkage": [[0.02, 0.02], [0.005, 0.01]]}
    first, last = estimators._saved([10.0, 40.0], curves)
    assert (first["share"], first["is_bound"]) == (pytest.approx(0.5), False)
    assert first["interval"] == pytest.approx([0.50625, 0.74375])
    assert (last["share"], last["is_bound"]) == (0.0, True)


def test_a_job_is_told_from_every_other(tmp_path):
    job = learning_jobs.Job("arithmetic", 0, "dpo", "test", {"beta": 0.1})
    others = [
        learning_jobs.Job("arithmetic", 1, "dpo", "test", {"beta": 0.1}),
        learning_jobs.Job("word_problems", 0, "dpo", "test", {"beta": 0.1}),
        learning_jobs.Job("arithmetic", 0, "kto", "test", {"beta": 0.1}),
        learning_jobs.Job("arithmetic", 0, "dpo", "validation", {"beta": 0.1}),
        learning_jobs.Job("arithmetic", 0, "dpo", "test", {"beta": 0.3}),
        learning_jobs.Job("arithmetic", 0, "dpo", "test", {"beta": 0.1}, ("--num_kept", "2")),
    ]
    assert len({each.path(tmp_path) for each in [job, *others]}) == len({each.key for each in [job, *others]}) == 7


def test_results_of_jobs_go_on_elsewhere(tmp_path, monkeypatch):
    """A job that was run in one folder has its line, and is not run again in another; its paths are not kept."""
    monkeypatch.setattr(learning_jobs, "KEPT", tmp_path / "jobs.jsonl")
    monkeypatch.setattr(learning_jobs, "evaluate", lambda *_: {"greedy": 0.5, "mean@8": 0.25, "pass@8": 1.0})
    monkeypatch.setitem(methods.METHODS, "dpo", lambda data, settings: methods.Trained(None, 7))
    job = learning_jobs.Job("arithmetic", 0, "dpo", "test", {"beta": 0.1}, ("--model", str(tmp_path)))
    learning_jobs.restore(tmp_path / "first")
    learning_jobs.run_job(job, tmp_path / "first")
    monkeypatch.setitem(methods.METHODS, "dpo", None)
    learning_jobs.restore(tmp_path / "second")
    (result,) = learning_jobs.run_jobs([job], tmp_path / "second", 1)
    assert (result["tokens"], result["mean@8"], result["settings"]) == (7, 0.25, {"beta": 0.1})
    assert {"date", "versions", "training_seconds"} <= set(result) and str(tmp_path) not in json.dumps(result)


def test_record_is_that_of_its_jobs():
    """Every number of the comparison is that of a job with a date; no job stands there twice."""
    text = (REPOSITORY / "benchmarks" / "results" / "jobs.jsonl").read_text()
    jobs = {job["job"]: job for job in map(json.loads, text.splitlines())}
    assert len(jobs) == len(text.splitlines())
    assert all(job["date"] and job["versions"] for job in jobs.values())
    record = json.loads((REPOSITORY / "benchmarks" / "results" / "learning.json").read_text())
    names = ("task", "method", "split", "seed", "settings")
    found = {tuple(str(job[name]) for name in names): job for job in jobs.values()}
    for name, task in record["tasks"].items():
        for method, runs in task["results"].items():
            for seed, run in runs.items():
                assert run.items() <= found[name, method, "test", seed, str(run["settings"])].items()


def test_tuning_goes_on_to_better_neighbours(tmp_path, monkeypatch):
    """
    By hand: with the default beta the best of the five rates is 1e-4. A hill at rate 2.5e-4 and beta 1 is found from
    there step by step, one setting at a time, and nothing is tried twice.
    """
    import learning

    rates, betas = learning.RATES, (0.1, 0.3, 1.0, 3.0)

    def score(settings):
        rate, beta = rates.index(settings["learning_rate"]), betas.index(settings["beta"])
        return -abs(rate - 3) - 3 * abs(beta - 2) if beta else -7 - abs(rate - 2)

    def run_jobs(jobs, folder, num_processes):
        for job in jobs:
            path = job.path(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            result = {
                "settings": job.settings,
                "seed": job.seed,
                "mean@8": score(job.settings),
                "greedy": 0,
                "pass@8": 0,
                "tokens": 0,
            }
            path.write_text(json.dumps(result | {"training_seconds": 0}))
        return [json.loads(job.path(folder).read_text()) for job in jobs]

    monkeypatch.setattr(learning, "run_jobs", run_jobs)
    axes = (learning.RATE, learning.Axis("beta", betas, 0.1))
    search = learning.Search({"dpo": learning.first_of(axes)}, {"dpo": axes}, learning.TUNING_SEEDS)
    found = learning.tune("arithmetic", search, tmp_path, 1)["dpo"]
    assert found["chosen"] == {"learning_rate": 2.5e-4, "beta": 1.0}
    assert len(found["finals"]) == 4 * len(learning.TUNING_SEEDS)
    tried = [tuple(result["settings"].items()) for result in found["tried"]]
    assert len(tried) == len(set(tried)) <= 5 + 4 * learning.MAX_ROUNDS
    search = learning.Search({"dpo": [found["chosen"] | {"learning_rate": 1e-4}]}, {"dpo": (learning.RATE,)}, (100,))
    again = learning.tune("word_problems", search, tmp_path, 1)["dpo"]
    assert again["chosen"] == found["chosen"]
    assert [result["settings"]["learning_rate"] for result in again["tried"]] == [1e-4, 4e-5, 2.5e-4, 6e-4]
    assert {result["seed"] for result in again["finals"]} == {100}


def test_tuning_takes_what_is_good_on_all_seeds(tmp_path):
    """By hand: 0.9 once and 0.2 twice is less than 0.8 three times."""
    import learning

    jobs = []
    for rate, scores in ((1e-3, (0.9, 0.2, 0.2)), (1e-4, (0.8, 0.8, 0.8))):
        for seed, score in zip(learning.TUNING_SEEDS, scores, strict=True):
            jobs.append(learning_jobs.Job("arithmetic", seed, "kto", "validation", {"learning_rate": rate}))
            jobs[-1].path(tmp_path).parent.mkdir(parents=True, exist_ok=True)
            jobs[-1].path(tmp_path).write_text(json.dumps({"mean@8": score}))
    assert learning._most_reliable(jobs, tmp_path) == {"learning_rate": 1e-4}
    assert len(learning._finals(jobs[::3], learning.TUNING_SEEDS, tmp_path)) == 6


def task(**by_method: list[float]) -> dict:
    results = {
        method: {str(seed): {"mean@8": score, "greedy": score, "tokens": 1000} for seed, score in enumerate(scores)}
        for method, scores in by_method.items()
    }
    return {"results": results, "settings": {method: {} for method in by_method}}


def test_interval_by_hand():
    """0, 1 and 2 points: mean 1, standard deviation 1, standard error 1/sqrt(3), times 4.30 of Student's t."""
    mean, half = report.interval([0.0, 0.01, 0.02])
    assert mean == pytest.approx(1.0)
    assert half == pytest.approx(4.30 / np.sqrt(3))


def test_verdict_is_about_pairs_of_seeds():
    """Seeds differ by more than methods do, but one method is 2 points ahead on each: told apart."""
    scores = np.array([0.5, 0.6, 0.7])
    ahead = task(**{name: [0.1, 0.1, 0.1] for name in report.BASELINES})
    ahead["results"] |= task(dpo=scores, critic=scores + np.array([0.02, 0.021, 0.022]))["results"]
    for name in report.OWN:
        ahead["results"].setdefault(name, ahead["results"]["rft"])
    assert report.verdict(ahead).startswith('mean@8, points: "this method, critic" is ahead of rejection')
    assert "DPO on solution pairs (+2.1 ± " in report.verdict(ahead) and "apart" not in report.verdict(ahead)
    same = ahead | {"results": ahead["results"] | {"critic": task(critic=[0.5, 0.61, 0.69])["results"]["critic"]}}
    assert "; cannot be told apart from DPO on solution pairs (+0.0 ± " in report.verdict(same)
    behind = ahead | {"results": ahead["results"] | {"critic": task(critic=[0.4, 0.5, 0.6])["results"]["critic"]}}
    assert "; is behind DPO on solution pairs (-10.0 ± " in report.verdict(behind)


def test_sibling_rows_are_of_the_same_seeds():
    """By hand: over the two seeds that both have, the listwise loss is 10 points ahead of the critic, and 2 behind."""
    runs = {
        "critic": {"0": 0.5, "1": 0.6, "2": 0.9},
        "listwise": {"0": 0.6, "1": 0.58},
        "grpo": {"0": 0.1, "1": 0.2, "2": 0.3},
    }
    results = {
        method: {seed: {"mean@8": score, "greedy": score, "tokens": 1000} for seed, score in scores.items()}
        for method, scores in runs.items()
    }
    task = {"results": results, "settings": {"critic": {}, "grpo": {}, "listwise": {"value_power": 2.0, "later": "x"}}}
    assert report.differences(task, "listwise", "critic", "mean@8") == pytest.approx([0.1, -0.02])
    (row,) = report.siblings_table(task).splitlines()[2:]
    title, mean, _, other, difference, _, tokens, settings = (cell.strip() for cell in row.strip("|").split("|"))
    assert (title, other) == (report.TITLES["listwise"], report.TITLES["critic"])
    assert mean.startswith("59.0 ±") and difference.startswith("+4.0 ±")
    assert (tokens, settings) == ("1 k", "value_power 2, later x")
    assert report.TITLES["listwise"] not in report.table(task)
    for method, others in report.SIBLINGS.items():
        assert {method, *others} < report.TITLES.keys() and method in methods.METHODS
