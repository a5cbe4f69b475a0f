"""
`run_folder.py`: what a critic is measured on, what is published is published once, checkpoints are numbered, and bad
folders are refused early.
"""

import functools
import json
import shutil
import threading
import time

import pytest
from datasets import Dataset

from dapo_trl.run_folder import (
    critic_folder,
    critic_folders,
    earlier_problems,
    held_out_problems,
    last_checkpoint,
    publish_once,
    refuse_closed_folder,
)


def test_critics_that_are_used(tmp_path):
    """Before rows are scored, all that are there; then those whose values the rows have. Others are no critics."""
    assert critic_folders(tmp_path) == []
    for name in ("critic", "critic-0", "critic-1", "critic-2", "critic-3", "critic-10", "critic-2.bak", "critic-old"):
        (tmp_path / name).mkdir()
    found = ["critic", "critic-2", "critic-3", "critic-10"]
    assert [path.name for path in critic_folders(tmp_path)] == found
    assert [critic_folder(tmp_path, number).name for number in (0, 1, 9)] == ["critic", "critic-2", "critic-10"]
    (tmp_path / "data").mkdir()
    scored = tmp_path / "data" / "scored.json"
    for config, number in (({"critic": {}}, 1), ({"critics": [None, None]}, 2)):
        scored.write_text(json.dumps({"config": config}))
        assert [path.name for path in critic_folders(tmp_path)] == found[:number]
    second = tmp_path / "iteration-2"
    (second / "data").mkdir(parents=True)
    (second / "data" / "scored.json").write_text(json.dumps({"config": {"critic": {}, "later_critics": "shift"}}))
    assert critic_folders(second) == [tmp_path / "critic"]
    scored.write_text("{")
    with pytest.raises(ValueError, match=r"scored\.json is damaged: .* Delete it to score the rows again"):
        critic_folders(tmp_path)


def test_held_out_problems_stay_so():
    """
    By hand: of 0 to 11 the first iteration holds out 0 and 10. The second has 10, which stays held out, 1, which it was
    trained on, and eleven new ones, of which the first and the eleventh are held out. The third has one of each kind.
    """
    first = [str(number) for number in range(12)]
    second = ["1", "10", *(f"new {number}" for number in range(11))]
    assert held_out_problems(first) == held_out_problems(first * 2) == {"0", "10"}
    assert held_out_problems(second, [first]) == {"10", "new 0", "new 10"}
    assert held_out_problems(["0", "new 10", "new 1", "newest"], [first, second]) == {"0", "new 10", "newest"}
    assert held_out_problems([], [first]) == held_out_problems([]) == set()
    assert held_out_problems(["3", "4"], [first]) == {"3"}  # there has to be one


def test_problems_of_earlier_iterations(tmp_path):
    """They lie beside: of the first in the run's folder itself. A folder that stands alone has none."""
    folders = [tmp_path, tmp_path / "iteration-2", tmp_path / "iteration-3"]
    for folder, shards in zip(folders, ((["a", "a"], ["b"]), (["b", "c"],), (["d"],)), strict=True):
        for number, problems in enumerate(shards):
            path = folder / "values" / "shards" / f"{number:05}-solutions.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_dict({"problem_id": problems}).to_parquet(str(path))
    assert [earlier_problems(folder) for folder in folders] == [[], [["a", "b"]], [["a", "b"], ["b", "c"]]]
    assert earlier_problems(tmp_path / "iteration-x") == []
    alone = shutil.move(folders[1], tmp_path / "alone" / "iteration-2")
    assert earlier_problems(alone) == [[]]


def test_published_once(tmp_path):
    """
    The main process uploads, the others wait, also if only that one knows the namespace; under another name or with
    other content it is done again.
    """
    uploads, others = [], []

    def push(folder, repo_id):
        uploads.append(repo_id)
        return f"https://huggingface.co/{repo_id}"

    wait = functools.partial(publish_once, tmp_path, "values", "abc", push, is_main=False)
    thread = threading.Thread(target=lambda: others.append(wait()), daemon=True)
    thread.start()
    time.sleep(0.2)
    assert not others
    address = publish_once(tmp_path, "me/values", "abc", push)
    thread.join(20)
    assert others == [address] == ["https://huggingface.co/me/values"]
    assert publish_once(tmp_path, "me/values", "abc", push) == address
    assert uploads == ["me/values"]
    publish_once(tmp_path, "me/other", "abc", push)
    publish_once(tmp_path, "me/other", "def", push)
    assert uploads == ["me/values", "me/other", "me/other"]


def test_what_cannot_be_published(tmp_path):
    """It is named, whatever the network raises, and tried again the next time."""

    def fail(folder, repo_id):
        raise Exception("no route to the Hub")

    with pytest.raises(OSError, match=r"values could not be published as me/values: no route to the Hub\. Start again"):
        publish_once(tmp_path / "values", "me/values", "abc", fail)
    assert publish_once(tmp_path, "me/values", "abc", lambda *_: "address") == "address"


def test_checkpoints_that_are_none(tmp_path):
    """A copy that somebody put aside is neither taken nor removed."""
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"epoch": 1}))
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()  # killed in the middle
    assert last_checkpoint(tmp_path, {}) == str(tmp_path / "checkpoint-9")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-11.bak", "checkpoint-9"]


def test_a_name_that_cannot_be_read_from(tmp_path):
    with pytest.raises(ValueError, match="has '::', which `datasets` takes for an archive"):
        refuse_closed_folder(tmp_path / "a::b")
    refuse_closed_folder(tmp_path / "a [1]*")
