"""
Data set cards of the sampling stages, and their way to the Hub.

A finished stage's folder is a data set as it stands: its card tells the Hub, and `load_dataset` on the folder, which
shards belong to which table.
"""

from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import DatasetCard, DatasetCardData

from dapo_trl.cards import PAPER
from dapo_trl.files import write_atomically
from dapo_trl.store import read_manifest, read_shard


TEMPLATE = str(files("dapo_trl") / "templates" / "dataset_card.md")
TAGS = ["dapo-trl", "trl", "direct-advantage-policy-optimization", "reasoning"]

_DESCRIPTIONS = {
    "sample": "Solutions of problems, sampled from a language model and judged.",
    "values": (
        "Reasoning steps with Monte Carlo values: the share of completions from a state that end with a correct answer."
    ),
}
_TABLES = {
    "sampled": "Every solution that was sampled.",
    "solutions": "Solutions that were kept, with the value of every state on their way: for `StepCriticTrainer`.",
    "states": "States with their candidate next steps and what these are worth: for `DAPOTrainer`.",
}
_COLUMNS = {
    "prompt": "the problem, as the model was given it",
    "tools": "tools that the chat template was given",
    "chat_template_kwargs": "further arguments of the chat template",
    "answer": "the right answer",
    "problem_id": "tells problems apart",
    "prompt_ids": "token ids of the prompt",
    "generator": "the model that was sampled",
    "tokenizer_fingerprint": "hash of the tokenizer of all ids",
    "completions": "steps of the solution; joined, they are its exact text",
    "completions_ids": "token ids of each step",
    "reward": "outcome in [0, 1]; null if it could not be judged",
    "truncated": "whether it broke off at the length limit",
    "sample": "number of the sample of its problem",
    "prefix": "steps taken so far; empty at the prompt",
    "prefix_ids": "token ids of each of them",
    "candidates": "different next steps that were sampled",
    "candidates_ids": "token ids of each",
    "counts": "how often each candidate was sampled",
    "rewards": "outcome of each candidate that ends the solution; null for others",
}
_VALUES = {
    "solutions": {
        "values": "value of each state, from the prompt to the end, where it is the outcome",
        "mc_successes": "completions of each state that ended correct",
        "mc_rollouts": "completions of each state",
    },
    "states": {
        "values": "value of the state that each candidate leads to",
        "mc_successes": "completions of that state that ended correct",
        "mc_rollouts": "completions of that state",
    },
}
_HIDDEN = ("stage", "problems", "sampled", "engine.tokenizer")  # fingerprints, which the manifest has


def write_dataset_card(
    folder: str | Path, dataset_name: str | None = None, repo_id: str | None = None, generator: str | None = None
) -> Path:
    """
    Write the card of a finished sampling stage, as `README.md` into its folder.

    Args:
        folder (`str` or `Path`):
            Folder of the stage.
        dataset_name (`str`, *optional*):
            Name of the problems on the Hub, if they are there.
        repo_id (`str`, *optional*):
            Name that the data set will have on the Hub.
        generator (`str`, *optional*):
            Model that was sampled. By default what the rows say.

    Returns:
        `Path`: the card.

    Raises:
        ValueError: if the folder holds no finished stage.
    """
    folder = Path(folder)
    manifest = _finished(folder)
    generator = generator or _generator(folder, manifest)
    counts = manifest["counts"]
    data = DatasetCardData(
        pretty_name=_title(folder),
        task_categories=["text-generation"],
        tags=TAGS,
        size_categories=[_size_category(sum(manifest["rows"].values()))],
        source_datasets=[dataset_name] if dataset_name else None,
        configs=[
            {"config_name": name, "data_files": [{"split": "train", "path": data_files(folder, name)}]}
            for name in manifest["rows"]
        ],
    )
    card = DatasetCard.from_template(
        data,
        template_path=TEMPLATE,
        title=_title(folder),
        description=_DESCRIPTIONS[manifest["config"]["stage"]],
        generator=f"[{generator}](https://huggingface.co/{generator})" if "/" in generator else f"`{generator}`",
        dataset_name=dataset_name,
        repo_id=repo_id,
        tables=[_table(folder, name, rows) for name, rows in manifest["rows"].items()],
        tokens=f"{counts.get('tokens_generated', 0):,}",
        seconds=f"{manifest['seconds']:,.0f}",
        counts=[(name.replace("_", " "), f"{number:,}") for name, number in counts.items()],
        settings=[(name, value) for name, value in _flat(manifest["config"]) if name not in _HIDDEN],
        versions=list(manifest["versions"].items()),
        paper_title=PAPER["title"],
        paper_id=PAPER["id"],
        citation=PAPER["citation"],
    )
    path = folder / "README.md"
    write_atomically(path, str(card))
    return path


