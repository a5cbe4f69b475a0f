"""
`report.py`: one file that needs nothing else, says what the run's folder says, and shows text of data as text.
"""

import base64
import hashlib
import html.parser
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from matplotlib.image import imread

import dapo_trl.report
from conftest import REPOSITORY, make_tokenizer
from dapo_trl.cli import main
from dapo_trl.diagnosing import held_out_rows
from dapo_trl.diagnosis import diagnose
from dapo_trl.inspection import color
from dapo_trl.intervals import Estimate
from dapo_trl.preprocessing import prepare_policy_dataset
from dapo_trl.report import write_report
from dapo_trl.report_results import _curves


HOSTILE = (
    "</script><script>document.title='taken'</script><img src=//x.example/i onerror=alert(1)> {{ 7 * 7 }} &amp;\"'"
)
VERSIONS = {"dapo-trl": "0.1", "torch": "2.13.0"}
NUM_PROBLEMS = 30
STYLE = (REPOSITORY / "src" / "dapo_trl" / "templates" / "report.css").read_text()


# ---- A run by hand ----


def write_json(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def evaluation(mean):
    estimates = {name: {"mean": mean, "low": mean - 0.031, "high": mean + 0.029} for name in ("greedy", "mean_at_k")}
    counts = {"k": 4, "num_problems": 1024, "truncated": 17, "not_judged": 3, "tokens": 1000}
    return estimates | {"pass_at_k": {"mean": 0.9, "low": 0.88, "high": 0.92}} | counts


def problem_rows(number):
    """A right and a wrong solution that begin alike; the prompt has a third next step."""
    rng = random.Random(number)
    prompt = HOSTILE if number == 0 else f"Problem {number}: what\nis it?"
    given = {"problem_id": f"p{number}", "prompt": prompt, "answer": str(number), "generator": "student"}
    good, bad = rng.randint(4, 8), rng.randint(0, 4)
    middle = f"{number} step <b>\n"
    ends = (("fine\n", good, 1.0), ("poor\n", bad, 0.0))
    solutions = [
        given
        | {
            "completions": [middle, step, f"#### {number}"],
            "values": [0.5, 0.625, won / 8, reward],
            "mc_successes": [4.0, 5.0, float(won), reward],
            "mc_rollouts": [8, 8, 8, 1],
            "reward": reward,
            "truncated": number == 1 and not reward,
            "critic_values": [0.5, 0.6, 0.3 + 0.4 * reward, 0.1 + 0.8 * reward],
        }
        for step, won, reward in ends
    ]
    prompt_row = {"prefix": [], "candidates": [middle, "#### 77"], "counts": [7, 1], "values": [0.625, 0.0]}
    prompt_row |= {"mc_successes": [5.0, 0.0], "mc_rollouts": [8, 1], "rewards": [None, 0.0]}
    prompt_row |= {"critic_values": [0.6, 0.2], "advantages": [0.078125, -0.546875]}
    later_row = {"prefix": [middle], "candidates": ["fine\n", "poor\n"], "counts": [5, 3]}
    later_row |= {"values": [good / 8, bad / 8], "mc_successes": [float(good), float(bad)], "mc_rollouts": [8, 8]}
    later_row |= {"rewards": [None, None], "critic_values": [0.7, 0.3], "advantages": [0.15, -0.25]}
    return solutions, [given | prompt_row, given | later_row]


def write_stages(folder, iteration=""):
    """What sampling leaves."""
    part = folder / iteration
    rows = [problem_rows(number) for number in range(NUM_PROBLEMS)]
    solutions, states = ([row for pair in rows for row in pair[index]] for index in (0, 1))
    record = {"config": {"rollouts": {"num_solutions": 8}}, "num_shards": 1, "versions": VERSIONS}
    counts = {"problems": 40, "problems_with_signal": 30, "problems_all_correct": 6, "problems_all_wrong": 4}
    counts |= {"tokens_generated": 12345, "truncated": 21, "not_judged": 0}
    done = {"num_shards_used": 1, "seconds": 7.25, "fingerprint": "f"}
    write_json(part / "sampled" / "manifest.json", record | done | {"rows": {"sampled": 320}, "counts": counts})
    write_json(part / "sampled" / "shards" / "00000.json", {"begun": 1735689600.0})
    write_rows(part / "sampled" / "shards" / "00000-sampled.parquet", solutions)
    counts = {"tokens_generated": 4321, "states_with_one_candidate": 61, "candidates_cut_off": 5}
    rows = {"solutions": len(solutions), "states": len(states)}
    write_json(part / "values" / "manifest.json", record | done | {"rows": rows, "counts": counts})
    for name, table in (("solutions", solutions), ("states", states)):
        plain = [{key: value for key, value in row.items() if key != "critic_values"} for row in table]
        write_rows(part / "values" / "shards" / f"00000-{name}.parquet", plain)
    return solutions, states


def write_training(folder, dropped, metrics=None):
    logs = [{"step": step, "loss": 1 / step, "sign_accuracy": 0.5, "grad_norm": 1.0} for step in range(1, 21)]
    logs += [{"step": 20, "eval_loss": 0.5, "eval_bce_constant": 0.6}, {"step": 20, "train_loss": float("nan")}]
    write_json(folder / "trainer_state.json", {"log_history": logs})
    results = {"metrics": metrics or {}, "dropped": {"train": dropped}}
    config = {"config": {"arguments": {"learning_rate": 1e-4}}}
    write_json(folder / "begun.json", config)
    write_json(folder / "stage.json", config | {"versions": VERSIONS, "seconds": 8.0, "results": results})


def write_run(folder, sources=("critic", "monte_carlo"), iteration=""):
    """A finished run, or a further iteration of one."""
    part = folder / iteration
    solutions, states = write_stages(folder, iteration)
    results = {"before": evaluation(0.5)}
    write_json(folder / "before.json", {"config": {}, "versions": VERSIONS, "results": results["before"]})
    if sources != ("monte_carlo",):
        write_training(part / "critic", {"rows": 54, "rows_too_long": 2})
        write_rows(part / "data" / "solutions_critic.parquet", solutions)
        write_rows(part / "data" / "states_critic.parquet", states)
        write_json(part / "data" / "scored.json", {"config": {}, "seconds": 1.0, "results": {}})
    for number, source in enumerate(sources):
        name = "policy" if source == "critic" else f"policy_{source}"
        write_rows(part / "data" / f"states_{source}.parquet", states)
        write_training(part / name, {"rows": 60, "rows_kept": 41, "rows_without_contrast": 19})
        results[f"policy_{source}"] = evaluation(0.61 + 0.1 * number)
        write_json(part / name / "accuracy.json", {"config": {}, "results": results[f"policy_{source}"]})
    arguments = {"output_dir": "/home/me/runs/mine", "dataset_name": "/home/me/math.jsonl", "seed": 0, "num_kept": 4}
    arguments |= {"values": sources[0] if len(sources) == 1 else "both", "policy": {"beta": 0.05}, "iterations": 1}
    arguments |= {"server_urls": ["http://10.0.0.7:8000"]}
    write_json(folder / "results.json", results | {"arguments": arguments})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "my run")


@pytest.fixture
def copied(tmp_path, run):
    return Path(shutil.copytree(run, tmp_path / "my run"))


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    return write_report(run, tmp_path_factory.mktemp("report") / "report.html")


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the text that a reader sees."""

    def __init__(self, path):
        super().__init__()
        self.elements, self._open, self._text, self.scripts = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join("".join(self._text).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass
        if tag not in ("b", "code", "text"):
            self._text.append(" ")

    def handle_data(self, data):
        inside = self._open[-1] if self._open else ""
        if inside in ("script", "style"):
            self.scripts += [data] if inside == "script" else []
        else:
            self._text.append(data)


def shown(folder, **options):
    return Page(write_report(folder, folder.parent / "report.html", **options)).text


# ---- What it says ----


def test_numbers_are_those_of_the_results(run, report):
    text = Page(report).text
    results = json.loads((run / "results.json").read_text())
    for name in ("before", "policy_critic", "policy_monte_carlo"):
        for measure in ("greedy", "mean_at_k", "pass_at_k"):
            assert str(Estimate(**results[name][measure])) in text
    assert "50.0% → 61.0%" in text
    assert "50.0% → 71.0%" in text
    assert "On 1,024 held-out problems" in text
    for words in ("Model student", "2025-01-01 00:00 UTC", "math.jsonl", "policy.beta 0.05", "torch 2.13.0"):
        assert words in text, words


def test_nothing_that_was_left_out_is_hidden(report):
    """Counts of all stages and evaluations stand in the table, zeros too, with what they mean."""
    text = Page(report).text
    for what in (
        *("problems all correct 6", "problems all wrong 4", "truncated 21", "not judged 0", "candidates cut off 5"),
        *(
            "states with one candidate 61",
            "rows too long 2",
            "rows without contrast 19",
            "truncated 17",
            "not judged 3",
        ),
    ):
        assert what in text, what
    assert "states whose advantages differ by less than min_advantage_gap" in text


def test_every_count_of_the_library_has_a_meaning():
    """Counts that stages make are explained, and those that are left out are marked."""
    from dapo_trl.engines.openai import _COUNTS
    from dapo_trl.report_run import MEANINGS

    source = "".join(
        (REPOSITORY / "src" / "dapo_trl" / f"{name}.py").read_text() for name in ("rollouts", "state_tree")
    )
    named = set(re.findall(r'(?:counts|left_out)\["([a-z_]+)"\]', source)) | set(_COUNTS)
    rows = Dataset.from_list([{"prompt": "1+1=", "prefix": [], "candidates": ["2", "3"], "advantages": [0.5, -0.5]}])
    named |= prepare_policy_dataset(rows, make_tokenizer())[1].keys()
    assert len(named) > 15
    assert named <= MEANINGS.keys()


def test_the_critic_is_that_of_diagnose(run, report):
    """Measures and verdict on the held-out problems, which are every tenth."""
    rows = [problem_rows(number) for number in range(0, NUM_PROBLEMS, 10)]
    found = diagnose(*([row for pair in rows for row in pair[index]] for index in (0, 1)))
    text = Page(report).text
    assert found.verdict in text
    for estimate in (*found.measures.values(), *found.skill_by_distance.values()):
        assert str(estimate) in report.read_text()
    assert not (run / "data" / "diagnosis.json").exists()


def test_solutions(report):
    """Values with their counts, the critic's, advantages by source, siblings once, verdicts, held-out problems."""
    page = Page(report)
    text = page.text
    assert f"30 of {NUM_PROBLEMS} problems with values" in text
    assert "0.62 5/8" in text and "0.60 critic" in text
    assert "sampled 7× · A +0.08 critic, +0.08 Monte Carlo" in text
    assert "✘ ends wrong · sampled 1× · A −0.55 critic" in text
    assert "1 other: see solution 1, step 1" in text
    assert "✔ right" in text and "✘ wrong" in text and "✂ cut off, counts as wrong" in text
    assert text.count("held out: the critic was not trained on this problem") == 3
    classes = [attributes.get("class") for _, attributes in page.elements]
    assert "own v m12 k12" in classes  # 0.625 and 0.6, in steps of 1/20
    assert "own v m20 k18" in classes  # an end has its outcome, and the critic's 0.9


