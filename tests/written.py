"""
What a run has written: its rows, its results, and what says that a piece of work is done.
"""

import json
from pathlib import Path

import pyarrow.parquet as pq


# what says that a piece of work is done, and is not written again
RECORDS = ("**/shards/*", "**/stage.json", "**/before.json", "**/accuracy.json", "**/scored.json", "**/*.safetensors")


def rows(folder: Path) -> dict[str, list[dict]]:
    """All rows that a run has written, by table."""
    tables = {}
    for stage in ("sampled", "values"):
        for path in sorted((folder / stage / "shards").glob("*.parquet")):
            tables.setdefault(path.stem.partition("-")[2], []).extend(pq.read_table(path).to_pylist())
    return tables | {path.stem: pq.read_table(path).to_pylist() for path in (folder / "data").glob("*.parquet")}


def without_times(results: dict) -> dict:
    if not isinstance(results, dict):
        return results
    timed = ("runtime", "per_second", "seconds", "output_dir")
    return {name: without_times(value) for name, value in results.items() if not name.endswith(timed)}


def results(folder: Path) -> dict:
    return without_times(json.loads((folder / "results.json").read_text()))


def records(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files say that work is done, and when they were written."""
    files = {path for pattern in RECORDS for path in folder.glob(pattern) if not path.name.endswith(".tmp")}
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def seconds(folder: Path) -> float:
    """Time that a run's pieces of work took, without what lies between them."""
    files = (
        path for name in ("manifest", "stage", "before", "accuracy", "scored") for path in folder.rglob(f"{name}.json")
    )
    return sum(json.loads(path.read_text())["seconds"] for path in files)


def done_work(folder: Path) -> dict[str, tuple[int, int]]:
    """Records that stay as they are: models without their `stage.json` are made again, and tables without theirs."""
    found = records(folder)
    kept = {}
    for name, state in found.items():
        path = Path(name)
        proof = path.parent / "stage.json" if path.suffix == ".safetensors" else path
        proof = path.with_name(f"{path.stem.partition('-')[0]}.json") if path.suffix == ".parquet" else proof
        if str(proof) in found:
            kept[name] = state
    return kept
