"""
[`DAPOTrainer`]: its numbers against single sequences in float64, its reference, adapters, formats, refusals.
"""

import copy
import json
import logging
import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import (
    CHAT_TEMPLATE,
    STUDENT,
    make_policy,
    make_tokenizer,
    random_solution_rows,
    random_state_rows,
)
from dapo_trl import DAPOConfig, DAPOTrainer
from dapo_trl.tokenization import encode_solution, encode_state


def config(tmp_path, **kwargs) -> DAPOConfig:
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_steps": 1,
        "beta": 0.1,
        "min_advantage_gap": 0.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
    }
    return DAPOConfig(**(defaults | kwargs))


def step_logps(model, context_ids: list[int], step_ids: list[int]) -> torch.Tensor:
    """Log-probability of one step, from one unpadded sequence in float64: the slow way."""
    logits = model(torch.tensor([context_ids + step_ids])).logits[0]
    logps = torch.log_softmax(logits, dim=-1)
    return sum(logps[len(context_ids) + i - 1, token] for i, token in enumerate(step_ids))


def pairs_of(rows: list[dict], tokenizer) -> list[tuple[list[int], list[int], float, float]]:
    """(context ids, step ids, advantage, count) of every pair."""
    pairs = []
    for row in rows:
        if "candidates" in row:
            ended = [False] * len(row["candidates"])
            context, steps = encode_state(row["prompt"], row["prefix"], row["candidates"], ended, tokenizer)
            pairs += [(context, *rest) for rest in zip(steps, row["advantages"], row["counts"], strict=True)]
        else:
            context, steps = encode_solution(row["prompt"], row["completions"], tokenizer)
            for step, before, after in zip(steps, row["values"], row["values"][1:], strict=False):
                pairs.append((context, step, after - before, 1))
                context = context + step
    return pairs


def reference_step(model, ref_model, rows, tokenizer, beta, weights="uniform"):
    """Loss and gradients of one optimizer step over all rows, in float64, one sequence a pair."""
    model, ref_model = copy.deepcopy(model).double(), copy.deepcopy(ref_model).double()
    total, loss = 0.0, torch.zeros((), dtype=torch.float64)
    for context, step, advantage, count in pairs_of(rows, tokenizer):
        weight = count if weights == "counts" else 1
        with torch.no_grad():
            ref_logp = step_logps(ref_model, context, step)
        log_ratio = step_logps(model, context, step) - ref_logp
        loss = loss + weight * 0.5 * (advantage / beta - log_ratio) ** 2
        total += weight
    (loss / total).backward()
    return (loss / total).item(), {name: parameter.grad for name, parameter in model.named_parameters()}


class GradientRecorder:
    """Keeps the gradients that an optimizer step sees, over all its micro-batches."""

    def __init__(self, trainer):
        self.gradients = {}
        trainer.create_optimizer()
        trainer.optimizer.register_step_pre_hook(lambda *_: self.record(trainer.model))

    def record(self, model):
        self.gradients = {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }


def relative_difference(gradients, expected) -> float:
    """Largest difference of any gradient, relative to the norm of that parameter's gradient."""
    assert gradients.keys() == expected.keys()
    return max(
        ((gradients[name].double() - gradient).norm() / gradient.norm()).item() for name, gradient in expected.items()
    )


