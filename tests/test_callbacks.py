"""
`callbacks.py`: accuracy while training is that of the policy, decides on the best checkpoint, and disturbs nothing.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback

from conftest import (
    REPOSITORY,
    STUDENT,
    ScriptedEngine,
    answer_reward,
    make_critic,
    make_policy,
    random_solution_rows,
    random_state_rows,
    slow,
)
from dapo_trl import (
    AccuracyCallback,
    DAPOTrainer,
    SamplingConfig,
    StepCriticTrainer,
    TransformersEngine,
    evaluate_policy,
    math_reward,
)
from test_dapo_trainer import config
from test_step_critic_trainer import config as critic_config


SAMPLING = SamplingConfig(max_new_tokens=48)
PROBLEMS = [{"prompt": "9 - 1 min 6\n", "answer": "6"}, {"prompt": "4 - 7 max 2\n", "answer": "3"}]
PROBLEMS += [{"prompt": "2 + 3\n", "answer": "5"}]


def student_trainer(tmp_path, **kwargs) -> DAPOTrainer:
    args = {"max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    rows = Dataset.from_list(random_state_rows(6))
    peft_config = kwargs.pop("peft_config", None)
    args = config(tmp_path, **(args | kwargs))
    return DAPOTrainer(str(STUDENT), args=args, train_dataset=rows, eval_dataset=rows, peft_config=peft_config)


def evaluating(**kwargs) -> dict:
    return {"eval_strategy": "steps", "eval_steps": 1} | kwargs


def accuracies(trainer, name="greedy") -> dict[int, float]:
    """Step -> what was logged."""
    name = f"eval_accuracy/{name}"
    logs = [row for row in trainer.state.log_history if name in row]
    assert len({row["step"] for row in logs}) == len(logs)
    return {row["step"]: row[name] for row in logs}


class RightAt:
    """Makes engines that answer right at some measurements, counted from 0, and wrong at others."""

    def __init__(self, *right: int):
        self.right = right
        self.count = 0

    def __call__(self, model):
        answers = [row["answer"] if self.count in self.right else "wrong" for row in PROBLEMS]
        self.count += 1
        random.random(), np.random.rand(), torch.rand(1)  # an engine may draw from the global streams
        return ScriptedEngine({row["prompt"]: [text] for row, text in zip(PROBLEMS, answers, strict=True)})


def test_equals_an_evaluation_of_the_policy(tmp_path):
    """What is measured with the trainer's model, set up for trees, is what the same weights give alone."""
    trainer = student_trainer(tmp_path)
    problems = Dataset.from_list(PROBLEMS)
    trainer.add_callback(AccuracyCallback(trainer, problems, math_reward, SAMPLING, k=3, seed=5))
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    engine = TransformersEngine(model, AutoTokenizer.from_pretrained(STUDENT))
    expected = evaluate_policy(problems, engine, math_reward, SAMPLING, k=3, seed=5)
    assert metrics["eval_accuracy/greedy"] == expected.greedy.mean
    assert metrics["eval_accuracy/mean_at_k"] == pytest.approx(expected.mean_at_k.mean)
    assert metrics["eval_accuracy/pass_at_k"] == pytest.approx(expected.pass_at_k.mean)
    assert metrics["eval_accuracy/truncated"] == expected.truncated / 12
    assert metrics["eval_accuracy/not_judged"] == expected.not_judged / 12


@pytest.mark.parametrize(
    ("adapter", "every_n_steps", "make_engine"), [(False, 1, None), (True, None, None), (True, None, RightAt(1))]
)
def test_training_is_not_disturbed(tmp_path, adapter, every_n_steps, make_engine):
    """Weights after training, also with dropout, are the same to the last bit, and so is everything logged."""
    from peft import LoraConfig

    lora = LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.5) if adapter else None
    weights, logs = [], []
    for measures in (False, True):
        trainer = student_trainer(
            tmp_path,
            peft_config=lora,
            gradient_checkpointing=True,
            disable_dropout=False,
            **evaluating(eval_steps=2),
        )
        before = trainer.model.config.use_cache
        if measures:
            problems = Dataset.from_list(PROBLEMS)
            trainer.add_callback(
                AccuracyCallback(trainer, problems, math_reward, SAMPLING, 2, True, every_n_steps, make_engine)
            )
        trainer.train()
        assert trainer.model.config.use_cache == before
        assert trainer.model.is_gradient_checkpointing
        weights.append(trainer.model.state_dict())
        timed = ("second", "runtime")
        rows = [
            {name: value for name, value in row.items() if not any(part in name for part in timed)}
            for row in trainer.state.log_history
            if not any(name.startswith("eval_accuracy/") for name in row)
        ]
        logs.append(rows)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert logs[0] == logs[1]


