"""
[`StepCriticTrainer`]: its numbers against single prefixes in float64, its predictions, metrics and refusals.
"""

import copy
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForTokenClassification

from conftest import CHAT_TEMPLATE, STUDENT, make_critic, make_tokenizer, random_solution_rows
from conftest import random_state_rows as state_rows
from dapo_trl import StepCriticConfig, StepCriticTrainer, add_advantages
from dapo_trl.diagnostics import critic_metrics
from dapo_trl.tokenization import encode_solution, encode_state
from test_dapo_trainer import GradientRecorder, check_step


def config(tmp_path, **kwargs) -> StepCriticConfig:
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_steps": 1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
    }
    return StepCriticConfig(**(defaults | kwargs))


def state_logits(model, row, tokenizer) -> list[torch.Tensor]:
    """Logit of every state of a solution, each from a forward pass of its own over just that prefix: the slow way."""
    context, steps = encode_solution(row["prompt"], row["completions"], tokenizer)
    logits = [model(torch.tensor([context])).logits[0, -1, 0]]
    for step in steps:
        context = context + step
        logits.append(model(torch.tensor([context])).logits[0, -1, 0])
    return logits


def reference_step(model, rows, tokenizer, weighting):
    """Loss and gradients of one optimizer step over all rows, in float64, one sequence a state."""
    model = copy.deepcopy(model).double()
    loss, total = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        states = zip(state_logits(model, row, tokenizer), row["mc_successes"], row["mc_rollouts"], strict=True)
        for logit, won, tried in states:
            value, weight = torch.sigmoid(logit), tried if weighting == "rollouts" else 1
            target = won / tried
            loss = loss - weight * (target * torch.log(value) + (1 - target) * torch.log(1 - value))
            total += weight
    (loss / total).backward()
    return (loss / total).item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("weighting", ["rollouts", "uniform"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (1, 8), (3, 3)])