def test_curves(report):
    page = Page(report)
    labels = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg" and "role" in attributes]
    assert sum(label.startswith("Loss. training from 1 to 0.05") for label in labels) == 3
    assert any("held-out problems from 0.5 to 0.5" in label for label in labels)
    assert "best constant 0.6" in page.text


def test_several_critics(copied):
    """Each has its curves; of one there is no number."""
    assert "Critic 1" not in shown(copied)
    shutil.copytree(copied / "critic", copied / "critic-2")
    scored = copied / "data" / "scored.json"
    write_json(scored, json.loads(scored.read_text()) | {"config": {"critics": [None, None]}})
    text = shown(copied)
    assert "Critic 1" in text and "Critic 2" in text and "Critic 3" not in text
    assert "the means of 2 critics" in text


# ---- At any point of a run ----


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        (["data", "policy", "policy_monte_carlo", "results.json"], ["No rows have a critic's values", "no advantages"]),
        (["policy", "policy_monte_carlo", "results.json"], ["No policy has been trained and measured yet"]),
        (["results.json"], ["the settings of the stages that have begun", "policy.learning_rate 0.0001"]),
        (["values", "critic", "data", "policy", "policy_monte_carlo"], ["no solutions with values", "No training has"]),
        (["critic/trainer_state.json"], ["Nothing was kept of what was logged"]),
        (["before.json"], ["71.0%"]),
        (["sampled/shards", "values/shards"], ["There are no solutions with values yet"]),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(copied, removed, words):
    for name in removed:
        path = copied / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = shown(copied)
    for part in words:
        assert part in text, part


