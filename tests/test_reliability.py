"""
Reliability of advantages in training: as weights of pairs, and as what leaves pairs out.
"""

import random

import pytest
import torch
from datasets import Dataset

from conftest import make_policy, random_solution_rows, random_state_rows
from dapo_trl import DAPOTrainer
from test_dapo_trainer import GradientRecorder, check_step, config, reference_step, relative_difference


def rows_with_reliabilities(num_rows: int = 6, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    rows = random_state_rows(num_rows, seed)
    return [row | {"reliabilities": [rng.uniform(0.05, 1) for _ in row["candidates"]]} for row in rows]


def make_trainer(tmp_path, tokenizer, rows, **kwargs) -> DAPOTrainer:
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3} | kwargs
    rows = Dataset.from_list(rows)
    return DAPOTrainer(
        make_policy(seed=0), make_policy(seed=1), config(tmp_path, **arguments), None, rows, None, tokenizer
    )


def only(row: dict, kept: list[int]) -> dict:
    """A row with some of its candidates, whose numbers are what they were."""
    columns = ("candidates", "advantages", "counts", "reliabilities")
    return row | {name: [row[name][index] for index in kept] for name in columns}


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("with_counts", [False, True])
def test_weighted_step_equals_single_sequences(tmp_path, tokenizer, layout, with_counts):
    """Loss and every gradient of a step whose pairs weigh by their reliability, and by their counts if those count."""
    rows = rows_with_reliabilities()
    weights = [
        [r * (n if with_counts else 1) for r, n in zip(row["reliabilities"], row["counts"], strict=True)]
        for row in rows
    ]
    weighted = [row | {"counts": numbers} for row, numbers in zip(rows, weights, strict=True)]
    expected = reference_step(make_policy(seed=0), make_policy(seed=1), weighted, tokenizer, 0.1, weights="counts")
    options = {"reliability_weights": True, "duplicate_weights": "counts" if with_counts else "uniform"}
    check_step(make_trainer(tmp_path, tokenizer, rows, layout=layout, **options), *expected)


def test_equal_reliabilities_change_nothing(tmp_path, tokenizer):
    """The mean is over the weights of the step: a common factor drops out, of the loss and of its gradient."""
    rows = [row | {"reliabilities": [0.3] * len(row["candidates"])} for row in random_state_rows(6)]
    expected = reference_step(make_policy(seed=0), make_policy(seed=1), rows, tokenizer, 0.1)
    check_step(make_trainer(tmp_path, tokenizer, rows, reliability_weights=True), *expected)


def test_negative_control(tmp_path, tokenizer):
    """Other reliabilities do change the step; without the option the column does not matter."""
    rows = rows_with_reliabilities()
    _, gradients = reference_step(make_policy(seed=0), make_policy(seed=1), rows, tokenizer, 0.1)
    found = []
    for option in (True, False):
        trainer = make_trainer(tmp_path, tokenizer, rows, reliability_weights=option)
        recorder = GradientRecorder(trainer)
        trainer.train()
        found.append(relative_difference(recorder.gradients, gradients))
    assert found[0] > 0.01
    assert found[1] < 1e-5


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("weigh", [False, True])
def test_unreliable_candidates_are_left_out(tmp_path, tokenizer, layout, weigh):
    """What is left has the advantages that it had; a state of which nothing is left is not trained on."""
    rows = rows_with_reliabilities()
    rows[2]["reliabilities"] = [0.1] * len(rows[2]["candidates"])
    kept = [[i for i, number in enumerate(row["reliabilities"]) if number >= 0.4] for row in rows]
    left = [only(row, indices) for row, indices in zip(rows, kept, strict=True) if indices]
    weighted = [row | {"counts": row["reliabilities"]} for row in left] if weigh else left
    kind = "counts" if weigh else "uniform"
    expected = reference_step(make_policy(seed=0), make_policy(seed=1), weighted, tokenizer, 0.1, weights=kind)
    options = {"min_reliability": 0.4, "reliability_weights": weigh, "per_device_train_batch_size": 6}
    trainer = make_trainer(tmp_path, tokenizer, rows, layout=layout, gradient_accumulation_steps=1, **options)
    check_step(trainer, *expected)
    report = trainer.preprocessing_report["train"]
    assert report["steps"] == sum(map(len, kept))
    assert report["steps_unreliable"] == sum(len(row["candidates"]) for row in rows) - report["steps"]
    assert report["rows_unreliable"] == sum(not indices for indices in kept) == report["rows"] - report["rows_kept"]


def test_trained_policies_of_both_layouts_are_one(tmp_path, tokenizer):
    """After several steps with both options."""
    policies = []
    for layout in ("tree", "padded"):
        options = {"reliability_weights": True, "min_reliability": 0.3, "max_steps": 3, "learning_rate": 1e-3}
        trainer = make_trainer(tmp_path, tokenizer, rows_with_reliabilities(8), layout=layout, **options)
        trainer.train()
        assert trainer.layout == layout
        policies.append(dict(trainer.model.named_parameters()))
    before = dict(make_policy(seed=0).named_parameters())
    for name, parameter in policies[0].items():
        torch.testing.assert_close(parameter, policies[1][name], rtol=1e-4, atol=1e-5)
    assert any((parameter - before[name]).abs().max() > 1e-3 for name, parameter in policies[0].items())


def state(**columns) -> dict:
    return {"prompt": "2+2*3?\n", "prefix": [], "candidates": ["a\n", "b\n", "c\n"], "counts": [1, 1, 1]} | columns


