"""
The rows of a stage on disk, in shards: a run that is killed goes on where it was, with the same command.

A stage's folder holds

- `manifest.json`: what the stage was asked to do (configuration and fingerprint of its input), with which package
  versions, and, once it is complete, what came of it: rows, counts of everything left out, tokens, and the seconds of
  wall-clock time in which shards were under way, however many at a time;
- `shards/00000.json`, ...: the same numbers of one shard. A shard is complete if and only if this file is there;
- `shards/00000-<table>.parquet`, ...: its rows, in one or several tables.

Every file appears under its name at once, complete. What a shard holds depends on its number only, never on who
computes it or when, so that several processes can share the work and any of them can be killed.
"""

import glob
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError

from dapo_trl.files import (
    clear_temporary_files,
    differences,
    dump_json,
    read_json,
    read_parquet,
    refuse_differences,
    refuse_incomplete,
    shard_cure,
    temporary_file,
    text_fingerprint,
    versions,
    write_atomically,
)
from dapo_trl.tables import to_dataset


logger = logging.getLogger(__name__)

_BEGUN = ("config", "num_shards", "versions")  # what a manifest says of a stage that has begun
_FINISHED = ("num_shards_used", "rows", "counts", "seconds", "fingerprint")  # ... and of one that is complete
_SUMMARY = ("rows", "counts", "begun", "seconds", "fingerprint")  # what a shard says of itself


@dataclass(frozen=True)
class Shard:
    """
    What one unit of work gives.

    Attributes:
        tables (`dict[str, list[dict]]`):
            Rows of each table of the stage.
        counts (`dict[str, int]`):
            What was done, and everything that was left out, by name.
        begun (`float`):
            When it was begun, in seconds since 1970.
        seconds (`float`):
            Wall-clock time that it took.
    """

    tables: dict[str, list[dict[str, Any]]]
    counts: dict[str, int] = field(default_factory=dict)
    begun: float = 0.0
    seconds: float = 0.0


