"""
`dapo-trl processbench`: from files in the form of ProcessBench and a tiny critic to F1.
"""

import json

import pytest
from datasets import Dataset

from conftest import CHAT_TEMPLATE, make_critic, make_tokenizer
from dapo_trl import StepCriticTrainer
from dapo_trl.cli import main
from dapo_trl.first_errors import evaluate_first_errors
from dapo_trl.processbench import _find_critics, evaluate_critic, load_processbench, processbench_rows
from dapo_trl.readers import read_processbench
from test_step_critic_trainer import config


def processbench(part: str, number: int = 8) -> list[dict]:
    """Rows in the published form: a third of the solutions is right."""
    rows = []
    for index in range(number):
        steps = [f"Step {step} of {index}: {7 * index % 11} + {step}" for step in range(1 + index % 4)]
        label = -1 if index % 3 == 0 else index % len(steps)
        row = {"id": f"{part}-{index}", "generator": "somebody", "problem": f"What is {index}?", "steps": steps}
        rows.append(row | {"final_answer_correct": label < 0, "label": label})
    return rows


@pytest.fixture
def files(tmp_path):
    """Two parts, one a list and one lines."""
    paths = [tmp_path / "gsm8k.json", tmp_path / "math.jsonl"]
    paths[0].write_text(json.dumps(processbench("gsm8k")))
    paths[1].write_text("".join(json.dumps(row) + "\n" for row in processbench("math", 9)))
    return list(map(str, paths))


@pytest.fixture
def critic(tmp_path):
    folder = tmp_path / "run" / "critic"
    make_critic().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE])
def test_from_files_to_f1(tmp_path, capsys, files, critic, chat_template):
    """The same as by hand, from values of rows that were put to the critic as it was trained."""
    tokenizer = make_tokenizer(chat_template)
    tokenizer.save_pretrained(critic)
    output = tmp_path / "found.json"
    arguments = ["--fit", files[0], "--test", files[1], "--prompt_template", "Q: {question}\n", "--output", str(output)]
    arguments += ["--step_separator", "\\n"]
    assert main(["processbench", str(critic), *arguments]) == 0
    text = capsys.readouterr().out
    trainer = StepCriticTrainer(make_critic(), config(tmp_path), processing_class=tokenizer)
    scored = []
    for part, number in (("gsm8k", 8), ("math", 9)):
        solutions, _ = read_processbench(processbench(part, number), step_separator="\n")
        prompts = [f"Q: {question}\n" for question in solutions["prompt"]]
        if chat_template:
            prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        solutions = solutions.remove_columns("prompt").add_column("prompt", prompts)
        scored.append(trainer.predict_values(solutions).to_list())
    found = json.loads(output.read_text())
    for rule in ("drop", "value"):
        expected = evaluate_first_errors(*scored, rule)
        assert found["results"][files[1]][rule]["threshold"] == pytest.approx(expected.threshold, abs=1e-5)
        assert found["results"][files[1]][rule]["f1"]["mean"] == pytest.approx(expected.f1.mean)
        assert found["mean_f1"][rule] == pytest.approx(expected.f1.mean)
    assert "First wrong steps, ProcessBench" in text
    assert found["left_out"] == dict.fromkeys(files, 0)


def test_a_run_knows_its_template(files, critic):
    (critic.parent / "results.json").write_text(json.dumps({"arguments": {"prompt_template": "Q: {question}\n"}}))
    found = [
        evaluate_critic(str(path), files[0], files[1:], prompt_template=template)
        for path, template in ((critic.parent, None), (critic, None), (critic, "Q: {question}\n"))
    ]
    assert found[0] == found[1] == found[2]
    assert found[0] != evaluate_critic(str(critic), files[0], files[1:], prompt_template="{question} Say it: ")


def test_of_several_iterations_the_last_critic_that_is_trained(tmp_path):
    places = [tmp_path / part / "critic" for part in ("", "iteration-2", "iteration-3")]
    for place in places:
        place.mkdir(parents=True)
        (place / "model.safetensors").touch()
    (tmp_path / "iteration-3" / "critic-2").mkdir()  # under way
    assert _find_critics(str(tmp_path), "{question}")[0] == [str(places[2])]
    for place in places[:2]:
        (place / "stage.json").touch()
    assert _find_critics(str(tmp_path), "{question}")[0] == [str(places[1])]
    assert _find_critics("some/critic", "{question}")[0] == ["some/critic"]


