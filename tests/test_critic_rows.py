"""
`critic_rows.py`: next steps that no kept solution takes, as rows for the critic.
"""

import pytest
from datasets import Dataset

from conftest import make_critic, make_tokenizer
from dapo_trl import StepCriticConfig, StepCriticTrainer
from dapo_trl.critic_rows import candidate_solutions
from dapo_trl.formats import check_dataset
from dapo_trl.tokenized_rows import tokenize_critic_row


KEPT = {
    "problem_id": "1",
    "prompt": "1+2+3=",
    "completions": ["3\n", "6"],
    "values": [0.5, 0.75, 1.0],
    "mc_successes": [2.0, 6.0, 1.0],
    "mc_rollouts": [4, 8, 1],
    "reward": 1.0,
    "truncated": False,
}
STATES = [
    {
        "problem_id": "1",
        "prompt": "1+2+3=",
        "prefix": [],
        "candidates": ["3\n", "4\n", "6"],
        "counts": [4, 2, 1],
        "values": [0.75, 0.25, 1.0],
        "mc_successes": [6.0, 1.0, 1.0],
        "mc_rollouts": [8, 4, 1],
        "rewards": [None, None, 1.0],
    },
    {
        "problem_id": "1",
        "prompt": "1+2+3=",
        "prefix": ["3\n"],
        "candidates": ["5\n", "6"],
        "counts": [3, 1],
        "values": [0.0, 1.0],
        "mc_successes": [0.0, 1.0],
        "mc_rollouts": [3, 1],
        "rewards": [None, 1.0],
    },
]


@pytest.fixture
def rows() -> Dataset:
    return candidate_solutions(Dataset.from_list(STATES), Dataset.from_list([KEPT]))


def test_by_hand(rows):
    """Of five candidates one is taken, two end the solution; two are left, each counted at its own state only."""
    assert rows["completions"] == [["4\n"], ["3\n", "5\n"]]
    assert rows["mc_rollouts"] == [[0, 4], [0, 0, 3]]
    assert rows["mc_successes"] == [[0.0, 1.0], [0.0, 0.0, 0.0]]
    assert rows["values"] == [[0.25, 0.25], [0.0, 0.0, 0.0]]
    assert rows.features == Dataset.from_list([KEPT]).features
    assert check_dataset(rows).format == "solution"


def test_ids_are_the_sampled_ones():
    kept = KEPT | {"prompt_ids": [9], "completions_ids": [[1, 2], [3]]}
    state = STATES[0] | {"prompt_ids": [9], "prefix_ids": [], "candidates_ids": [[1, 2], [4, 2], [3]]}
    rows = candidate_solutions(Dataset.from_list([state]), Dataset.from_list([kept]))
    assert rows["completions_ids"] == [[[4, 2]]]
    assert rows["prompt_ids"] == [[9]]


def test_a_step_in_the_middle_does_not_end_the_solution():
    """Without ids text is tokenized, and no end token follows a step that others follow."""
    tokenizer, kept = make_tokenizer(), {name: value for name, value in KEPT.items() if name != "truncated"}
    rows = candidate_solutions(Dataset.from_list(STATES), Dataset.from_list([kept]))
    last = [tokenize_critic_row(row, tokenizer)["branches"][0][-1] for row in rows]
    assert [tokenizer.decode(ids) for ids in last] == ["4\n", "5\n"]


def test_the_same_step_of_another_problem_is_not_taken():
    other = KEPT | {"problem_id": "2"}
    rows = candidate_solutions(Dataset.from_list(STATES[:1]), Dataset.from_list([other]))
    assert rows["completions"] == [["3\n"], ["4\n"]]


def test_nothing_left_and_missing_columns():
    """Where all candidates are taken there is no row; rows without counts are refused."""
    state = STATES[0] | {name: STATES[0][name][:1] for name in ("candidates", "values", "mc_successes", "mc_rollouts")}
    rows = candidate_solutions(Dataset.from_list([state | {"rewards": [None]}]), Dataset.from_list([KEPT]))
    assert len(rows) == 0 and rows.column_names == list(KEPT)
    with pytest.raises(ValueError, match="'mc_successes', 'mc_rollouts' are not there"):
        bare = Dataset.from_list(STATES).remove_columns(["mc_successes", "mc_rollouts"])
        candidate_solutions(bare, Dataset.from_list([KEPT]))


def test_only_the_last_state_is_learned_from(rows, tmp_path):
    """States without completions have no weight: other values there change neither loss nor gradient."""
    args = StepCriticConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=2, learning_rate=1e-2)
    losses = []
    for value in (0.0, 1.0):
        changed = rows.map(lambda row, v=value: {"values": [v] * (len(row["values"]) - 1) + row["values"][-1:]})
        trainer = StepCriticTrainer(make_critic(), args, train_dataset=changed, processing_class=make_tokenizer())
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1] > 0


def test_rows_without_any_rollout_are_refused(rows):
    row = rows[0] | {"mc_rollouts": [0, 0], "mc_successes": [0.0, 0.0]}
    with pytest.raises(ValueError, match="Row 0, column `mc_rollouts`: no state has a rollout"):
        check_dataset(Dataset.from_list([row]))
