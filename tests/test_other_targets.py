"""
Targets and losses beside the paper's, in the trainer: log-partitions and listwise, against slow float64 steps.
"""

import copy
import logging
import random

import pytest
import torch
from datasets import Dataset

import reference
from conftest import make_policy, random_solution_rows, random_state_rows
from dapo_trl import DAPOTrainer
from dapo_trl.losses import listwise_loss
from dapo_trl.tokenization import encode_state
from test_dapo_trainer import check_step, config, reference_step, step_logps


pytestmark = pytest.mark.usefixtures("quick_fingerprints")


def make_trainer(tmp_path, tokenizer, rows, policy=None, eval_rows=None, **kwargs) -> DAPOTrainer:
    return DAPOTrainer(
        model=policy or make_policy(seed=0),
        ref_model=make_policy(seed=1),
        args=config(tmp_path, **kwargs),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=tokenizer,
    )


def with_values(rows: list[dict], seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [row | {"values": [rng.random() for _ in row["candidates"]]} for row in rows]


class TestLogPartition:
    @pytest.mark.parametrize("kind", ["sample", "gaussian"])
    def test_step_equals_single_sequences(self, tmp_path, tokenizer, kind):
        """Advantages in the loss are those of the rows, less beta times the log-partition of their state."""
        policy, rows = make_policy(seed=0), random_state_rows(8)
        less = []
        for row in rows:
            shift = 0.5 * reference.log_partition(row["advantages"], 0.5, row["counts"], kind)
            less.append(row | {"advantages": [advantage - shift for advantage in row["advantages"]]})
        loss, gradients = reference_step(policy, make_policy(seed=1), less, tokenizer, beta=0.5)
        plain, _ = reference_step(policy, make_policy(seed=1), rows, tokenizer, beta=0.5)
        assert loss != pytest.approx(plain, rel=1e-3)
        trainer = make_trainer(
            tmp_path, tokenizer, rows, policy, beta=0.5, log_partition=kind, per_device_train_batch_size=8
        )
        check_step(trainer, loss, gradients)

    def test_rows_of_one_state_have_one(self, tmp_path, tokenizer):
        """Candidates of a state that several rows hold are samples of that state together."""
        row = {"prompt": "?\n", "prefix": [], "candidates": ["a\n", "b\n", "c\n"], "counts": [2, 1, 1]}
        row |= {"advantages": [0.25, -0.5, 0.0]}
        parts = [
            row | {name: row[name][cut] for name in ("candidates", "counts", "advantages")}
            for cut in (slice(0, 1), slice(1, 3))
        ]
        whole, merged = (
            make_trainer(tmp_path, tokenizer, rows, log_partition="sample").train_dataset for rows in ([row], parts)
        )
        assert merged["advantages"][0] == pytest.approx(whole["advantages"][0], rel=1e-12)
        shift = 0.1 * reference.log_partition(row["advantages"], 0.1, row["counts"], "sample")
        assert whole["advantages"][0] == pytest.approx([a - shift for a in row["advantages"]], rel=1e-12)

    def test_values_become_advantages_first(self, tmp_path, tokenizer):
        row = {"prompt": "?\n", "prefix": [], "candidates": ["a\n", "b\n"], "counts": [3, 1], "values": [0.75, 0.25]}
        found = make_trainer(tmp_path, tokenizer, [row], log_partition="sample").train_dataset["advantages"][0]
        shift = 0.1 * reference.log_partition([0.125, -0.375], 0.1, [3, 1], "sample")
        assert found == pytest.approx([0.125 - shift, -0.375 - shift], rel=1e-12)

    def test_an_impossible_one_is_warned_of(self, tmp_path, tokenizer, caplog):
        """At the demo's beta of 0.1 the Gaussian form exceeds all targets of a state; at 2 it does not."""
        rows = random_state_rows(6)
        with caplog.at_level(logging.WARNING):
            make_trainer(tmp_path, tokenizer, rows, log_partition="gaussian", beta=0.05)
        assert "larger than any log-partition of these advantages can be at `beta=0.05`" in caplog.text
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            make_trainer(tmp_path, tokenizer, rows, log_partition="gaussian", beta=2.0)
            make_trainer(tmp_path, tokenizer, rows, log_partition="sample", beta=0.05)
        assert "log-partition" not in caplog.text

    def test_all_samples_count_whatever_is_left_of_them(self, tmp_path, tokenizer):
        """The best candidate is too long, or not reliable enough: log Z is that of the state all the same."""
        row = {"prompt": "?\n", "prefix": [], "candidates": ["a" * 40 + "\n", "b\n", "c\n"], "counts": [1, 1, 2]}
        row |= {"advantages": [0.75, -0.25, -0.25], "reliabilities": [0.1, 1.0, 1.0]}
        shift = 0.1 * reference.log_partition(row["advantages"], 0.1, row["counts"], "sample")
        for given in ({"max_length": 20}, {"min_reliability": 0.5}):
            found = make_trainer(tmp_path, tokenizer, [row], log_partition="sample", **given).train_dataset
            assert found["advantages"][0] == pytest.approx([-0.25 - shift] * 2, rel=1e-12)
            assert not {"sampled_advantages", "sampled_counts"} & set(found.column_names)

    def test_impossible_ones_are_counted_of_what_is_trained_on(self, tmp_path, tokenizer, caplog):
        """States that the gap filter leaves out do not hide them."""
        row = {"prompt": "?\n", "prefix": [], "candidates": ["a\n", "b\n"], "advantages": [0.5, -0.5]}
        flat = [row | {"prompt": f"{number}?\n", "advantages": [0.01, -0.01]} for number in range(50)]
        with caplog.at_level(logging.WARNING):
            trainer = make_trainer(
                tmp_path, tokenizer, [row, *flat], log_partition="gaussian", min_advantage_gap=0.1, beta=0.02
            )
        assert trainer.preprocessing_report["train"]["log_partitions_impossible"] == 1
        assert "in 1 of 1 states" in caplog.text

    def test_a_state_with_one_candidate(self, tmp_path, tokenizer):
        """With an advantage of 0, as of anchors, its log-partition is 0; another advantage would vanish."""
        row = {"prompt": "?\n", "prefix": [], "candidates": ["a\n"], "advantages": [0.0]}
        rows = [row, row | {"prompt": "!\n", "candidates": ["a\n", "b\n"], "advantages": [0.5, -0.5]}]
        assert make_trainer(tmp_path, tokenizer, rows, log_partition="sample").train_dataset["advantages"][0] == [0.0]
        with pytest.raises(ValueError, match="a state with one candidate, of advantage"):
            make_trainer(tmp_path, tokenizer, [row | {"advantages": [0.4]}], log_partition="sample")

    def test_preference_rows(self, tmp_path, tokenizer):
        """Two candidates of advantages 1/2 and -1/2: log Z = log cosh(1 / (2 beta))."""
        row = {"prompt": "?\n", "chosen": "a\n", "rejected": "b\n"}
        found = make_trainer(tmp_path, tokenizer, [row], log_partition="sample", beta=0.5).train_dataset["advantages"][
            0
        ]
        shift = 0.5 * torch.tensor(1.0).double().cosh().log().item()
        assert found == pytest.approx([0.5 - shift, -0.5 - shift], rel=1e-12)

    def test_refuses_solution_rows(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match="`log_partition='sample'` is a mean over the candidates of a state"):
            make_trainer(tmp_path, tokenizer, random_solution_rows(2), log_partition="sample")


def listwise_step(policy, ref_model, rows, tokenizer, value_power, ref_power):
    """Loss and gradients of one optimizer step over all rows, in float64, one sequence a pair."""
    model, ref_model = copy.deepcopy(policy).double(), copy.deepcopy(ref_model).double()
    logps, ref_logps, values, states = [], [], [], []
    for number, row in enumerate(rows):
        ended = [False] * len(row["candidates"])
        context, steps = encode_state(row["prompt"], row["prefix"], row["candidates"], ended, tokenizer)
        for step, value in zip(steps, row["values"], strict=True):
            logps.append(step_logps(model, context, step))
            with torch.no_grad():
                ref_logps.append(step_logps(ref_model, context, step))
            values.append(value)
            states.append(number)
    given = [torch.stack(logps), torch.stack(ref_logps), torch.tensor(values).double(), torch.tensor(states)]
    loss = listwise_loss(*given, None, value_power, ref_power)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


class TestListwise:
    @pytest.mark.parametrize("layout", ["tree", "padded"])
    @pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (3, 3)])
    def test_step_equals_single_sequences(self, tmp_path, tokenizer, layout, batch_size, accumulation):
        """The mean is over all states of the optimizer step, also of a state that a row of trees would cut in two."""
        policy, rows = make_policy(seed=0), with_values(random_state_rows(8))
        loss, gradients = listwise_step(policy, make_policy(seed=1), rows, tokenizer, 2.0, 0.5)
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            rows,
            policy,
            loss_type="listwise",
            value_power=2.0,
            ref_power=0.5,
            layout=layout,
            max_tokens_per_row=128 if layout == "tree" else None,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        check_step(trainer, loss, gradients)

    def test_evaluation_is_a_mean_over_states(self, tmp_path, tokenizer):
        rows, policy = with_values(random_state_rows(7)), make_policy(seed=0)
        loss, _ = listwise_step(policy, make_policy(seed=1), rows, tokenizer, 1.0, 1.0)
        trainer = make_trainer(
            tmp_path, tokenizer, rows, policy, rows, loss_type="listwise", per_device_eval_batch_size=3
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-4)

    def test_values_of_candidates_that_end_are_their_rewards(self, tmp_path, tokenizer):
        row = {"prompt": "?\n", "prefix": [], "candidates": ["a", "b\n"], "values": [0.5, 0.25], "rewards": [1.0, None]}
        rows = [row | {"advantages": [0.375, -0.375]}]
        assert make_trainer(tmp_path, tokenizer, rows, loss_type="listwise").train_dataset["values"] == [[1.0, 0.25]]

    def test_given_advantages_stay_when_rows_are_merged(self, tmp_path, tokenizer):
        """They select states by their gap; the loss has no use for them."""
        row = {"prompt": "?\n", "prefix": [], "candidates": ["a\n", "b\n"], "values": [0.5, 0.25]}
        rows = [row | {"advantages": [0.1, -0.3]}, row | {"candidates": ["c\n", "d\n"], "advantages": [0.2, 0.0]}]
        prepared = make_trainer(tmp_path, tokenizer, rows, loss_type="listwise").train_dataset
        assert prepared["advantages"] == [[0.1, -0.3, 0.2, 0.0]] and prepared["values"] == [[0.5, 0.25, 0.5, 0.25]]

    def test_states_with_one_candidate_are_left_out_and_counted(self, tmp_path, tokenizer):
        rows = with_values(random_state_rows(3))
        rows.append({"prompt": "!\n", "prefix": [], "candidates": ["a\n"], "advantages": [0.0], "values": [0.5]})
        trainer = make_trainer(tmp_path, tokenizer, rows, loss_type="listwise")
        report = trainer.preprocessing_report["train"]
        assert report["rows_with_one_candidate"] == 1 and report["rows_without_contrast"] == 0

    def test_says_whose_values_are_compared(self, tmp_path, tokenizer, caplog):
        rows = [row | {"critic_values": row["values"]} for row in with_values(random_state_rows(2))]
        with caplog.at_level(logging.WARNING):
            make_trainer(tmp_path, tokenizer, rows, loss_type="listwise")
        assert "has `critic_values`, but a listwise loss compares `values`" in caplog.text

    def test_the_card_says_so(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer, with_values(random_state_rows(2)), loss_type="listwise")
        trainer.create_model_card()
        card = (tmp_path / "out" / "README.md").read_text()
        assert "are compared with each other" in card and "| `loss_type` | listwise |" in card
        assert "`beta`" not in card and "| `value_power`" not in card

    def test_learns_to_prefer_what_is_worth_more(self, tmp_path, tokenizer):
        """From the reference on, the share of the best candidate goes to its target, q = V + epsilon over their sum."""
        row = {"prompt": "?\n", "prefix": [], "candidates": ["a\n", "b\n"], "values": [0.9, 0.1]}
        trainer = DAPOTrainer(
            model=make_policy(),
            args=config(tmp_path, loss_type="listwise", ref_power=0.0, max_steps=60, learning_rate=1e-2),
            train_dataset=Dataset.from_list([row | {"advantages": [0.4, -0.4]}]),
            processing_class=tokenizer,
        )
        trainer.train()
        context, steps = encode_state("?\n", [], ["a\n", "b\n"], [False, False], tokenizer)
        logps = torch.stack([step_logps(trainer.model, context, step) for step in steps])
        assert logps.softmax(0)[0].item() == pytest.approx(0.901 / 1.002, abs=0.02)
        assert "target_reached" not in trainer.state.log_history[0]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (random_solution_rows(2), "compares the candidates of states, but `train_dataset` has the solution format"),
            (random_state_rows(2), "needs a column `values`, which `train_dataset` has not"),
            ([*with_values(random_state_rows(1)), *random_state_rows(1)], "Row 1 of `train_dataset` has no `values`"),
        ],
    )
    def test_refuses_rows(self, tmp_path, tokenizer, rows, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, tokenizer, rows, loss_type="listwise")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"log_partition": "mean"}, "`log_partition` must be 'sample', 'gaussian' or None, got 'mean'"),
        ({"loss_type": "dapo"}, "`loss_type` must be 'squared' or 'listwise', got 'dapo'"),
        ({"loss_type": "listwise", "log_partition": "sample"}, "`log_partition='sample'` is about targets of"),
        ({"loss_type": "listwise", "reliability_weights": True}, "`reliability_weights` weighs pairs"),
        ({"value_power": 2.0}, 'are about `loss_type="listwise"`'),
        ({"loss_type": "listwise", "value_power": -1.0}, "`value_power` must be 0 or more"),
        ({"loss_type": "listwise", "ref_power": float("inf")}, "`ref_power` must be 0 or more, and finite"),
    ],
)
def test_refuses_settings(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **given)
