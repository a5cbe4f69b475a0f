"""
`store.py`: shards are there completely or not at all, and a folder keeps to its configuration.
"""

import logging
import os
import threading

import datasets.arrow_writer
import pyarrow.parquet as pq
import pytest
from datasets import Features, Value

import dapo_trl.store
from dapo_trl.store import Shard, ShardStore


FEATURES = {
    "numbers": Features({"number": Value("int64")}),
    "names": Features({"name": Value("string"), "note": Value("string")}),
}
CONFIG = {"seed": 0, "sampling": {"temperature": 1.0, "top_p": 0.9}}


def make_store(folder, config=None, num_shards=3):
    return ShardStore(folder, CONFIG if config is None else config, FEATURES, num_shards)


def shard(index):
    names = [{"name": str(index), "note": None}] if index else []
    return Shard(
        {"numbers": [{"number": index}, {"number": -index}], "names": names},
        {"drawn": 2, "odd": index % 2},
        begun=1e9 + 10 * index,
        seconds=1.5,
    )


def test_rows_come_back_in_order(tmp_path):
    """Whatever the order in which shards are written; an empty table has its columns."""
    store = make_store(tmp_path)
    for index in (2, 0, 1):
        store.write(index, shard(index))
    assert store.missing() == []
    manifest = store.finish()
    assert manifest["rows"] == {"numbers": 6, "names": 2}
    assert manifest["counts"] == {"drawn": 6, "odd": 1}
    assert manifest["seconds"] == 4.5
    assert store.table("numbers")["number"][:] == [0, 0, 1, -1, 2, -2]
    assert store.table("names").to_list() == [{"name": "1", "note": None}, {"name": "2", "note": None}]
    assert store.rows(1, "numbers") == [{"number": 1}, {"number": -1}]
    assert store.table("names", num_used=1).column_names == ["name", "note"]


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([(0, 2), (2, 3)], 5),  # one after the other
        ([(0, 4), (1, 4), (2, 1)], 5),  # at a time: by 5 the first two are done, the last one lies within them
        ([(100, 1), (0, 2)], 3),  # the run was interrupted for 98 seconds, and went on with the earlier shard's end
    ],
)
def test_time_that_passed(tmp_path, spans, seconds):
    """Shards may be under way at the same time, and nothing may be for days; shards that do not count do not."""
    store = make_store(tmp_path, num_shards=len(spans) + 1)
    for index, (begun, length) in enumerate([*spans, (1000, 7)]):
        store.write(index, Shard({"numbers": [], "names": []}, begun=1e9 + begun, seconds=length))
    assert store.finish(num_used=len(spans))["seconds"] == seconds


def test_a_new_process_goes_on(tmp_path):
    make_store(tmp_path).write(1, shard(1))
    store = make_store(tmp_path)
    assert store.missing() == [0, 2]
    with pytest.raises(ValueError, match=r"shards \[0, 2\] are missing"):
        store.finish()
    assert not store.is_complete
    for index in store.missing():
        store.write(index, shard(index))
    store.finish()
    assert not store.was_complete
    assert make_store(tmp_path).was_complete


def test_fingerprints_say_what_the_rows_are(tmp_path):
    """Equal rows have equal fingerprints, wherever and whenever they were written."""

    def fingerprint(folder, order, value=0):
        store = make_store(folder)
        for index in order:
            store.write(index, shard(index + value))
        return store.finish()["fingerprint"]

    first = fingerprint(tmp_path / "a", (0, 1, 2))
    assert fingerprint(tmp_path / "b", (2, 1, 0)) == first
    assert fingerprint(tmp_path / "c", (0, 1, 2), value=1) != first


def test_the_first_shards_are_enough(tmp_path):
    store = make_store(tmp_path)
    for index in (0, 2):
        store.write(index, shard(index))
    assert store.finish(num_used=1)["rows"] == {"numbers": 2, "names": 0}
    assert len(store.table("numbers")) == 2