class ShardStore:
    """
    Shards of one stage in a folder.

    Args:
        folder (`str` or `Path`):
            Folder of the stage; made if it is not there.
        config (`dict`):
            Everything that decides what the shards hold, as JSON values: settings, and fingerprints of the stage's
            inputs. On a folder that holds shards it must be what they were made with.
        features (`dict[str, Features]`):
            Columns of each table.
        num_shards (`int`):
            Number of shards.

    Attributes:
        was_complete (`bool`):
            Whether the stage was finished before.

    Raises:
        ValueError: if the folder holds shards of another configuration; the message shows what differs.
        OSError: if the folder cannot be written to.

    Example:

    ```python
    >>> from tempfile import mkdtemp
    >>> from datasets import Features, Value
    >>> from dapo_trl.store import Shard, ShardStore

    >>> features = {"numbers": Features({"number": Value("int64")})}
    >>> store = ShardStore(mkdtemp(), {"seed": 0}, features, num_shards=2)
    >>> for index in store.missing():
    ...     store.write(index, Shard({"numbers": [{"number": index}]}, {"drawn": 1}))
    >>> store.missing(), store.finish()["counts"]
    ([], {'drawn': 2})
    >>> store.table("numbers")["number"]
    Column([0, 1])

    ```
    """

    def __init__(
        self, folder: str | Path, config: Mapping[str, Any], features: Mapping[str, Features], num_shards: int
    ) -> None:
        self.folder = Path(folder)
        self.features = dict(features)
        self.num_shards = num_shards
        self._shards = self.folder / "shards"
        self._shards.mkdir(parents=True, exist_ok=True)
        self._claim(json.loads(json.dumps(dict(config))))
        self.was_complete = self.is_complete

    # ---- Manifest ----

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it is on disk."""
        return read_manifest(self.folder)

    @property
    def is_complete(self) -> bool:
        """Whether the stage was finished."""
        return "counts" in self.manifest

    def _claim(self, config: dict[str, Any]) -> None:
        path = self.folder / "manifest.json"
        if not path.exists():
            # Processes that start together write the same.
            write_atomically(path, dump_json({"config": config, "num_shards": self.num_shards, "versions": versions()}))
        known = self.manifest
        given = config | {"num_shards": self.num_shards}
        refuse_differences(self.folder, known["config"] | {"num_shards": known["num_shards"]}, given)
        if others := list(differences(known["versions"], versions())):
            logger.warning(f"{self.folder} was begun with other package versions: {'; '.join(others)}.")

    def finish(self, num_used: int | None = None) -> dict[str, Any]:
        """
        Add up what the shards say and complete the manifest.

        Args:
            num_used (`int`, *optional*):
                Shards that count, from the first; `None` for all. Later ones, if there are any, are not used.

        Returns:
            `dict`: the manifest.

        Raises:
            ValueError: if a shard is missing.
        """
        num_used = self.num_shards if num_used is None else num_used
        if missing := [index for index in self.missing() if index < num_used]:
            raise ValueError(f"{self.folder}: shards {missing[:5]} are missing, so the stage is not complete.")
        summaries = [self.summary(index) for index in range(num_used)]
        counts: Counter[str] = Counter()
        rows: Counter[str] = Counter()
        for summary in summaries:
            counts.update(summary["counts"])
            rows.update(summary["rows"])
        results = {
            "num_shards_used": num_used,
            "rows": dict(rows),
            "counts": dict(counts),
            "seconds": round(_time_covered([(summary["begun"], summary["seconds"]) for summary in summaries]), 3),
            "fingerprint": text_fingerprint("".join(summary["fingerprint"] for summary in summaries)),
        }
        begun = self.manifest
        manifest = begun | results
        if manifest != begun:
            write_atomically(self.folder / "manifest.json", dump_json(manifest))
        return manifest

    # ---- Shards ----

    def has(self, index: int) -> bool:
        """Whether the shard of a number is complete."""
        return (self._shards / f"{_stem(index)}.json").exists()

    def missing(self) -> list[int]:
        """Numbers of the shards that are not complete, in order."""
        done = {path.stem for path in self._shards.glob("*.json")}
        return [index for index in range(self.num_shards) if _stem(index) not in done]

    def summary(self, index: int) -> dict[str, Any]:
        """
        What a complete shard says of itself.

        Args:
            index (`int`):
                Number of the shard.

        Returns:
            `dict` with `rows` (by table), `counts`, `begun`, `seconds` and `fingerprint`.
        """
        path, cure = self._shards / f"{_stem(index)}.json", "Delete it to compute the shard again"
        summary = read_json(path, _SUMMARY, cure)
        if summary["rows"].keys() != self.features.keys():
            raise ValueError(f"{path} is damaged: it is not of the tables {', '.join(self.features)}. {cure}.")
        return summary

    def write(self, index: int, shard: Shard) -> None:
        """
        Write a shard, so that it is there completely or not at all.

        Args:
            index (`int`):
                Number of the shard.
            shard ([`Shard`]):
                Its rows and numbers.

        Raises:
            ValueError: if its tables are not those of the stage.
            OSError: if the disk is full or the folder cannot be written to; nothing of the shard is then there.
        """
        if shard.tables.keys() != self.features.keys():
            raise ValueError(f"Shard {index} has tables {list(shard.tables)}, expected {list(self.features)}.")
        clear_temporary_files(self._shards, f"{_stem(index)}[-.]*")
        fingerprints = []
        for name, rows in shard.tables.items():
            table = to_dataset(rows, self.features[name]).data.table
            with temporary_file(self._path(index, name)) as temporary:
                pq.write_table(table, temporary, compression="zstd")
                fingerprints.append(text_fingerprint(temporary.read_bytes()))
        summary = {
            "rows": {name: len(rows) for name, rows in shard.tables.items()},
            "counts": dict(shard.counts),
            "begun": round(shard.begun, 3),
            "seconds": round(shard.seconds, 3),
            "fingerprint": text_fingerprint("".join(fingerprints)),
        }
        write_atomically(self._shards / f"{_stem(index)}.json", dump_json(summary))

    def table(self, name: str, num_used: int | None = None) -> Dataset:
        """
        Rows of all shards, in their order.

        The first call copies them, uncompressed, to `.cache` in the folder: several times the size of the shards. Later
        calls take the copy. It can be deleted when nobody reads from it.

        Args:
            name (`str`):
                Name of the table.
            num_used (`int`, *optional*):
                Shards that count, from the first. `None` for those that [`finish`] counted.

        Returns:
            [`~datasets.Dataset`], memory-mapped.

        Raises:
            OSError: if the disk is full; the shards stay as they are, and nothing of the copy is left.
        """
        num_used = self.manifest["num_shards_used"] if num_used is None else num_used
        used = [index for index in range(num_used) if self.summary(index)["rows"][name]]
        if not used:
            return to_dataset([], self.features[name])
        paths = [self._path(index, name) for index in used]
        return read_tables({path: shard_cure(path) for path in paths}, self.folder / ".cache", self.features[name])

    def rows(self, index: int, name: str) -> list[dict[str, Any]]:
        """
        Rows of one complete shard.

        Args:
            index (`int`):
                Number of the shard.
            name (`str`):
                Name of the table.

        Returns:
            `list[dict]`.
        """
        return read_shard(self._path(index, name)).to_pylist()

    def _path(self, index: int, name: str) -> Path:
        return self._shards / f"{_stem(index)}-{name}.parquet"


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """
    The manifest of a stage.

    Args:
        folder (`str` or `Path`):
            Folder of the stage.

    Returns:
        `dict`: see [`ShardStore`].

    Raises:
        ValueError: if the folder is none of a stage, or its manifest is damaged.
    """
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise ValueError(f"{folder} is no folder of a stage: it has no `manifest.json`.")
    cure = "Delete it, and go on with the settings of this folder"
    manifest = read_json(path, _BEGUN, cure)
    if "counts" in manifest:
        refuse_incomplete(path, manifest, _FINISHED, cure)
    return manifest


def read_tables(cures: Mapping[Path, str], cache: Path, features: Features | None = None) -> Dataset:
    """
    Rows of parquet files, memory-mapped.

    Args:
        cures (`Mapping[Path, str]`):
            The files, and what to do if one is missing or damaged.
        cache (`Path`):
            Folder for the memory map.
        features (`Features`, *optional*):
            Columns.

    Returns:
        [`~datasets.Dataset`].

    Raises:
        ValueError: if a file is missing or damaged.
        OSError: if the memory map, which takes several times the files' size, finds no room.
    """
    try:
        files = [glob.escape(str(path)) for path in cures]  # it takes names as patterns
        return Dataset.from_parquet(files, features=features, cache_dir=str(cache))
    except Exception as error:
        for path, cure in cures.items():
            read_parquet(path, cure)  # says which file it is
        if not (isinstance(error, DatasetGenerationError) and isinstance(error.__cause__, OSError)):
            raise
        raise OSError(
            f"Could not copy rows to {cache}: {error.__cause__}. The files themselves are complete. The copy takes "
            "several times their size: make room for it, and call again."
        ) from error


def read_shard(path: Path) -> pa.Table:
    """
    Rows of one table of a shard.

    Args:
        path (`Path`):
            Its parquet file.

    Returns:
        `pyarrow.Table`.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    return read_parquet(path, shard_cure(path))


def _stem(index: int) -> str:
    return f"{index:05}"


def _time_covered(spans: list[tuple[float, float]]) -> float:
    """Time that is covered by at least one of some spans of (begin, length)."""
    covered, last = 0.0, -math.inf
    for begin, length in sorted(spans):
        covered += max(begin + length - max(begin, last), 0.0)
        last = max(last, begin + length)
    return covered