def test_only_measured(tmp_path):
    """A run that has just begun has its accuracy and nothing else."""
    write_json(tmp_path / "run" / "before.json", {"config": {}, "versions": VERSIONS, "results": evaluation(0.5)})
    text = shown(tmp_path / "run")
    assert "Nothing has been sampled yet" in text
    assert "50.0% [46.9%, 52.9%]" in text


def test_a_stage_under_way(copied):
    """What is done of it counts."""
    manifest = json.loads((copied / "values" / "manifest.json").read_text())
    write_json(
        copied / "values" / "manifest.json",
        {name: manifest[name] for name in ("config", "versions")} | {"num_shards": 4},
    )
    shard = {"counts": {"candidates_cut_off": 9}, "rows": {"states": 5}, "begun": 1.0}
    write_json(copied / "values" / "shards" / "00000.json", shard)
    text = shown(copied)
    assert "under way: 1 of 4 shards" in text
    assert "candidates cut off 9" in text


def test_a_training_under_way(copied):
    """The newest checkpoint has what was logged."""
    (copied / "critic" / "stage.json").unlink()
    for step in (9, 10):
        shutil.copytree(copied / "critic", copied / "critic" / f"checkpoint-{step}", ignore=lambda *_: ["checkpoint-9"])
    (copied / "critic" / "trainer_state.json").unlink()
    assert "As far as checkpoint-10." in shown(copied)


def test_monte_carlo_values(tmp_path):
    text = shown(write_run(tmp_path / "run", ("monte_carlo",)))
    assert "No critic was trained: the values are Monte Carlo ones." in text
    assert "critic's value" not in text
    assert "held out: the critic" not in text


def test_iterations(tmp_path):
    """Each has its accuracies, its critic, its advantages, and its share of the problems."""
    folder = write_run(tmp_path / "run", ("shrinkage",))
    write_run(folder, ("shrinkage",), "iteration-2")
    shutil.copytree(folder / "iteration-2", folder / "iteration-2.bak")
    text = shown(folder, num_problems=9)
    for words in ("in 2 iterations", "iteration 1, shrunk values", "iteration 2, shrunk values", "Iteration 2: Critic"):
        assert words in text, words
    assert "9 of 60 problems" in text
    assert text.count("Iteration 2, Problem p") == 4
    assert "critic values, not trained on" in text
    assert "Iteration 3" not in text and "moved to fit" not in text


def test_problems_that_were_held_out_are_those_of_the_record(tmp_path):
    """Which are others than every tenth after the first iteration."""
    folder = write_run(tmp_path / "run", ("critic",))
    assert len(held_out_rows(folder / "data")[0]) > 0
    known = {row["problem_id"] for row in held_out_rows(folder / "data")[0]}
    config = {"config": {}, "seconds": 1.0, "results": {"held_out": ["p3"]}}
    write_json(folder / "data" / "scored.json", config)
    assert {row["problem_id"] for row in held_out_rows(folder / "data")[0]} == {"p3"} != known
    assert shown(folder).count("held out: the critic") == 1


def test_an_iteration_with_the_critic_of_the_first(tmp_path):
    folder = write_run(tmp_path / "run", ("critic",))
    second = write_run(folder, ("critic",), "iteration-2") / "iteration-2"
    shutil.rmtree(second / "critic")
    write_json(second / "data" / "scored.json", {"config": {"later_critics": "shift"}, "seconds": 1.0, "results": {}})
    text = shown(folder)
    assert "values that are moved to fit the outcomes of this one" in text
    assert "Iteration 1: Critic" in text and "Iteration 2: Critic" not in text
    assert "moved to fit" in shown(second)


def test_of_one_iteration(tmp_path):
    """Its folder has no accuracy before training; what there is, is not taken for that."""
    write_run(tmp_path / "run", ("critic",), "iteration-2")
    text = shown(tmp_path / "run" / "iteration-2")
    assert "Greedy accuracy 61.0% trained on critic values" in text
    assert "before training" not in text
    assert "No policy has been trained" not in text


def test_outcomes_that_are_all_alike(copied):
    """A critic without skill to speak of has none in the head of the page."""
    path = copied / "data" / "solutions_critic.parquet"
    rows = pq.read_table(path).to_pylist()
    write_rows(path, [row | {"mc_successes": [float(number) for number in row["mc_rollouts"]]} for row in rows])
    text = shown(copied)
    assert "All outcomes are alike" in text
    assert "Skill of the critic" not in text


