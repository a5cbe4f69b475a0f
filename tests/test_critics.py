"""
`critics.py`: the mean value of several critics.
"""

import pytest
from datasets import Dataset

from conftest import make_critic, make_tokenizer, random_solution_rows
from dapo_trl import StepCriticTrainer
from dapo_trl.critics import mean_values, solution_metrics
from test_step_critic_trainer import config


def scored(*values: list[float]) -> Dataset:
    return Dataset.from_dict({"problem_id": [f"p{index}" for index in range(len(values))], "critic_values": values})


def test_mean_by_hand():
    """Rows keep their order and their other columns; each critic counts alike."""
    tables = [scored([0.0, 0.3], [0.5]), scored([0.5, 0.6], [0.25]), scored([1.0, 0.9], [0.0])]
    mean = mean_values(tables)
    assert mean.column_names == ["problem_id", "critic_values"]
    assert mean["problem_id"][:] == ["p0", "p1"]
    assert mean["critic_values"][0] == pytest.approx([0.5, 0.6])
    assert mean["critic_values"][1] == pytest.approx([0.25])


def test_of_one_critic():
    """It is what it was, bit for bit."""
    table = scored([0.1, 1 / 3], [0.7])
    assert mean_values([table])["critic_values"][:] == [[0.1, 1 / 3], [0.7]]
    assert mean_values([table] * 2)["critic_values"][:] == [[0.1, 1 / 3], [0.7]]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "There are no critics"),
        ([scored([0.1]), scored([0.1], [0.2])], "different numbers of rows: 1, 2"),
        ([scored([0.1], [0.2]), scored([0.1], [0.2, 0.3])], "Row 1 has different numbers of values: 1, 2"),
    ],
)
def test_what_does_not_fit(tables, message):
    with pytest.raises(ValueError, match=message):
        mean_values(tables)


def test_metrics_are_those_of_the_trainer(tmp_path):
    """Of one critic: what `evaluate` measures, from the values that `predict_values` gives."""
    rows = Dataset.from_list(random_solution_rows(7))
    trainer = StepCriticTrainer(make_critic(), config(tmp_path), eval_dataset=rows, processing_class=make_tokenizer())
    expected = trainer.evaluate()
    found = solution_metrics(trainer.predict_values(rows))
    assert {"bce", "bce_constant", "skill", "brier", "calibration_error"} <= found.keys()
    for name, number in found.items():
        assert number == pytest.approx(expected[f"eval_{name}"], rel=1e-4, abs=1e-6), name
