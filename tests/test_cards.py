"""
`cards.py`: both model cards name the right paper and hold what a reader needs.
"""

import re

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard

from conftest import make_critic, make_policy, random_solution_rows, random_state_rows
from dapo_trl import DAPOTrainer, StepCriticTrainer
from test_dapo_trainer import config as policy_config
from test_step_critic_trainer import config as critic_config


RESULTS = {"greedy accuracy": {"before": "53.6% [50.5%, 56.7%]", "after": 0.98765}}


def policy_trainer(tmp_path, tokenizer):
    data = Dataset.from_list(random_state_rows(4))
    return DAPOTrainer(make_policy(), None, policy_config(tmp_path), None, data, None, tokenizer)


def critic_trainer(tmp_path, tokenizer):
    data = Dataset.from_list(random_solution_rows(4))
    return StepCriticTrainer(make_critic(), critic_config(tmp_path), None, data, None, tokenizer)


@pytest.mark.parametrize("make_trainer", [policy_trainer, critic_trainer])
def test_card(tmp_path, tokenizer, make_trainer):
    trainer = make_trainer(tmp_path, tokenizer)
    trainer.create_model_card(model_name="my-model", dataset_name="me/my-data", tags="mine", results=RESULTS)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.datasets == "me/my-data"
    assert {"trl", "dapo-trl", "mine", "generated_from_trainer"} <= set(card.data.tags)
    assert "huggingface.co/papers/2412.18279" in card.text
    assert "Not ByteDance's DAPO" in card.text
    assert "arXiv:2412.18279" in card.text
    assert "Jiacai Liu" in card.text
    assert "| greedy accuracy | 53.6% [50.5%, 56.7%] | 0.9877 |" in card.text
    assert "| `learning_rate` |" in card.text
    assert re.search(r"\| train \| 4 \| 4 \|", card.text)
    assert "my-data" in card.text
    assert not re.search(r"<!--|{{ |{%|None", card.text)


def test_policy_card_has_its_hyper_parameters(tmp_path, tokenizer):
    trainer = policy_trainer(tmp_path, tokenizer)
    trainer.create_model_card(model_name="my-model")
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert "| `beta` | 0.1 |" in text
    assert "| `duplicate_weights` | uniform |" in text
    assert "Not evaluated yet" in text
    assert "a model built in memory" in text


def test_results_stay_for_later_cards(tmp_path, tokenizer):
    """A card that `Trainer` writes at a checkpoint keeps the results that were given before."""
    trainer = policy_trainer(tmp_path, tokenizer)
    trainer.create_model_card(model_name="my-model", results=RESULTS)
    trainer.create_model_card(model_name="my-model")
    assert "53.6%" in ModelCard.load(tmp_path / "out" / "README.md").text


def test_checkpoints_carry_a_card(tmp_path, tokenizer):
    data = Dataset.from_list(random_state_rows(4))
    args = policy_config(tmp_path, save_strategy="steps", save_steps=1)
    trainer = DAPOTrainer(make_policy(), None, args, None, data, None, tokenizer)
    trainer.train()
    assert "2412.18279" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "checkpoint-1" / "model.safetensors").exists()


def test_base_model_from_a_folder(tmp_path, tokenizer):
    make_policy().save_pretrained(tmp_path / "base-of-mine")
    tokenizer.save_pretrained(tmp_path / "base-of-mine")
    data = Dataset.from_list(random_state_rows(4))
    trainer = DAPOTrainer(str(tmp_path / "base-of-mine"), None, policy_config(tmp_path), train_dataset=data)
    trainer.create_model_card(model_name="my-model")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "`base-of-mine`" in card.text
    assert str(tmp_path) not in card.content