def test_zero_is_a_point_of_a_curve():
    """A learning rate begins and ends with it; what is not a number, or is not there, is none."""
    rates = [0.0, 1e-4, None, math.nan, 0.0]
    figure = _curves("Rate", {"learning_rate": "rate"}, [{"step": n, "learning_rate": r} for n, r in enumerate(rates)])
    assert figure.description == "rate from 0 to 0"
    assert [mark[2] for mark in figure.marks if mark[0] == "circle"] == [
        "rate: 0 at 0",
        "rate: 0.0001 at 1",
        "rate: 0 at 4",
    ]


def test_too_few_problems_for_a_critic(copied):
    """That stops no report."""
    for name in ("solutions", "states"):
        path = copied / "data" / f"{name}_critic.parquet"
        pq.write_table(pq.read_table(path).slice(0, 2), path)
    assert "The critic cannot be measured. A critic is measured on states of at least two problems" in shown(copied)


@pytest.mark.parametrize("number", [0, 1, 7, 100])
def test_number_of_problems(run, tmp_path, number):
    page = Page(write_report(run, tmp_path / "report.html", number))
    found = [attributes["id"] for tag, attributes in page.elements if attributes.get("class") == "problem"]
    assert found == [f"problem-{place}" for place in range(1, min(number, NUM_PROBLEMS) + 1)]


def test_bounded_size(run, tmp_path, monkeypatch):
    """A file that would be too large has fewer problems, still at equal distances, and says how many it lacks."""
    monkeypatch.setattr(dapo_trl.report, "_MOST_CHARACTERS", 20_000)
    page = Page(write_report(run, tmp_path / "report.html"))
    found = [attributes for tag, attributes in page.elements if attributes.get("class") == "problem"]
    assert 1 <= len(found) < 12
    assert f"{NUM_PROBLEMS - len(found)} more were left out, because the file would be too large" in page.text


def test_long_steps_are_cut_and_say_so(copied):
    path = copied / "values" / "shards" / "00000-solutions.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0]["completions"][-1] = "z" * 5000
    write_rows(path, rows)
    assert f"{'z' * 4000}… (1,000 more characters)" in shown(copied)


# ---- What cannot be reported ----


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("before.json", "{", "before.json is damaged: .* Delete it to do this step again"),
        ("before.json", '{"config": {}, "results": {}}', "before.json is damaged: it does not hold 'greedy', "),
        ("results.json", "[]", "results.json is damaged: it does not hold 'arguments'. Start the run's command"),
        ("sampled/manifest.json", "{}", "manifest.json is damaged: it does not hold 'config'"),
        ("critic/stage.json", '{"config": {}}', "stage.json is damaged: it does not hold 'results'"),
        ("critic/trainer_state.json", '{"log', "trainer_state.json is damaged: .* Delete it; only this report"),
        ("values/shards/00000-solutions.parquet", "PAR1", "00000-solutions.parquet is damaged .* Delete .*/00000.json"),
        ("data/states_critic.parquet", "", "states_critic.parquet is damaged or missing: .* Delete .*scored.json"),
        ("data/states_monte_carlo.parquet", "PAR1", "states_monte_carlo.parquet is damaged or missing"),
        ("policy/accuracy.json", '{"config": {}, "results": 3}', "accuracy.json is damaged"),
    ],
)
def test_damaged_files_are_named(copied, name, content, message):
    (copied / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        write_report(copied)
    assert not (copied / "report.html").exists()


def test_lost_columns_are_named(copied):
    path = copied / "data" / "solutions_critic.parquet"
    pq.write_table(pq.read_table(path).drop_columns("mc_rollouts"), path)
    with pytest.raises(ValueError, match=r"solutions_critic.parquet is damaged or missing: .*mc_rollouts"):
        write_report(copied)


def test_command(copied, tmp_path, capsys):
    assert main(["report", str(copied)]) == 0
    assert f"Report: {copied / 'report.html'} (0." in capsys.readouterr().out
    assert main(["report", str(copied), "--output", str(tmp_path / "other.html"), "--problems", "2"]) == 0
    assert Page(tmp_path / "other.html").text.count("Solution 1: ") == 2
    assert main(["report", str(copied), "--problems", "-1"]) == 2
    assert "--problems must be at least 0, got -1" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "There is no folder"),
        ([str(tmp_path / "other.html")], "There is no folder"),
        ([str(tmp_path / "empty")], "is no folder of a run: nothing was sampled there"),
        ([str(copied), "--output", str(tmp_path / "no" / "report.html")], "There is no folder"),
    ):
        assert main(["report", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_it_is_quick_and_light(run, tmp_path):
    """Neither torch nor what loads it is imported."""
    code = (
        "import sys; from dapo_trl.cli import main; assert main(sys.argv[1:]) == 0;"
        "assert not {'torch', 'transformers', 'trl', 'datasets', 'accelerate'} & set(sys.modules)"
    )
    arguments = ["report", str(run), "--output", str(tmp_path / "report.html")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=REPOSITORY)


# ---- Safety ----


def test_text_of_data_is_text(report):
    """A hostile prompt is shown as it stands, and is nowhere a part of the page."""
    page = Page(report)
    assert " ".join(HOSTILE.split()) in page.text
    assert "0 step <b>" in page.text
    assert len(page.scripts) == 1
    assert not {"img", "iframe", "object", "link", "template"} & {tag for tag, _ in page.elements}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_self_contained(report):
    """Nothing is fetched: no address but that of the paper, which only a click follows."""
    page = Page(report)
    addresses = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "action")
    ]
    assert {address for address in addresses if not address.startswith("#")} == {"https://arxiv.org/abs/2412.18279"}
    anchors = {attributes.get("id") for _, attributes in page.elements}
    assert {address[1:] for address in addresses if address.startswith("#")} <= anchors
    assert not re.search(r"@import|url\(", STYLE)
    policy = next(attributes["content"] for tag, attributes in page.elements if "http-equiv" in attributes)
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"


