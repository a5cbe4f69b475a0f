"""
`anchors.py`: states with nothing to compare, which hold the policy in place.
"""

import pytest
import torch
from datasets import Dataset, concatenate_datasets

from conftest import make_policy, make_tokenizer, random_solution_rows
from dapo_trl import DAPOConfig, DAPOTrainer
from dapo_trl.advantages import add_advantages
from dapo_trl.anchors import anchor_states
from dapo_trl.formats import check_dataset


KEPT = {
    "problem_id": "1",
    "prompt": "1+2+3=",
    "prompt_ids": [1],
    "completions": ["3\n", "5\n", "6"],
    "completions_ids": [[2, 3], [4, 3], [5, 6]],
    "values": [0.5, 0.75, 0.25, 1.0],
    "mc_successes": [2.0, 6.0, 1.0, 1.0],
    "mc_rollouts": [4, 8, 4, 1],
    "reward": 1.0,
    "truncated": False,
}
TWIN = KEPT | {"completions": ["3\n", "7"], "completions_ids": [[2, 3], [7, 6]], "values": [0.5, 0.75, 0.0]}
TWIN |= {"mc_successes": [2.0, 6.0, 0.0], "mc_rollouts": [4, 8, 1], "reward": 0.0}
STATE = {
    "problem_id": "1",
    "prompt": "1+2+3=",
    "prompt_ids": [1],
    "prefix": ["3\n"],
    "prefix_ids": [[2, 3]],
    "candidates": ["5\n", "7"],
    "candidates_ids": [[4, 3], [7, 6]],
    "counts": [3, 1],
    "values": [0.25, 0.0],
    "mc_successes": [1.0, 0.0],
    "mc_rollouts": [4, 1],
    "rewards": [None, 0.0],
}


@pytest.fixture
def states() -> Dataset:
    return add_advantages(Dataset.from_list([STATE]), "values")


def test_by_hand(states):
    """Of three states one has a row; the prompt is in both solutions and comes once; the end has its reward."""
    anchors = anchor_states(Dataset.from_list([KEPT, TWIN]), states)
    assert anchors.features == states.features
    first, last = anchors
    assert (first["prefix"], first["candidates"], first["candidates_ids"]) == ([], ["3\n"], [[2, 3]])
    assert (first["values"], first["mc_successes"], first["mc_rollouts"]) == ([0.75], [6.0], [8])
    assert (last["prefix"], last["prefix_ids"]) == (["3\n", "5\n"], [[2, 3], [4, 3]])
    assert (last["candidates"], last["values"], last["rewards"]) == (["6"], [1.0], [1.0])
    for row in anchors:
        assert (row["advantages"], row["counts"]) == ([0.0], [1])
    assert first["rewards"] == [None]


def test_what_was_cut_off_is_no_anchor(states):
    anchors = anchor_states(Dataset.from_list([KEPT | {"truncated": True}]), states)
    assert anchors["candidates"] == [["3\n"]]


def test_the_same_step_of_another_problem_is_another_state(states):
    other = KEPT | {"problem_id": "2", "prompt": "3+3="}
    assert len(anchor_states(Dataset.from_list([KEPT, other]), states)) == 2 + 3


def test_rows_go_together_with_others(states):
    both = concatenate_datasets([states, anchor_states(Dataset.from_list([KEPT]), states)])
    assert check_dataset(both).format == "state"
    assert len(both) == 3


def test_columns_are_asked_for(states):
    with pytest.raises(ValueError, match="`states` needs the columns 'problem_id', 'advantages'; 'advantages' are not"):
        anchor_states(Dataset.from_list([KEPT]), Dataset.from_list([STATE]))
    with pytest.raises(ValueError, match="`solutions` needs the columns"):
        anchor_states(Dataset.from_list([KEPT]).remove_columns("problem_id"), states)


def test_they_hold_the_policy_in_place(tmp_path):
    """
    One state is trained on, hard; the steps of other states keep their probabilities with anchors, and lose them
    without.
    """
    tokenizer = make_tokenizer()
    solutions = [row | {"problem_id": str(i), "reward": 1.0} for i, row in enumerate(random_solution_rows(8))]
    compared = {"problem_id": "0", "prompt": solutions[0]["prompt"], "prefix": [], "candidates": ["1\n", "2\n"]}
    states = Dataset.from_list([compared | {"counts": [1, 1], "advantages": [0.5, -0.5]}])
    states = states.cast_column("prefix", Dataset.from_list([{"prefix": ["a"]}]).features["prefix"])
    columns = ["problem_id", "prompt", "completions", "reward"]
    anchors = anchor_states(Dataset.from_list(solutions).select_columns(columns), states)
    arguments = {"beta": 0.05, "learning_rate": 1e-3, "max_steps": 40, "per_device_train_batch_size": 64}
    arguments |= {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    args = DAPOConfig(str(tmp_path), gradient_checkpointing=False, **arguments)

    def logps(model) -> torch.Tensor:
        trainer = DAPOTrainer(model, args=args, train_dataset=anchors, processing_class=tokenizer)
        return torch.tensor(trainer.with_ref_logps()["ref_logps"])

    drifts = []
    for rows in (states, concatenate_datasets([states, anchors])):
        trainer = DAPOTrainer(make_policy(), args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        drifts.append((logps(trainer.model) - logps(make_policy())).abs().mean().item())
    without, with_anchors = drifts
    assert with_anchors < 0.3 * without
