"""
`cards.py`: both model cards name the right paper and hold what a reader needs.
"""

import re
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import transformers.trainer
import yaml
from datasets import Dataset
from huggingface_hub import CommitInfo, ModelCard, RepoUrl
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from trl import ModelConfig

import dapo_trl.recipe
from conftest import (
    REPOSITORY,
    STUDENT,
    ScriptedEngine,
    answer_reward,
    make_critic,
    make_policy,
    random_solution_rows,
    random_state_rows,
)
from dapo_trl import AccuracyCallback, DAPOTrainer, StepCriticTrainer
from dapo_trl.cards import _links, hub_dataset, push_model_to_hub
from dapo_trl.recipe import Recipe
from dapo_trl.recipe_arguments import RecipeArguments
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
    assert card.data.datasets == ["me/my-data"]
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


# ---- As the Hub reads them ----


@pytest.fixture
def uploads(monkeypatch):
    """A Hub that reads and keeps what it is given: repository -> files."""
    found: dict[str, dict[str, bytes]] = {}

    def create_repo(repo_id, **kwargs):
        prefix = "datasets/" if kwargs.get("repo_type") == "dataset" else ""
        return RepoUrl(f"https://huggingface.co/{prefix}{repo_id if '/' in repo_id else f'me/{repo_id}'}")

    def upload_folder(repo_id, folder_path, allow_patterns=None, ignore_patterns=None, **kwargs):
        folder = Path(folder_path)
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        kept = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        found[repo_id] = {name: (folder / name).read_bytes() for name in kept}
        return CommitInfo(f"https://huggingface.co/{repo_id}/commit/{'0' * 40}", "message", "", "0" * 40)

    api = SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder)
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: api)
    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    return found


def read_card(files: dict[str, bytes], tmp_path) -> ModelCard:
    """The card of a repository, after all that its reader on the Hub would trip over."""
    text = files["README.md"].decode()
    assert not re.search(r"<!--|\{\{ |\{%|\bNone\b", text)
    assert str(tmp_path) not in text and "/tmp" not in text
    for title, address in re.findall(r"\[([^\]]*)\]\(([^)]*)\)", text):
        assert title.strip()
        assert re.fullmatch(r"https://[\w.-]+(/[\w.-]+)*", address), address
    assert text.count("```") % 2 == 0
    card = ModelCard(text)  # strict about its metadata
    for name in card.data.datasets or []:
        validate_repo_id(name)
    front = yaml.safe_load(text.split("---\n")[1])
    assert set(front) <= {"base_model", "datasets", "library_name", "model-index", "model_name", "pipeline_tag", "tags"}
    for entry in front.get("model-index", []):
        assert entry["name"]
        for result in entry["results"]:
            assert result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
            assert all(metric["type"] and isinstance(metric["value"], float) for metric in result["metrics"])
    lines = card.text.splitlines()
    for above, line in pairwise(lines):  # a table has as many cells in each row, and a head that is set off
        if line.startswith("|") and above.startswith("|"):
            assert line.count("|") == above.count("|")
    return card


@pytest.mark.parametrize("make_trainer", [policy_trainer, critic_trainer])
def test_push_to_hub(tmp_path, tokenizer, make_trainer, uploads):
    trainer = make_trainer(tmp_path, tokenizer)
    trainer.args.hub_model_id = "me/my-model"
    trainer.train()
    data = random_state_rows(4) if isinstance(trainer, DAPOTrainer) else random_solution_rows(4)
    metrics = trainer.evaluate(Dataset.from_list(data)) if isinstance(trainer, StepCriticTrainer) else None
    trainer.push_to_hub(dataset_name="me/my-rows", critic_name="me/my-critic", recipe={"num_solutions": 8})
    card = read_card(uploads["me/my-model"], tmp_path)
    assert {"trl", "dapo-trl"} <= set(card.data.tags)
    assert card.data.datasets == ["me/my-rows"]
    assert "[me/my-rows](https://huggingface.co/datasets/me/my-rows)" in card.text
    assert "[me/my-critic](https://huggingface.co/me/my-critic)" in card.text
    assert "num_solutions: 8" in card.text
    assert "The method has two stages" in card.text
    assert "me/my-model" in card.text
    for name in ("dapo-trl", "trl", "transformers"):
        assert version(name) in card.text
    if metrics:
        found = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert found["skill"] == pytest.approx(metrics["eval_skill"], abs=1e-6)
        assert f"| skill | {metrics['eval_skill']:.4g} |" in card.text


@pytest.mark.parametrize("load_best", [False, True])
def test_push_to_hub_while_training(tmp_path, tokenizer, uploads, load_best):
    """`push_to_hub=True`: the evaluation on the card is the last one, or that of the best model if that is kept."""
    rows = Dataset.from_list(random_state_rows(4))
    args = policy_config(
        tmp_path,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_strategy="end",
        hub_model_id="me/my-model",
        hub_token="none",
        load_best_model_at_end=load_best,
        metric_for_best_model="eval_accuracy/greedy",
    )
    trainer = DAPOTrainer(make_policy(), None, args, None, rows, rows, tokenizer)
    answers = iter(["5", "6"])
    trainer.add_callback(
        AccuracyCallback(
            trainer,
            Dataset.from_list([{"prompt": "2 + 3\n", "answer": "5"}]),
            answer_reward,
            make_engine=lambda model: ScriptedEngine({"2 + 3\n": [next(answers)]}),
        )
    )
    trainer.train()
    trainer.push_to_hub()
    card = read_card(uploads["me/my-model"], tmp_path)
    assert card.data.eval_results[0].metric_value == float(load_best)
    assert f"| accuracy, greedy | {float(load_best):.4g} |" in card.text
    assert not any(name.startswith("checkpoint-") for name in uploads["me/my-model"])