def test_nothing_of_this_machine(run, report):
    text = report.read_text()
    assert "/home/me" not in text and "10.0.0.7" not in text
    assert str(run.parent) not in text


def test_accessible(report):
    """Language, one title, headings in order, labels of all figures, tables with headers, unique ids."""
    page = Page(report)
    assert ("html", {"lang": "en"}) in page.elements
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    figures = [attributes for tag, attributes in page.elements if tag == "svg" and attributes.get("role") == "img"]
    assert len(figures) > 10 and all(len(attributes["aria-label"]) > 20 for attributes in figures)
    assert all(
        "role" in attributes or attributes.get("aria-hidden") for tag, attributes in page.elements if tag == "svg"
    )
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all("scope" in attributes for tag, attributes in page.elements if tag == "th")


def colors(scheme):
    """Colours of the style sheet by name."""
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    found = dict(re.findall(r"--([a-z_]+): ([^;]+);", light))
    return found | (dict(re.findall(r"--([a-z_]+): ([^;]+);", dark)) if scheme == "dark" else {})


def rgb(text):
    return np.array([int(text[place : place + 2], 16) for place in (1, 3, 5)], dtype=float)


def contrast(first, second):
    """Of two colours, as WCAG 2.2 defines it."""

    def luminance(parts):
        parts = parts / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_by_hand():
    assert contrast(rgb("#000000"), rgb("#ffffff")) == pytest.approx(21)
    assert contrast(rgb("#777777"), rgb("#ffffff")) == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme):
    """Text has 4.5 on every ground, also on the tint of every value; lines and bars of figures have 3 (WCAG AA)."""
    known = colors(scheme)
    tint = float(known["tint"])
    grounds = [rgb(known[name]) for name in ("ground", "surface")]
    values = [np.array(color(number / 20).color.triplet, dtype=float) for number in range(21)]
    tinted = [value * tint + ground * (1 - tint) for value in [*values, np.full(3, 128.0)] for ground in grounds]
    for name in ("ink", "muted"):
        for ground in grounds + tinted:
            assert contrast(rgb(known[name]), ground) >= 4.5, (name, ground)
    for name in ("accent", "good", "bad"):
        assert all(contrast(rgb(known[name]), ground) >= 4.5 for ground in grounds), name
    for name in ("before", "critic", "monte_carlo", "shrinkage"):
        assert all(contrast(rgb(known[name]), ground) >= 3 for ground in grounds), name