def test_best_checkpoint_is_kept(tmp_path):
    """The third of four measurements is the best: its checkpoint is loaded at the end, and kept."""
    args = evaluating(save_strategy="best", metric_for_best_model="eval_accuracy/greedy", load_best_model_at_end=True)
    trainer = student_trainer(tmp_path, save_total_limit=1, **args)
    callback = AccuracyCallback(trainer, Dataset.from_list(PROBLEMS), answer_reward, make_engine=RightAt(2))
    trainer.add_callback(callback)
    trainer.train()
    assert accuracies(trainer) == {1: 0.0, 2: 0.0, 3: 1.0, 4: 0.0}
    assert trainer.state.best_metric == 1.0
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-3"
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in best.state_dict().items())


def test_lower_can_be_better(tmp_path):
    args = evaluating(save_strategy="steps", save_steps=1, metric_for_best_model="accuracy/truncated")
    trainer = student_trainer(tmp_path, greater_is_better=False, load_best_model_at_end=True, **args)
    scripts = iter([["3~"], ["3"], ["3~"], ["3~"]])
    trainer.add_callback(
        AccuracyCallback(
            trainer,
            Dataset.from_list(PROBLEMS),
            answer_reward,
            make_engine=lambda model: ScriptedEngine(dict.fromkeys((row["prompt"] for row in PROBLEMS), next(scripts))),
        )
    )
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"


def test_early_stopping(tmp_path):
    """It stops after two evaluations without a gain; added before the callback, it is refused with the cure."""
    args = evaluating(save_strategy="steps", save_steps=1, metric_for_best_model="eval_accuracy/greedy")
    trainer = student_trainer(tmp_path, load_best_model_at_end=True, **args)
    problems = Dataset.from_list(PROBLEMS)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.add_callback(AccuracyCallback(trainer, problems, answer_reward, make_engine=RightAt(0)))
    with pytest.raises(ValueError, match="looks for 'eval_accuracy/greedy' before it is measured"):
        trainer.train()
    stopper = trainer.pop_callback(EarlyStoppingCallback)
    trainer.add_callback(stopper)
    trainer.train()
    assert trainer.state.global_step == 3


def test_every_n_steps(tmp_path):
    """Measured between evaluations; an evaluation has the numbers if they belong to its step."""
    trainer = student_trainer(tmp_path, **evaluating(eval_steps=3, max_steps=6))
    makes = RightAt(1)
    problems = Dataset.from_list(PROBLEMS)
    trainer.add_callback(AccuracyCallback(trainer, problems, answer_reward, every_n_steps=2, make_engine=makes))
    evaluated = []
    trainer.evaluate, plain = lambda *a, **k: evaluated.append(plain(*a, **k)) or evaluated[-1], trainer.evaluate
    trainer.train()
    assert accuracies(trainer) == {2: 0.0, 4: 1.0, 6: 0.0}
    assert [metrics.get("eval_accuracy/greedy") for metrics in evaluated] == [None, 0.0]
    assert all("kl" not in row for row in trainer.state.log_history if "eval_accuracy/greedy" in row)


def test_several_evaluation_sets_are_one_measurement(tmp_path):
    rows = Dataset.from_list(random_state_rows(4))
    trainer = DAPOTrainer(
        str(STUDENT), args=config(tmp_path, **evaluating()), train_dataset=rows, eval_dataset={"a": rows, "b": rows}
    )
    makes = RightAt(0)
    trainer.add_callback(AccuracyCallback(trainer, Dataset.from_list(PROBLEMS), answer_reward, make_engine=makes))
    trainer.train()
    assert makes.count == 1
    assert accuracies(trainer) == {1: 1.0}


def test_samples_only(tmp_path):
    trainer = student_trainer(tmp_path)
    problems = Dataset.from_list(PROBLEMS)
    trainer.add_callback(AccuracyCallback(trainer, problems, math_reward, SAMPLING, k=2, is_greedy=False))
    names = {name for name in trainer.evaluate() if "accuracy" in name}
    assert names == {f"eval_accuracy/{name}" for name in ("mean_at_k", "pass_at_k", "truncated", "not_judged")}


def test_refusals(tmp_path, tokenizer):
    trainer = student_trainer(tmp_path)
    problems = Dataset.from_list(PROBLEMS)
    with pytest.raises(ValueError, match="`problems` is empty"):
        AccuracyCallback(trainer, problems.select([]), math_reward)
    with pytest.raises(ValueError, match=r"nothing to measure with k=0 and is_greedy=False\. Set `k` to 1 or more"):
        AccuracyCallback(trainer, problems, math_reward, is_greedy=False)
    with pytest.raises(ValueError, match="`every_n_steps` must be at least 1, got 0"):
        AccuracyCallback(trainer, problems, math_reward, every_n_steps=0)
    data = Dataset.from_list(random_solution_rows(4))
    critic = StepCriticTrainer(make_critic(), critic_config(tmp_path), None, data, None, tokenizer)
    with pytest.raises(ValueError, match="a LlamaForTokenClassification, which generates nothing"):
        AccuracyCallback(critic, problems, math_reward)


def test_sharded_weights_need_an_engine_of_their_own(tmp_path):
    trainer = student_trainer(tmp_path)
    trainer.is_fsdp_enabled = True
    problems = Dataset.from_list(PROBLEMS)
    with pytest.raises(ValueError, match=r"weights that FSDP has sharded.* Pass `make_engine`"):
        AccuracyCallback(trainer, problems, math_reward)
    AccuracyCallback(trainer, problems, math_reward, make_engine=RightAt())


def test_any_trainer(tmp_path, tokenizer):
    """A trainer of TRL itself takes the callback too."""
    from trl import DPOConfig, DPOTrainer

    pairs = Dataset.from_list([{"prompt": "so\n", "chosen": "7\n", "rejected": "12\n"}] * 2)
    kwargs = {"max_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    args = DPOConfig(str(tmp_path / "dpo"), **kwargs)
    make_policy().save_pretrained(tmp_path / "base")
    trainer = DPOTrainer(
        str(tmp_path / "base"), args=args, train_dataset=pairs, eval_dataset=pairs, processing_class=tokenizer
    )
    problems = Dataset.from_list(PROBLEMS)
    trainer.add_callback(AccuracyCallback(trainer, problems, answer_reward, make_engine=RightAt(0)))
    assert trainer.evaluate()["eval_accuracy/greedy"] == 1.0


TWO_PROCESSES = """
import json, sys
from pathlib import Path
from datasets import Dataset
from dapo_trl import AccuracyCallback, DAPOConfig, DAPOTrainer, SamplingConfig, math_reward
from conftest import random_state_rows
from test_callbacks import PROBLEMS, SAMPLING, STUDENT

rows = Dataset.from_list(random_state_rows(6))
stage = int(sys.argv[2])
zero = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
args = DAPOConfig(sys.argv[1], max_steps=2, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
                  ddp_backend="gloo", eval_strategy="steps", eval_steps=1, learning_rate=0.0,
                  per_device_train_batch_size=2, deepspeed=zero if stage else None)
trainer = DAPOTrainer(str(STUDENT), args=args, train_dataset=rows, eval_dataset=rows)
trainer.add_callback(AccuracyCallback(trainer, Dataset.from_list(PROBLEMS), math_reward, SAMPLING, k=3, seed=5))
trainer.train()
found = next(row for row in trainer.state.log_history if "eval_accuracy/greedy" in row)
assert trainer.is_deepspeed_enabled == (stage > 0)
found["world"] = trainer.accelerator.num_processes
Path(sys.argv[1], f"found-{trainer.accelerator.process_index}.json").write_text(json.dumps(found))
"""


@pytest.mark.parametrize("stage", [slow(0, id="ddp"), slow(2, id="zero2"), pytest.param(3, id="zero3")])
def test_two_processes(tmp_path, stage):
    """Three problems on two processes: both log what one process measures, also of weights that ZeRO-3 sharded."""
    if stage:
        pytest.importorskip("deepspeed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY / "tests")])}
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path / "out"), str(stage)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / "out" / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    assert [row["world"] for row in found] == [2, 2]
    trainer = student_trainer(tmp_path)
    trainer.add_callback(AccuracyCallback(trainer, Dataset.from_list(PROBLEMS), math_reward, SAMPLING, k=3, seed=5))
    expected = {name: value for name, value in trainer.evaluate().items() if "accuracy" in name}
    for row in found:
        assert {name: value for name, value in row.items() if "accuracy" in name} == pytest.approx(expected)
