"""
`dapo-trl processbench`: how often a critic finds the first wrong step of the solutions of ProcessBench (Zheng et al.
2024, arXiv 2412.06559).
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from rich.console import Console
from rich.table import Table

from dapo_trl.critics import mean_values
from dapo_trl.files import numbered_folders, read_json
from dapo_trl.first_errors import RULES, FirstErrors, evaluate_first_errors
from dapo_trl.model_identity import weight_files
from dapo_trl.modeling import free_memory
from dapo_trl.readers import read_processbench
from dapo_trl.run_folder import critic_folders, model_path
from dapo_trl.settings import SettingsError
from dapo_trl.step_critic_config import StepCriticConfig
from dapo_trl.step_critic_trainer import StepCriticTrainer


HUB_NAME = "Qwen/ProcessBench"
_FILES = (".json", ".jsonl")


def load_processbench(split: str, dataset: str = HUB_NAME) -> Dataset:
    """
    A part of ProcessBench as it was published.

    Args:
        split (`str`):
            `"gsm8k"`, `"math"`, `"olympiadbench"` or `"omnimath"`; or a json or jsonl file with such rows.
        dataset (`str`, *optional*, defaults to `"Qwen/ProcessBench"`):
            Data set on the Hub, or a folder that it was downloaded to.

    Returns:
        [`~datasets.Dataset`]: rows with `id`, `generator`, `problem`, `steps`, `final_answer_correct` and `label`.

    Raises:
        SettingsError: if there is no such file.
        ValueError: if it cannot be read.
    """
    is_file = Path(split).suffix in _FILES
    if is_file and not Path(split).is_file():
        raise SettingsError(f"There is no file {split!r}. Check the path.")
    try:
        if is_file:
            return load_dataset("json", data_files=split, split="train")
        return load_dataset(dataset, split=split)
    except Exception as error:
        reason = str(error.__cause__ or error) or type(error).__name__
        name = split if is_file else f"{split!r} of {dataset}"
        raise ValueError(
            f"{name} cannot be read: {reason}. Check the name; without a network, name a file or, with `--dataset`, "
            "the folder of a download."
        ) from error


def processbench_rows(
    rows: Dataset, prompt_template: str, is_chat: bool = False, step_separator: str = "\n\n"
) -> tuple[Dataset, int]:
    r"""
    Rows of ProcessBench as solution rows for a critic.

    Args:
        rows ([`~datasets.Dataset`]):
            Rows as they were published.
        prompt_template (`str`):
            How a question is put: as in the critic's training.
        is_chat (`bool`, *optional*, defaults to `False`):
            Whether prompts are conversations.
        step_separator (`str`, *optional*, defaults to `"\n\n"`):
            What ends every step but the last.

    Returns:
        `tuple[Dataset, int]`: rows as of [`~dapo_trl.readers.read_processbench`], and how many were left out because a
        step is empty.
    """
    solutions, counts = read_processbench(rows, step_separator=step_separator)

    texts = [prompt_template.replace("{question}", question) for question in solutions["prompt"]]
    prompts = [[{"role": "user", "content": text}] for text in texts] if is_chat else texts
    solutions = solutions.remove_columns("prompt").add_column("prompt", prompts)
    return solutions, counts["read"] - counts["kept"]


def evaluate_critic(
    critic: str,
    fit: str,
    test: Sequence[str],
    dataset: str = HUB_NAME,
    prompt_template: str | None = None,
    step_separator: str = "\n\n",
    batch_size: int = 8,
) -> dict[str, Any]:
    r"""
    Measure a critic on ProcessBench: thresholds from one part, F1 on others.

    Args:
        critic (`str`):
            Critic by name or path, or the folder of a run: of several iterations the last that has one. The values of
            several critics are averaged, as the run does.
        fit (`str`):
            Part that the thresholds are chosen on, see [`load_processbench`]. The authors take `"gsm8k"`.
        test (sequence of `str`):
            Parts to measure it on.
        dataset (`str`, *optional*, defaults to `"Qwen/ProcessBench"`):
            Data set on the Hub, or a folder.
        prompt_template (`str`, *optional*):
            How questions were put in the critic's training. `None` takes it from the results of the run.
        step_separator (`str`, *optional*, defaults to `"\n\n"`):
            What ends a step: the steps of ProcessBench are paragraphs, those that a critic was trained on may be lines.
        batch_size (`int`, *optional*, defaults to `8`):
            Solutions at a time.

    Returns:
        `dict`: `results`, part -> rule -> [`FirstErrors`]; `left_out`, part -> solutions with an empty step.

    Raises:
        SettingsError: if there is no such file, or the template is not known.
        ValueError: if a part cannot be read, or solutions are in several.
    """
    if fit in test:
        raise SettingsError(f"Thresholds that are chosen on {fit!r} cannot be measured on it. Name other parts.")
    paths, prompt_template = _find_critics(critic, prompt_template)
    parts = {name: load_processbench(name, dataset) for name in dict.fromkeys([fit, *test])}
    with tempfile.TemporaryDirectory() as folder:
        valued: dict[str, list[Dataset]] = {name: [] for name in parts}
        left_out = {}
        for path in paths:
            trainer = StepCriticTrainer(path, _config(folder, batch_size))
            is_chat = bool(trainer.processing_class.chat_template)
            for name, rows in parts.items():
                solutions, left_out[name] = processbench_rows(rows, prompt_template, is_chat, step_separator)
                valued[name].append(trainer.predict_values(solutions))
            del trainer
            free_memory()  # before the next critic is loaded
    columns = ["critic_values", "first_error", "problem_id"]
    scored = {name: mean_values(tables).select_columns(columns).to_list() for name, tables in valued.items()}
    results = {name: {rule: evaluate_first_errors(scored[fit], scored[name], rule) for rule in RULES} for name in test}
    return {"results": results, "left_out": left_out}


def print_processbench(found: dict[str, Any], console: Console | None = None) -> None:
    """
    Show how often a critic finds first errors.

    Args:
        found (`dict`):
            Result of [`evaluate_critic`].
        console ([`~rich.console.Console`], *optional*):
            Where to; the terminal by default.
    """
    console = console or Console()
    table = Table("part", "rule", "threshold", "F1", "erroneous", "correct", title="First wrong steps, ProcessBench")
    for name, rules in found["results"].items():
        for rule, one in rules.items():
            kinds = ((one.erroneous, one.num_erroneous), (one.correct, one.num_correct))
            sizes = [f"{share} of {number:,}" for share, number in kinds]
            table.add_row(name, rule, f"{one.threshold:.3f}", str(one.f1), *sizes)
    for rule, mean in mean_f1(found["results"]).items():
        table.add_row("mean", rule, "", f"{mean:.1%}", "", "")
    console.print(table)
    if number := sum(found["left_out"].values()):
        console.print(f"{number} solutions with an empty step were left out.")


def mean_f1(results: dict[str, dict[str, FirstErrors]]) -> dict[str, float]:
    """
    Mean F1 over parts, as ProcessBench reports it.

    Args:
        results (`dict`):
            Part -> rule -> [`FirstErrors`].

    Returns:
        `dict[str, float]`: rule -> mean.
    """
    return {rule: sum(part[rule].f1.mean for part in results.values()) / len(results) for rule in RULES}


def dump_processbench(found: dict[str, Any]) -> str:
    """
    The same as JSON.

    Args:
        found (`dict`):
            Result of [`evaluate_critic`].

    Returns:
        `str`.
    """
    results = {name: {rule: asdict(one) for rule, one in rules.items()} for name, rules in found["results"].items()}
    return json.dumps(found | {"results": results, "mean_f1": mean_f1(found["results"])}, indent=2) + "\n"


def _find_critics(critic: str, prompt_template: str | None) -> tuple[list[str], str]:
    """Where the critics are, and how questions are put to them."""
    folder = Path(critic)
    iterations = (folder, *(path for _, path in numbered_folders(folder, "iteration")))
    of_run = [critics for path in iterations if (critics := critic_folders(path))]
    is_trained = [all((path / "stage.json").exists() for path in critics) for critics in of_run]
    trained = [critics for critics, is_done in zip(of_run, is_trained, strict=True) if is_done]
    if not trained:  # not by a run, or the first is under way
        whole = [[path for path in critics if weight_files(model_path(path))] for critics in of_run]
        trained = [critics for critics in whole if critics]
    results = (folder if of_run else folder.parent) / "results.json"
    if prompt_template is None and results.is_file():
        arguments = read_json(results, ["arguments"], cure="Give `--prompt_template`")["arguments"]
        prompt_template = arguments.get("prompt_template")
    if prompt_template is None:
        raise SettingsError(
            "How were questions put to the critic in its training? Give `--prompt_template`, such as '{question}'. "
            "(The folder of a finished run knows.)"
        )
    if "{question}" not in prompt_template:
        raise SettingsError(f"`prompt_template` must contain {{question}}, got {prompt_template!r}.")
    return [model_path(path) for path in trained[-1]] if trained else [critic], prompt_template


def _config(folder: str, batch_size: int) -> StepCriticConfig:
    on_gpu = torch.cuda.is_available()
    return StepCriticConfig(
        folder,
        per_device_eval_batch_size=batch_size,
        max_length=None,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        report_to="none",
        save_strategy="no",
    )