def test_names_that_are_not_on_the_hub(tmp_path, tokenizer, uploads):
    """They are named without their paths, not linked, and not in the metadata."""
    (tmp_path / "runs").mkdir()
    trainer = policy_trainer(tmp_path, tokenizer)
    trainer.push_to_hub(dataset_name=["me/rows", str(tmp_path / "runs"), "math"], critic_name="runs/math/critic")
    card = read_card(uploads["me/out"], tmp_path)
    assert card.data.datasets == ["me/rows"]
    assert "- Data set: `runs`" in card.text
    assert "- Data set: `math`" in card.text
    assert "- Critic that valued its rows: `critic`" in card.text


def test_several_critics_are_all_named():
    """One is named as it was before there could be several."""
    text = _links([], ["me/critic", "runs/math/critic-2"])
    expected = "[me/critic](https://huggingface.co/me/critic), `critic-2`"
    assert text == f"- Critics whose mean value its rows have: {expected}\n"
    assert _links([], ["me/critic"]) == _links([], "me/critic")
    assert _links([], []) == _links([], None) == ""


def test_data_set_of_the_hub_is_found(tmp_path, tokenizer):
    """Rows that `datasets` loaded from the Hub know where they come from."""
    data = Dataset.from_list(random_state_rows(4))
    assert hub_dataset(data) is None
    data.info.download_checksums = {"hf://datasets/me/my-values@0123/shards/00000-states.parquet": {}}
    trainer = DAPOTrainer(make_policy(), None, policy_config(tmp_path), None, data, None, tokenizer)
    trainer.create_model_card(model_name="my-model")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.datasets == ["me/my-values"]


def test_model_without_a_card_is_not_published(tmp_path, uploads):
    with pytest.raises(ValueError, match="has no card"):
        push_model_to_hub(tmp_path, "me/my-model")
    assert not uploads


def test_recipe_publishes_models(tmp_path, uploads, monkeypatch):
    """Critic and policies beside the data sets, linked with each other; weights and tokenizer load as they are."""
    monkeypatch.setattr(dapo_trl.publishing, "whoami", lambda: {"name": "me"})
    arguments = RecipeArguments(
        output_dir=str(tmp_path / "tiny"),
        dataset_name=f"{REPOSITORY / 'examples' / 'student' / 'arithmetic.py'}:make_problems",
        num_train_problems=16,
        num_test_problems=4,
        num_solutions=6,
        num_kept=3,
        num_completions=4,
        max_new_tokens=64,
        values="both",
        allow_unfit_critic=True,
        eval_k=2,
        critic={"max_steps": 1, "bf16": False},
        policy={"max_steps": 1, "beta": 0.1},
        push_to_hub=True,
        hub_model_id="us/models",
    )
    results = Recipe(arguments, ModelConfig(str(STUDENT))).run()
    assert set(uploads) == {
        "me/tiny-sampled",
        "me/tiny-values",
        "us/models-critic",
        "us/models-policy",
        "us/models-policy_monte_carlo",
    }
    critic = read_card(uploads["us/models-critic"], tmp_path)
    policy = read_card(uploads["us/models-policy"], tmp_path)
    monte_carlo = read_card(uploads["us/models-policy_monte_carlo"], tmp_path)
    for card in (critic, policy, monte_carlo):
        assert card.data.datasets == ["me/tiny-values"]
        assert "num_solutions: 6" in card.text
        assert "dataset_name: arithmetic.py:make_problems" in card.text
        assert str(REPOSITORY) not in card.content
    assert "[us/models-critic](https://huggingface.co/us/models-critic)" in policy.text
    assert "Critic that valued its rows" not in monte_carlo.text + critic.text
    after = results["policy_critic"]
    found = {result.metric_name: result.metric_value for result in policy.data.eval_results}
    assert found["accuracy, greedy"] == pytest.approx(after["greedy"]["mean"], abs=1e-6)
    assert found["pass@2"] == pytest.approx(after["pass_at_k"]["mean"], abs=1e-6)
    assert "greedy, 4 held-out problems" in policy.text
    skill = {result.metric_type: result.metric_value for result in critic.data.eval_results}["skill"]
    assert skill == pytest.approx(results["critic"]["eval_skill"], abs=1e-6)
    assert 'name = "us/models-critic"' in critic.text
    for repository in ("us/models-critic", "us/models-policy"):
        files = uploads[repository]
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
        kept = {"stage.json", "begun.json", "accuracy.json", "training_args.bin", "trainer_state.json"}
        assert not kept & set(files)
        texts = [text for name, text in files.items() if not name.endswith(".safetensors")]
        assert not any(str(tmp_path).encode() in text or str(REPOSITORY).encode() in text for text in texts)
