"""
Files that a run leaves: written at once and complete, read with a cure for damage, made under settings that are kept.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dapo_trl.interrupts import raise_if_interrupted


PACKAGES = ("dapo-trl", "datasets", "torch", "transformers", "trl", "vllm", "openai")

POLL_SECONDS = 0.5

_SECONDS_BETWEEN_MESSAGES = 60.0

logger = logging.getLogger(__name__)


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
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """
    A file to be written in place of another, which it becomes at the end; gone if anything fails.

    Args:
        path (`Path`):
            File.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with _open_locked(temporary) as file:
        try:
            yield temporary
            os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def clear_temporary_files(folder: Path, pattern: str) -> None:
    """
    Remove what killed processes left of files. Those of living ones, which hold a lock on them, are left alone.

    Args:
        folder (`Path`):
            Where they are.
        pattern (`str`):
            Names of the files that were to be written.
    """
    for left in folder.glob(f".{pattern}.tmp"):
        with contextlib.suppress(FileNotFoundError), left.open("r+b") as file:
            if _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                left.unlink(missing_ok=True)


def _open_locked(path: Path) -> BinaryIO:
    """A new file, locked as long as it is open and its process lives."""
    while True:
        file = path.open("wb")
        _lock(file, fcntl.LOCK_EX)
        if path.exists():
            return file
        file.close()  # cleared away before it was locked


def _lock(file: BinaryIO, operation: int) -> bool:
    """Whether a file could be locked: nobody else has, and the file system knows of locks."""
    try:
        fcntl.flock(file, operation)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """
    See to it that one command at a time works in a folder. The operating system gives the folder free when the process
    ends, however it ends.

    Several processes of one command share its work: the main process enters, the others do not. On network file systems
    without locks there is a warning, and nobody is refused.

    Args:
        folder (`Path`):
            Folder.

    Raises:
        ValueError: if another command works there; the message has its process and machine.
    """
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike those of `flock`, no child process inherits it
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise ValueError(
                f"Another command works in {folder} already: {file.read() or 'it has just begun'}. Wait for it, or end "
                "it, or take another `output_dir`."
            ) from error
        except OSError as error:
            logger.warning(f"{folder} cannot be locked: {error}. See to it that no other command works there.")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


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
    with named_damage(path, cure):
        return pq.read_table(path, **options)


@contextlib.contextmanager
def named_damage(path: Path, cure: str) -> Iterator[None]:
    """
    Name the parquet file that cannot be read.

    Args:
        path (`Path`):
            File that is read within.
        cure (`str`):
            What to do if it is missing or damaged.

    Raises:
        ValueError: if it is.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or missing: {error}. {cure}.") from error


def shard_cure(table: Path) -> str:
    """
    What to do about a damaged table of a shard.

    Args:
        table (`Path`):
            Its parquet file.

    Returns:
        `str`.
    """
    return f"Delete {table.with_name(table.name.partition('-')[0])}.json to compute the shard again"


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
    raise_if_interrupted()
    start = time.perf_counter()
    results = json.loads(json.dumps(compute()))
    if is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        seconds = round(time.perf_counter() - start, 3)
        done = {"config": given, "versions": versions(), "seconds": seconds, "results": results}
        write_atomically(path, dump_json(done))
    raise_if_interrupted()
    wait_for(path.exists, lambda: str(path))  # written by the main process
    return results


def numbered_folders(folder: Path, name: str) -> list[tuple[int, Path]]:
    """
    Folders `name-1`, `name-2`, ... in a folder, in the order of their numbers. Others, such as `name-2.bak`, are no
    business of a run.

    Args:
        folder (`Path`):
            Where they are.
        name (`str`):
            What stands before the number.

    Returns:
        `list[tuple[int, Path]]`: number and folder.
    """
    found = [(re.fullmatch(rf"{re.escape(name)}-([0-9]+)", path.name), path) for path in folder.glob(f"{name}-*")]
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


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


def wait_for(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    """
    Wait until other processes have done their share; a barrier would time out after minutes.

    It waits as long as it takes, and says once a minute what for. If another process has failed, its launcher ends this
    one too; without a launcher nobody does.

    Args:
        condition (`Callable[[], bool]`):
            Whether they have. What it raises is raised.
        what (`Callable[[], str]`):
            Says what is waited for.
    """
    told = time.monotonic()
    while not condition():
        if time.monotonic() - told >= _SECONDS_BETWEEN_MESSAGES:
            told = time.monotonic()
            logger.warning(f"Still waiting for {what()}, which is another process's work.")
        raise_if_interrupted()
        time.sleep(POLL_SECONDS)


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


def text_fingerprint(content: str | bytes) -> str:
    """
    Short hash.

    Args:
        content (`str` or `bytes`):
            Anything.

    Returns:
        `str`: 16 hexadecimal digits of a SHA-256.
    """
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]