# ---- In a browser ----


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Opens a file in a headless browser; gives what it said and, by option, the document or a picture."""
    names = [os.environ.get("CHROME", ""), "chromium", "chromium-browser", "google-chrome"]
    program = next((found for name in names if name and (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("there is no chromium, chromium-browser or google-chrome; set CHROME to one")
    profile = tmp_path_factory.mktemp("profile")

    def open_file(path, *options, place=""):
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
        command += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=4000"]
        done = subprocess.run(
            [*command, path.resolve().as_uri() + place], capture_output=True, text=True, encoding="utf-8", timeout=120
        )
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return open_file


def test_in_a_browser(browser, report):
    """No error; the address chooses a problem, and one problem at a time is shown."""
    for place, name in (("", "problem-1"), ("#problem-7", "problem-7"), ("#problem-3/critic", "problem-3")):
        document, said = browser(report, "--dump-dom", place=place)
        assert not said
        assert "data-error" not in document and "<title>my run: report" in document
        assert f'data-shown="{name}"' in document
        shown = re.findall(r'<details class="problem" id="([a-z0-9-]+)"( hidden="")?( open="")?>', document)
        assert [number for number, hidden, is_open in shown if is_open and not hidden] == [name]
        assert len(shown) == NUM_PROBLEMS


def test_an_error_would_be_seen(browser, report, tmp_path):
    """A script that is not the page's own does not run, and the browser says so; so would it of an exception."""
    other = tmp_path / "other.html"
    other.write_text(report.read_text().replace("</body>", "<script>document.title = 'taken'</script></body>"))
    document, said = browser(other, "--dump-dom")
    assert "<title>my run: report" in document
    assert any("Content Security Policy" in line for line in said)
    broken = re.sub(r"<meta http-equiv[^>]*>", "", report.read_text()).replace("show(0);", "nowhere.show(0);")
    other.write_text(broken)
    document, said = browser(other, "--dump-dom")
    assert 'data-error="Uncaught ReferenceError: nowhere is not defined"' in document
    assert said


def test_without_scripts(browser, report, tmp_path):
    """All problems are there, to be unfolded, and the box to choose one is not."""
    plain = tmp_path / "plain.html"
    plain.write_text(re.sub(r"<script>.*?</script>", "", report.read_text(), flags=re.DOTALL))
    document, said = browser(plain, "--dump-dom")
    assert not said
    assert document.count('<details class="problem"') == NUM_PROBLEMS
    assert 'hidden=""' not in document
    assert re.search(r"\n\.toolbar \{ display: none;", STYLE) and ".js .toolbar { display: flex; }" in STYLE


def test_light_and_dark(browser, report, tmp_path):
    """Grounds are those of the style sheet; the other values give other colours."""
    dark = "--blink-settings=preferredColorScheme=0"
    pictures = {}
    for name, options, place in (
        ("light", [], "#problem-2"),
        ("critic", [], "#problem-2/critic"),
        ("dark", [dark], "#problem-2"),
    ):
        path = tmp_path / f"{name}.png"
        _, said = browser(report, f"--screenshot={path}", "--window-size=1200,9000", *options, place=place)
        assert not said
        pictures[name] = np.round(imread(path)[:, :, :3] * 255)
    for name in ("light", "dark"):
        assert (pictures[name][5, 5] == rgb(colors(name)["ground"])).all()
        assert len(np.unique(pictures[name][::7, ::7].reshape(-1, 3), axis=0)) > 20
    assert (pictures["light"] != pictures["dark"]).any(axis=2).mean() > 0.9
    assert 1e-4 < (pictures["light"] != pictures["critic"]).any(axis=2).mean() < 0.5


def test_no_wider_than_a_phone(browser, report, tmp_path):
    """Tables scroll in their own boxes."""
    probe = "document.documentElement.dataset.width = document.documentElement.scrollWidth;"
    page = tmp_path / "probe.html"
    page.write_text(
        re.sub(r"<meta http-equiv[^>]*>", "", report.read_text()).replace("</body>", f"<script>{probe}</script></body>")
    )
    frame = tmp_path / "frame.html"  # the narrowest window is 500 wide
    frame.write_text(f'<iframe src="{page.name}" width="360" height="900"></iframe>')
    script = "onload = () => { document.title = frames[0].document.documentElement.dataset.width };"
    frame.write_text(frame.read_text() + f"<script>{script}</script>")
    document, _ = browser(frame, "--dump-dom", "--allow-file-access-from-files")
    assert "<title>360</title>" in document, document[:500]