@pytest.mark.parametrize("moment", ["write_table", "replace", "fsync"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, moment):
    """Wherever it happens, the shard is missing afterwards, no temporary file is left, and it can be written again."""
    store = make_store(tmp_path)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    module = dapo_trl.store.pq if moment == "write_table" else os
    with monkeypatch.context() as patch:
        patch.setattr(module, moment, fail)
        with pytest.raises(OSError, match="No space left"):
            store.write(0, shard(0))
    assert store.missing() == [0, 1, 2]
    assert not list(tmp_path.rglob("*.tmp"))
    store.write(0, shard(0))
    assert store.missing() == [1, 2]


def test_a_full_disk_leaves_no_half_copy(tmp_path, monkeypatch):
    """Reading fails with what to do, the shards are still there, and with room again it works."""
    store = make_store(tmp_path)
    for index in store.missing():
        store.write(index, shard(index))
    store.finish()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(datasets.arrow_writer.ArrowWriter, "write_table", fail)
        with pytest.raises(OSError, match=r"Could not copy rows to .*: .*No space left on device. .* make room"):
            store.table("numbers")
    assert not list(tmp_path.rglob("*.arrow"))
    assert store.missing() == []
    assert len(store.table("numbers")) == 6


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    """Of this shard; what others left is cleared away with theirs."""
    store = make_store(tmp_path)
    names = {
        ".00001-numbers.parquet.7.7.tmp": False,
        ".00001.json.7.7.tmp": False,
        ".00000-numbers.parquet.8.8.tmp": True,
        ".000012-numbers.parquet.9.9.tmp": True,  # shard 12 of a hundred thousand and more begins alike
    }
    for name in names:
        (tmp_path / "shards" / name).write_bytes(b"half")
    store.write(1, shard(1))
    assert {name: (tmp_path / "shards" / name).exists() for name in names} == names


def test_two_writers_of_the_same_shard(tmp_path, monkeypatch):
    """A second one, that writes it all while the first is in the middle of a table, does not disturb it."""
    store, other = make_store(tmp_path), make_store(tmp_path)
    write_table = pq.write_table

    def write_twice(table, path, **kwargs):
        write_table(table, path, **kwargs)
        monkeypatch.setattr(pq, "write_table", write_table)
        thread = threading.Thread(target=other.write, args=(1, shard(1)))
        thread.start()
        thread.join()

    monkeypatch.setattr(pq, "write_table", write_twice)
    store.write(1, shard(1))
    assert store.rows(1, "numbers") == [{"number": 1}, {"number": -1}]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("name", ["run [1]", "run*", "what?", "{a,b}", "a**", ".hidden", "100%"])
def test_folders_of_any_name(tmp_path, name):
    """They are no patterns."""
    store = make_store(tmp_path / name)
    for index in range(3):
        store.write(index, shard(index))
    store.finish()
    assert store.table("numbers")["number"][:] == [0, 0, 1, -1, 2, -2]


def test_tables_without_summary_do_not_count(tmp_path):
    """Killed between the last table and the summary: the shard is computed again."""
    store = make_store(tmp_path)
    store.write(0, shard(0))
    (tmp_path / "shards" / "00000.json").unlink()
    assert store.missing() == [0, 1, 2]


@pytest.mark.parametrize(
    ("config", "num_shards", "difference"),
    [
        ({"seed": 1, "sampling": CONFIG["sampling"]}, 3, "`seed` was 0, is now 1"),
        ({"seed": 0, "sampling": {"temperature": 0.7, "top_p": 0.9}}, 3, r"`sampling.temperature` was 1.0, is now 0.7"),
        ({"seed": 0, "sampling": {"top_p": 0.9}}, 3, r"`sampling.temperature` was 1.0, is now None"),
        (CONFIG | {"new": [1]}, 3, r"`new` was None, is now \[1\]"),
        (CONFIG, 4, "`num_shards` was 3, is now 4"),
    ],
)
def test_another_configuration_is_refused(tmp_path, config, num_shards, difference):
    """With what differs and the cure."""
    make_store(tmp_path)
    with pytest.raises(ValueError, match=f"holds results of another configuration: {difference}. .* delete this one"):
        make_store(tmp_path, config, num_shards)


def test_other_versions_are_said(tmp_path, monkeypatch, caplog):
    make_store(tmp_path)
    monkeypatch.setattr(dapo_trl.store, "versions", lambda: {"trl": "0.0"})
    with caplog.at_level(logging.WARNING):
        make_store(tmp_path)
    assert "was begun with other package versions" in caplog.text
    assert "is now '0.0'" in caplog.text


def test_other_tables_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Shard 0 has tables \['numbers'\], expected \['numbers', 'names'\]"):
        make_store(tmp_path).write(0, Shard({"numbers": []}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("00001.json", '{"rows": {"num', "00001.json is damaged: Unterminated string.* Delete it to compute the shard"),
        (
            "00001.json",
            "[]",
            "00001.json is damaged: it does not hold 'rows', 'counts', .* Delete it to compute",
        ),
        (
            "00001.json",
            '{"counts": {}, "begun": 0, "seconds": 1}',
            "00001.json is damaged: it does not hold 'rows', 'fingerprint'",
        ),
        (
            "00001.json",
            '{"rows": {}, "counts": {}, "begun": 0, "seconds": 1, "fingerprint": ""}',
            "00001.json is damaged: it is not of the tables numbers, names. Delete it to compute the shard again",
        ),
        (
            "00001-numbers.parquet",
            "PAR1",
            "00001-numbers.parquet is damaged or missing: .* Delete .*00001.json to",
        ),
        ("00001-numbers.parquet", None, "00001-numbers.parquet is damaged or missing: .* Delete .*00001.json to"),
        ("../manifest.json", "", "manifest.json is damaged: .* Delete it, and go on with the settings of this folder"),
        (
            "../manifest.json",
            '{"config": {}}',
            "manifest.json is damaged: it does not hold 'num_shards', 'versions'",
        ),
        (
            "../manifest.json",
            '{"config": {}, "num_shards": 3, "versions": {}, "counts": {}}',
            "manifest.json is damaged: it does not hold 'num_shards_used', 'rows', 'seconds', 'fingerprint'. Delete it",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    """With the cure, whichever way the rows are read; with it, only that shard is missing."""
    store = make_store(tmp_path)
    for index in range(3):
        store.write(index, shard(index))
    store.finish()
    path = tmp_path / "shards" / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        store.table("numbers")
    if "parquet" in name:
        with pytest.raises(ValueError, match=message):
            store.rows(1, "numbers")
    (path if "json" in name else path.with_name("00001.json")).unlink()
    assert make_store(tmp_path).missing() == ([] if "manifest" in name else [1])
