"""
What lies where in the folder of a run, and what a kill left of it.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from dapo_trl.files import (
    dump_json,
    numbered_folders,
    read_json,
    refuse_differences,
    shard_cure,
    wait_for,
    write_atomically,
)
from dapo_trl.settings import SettingsError


CRITIC_SEEDS = 1_000_003  # from the seed of a critic to that of the next


def iteration_folder(folder: Path, number: int) -> Path:
    """
    Place of an iteration: of the first the run's folder itself, so that more can follow at any time.

    Args:
        folder (`Path`):
            Folder of the run.
        number (`int`):
            Iteration, from 0.

    Returns:
        `Path`.
    """
    if number:
        return folder / f"iteration-{number + 1}"
    first = folder / "iteration-1"  # of runs that were begun with several, before this was so
    return first if first.exists() else folder


def shard_tables(folder: Path, table: str) -> list[Path]:
    """
    Files of a table of a sampling stage, in their order. While the stage is under way, those that are there.

    Args:
        folder (`Path`):
            Folder of the stage.
        table (`str`):
            Its name, such as `"states"`.

    Returns:
        `list[Path]`.
    """
    return sorted((folder / "shards").glob(f"[0-9]*-{table}.parquet"))


def table_cure(path: Path) -> str:
    """
    What to do about a damaged table of a run.

    Args:
        path (`Path`):
            Its parquet file.

    Returns:
        `str`.
    """
    if path.parent.name == "shards":
        return shard_cure(path)
    scored = path.with_name("scored.json")
    return f"Delete {scored} to score the rows again" if scored.exists() else "Write it again"


def held_out_problems(
    problem_ids: Iterable[str], held_out: Collection[str] = (), trained: Collection[str] = ()
) -> set[str]:
    """
    The problems that a critic is measured on, and not trained on.

    A critic begins where that of the iteration before ended, so that what was held out stays so, and what was trained
    on is no measure any more.

    Args:
        problem_ids (iterable of `str`):
            Problems of the solution rows of an iteration, in their order.
        held_out (collection of `str`, *optional*):
            What was held out from the critics of iterations before.
        trained (collection of `str`, *optional*):
            What they were trained on.

    Returns:
        `set[str]`: of the new problems every tenth, from the first, and those that were held out before. If there is
        none of either, the first problem.

    Example:

    ```python
    >>> from dapo_trl import held_out_problems

    >>> sorted(held_out_problems(["a", "b", "c"]))
    ['a']
    >>> sorted(held_out_problems(["b", "a", "new"], held_out=["a"], trained=["b", "c"]))
    ['a', 'new']

    ```
    """
    here = list(dict.fromkeys(problem_ids))
    known = {*held_out, *trained}
    new = [problem for problem in here if problem not in known]
    return {*new[::10], *set(held_out).intersection(here)} or set(here[:1])


def measured_problems(folder: Path, problem_ids: Iterable[str]) -> set[str]:
    """
    The problems that the critic of an iteration is measured on.

    Args:
        folder (`Path`):
            Folder of the iteration.
        problem_ids (iterable of `str`):
            Problems of its solution rows, in their order.

    Returns:
        `set[str]`: those that scoring noted, or training; if neither did, as earlier versions, every tenth.

    Raises:
        ValueError: if a record is damaged.
    """
    for path in (folder / "data" / "scored.json", folder / "critic" / "stage.json"):
        if path.exists():
            results = read_json(path, ["config"], cure="Delete it to do this step again").get("results", {})
            if "held_out" in results:
                return set(results["held_out"])
    return held_out_problems(problem_ids)


def policy_folder(source: str) -> str:
    """
    Name of a policy's folder.

    Args:
        source (`str`):
            Where its advantages come from, `"critic"`, `"monte_carlo"` or `"shrinkage"`.

    Returns:
        `str`.
    """
    return "policy" if source == "critic" else f"policy_{source}"


def critic_folder(folder: Path, number: int) -> Path:
    """
    Folder of a critic of an iteration.

    Args:
        folder (`Path`):
            Folder of the iteration.
        number (`int`):
            Which of its critics, from 0.

    Returns:
        `Path`: `critic`, `critic-2`, `critic-3`, ...
    """
    return folder / (f"critic-{number + 1}" if number else "critic")


def scored_config(data: Path) -> dict[str, Any] | None:
    """
    Settings that rows were scored with.

    Args:
        data (`Path`):
            Folder of the rows.

    Returns:
        `dict` or `None`: `None` if they are not scored.

    Raises:
        ValueError: if the record is damaged.
    """
    path = data / "scored.json"
    return read_json(path, ["config"], cure="Delete it to score the rows again")["config"] if path.exists() else None


def critic_folders(folder: Path) -> list[Path]:
    """
    Folders of the critics that an iteration uses.

    Args:
        folder (`Path`):
            Folder of the iteration.

    Returns:
        `list[Path]`: in their order. Once rows are scored, those of the critics whose values they have, which may be
        the first iteration's (`later_critics`); before, all that are there.

    Raises:
        ValueError: if the record of the scores is damaged.
    """
    known = scored_config(folder / "data")
    if known is not None:
        place = iteration_folder(folder.parent, 0) if "later_critics" in known else folder
        wanted = [critic_folder(place, which) for which in range(len(known.get("critics", [None])))]
    else:
        wanted = [folder / "critic", *(path for number, path in numbered_folders(folder, "critic") if number > 1)]
    return [path for path in wanted if path.is_dir()]


def model_path(folder: Path) -> str:
    """
    Where a trained model is loaded from: the merged one, where an adapter was trained.

    Args:
        folder (`Path`):
            Folder of the trainer.

    Returns:
        `str`: path.
    """
    return str(folder / "merged" if (folder / "merged").exists() else folder)


def made_how(model: str) -> dict[str, Any] | None:
    """
    Settings that a model was trained with by a recipe.

    Args:
        model (`str`):
            Name or path.

    Returns:
        `dict` or `None`: `None` if it is not from a recipe.
    """
    folder = Path(model)
    stage = (folder.parent if folder.name == "merged" else folder) / "stage.json"
    return read_json(stage, ["config"], cure="Delete it to do this step again")["config"] if stage.exists() else None


def stage_times(folder: Path, iterations: list[Path]) -> dict[str, dict[str, float]]:
    """
    Time and tokens of the stages of a run, from what they left in its folder.

    Args:
        folder (`Path`):
            Folder of the run.
        iterations (`list[Path]`):
            Folders of its iterations.

    Returns:
        `dict`: stage -> `seconds` of wall-clock time, and `tokens` generated. Of a sampling stage it is the time in
        which shards that are kept were under way, however many at a time; of a training that went on, since the last
        start.
    """
    paths = []
    for part in iterations:
        paths += [part / stage / "manifest.json" for stage in ("sampled", "values")]
        own = [critic for critic in critic_folders(part) if critic.parent == part]  # not those of another iteration
        paths += [critic / "stage.json" for critic in own] + [part / "data" / "scored.json"]
        paths += [path for name in ("stage", "accuracy") for path in sorted(part.glob(f"policy*/{name}.json"))]
    found = {}
    for path in [folder / "before.json", *paths]:
        if not path.exists():
            continue
        stage = read_json(path, ["config"], cure="Delete it to do this step again")
        name = "/".join(path.relative_to(folder).with_suffix("").parts).removesuffix("/manifest").removesuffix("/stage")
        results = stage.get("results", {})
        tokens = stage["counts"].get("tokens_generated", 0) if "counts" in stage else results.get("tokens", 0)
        found[name] = {"seconds": stage.get("seconds", 0.0), "tokens": tokens}
    return found


def last_checkpoint(folder: Path, settings: dict[str, Any]) -> str | None:
    """
    The newest checkpoint that was written to its end; what a kill left of others is removed.

    Args:
        folder (`Path`):
            Folder of the trainer.
        settings (`dict`):
            What the training is asked to do; kept beside the checkpoints.

    Returns:
        `str` or `None`: path.

    Raises:
        ValueError: if the checkpoints are of other settings.
    """
    from accelerate import PartialState  # torch, which who only looks at a run does without

    checkpoints = [path for _, path in numbered_folders(folder, "checkpoint")]
    whole = [path for path in checkpoints if _is_whole(path)]
    begun, settings = folder / "begun.json", json.loads(json.dumps(settings))
    if whole and begun.exists():
        known = read_json(begun, ["config"], cure=f"Delete {folder} to train anew")
        refuse_differences(folder, known["config"], settings)
    if PartialState().is_main_process:
        for path in set(checkpoints) - set(whole):
            shutil.rmtree(path)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(begun, json.dumps({"config": settings}, indent=2))
    return str(whole[-1]) if whole else None


def _is_whole(checkpoint: Path) -> bool:
    """The trainer's state is written last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def publish_once(
    folder: Path, repo_id: str, fingerprint: str, push: Callable[[Path, str], str], is_main: bool = True
) -> str:
    """
    Publish what is in a folder unless that was done before: `published.json` there says so.

    Args:
        folder (`Path`):
            Folder of a finished stage or model.
        repo_id (`str`):
            Name on the Hub. Under another name it is published again.
        fingerprint (`str`):
            Of what is published. If it has changed, it is published again.
        push (`Callable[[Path, str], str]`):
            Takes folder and name, and returns the address.
        is_main (`bool`, *optional*, defaults to `True`):
            Whether this process does it. The others, which need not know the namespace, wait until it is done: what
            they do next may take them to a collective operation, which would time out.

    Returns:
        `str`: address.

    Raises:
        OSError: if it cannot be published.
    """
    record, keys, cure = folder / "published.json", ("repo_id", "fingerprint", "address"), "Delete it to publish again"

    def is_published() -> bool:
        if not record.exists():
            return False
        known = read_json(record, keys, cure)
        names = [name if is_main else name.rpartition("/")[2] for name in (known["repo_id"], repo_id)]
        return names[0] == names[1] and known["fingerprint"] == fingerprint

    if is_main and not is_published():
        try:
            address = push(folder, repo_id)
        except Exception as error:  # of the HTTP library, whichever it is, if the network fails
            reason = str(error) or type(error).__name__
            raise OSError(
                f"{folder} could not be published as {repo_id}: {reason}. Start again to try again."
            ) from error
        write_atomically(record, dump_json({"repo_id": repo_id, "fingerprint": fingerprint, "address": address}))
    wait_for(is_published, lambda: f"the upload of {folder}")
    return read_json(record, keys, cure)["address"]


def refuse_closed_folder(folder: Path) -> None:
    """
    Make a folder, and find out whether it can be written to before anything is computed for it.

    Args:
        folder (`Path`):
            Folder.

    Raises:
        OSError: if it cannot.
        SettingsError: if no data set can be read from a folder of this name.
    """
    if "::" in str(folder):
        raise SettingsError(
            f"`output_dir` {str(folder)!r} has '::', which `datasets` takes for an archive. Choose another."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written to: {error}. Choose another `output_dir`.") from error
