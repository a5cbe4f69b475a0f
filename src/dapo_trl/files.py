"""
Files that a run leaves: written at once and complete, read with a cure for damage, made under settings that are kept.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


PACKAGES = ("dapo-trl", "datasets", "torch", "transformers", "trl", "vllm", "openai")

_POLL_SECONDS = 0.5


def write_atomically(path: Path, text: str) -> None:
    """
    Write a text file so that it appears completely or not at all, also if the machine loses power.

    Args:
        path (`Path`):
            File.
        text (`str`):
            What it shall hold.
    """
    with temporary_file(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """
    A file to be written in place of another, which it becomes at the end; gone if anything fails.

    Args:
        path (`Path`):
            File.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def dump_json(values: dict[str, Any]) -> str:
    """
    JSON as a person can read it.

    Args:
        values (`dict`):
            JSON values.

    Returns:
        `str`.
    """
    return json.dumps(values, indent=2) + "\n"


def read_json(path: Path, keys: Sequence[str], cure: str) -> dict[str, Any]:
    """
    Read a file of a run.

    Args:
        path (`Path`):
            JSON file with an object.
        keys (sequence of `str`):
            What it must hold at least.
        cure (`str`):
            What to do if it is damaged.

    Returns:
        `dict`.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. {cure}.") from error
    refuse_incomplete(path, values, keys, cure)
    return values


def refuse_incomplete(path: Path, values: Any, keys: Sequence[str], cure: str) -> None:
    """
    Refuse what was read from a file if something is missing in it.

    Args:
        path (`Path`):
            The file.
        values (JSON value):
            What it holds.
        keys (sequence of `str`):
            What it must hold at least.
        cure (`str`):
            What to do otherwise.

    Raises:
        ValueError: if something is missing.
    """
    if missing := [key for key in keys if not isinstance(values, dict) or key not in values]:
        raise ValueError(f"{path} is damaged: it does not hold {', '.join(map(repr, missing))}. {cure}.")


def read_parquet(path: Path, cure: str, **options: Any) -> pa.Table:
    """
    Rows of a parquet file.

    Args:
        path (`Path`):
            File.
        cure (`str`):
            What to do if it is missing or damaged.
        **options:
            Those of `pyarrow.parquet.read_table`.

    Returns:
        `pyarrow.Table`.

    Raises:
        ValueError: if it is missing or damaged.
    """
    try:
        return pq.read_table(path, **options)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or missing: {error}. {cure}.") from error


def run_once(
    path: str | Path, settings: Mapping[str, Any], compute: Callable[[], dict[str, Any]], is_main: bool = True
) -> dict[str, Any]:
    """
    Results of a step that is done at most once: a file says that it is done, with which settings, and what came of it.

    Args:
        path (`str` or `Path`):
            The file, made when the step is done.
        settings (`dict`):
            Everything that decides the results, as JSON values.
        compute (`Callable[[], dict]`):
            Does the step and returns its results, as JSON values.
        is_main (`bool`, *optional*, defaults to `True`):
            Whether this process writes the file.

    Returns:
        `dict`: the results.

    Raises:
        ValueError: if the step was done with other settings; the message shows what differs.
    """
    path, given = Path(path), json.loads(json.dumps(dict(settings)))
    if path.exists():
        known = read_json(path, ("config", "results"), cure="Delete it to do this step again")
        refuse_differences(path.parent if path.name == "stage.json" else path, known["config"], given)
        return known["results"]
    start = time.perf_counter()
    results = json.loads(json.dumps(compute()))
    if is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        seconds = round(time.perf_counter() - start, 3)
        done = {"config": given, "versions": versions(), "seconds": seconds, "results": results}
        write_atomically(path, dump_json(done))
    wait_for(path.exists)  # written by the main process
    return results


def refuse_differences(place: Path, stored: dict[str, Any], given: dict[str, Any]) -> None:
    """
    Refuse to go on with other settings than those that results were made with.

    Args:
        place (`Path`):
            Where the results are: what is to be deleted to start anew.
        stored (`dict`):
            Settings that they were made with, as JSON values.
        given (`dict`):
            Settings now.

    Raises:
        ValueError: if they differ; the message shows where.
    """
    if found := list(differences(stored, given)):
        raise ValueError(
            f"{place} holds results of another configuration: {'; '.join(found)}. Go on with the old settings, "
            "or take another folder, or delete this one to start anew."
        )


def wait_for(condition: Callable[[], bool]) -> None:
    """
    Wait until other processes have done their share; a barrier would time out after minutes.

    Args:
        condition (`Callable[[], bool]`):
            Whether they have.
    """
    while not condition():
        time.sleep(_POLL_SECONDS)


def versions() -> dict[str, str]:
    """
    Versions of the packages that decide what a stage computes.

    Returns:
        `dict[str, str]`: version by name, of those that are installed.
    """
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def differences(stored: Any, given: Any, name: str = "") -> Iterator[str]:
    """
    What differs between two trees of JSON values.

    Args:
        stored (JSON value):
            One.
        given (JSON value):
            The other.
        name (`str`, *optional*):
            Where in them this is.

    Returns:
        `Iterator[str]`: a clause each.
    """
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in dict.fromkeys([*stored, *given]):
            yield from differences(stored.get(key), given.get(key), f"{name}.{key}" if name else key)
    elif stored != given:
        yield f"`{name}` was {stored!r}, is now {given!r}"
