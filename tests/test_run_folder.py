"""
`run_folder.py`: what a critic is measured on, what is published is published once, checkpoints are numbered, and bad
folders are refused early.
"""

import functools
import json
import threading
import time

import pytest

from dapo_trl.run_folder import (
    critic_folder,
    critic_folders,
    held_out_problems,
    last_checkpoint,
    measured_problems,
    publish_once,
    refuse_closed_folder,
    stage_times,
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
    third = ["0", "new 10", "new 1", "newest"]
    held_out, trained = set(), set()
    for problems, expected in (
        (first * 2, {"0", "10"}),
        (second, {"10", "new 0", "new 10"}),
        (third, {*third} - {"new 1"}),
    ):
        found = held_out_problems(problems, held_out, trained)
        assert found == expected
        held_out, trained = held_out | found, trained | set(problems) - found
    assert held_out_problems([], held_out, trained) == held_out_problems([]) == set()
    assert held_out_problems(["3", "4"], held_out, trained) == {"3"}  # there has to be one


def test_problems_that_a_critic_was_measured_on(tmp_path):
    """Those that scoring noted, else training; records of earlier versions noted none, and there it is every tenth."""
    problems = [str(number) for number in range(12)]
    assert measured_problems(tmp_path, problems) == {"0", "10"}
    for place, held_out in (("critic/stage.json", ["3", "4"]), ("data/scored.json", ["5"])):
        path = tmp_path / place
        path.parent.mkdir()
        path.write_text(json.dumps({"config": {}, "results": {}}))
        before = measured_problems(tmp_path, problems)
        path.write_text(json.dumps({"config": {}, "results": {"held_out": held_out}}))
        assert measured_problems(tmp_path, problems) == set(held_out) != before


def test_stages_of_an_iteration_with_the_critics_of_another(tmp_path):
    """Their trainings are stages of that one, also when only the other iteration is looked at."""
    second = tmp_path / "iteration-2"
    for place, config in (("critic/stage.json", {}), ("iteration-2/data/scored.json", {"later_critics": "shift"})):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text(json.dumps({"config": config, "seconds": 2.0}))
    assert list(stage_times(second, [second])) == ["data/scored"]
    assert list(stage_times(tmp_path, [tmp_path, second])) == ["critic", "iteration-2/data/scored"]


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