def check_step(trainer, loss, gradients) -> None:
    """Loss and every gradient of the trainer's first step are the expected ones, to 1e-5."""
    recorder = GradientRecorder(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert relative_difference(recorder.gradients, gradients) < 1e-5


@pytest.mark.parametrize("make_rows", [random_state_rows, random_solution_rows])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (1, 8), (3, 3)])
def test_step_equals_single_sequences(tmp_path, tokenizer, make_rows, architecture, batch_size, accumulation):
    """Loss and every gradient of a step equal float64 over single sequences, however the step is split."""
    policy, ref_model, rows = make_policy(architecture, seed=0), make_policy(architecture, seed=1), make_rows(8)
    loss, gradients = reference_step(policy, ref_model, rows, tokenizer, beta=0.1)
    trainer = DAPOTrainer(
        model=policy,
        ref_model=ref_model,
        args=config(tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    check_step(trainer, loss, gradients)


def test_counts_weigh_pairs(tmp_path, tokenizer):
    """`duplicate_weights="counts"` weighs each pair by how often it was sampled, over the whole optimizer step."""
    policy, ref_model, rows = make_policy(seed=0), make_policy(seed=1), random_state_rows(6)
    loss, gradients = reference_step(policy, ref_model, rows, tokenizer, beta=0.1, weights="counts")
    args = config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, duplicate_weights="counts")
    trainer = DAPOTrainer(policy, ref_model, args, None, Dataset.from_list(rows), None, tokenizer)
    check_step(trainer, loss, gradients)


def test_negative_control(tmp_path, tokenizer):
    """A mean of means over micro-batches of different size is another gradient: the check above can fail."""
    policy, ref_model, rows = make_policy(seed=0), make_policy(seed=1), random_state_rows(8)
    _, gradients = reference_step(policy, ref_model, rows, tokenizer, beta=0.1)
    args = config(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8)

    class MeanOfMeans(DAPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs) / 8

    trainer = MeanOfMeans(policy, ref_model, args, None, Dataset.from_list(rows), None, tokenizer)
    recorder = GradientRecorder(trainer)
    trainer.train()
    assert relative_difference(recorder.gradients, gradients) > 1e-2


def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer):
    rows = random_state_rows(4)
    gradients = []
    for checkpointing in (False, True):
        args = config(tmp_path, per_device_train_batch_size=4, gradient_checkpointing=checkpointing)
        trainer = DAPOTrainer(
            make_policy(seed=0), make_policy(seed=1), args, None, Dataset.from_list(rows), None, tokenizer
        )
        recorder = GradientRecorder(trainer)
        trainer.train()
        gradients.append(recorder.gradients)
    assert relative_difference(gradients[0], {name: g.double() for name, g in gradients[1].items()}) < 1e-6


def test_truncation_by_whole_steps(tmp_path, tokenizer, caplog):
    """With `max_length`, whole steps fall away, are counted, and the loss is that of the pairs that remain."""
    rows = random_solution_rows(8)
    limit = 60
    policy, ref_model = make_policy(seed=0), make_policy(seed=1)
    fitting = [pair for pair in pairs_of(rows, tokenizer) if len(pair[0]) + len(pair[1]) <= limit]
    dropped = len(pairs_of(rows, tokenizer)) - len(fitting)
    assert 0 < dropped < len(fitting) + dropped
    with caplog.at_level(logging.WARNING):
        args = config(tmp_path, per_device_train_batch_size=8, max_length=limit)
        trainer = DAPOTrainer(policy, ref_model, args, None, Dataset.from_list(rows), None, tokenizer)
    assert f"{dropped} steps did not fit into `max_length={limit}`" in caplog.text
    assert trainer.preprocessing_report["train"]["steps_truncated"] == dropped
    assert trainer.preprocessing_report["train"]["steps"] == len(fitting)
    trainer.train()
    losses = []
    for context, step, advantage, _ in fitting:
        with torch.no_grad():
            ratio = step_logps(policy_before(0), context, step) - step_logps(policy_before(1), context, step)
        losses.append(0.5 * (advantage / 0.1 - ratio.item()) ** 2)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def policy_before(seed):
    return make_policy(seed=seed).double()


# ---- Reference policy ----


