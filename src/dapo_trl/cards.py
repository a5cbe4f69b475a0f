"""
Model cards that name the right paper, and say how the model was made.
"""

import os
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import EvalResult, ModelCard
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
_SHOWN_IF_CHANGED = (
    "loss_type",
    "log_partition",
    "value_power",
    "ref_power",
    "reliability_weights",
    "min_reliability",
)
_TARGETS = {  # what a policy learns, by `loss_type`
    "squared": "each step's log-ratio to the reference is regressed onto its advantage divided by `beta`",
    "listwise": "the next steps of a state are compared with each other, and drawn towards those of higher value",
}


# Metrics of an evaluation that a card shows, where they were measured: name in the logs -> name of the metric, title.
_MEASURED = {
    "eval_accuracy/greedy": ("accuracy", "accuracy, greedy"),
    "eval_accuracy/mean_at_k": ("accuracy", "accuracy, mean of samples"),
    "eval_accuracy/pass_at_k": ("pass@k", "pass@k"),
    "eval_sign_accuracy": ("sign_accuracy", "pairs with the sign of their advantage"),
    "eval_target_reached": ("target_reached", "share of the target reached"),
    "eval_bce": ("cross_entropy", "binary cross-entropy"),
    "eval_bce_constant": ("cross_entropy_constant", "best constant's cross-entropy"),
    "eval_skill": ("skill", "skill"),
    "eval_brier": ("brier_score", "Brier score"),
    "eval_calibration_error": ("calibration_error", "calibration error"),
    "eval_sibling_ranking": ("sibling_ranking", "siblings ordered alike"),
}


@dataclass
class CardContents:
    """
    What a card says that a trainer cannot know. Given once, it stays for all cards of the trainer.

    Args:
        dataset_name (`str` or `list[str]`, *optional*):
            Data sets: names on the Hub, which are linked, or other names, which are not. By default, the data set that
            the training rows were loaded from, if that is on the Hub.
        critic_name (`str` or `list[str]`, *optional*):
            Critic that valued the rows of a policy, or all whose mean value they have: names on the Hub, or others.
        results (`dict[str, dict]`, *optional*):
            Table of results: row name -> column name -> number or text, such as `{"greedy accuracy": {"before": "53.6%
            [50.5%, 56.7%]", "after": ...}}`. By default, the last evaluation; with `load_best_model_at_end`, that of
            the best model.
        eval_results (`list[EvalResult]`, *optional*):
            The same for the Hub. By default as for `results`.
        recipe (`dict[str, Any]`, *optional*):
            Settings of the run that the training was part of.
    """

    dataset_name: str | list[str] | None = None
    critic_name: str | list[str] | None = None
    results: Mapping[str, Mapping[str, Any]] | None = None
    eval_results: list[EvalResult] | None = None
    recipe: Mapping[str, Any] | None = None


def save_model_card(
    trainer: Any,
    create_model_card: Callable[..., None],
    model_name: str | None = None,
    dataset_name: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    **contents: Any,
) -> None:
    """
    Write a trainer's model card through TRL's mechanism, then add what TRL's card has no place for.

    Args:
        trainer ([`DAPOTrainer`] or [`StepCriticTrainer`]):
            The trainer. Its `args`, `preprocessing_report`, last evaluation and the base model's name are written to
            the card.
        create_model_card (`Callable`):
            TRL's method: fills the trainer's template and saves it as `README.md`.
        model_name (`str`, *optional*):
            Name of the model.
        dataset_name (`str` or `list[str]`, *optional*):
            Data sets, see [`CardContents`].
        tags (`str` or `list[str]`, *optional*):
            Tags besides the trainer's own.
        **contents:
            Other fields of [`CardContents`]. All are remembered for cards written later, at checkpoints or on the Hub.
    """
    given = {"dataset_name": dataset_name} | contents
    trainer.card_contents = replace(
        trainer.card_contents, **{name: value for name, value in given.items() if value is not None}
    )
    create_model_card(model_name=model_name, tags=tags)
    if not trainer.is_world_process_zero():
        return
    known: CardContents = trainer.card_contents
    names = known.dataset_name or trainer.hub_dataset or []
    datasets = [names] if isinstance(names, str) else list(names)
    on_hub = [name for name in datasets if is_hub_id(name)]
    measured = _last_evaluation(trainer)
    results = {_MEASURED[name][1]: {"value": value} for name, value in measured.items()}
    path = os.path.join(trainer.args.output_dir, "README.md")
    card = ModelCard.load(path, ignore_metadata_errors=True)
    sections = {
        "base model": _base_model(trainer),
        "links": _links(datasets, known.critic_name),
        "hyper-parameters": _hyper_parameters(trainer),
        "target": _TARGETS[getattr(trainer.args, "loss_type", "squared")],
        "recipe": _recipe(known.recipe),
        "data": _data(trainer),
        "results": _results_table(known.results or results),
        "version": version("dapo-trl"),
    }
    for name, text in sections.items():
        card.text = card.text.replace(f"<!-- {name} -->", text)
    card.data.tags = sorted(set(card.data.tags or []))
    card.data.datasets = on_hub or None
    card.data.pipeline_tag = trainer.pipeline_tag
    card.data.pop("licence", None)  # a placeholder of TRL's under a name that the Hub does not know
    _add_eval_results(card, known.eval_results or _eval_results(measured, on_hub), model_name)
    card.save(path)