def test_step_equals_single_prefixes(tmp_path, tokenizer, architecture, weighting, batch_size, accumulation):
    """Loss and every gradient equal float64 over one sequence per state, however the step is split."""
    critic, rows = make_critic(architecture), random_solution_rows(8)
    loss, gradients = reference_step(critic, rows, tokenizer, weighting)
    args = config(
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        state_weights=weighting,
    )
    trainer = StepCriticTrainer(critic, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    check_step(trainer, loss, gradients)


def test_soft_targets_stay_soft(tmp_path, tokenizer):
    """A value of 0.75 without counts is the target 0.75: the loss at a logit of 0 is log 2, its gradient pulls up."""
    row = {"prompt": "a\n", "completions": ["b\n"], "values": [0.75, 0.75]}
    critic = make_critic()
    torch.nn.init.zeros_(critic.score.weight)
    torch.nn.init.zeros_(critic.score.bias)
    trainer = StepCriticTrainer(
        critic, config(tmp_path), train_dataset=Dataset.from_list([row]), processing_class=tokenizer
    )
    recorder = GradientRecorder(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert recorder.gradients["score.bias"].item() == pytest.approx(0.5 - 0.75, rel=1e-6)


def test_learns_values(tmp_path, tokenizer):
    """On a few solutions the critic learns the values of all states, and its skill rises from about 0."""
    rows = random_solution_rows(6, seed=2)
    args = config(tmp_path, max_steps=150, learning_rate=3e-3, per_device_train_batch_size=6)
    data = Dataset.from_list(rows)
    trainer = StepCriticTrainer(make_critic(), args, None, data, data, tokenizer)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    floor = critic_metrics(
        [value for row in rows for value in row["values"]],
        [won for row in rows for won in row["mc_successes"]],
        [tried for row in rows for tried in row["mc_rollouts"]],
    )
    assert after["eval_bce"] < before["eval_bce"]
    assert after["eval_bce"] == pytest.approx(floor["bce"], abs=0.02)
    assert after["eval_skill"] == pytest.approx(1 - after["eval_bce"] / after["eval_bce_constant"])


# ---- Predictions ----


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_predicted_values_of_solutions(tmp_path, tokenizer, batch_size):
    """K+1 values per solution, in the order of the rows, each equal to a forward pass over just that prefix."""
    critic, rows = make_critic(), random_solution_rows(8, seed=4)
    trainer = StepCriticTrainer(critic, config(tmp_path), processing_class=tokenizer)
    values = trainer.predict_values(Dataset.from_list(rows), batch_size=batch_size)["critic_values"]
    for row, predicted in zip(rows, values, strict=True):
        with torch.no_grad():
            expected = [torch.sigmoid(logit).item() for logit in state_logits(trainer.model, row, tokenizer)]
        assert predicted == pytest.approx(expected, abs=1e-6)


def test_predicted_values_of_states(tmp_path, tokenizer):
    """One value per candidate, that of the state it leads to; then advantages, with true rewards at the end."""
    critic, rows = make_critic(), state_rows(5)
    for row in rows:
        del row["advantages"]
        row["rewards"] = [1.0] + [None] * (len(row["candidates"]) - 1)
    trainer = StepCriticTrainer(critic, config(tmp_path), processing_class=tokenizer)
    valued = trainer.predict_values(Dataset.from_list(rows), batch_size=2)
    for row, predicted in zip(rows, valued["critic_values"], strict=True):
        ended = [reward is not None for reward in row["rewards"]]
        context, steps = encode_state(row["prompt"], row["prefix"], row["candidates"], ended, tokenizer)
        assert steps[0][-1] == tokenizer.eos_token_id
        with torch.no_grad():
            expected = [torch.sigmoid(critic(torch.tensor([context + step])).logits[0, -1, 0]).item() for step in steps]
        assert predicted == pytest.approx(expected, abs=1e-6)
    row, advantages = valued[0], add_advantages(valued, "critic_values")[0]["advantages"]
    values = [1.0, *row["critic_values"][1:]]
    assert advantages == pytest.approx(np.array(values) - np.average(values, weights=row["counts"]))


def test_a_state_with_one_candidate_has_one_value(tmp_path, tokenizer):
    trainer = StepCriticTrainer(make_critic(), config(tmp_path), processing_class=tokenizer)
    row = {"prompt": "a\n", "prefix": [], "candidates": ["b\n"]}
    assert len(trainer.predict_values(Dataset.from_list([row]))[0]["critic_values"]) == 1


def test_conversational_solutions(tmp_path):
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    row = {"prompt": [{"role": "user", "content": "1+1="}], "completions": ["a\n", "2"], "values": [0.5, 0.5, 1.0]}
    trainer = StepCriticTrainer(
        make_critic(), config(tmp_path), train_dataset=Dataset.from_list([row]), processing_class=tokenizer
    )
    trainer.train()
    assert len(trainer.predict_values(Dataset.from_list([row]))[0]["critic_values"]) == 3


# ---- Metrics, saving ----


def test_evaluation_is_a_mean_over_states(tmp_path, tokenizer):
    """The metrics equal those of all predictions at once, whatever the batch size; twice in a row."""
    rows = random_solution_rows(7)
    data = Dataset.from_list(rows)
    for batch_size in (1, 3, 7):
        args = config(tmp_path, per_device_eval_batch_size=batch_size)
        trainer = StepCriticTrainer(make_critic(), args, eval_dataset=data, processing_class=tokenizer)
        values = [value for values in trainer.predict_values(data)["critic_values"] for value in values]
        successes = [won for row in rows for won in row["mc_successes"]]
        rollouts = [tried for row in rows for tried in row["mc_rollouts"]]
        for _ in range(2):
            metrics = trainer.evaluate()
            assert metrics["eval_states"] == len(values)
            assert metrics["eval_loss"] == pytest.approx(metrics["eval_bce"])
            for name, expected in critic_metrics(values, successes, rollouts).items():
                assert metrics[f"eval_{name}"] == pytest.approx(expected, rel=1e-4), name


def rows_with_siblings() -> list[dict]:
    """Three solutions of one problem, two of which share their first step, and solutions of other problems."""
    others = random_solution_rows(3)
    paths = (["so\n", "7\n", "12"], ["so\n", "then\n", "7"], ["is\n", "12"])
    counts = ([4, 6, 8, 8], [4, 6, 1, 0], [4, 2, 0])
    shared = [
        {
            "prompt": "so 7?\n",
            "completions": steps,
            "values": [won / 8 for won in successes],
            "mc_successes": [float(won) for won in successes],
            "mc_rollouts": [8] * len(successes),
        }
        for steps, successes in zip(paths, counts, strict=True)
    ]
    return [shared[0], others[0], shared[1], others[1], shared[2], others[2]]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_ranking_of_siblings(tmp_path, tokenizer, batch_size):
    """
    At the prompt "so" (6/8) goes before "is" (2/8), after "so" "7" (8/8) before "then" (1/8): two pairs, each once,
    also where siblings are rows of different batches.
    """
    data = Dataset.from_list(rows_with_siblings())
    args = config(tmp_path, per_device_eval_batch_size=batch_size)
    seen = set()
    for seed in range(4):
        trainer = StepCriticTrainer(make_critic(seed=seed), args, eval_dataset=data, processing_class=tokenizer)
        first, second, third = (trainer.predict_values(data)["critic_values"][index] for index in (0, 2, 4))
        expected = ((first[1] > third[1]) + (first[2] > second[2])) / 2
        for _ in range(2):
            metrics = trainer.evaluate()
            assert metrics["eval_sibling_pairs"] == 2
            assert metrics["eval_sibling_ranking"] == expected
        seen.add(expected)
    assert len(seen) > 1


def test_no_siblings_no_ranking(tmp_path, tokenizer):
    data = Dataset.from_list(random_solution_rows(4))
    trainer = StepCriticTrainer(make_critic(), config(tmp_path), eval_dataset=data, processing_class=tokenizer)
    assert not any("sibling" in name for name in trainer.evaluate())


def test_saved_critic_loads_with_plain_transformers(tmp_path, tokenizer):
    data = Dataset.from_list(random_solution_rows(4))
    args = config(tmp_path, max_steps=2, learning_rate=1e-3)
    trainer = StepCriticTrainer(make_critic(), args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)
    assert loaded.config.num_labels == 1


@pytest.mark.parametrize(
    ("task_type", "modules"),
    [
        (None, {"target_modules": ["q_proj", "v_proj"]}),
        ("CAUSAL_LM", {"target_modules": ["q_proj", "v_proj"]}),
        ("TOKEN_CLS", {"target_modules": ["q_proj", "v_proj"]}),
        (None, {"target_modules": "all-linear"}),
        ("TOKEN_CLS", {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
        ("CAUSAL_LM", {"target_modules": "all-linear", "exclude_modules": r".*\.k_proj"}),
    ],
)
def test_lora_critic_trains_adapter_and_head(tmp_path, tokenizer, task_type, modules):
    """Whatever the task type says, the head is trained and saved beside the adapter, and plain peft loads both."""
    from peft import LoraConfig, PeftModel

    data = Dataset.from_list(random_solution_rows(4))
    critic = make_critic()
    before = {name: parameter.clone() for name, parameter in critic.named_parameters()}
    trainer = StepCriticTrainer(
        critic,
        config(tmp_path, max_steps=3, learning_rate=1e-2),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type=task_type, **modules),
    )
    assert any("k_proj.lora_A" in name for name, _ in trainer.model.named_parameters()) == (
        len(modules) == 1 and modules["target_modules"] == "all-linear"
    )
    trainer.train()
    trainer.save_model()
    trained = dict(trainer.model.named_parameters())
    assert any("lora_B" in name and parameter.abs().sum() > 0 for name, parameter in trained.items())
    head = "base_model.model.score.modules_to_save.default.weight"
    assert not torch.equal(trained[head], before["score.weight"])
    backbone = {name: value for name, value in before.items() if not name.startswith("score")}
    for name, value in backbone.items():
        key = next(key for key in trained if key.replace(".base_layer", "").endswith(f"base_model.model.{name}"))
        torch.testing.assert_close(trained[key], value, rtol=0, atol=0)
    loaded = PeftModel.from_pretrained(make_critic(seed=0), tmp_path / "out")
    torch.testing.assert_close(dict(loaded.named_parameters())[head], trained[head])


def test_predict_takes_raw_rows(tmp_path, tokenizer):
    trainer = StepCriticTrainer(make_critic(), config(tmp_path), processing_class=tokenizer)
    rows = random_solution_rows(3)
    prediction = trainer.predict(Dataset.from_list(rows))
    assert prediction.predictions.shape == (sum(len(row["values"]) for row in rows),)
    assert prediction.metrics["test_loss"] == pytest.approx(prediction.metrics["test_bce"])


def test_critic_starts_from_the_policys_backbone(tmp_path):
    """Given the path of a causal language model, its backbone is kept and the head is new."""
    from transformers import AutoModelForCausalLM

    trainer = StepCriticTrainer(str(STUDENT), config(tmp_path))
    policy = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(dict(trainer.model.model.named_parameters())[name], parameter, rtol=0, atol=0)
    assert trainer.model.score.out_features == 1


# ---- Refusals ----

SOLUTION = {"prompt": "a\n", "completions": ["b\n", "c"], "values": [0.5, 0.75, 1.0]}


def test_nothing_is_predicted_for_what_does_not_fit(tmp_path, tokenizer):
    trainer = StepCriticTrainer(make_critic(), config(tmp_path, max_length=8), processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"Row 1 has .* tokens, more than `max_length=8`"):
        trainer.predict_values(Dataset.from_list([SOLUTION, {**SOLUTION, "prompt": "much longer\n"}]))
    with pytest.raises(ValueError, match="empty"):
        trainer.predict_values(Dataset.from_list([]))