def test_precomputed_equals_online(tmp_path, tokenizer):
    """Two steps of training are the same whether the reference is scored before training or during it."""
    rows, weights = random_state_rows(8), []
    for precompute in (True, False):
        args = config(tmp_path, max_steps=2, learning_rate=1e-3, precompute_ref_log_probs=precompute)
        trainer = DAPOTrainer(make_policy(), None, args, None, Dataset.from_list(rows), None, tokenizer)
        assert (trainer.ref_model is None) == precompute
        trainer.train()
        weights.append(torch.cat([parameter.flatten() for parameter in trainer.model.parameters()]))
    assert not torch.equal(weights[0], torch.cat([p.flatten() for p in make_policy().parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)


def test_reference_model_is_freed(tmp_path, tokenizer):
    import gc
    import weakref

    ref_model = make_policy(seed=1)
    alive = weakref.ref(ref_model)
    trainer = DAPOTrainer(
        make_policy(), ref_model, config(tmp_path), None, Dataset.from_list(random_state_rows(4)), None, tokenizer
    )
    del ref_model
    gc.collect()
    assert alive() is None
    assert trainer.train_dataset.column_names[-1] == "ref_logps"


def test_loss_at_the_reference(tmp_path, tokenizer):
    """At the start the policy is its own reference: every log-ratio is 0 and the loss is 1/2 mean (A/beta)^2."""
    rows = random_state_rows(4)
    args = config(tmp_path, per_device_train_batch_size=4)
    trainer = DAPOTrainer(make_policy(), None, args, None, Dataset.from_list(rows), None, tokenizer)
    trainer.train()
    logs = trainer.state.log_history[0]
    advantages = [advantage for row in rows for advantage in row["advantages"]]
    assert logs["loss"] == pytest.approx(sum(0.5 * (a / 0.1) ** 2 for a in advantages) / len(advantages), rel=1e-5)
    assert logs["kl"] == pytest.approx(0, abs=1e-5)
    assert logs["target_reached"] == pytest.approx(0, abs=1e-6)
    assert logs["pairs"] == len(advantages)
    assert logs["states"] == 4
    gaps = [max(row["advantages"]) - min(row["advantages"]) for row in rows]
    assert logs["advantage_gap"] == pytest.approx(sum(gaps) / 4, rel=1e-5)


def test_learns_the_targets(tmp_path, tokenizer):
    """On a few pairs a tiny model reaches the targets: signs agree, log-ratios go where the advantages point."""
    rows = random_state_rows(3, seed=5)
    args = config(tmp_path, max_steps=60, learning_rate=3e-3, per_device_train_batch_size=3, beta=0.5)
    trainer = DAPOTrainer(make_policy(), None, args, None, Dataset.from_list(rows), None, tokenizer)
    trainer.train()
    last = trainer.state.log_history[-2]
    assert last["loss"] < 0.05 * trainer.state.log_history[0]["loss"]
    assert last["sign_accuracy"] == 1.0
    assert last["target_reached"] > 0.8
    assert last["log_ratios/positive"] > 0 > last["log_ratios/negative"]


# ---- Adapters ----


def test_lora_trains_the_adapter_only(tmp_path, tokenizer):
    """The base weights stay, the reference equals the base model, and what is saved loads with plain peft."""
    from peft import AutoPeftModelForCausalLM, LoraConfig

    base = make_policy()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    rows = random_state_rows(4)
    trainer = DAPOTrainer(
        model=str(tmp_path / "base"),
        args=config(tmp_path, max_steps=3, learning_rate=1e-2, per_device_train_batch_size=4),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
    )
    refs = [logp for row in trainer.train_dataset["ref_logps"] for logp in row]
    with torch.no_grad():
        expected = [step_logps(base, context, step).item() for context, step, *_ in pairs_of(rows, tokenizer)]
    assert refs == pytest.approx(expected, abs=1e-6, rel=1e-6)
    trainer.train()
    trained = dict(trainer.model.named_parameters())
    changed = {name for name, parameter in trained.items() if "lora_" in name and parameter.abs().sum() > 0}
    assert changed
    for name, parameter in before.items():
        candidates = [key for key in trained if key.replace(".base_layer", "").endswith(f"base_model.model.{name}")]
        assert len(candidates) == 1
        torch.testing.assert_close(trained[candidates[0]], parameter, rtol=0, atol=0)
    trainer.save_model()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([tokenizer("so 7 is\n").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model(ids).logits, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize("precompute", [True, False])
def test_lora_reference_is_the_base_during_training(tmp_path, tokenizer, precompute):
    """After some steps the policy has moved, and the log-ratio is still taken to the base model."""
    from peft import LoraConfig

    rows = random_state_rows(4)
    trainer = DAPOTrainer(
        model=make_policy(),
        args=config(tmp_path, max_steps=4, learning_rate=1e-2, precompute_ref_log_probs=precompute),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    metrics = trainer.evaluate()
    with torch.no_grad():
        ratios = [
            (step_logps(trainer.model, context, step) - step_logps(make_policy(), context, step)).item()
            for context, step, *_ in pairs_of(rows, tokenizer)
        ]
    assert metrics["eval_kl"] == pytest.approx(-sum(ratios) / len(ratios), abs=1e-4)
    assert max(map(abs, ratios)) > 1e-2


@pytest.mark.parametrize("precompute", [True, False])
def test_an_adapter_that_goes_on_is_its_own_reference(tmp_path, tokenizer, precompute):
    """Given a model with a trained adapter, the reference is that model, not the base."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_policy(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    before = copy.deepcopy(model)
    rows = random_state_rows(4)
    trainer = DAPOTrainer(
        model=model,
        args=config(tmp_path, max_steps=3, learning_rate=1e-2, precompute_ref_log_probs=precompute),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    metrics = trainer.evaluate()
    with torch.no_grad():
        ratios = [
            (step_logps(trainer.model, context, step) - step_logps(before, context, step)).item()
            for context, step, *_ in pairs_of(rows, tokenizer)
        ]
    assert metrics["eval_kl"] == pytest.approx(-sum(ratios) / len(ratios), abs=1e-4)
    assert max(map(abs, ratios)) > 1e-2


# ---- Formats ----


def test_advantages_from_values_and_rewards(tmp_path, tokenizer):
    """Values 0.9 and 0.4 with counts 1 and 3; the second candidate ends the solution and was wrong: 0 replaces 0.4.

    The mean over samples is (0.9 + 3 * 0) / 4 = 0.225, so the advantages are 0.675 and -0.225.
    """
    row = {"prompt": "a\n", "prefix": [], "candidates": ["b\n", "c"], "values": [0.9, 0.4], "counts": [1, 3]}
    trainer = DAPOTrainer(
        make_policy(),
        args=config(tmp_path),
        train_dataset=Dataset.from_list([row | {"rewards": [None, 0.0]}]),
        processing_class=tokenizer,
    )
    assert trainer.train_dataset[0]["advantages"] == pytest.approx([0.675, -0.225])
    eos = tokenizer.eos_token_id
    assert [branch[0][-1] == eos for branch in trainer.train_dataset[0]["branches"]] == [False, True]


def test_a_candidate_that_does_not_fit_takes_its_contrast_along(tmp_path, tokenizer):
    """Of two candidates one is too long: what is left has nothing to be compared with, and is counted."""
    row = {"prompt": "a\n", "prefix": [], "candidates": ["b\n", "c" * 99 + "\n"], "advantages": [0.4, -0.4]}
    rows = Dataset.from_list([row, {**row, "prompt": "z\n", "candidates": ["b\n", "c\n"]}])
    args = config(tmp_path, max_length=50, min_advantage_gap=0.1)
    report = DAPOTrainer(make_policy(), None, args, None, rows, None, tokenizer).preprocessing_report["train"]
    assert (report["steps_truncated"], report["rows_without_contrast"], report["rows_kept"]) == (1, 1, 1)


def test_a_column_that_is_not_used(tmp_path, tokenizer, caplog):
    row = {"prompt": "a\n", "prefix": [], "candidates": ["b\n", "c\n"], "values": [0.9, 0.1], "counts": [1, 1]}
    valued = Dataset.from_list([row | {"critic_values": [0.5, 0.6]}])
    with caplog.at_level(logging.WARNING):
        DAPOTrainer(make_policy(), None, config(tmp_path), None, valued, None, tokenizer)
    assert "has a column `critic_values`, but advantages are computed from `values`" in caplog.text


def test_gap_filter(tmp_path, tokenizer, caplog):
    """States below `min_advantage_gap` are left out, counted and reported; a gap of exactly 0.1 stays (0.6 - 0.5)."""
    rows = [
        {"prompt": f"{values}\n", "prefix": [], "candidates": ["b\n", "c\n"], "values": values, "counts": [1, 1]}
        for values in ([0.6, 0.5], [0.55, 0.5], [1.0, 0.0])
    ]
    with caplog.at_level(logging.WARNING):
        trainer = DAPOTrainer(
            make_policy(),
            args=config(tmp_path, min_advantage_gap=0.1),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    assert trainer.preprocessing_report["train"]["rows_without_contrast"] == 1
    assert "kept 2 of 3 rows: 1 states have an advantage gap below `min_advantage_gap=0.1`" in caplog.text


def test_the_samplers_ids_are_used_as_they_are(tmp_path, tokenizer):
    """Ids that no tokenizer would give for the text (spelt byte by byte in another way) are trained on unchanged."""
    from dapo_trl.tokenization import tokenizer_fingerprint

    row = random_state_rows(1)[0] | {
        "prompt_ids": [5, 6],
        "prefix_ids": [[7], [8, 9]],
        "prefix": ["x", "y"],
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }
    row["candidates_ids"] = [[10 + i, 20] for i in range(len(row["candidates"]))]
    args = config(tmp_path)
    trainer = DAPOTrainer(make_policy(), None, args, None, Dataset.from_list([row]), None, tokenizer)
    assert trainer.train_dataset[0]["context_ids"] == [5, 6, 7, 8, 9]
    assert trainer.train_dataset[0]["branches"] == [[ids] for ids in row["candidates_ids"]]
    foreign = Dataset.from_list([row | {"tokenizer_fingerprint": "0123456789abcdef"}])
    with pytest.raises(
        ValueError, match=r"Row 0: its token ids come from a tokenizer with fingerprint '0123456789abcdef'"
    ):
        DAPOTrainer(make_policy(), None, args, None, foreign, None, tokenizer)


PREFERENCES = {
    "standard": {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
    "conversational": {
        "prompt": [{"role": "user", "content": "1+1="}],
        "chosen": [{"role": "assistant", "content": "2"}],
        "rejected": [{"role": "assistant", "content": "3"}],
    },
    "implicit prompt": {
        "chosen": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}],
        "rejected": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "3"}],
    },
}


@pytest.mark.parametrize("kind", PREFERENCES)
def test_swap_for_dpo_trainer(tmp_path, caplog, kind):
    """A script that runs with `DPOTrainer` runs after replacing the two class names, on the same tokens."""
    from trl import DPOConfig, DPOTrainer

    settings = {
        "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "max_steps": 2, "beta": 0.1,
        "per_device_train_batch_size": 2, "max_length": 512, "precompute_ref_log_probs": True,
    }  # fmt: skip

    def script(trainer_class, config_class):
        trainer = trainer_class(
            model=str(tmp_path / "model"),
            args=config_class(output_dir=str(tmp_path / trainer_class.__name__), **settings),
            train_dataset=Dataset.from_list([PREFERENCES[kind]] * 4),
            eval_dataset=Dataset.from_list([PREFERENCES[kind]] * 2),
            processing_class=make_tokenizer(CHAT_TEMPLATE),
        )
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        return trainer

    make_policy().save_pretrained(tmp_path / "model")
    theirs = script(DPOTrainer, DPOConfig)
    with caplog.at_level(logging.WARNING):
        ours = script(DAPOTrainer, DAPOConfig)
    assert "steps with values of their own teach more" in caplog.text
    row, expected = ours.train_dataset[0], theirs.train_dataset[0]
    assert row["context_ids"] == expected["prompt_ids"]
    assert row["branches"] == [[expected["chosen_ids"]], [expected["rejected_ids"]]]
    assert row["advantages"] == [0.5, -0.5]
    assert sum(row["ref_logps"]) == pytest.approx(
        expected["ref_chosen_logps"] + expected["ref_rejected_logps"], rel=1e-5
    )


def test_conversational_rows_see_what_generation_sees(tmp_path):
    """The context is the rendered prompt with its generation prompt; an end token follows the last step only."""
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}]
    row = {"prompt": prompt, "completions": ["a\n", "2"], "values": [0.5, 0.5, 1.0]}
    trainer = DAPOTrainer(
        make_policy(), args=config(tmp_path), train_dataset=Dataset.from_list([row]), processing_class=tokenizer
    )
    tokens = trainer.train_dataset[0]
    generated_from = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert tokens["context_ids"] == generated_from["input_ids"]
    steps = [*tokenizer(["a\n", "2"]).input_ids]
    assert tokens["branches"] == [[steps[0], steps[1] + [tokenizer.eos_token_id]]]


# ---- Evaluation, saving, cards ----


def test_evaluation_is_a_mean_over_pairs(tmp_path, tokenizer):
    """Batches of different sizes do not change the evaluation."""
    rows, metrics = random_state_rows(7, seed=3), []
    for batch_size in (1, 3, 7):
        args = config(tmp_path, per_device_eval_batch_size=batch_size)
        data = Dataset.from_list(rows)
        trainer = DAPOTrainer(make_policy(seed=0), make_policy(seed=1), args, None, data, data, tokenizer)
        metrics.append(trainer.evaluate())
    for name in ("eval_loss", "eval_kl", "eval_sign_accuracy", "eval_target_reached", "eval_advantage_gap"):
        values = [result[name] for result in metrics]
        assert values == pytest.approx([values[0]] * 3, rel=1e-4), name


def test_compute_metrics_gets_log_ratios_and_advantages(tmp_path, tokenizer):
    rows = random_state_rows(3)
    seen = {}

    def compute_metrics(prediction):
        seen["shapes"] = (prediction.predictions.shape, prediction.label_ids.shape)
        return {"pairs": len(prediction.label_ids)}

    data = Dataset.from_list(rows)
    trainer = DAPOTrainer(
        make_policy(),
        args=config(tmp_path),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    for _ in range(2):  # `Trainer` forgets how to gather uneven batches after each evaluation
        assert trainer.evaluate()["eval_pairs"] == sum(len(row["candidates"]) for row in rows)
    assert seen["shapes"][0] == seen["shapes"][1]


def test_predict_takes_raw_rows(tmp_path, tokenizer):
    """`predict` gives log-ratios and advantages, and leaves the next evaluation alone."""
    rows = Dataset.from_list(random_state_rows(5))
    args = config(tmp_path, precompute_ref_log_probs=False)
    trainer = DAPOTrainer(make_policy(), make_policy(seed=1), args, None, rows, rows, tokenizer)
    before = trainer.evaluate()
    prediction = trainer.predict(Dataset.from_list(random_state_rows(3, seed=8)))
    assert prediction.predictions.shape == prediction.label_ids.shape
    assert prediction.metrics["test_loss"] != before["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before["eval_loss"])


def test_own_metrics_keep_their_names(tmp_path, tokenizer):
    """A metric of the user that ends in `loss` is neither overwritten nor taken for the prefix of the others."""
    data = Dataset.from_list(random_state_rows(5))
    metrics = [
        DAPOTrainer(
            make_policy(),
            args=config(tmp_path, per_device_eval_batch_size=batch_size),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            compute_metrics=lambda _: {"eval_my_loss": 1.0},
        ).evaluate()
        for batch_size in (2, 5)
    ]
    assert metrics[0]["eval_my_loss"] == 1.0
    assert metrics[0]["eval_loss"] == pytest.approx(metrics[1]["eval_loss"], rel=1e-5)
    assert "eval_my_kl" not in metrics[0]


def test_low_precision_weights_are_warned_of(tmp_path, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        data = Dataset.from_list(random_state_rows(3))
        DAPOTrainer(make_policy().bfloat16(), None, config(tmp_path), None, data, None, tokenizer)
    assert "most updates are rounded away" in caplog.text


def test_reference_with_an_adapter(tmp_path, tokenizer):
    """A reference that is base and adapter scores as both together."""
    from peft import LoraConfig, get_peft_model

    ref_model = get_peft_model(make_policy(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    rows = random_state_rows(3)
    with torch.no_grad():
        expected = [step_logps(ref_model, context, step).item() for context, step, *_ in pairs_of(rows, tokenizer)]
    data = Dataset.from_list(rows)
    trainer = DAPOTrainer(make_policy(), ref_model, config(tmp_path), None, data, None, tokenizer)
    assert [logp for row in trainer.train_dataset["ref_logps"] for logp in row] == pytest.approx(expected, rel=1e-5)


def test_saved_policy_loads_with_plain_transformers(tmp_path, tokenizer):
    args = config(tmp_path, max_steps=2, learning_rate=1e-3)
    data = Dataset.from_list(random_state_rows(4))
    trainer = DAPOTrainer(make_policy(), None, args, None, data, None, tokenizer)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model(ids).logits)


def test_evaluating_after_the_reference_is_gone(tmp_path, tokenizer):
    data = Dataset.from_list(random_state_rows(4))
    trainer = DAPOTrainer(make_policy(), None, config(tmp_path), None, data, None, tokenizer)
    assert math.isfinite(trainer.evaluate(data)["eval_loss"])
    trainer.train()
    with pytest.raises(ValueError, match="The reference was freed"):
        trainer.evaluate(data)


def test_evaluating_without_the_given_reference(tmp_path, tokenizer):
    """A reference that was given and freed is not replaced by the policy, silently, when other data is evaluated."""
    data = Dataset.from_list(random_state_rows(4))
    for precompute in (True, False):
        args = config(tmp_path, precompute_ref_log_probs=precompute)
        trainer = DAPOTrainer(make_policy(), make_policy(seed=1), args, None, data, data, tokenizer)
        expected = trainer.evaluate()["eval_kl"]
        assert abs(expected) > 0.1
        if precompute:
            with pytest.raises(ValueError, match="The reference was freed"):
                trainer.evaluate(data)
        else:
            assert trainer.evaluate(data)["eval_kl"] == pytest.approx(expected, rel=1e-5)


def test_dropout_spares_the_reference(tmp_path, tokenizer):
    """With dropout on, the precomputed reference is still the model without dropout."""
    rows = random_state_rows(4)
    args = config(tmp_path, disable_dropout=False)
    policy = make_policy(attention_dropout=0.5)
    policy.train()
    trainer = DAPOTrainer(policy, None, args, None, Dataset.from_list(rows), None, tokenizer)
    refs = [logp for row in trainer.train_dataset["ref_logps"] for logp in row]
    with torch.no_grad():
        expected = [step_logps(make_policy(), context, step).item() for context, step, *_ in pairs_of(rows, tokenizer)]
    assert refs == pytest.approx(expected, abs=1e-4)


def test_tokenizer_without_padding_pads_with_its_end(tmp_path):
    tokenizer = make_tokenizer(pad_token=None)
    rows = random_state_rows(3)
    trainer = DAPOTrainer(make_policy(), None, config(tmp_path), None, Dataset.from_list(rows), None, tokenizer)
    trainer.train()
    assert trainer.processing_class.pad_token_id == tokenizer.eos_token_id
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_student_is_a_policy():
    assert AutoModelForCausalLM.from_pretrained(STUDENT).num_parameters() < 1_000_000