@pytest.mark.parametrize(("min_gap", "kept"), [(0.1, 1), (0.0, 2)])
def test_contrast_goes_with_what_is_left_out(tmp_path, tokenizer, min_gap, kept, caplog):
    """
    As with candidates that are too long: a gap that only noise has made is none. A state with one candidate left has
    no gap, and stays where none is asked for.
    """
    rows = [
        state(advantages=[0.5, -0.2, -0.3], reliabilities=[0.9, 0.9, 0.1]),
        state(advantages=[0.4, -0.2, -0.2], reliabilities=[0.9, 0.1, 0.1]) | {"prompt": "2+3*3?\n"},
    ]
    trainer = make_trainer(tmp_path, tokenizer, rows, min_reliability=0.5, min_advantage_gap=min_gap)
    report = trainer.preprocessing_report["train"]
    counted = ("rows_kept", "rows_without_contrast", "steps_unreliable", "rows_unreliable")
    assert tuple(report[name] for name in counted) == (kept, 2 - kept, 3, 0)
    assert trainer.train_dataset[0]["advantages"] == [0.5, -0.2]
    assert "3 candidates have a reliability below `min_reliability=0.5`, which leaves 0 rows with none" in caplog.text


def test_reliabilities_stay_with_their_candidates(tmp_path, tokenizer):
    """Where the first candidate is too long; and where two rows of a state become one."""
    rows = [
        state(advantages=[0.5, -0.2, -0.3], reliabilities=[0.9, 0.6, 0.7])
        | {"candidates": ["long " * 9, "b\n", "c\n"]},
        state(advantages=[0.1], reliabilities=[0.8], candidates=["d\n"], counts=[1]),
    ]
    trainer = make_trainer(tmp_path, tokenizer, rows, reliability_weights=True, min_reliability=0.65, max_length=20)
    assert trainer.train_dataset["weights"][:] == [[0.7, 0.8]]
    assert trainer.train_dataset["advantages"][:] == [[-0.3, 0.1]]


def test_one_candidate_left_of_two_rows_of_a_state(tmp_path, tokenizer):
    """There is nothing to compare it with anew: it keeps its advantage."""
    row = {"prompt": "1+1=", "prefix": [], "candidates": ["2", "3"], "values": [1.0, 0.0], "counts": [1, 1]}
    rows = [row | {"reliabilities": [0.9, 0.1]}, row | {"candidates": ["4", "5"], "reliabilities": [0.1, 0.2]}]
    trainer = make_trainer(tmp_path, tokenizer, rows, min_reliability=0.5, min_advantage_gap=0.0)
    assert trainer.train_dataset["advantages"][:] == [[0.5]]


def test_reference_of_what_is_left_out_is_not_computed(tmp_path, tokenizer):
    """It is null in the rows that are given back, which fit the same option again and no smaller one."""
    rows = [state(advantages=[0.5, -0.2, -0.3], reliabilities=[0.9, 0.1, 0.8])]
    trainer = make_trainer(tmp_path, tokenizer, rows, min_reliability=0.5)
    again = trainer.with_ref_logps().to_list()
    assert [logp is None for logp in again[0]["ref_logps"]] == [False, True, False]
    assert make_trainer(tmp_path, tokenizer, again, min_reliability=0.5).preprocessing_report["train"]["steps"] == 2
    with pytest.raises(ValueError, match=r"`ref_logps` has no number for step 1, .* or `min_reliability`"):
        make_trainer(tmp_path, tokenizer, again)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            random_state_rows(2),
            {"reliability_weights": True},
            r"`reliability_weights=True` needs a column `reliabilities`, .*`add_advantages",
        ),
        (
            random_state_rows(2),
            {"min_reliability": 0.5},
            r"`min_reliability=0.5` needs a column `reliabilities`, which `train_dataset` has not",
        ),
        (
            random_solution_rows(2),
            {"reliability_weights": True},
            r"is about the candidates of states, but `train_dataset` has the solution format. Give state rows",
        ),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            {"min_reliability": 0.1},
            r"`min_reliability=0.1` is about the candidates of states, but `train_dataset` has the preference format",
        ),
        (
            [*rows_with_reliabilities(1), random_state_rows(2)[1] | {"reliabilities": None}],
            {"reliability_weights": True},
            r"Row 1 of `train_dataset` has no `reliabilities`",
        ),
        (
            [rows_with_reliabilities(1)[0] | {"reliabilities": [0.5]}],
            {},
            r"Row 0, column `reliabilities`: expected \d numbers, one for each of the \d candidates",
        ),
        (
            [state(advantages=[0.5, -0.2, -0.3], reliabilities=[0.9, 1.5, 0.8])],
            {"reliability_weights": True},
            r"Row 0, column `reliabilities`: entry 1 is not in \[0, 1\]",
        ),
        (
            [state(advantages=[0.5, -0.2, -0.3], reliabilities=[0.2, 0.1, 0.3])],
            {"min_reliability": 0.5},
            r"No row .* 3 candidates have a reliability below .*, lower `min_advantage_gap` or `min_reliability`",
        ),
    ],
)
def test_refusals(tmp_path, tokenizer, rows, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, rows, **options)


@pytest.mark.parametrize("number", [-0.1, 1.1, float("nan")])
def test_refused_settings(tmp_path, number):
    with pytest.raises(ValueError, match=r"`min_reliability` must lie in \[0, 1\], got"):
        config(tmp_path, min_reliability=number)