def test_several_critics_of_a_run(files, critic):
    """The mean of their values is measured; while one is under way, that of all that are there."""
    template = "Q: {question}\n"
    one = evaluate_critic(str(critic.parent), files[0], files[1:], prompt_template=template)
    for number in (2, 3):
        make_critic(seed=number).save_pretrained(critic.with_name(f"critic-{number}"))
        make_tokenizer().save_pretrained(critic.with_name(f"critic-{number}"))
    assert len(_find_critics(str(critic.parent), template)[0]) == 3
    thresholds = [
        evaluate_critic(str(path), files[0], files[1:], prompt_template=template)["results"][files[1]][
            "value"
        ].threshold
        for path in (critic, critic.with_name("critic-2"), critic.parent)
    ]
    assert one["results"][files[1]]["value"].threshold == thresholds[0]
    assert len(set(thresholds)) == 3


def test_a_folder_of_a_download(tmp_path, files):
    """Parts are named in its card, as on the Hub."""
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: gsm8k\n    path: gsm8k.json\n"
    (tmp_path / "README.md").write_text(card + "  - split: math\n    path: math.jsonl\n---\n")
    for part, path in zip(("gsm8k", "math"), files, strict=True):
        assert load_processbench(part, str(tmp_path)).to_list() == load_processbench(path).to_list()
    with pytest.raises(ValueError, match=r"'omnimath' of .* cannot be read: .*omnimath"):
        load_processbench("omnimath", str(tmp_path))


def test_rows():
    """Steps are exact text; one that is empty cannot be valued, and its solution is counted."""
    rows = processbench("math", 2)
    rows[0]["steps"] = [""]
    solutions, left_out = processbench_rows(Dataset.from_list(rows), "Q: {question}", step_separator="\n")
    assert left_out == 1
    assert solutions[0]["prompt"] == "Q: What is 1?"
    assert solutions[0]["completions"] == ["Step 0 of 1: 7 + 0\n", "Step 1 of 1: 7 + 1"]
    assert (solutions[0]["problem_id"], solutions[0]["first_error"]) == ("math-1", 1)


@pytest.mark.parametrize("label", [-2, 2])
def test_labels_that_name_no_step(label):
    rows = processbench("math", 2)
    rows[1]["label"] = label
    with pytest.raises(ValueError, match=rf"Row 1: `label` is {label}, but the solution has 2 steps: expected -1"):
        read_processbench(rows)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--test", "FIT"], 2, "cannot be measured on it. Name other parts."),
        (["--test", "nowhere.json"], 2, "There is no file 'nowhere.json'"),
        (["--prompt_template", "Question"], 2, "`prompt_template` must contain {question}"),
        (["--prompt_template", ""], 2, "`prompt_template` must contain {question}"),
        ([], 2, "How were questions put to the critic in its training? Give `--prompt_template`"),
        (["--prompt_template", "{question}", "--test", "COPY"], 1, "8 solutions are in `fit_rows` and in `rows`, such"),
        (["--prompt_template", "{question}", "--test", "RIGHT"], 1, "There are no solutions with a wrong step"),
    ],
)
def test_wrong_command_lines(tmp_path, capsys, files, critic, arguments, code, message):
    places = {"FIT": files[0]} | {name: str(tmp_path / f"{name}.json") for name in ("COPY", "RIGHT")}
    (tmp_path / "COPY.json").write_text(json.dumps(processbench("gsm8k")))
    (tmp_path / "RIGHT.json").write_text(json.dumps([row for row in processbench("right") if row["label"] < 0]))
    arguments = [places.get(argument, argument) for argument in arguments]
    arguments = arguments if "--test" in arguments else [*arguments, "--test", files[1]]
    if code == 2 and "nowhere.json" in arguments:
        arguments += ["--prompt_template", "{question}"]
    assert main(["processbench", str(critic), "--fit", files[0], *arguments]) == code
    assert message in capsys.readouterr().err