def push_stage_to_hub(folder: str | Path, repo_id: str, private: bool | None = None) -> str:
    """
    Publish a finished sampling stage as a data set: its shards, its manifest and its card, and nothing else.

    Args:
        folder (`str` or `Path`):
            Folder of the stage, with the card of [`write_dataset_card`].
        repo_id (`str`):
            Name on the Hub, `"name"` or `"namespace/name"`. Made if it is not there.
        private (`bool`, *optional*):
            Whether a new data set is private. `None` takes what is usual in the namespace.

    Returns:
        `str`: address of the data set.

    Raises:
        ValueError: if the folder holds no finished stage, or no card.
    """
    folder = Path(folder)
    manifest = _finished(folder)
    if not (folder / "README.md").exists():
        raise ValueError(f"{folder} has no card. Write one with `write_dataset_card` before it is published.")
    shards = [path for name in manifest["rows"] for path in _as_list(data_files(folder, name))]
    repo = huggingface_hub.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    huggingface_hub.upload_folder(
        repo_id=repo.repo_id,
        repo_type="dataset",
        folder_path=folder,
        allow_patterns=["README.md", "manifest.json", *shards],
        delete_patterns="shards/*",  # of an earlier upload with more of them
        commit_message=f"Upload {folder.name} of dapo-trl",
    )
    return str(repo)


def data_files(folder: Path, table: str) -> str | list[str]:
    """
    Files of a table, relative to the folder of the stage.

    Args:
        folder (`Path`):
            Folder of the stage.
        table (`str`):
            Name of the table.

    Returns:
        `str` or `list[str]`: a pattern; or, where sampling may go beyond what is needed, the files that count.
    """
    manifest = _finished(folder)
    if manifest["config"].get("num_problems") is None:
        return f"shards/*-{table}.parquet"
    present = sorted(path.name for path in (folder / "shards").glob(f"[0-9]*-{table}.parquet"))
    return [f"shards/{name}" for name in present if int(name.partition("-")[0]) < manifest["num_shards_used"]]


def hub_repo_id(prefix: str | None, run_folder: Path, folder: Path) -> str:
    """
    Name on the Hub of what is in a folder of a run.

    Args:
        prefix (`str`, *optional*):
            Common part of the names. By default the name of the run's folder.
        run_folder (`Path`):
            Folder of the run.
        folder (`Path`):
            Folder in it: of a stage or a model.

    Returns:
        `str`.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from dapo_trl.dataset_cards import hub_repo_id

    >>> hub_repo_id("me/math", Path("runs/math"), Path("runs/math/iteration-2/values"))
    'me/math-iteration-2-values'

    ```
    """
    return "-".join([prefix or run_folder.resolve().name, *folder.relative_to(run_folder).parts])


# ---- Parts of a card ----


def _finished(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    if "counts" not in manifest:
        raise ValueError(f"{folder} holds a stage that is not finished. Run its command again.")
    return manifest


def _title(folder: Path) -> str:
    run = folder.resolve().parent
    name = f"{run.parent.name}, {run.name}" if run.name.startswith("iteration-") else run.name
    return f"{name}: {folder.name}"


def _generator(folder: Path, manifest: Mapping[str, Any]) -> str:
    for name in manifest["rows"]:
        for path in sorted((folder / "shards").glob(f"[0-9]*-{name}.parquet")):
            if found := read_shard(path)["generator"].slice(0, 1).to_pylist():
                return found[0]
    return "unknown"


def _table(folder: Path, name: str, num_rows: int) -> dict[str, Any]:
    schema = read_shard(min((folder / "shards").glob(f"[0-9]*-{name}.parquet"))).schema
    meanings = _COLUMNS | _VALUES.get(name, {})
    columns = [
        {"name": column, "type": _type(schema.field(column).type), "meaning": meanings.get(column, "of the problem")}
        for column in schema.names
    ]
    return {"name": name, "rows": f"{num_rows:,}", "meaning": _TABLES[name], "columns": columns}


def _type(arrow_type: Any) -> str:
    return str(arrow_type).replace("element: ", "").replace("item: ", "").replace("|", "or")


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", repr(value) if isinstance(value, str) else str(value)


def _size_category(number: int) -> str:
    """One of those of the Hub."""
    if number < 1000:
        return "n<1K"
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    place = min(len(str(number)) - 4, len(names) - 2)
    return f"{names[place]}<n<{names[place + 1]}"


def _as_list(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths
