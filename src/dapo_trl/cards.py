"""
Model cards that name the right paper, and say how the model was made.
"""

import os
import textwrap
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCard
from trl.trainer.utils import get_config_model_id


PAPER = {
    "title": (
        "Improving Multi-Step Reasoning Abilities of Large Language Models with Direct Advantage Policy Optimization"
    ),
    "id": "2412.18279",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @article{liu2024improving,
            title   = {{Improving Multi-Step Reasoning Abilities of Large Language Models with Direct Advantage Policy Optimization}},
            author  = {Jiacai Liu and Chaojie Wang and Chris Yuhao Liu and Liang Zeng and Rui Yan and Yiwen Sun and Yang Liu and Yahui Zhou},
            year    = 2024,
            journal = {arXiv preprint arXiv:2412.18279},
            note    = {Accepted at NeurIPS 2025}
        }"""),  # noqa: E501
}

# TRL looks for templates in a folder of its own, so ours are named by the way that leads from there to here.
_OWN_TEMPLATES = os.path.relpath(str(files("dapo_trl") / "templates"), str(files("trl") / "templates"))
POLICY_TEMPLATE = os.path.join(_OWN_TEMPLATES, "policy_model_card.md")
CRITIC_TEMPLATE = os.path.join(_OWN_TEMPLATES, "critic_model_card.md")
POLICY_TAGS = ["trl", "dapo-trl", "direct-advantage-policy-optimization"]
CRITIC_TAGS = ["trl", "dapo-trl", "step-critic", "value-function"]

# Hyper-parameters that say how a model was made, in the order in which they are shown where the configuration has them.
_SHOWN = (
    "beta",
    "duplicate_weights",
    "min_advantage_gap",
    "state_weights",
    "max_length",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "adam_beta1",
    "adam_beta2",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "bf16",
    "fp16",
)


def save_model_card(
    trainer: Any,
    create_model_card: Callable[..., None],
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
    results: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """
    Write a trainer's model card through TRL's mechanism, then add what TRL's card has no place for.

    Args:
        trainer ([`DAPOTrainer`] or [`StepCriticTrainer`]):
            The trainer. Its `args`, `preprocessing_report` and the base model's name are written to the card.
        create_model_card (`Callable`):
            TRL's method: fills the trainer's template and saves it as `README.md`.
        model_name (`str`, *optional*):
            Name of the model.
        dataset_name (`str`, *optional*):
            Name of the data set.
        tags (`str` or `list[str]`, *optional*):
            Tags besides the trainer's own.
        results (`dict[str, dict]`, *optional*):
            Table of results: row name -> column name -> number or text, such as `{"greedy accuracy": {"before": "53.6%
            [50.5%, 56.7%]", "after": ...}}`. Remembered for cards written later, at checkpoints or on the Hub.
    """
    if results is not None:
        trainer.card_results = results
    create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
    if not trainer.is_world_process_zero():
        return
    path = os.path.join(trainer.args.output_dir, "README.md")
    card = ModelCard.load(path, ignore_metadata_errors=True)
    sections = {
        "base model": _base_model(trainer),
        "hyper-parameters": _hyper_parameters(trainer),
        "data": _data(trainer),
        "results": _results_table(getattr(trainer, "card_results", None)),
        "version": version("dapo-trl"),
    }
    for name, text in sections.items():
        card.text = card.text.replace(f"<!-- {name} -->", text)
    card.data.tags = sorted(set(card.data.tags or []))
    card.save(path)


def add_card_results(folder: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Put a table of results into the card of a model that was saved before it was evaluated.

    Args:
        folder (`str`):
            Folder of the model, with a card of [`save_model_card`].
        results (`dict[str, dict]`):
            Table of results: row name -> column name -> number or text.

    Raises:
        ValueError: if the card has no section for results.
    """
    path = os.path.join(folder, "README.md")
    card = ModelCard.load(path, ignore_metadata_errors=True)
    before, title, rest = card.text.partition("## Results\n")
    _, next_title, after = rest.partition("\n## ")
    if not title or not next_title:
        raise ValueError(f"{path} has no section `## Results`, so it is no card of this library.")
    card.text = f"{before}{title}\n{_results_table(results)}\n{next_title}{after}"
    card.save(path)


def _base_model(trainer: Any) -> str:
    name = get_config_model_id(trainer.model.config)
    if not name:
        return "a model built in memory"
    return f"`{os.path.basename(os.path.normpath(name))}`" if os.path.isdir(name) else f"[{name}](https://hf.co/{name})"


def _hyper_parameters(trainer: Any) -> str:
    values = {name: getattr(trainer.args, name) for name in _SHOWN if hasattr(trainer.args, name)}
    del values["num_train_epochs" if trainer.args.max_steps > 0 else "max_steps"]  # the other one decides
    rows = [f"| `{name}` | {getattr(value, 'value', value)} |" for name, value in values.items()]
    rows.append(f"| processes | {trainer.accelerator.num_processes} |")
    adapter = getattr(trainer.model, "peft_config", None)
    if adapter:
        rows.append(f"| adapter | {', '.join(config.peft_type.value for config in adapter.values())} |")
    return "\n".join(["| hyper-parameter | value |", "|---|---|", *rows])


def _data(trainer: Any) -> str:
    report = trainer.preprocessing_report
    if not report:
        return "No training data."
    columns = list(next(iter(report.values())))
    lines = [f"| split | {' | '.join(name.replace('_', ' ') for name in columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {split} | {' | '.join(f'{counts[name]:,}' for name in columns)} |" for split, counts in report.items()
    ]
    return "\n".join(lines)


def _results_table(results: Mapping[str, Mapping[str, Any]] | None) -> str:
    if not results:
        return "Not evaluated yet."
    columns = list(dict.fromkeys(column for row in results.values() for column in row))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in results.items():
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in (row.get(c, "") for c in columns)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