def add_card_results(
    folder: str, results: Mapping[str, Mapping[str, Any]], eval_results: list[EvalResult] | None = None
) -> None:
    """
    Put a table of results into the card of a model that was saved before it was evaluated.

    Args:
        folder (`str`):
            Folder of the model, with a card of [`save_model_card`].
        results (`dict[str, dict]`):
            Table of results: row name -> column name -> number or text.
        eval_results (`list[EvalResult]`, *optional*):
            The same for the Hub.

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
    _add_eval_results(card, eval_results or [])
    card.save(path)


def push_model_to_hub(folder: str | Path, repo_id: str, private: bool | None = None) -> str:
    """
    Publish a trained model: weights, configuration, tokenizer and card, without checkpoints and records of the run.

    Args:
        folder (`str` or `Path`):
            Folder of the model, with its card.
        repo_id (`str`):
            Name on the Hub, `"name"` or `"namespace/name"`. Made if it is not there.
        private (`bool`, *optional*):
            Whether a new repository is private. `None` takes what is usual in the namespace.

    Returns:
        `str`: address of the model.

    Raises:
        ValueError: if the folder has no card.
    """
    if not (Path(folder) / "README.md").exists():
        raise ValueError(f"{folder} has no card, so it is no model of a trainer of this library.")
    repo = huggingface_hub.create_repo(repo_id, private=private, exist_ok=True)
    huggingface_hub.upload_folder(
        repo_id=repo.repo_id,
        folder_path=folder,
        allow_patterns=["README.md", "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"],
        ignore_patterns=[
            "*/*",
            "stage.json",
            "begun.json",
            "accuracy.json",
            "published.json",
            "trainer_state.json",
        ],
        commit_message="Upload a model of dapo-trl",
    )
    return str(repo)


def is_hub_id(name: str) -> bool:
    """
    Whether a name is one on the Hub, with its namespace; a local path is not.

    Args:
        name (`str`):
            Name.

    Returns:
        `bool`.

    Example:

    ```python
    >>> from dapo_trl.cards import is_hub_id

    >>> is_hub_id("openai/gsm8k"), is_hub_id("math"), is_hub_id("runs/math/values"), is_hub_id("./math")
    (True, False, False, False)

    ```
    """
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not os.path.exists(name)


def hub_dataset(dataset: Any) -> str | None:
    """
    Where on the Hub rows come from.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows.

    Returns:
        `str` or `None`: name of the data set, if `datasets` loaded it from the Hub.
    """
    sources = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = [match[1] for source in sources if (match := re.match(r"hf://datasets/([\w.-]+/[\w.-]+)[@/]", source))]
    return found[0] if found else None


def _last_evaluation(trainer: Any) -> dict[str, float]:
    """What was measured of the model that is saved, by name in the logs."""
    state = trainer.state
    rows = [row for row in state.log_history if _MEASURED.keys() & row.keys()]
    if not rows:
        return {}
    is_best = trainer.args.load_best_model_at_end and state.best_global_step is not None
    step = state.best_global_step if is_best else rows[-1]["step"]
    merged = {name: value for row in rows if row["step"] == step for name, value in row.items()}
    return {name: merged[name] for name in _MEASURED if name in merged}


def _eval_results(measured: Mapping[str, float], datasets: list[str]) -> list[EvalResult]:
    dataset_type = datasets[0] if datasets else "held-out"
    return [
        EvalResult(
            task_type="text-generation" if name.startswith("eval_accuracy") else "reinforcement-learning",
            dataset_type=dataset_type,
            dataset_name="held-out problems" if name.startswith("eval_accuracy") else "evaluation rows",
            metric_type=_MEASURED[name][0],
            metric_name=_MEASURED[name][1],
            metric_value=round(float(value), 6),
        )
        for name, value in measured.items()
    ]


def _add_eval_results(card: ModelCard, eval_results: list[EvalResult], model_name: str | None = None) -> None:
    data: Any = card.data  # of a model card, which huggingface_hub declares for all kinds of cards
    if eval_results:
        data.eval_results = eval_results
        data.model_name = model_name or data.model_name or "model"


def _links(datasets: list[str], critic_name: str | list[str] | None) -> str:
    lines = [f"- Data set: {_linked(name, 'https://huggingface.co/datasets/')}" for name in datasets]
    critics = [critic_name] if isinstance(critic_name, str) else critic_name or []
    if critics:
        title = "Critic that valued its rows" if len(critics) == 1 else "Critics whose mean value its rows have"
        lines.append(f"- {title}: {', '.join(_linked(name, 'https://huggingface.co/') for name in critics)}")
    return "".join(f"{line}\n" for line in lines)


def _linked(name: str, base: str) -> str:
    """A link to the Hub, or the name of what is not there, without its path."""
    return f"[{name}]({base}{name})" if is_hub_id(name) else f"`{os.path.basename(os.path.normpath(name))}`"


def _recipe(settings: Mapping[str, Any] | None) -> str:
    if not settings:
        return ""
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    return f"It was part of a run of `dapo-trl run` with these settings:\n\n```yaml\n{text}```\n"


def _base_model(trainer: Any) -> str:
    name = get_config_model_id(trainer.model.config)
    if not name:
        return "a model built in memory"
    return f"`{os.path.basename(os.path.normpath(name))}`" if os.path.isdir(name) else f"[{name}](https://hf.co/{name})"


def _hyper_parameters(trainer: Any) -> str:
    args = trainer.args
    defaults = {entry.name: entry.default for entry in fields(args)}
    values = {name: getattr(args, name) for name in _SHOWN if hasattr(args, name)}
    changed = (name for name in _SHOWN_IF_CHANGED if hasattr(args, name) and getattr(args, name) != defaults[name])
    values |= {name: getattr(args, name) for name in changed}
    if values.get("loss_type") == "listwise":
        del values["beta"]
    del values["num_train_epochs" if trainer.args.max_steps > 0 else "max_steps"]  # the other one decides
    shown = {name: "none" if value is None else getattr(value, "value", value) for name, value in values.items()}
    rows = [f"| `{name}` | {value} |" for name, value in shown.items()]
    rows.append(f"| processes | {trainer.accelerator.num_processes} |")
    adapter = getattr(trainer.model, "peft_config", None)
    if adapter:
        kinds = dict.fromkeys(config.peft_type.value for config in adapter.values())  # the reference may be another one
        rows.append(f"| adapter | {', '.join(kinds)} |")
    return "\n".join(["| hyper-parameter | value |", "|---|---|", *rows])


def _data(trainer: Any) -> str:
    report = trainer.preprocessing_report
    if not report:
        return "No training data."
    columns = list(dict.fromkeys(column for counts in report.values() for column in counts))
    lines = [f"| split | {' | '.join(name.replace('_', ' ') for name in columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {split} | {' | '.join(f'{counts[name]:,}' if name in counts else '' for name in columns)} |"
        for split, counts in report.items()
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
